"""A rank that hangs is found, named, and the run ends so that it can be started again."""

from __future__ import annotations

import os
import re
import signal
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch.distributed as dist
from support import forks
from support.runs import environment, free_port, overrides, start

from swirl_fast.exits import EXIT_RESUMABLE
from swirl_fast.metrics import read_metrics
from swirl_fast.training.heartbeat import Heartbeat, hung


def test_who_is_behind() -> None:
    assert hung({0: "7 packing", 1: "6 sampling"}, 5).startswith("rank 1 has not gone on after sampling for 5 seconds")
    assert hung({0: "7 packing", 1: "6 sampling", 2: "6 sampling"}, 5).startswith("rank 1, 2 have not gone on after")
    assert hung({0: "7 packing", 1: "7 packing"}, 5).startswith("no rank has gone on after packing for 5 seconds")


def test_a_rank_that_says_nothing_ends_the_process_and_one_that_goes_on_does_not() -> None:
    store = dist.TCPStore("127.0.0.1", free_port(), 1, True)
    ended: list[int] = []
    made = []
    for rank in range(2):
        ranks: Any = SimpleNamespace(rank=rank, size=2, barrier=lambda: None)
        made.append(Heartbeat(ranks, 1.0, dist.PrefixStore("x", store), end=ended.append))
    for one in made:
        one.mark("the start")
    with made[0]:
        for _ in range(30):  # three time-outs long
            made[0].mark("a step")
            time.sleep(0.1)
        assert not ended
        deadline = time.monotonic() + 60
        while not ended and time.monotonic() < deadline:
            time.sleep(0.05)
    assert ended == [EXIT_RESUMABLE]


def test_a_stopped_rank_ends_a_run_which_then_goes_on(tmp_path: Path, tiny_model: Path, judged: str) -> None:
    arguments = overrides(tmp_path, tiny_model, judged, "training.step_timeout=10", "training.steps=200")
    for stage in ("collect", "judge", "filter"):
        start([stage, *arguments])
    stage = ["-m", "swirl_fast", "train", *arguments]
    going, stopped = ranks = [forks.Fork(stage, env) for env in forks.ranks_of(2, environment(), free_port())]
    try:
        deadline = time.monotonic() + 300
        while len(read_metrics(tmp_path / "r")) < 2:
            assert going.poll() is stopped.poll() is None and time.monotonic() < deadline, going.printed()
            time.sleep(0.05)
        os.kill(stopped.pid, signal.SIGSTOP)
        assert going.wait(timeout=200) == EXIT_RESUMABLE
        # Where the ranks are stopped between two parts of a step, neither is behind.
        assert re.search("train: (rank 1 has not|no rank has) gone on after", going.printed()[1])
    finally:
        for rank in ranks:
            rank.kill()
    done = len(read_metrics(tmp_path / "r"))
    start(["train", *arguments[:-1], f"training.steps={done + 1}"])
    assert len(read_metrics(tmp_path / "r")) == done + 1
