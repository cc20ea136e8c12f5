"""Servers that die, that were started by somebody else, and that share the work: real processes, real signals."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
import torch
from support.engine_conformance import assert_hits, check, prompt, update
from support.real_servers import GENERATED, Log, attached, launched, plain, start_engine
from support.sglang_cases import pids_of
from transformers import PreTrainedModel

from swirl_fast.config import ConfigError, load
from swirl_fast.engines.engine import Completion, Request, Sampling
from swirl_fast.engines.sglang import servers as sglang_servers
from swirl_fast.engines.sglang.client import Client, EngineError
from swirl_fast.engines.sglang.engine import SGLangEngine
from swirl_fast.engines.sglang.launch import ServerProcess, claim_port
from swirl_fast.prefixes import cacheable


def batch(model: PreTrainedModel, seed: int, trajectories: int = 6) -> list[Request]:
    """Three nested states of each trajectory; of very different lengths, so that some are done long before others."""
    requests = []
    for t in range(trajectories):
        trunk = prompt(300, seed + t, model)
        requests += [
            Request(trunk[:k], Sampling(limit), n=2, cache_key=f"{seed}-{t}")
            for k, limit in ((300, 40), (200, 150), (100, 600))
        ]
    return requests


def generate_while(
    engine: SGLangEngine, requests: list[Request], log: Log, harm: Callable[[], None]
) -> list[list[Completion]]:
    """Does harm when the server has answered some of the requests and is at work on others."""
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(engine.generate, requests)
        end = time.monotonic() + 60
        while log.count(GENERATED) < 8:  # six prompts computed first, and two answers
            assert not future.done() and time.monotonic() < end
            time.sleep(0.01)
        harm()
        assert not future.done(), "the batch was done before the server was killed"
        return future.result()


def child(pid: int, name: str) -> psutil.Process:
    (found,) = (p for p in psutil.Process(pid).children(recursive=True) if name in " ".join(p.cmdline()) + p.name())
    return found


@pytest.mark.filterwarnings("ignore:SGLang server")
def test_a_server_killed_in_mid_batch_comes_back_with_the_current_weights(served_model: Path, tmp_path: Path) -> None:
    engine = start_engine(tmp_path, served_model, *launched(), "engine.weight_sync.method=tensor")
    try:
        model = plain(served_model)
        version = update(engine, model, seed=1)
        log = Log(tmp_path / "run" / "engine" / "server-0.log")
        requests = batch(model, 1)
        (before,) = pids_of(engine)
        results = generate_while(engine, requests, log, lambda: os.kill(before, signal.SIGKILL))
        check(model, requests, results)
        assert {completion.policy_version for completions in results for completion in completions} == {version}
        (after,) = pids_of(engine)
        assert after != before and not psutil.pid_exists(before)
        assert f":{version} " in log.text(), "it is started with the weights of the last update"
        stats = engine.stats()
        assert stats.requests == len(requests) + 1 and stats.cached_tokens <= stats.cacheable_tokens
        version = update(engine, model, seed=2)
        results = engine.generate(requests[:6])
        check(model, requests[:6], results)
        assert results[0][0].policy_version == version
        members = [after, *(p.pid for p in psutil.Process(after).children(recursive=True))]
    finally:
        engine.close()
    assert len(members) >= 3 and not any(running(pid) for pid in members), "close() leaves no process behind"


def running(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


@pytest.mark.filterwarnings("ignore:SGLang server")
def test_two_servers_share_trajectories_and_one_may_die(served_model: Path, tmp_path: Path) -> None:
    engine = start_engine(tmp_path, served_model, *launched(2), "engine.weight_sync.method=distributed")
    try:
        model = plain(served_model)
        folder = tmp_path / "run" / "engine"
        logs = [Log(folder / f"server-{i}.log") for i in range(2)]
        requests = batch(model, 1)
        prompts = [request.tokens for request in requests]
        before = engine.stats()
        check(model, requests, engine.generate(requests))
        assert_hits(engine.stats().cached_tokens - before.cached_tokens, cacheable(prompts))
        shares = [sum(log.prefill()) for log in logs]
        assert min(shares) > 0.3 * sum(shares), "the trajectories are spread"
        before = engine.stats()
        check(model, requests, engine.generate(requests))
        possible = sum(len(tokens) - 1 for tokens in prompts)
        assert_hits(engine.stats().cached_tokens - before.cached_tokens, possible)  # each found its own server again

        version = update(engine, model, seed=1)
        logs = [Log(log.path) for log in logs]
        victim = child(pids_of(engine)[1], "scheduler")  # what the system's out-of-memory killer would choose
        results = generate_while(engine, requests, logs[1], victim.kill)
        check(model, requests, results)
        assert {completion.policy_version for completions in results for completion in completions} == {version}
        update(engine, model, seed=2)  # the other one cannot take part in the broadcast: it starts with the result
        logs = [Log(log.path) for log in logs]
        end = time.monotonic() + 120
        while not logs[1].count(GENERATED):
            assert time.monotonic() < end
            time.sleep(0.5)
            check(model, requests[:3], engine.generate(requests[:3]))
            requests = batch(model, 10) + requests  # new trajectories, which may go to either
            check(model, requests[:18], engine.generate(requests[:18]))
        update(engine, model, seed=3)
        check(model, requests[:18], engine.generate(requests[:18]))
    finally:
        engine.close()


@pytest.fixture
def foreign(served_model: Path, tmp_path: Path) -> Iterator[tuple[ServerProcess, Path]]:
    """A server that somebody else started, with weights of their own, and the folder of these."""
    folder = tmp_path / "other_model"
    shutil.copytree(served_model, folder)
    model = plain(served_model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.3)
    model.save_pretrained(folder)
    launch = load(None, launched()).engine.launch
    port, claim = claim_port(launch.port + 25, "127.0.0.1")
    process = ServerProcess(launch, 0, port, "float32", 32, 0, key="", log=tmp_path / "foreign.log", claim=claim)
    process.start(str(folder), "default")  # what SGLang calls the weights it is started with
    try:
        asyncio.run(up(process))
        yield process, folder
    finally:
        process.stop()


async def up(process: ServerProcess) -> None:
    client = Client(process.url, "", 60.0)
    await process.wait(lambda: client.healthy(10.0), lambda seconds: None)
    await client.close()


@pytest.mark.filterwarnings("ignore:SGLang server")
def test_servers_of_others_get_our_weights_and_are_dropped_when_they_die(
    server: SGLangEngine, served_model: Path, foreign: tuple[ServerProcess, Path], tmp_path: Path
) -> None:
    process, folder = foreign
    log = Log(process.log)
    engine = start_engine(tmp_path, folder, *attached(process.url), "run.name=theirs")
    theirs = plain(folder)
    requests = batch(theirs, 1)
    check(theirs, requests, engine.generate(requests))
    engine.close()
    assert not log.count("/update_weights_from_disk"), "it has these weights already"

    engine = start_engine(
        tmp_path, served_model, *attached(*server.urls, process.url), "engine.weight_sync.method=distributed"
    )
    try:
        model = plain(served_model)
        assert log.count("/update_weights_from_distributed") and not log.count("/update_weights_from_disk")
        check(model, requests, engine.generate(requests))
        version = update(engine, model, seed=1)
        log = Log(process.log)
        assert process.pid is not None
        results = generate_while(engine, requests, log, lambda: os.kill(process.pid, signal.SIGKILL))
        check(model, requests, results)
        assert {completion.policy_version for completions in results for completion in completions} == {version}
        update(engine, model, seed=2)
        check(model, requests, engine.generate(requests))
        assert pids_of(engine) == []
    finally:
        engine.close()
    with pytest.raises(EngineError, match=rf"{process.url}.*Is an SGLang server running there"):
        start_engine(tmp_path, served_model, *attached(process.url))
    engine = start_engine(tmp_path, served_model, *attached(*server.urls), "run.name=again")
    check(plain(served_model), requests, engine.generate(requests))  # close() ended no server, and left none paused
    engine.close()


def test_a_port_that_another_server_takes_meanwhile_is_noticed(
    server: SGLangEngine, served_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another user's, say: claims are a user's own. The other one answers there, and must not be taken for ours."""
    taken = int(server.urls[0].rpartition(":")[2])
    monkeypatch.setattr(sglang_servers, "claim_port", lambda first, host: (taken, None))
    with pytest.raises(EngineError, match=r"(?s)ended with code .* while starting.*address already in use"):
        start_engine(tmp_path, served_model, *launched(), "run.name=late")


def test_a_server_that_cannot_start_says_why(served_model: Path, tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"(?s)ended with code \d+ while starting.*server-0.log:.*no-such-flag"):
        start_engine(tmp_path, served_model, *launched(), "engine.launch.flags=[--no-such-flag]")
    with pytest.raises(
        EngineError, match="Install SGLang, or name the interpreter that has it in engine.launch.python"
    ):
        start_engine(tmp_path, served_model, *launched(), f"engine.launch.python={sys.executable}")


def test_memory_is_released_and_taken_again(server: SGLangEngine, served_model: Path, tmp_path: Path) -> None:
    """The endpoints of engine.share_gpu, in the order of an engine's calls. A CPU has nothing that could be released: --enable-memory-saver
    is for GPUs, and without it the server goes through the same motions and keeps its memory."""
    engine = start_engine(tmp_path, served_model, *attached(*server.urls), "engine.weight_sync.method=tensor")
    model = plain(served_model)
    requests = batch(model, 7, trajectories=2)
    try:
        for version in (1, 2):
            engine.release_memory()
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.mul_(1.05)
            engine.update_weights(model.named_parameters(), version)
            engine.resume_memory()
            check(model, requests, engine.generate(requests))
        engine.release_memory()
    finally:
        engine.close()
    found = asyncio.run(described(server))
    assert found == engine._tag(2), "it is left with all of its memory, and with the weights of the last update"


async def described(server: SGLangEngine) -> str:
    """The name of the weights that a server serves."""
    client = Client(server.urls[0], server.key, 60.0)
    try:
        return (await client.info()).weight_version
    finally:
        await client.close()


def test_a_server_without_the_saver_is_refused(server: SGLangEngine, served_model: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"{server.urls[0]} runs without --enable-memory-saver"):
        start_engine(tmp_path, served_model, *attached(*server.urls), "engine.share_gpu=true")
