"""Servers that the engine starts itself: they are watched, started again, and ended."""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
from pathlib import Path

import pytest
import torch
from support import forks
from support.processes import runs
from support.runs import environment
from support.sglang_cases import (
    FAKE,
    MANY,
    ask,
    assert_from,
    changed,
    fails_at,
    free_port,
    interpreter,
    nested,
    original,
    pids_of,
    request,
    spawned,
    until,
    weights_of,
)

from swirl_fast.config import LaunchConfig
from swirl_fast.engines.engine import EngineError
from swirl_fast.engines.sglang import launch as sglang_launch
from swirl_fast.engines.sglang import weights as sglang_weights
from swirl_fast.engines.sglang.engine import SGLangEngine


def served(engine: SGLangEngine) -> list[dict]:
    return [ask(url, "/log") for url in engine.urls]


def test_launched_servers(launch, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SGLANG_API_KEY", "very-secret")
    monkeypatch.setenv("MASTER_PORT", "1")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    script = f'env > "{tmp_path}/env"; echo "$@" > "{tmp_path}/arguments"; exec {sys.executable} {FAKE} "$@"'
    engine = launch(script, launch={"environment": {"MORE": "yes"}, "flags": ["--context-length", "300"]})
    assert len(pids_of(engine)) == 2 and engine.max_context == 294
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
    pids = pids_of(engine)
    engine.close()
    assert not any(map(runs, pids))


@pytest.mark.parametrize("updated", [False, True])
def test_a_server_killed_in_the_middle_of_a_batch_loses_nothing(launch, model: Path, updated: bool) -> None:
    engine = launch(launch={"flags": ["--fake-delay", "0.1"]}, max_sequences=4)
    version, weights = 0, original(model)
    if updated:
        new = changed(model, 2.0)
        engine.update_weights(new, 1)
        version, weights = 1, weights_of(new)
    urls, pids = engine.urls, pids_of(engine)
    requests = [request(number) for number in range(24)]
    results = []
    thread = threading.Thread(target=lambda: results.append(engine.generate(requests)))
    thread.start()
    until(lambda: any(e["path"] == "/generate" for e in ask(urls[0], "/log")["requests"]), "generation begins")
    os.kill(pids[0], signal.SIGKILL)
    thread.join()
    assert_from(results[0], requests, weights, version)
    until(lambda: pids_of(engine)[0] != pids[0] and len(engine._servers.up) == 2, "it is started again")
    assert engine.urls == urls and pids_of(engine)[1] == pids[1]
    assert ask(urls[0], "/model_info", key=engine.key)["weight_version"] == f"swirl:{version}"
    fresh = [request(number) for number in range(100, 108)]
    assert_from(engine.generate(fresh), fresh, weights, version)
    assert any(e["path"] == "/generate" for e in ask(urls[0], "/log")["requests"]), "it works again"
    assert not runs(pids[0])


@pytest.mark.parametrize("how", ["hang", "stale"])
def test_a_launched_server_that_hangs_or_is_stale_is_started_again(launch, model: Path, how: str) -> None:
    """Also the only one: its requests wait for it."""
    engine = launch(launch={"servers": 1, "flags": ["--fake-deaf"]}, timeout=1.0)
    (pid,) = pids_of(engine)
    ask(engine.urls[0], "/misbehave", {"path": "*" if how == "hang" else "/generate", "how": how, "times": -1})
    with pytest.warns(UserWarning, match="is started again"):
        assert_from(engine.generate(MANY), MANY, original(model), 0)
    assert pids_of(engine) != [pid] and not runs(pid)
    states = nested(1)
    assert_from(engine.generate(states), states, original(model), 0)


def test_the_cache_of_a_server_started_again_is_not_taken_for_full(launch, model: Path) -> None:
    engine = launch(launch={"servers": 1})
    states = nested(1)
    engine.generate(states)
    ideal = sum(len(one.tokens) - 1 for one in states if len(one.tokens) < 200)
    pids = pids_of(engine)
    for seen in (True, False):
        os.kill(pids_of(engine)[0], signal.SIGKILL)
        if seen:
            until(lambda: pids_of(engine) != pids and engine._servers.up, "it is started again")
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
    os.kill(pids_of(engine)[0], signal.SIGKILL)
    new = changed(model, 2.0)
    engine.update_weights(new, 1)
    until(lambda: len(engine._servers.up) == 2, "both are up")
    assert [one["fingerprint"] for one in served(engine)] == [weights_of(new)] * 2
    assert_from(engine.generate(MANY), MANY, weights_of(new), 1)


def test_a_launched_server_that_refuses_an_update_is_started_with_it(launch, model: Path) -> None:
    engine = launch()
    first = pids_of(engine)
    ask(engine.urls[0], "/misbehave", {"path": "/update_weights_from_disk", "how": "refuse"})
    new = changed(model, 2.0)
    engine.update_weights(new, 1)
    assert_from(engine.generate(MANY), MANY, weights_of(new), 1)
    until(lambda: len(engine._servers.up) == 2, "both are up")
    assert pids_of(engine)[0] != first[0] and pids_of(engine)[1] == first[1]
    assert [one["fingerprint"] for one in served(engine)] == [weights_of(new)] * 2


def test_an_update_while_a_server_is_being_stopped(launch, model: Path) -> None:
    """It does not end by itself, and its port is taken until it is made to; the start with the new weights waits for that."""
    engine = launch(launch={"servers": 1, "flags": ["--fake-deaf"]}, max_restarts=2)
    (server,) = engine._servers.all
    pid = pids_of(engine)[0]
    engine._servers._watching.get_loop().call_soon_threadsafe(engine._servers.mend, server, "a test says so")
    until(lambda: server.process.pid is None, "it is being stopped")
    new = changed(model, 2.0)
    engine.update_weights(new, 1)
    assert_from(engine.generate(MANY), MANY, weights_of(new), 1)
    assert server.restarts == 2 and pids_of(engine) != [pid] and not runs(pid)


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
    engine = launch(sync={"method": "tensor", "snapshot": False, "timeout": 120.0})
    new = changed(model, 2.0)
    engine.update_weights(new, 1)
    pids = pids_of(engine)
    os.kill(pids[0], signal.SIGKILL)
    until(lambda: len(engine._servers.up) == 1, "its end is seen")
    assert_from(engine.generate(MANY), MANY, weights_of(new), 1)
    assert pids_of(engine)[0] == pids[0]
    new = changed(model, 3.0)
    engine.update_weights(new, 2)
    assert pids_of(engine)[0] != pids[0] and len(engine._servers.up) == 2
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
    os.kill(pids_of(engine)[0], signal.SIGKILL)
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


@pytest.mark.parametrize(
    ("settings", "shown"),
    [
        ({"servers": 3}, ["6", "7", None]),
        ({"servers": 1, "gpus_per_server": 3}, [None]),
        ({"gpus": [1, 2]}, ["7", None]),
    ],
)
def test_gpus_that_are_not_shown_to_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict, shown: list[str | None]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "6,7")
    config = LaunchConfig(**settings)
    for number, wanted in enumerate(shown):
        process = sglang_launch.ServerProcess(config, number, 1, "float32", 1, 0, "", tmp_path / "log")
        if wanted is not None:
            assert process.environment()["CUDA_VISIBLE_DEVICES"] == wanted
            continue
        with pytest.raises(
            EngineError, match="CUDA_VISIBLE_DEVICES=6,7 shows 2 GPUs, .* needs number 2 of them"
        ) as error:
            process.environment()
        for key in ("engine.launch.servers", "gpus_per_server", f"gpus={config.gpus}"):
            assert key in str(error.value)


@pytest.mark.parametrize("end", ["polite", "deaf", "killed"])
def test_close_ends_its_own_processes_and_their_children_alone(launch, model: Path, tmp_path: Path, end: str) -> None:
    """Also those of a server that was killed and could not end them itself."""
    flags = ["--fake-child", str(tmp_path / "child"), *(["--fake-deaf"] if end == "deaf" else [])]
    with spawned(model) as (url, bystander):
        engine = launch(launch={"flags": flags, "servers": 1})
        pids, child = pids_of(engine), int((tmp_path / "child").read_text())
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
from swirl_fast.engines.sglang.engine import SGLangEngine
from support.sglang_cases import pids_of
config = EngineConfig(kind="sglang", launch=LaunchConfig(python={str(interpreter(tmp_path / "python"))!r}, port={free_port()}))
engine = SGLangEngine(config, Path({str(model)!r}), Path({str(tmp_path / "engine")!r}))
print(pids_of(engine)[0], flush=True)
time.sleep(60)
"""
    parent = forks.Fork(["-c", program], environment())
    until(lambda: "\n" in parent.printed()[0], "the server is up")
    pid = int(parent.printed()[0])
    assert runs(pid)
    parent.kill()
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
