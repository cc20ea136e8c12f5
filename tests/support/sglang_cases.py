"""What the tests in this folder ask the fake servers, and what must come back."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from support import fake_sglang
from support.fake_sglang import continuation, digest_of, fingerprint, read_weights
from torch import Tensor
from transformers import AutoModelForCausalLM

from swirl_fast.engines.engine import Completion, Request, Sampling
from swirl_fast.engines.sglang.engine import SGLangEngine

FAKE = Path(fake_sglang.__file__)


STOP = 7


def interpreter(file: Path, script: str = "") -> Path:
    """A program that stands for an interpreter with sglang: `FILE -m sglang.launch_server …` runs the fake server."""
    file.write_text(f'#!/bin/sh\nshift 2\n{script or f"""exec {sys.executable} {FAKE} "$@" """}\n')
    file.chmod(0o755)
    return file


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def ask(url: str, path: str, body: dict | None = None, key: str = "") -> dict:
    data = None if body is None else json.dumps(body).encode()
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    with urllib.request.urlopen(urllib.request.Request(url + path, data, headers), timeout=10) as answer:
        return json.load(answer)


def until(true: Callable[[], object], what: str, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, f"not in {seconds} s: {what}"
        time.sleep(0.02)


def pids_of(engine: SGLangEngine) -> list[int]:
    """Of the servers that it started."""
    return [server.process.pid for server in engine._servers.all if server.process and server.process.pid]


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
        assert [(c.tokens.tolist(), c.logprobs) for c in completions] == of(weights, one)
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


def fails_at(number: int) -> Callable[[Tensor, torch.dtype], Tensor]:
    """Gathers tensors, but not the number-th: a rank was lost."""
    count = iter(range(number + 1))

    def gather(tensor: Tensor, dtype: torch.dtype) -> Tensor:
        if next(count) == number:
            raise OSError("a rank was lost")
        return tensor.detach().to(dtype)

    return gather


@contextmanager
def spawned(model: Path, *flags: str) -> Iterator[tuple[str, int]]:
    """A fake server in a process that the engine did not start."""
    line = [sys.executable, str(FAKE), "--model-path", str(model), "--port", "0", "--host", "127.0.0.1", *flags]
    process = subprocess.Popen(line, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        up = next(said for said in process.stdout if said.startswith(fake_sglang.UP))
        yield f"http://127.0.0.1:{int(up.removeprefix(fake_sglang.UP))}", process.pid
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
