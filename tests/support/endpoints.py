"""Chat endpoints on this machine that stand for a judge's server."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from swirl_fast.config import EndpointConfig
from swirl_fast.judges.model import ModelJudge


class JudgeServer(BaseHTTPRequestHandler):
    """An OpenAI-compatible endpoint whose verdict is a function of the prompt's text, so that rewards differ between actions: a good
    third GOOD, some without a verdict, the rest BAD."""

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        content = body["messages"][-1]["content"]
        number = hashlib.sha256(content.encode()).digest()[0]
        good, bad = ("YES", "NO") if "BEGIN ANSWER KEY" in content else ("GOOD", "BAD")
        verdict = good if number < 120 else bad
        silent = self.path.startswith("/silent") or number < 20
        reply = "I cannot say." if silent else f"Because of this and that.\nVERDICT: {verdict}"
        answer = {"choices": [{"message": {"role": "assistant", "content": reply}, "finish_reason": "stop"}]}
        data = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


def completion(text: str | None, finish: str = "stop") -> tuple[int, bytes]:
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": finish}
    return 200, json.dumps({"object": "chat.completion", "choices": [choice]}).encode()


class Endpoint:
    """respond(request, number) -> (status, body[, headers]); number counts requests from 0."""

    def __init__(self, respond: Callable) -> None:
        self.requests: list[dict] = []
        self.headers: list[dict[str, str]] = []
        self.paths: list[str] = []
        self.at_once = self.most_at_once = 0
        self.released = threading.Event()  # ends responses that hang
        lock = threading.Lock()
        endpoint = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    number = len(endpoint.requests)
                    endpoint.requests.append(request)
                    endpoint.headers.append(dict(self.headers))
                    endpoint.paths.append(self.path)
                    endpoint.at_once += 1
                    endpoint.most_at_once = max(endpoint.most_at_once, endpoint.at_once)
                try:
                    self.send(respond(request, number))
                finally:
                    with lock:
                        endpoint.at_once -= 1

            def send(self, response) -> None:
                if response == "hang":
                    endpoint.released.wait(30)
                    self.close_connection = True
                    return
                if response == "drip":  # a byte now and then, for ever
                    self.send_response(200)
                    self.send_header("Content-Length", "1000")
                    self.end_headers()
                    while not endpoint.released.wait(0.05):
                        try:
                            self.wfile.write(b" ")
                        except OSError:
                            break
                    self.close_connection = True
                    return
                if response == "cut":
                    self.send_response(200)
                    self.send_header("Content-Length", "1000")
                    self.end_headers()
                    self.wfile.write(b'{"choices": [')
                    self.close_connection = True
                    return
                status, body, *headers = response
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                for name, value in (headers[0] if headers else {}).items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"


@contextmanager
def serving(respond: Callable, **settings: object) -> Iterator[tuple[Endpoint, ModelJudge]]:
    endpoint = Endpoint(respond)
    thread = threading.Thread(target=endpoint.server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    judge = ModelJudge(
        EndpointConfig(**{"url": endpoint.url, "model": "judge-1", "retries": 2, "timeout": 5.0, **settings})
    )
    try:
        yield endpoint, judge
    finally:
        endpoint.released.set()
        judge.close()
        endpoint.server.shutdown()
        thread.join()
        endpoint.server.server_close()


def prompt_of(request: dict) -> str:
    (message,) = request["messages"]
    assert message["role"] == "user"
    return message["content"]
