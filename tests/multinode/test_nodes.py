"""Two nodes of two ranks each, network namespaces of this machine: training, weights for a server, stages, and a node that is cut off."""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from support import small_models
from support.namespaces import nodes, why_not
from support.parallel_variants import train
from support.paths import SUPPORT
from support.processes import runs
from support.runs import overrides, start
from support.sglang_cases import FAKE, MANY, changed, of, weights_of
from support.stores import assert_same_store
from support.torchrun import CPU, assert_same_run, read

from swirl_fast.ranks import Ranks

PATIENCE = 600  # seconds, on a busy machine
SETTINGS = ("judge.kind=rules", "tasks.limit=5", "tasks.eval_limit=5")
STAGES = (["collect"], ["judge"], ["evaluate", "--of", "base"])


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    small_models.build("llama", torch.float32).save_pretrained(folder)
    return folder


class Launch:
    """Runs until both nodes are in the last thing they do, then the second is cut off. out: what they wrote. said: what each printed.
    ended: the exit codes of both torchruns, None where one had not ended. left: processes of torchruns and ranks that had not."""

    def __init__(self, base: Path, llama: Path, tiny_model: Path) -> None:
        self.out = base
        stages = [json.dumps([*stage, *overrides(Path(), tiny_model, *SETTINGS)]) for stage in STAGES]
        with nodes(base) as (first, second):
            url = f"http://{second.address}:30000"
            served = [sys.executable, str(FAKE), "--model-path", str(llama)]
            second.start([*served, "--port", "30000", "--host", second.address], base / "server.log")
            script = [str(SUPPORT / "multinode.py"), str(base), str(llama), url, first.address, *stages]
            logs = [base / f"node{i}.log" for i in range(2)]
            launched = [
                one.torchrun(2, first, *script, log=log) for one, log in zip((first, second), logs, strict=True)
            ]

            def printed() -> str:
                return "\n".join(log.read_text(encoding="utf-8", errors="replace")[-4000:] for log in logs)

            ready = [base / f"ready-{rank}" for rank in range(4)]
            wait_until(lambda: all(path.exists() for path in ready) or any(one.poll() for one in launched))
            assert all(path.exists() for path in ready), printed()
            ranks = [pid for node in (first, second) for pid in node.processes() if "multinode.py" in words(pid)]
            second.cut_off()
            wait_until(lambda: all("so this rank ends" in log.read_text(encoding="utf-8") for log in logs))
            wait_until(lambda: all(one.poll() is not None for one in launched) and not any(map(runs, ranks)))
            self.left = [pid for pid in ranks if runs(pid)]
            self.ended = [one.poll() for one in launched]
            self.said = [log.read_text(encoding="utf-8") for log in logs]


def words(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text(encoding="utf-8")
    except OSError:
        return ""


def wait_until(true: object) -> None:
    deadline = time.monotonic() + PATIENCE
    while not true() and time.monotonic() < deadline:  # type: ignore[operator]
        time.sleep(0.05)


@pytest.fixture(scope="module")
def launch(tmp_path_factory: pytest.TempPathFactory, llama: Path, tiny_model: Path) -> Iterator[Launch]:
    if reason := why_not():
        pytest.skip(reason)
    yield Launch(tmp_path_factory.mktemp("nodes"), llama, tiny_model)


def test_training_with_a_copy_on_each_node_is_that_of_one_process(launch: Launch, llama: Path, tmp_path: Path) -> None:
    found = read(launch.out, "hsdp")
    assert found[0]["mesh"] == [[0, 1], [2, 3]]
    assert_same_run(train(llama, "plain", Ranks(0, 1, CPU), tmp_path), found, llama, micro_batches=False)


def test_a_server_on_the_other_node_gets_weights_by_broadcast(launch: Launch, llama: Path) -> None:
    weights = weights_of(changed(llama, 2.0))
    wanted = [[tokens, logprobs, 3] for request in MANY for tokens, logprobs in of(weights, request)]
    for rank in range(4):
        assert json.loads((launch.out / f"asked-{rank}.json").read_text(encoding="utf-8")) == wanted


def test_stages_on_two_nodes_make_what_one_process_makes(launch: Launch, tiny_model: Path, tmp_path: Path) -> None:
    for stage in STAGES:
        start([*stage, *overrides(tmp_path, tiny_model, *SETTINGS)])
    found = launch.out / "node0" / "r"
    for name in ("trajectories.db", "evaluations/base.db"):
        assert_same_store(found / name, tmp_path / "r" / name)
    assert not (launch.out / "node1" / "r" / "trajectories.db").exists()


def test_a_node_that_is_cut_off_ends_the_other(launch: Launch) -> None:
    """Neither hangs, and both say why."""
    assert not launch.left
    first, second = launch.said
    assert re.search(r"rank [23](, 3)? ha(s|ve) given no sign of life for 20 seconds, so this rank ends", first)
    assert "the store that the ranks share, on the node of --rdzv-endpoint, has not answered for 20 seconds" in second
    assert all(launch.ended), "torchrun too"
