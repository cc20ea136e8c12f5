"""Answers of a judge's endpoint and of an SGLang server that were changed at random: one clear error, and nothing that was not said."""

from __future__ import annotations

import asyncio
import json
import math
import socket
import threading
from collections.abc import Iterator
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.mutations import changed, damaged, written

from swirl_fast.config import ConfigError, EndpointConfig
from swirl_fast.engines.engine import EngineError, Request, Sampling
from swirl_fast.engines.sglang.client import Client, ServerFailure
from swirl_fast.judges.model import ModelJudge
from swirl_fast.trajectory import StepView
from swirl_fast.verdict import Verdict

TIMEOUT = 0.5  # seconds; what promises more than it sends is waited for
GOOD = "The sum is right.\nVERDICT: GOOD"
REPLY = {
    "id": "x",
    "model": "m",
    "choices": [{"index": 0, "message": {"role": "assistant", "content": GOOD}, "finish_reason": "stop"}],
    "usage": {"prompt_tokens": 90, "prompt_tokens_details": {"cached_tokens": 40}},
}
TOKENS = [11, 12, 13, 14]
COMPLETION = {
    "output_ids": TOKENS,
    "meta_info": {
        "finish_reason": {"type": "length"},
        "weight_version": "run:0",
        "prompt_tokens": 3,
        "cached_tokens": 0,
        "output_token_logprobs": [[-0.5, token, None] for token in TOKENS],
    },
}


class Server:
    """Answers every request with `answer`, a whole HTTP response, and ends the connection."""

    def __init__(self) -> None:
        self.answer = b""
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listening.getsockname()[1]}"
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        with suppress(OSError):
            while True:
                threading.Thread(target=self._reply, args=self._listening.accept()[:1], daemon=True).start()

    def _reply(self, connection: socket.socket) -> None:
        with connection, suppress(OSError):
            head, _, body = connection.recv(1 << 20).partition(b"\r\n\r\n")
            length = next(
                (int(line[15:]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")), 0
            )
            while len(body) < length:
                body += connection.recv(1 << 20)
            connection.sendall(self.answer)

    def close(self) -> None:
        self._listening.close()


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    one = Server()
    yield one
    one.close()


def response(body: bytes) -> bytes:
    return (
        b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
        % len(body)
        + body
    )


def answers(value: object) -> st.SearchStrategy[bytes]:
    """A whole response with another body, or with damage anywhere."""
    return changed(value).map(written).map(response) | damaged(response(written(value)))


def said(answer: bytes) -> list[str]:
    """The texts in a response, as far as its body can be read at all."""
    found: list[str] = []

    def texts(value: object) -> None:
        if isinstance(value, str):
            found.append(value)
        for one in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
            texts(one)

    start = answer.find(b"{")
    with suppress(ValueError, RecursionError):
        texts(json.JSONDecoder().raw_decode(answer[start:].decode("utf-8", "replace"))[0])
    return found


@given(answer=answers(REPLY))
def test_the_judge_says_what_the_endpoint_said_or_unknown(server: Server, answer: bytes) -> None:
    server.answer = answer
    judge = ModelJudge(EndpointConfig(url=f"{server.url}/v1", model="m", timeout=TIMEOUT, retries=0))
    try:
        (judgement,) = judge.judge([StepView("sums", "How much?", (), "<math_exp>1+1</math_exp>")])
    except ConfigError as error:
        assert server.url in str(error)
        return
    finally:
        judge.close()
    if judgement.verdict is Verdict.UNKNOWN:
        assert judgement.reason and judgement.reward is None
    else:
        last = f"VERDICT: {judgement.verdict.value}"
        assert any(text.rstrip().endswith(last) for text in said(answer)), "a verdict that nobody gave"


async def generated(url: str, request: Request) -> object:
    client = Client(url, "", TIMEOUT)
    try:
        return await client.generate(request, 0, "run:0", None)
    except (ServerFailure, EngineError, ValueError) as error:
        return error
    finally:
        await client.close()


@given(answer=answers([COMPLETION, COMPLETION]))
def test_a_completion_is_one_that_can_be_or_an_error(server: Server, answer: bytes) -> None:
    server.answer = answer
    outcome = asyncio.run(generated(server.url, Request([1, 2, 3], Sampling(4), 2, (7,))))
    if isinstance(outcome, Exception):
        assert server.url in str(outcome) and len(str(outcome)) < 800
        return
    assert isinstance(outcome, list) and len(outcome) == 2
    for one in outcome:
        tokens = one.tokens.tolist()
        assert 0 < len(tokens) <= 4 and all(0 <= token < 2**31 for token in tokens) and 7 not in tokens[:-1]
        assert len(one.logprobs) == len(tokens) and all(-math.inf < logprob <= 0 for logprob in one.logprobs)
        assert str(tokens)[1:-1] in answer.decode("utf-8", "replace"), "tokens that nobody sampled"
