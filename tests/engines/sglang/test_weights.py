"""Attaching to servers, updates of their weights, and processes that leave these to another."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from support.fake_sglang import digest_of
from support.sglang_cases import (
    MANY,
    ask,
    assert_from,
    changed,
    fails_at,
    nested,
    original,
    spawned,
    weights_of,
)
from torch import Tensor
from transformers import AutoModelForCausalLM

from swirl_fast.config import EngineConfig, LaunchConfig
from swirl_fast.engines.engine import EngineError
from swirl_fast.engines.sglang import weights as sglang_weights
from swirl_fast.engines.sglang.engine import SGLangEngine

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
    assert not server.fake.paused, "somebody else may use it"


def test_a_server_that_a_killed_command_left_paused(serve, attach, model: Path) -> None:
    server = serve(weight_version="swirl:0")
    server.fake.paused = True
    assert_from(attach(server).generate(MANY), MANY, original(model), 0)


@pytest.mark.parametrize("method", ["tensor", "distributed"])
def test_a_run_that_goes_on_sends_its_weights_to_servers_that_see_no_folder_of_ours(
    attach, model: Path, method: str
) -> None:
    """They hold the last version before the stop, and a command begins with the first."""
    with spawned(model) as (url, _):
        sync = {"method": method, "timeout": 120.0, "snapshot": False, "bucket_mb": 0.02}
        first = attach(url, timeout=60.0, sync=sync)
        new = changed(model, 2.0)
        first.update_weights(new, 57)
        first.close()
        ask(url, "/misbehave", {"path": "/update_weights_from_disk", "how": "refuse", "times": -1})
        again = attach(url, timeout=60.0, sync=sync)
        assert ask(url, "/log")["fingerprint"] == original(model)
        assert_from(again.generate(MANY), MANY, original(model), 0)
        again.update_weights(new, 57)
        assert_from(again.generate(MANY), MANY, weights_of(new), 57)


@pytest.mark.parametrize("path", ["/update_weights_from_tensor", "/begin_weight_update", "/update_weight_version"])
def test_a_server_that_does_not_take_the_first_weights_is_an_error(serve, attach, model: Path, path: str) -> None:
    good, bad = serve(weight_version="swirl:57"), serve(weight_version="swirl:57")
    bad.fake.misbehave(path, "refuse", -1)
    with pytest.raises(EngineError, match=f"{bad.url} serves .*'swirl:57'.* cannot take those of .*told to refuse"):
        attach(good, bad, sync={"method": "tensor"})


def test_half_an_update_never_passes_for_the_weights_before(
    serve, attach, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also to the next command, when the server could not read those again."""
    server, sync = serve(), {"method": "tensor", "bucket_mb": 0.01}
    engine = attach(server, sync=sync)
    server.fake.misbehave("/update_weights_from_disk", "refuse", -1)
    new = changed(model, 2.0)
    with monkeypatch.context() as patch, pytest.raises(OSError):
        patch.setattr(sglang_weights, "whole", fails_at(len(new) - 1))
        engine.update_weights(new, 1)
    assert server.fake.fingerprint not in (original(model), weights_of(new))
    assert server.fake.weight_version != "swirl:0" and not server.fake.paused
    assert_from(attach(server, sync=sync).generate(MANY), MANY, original(model), 0)


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
            path in ("/pause_generation", "/update_weight_version")
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
    # the server's answer ends the wait for the group, which would end with another reason
    with pytest.raises(EngineError, match=r"engine.weight_sync.method=distributed: .*told to"):
        engine.update_weights(changed(model, 2.0), 1)
    assert_from(engine.generate(MANY), MANY, original(model), 0)


def test_weights_by_broadcast(attach, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a real group of two processes; when the server refuses in the middle, it reads the folder instead."""
    with spawned(model) as (url, _):
        engine = attach(url, timeout=60.0, sync={"method": "distributed", "timeout": 120.0, "bucket_mb": 0.02})
        for version, factor in ((1, 2.0), (2, 3.0)):
            new = changed(model, factor)
            engine.update_weights(new, version)
            assert_from(engine.generate(MANY), MANY, weights_of(new), version)
        paths = [entry["path"] for entry in ask(url, "/log")["requests"]]
        assert paths.count("/init_weights_update_group") == 1 and "/update_weights_from_disk" not in paths
        rejoin = engine._servers.rejoin
        reasons = []

        async def rejoin_and_note(*arguments: object) -> None:
            reasons.append(engine._servers.all[0].out)
            await rejoin(*arguments)

        monkeypatch.setattr(engine._servers, "rejoin", rejoin_and_note)
        ask(url, "/misbehave", {"path": "/update_weights_from_distributed", "how": "refuse"})
        for version, factor in ((3, 4.0), (4, 5.0)):
            new = changed(model, factor)
            engine.update_weights(new, version)
            assert_from(engine.generate(MANY), MANY, weights_of(new), version)
        refused, taken = reasons
        assert "told to" in refused and taken is None, "its answer, and no time-out, ends the wait for it"
        paths = [entry["path"] for entry in ask(url, "/log")["requests"]]
        assert paths.count("/init_weights_update_group") == 2 and paths.count("/update_weights_from_disk") == 1
        with pytest.raises(KeyError):
            engine.update_weights(new[:-2], 5)
        assert_from(engine.generate(MANY), MANY, weights_of(new), 4)


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
