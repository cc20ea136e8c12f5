"""Servers that answer with anything but an answer, asked by the model judge and by the engine's client."""

from __future__ import annotations

import asyncio
import base64
import gzip
import json
import socket
import struct
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from support.collected import collected

from swirl_fast.cli import main
from swirl_fast.config import ConfigError, EndpointConfig, load
from swirl_fast.engines.engine import EngineError, Request, Sampling
from swirl_fast.engines.sglang.client import Client, ServerFailure
from swirl_fast.http_client import HIDDEN, MAX_BODY, Http
from swirl_fast.judges.model import ModelJudge
from swirl_fast.judges.model.endpoint import MAX_TOKENS, _retry_after
from swirl_fast.trajectory import StepView
from swirl_fast.verdict import JudgeStats, Verdict

KEY = "sk-hostile-7Qv/2+e9&x"
TIMEOUT = 0.3  # seconds
LONG = 10.0  # seconds that no exchange takes, however slow the machine; without a deadline some take for ever
Answers = Callable[[socket.socket, threading.Event], None]


@contextmanager
def server(answer: Answers) -> Iterator[str]:
    """The URL of one that reads a request and lets `answer` write to the connection, which it then closes. The event is set at the end."""
    ended = threading.Event()

    def serve(connection: socket.socket) -> None:
        with connection, suppress(OSError):
            data = b""
            while b"\r\n\r\n" not in data:
                data += connection.recv(65536)
            head, _, body = data.partition(b"\r\n\r\n")
            length = next(
                (int(line[15:]) for line in head.split(b"\r\n") if line.lower().startswith(b"content-length:")), 0
            )
            while len(body) < length:
                body += connection.recv(65536)
            answer(connection, ended)

    def accept() -> None:
        while not ended.is_set():
            with suppress(OSError):
                threading.Thread(target=serve, args=(listening.accept()[0],), daemon=True).start()

    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.settimeout(0.05)
        thread = threading.Thread(target=accept, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        finally:
            ended.set()
            thread.join()


def raw(data: bytes) -> Answers:
    return lambda connection, ended: connection.sendall(data)


def http(body: bytes | str, status: str = "200 OK", *headers: str, length: object = None) -> Answers:
    data = body.encode("utf-8", "surrogatepass") if isinstance(body, str) else body
    head = [
        f"HTTP/1.1 {status}",
        "Connection: close",
        f"Content-Length: {len(data) if length is None else length}",
        *headers,
        "",
        "",
    ]
    return raw("\r\n".join(head).encode("latin-1") + data)


def drip(begin: bytes, more: bytes) -> Answers:
    """`more` for ever, faster than any time-out between two bytes."""

    def answer(connection: socket.socket, ended: threading.Event) -> None:
        connection.sendall(begin)
        while not ended.wait(0.02):
            connection.sendall(more)

    return answer


def flood(begin: bytes, more: bytes) -> Answers:
    def answer(connection: socket.socket, ended: threading.Event) -> None:
        connection.sendall(begin)
        while not ended.is_set():
            connection.sendall(more)

    return answer


def reset(begin: bytes) -> Answers:
    def answer(connection: socket.socket, ended: threading.Event) -> None:
        connection.sendall(begin)
        time.sleep(0.02)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    return answer


def chat(text: object, **more: object) -> str:
    return json.dumps({"choices": [{"message": {"content": text}, "finish_reason": "stop"}], **more})


OK = b"HTTP/1.1 200 OK\r\n"
CHUNKED = OK + b"Transfer-Encoding: chunked\r\n\r\n"
BEARER = f"Authorization: Bearer {KEY}"
CODES = base64.b64encode(f"user:{KEY}".encode()).decode()
BOMB = gzip.compress(gzip.compress(bytes(200 * 2**20)))

HOSTILE: dict[str, Answers] = {
    # time and size
    "nothing": lambda connection, ended: None,
    "silence": lambda connection, ended: (ended.wait(20), None)[1],
    "headers that drip": drip(OK, b"X-More: 1\r\n"),
    "a header that drips": drip(OK + b"X-More: ", b"1"),
    "a body that drips": drip(OK + b"Content-Length: 100000\r\n\r\n", b" "),
    "chunks that drip": drip(CHUNKED, b"1\r\n \r\n"),
    "an error that drips": drip(b"HTTP/1.1 500 No\r\nContent-Length: 100000\r\n\r\n", b" "),
    "a body without end": flood(OK + b"\r\n", b"[" * 65536),
    "chunks without end": flood(CHUNKED, b"10000\r\n" + b" " * 65536 + b"\r\n"),
    "an error without end": flood(b"HTTP/1.1 400 No\r\n\r\n", b"no " * 20000),
    "headers without end": flood(OK, b"X-More: " + b"1" * 1000 + b"\r\n"),
    "hints without end": flood(b"", b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n" * 100),
    "continue without end": drip(b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
    "5 MB of JSON": http(chat("x" * (MAX_BODY + 1))),
    "a double gzip bomb": http(BOMB, "200 OK", "Content-Encoding: gzip, gzip"),
    "a gzip bomb as an error": http(BOMB, "400 Bad Request", "Content-Encoding: gzip"),
    "brotli": http(b"\x8b\x02\x80", "200 OK", "Content-Encoding: br"),
    "an encoding of nobody's": http(chat("VERDICT: GOOD"), "200 OK", "Content-Encoding: x-\x1b[31m"),
    # the protocol
    "HTTP/0.9": raw(b"<html>hello</html>"),
    "another protocol": raw(b"SSH-2.0-OpenSSH_9.6\r\n"),
    "binary": raw(bytes(range(256)) * 40),
    "a status of five digits": raw(b"HTTP/1.1 20000 OK\r\n\r\n"),
    "a status of words": raw(b"HTTP/1.1 fine OK\r\n\r\n"),
    "an upgrade": raw(b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n{}"),
    "a length that is too long": http("{}", length=50),
    "a length that is too short": http(chat("VERDICT: GOOD"), length=5),
    "a negative length": http("{}", length=-1),
    "a length of words": http("{}", length="many"),
    "a length beyond numbers": http("{}", length="9" * 5000),
    "two lengths": http("{}", "200 OK", "Content-Length: 7"),
    "chunks of garbage": raw(CHUNKED + b"zz\r\n{}\r\n0\r\n\r\n"),
    "a chunk of 2^63": raw(CHUNKED + b"7fffffffffffffff\r\n{}"),
    "a header without a name": raw(OK + b": x\r\n\r\n{}"),
    "a header of controls": raw(OK + b"X: \x00\x1b[2J\r\n\r\n{}"),
    "reset at once": reset(b""),
    "reset in the status": reset(b"HTTP/1."),
    "reset in the headers": reset(OK + b"Content-Le"),
    "reset in the body": reset(OK + b"Content-Length: 50\r\n\r\n{"),
    "a redirect": http("", "302 Found", "Location: http://127.0.0.1:9/v1"),
    "a redirect to itself": http("", "307 Temporary Redirect", "Location: /v1/chat/completions"),
    "no content": raw(b"HTTP/1.1 204 No Content\r\n\r\n"),
    "a status that nobody knows": http("well", "799 What"),
    # what should be JSON
    "HTML": http("<html>a proxy's page</html>", "200 OK", "Content-Type: text/html"),
    "an error with status 200": http('{"error": {"message": "overloaded"}}'),
    "half a surrogate in UTF-8": http('{"choices": "\ud83d"}'),
    "UTF-16": http(chat("VERDICT: GOOD").encode("utf-16")),
    "latin-1": http(b'{"error": "\xfc\xff\xfe"}'),
    "lists in lists": http("[" * 200_000),
    "lists in lists that end": http("[" * 990 + "]" * 990),
    "objects in objects": http('{"choices":' * 100_000),
    "a number of a million digits": http('{"choices": ' + "9" * 1_000_000 + "}"),
    "numbers that are none": http('{"choices": NaN, "usage": Infinity, "meta_info": -1e999}'),
    "a string": http('"choices"'),
    "controls": http("\x1b[2J\x1b]0;owned\x07\x00", "400 Bad Request"),
    # the key
    "the key in the status": raw(f"HTTP/1.1 500 {BEARER}\r\n\r\n".encode()),
    "the key in place of the status": raw(BEARER.encode() + b"\r\n\r\n"),
    "the key in a wrong header": raw(OK + f"Content-Length: {KEY}\r\n\r\n".encode()),
    "the key as a chunk": raw(CHUNKED + KEY.encode() + b"\r\n"),
    "the key as an encoding": http("{}", "200 OK", f"Content-Encoding: {KEY}"),
    "the key in a redirect": http(BEARER, "302 Found", f"Location: http://{KEY}@127.0.0.1:9/"),
    "the key as no JSON": http(BEARER),
    "the key with 400": http(json.dumps({"error": {"message": BEARER}}), "400 Bad Request"),
    "the key with 401": http(BEARER, "401 Unauthorized"),
    "the key with 503": http(BEARER, "503 Busy", f"Retry-After: {KEY}"),
    "the key for a URL": http(urllib.parse.quote(KEY, safe=""), "500 No"),
    "the key in JSON's escapes": http("".join(f"\\u{ord(c):04X}" for c in KEY), "422 No"),
    "the key in base64": http(CODES, "500 No"),
    "the key in hexadecimal": http(KEY.encode().hex(), "500 No"),
    "the key over two lines": http(KEY[:7] + "\n" + KEY[7:], "500 No"),
    "the key after 250 characters": http("." * 290 + KEY, "500 No"),
}  # fmt: skip


def assert_no_key(text: str) -> None:
    bare = "".join(text.split()).lower()
    half = base64.b64encode(KEY[:12].encode()).decode()
    for form in (
        KEY,
        KEY[:12],
        urllib.parse.quote(KEY[4:], safe=""),
        KEY[4:12].encode().hex(),
        "\\u0068\\u006f\\u0073\\u0074",
    ):
        assert form.lower() not in bare
    assert half[:12] not in text and CODES[8:20] not in text and CODES[12:24] not in text


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)


def step(text: str = "<math_exp>1+1</math_exp>") -> StepView:
    return StepView("sums", "How much?", (), text)


def judged(answer: Answers, **settings: object) -> tuple[str, object]:
    """(what is said, the judgement or the error) of one step."""
    with server(answer) as url:
        config = EndpointConfig(**{"url": f"{url}/v1", "model": "m", "timeout": LONG, "retries": 0, **settings})
        judge = ModelJudge(config)
        try:
            (judgement,) = judge.judge([step()])
            return judgement.reason, judgement
        except ConfigError as error:
            return str(error), error
        finally:
            judge.close()


def asked_of_the_engine(answer: Answers, timeout: float = LONG) -> list[object]:
    """What becomes of a generation, a description, a command and a look at its health."""

    async def ask(url: str) -> list[object]:
        client = Client(url, KEY, timeout)
        request = Request([1, 2, 3], Sampling(4), 2, (7,))
        try:
            return await asyncio.gather(
                client.generate(request, 0, "run:0", None),
                client.info(timeout),
                client.control("/flush_cache", {}, timeout),
                client.healthy(timeout),
                client.warm([1, 2, 3], "run:0"),
                return_exceptions=True,
            )
        finally:
            await client.close()

    with server(answer) as url:
        return asyncio.run(ask(url))


@pytest.mark.parametrize("name", HOSTILE)
def test_the_judge_says_unknown_or_one_clear_error(name: str, capfd: pytest.CaptureFixture[str]) -> None:
    start = time.monotonic()
    text, outcome = judged(HOSTILE[name], timeout=TIMEOUT)
    assert time.monotonic() - start < LONG
    if not isinstance(outcome, ConfigError):
        assert outcome.verdict is Verdict.UNKNOWN and text
    assert len(text) < 800 and text.isprintable() or "\n" in text
    out, err = capfd.readouterr()
    assert "Traceback" not in out + err
    assert_no_key(text + out + err)


@pytest.mark.parametrize("name", HOSTILE)
def test_the_engines_client_raises_one_clear_error(name: str, capfd: pytest.CaptureFixture[str]) -> None:
    start = time.monotonic()
    generated, info, done, healthy, warm = asked_of_the_engine(HOSTILE[name], TIMEOUT)
    assert time.monotonic() - start < LONG
    for outcome in (generated, info, warm):
        assert isinstance(outcome, ServerFailure | EngineError | ValueError), repr(outcome)
    assert done is None or isinstance(done, ServerFailure | EngineError | ValueError), repr(done)
    assert isinstance(healthy, bool)
    text = "\n".join(str(one) for one in (generated, info, done, warm))
    out, err = capfd.readouterr()
    assert len(text) < 4000 and "Traceback" not in out + err
    assert "\x1b" not in text and "\x00" not in text
    text.encode()  # no lone surrogate
    assert_no_key(text + out + err)


def test_a_redirect_is_not_followed_with_the_key() -> None:
    heard: list[bytes] = []

    def elsewhere(connection: socket.socket, ended: threading.Event) -> None:
        heard.append(b"asked")

    with server(elsewhere) as other:
        answer = http("", "307 Temporary Redirect", f"Location: {other}/v1/chat/completions")
        text, error = judged(answer)
        asked_of_the_engine(answer)
    assert (
        isinstance(error, ConfigError) and "no redirect is followed; give the final address in judge.model.url" in text
    )
    assert not heard


@pytest.mark.parametrize(
    ("usage", "stats"),
    [
        ({"prompt_tokens": 90, "prompt_tokens_details": {"cached_tokens": 40}}, JudgeStats(90, 40)),
        ({"prompt_tokens": 90, "prompt_tokens_details": {"cached_tokens": int("9" * 4000)}}, JudgeStats(90, 90)),
        ({"prompt_tokens": int("9" * 4000)}, JudgeStats(MAX_TOKENS, 0)),
        ({"prompt_tokens": -5, "prompt_tokens_details": {"cached_tokens": -7}}, JudgeStats()),
        ({"prompt_tokens": True, "prompt_tokens_details": []}, JudgeStats()),
        ({"prompt_tokens": 1e300, "prompt_tokens_details": {"cached_tokens": "many"}}, JudgeStats()),
        ([], JudgeStats()),
    ],
)  # fmt: skip
def test_counts_that_cannot_be_are_bounded(usage: object, stats: JudgeStats) -> None:
    with server(http(chat("VERDICT: GOOD", usage=usage))) as url:
        judge = ModelJudge(EndpointConfig(url=f"{url}/v1", model="m", retries=0))
        assert judge.judge([step()])[0].verdict is Verdict.GOOD
        assert judge.stats() == stats
        judge.close()


@pytest.mark.parametrize("content", [None, 5, ["VERDICT: GOOD"], {"text": "VERDICT: GOOD"}, True])
def test_a_reply_that_is_no_text_gives_no_verdict(content: object) -> None:
    _, judgement = judged(http(chat(content)))
    assert judgement.verdict is Verdict.UNKNOWN


def test_a_reply_is_kept_without_the_key_and_without_what_no_file_holds() -> None:
    text, judgement = judged(http(chat(f"Half a \ud83d, \x1b[31m, {BEARER}.\nVERDICT: GOOD")))
    assert judgement.verdict is Verdict.GOOD
    assert "Half a \ufffd, \ufffd[31m" in text and HIDDEN in text
    assert_no_key(text)


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        ("7", 7.0),
        ("-3", 0.0),
        ("1e400", 86400.0),
        ("9" * 5000, 86400.0),
        ("nan", None),
        ("soon", None),
        ("", None),
        ("Fri, 31 Dec 9999 23:59:59 GMT", 86400.0),
        ("Fri, 31 Dec 99999999999999999999 23:59:59 GMT", None),
        ("Wed, 21 Oct 2015 07:28:00 GMT", 0.0),
        ("Fri, 31 Dec 2015 23:59:59 +99999999999", 0.0),
        ("Fri, 31 Feb 2026 99:99:99 GMT", None),
    ],
)
def test_what_retry_after_may_ask_for(value: str, seconds: float | None) -> None:
    assert _retry_after(value) in (seconds, None)
    text, judgement = judged(http("busy", "503 Busy", f"Retry-After: {value}"))
    assert judgement.verdict is Verdict.UNKNOWN and "HTTP 503: busy" in text


META = {
    "finish_reason": {"type": "length"},
    "weight_version": "run:0",
    "prompt_tokens": 3,
    "cached_tokens": 0,
    "output_token_logprobs": [[-0.5, 11, None], [-0.5, 12, None], [-0.5, 13, None], [-0.5, 14, None]],
}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("weight_version", ["run:0"]),
        ("weight_version", KEY),
        ("weight_versions", [{"version": ["run:0"]}]),
        ("weight_versions", [{"version": {"a": KEY}}]),
        ("finish_reason", {"type": ["length"]}),
        ("finish_reason", {"type": "abort", "message": [BEARER] * 100}),
        ("prompt_tokens", int("9" * 4000)),
        ("cached_tokens", int("9" * 4000)),
        ("cached_tokens", True),
        ("output_token_logprobs", [[-int("9" * 4000), 11]] * 4),
        ("output_token_logprobs", [[False, 11]] * 4),
        ("output_token_logprobs", [[-1e300, 11]] * 4),
        ("output_token_logprobs", [[float("nan"), 11]] * 4),
        ("output_token_logprobs", {"11": -0.5}),
    ],
)
def test_a_completion_that_cannot_be_is_an_error(name: str, value: object) -> None:
    good, bad = [
        json.dumps([{"output_ids": [11, 12, 13, 14], "meta_info": {**META, **more}}] * 2)
        for more in ({}, {name: value})
    ]
    assert [one.tokens.tolist() for one in asked_of_the_engine(http(good))[0]] == [[11, 12, 13, 14]] * 2
    error = asked_of_the_engine(http(bad))[0]
    assert isinstance(error, ServerFailure | EngineError), repr(error)
    assert len(str(error)) < 800
    assert_no_key(str(error))


@pytest.mark.parametrize("value", [-1, 0, True, "x", [], 1e400, int("9" * 4000), None])
@pytest.mark.parametrize("name", ["max_model_len", "max_req_input_len", "tp_size"])
def test_a_server_that_describes_itself_wrongly_is_refused(name: str, value: object) -> None:
    said = {"max_model_len": 512, "max_req_input_len": 500, "tp_size": 1, name: value}
    body = json.dumps({"model_path": "m", "weight_version": "default", "version": "0.5.21", **said, "data": [said]})
    info = asked_of_the_engine(http(body))[1]
    if name == "max_req_input_len" and not value:
        assert info.max_context == 512
    else:
        assert isinstance(info, EngineError) and "lacks or garbles" in str(info)


@pytest.mark.parametrize(
    "text", [f"a {KEY[:9]}\u200b{KEY[9:]} b", f"a {urllib.parse.quote(KEY)} b", f"a {KEY.upper()} b"]
)
def test_every_form_of_the_key_is_hidden(text: str) -> None:
    assert Http(KEY).shown(text) == f"a {HIDDEN} b"


def test_a_key_of_few_letters_hides_no_words() -> None:
    assert Http("x").shown("an axe, Bearer x") == f"an axe, {HIDDEN}"
    assert Http("").shown("an axe") == "an axe"


@pytest.mark.parametrize("secret", ["http://me:PASS@host:1/v1", " https://PASS@host", "HTTP://me:PASS@host/x@y"])
@pytest.mark.parametrize(
    "name", ["judge.model.url", "judge.model.replicas", "engine.urls", "training.shards", "filter.upload"]
)
def test_an_address_with_a_password_is_refused_without_showing_it(
    name: str, secret: str, tmp_path: Path, capfd
) -> None:
    value = f"['{secret}']" if name in ("judge.model.replicas", "engine.urls") else secret
    with pytest.raises(ConfigError, match=rf"^{name}: .*leave them out, and put (a key|credentials)") as error:
        load(None, [f"run.folder={tmp_path}", f"{name}={value}"])
    assert "PASS" not in str(error.value)
    assert main(["judge", f"run.folder={tmp_path}", "run.name=r", f"{name}={value}"]) == 2
    assert "PASS" not in "".join(capfd.readouterr()) and not list(tmp_path.rglob("*"))


def test_an_address_with_a_key_in_its_query_is_refused() -> None:
    with pytest.raises(ConfigError, match="judge.model.url: .*query") as error:
        load(None, ["judge.model.url=https://host/v1?key=PASS"])
    assert "PASS" not in str(error.value)
    load(None, ["training.shards=s3://bucket/a@b", "judge.model.url=https://host/@me/v1"])


def test_a_key_among_the_flags_is_refused_without_showing_it() -> None:
    for flags in ("[--api-key, PASS]", "['--api-key=PASS']"):
        with pytest.raises(ConfigError, match="engine.launch.flags: .*variable SGLANG_API_KEY") as error:
            load(None, [f"engine.launch.flags={flags}"])
        assert "PASS" not in str(error.value)


def test_a_key_over_plain_http_is_warned_about(
    recwarn: pytest.WarningsRecorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    for url in ("http://127.0.0.1:1/v1", "https://judge.example/v1"):
        ModelJudge(EndpointConfig(url=url)).close()
    assert not recwarn.list
    ModelJudge(EndpointConfig(url="http://judge.example/v1", replicas=["http://127.0.0.1:1/v1"])).close()
    Client("http://10.0.0.2:30000", KEY, 1.0)
    first, second = (str(one.message) for one in recwarn.list)
    assert first.startswith("judge.model.url: the key for judge.example is sent over plain http")
    assert second.startswith("engine.urls: the key for 10.0.0.2 is sent over plain http")
    monkeypatch.delenv("OPENAI_API_KEY")
    ModelJudge(EndpointConfig(url="http://judge.example/v1")).close()
    assert len(recwarn.list) == 2


@pytest.mark.parametrize("name", ["the key with 400", "the key with 401", "the key with 503", "the key in a reply"])
def test_a_stage_writes_the_key_nowhere(name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    answers = HOSTILE | {"the key in a reply": http(chat(f"{BEARER}\nVERDICT: GOOD"))}
    run = collected(tmp_path)
    with server(answers[name]) as url:
        settings = ["judge.kind=model", f"judge.model.url={url}/v1", "judge.model.retries=0", "judge.model.timeout=2"]
        main(["judge", *run, *settings])
        main(["report", *run, *settings])
    out, err = capfd.readouterr()
    assert "Traceback" not in out + err
    assert_no_key(out + err)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert any(path.name == "trajectories.db" for path in files)
    for path in files:
        assert KEY[:12].encode() not in path.read_bytes(), path
