"""engine.share_gpu: servers release their memory and take it again, in an order that the real ones survive; the fake ones break where
they would not."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from pathlib import Path

import pytest
from support.fake_sglang import FakeServer
from support.sglang_cases import MANY, ask, assert_from, changed, original, pids_of, until, weights_of

from swirl_fast.config import ConfigError
from swirl_fast.engines.engine import EngineError
from swirl_fast.engines.sglang import memory

ALL = ["weights", "kv_cache", "cuda_graph"]
SHARED = {"share_gpu": True}


def order(server: FakeServer) -> list[str]:
    """The calls that change something, and what memory they are about."""
    asked = []
    for request in server.fake.requests:
        name = request["path"].strip("/")
        if "memory_occupation" in name:
            asked.append(f"{name.partition('_')[0]} {' '.join(request['body']['tags'])}")
        elif name.startswith(("generate", "update_weights", "pause", "continue", "flush", "begin", "end_")):
            asked.append(name)
    return [now for before, now in zip(["", *asked], asked, strict=False) if now != before]


@pytest.mark.parametrize("method", ["disk", "tensor"])
def test_a_round_of_turns(serve, attach, model: Path, method: str) -> None:
    server = serve(saver=True)
    engine = attach(server, sync={"method": method}, **SHARED)
    assert_from(engine.generate(MANY), MANY, original(model), 0)
    server.fake.requests.clear()
    for version in (1, 2):
        engine.release_memory()
        assert server.fake.released == set(ALL) and not server.fake.cache
        new = changed(model, 1.0 + version)
        engine.update_weights(new, version)
        assert server.fake.released == {"kv_cache", "cuda_graph"}, "the weights are sent before the cache is there"
        engine.resume_memory()
        assert not server.fake.released
        assert_from(engine.generate(MANY), MANY, weights_of(new), version)
    sent = {
        "disk": ["pause_generation", "update_weights_from_disk", "continue_generation"],
        "tensor": [
            "pause_generation", "begin_weight_update", "update_weights_from_tensor", "end_weight_update", "flush_cache",
            "continue_generation",
        ],
    }[method]  # fmt: skip
    released = ["pause_generation", "flush_cache", "release weights kv_cache cuda_graph"]
    turn = [*released, "resume weights", *sent, "resume kv_cache cuda_graph", "generate"]
    assert order(server) == turn * 2


def test_servers_that_cannot_are_refused_before_they_are_given_anything(serve, attach) -> None:
    server = serve()
    with pytest.raises(ConfigError, match=f"{server.url} runs without --enable-memory-saver; start it again with"):
        attach(server, **SHARED)
    assert not server.fake.of("/update_weights_from_disk")


@pytest.mark.parametrize("readable", [True, False])
def test_servers_of_others_are_left_whole(serve, attach, model: Path, tmp_path: Path, readable: bool) -> None:
    """Wherever a training ends: with the weights of the last update, or where they cannot read those, with what they began with."""
    server, untouched = serve(saver=True), serve(saver=True)
    engine = attach(server, untouched, **SHARED)
    new = changed(model, 2.0)
    engine.update_weights(new, 1)
    engine.release_memory()
    untouched.fake.released.clear()  # its owner started it again
    untouched.fake.weight_version = "default"
    if not readable:
        server.fake.misbehave("/update_weights_from_disk", "refuse")
    engine.close()
    assert not server.fake.released and not server.fake.paused and not server.fake.broken
    assert not untouched.fake.broken, "it has its memory"
    assert server.fake.fingerprint == (weights_of(new) if readable else original(model))
    assert server.fake.weight_version == ("swirl:1" if readable else "default")


def test_who_comes_after_a_kill_takes_the_memory_again(serve, attach, model: Path) -> None:
    server = serve(saver=True)
    engine = attach(server, **SHARED)
    engine.release_memory()
    engine._servers.asleep = False  # it is killed: nothing is given back
    engine.close()
    assert server.fake.released and memory.parts_lacking(server.fake.weight_version) == memory.ALL
    for settings in (SHARED, {}):
        assert_from(attach(server, **settings).generate(MANY), MANY, original(model), 0)


def test_a_server_that_does_not_release_is_named(serve, attach) -> None:
    server = serve(saver=True)
    engine = attach(server, **SHARED)
    server.fake.misbehave("/release_memory_occupation", "refuse")
    with pytest.raises(EngineError, match=f"{server.url} does not release its memory.*told to refuse"):
        engine.release_memory()
    server.fake.weight_version = memory.bare(server.fake.weight_version)  # the real one would be dead


@pytest.mark.parametrize("phase", ["release", "resume"])
def test_an_interrupt_leaves_servers_of_others_whole(
    serve, attach, model: Path, phase: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = serve(saver=True)
    engine = attach(server, **SHARED)
    if phase == "resume":
        engine.release_memory()
    begun, plain = threading.Event(), memory._rename

    async def slow(*arguments: object) -> None:
        await plain(*arguments)  # type: ignore[arg-type]
        begun.set()
        await asyncio.sleep(0.3)

    monkeypatch.setattr(memory, "_rename", slow)
    servers = engine._servers
    future = engine._start(servers.release() if phase == "release" else servers.resume(memory.WEIGHTS))
    begun.wait()
    future.cancel()  # as Ctrl-C does
    engine.close()
    assert not server.fake.released and not server.fake.paused and not server.fake.broken
    assert (server.fake.weight_version, server.fake.fingerprint) == ("swirl:0", original(model))


@pytest.mark.parametrize("servers", [1, 2])
def test_a_launched_server_that_dies_while_released_waits_for_its_memory(launch, model: Path, servers: int) -> None:
    engine = launch(launch={"servers": servers}, **SHARED)
    (dead, *_) = pids_of(engine)
    engine.release_memory()
    os.kill(dead, signal.SIGKILL)
    until(lambda: engine._servers.all[0].out, "it is missed")
    assert engine._servers.all[0].mending is None, "there is no room for it now"
    new = changed(model, 2.0)
    engine.update_weights(new, 1)
    assert engine._servers.all[0].mending is None
    with pytest.warns(UserWarning, match="is started again"):
        engine.resume_memory()
    assert_from(engine.generate(MANY), MANY, weights_of(new), 1)
    until(lambda: len(engine._servers.up) == servers, "it is back")
    assert ask(engine.urls[0], "/model_info", key=engine.key)["weight_version"] == "swirl:1"
    engine.release_memory()
    engine.close()
