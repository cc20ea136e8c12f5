"""The engine for SGLang servers against `fake_sglang.py`, which misbehaves in every listed way: each has the promised outcome."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import fake_sglang
import pytest
import torch
from fake_sglang import FIELDS, Fake, FakeServer, continuation, digest_of, fingerprint, read_weights
from small_models import build
from torch import Tensor
from transformers import AutoModelForCausalLM

from swirl_fast.config import EngineConfig, LaunchConfig, WeightSyncConfig
from swirl_fast.engines import sglang_launch, sglang_servers, sglang_weights
from swirl_fast.engines.engine import Completion, Request, Sampling
from swirl_fast.engines.sglang import SGLangEngine
from swirl_fast.engines.sglang_client import AnswerError, EngineError

FAKE = Path(fake_sglang.__file__)
STOP = 7


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sglang_servers, "HEALTH_SECONDS", 1.0)
    monkeypatch.setattr(sglang_servers, "MONITOR_SECONDS", 0.1)
    monkeypatch.setattr(sglang_launch, "STOP_SECONDS", 1.0)
    warnings.filterwarnings("ignore", message="SGLang server .* is (dropped|started again|given up)")


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("served")
    build("llama", torch.float32).save_pretrained(folder)
    return folder


@pytest.fixture
def serve(model: Path) -> Iterator[Callable[..., FakeServer]]:
    """Starts fake servers in this process."""
    servers: list[FakeServer] = []

    def start(**options: object) -> FakeServer:
        server = FakeServer(Fake(**{"model_path": str(model), **options}))
        threading.Thread(target=lambda: server.serve_forever(poll_interval=0.01), daemon=True).start()
        servers.append(server)
        return server

    yield start
    for server in servers:
        server.fake.closing.set()
        server.shutdown()
        server.server_close()


@pytest.fixture
def attach(model: Path, tmp_path: Path) -> Iterator[Callable[..., SGLangEngine]]:
    """Engines of servers that run already."""
    engines: list[SGLangEngine] = []

    def make(*servers: FakeServer | str, sync: dict | None = None, engine: dict | None = None, **settings: object):
        urls = [server if isinstance(server, str) else server.url for server in servers]
        config = EngineConfig(
            kind="sglang",
            urls=urls,
            weight_sync=WeightSyncConfig(**{"timeout": 2.0, **(sync or {})}),
            **{"timeout": 2.0, "retries": 2, **settings},
        )
        engines.append(SGLangEngine(config, model, tmp_path / "engine", **(engine or {})))
        return engines[-1]

    yield make
    for one in engines:
        one.close()


@pytest.fixture
def launch(model: Path, tmp_path: Path) -> Iterator[Callable[..., SGLangEngine]]:
    """Engines that start fake servers themselves."""
    engines: list[SGLangEngine] = []

    def make(
        script: str = "", sync: dict | None = None, engine: dict | None = None, launch: dict | None = None, **settings
    ) -> SGLangEngine:
        config = EngineConfig(
            kind="sglang",
            weight_sync=WeightSyncConfig(**{"timeout": 5.0, **(sync or {})}),
            launch=LaunchConfig(
                **{
                    "servers": 2,
                    "port": free_port(),
                    "python": str(interpreter(tmp_path / "python", script)),
                    "startup_timeout": 20.0,
                    **(launch or {}),
                }
            ),
            **{"timeout": 5.0, "retries": 3, "dtype": "float32", **settings},
        )
        engines.append(SGLangEngine(config, model, tmp_path / "engine", **(engine or {})))
        return engines[-1]

    yield make
    for one in engines:
        one.close()


def interpreter(file: Path, script: str = "") -> Path:
    """A program that stands for an interpreter with sglang: `FILE -m sglang.launch_server …` runs the fake server."""
    file.write_text(f'#!/bin/sh\nshift 2\n{script or f"""exec {sys.executable} {FAKE} "$@" """}\n')
    file.chmod(0o755)
    return file


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def ask(url: str, path: str, body: dict | None = None) -> dict:
    data = None if body is None else json.dumps(body).encode()
    with urllib.request.urlopen(urllib.request.Request(url + path, data), timeout=10) as answer:
        return json.load(answer)


def until(true: Callable[[], object], what: str, seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, f"not in {seconds} s: {what}"
        time.sleep(0.02)


def runs(pid: int) -> bool:
    """Whether a process is there and no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def prompt(number: int, length: int) -> list[int]:
    return [(31 * number + 7 * i + i * i % 11) % 90 for i in range(length)]


def request(number: int = 0, length: int = 20, n: int = 2, limit: int = 6, key: str | None = None) -> Request:
    sampling = Sampling(limit)
    return Request(prompt(number, length), sampling, n, (STOP,), cache_key=f"t{number}" if key is None else key)


def nested(trajectory: int, states: int = 5, step: int = 40, n: int = 8) -> list[Request]:
    """All states of a trajectory, the shortest first."""
    return [request(trajectory, step * (1 + state), n) for state in range(states)]


def of(weights: str, one: Request) -> list[tuple[list[int], list[float]]]:
    """What a server with these weights answers."""
    return [
        continuation(weights, list(one.tokens), index, one.sampling.max_new_tokens, one.stop_ids)
        for index in range(one.n)
    ]


def assert_from(results: list[list[Completion]], requests: Sequence[Request], weights: str, version: int) -> None:
    """Every request has exactly its n completions, of these weights."""
    assert len(results) == len(requests)
    for completions, one in zip(results, requests, strict=True):
        assert [(c.tokens, c.logprobs) for c in completions] == of(weights, one)
        assert {c.policy_version for c in completions} == {version}
        assert all(c.finish == ("stop" if c.tokens[-1] == STOP else "length") for c in completions)


def original(model: Path) -> str:
    return fingerprint(read_weights(model))


def changed(model: Path, factor: float) -> list[tuple[str, Tensor]]:
    """The model's weights, all multiplied, as the trainer hands them over; the tied output layer among them."""
    whole = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    return [(name, tensor * factor) for name, tensor in whole.state_dict().items()]


def weights_of(named: Sequence[tuple[str, Tensor]]) -> str:
    return fingerprint({name: digest_of(tensor) for name, tensor in named if name != "lm_head.weight"})


MANY = [request(number) for number in range(8)]


# --- one request ---


def test_a_request_asks_for_what_was_meant(serve, attach, model: Path) -> None:
    server = serve()
    engine = attach(server)
    sampling = Sampling(5, temperature=0.7, top_p=0.9, top_k=3)
    asked = Request(prompt(1, 12), sampling, n=3, stop_ids=(STOP, 9), seed=5)
    (completions,) = engine.generate([asked])
    assert [(c.tokens, c.logprobs) for c in completions] == of(original(model), asked)
    body = server.fake.of("/generate")[-1]["body"]
    assert body["input_ids"] == list(asked.tokens) and body["return_logprob"] and body["extra_key"] == "swirl:0"
    wanted = {"n": 3, "max_new_tokens": 5, "temperature": 0.7, "top_p": 0.9, "top_k": 3, "stop_token_ids": [STOP, 9]}
    assert wanted.items() <= body["sampling_params"].items()
    assert body["sampling_params"]["ignore_eos"] is False and "sampling_seed" not in body["sampling_params"]
    engine.generate([Request([1, 2], Sampling(3))])
    parameters = server.fake.of("/generate")[-1]["body"]["sampling_params"]
    assert parameters["ignore_eos"] is True and parameters["top_k"] == -1


def test_seeds_where_the_server_takes_them(serve, attach, model: Path) -> None:
    server = serve(deterministic=True)
    engine = attach(server)
    one, other = (Request(prompt(1, 12), Sampling(5), n=4, seed=seed) for seed in (1, 2))
    ((a,), (b,), (c,)) = (engine.generate([r]) for r in (one, other, one))
    assert len({tuple(completion.tokens) for completion in a}) == 4, "the samples of one request differ"
    assert [x.tokens for x in a] == [x.tokens for x in c] != [x.tokens for x in b]


@pytest.mark.parametrize("how", FIELDS)
def test_a_wrong_field_is_an_error_that_names_it(serve, attach, model: Path, how: str) -> None:
    server = serve()
    engine = attach(server)
    asked = next(r for r in (request(i) for i in range(50)) if len(of(original(model), r)[0][0]) == 6)
    server.fake.misbehave("/generate", how)
    with pytest.raises(AnswerError) as error:
        engine.generate([asked])
    assert FIELDS[how][0] in str(error.value) and server.url in str(error.value)
    assert len(server.fake.of("/generate")) == 1, "asking again cannot mend it"
    assert_from(engine.generate([asked]), [asked], original(model), 0)


@pytest.mark.parametrize("how", ["no-json", "list", "one too few"])
def test_an_answer_of_another_kind_is_an_error(serve, attach, model: Path, how: str) -> None:
    server = serve()
    engine = attach(server)
    server.fake.misbehave("/generate", how)
    with pytest.raises(AnswerError, match="no JSON" if how == "no-json" else "completions instead of 2"):
        engine.generate([request()])
    assert_from(engine.generate([request()]), [request()], original(model), 0)


@pytest.mark.parametrize("how", ["500", "503", "429", "cut", "drop", "abort", "hang", "drip"])
@pytest.mark.parametrize("servers", [1, 2])
def test_one_failure_is_tried_again(serve, attach, model: Path, how: str, servers: int) -> None:
    """Elsewhere where there is another; the server is not dropped, for it is healthy."""
    fakes = [serve() for _ in range(servers)]
    engine = attach(*fakes, timeout=1.0)
    fakes[0].fake.misbehave("/generate", how)
    assert_from(engine.generate([request(0)]), [request(0)], original(model), 0)
    assert [len(fake.fake.of("/generate")) for fake in fakes] == ([2] if servers == 1 else [1, 1])
    assert_from(engine.generate(MANY), MANY, original(model), 0)
    assert all(len(fake.fake.of("/generate")) > 2 for fake in fakes)


@pytest.mark.parametrize("how", ["500", "abort", "cut"])
def test_a_lasting_failure_is_an_error_with_the_number_of_tries(serve, attach, how: str) -> None:
    server = serve()
    engine = attach(server, retries=2)
    server.fake.misbehave("/generate", how, -1)
    with pytest.raises(EngineError, match=r"failed 3 times \(engine.retries=2\)") as error:
        engine.generate([request()])
    assert str(error.value).count(server.url) == 3 and "goes on from what is stored" in str(error.value)
    assert len(server.fake.of("/generate")) == 3
    server.fake.behave()
    assert engine.generate([request()])


def test_a_failing_server_does_not_end_the_others_work(serve, attach, model: Path) -> None:
    bad, good = serve(), serve()
    engine = attach(bad, good)
    bad.fake.misbehave("/generate", "500", -1)
    assert_from(engine.generate(MANY), MANY, original(model), 0)


@pytest.mark.parametrize(("how", "error", "match"), [("400", ValueError, "HTTP 400"), ("404", EngineError, "HTTP 404")])
def test_a_refused_request_is_not_tried_again(serve, attach, how: str, error: type, match: str) -> None:
    server = serve()
    engine = attach(server)
    server.fake.misbehave("/generate", how)
    with pytest.raises(error, match=match):
        engine.generate([request()])
    assert len(server.fake.of("/generate")) == 1


def test_impossible_requests_are_refused_here(serve, attach) -> None:
    server = serve(context=64)
    engine = attach(server)
    assert engine.max_context == 58, "the server's own limit counts"
    for bad in (
        Request([], Sampling(3)),
        Request([1], Sampling(58)),
        Request([1], Sampling(0)),
        Request([1], Sampling(3), n=0),
        Request([1], Sampling(3, temperature=-1)),
        Request([1], Sampling(3, top_p=0)),
    ):
        with pytest.raises(ValueError, match="request 1"):
            engine.generate([request(), bad])
    assert not server.fake.of("/generate")
    assert engine.generate([Request([1], Sampling(57))])


def test_the_key(serve, attach, monkeypatch: pytest.MonkeyPatch) -> None:
    server = serve(api_key="secret")
    with pytest.raises(EngineError, match=r"refuses the key .* engine.api_key_env") as error:
        attach(server)
    monkeypatch.setenv("SGLANG_API_KEY", "wrong")
    with pytest.raises(EngineError, match="engine.api_key_env") as error:
        attach(server)
    assert "wrong" not in str(error.value) and "secret" not in str(error.value)
    monkeypatch.setenv("OTHER", "secret")
    engine = attach(server, api_key_env="OTHER")
    assert engine.generate([request()])
    server.fake.misbehave("/generate", "401")
    with pytest.raises(EngineError, match="engine.api_key_env"):
        engine.generate([request()])


@pytest.mark.parametrize("path", ["/model_info", "/server_info", "/v1/models"])
@pytest.mark.parametrize("how", ["list", "no-json", "404"])
def test_what_is_no_sglang_server_is_named(serve, attach, path: str, how: str) -> None:
    server = serve()
    server.fake.misbehave(path, how)
    with pytest.raises(EngineError, match="SGLang|no JSON") as error:
        attach(server)
    assert server.url in str(error.value)


def test_no_server_there(attach) -> None:
    with pytest.raises(EngineError, match=r"engine.urls: http://127.0.0.1:\d+/model_info.*running there"):
        attach(f"http://127.0.0.1:{free_port()}")


# --- attached servers that fail ---


@pytest.mark.parametrize("how", ["hang", "drop", "503"])
def test_a_server_without_a_sign_of_life_is_dropped(serve, attach, model: Path, how: str) -> None:
    dead, good = serve(), serve()
    engine = attach(dead, good, timeout=1.0)
    assert_from(engine.generate(MANY), MANY, original(model), 0)
    dead.fake.misbehave("*", how, -1)
    with pytest.warns(UserWarning, match=f"{dead.url} is dropped"):
        assert_from(engine.generate(MANY), MANY, original(model), 0)
    before = len(dead.fake.requests)
    assert_from(engine.generate(MANY), MANY, original(model), 0)
    assert len(dead.fake.requests) == before
    good.fake.misbehave("*", how, -1)
    with pytest.raises(EngineError) as error:
        engine.generate(MANY)
    assert (
        dead.url in str(error.value) and good.url in str(error.value) and "no SGLang server is left" in str(error.value)
    )


@pytest.mark.parametrize("how", ["stale", "stale span"])
def test_stale_weights_are_never_returned(serve, attach, model: Path, how: str) -> None:
    stale, good = serve(), serve()
    engine = attach(stale, good)
    stale.fake.misbehave("/generate", how, -1)
    with pytest.warns(UserWarning, match=f"{stale.url} is dropped.*somebody:7"):
        assert_from(engine.generate(MANY), MANY, original(model), 0)
    assert engine.generate(MANY) and len(stale.fake.of("/generate")) <= len(MANY)
    good.fake.misbehave("/generate", how, -1)
    with pytest.raises(EngineError) as error:
        engine.generate(MANY)
    assert all(part in str(error.value) for part in (stale.url, good.url, "somebody:7"))


def test_somebody_else_updates_a_server(serve, attach, model: Path, tmp_path: Path) -> None:
    """Also when the weights' names differ in nothing but the run's label."""
    theirs, ours = serve(), serve()
    engine = attach(theirs, ours)
    AutoModelForCausalLM.from_pretrained(model).half().save_pretrained(tmp_path / "other")
    body = {"model_path": str(tmp_path / "other"), "weight_version": "other:0"}
    ask(theirs.url, "/update_weights_from_disk", body)
    with pytest.warns(UserWarning, match=f"{theirs.url} is dropped.*other:0"):
        assert_from(engine.generate(MANY), MANY, original(model), 0)


# --- attaching ---


def test_an_untouched_server_of_the_same_folder_is_only_named_anew(serve, attach, model: Path) -> None:
    server = serve()
    engine = attach(server, engine={"label": "mine"})
    assert server.fake.weight_version == "mine:0" and not server.fake.of("/update_weights_from_disk")
    again = attach(server, engine={"label": "mine"})
    assert len(server.fake.of("/update_weight_version")) == 1, "it serves these weights already"
    assert_from(engine.generate(MANY), MANY, original(model), 0)
    assert_from(again.generate(MANY), MANY, original(model), 0)


@pytest.mark.parametrize("state", ["other folder", "updated before"])
def test_another_server_reads_the_folder(serve, attach, model: Path, tmp_path: Path, state: str) -> None:
    other = tmp_path / "other"
    AutoModelForCausalLM.from_pretrained(model).half().save_pretrained(other)
    server = serve(model_path=str(other)) if state == "other folder" else serve(weight_version="somebody:3")
    engine = attach(server)
    assert server.fake.of("/update_weights_from_disk")[0]["body"]["model_path"] == str(model)
    assert server.fake.fingerprint == original(model) and not server.fake.paused
    assert_from(engine.generate(MANY), MANY, original(model), 0)


@pytest.mark.parametrize("how", ["refuse", "500", "hang"])
def test_a_server_that_cannot_read_the_folder_is_an_error_that_names_both(serve, attach, model: Path, how: str) -> None:
    server = serve(weight_version="somebody:3")
    server.fake.misbehave("/update_weights_from_disk", how)
    with pytest.raises(EngineError) as error:
        attach(server, sync={"timeout": 1.0})
    assert server.url in str(error.value) and str(model) in str(error.value) and "--model-path" in str(error.value)


# --- weights ---


@pytest.mark.parametrize("method", ["disk", "tensor"])
def test_an_update_reaches_every_server(serve, attach, model: Path, method: str) -> None:
    servers = [serve(), serve()]
    engine = attach(*servers, sync={"method": method})
    states = nested(1) + nested(2)
    assert_from(engine.generate(states), states, original(model), 0)
    for version, factor in ((1, 2.0), (2, 3.0)):
        new = changed(model, factor)
        assert any(server.fake.cache for server in servers)
        engine.update_weights(iter(new), version)
        assert not any(server.fake.cache for server in servers), "they are flushed, besides the other extra_key"
        before = [len(server.fake.of("/generate")) for server in servers]
        stats = engine.stats()
        assert_from(engine.generate(states), states, weights_of(new), version)
        sent = [one for s, n in zip(servers, before, strict=True) for one in s.fake.of("/generate")[n:]]
        assert {one["body"]["extra_key"] for one in sent} == {f"swirl:{version}"}
        now = engine.stats()
        cached = now.cached_tokens - stats.cached_tokens
        assert cached == now.cacheable_tokens - stats.cacheable_tokens, "nothing of the weights before was found"
        for server in servers:
            assert server.fake.of("/generate")[-1] in sent and not server.fake.paused and not server.fake.session


@pytest.mark.parametrize("method", ["disk", "tensor"])
@pytest.mark.parametrize(
    ("fault", "error"), [("unknown", KeyError), ("missing", KeyError), ("shape", ValueError), ("source", OSError)]
)
def test_bad_weights_change_nothing(serve, attach, model: Path, method: str, fault: str, error: type) -> None:
    servers = [serve(), serve()]
    engine = attach(*servers, sync={"method": method, "bucket_mb": 0.01})
    new = changed(model, 2.0)
    name, tensor = new[-2]
    bad = {
        "unknown": [*new, ("model.more.weight", tensor)],
        "missing": [*new[:-2], new[-1]],
        "shape": [*new[:-2], (name, tensor[:-1]), new[-1]],
        "source": new,
    }[fault]

    def stream(named: Sequence[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        yield from named
        if fault == "source":
            raise OSError("a checkpoint cannot be read")

    for version, weights in ((0, original(model)), (1, weights_of(changed(model, 5.0)))):
        if version:
            engine.update_weights(changed(model, 5.0), version)
        with pytest.raises(error) as raised:
            engine.update_weights(stream(bad), version + 1)
        assert {"unknown": "model.more.weight", "source": "cannot be read"}.get(fault, name) in str(raised.value)
        before = [len(server.fake.of("/generate")) for server in servers]
        assert_from(engine.generate(MANY), MANY, weights, version)
        assert all(len(s.fake.of("/generate")) > n for s, n in zip(servers, before, strict=True))


def fails_at(number: int) -> Callable[[Tensor, torch.dtype], Tensor]:
    """Gathers tensors, but not the number-th: a rank was lost."""
    count = iter(range(number + 1))

    def gather(tensor: Tensor, dtype: torch.dtype) -> Tensor:
        if next(count) == number:
            raise OSError("a rank was lost")
        return tensor.detach().to(dtype)

    return gather


def test_weights_come_in_buckets(serve, attach, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server = serve()
    limit = 20_000
    engine = attach(server, sync={"method": "tensor", "bucket_mb": limit / 2**20})
    held: list[int] = []
    new = changed(model, 2.0)

    gathered = 0

    def gather(tensor: Tensor, dtype: torch.dtype) -> Tensor:
        nonlocal gathered
        sent = server.fake.of("/update_weights_from_tensor")
        done = sum(len(request["body"].get("tensors", ())) for request in sent)
        gathered += 1
        held.append(sum(t.numel() * 4 for _, t in new[done:gathered]))
        return tensor.detach().to(dtype)

    monkeypatch.setattr(sglang_weights, "whole", gather)
    engine.update_weights(new, 1)
    buckets = [request["body"]["tensors"] for request in server.fake.of("/update_weights_from_tensor")]
    assert [name for bucket in buckets for name, _ in bucket] == [name for name, _ in new]
    sizes = [[size for _, size in bucket] for bucket in buckets]
    assert all(sum(size) <= limit or len(size) == 1 for size in sizes) and len(sizes) > 2
    assert all(sum(a) + b[0] > limit for a, b in zip(sizes, sizes[1:], strict=False)), "a bucket left room"
    largest = max(t.numel() * 4 for _, t in new)
    assert max(held) <= limit + largest, "no more than a bucket is held, and the tensor that did not fit"


def test_a_cast_to_the_servers_type(serve, attach, model: Path) -> None:
    server = serve()
    engine = attach(server, sync={"method": "tensor"}, dtype="bfloat16")
    new = changed(model, 2.0)
    engine.update_weights(new, 1)
    assert server.fake.fingerprint == weights_of([(name, tensor.bfloat16()) for name, tensor in new])


def test_servers_before_0_5_21(serve, attach, model: Path) -> None:
    server = serve(sessions=False)
    engine = attach(server, sync={"method": "tensor"})
    new = changed(model, 2.0)
    engine.update_weights(new, 1)
    assert_from(engine.generate(MANY), MANY, weights_of(new), 1)
    with pytest.raises(KeyError):
        engine.update_weights(changed(model, 3.0)[:-2], 2)
    assert_from(engine.generate(MANY), MANY, weights_of(new), 1)


FAULTS = [
    ("disk", "/pause_generation", "500"),
    ("disk", "/update_weights_from_disk", "refuse"),
    ("disk", "/update_weights_from_disk", "refuse-200"),
    ("disk", "/update_weights_from_disk", "hang"),
    ("disk", "/update_weights_from_disk", "drop"),
    ("disk", "/update_weights_from_disk", "400"),
    ("disk", "/continue_generation", "500"),
    ("disk", "/model_info", "list"),
    ("tensor", "/pause_generation", "hang"),
    ("tensor", "/begin_weight_update", "refuse"),
    ("tensor", "/update_weights_from_tensor", "refuse"),
    ("tensor", "/update_weights_from_tensor", "hang"),
    ("tensor", "/end_weight_update", "refuse"),
    ("tensor", "/flush_cache", "400"),
    ("tensor", "/update_weight_version", "refuse"),
    ("tensor", "/model_info", "no-json"),
]


@pytest.mark.parametrize(("method", "path", "how"), FAULTS)
def test_a_server_that_fails_in_an_update_is_mended(
    serve, attach, model: Path, method: str, path: str, how: str
) -> None:
    """It reads the folder when it is well again, which it is here after one failure."""
    bad, good = serve(), serve()
    engine = attach(bad, good, sync={"method": method, "timeout": 1.0})
    bad.fake.misbehave(path, how)
    new = changed(model, 2.0)
    engine.update_weights(new, 1)
    before = len(bad.fake.of("/generate"))
    assert_from(engine.generate(MANY), MANY, weights_of(new), 1)
    assert len(bad.fake.of("/generate")) > before, "it is back"
    new = changed(model, 3.0)
    engine.update_weights(new, 2)
    assert_from(engine.generate(MANY), MANY, weights_of(new), 2)
    if method == "tensor":
        assert len(bad.fake.of("/update_weights_from_tensor")) == len(good.fake.of("/update_weights_from_tensor")) - (
            path == "/pause_generation"
        ), "nothing of the failure is left: it takes part in the next update"


@pytest.mark.parametrize("method", ["disk", "tensor"])
@pytest.mark.parametrize("how", ["refuse", "hang", "lie"])
def test_a_server_that_takes_no_update_is_left_out(serve, attach, model: Path, method: str, how: str) -> None:
    bad, good = serve(), serve()
    engine = attach(bad, good, sync={"method": method, "timeout": 1.0})
    if how == "lie":
        bad.fake.lies = "swirl:0"
    else:
        bad.fake.misbehave(f"/update_weights_from_{method}", how, -1)
        bad.fake.misbehave("/update_weights_from_disk", how, -1)
    new = changed(model, 2.0)
    engine.update_weights(new, 1)
    before = len(bad.fake.of("/generate"))
    assert_from(engine.generate(MANY), MANY, weights_of(new), 1)
    assert len(bad.fake.of("/generate")) == before
    bad.fake.behave()
    bad.fake.lies = None
    new = changed(model, 3.0)
    engine.update_weights(new, 2)
    assert_from(engine.generate(MANY), MANY, weights_of(new), 2)
    assert len(bad.fake.of("/generate")) > before, "the next update brings it back"


@pytest.mark.parametrize("method", ["disk", "tensor"])
def test_no_server_takes_the_update(serve, attach, model: Path, method: str) -> None:
    servers = [serve(), serve()]
    engine = attach(*servers, sync={"method": method})
    for server in servers:
        server.fake.misbehave("/update_weights_from_tensor", "refuse", -1)
        server.fake.misbehave("/update_weights_from_disk", "refuse", -1)
    with pytest.raises(EngineError, match="no SGLang server took the new weights") as error:
        engine.update_weights(changed(model, 2.0), 1)
    assert all(server.url in str(error.value) for server in servers) and "told to refuse" in str(error.value)
    with pytest.raises(EngineError, match="no SGLang server is left"):
        engine.generate(MANY)


def test_a_dropped_server_comes_back_with_the_next_update(serve, attach, model: Path) -> None:
    dead, good = serve(), serve()
    engine = attach(dead, good, timeout=1.0)
    dead.fake.misbehave("*", "hang", -1)
    assert_from(engine.generate(MANY), MANY, original(model), 0)
    new = changed(model, 2.0)
    engine.update_weights(new, 1)  # while it is out
    assert_from(engine.generate(MANY), MANY, weights_of(new), 1)
    dead.fake.behave()
    before = len(dead.fake.of("/generate"))
    new = changed(model, 3.0)
    engine.update_weights(new, 2)
    assert_from(engine.generate(MANY), MANY, weights_of(new), 2)
    assert len(dead.fake.of("/generate")) > before


def test_without_snapshots_a_broken_off_update_leaves_no_server(
    serve, attach, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For nobody has the weights before; the servers' own first weights are in a folder."""
    engine = attach(serve(), serve(), sync={"method": "tensor", "snapshot": False})
    with pytest.raises(KeyError):
        engine.update_weights(changed(model, 2.0)[:-2], 1)
    assert_from(engine.generate(MANY), MANY, original(model), 0)
    new = changed(model, 2.0)
    engine.update_weights(new, 1)
    assert_from(engine.generate(MANY), MANY, weights_of(new), 1)
    assert not (tmp_path / "engine" / "weights").exists()
    with pytest.raises(KeyError):  # noticed before anything is sent
        engine.update_weights(changed(model, 3.0)[:-2], 2)
    assert_from(engine.generate(MANY), MANY, weights_of(new), 1)
    with monkeypatch.context() as patch, pytest.raises(OSError):
        patch.setattr(sglang_weights, "whole", fails_at(len(new) - 1))
        engine.update_weights(changed(model, 3.0), 2)
    with pytest.raises(EngineError, match="broke off, and those before are in no folder"):
        engine.generate(MANY)
    new = changed(model, 3.0)
    engine.update_weights(new, 2)  # which has all of them again
    assert_from(engine.generate(MANY), MANY, weights_of(new), 2)


@pytest.mark.parametrize("method", ["disk", "tensor"])
def test_the_snapshot_is_a_model_and_holds_the_newest_version_alone(
    serve, attach, model: Path, tmp_path: Path, method: str
) -> None:
    engine = attach(serve(), sync={"method": method, "bucket_mb": 0.01})
    for version in (1, 2):
        engine.update_weights(changed(model, 1.0 + version), version)
    folder = tmp_path / "engine" / "weights"
    assert [entry.name for entry in folder.iterdir()] == ["v2"]
    assert len(list((folder / "v2").glob("*.safetensors"))) > 2
    loaded = AutoModelForCausalLM.from_pretrained(folder / "v2", dtype=torch.float32).state_dict()
    wanted = dict(changed(model, 3.0))
    assert loaded.keys() == wanted.keys() and all(torch.equal(loaded[name], wanted[name]) for name in wanted)
    with pytest.raises(KeyError):
        engine.update_weights(changed(model, 9.0)[:-2], 3)
    assert (folder / "v2" / "config.json").is_file() and not (folder / "v3").exists()
    engine.update_weights(changed(model, 4.0), 3)
    assert [entry.name for entry in folder.iterdir()] == ["v3"]


@pytest.mark.parametrize("how", ["refuse", "500"])
def test_a_server_that_does_not_join_the_group(serve, attach, model: Path, how: str) -> None:
    server = serve()
    engine = attach(server, sync={"method": "distributed", "timeout": 2.0})
    server.fake.misbehave("/init_weights_update_group", how)
    start = time.monotonic()
    with pytest.raises(EngineError, match=r"engine.weight_sync.method=distributed: .*told to"):
        engine.update_weights(changed(model, 2.0), 1)
    assert time.monotonic() - start < 1.5, "the answer ends the wait for the group"
    assert_from(engine.generate(MANY), MANY, original(model), 0)


def test_weights_by_broadcast(attach, model: Path) -> None:
    """With a real group of two processes; when the server refuses in the middle, it reads the folder instead."""
    with spawned(model) as (url, _):
        engine = attach(url, sync={"method": "distributed", "timeout": 20.0, "bucket_mb": 0.02})
        for version, factor in ((1, 2.0), (2, 3.0)):
            new = changed(model, factor)
            engine.update_weights(new, version)
            assert_from(engine.generate(MANY), MANY, weights_of(new), version)
        paths = [entry["path"] for entry in ask(url, "/log")["requests"]]
        assert paths.count("/init_weights_update_group") == 1 and "/update_weights_from_disk" not in paths
        ask(url, "/misbehave", {"path": "/update_weights_from_distributed", "how": "refuse"})
        for version, factor in ((3, 4.0), (4, 5.0)):
            new = changed(model, factor)
            start = time.monotonic()
            engine.update_weights(new, version)
            assert time.monotonic() - start < 10, "its answer ends the wait for it"
            assert_from(engine.generate(MANY), MANY, weights_of(new), version)
        paths = [entry["path"] for entry in ask(url, "/log")["requests"]]
        assert paths.count("/init_weights_update_group") == 2 and paths.count("/update_weights_from_disk") == 1
        with pytest.raises(KeyError):
            engine.update_weights(new[:-2], 5)
        assert_from(engine.generate(MANY), MANY, weights_of(new), 4)


@contextmanager
def spawned(model: Path, *flags: str) -> Iterator[tuple[str, int]]:
    """A fake server in a process that the engine did not start."""
    port = free_port()
    line = [sys.executable, str(FAKE), "--model-path", str(model), "--port", str(port), "--host", "127.0.0.1", *flags]
    process = subprocess.Popen(line, stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    try:
        yield f"http://127.0.0.1:{port}", process.pid
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


# --- processes that do not lead ---


def test_who_does_not_lead_reads_the_weights_and_sends_nothing(serve, attach, model: Path) -> None:
    server = serve(weight_version="swirl:0")
    follower = attach(server, engine={"leader": False})
    assert_from(follower.generate(MANY), MANY, original(model), 0)
    left = iter(changed(model, 2.0))
    before = len(server.fake.requests)
    follower.update_weights(left, 1)
    assert next(left, None) is None and len(server.fake.requests) == before
    with pytest.raises(EngineError, match="asked for were 'swirl:1'"):
        follower.generate(MANY)


def test_two_processes_share_servers(serve, attach, model: Path) -> None:
    servers = [serve(), serve()]
    leader = attach(*servers)
    follower = attach(*servers, engine={"leader": False})
    new = changed(model, 2.0)
    for engine in (follower, leader):
        engine.update_weights(new, 1)
    for engine in (follower, leader):
        assert_from(engine.generate(MANY), MANY, weights_of(new), 1)


def test_who_does_not_lead_waits_for_the_leader_to_mend_a_server(serve, attach, model: Path) -> None:
    server = serve(weight_version="swirl:0")
    config = EngineConfig(kind="sglang", timeout=1.0, retries=2, launch=LaunchConfig(startup_timeout=3.0))
    follower = SGLangEngine(config, model, Path("unused"), leader=False, urls=[server.url])
    try:
        new = changed(model, 2.0)
        follower.update_weights(new, 1)

        def lead() -> None:
            server.fake.weights = {name: digest_of(tensor) for name, tensor in new if name != "lm_head.weight"}
            server.fake.weight_version = "swirl:1"

        timer = threading.Timer(0.5, lead)
        timer.start()
        assert_from(follower.generate(MANY), MANY, weights_of(new), 1)
        timer.join()
        follower.update_weights(new, 2)
        with pytest.raises(EngineError, match="not up again in engine.launch.startup_timeout=3 s"):
            follower.generate(MANY)
    finally:
        follower.close()


# --- order and routing ---


def test_states_of_a_trajectory_meet_one_server_the_longest_first_and_alone(serve, attach, model: Path) -> None:
    servers = [serve(), serve()]
    engine = attach(*servers)
    requests = [one for states in zip(*(nested(t) for t in range(6)), strict=True) for one in states]  # mixed
    assert_from(engine.generate(requests), requests, original(model), 0)
    seen = {}
    for server in servers:
        for entry in server.fake.of("/generate"):
            trajectory = next(t for t in range(6) if entry["body"]["input_ids"][:40] == prompt(t, 40))
            seen.setdefault(trajectory, []).append((server.url, entry))
    assert len(seen) == 6
    for entries in seen.values():
        assert len({url for url, _ in entries}) == 1 and len(entries) == 6
        first, *others = sorted((entry for _, entry in entries), key=lambda entry: entry["start"])
        assert len(first["body"]["input_ids"]) == 200 and first["body"]["sampling_params"]["max_new_tokens"] == 0
        assert all(entry["start"] >= first["end"] for entry in others)
    owners = [entries[0][0] for entries in seen.values()]
    assert [owners.count(server.url) for server in servers] == [3, 3], "spread evenly"


def test_every_token_that_can_be_cached_is(serve, attach, model: Path) -> None:
    servers = [serve(), serve()]
    engine = attach(*servers)
    requests = [one for t in range(5) for one in nested(t)]
    results = engine.generate(requests)
    stats = engine.stats()
    ideal = sum(len(one.tokens) - 1 for one in requests if len(one.tokens) < 200)
    assert stats.cached_tokens == stats.cacheable_tokens == ideal
    assert stats.requests == len(requests) and stats.prompt_tokens == sum(len(one.tokens) for one in requests)
    assert stats.generated_tokens == sum(len(c.tokens) for completions in results for c in completions)
    assert stats.cached_tokens == sum(completions[0].cached_tokens for completions in results)
    again = engine.generate(requests)
    now = engine.stats()
    assert now.cached_tokens - stats.cached_tokens == sum(len(one.tokens) - 1 for one in requests)
    assert now.cacheable_tokens - stats.cacheable_tokens == sum(len(one.tokens) - 1 for one in requests)
    assert [[c.tokens for c in row] for row in again] == [[c.tokens for c in row] for row in results]


def test_the_same_states_without_the_order_share_little(serve, attach, model: Path) -> None:
    """The fake server is as strict as the real one: together, nested states find nothing of each other."""
    server = serve(delay=0.1)
    states = nested(1, n=1)
    threads = [
        threading.Thread(
            target=ask,
            args=(
                server.url,
                "/generate",
                {"input_ids": list(one.tokens), "sampling_params": {"max_new_tokens": 2, "temperature": 1.0}},
            ),
        )
        for one in states
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    answer = ask(
        server.url,
        "/generate",
        {"input_ids": list(states[-1].tokens), "sampling_params": {"max_new_tokens": 2, "temperature": 1.0}},
    )
    assert answer["meta_info"]["cached_tokens"] == 199
    engine = attach(server)
    engine.generate(states)
    assert engine.stats().cached_tokens == engine.stats().cacheable_tokens


def test_rounds_of_collecting_need_no_warming(serve, attach, model: Path) -> None:
    """A prompt that grew by its answer and an observation finds all of both but the last token."""
    servers = [serve(), serve()]
    engine = attach(*servers)
    rows = {t: prompt(t, 60) for t in range(6)}
    homes: dict[int, set[str]] = {t: set() for t in rows}
    known: dict[int, int] = {}
    for turn in range(3):
        before = [len(server.fake.of("/generate")) for server in servers]
        requests = [Request(row, Sampling(8), cache_key=str(t)) for t, row in rows.items()]
        for (t, row), (completion,) in zip(rows.items(), engine.generate(requests), strict=True):
            if turn:
                assert completion.cached_tokens == known[t]
            row += [*completion.tokens, *prompt(t + turn, 40)]
        known = {t: len(row) - 41 for t, row in rows.items()}
        for server, n in zip(servers, before, strict=True):
            for entry in server.fake.of("/generate")[n:]:
                assert entry["body"]["sampling_params"]["max_new_tokens"] == 8
                homes[next(t for t in rows if entry["body"]["input_ids"][:60] == rows[t][:60])].add(server.url)
    assert all(len(home) == 1 for home in homes.values())
    stats = engine.stats()
    assert stats.cached_tokens == stats.cacheable_tokens > 0


def test_one_question_for_many_trajectories_is_computed_once(serve, attach) -> None:
    server = serve()
    engine = attach(server)
    engine.generate([Request(prompt(1, 64), Sampling(4), cache_key=f"k{i}") for i in range(4)])
    assert engine.stats().cached_tokens == engine.stats().cacheable_tokens == 3 * 63


@pytest.mark.parametrize("n", [1, 2, 8])
def test_so_many_sequences_at_a_time_and_no_more(serve, attach, n: int) -> None:
    server = serve(delay=0.05)
    engine = attach(server, max_sequences=4)
    requests = [request(number, n=n) for number in range(12)]
    engine.generate(requests)
    assert server.fake.peak == max(4, n)  # a request of 8 goes alone


def test_calls_exclude_each_other(serve, attach, model: Path) -> None:
    server = serve(delay=0.2)
    engine = attach(server)
    new = changed(model, 2.0)
    thread = threading.Thread(target=engine.update_weights, args=(new, 1))
    results = []
    other = threading.Thread(target=lambda: results.append(engine.generate(MANY)))
    other.start()
    until(lambda: server.fake.of("/generate"), "generation begins")
    thread.start()
    for one in (other, thread):
        one.join()
    assert_from(results[0], MANY, original(model), 0)
    last = max(entry["end"] for entry in server.fake.of("/generate"))
    assert all(entry["start"] >= last for entry in server.fake.of("/pause_generation"))


# --- servers started here ---


def served(engine: SGLangEngine) -> list[dict]:
    return [ask(url, "/log") for url in engine.urls]


def test_launched_servers(launch, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SGLANG_API_KEY", "very-secret")
    monkeypatch.setenv("MASTER_PORT", "1")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    script = f'env > "{tmp_path}/env"; echo "$@" > "{tmp_path}/arguments"; exec {sys.executable} {FAKE} "$@"'
    engine = launch(script, launch={"environment": {"MORE": "yes"}, "flags": ["--context-length", "300"]})
    assert len(engine.pids) == 2 and engine.max_context == 294
    assert_from(engine.generate(MANY), MANY, original(model), 0)
    arguments = (tmp_path / "arguments").read_text().split()
    for flag, value in (("--host", "127.0.0.1"), ("--weight-version", "swirl:0"), ("--model-path", str(model))):
        assert arguments[arguments.index(flag) + 1] == value
    environment = (tmp_path / "env").read_text().splitlines()
    assert "MORE=yes" in environment and not any(line.startswith(("MASTER_", "TORCHELASTIC")) for line in environment)
    logs = sorted((tmp_path / "engine").glob("*.log"))
    assert [log.name for log in logs] == ["server-0.log", "server-1.log"]
    for log in logs:
        assert "fake server is up" in log.read_text() and "very-secret" not in log.read_text()
    ports = [int(url.rpartition(":")[2]) for url in engine.urls]
    assert len(set(ports)) == 2
    engine.close()
    assert not any(map(runs, engine.pids))


@pytest.mark.parametrize("updated", [False, True])
def test_a_server_killed_in_the_middle_of_a_batch_loses_nothing(launch, model: Path, updated: bool) -> None:
    engine = launch(launch={"flags": ["--fake-delay", "0.1"]}, max_sequences=4)
    version, weights = 0, original(model)
    if updated:
        new = changed(model, 2.0)
        engine.update_weights(new, 1)
        version, weights = 1, weights_of(new)
    urls, pids = engine.urls, engine.pids
    requests = [request(number) for number in range(24)]
    results = []
    thread = threading.Thread(target=lambda: results.append(engine.generate(requests)))
    thread.start()
    until(lambda: any(e["path"] == "/generate" for e in ask(urls[0], "/log")["requests"]), "generation begins")
    os.kill(pids[0], signal.SIGKILL)
    thread.join()
    assert_from(results[0], requests, weights, version)
    until(lambda: engine.pids[0] != pids[0] and len(engine._servers.up) == 2, "it is started again")
    assert engine.urls == urls and engine.pids[1] == pids[1]
    assert ask(urls[0], "/model_info")["weight_version"] == f"swirl:{version}"
    fresh = [request(number) for number in range(100, 108)]
    assert_from(engine.generate(fresh), fresh, weights, version)
    assert any(e["path"] == "/generate" for e in ask(urls[0], "/log")["requests"]), "it works again"
    assert not runs(pids[0])


@pytest.mark.parametrize("how", ["hang", "stale"])
def test_a_launched_server_that_hangs_or_is_stale_is_started_again(launch, model: Path, how: str) -> None:
    """Also the only one: its requests wait for it."""
    engine = launch(launch={"servers": 1, "flags": ["--fake-deaf"]}, timeout=1.0)
    (pid,) = engine.pids
    ask(engine.urls[0], "/misbehave", {"path": "*" if how == "hang" else "/generate", "how": how, "times": -1})
    with pytest.warns(UserWarning, match="is started again"):
        assert_from(engine.generate(MANY), MANY, original(model), 0)
    assert engine.pids != [pid] and not runs(pid)
    states = nested(1)
    assert_from(engine.generate(states), states, original(model), 0)


def test_the_cache_of_a_server_started_again_is_not_taken_for_full(launch, model: Path) -> None:
    engine = launch(launch={"servers": 1})
    states = nested(1)
    engine.generate(states)
    ideal = sum(len(one.tokens) - 1 for one in states if len(one.tokens) < 200)
    pids = engine.pids
    for seen in (True, False):
        os.kill(engine.pids[0], signal.SIGKILL)
        if seen:
            until(lambda: engine.pids != pids and engine._servers.up, "it is started again")
        before = engine.stats().cached_tokens
        assert_from(engine.generate(states), states, original(model), 0)
        cached = engine.stats().cached_tokens - before
        assert cached == ideal if seen else cached <= ideal, "no more is claimed than was found"


def test_states_answered_elsewhere_are_not_taken_for_cached(serve, attach, model: Path) -> None:
    """A server is dropped after it answered some states of a trajectory; the last one is answered by another."""
    bad, good = serve(), serve()
    engine = attach(bad, good, timeout=1.0)
    states = nested(1)
    bad.fake.misbehave("/health_generate", "503", -1)
    bad.fake.misbehave("/generate", "hang", -1, length=20)
    other = request(2, key="t1")
    assert_from(engine.generate([*states, other]), [*states, other], original(model), 0)
    assert [len(one["body"]["input_ids"]) for one in good.fake.of("/generate")] == [20]
    before = engine.stats().cached_tokens
    assert_from(engine.generate(states), states, original(model), 0)
    cached = engine.stats().cached_tokens - before
    assert cached == sum(len(one.tokens) - 1 for one in states[:-1]), "they were warmed on the other server"


def test_updates_while_a_server_is_out(launch, model: Path) -> None:
    engine = launch()
    os.kill(engine.pids[0], signal.SIGKILL)
    new = changed(model, 2.0)
    engine.update_weights(new, 1)
    until(lambda: len(engine._servers.up) == 2, "both are up")
    assert [one["fingerprint"] for one in served(engine)] == [weights_of(new)] * 2
    assert_from(engine.generate(MANY), MANY, weights_of(new), 1)


def test_a_launched_server_that_refuses_an_update_is_started_with_it(launch, model: Path) -> None:
    engine = launch()
    first = engine.pids
    ask(engine.urls[0], "/misbehave", {"path": "/update_weights_from_disk", "how": "refuse"})
    new = changed(model, 2.0)
    engine.update_weights(new, 1)
    assert_from(engine.generate(MANY), MANY, weights_of(new), 1)
    until(lambda: len(engine._servers.up) == 2, "both are up")
    assert engine.pids[0] != first[0] and engine.pids[1] == first[1]
    assert [one["fingerprint"] for one in served(engine)] == [weights_of(new)] * 2


def test_an_update_while_a_server_is_being_stopped(launch, model: Path) -> None:
    """It does not end by itself, and its port is taken until it is made to; the start with the new weights waits for that."""
    engine = launch(launch={"servers": 1, "flags": ["--fake-deaf"]}, max_restarts=2)
    (server,) = engine._servers.all
    pid = engine.pids[0]
    engine._servers._watching.get_loop().call_soon_threadsafe(engine._servers.mend, server, "a test says so")
    until(lambda: server.process.pid is None, "it is being stopped")
    new = changed(model, 2.0)
    engine.update_weights(new, 1)
    assert_from(engine.generate(MANY), MANY, weights_of(new), 1)
    assert server.restarts == 2 and engine.pids != [pid] and not runs(pid)


def test_a_launched_server_that_fails_in_an_update_that_breaks_off_is_started_again(
    launch, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = launch(launch={"servers": 1}, sync={"method": "tensor", "bucket_mb": 0.01})
    ask(engine.urls[0], "/misbehave", {"path": "/update_weights_from_tensor", "how": "refuse"})
    new = changed(model, 2.0)
    with monkeypatch.context() as patch, pytest.raises(OSError):
        patch.setattr(sglang_weights, "whole", fails_at(len(new) - 1))
        engine.update_weights(new, 1)
    assert_from(engine.generate(MANY), MANY, original(model), 0)


def test_without_snapshots_a_dead_server_waits_for_the_next_update(launch, model: Path) -> None:
    engine = launch(sync={"method": "tensor", "snapshot": False, "timeout": 20.0})
    new = changed(model, 2.0)
    engine.update_weights(new, 1)
    pids = engine.pids
    os.kill(pids[0], signal.SIGKILL)
    until(lambda: len(engine._servers.up) == 1, "its end is seen")
    assert_from(engine.generate(MANY), MANY, weights_of(new), 1)
    assert engine.pids[0] == pids[0]
    new = changed(model, 3.0)
    engine.update_weights(new, 2)
    assert engine.pids[0] != pids[0] and len(engine._servers.up) == 2
    assert [one["fingerprint"] for one in served(engine)] == [weights_of(new)] * 2
    assert_from(engine.generate(MANY), MANY, weights_of(new), 2)


def test_a_server_that_dies_again_and_again_is_given_up(launch) -> None:
    engine = launch(launch={"servers": 1, "flags": ["--fake-die-on-generate"]}, max_restarts=2, retries=9)
    with pytest.raises(EngineError, match=r"engine.max_restarts=2 are used up") as error:
        engine.generate([request()])
    assert "no SGLang server is left" in str(error.value) and "fake server is up" in str(error.value)
    assert "server-0.log" in str(error.value)


def test_a_start_that_fails_once_is_tried_again(launch, model: Path, tmp_path: Path) -> None:
    """A device's memory may not be free yet when the server before was just killed."""
    script = f'if [ -e "{tmp_path}/busy" ]; then rm "{tmp_path}/busy"; exit 3; fi; exec {sys.executable} {FAKE} "$@"'
    engine = launch(script, launch={"servers": 1})
    (tmp_path / "busy").touch()
    os.kill(engine.pids[0], signal.SIGKILL)
    assert_from(engine.generate(MANY), MANY, original(model), 0)
    assert not (tmp_path / "busy").exists()


@pytest.mark.parametrize(
    ("script", "parts"),
    [
        ("echo loading; echo this is no model; exit 3", ["ended with code 3", "this is no model", "server-0.log"]),
        ("echo No module named sglang; exit 1", ["No module named sglang", "engine.launch.python"]),
        ("echo still loading; sleep 60", ["engine.launch.startup_timeout=1 s", "still loading"]),
    ],
)
def test_a_server_that_does_not_come_up(launch, script: str, parts: list[str]) -> None:
    with pytest.raises(EngineError) as error:
        launch(script, launch={"servers": 1, "startup_timeout": 1.0})
    assert all(part in str(error.value) for part in parts)


def test_one_of_two_that_does_not_come_up_ends_the_other_too(launch, tmp_path: Path) -> None:
    script = f'mkdir "{tmp_path}/one" || exit 3; echo $$ > "{tmp_path}/pid"; exec {sys.executable} {FAKE} "$@"'
    with pytest.raises(EngineError, match="ended with code 3"):
        launch(script)
    assert not runs(int((tmp_path / "pid").read_text()))


def test_an_interpreter_that_is_not_there(launch) -> None:
    with pytest.raises(EngineError, match="/no/such/python"):
        launch(launch={"python": "/no/such/python", "servers": 1})


@pytest.mark.parametrize("end", ["polite", "deaf", "killed"])
def test_close_ends_its_own_processes_and_their_children_alone(launch, model: Path, tmp_path: Path, end: str) -> None:
    """Also those of a server that was killed and could not end them itself."""
    flags = ["--fake-child", str(tmp_path / "child"), *(["--fake-deaf"] if end == "deaf" else [])]
    with spawned(model) as (url, bystander):
        engine = launch(launch={"flags": flags, "servers": 1})
        pids, child = engine.pids, int((tmp_path / "child").read_text())
        assert runs(pids[0]) and runs(child)
        if end == "killed":
            os.kill(pids[0], signal.SIGKILL)
        engine.close()
        until(lambda: not runs(pids[0]) and not runs(child), "they end")
        assert runs(bystander) and ask(url, "/model_info")
        engine.close()  # twice is no harm


@pytest.mark.skipif(sys.platform != "linux", reason="prctl is Linux's")
def test_servers_die_with_a_killed_parent(model: Path, tmp_path: Path) -> None:
    program = f"""
import time
from pathlib import Path
from swirl_fast.config import EngineConfig, LaunchConfig
from swirl_fast.engines.sglang import SGLangEngine
config = EngineConfig(kind="sglang", launch=LaunchConfig(python={str(interpreter(tmp_path / "python"))!r}, port={free_port()}))
engine = SGLangEngine(config, Path({str(model)!r}), Path({str(tmp_path / "engine")!r}))
print(engine.pids[0], flush=True)
time.sleep(60)
"""
    root = FAKE.parent.parent
    path = os.pathsep.join([str(root), str(root / "kernels")])
    parent = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": path}
    )
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    assert runs(pid)
    parent.kill()
    parent.wait()
    parent.stdout.close()
    until(lambda: not runs(pid), "the server ends")


def test_two_commands_that_start_at_once_take_different_ports() -> None:
    """A server listens seconds after it was started: until then its port looks free."""
    first = free_port()
    one, claim = sglang_launch.claim_port(first, "127.0.0.1")
    other, second = sglang_launch.claim_port(first, "127.0.0.1")
    assert one == first < other
    claim.close()
    again, third = sglang_launch.claim_port(first, "127.0.0.1")
    assert again == first
    second.close()
    with socket.socket() as taken:
        third.close()
        taken.bind(("127.0.0.1", first))
        taken.listen()
        moved, fourth = sglang_launch.claim_port(first, "127.0.0.1")
        assert moved > first
        fourth.close()
