"""A rank that hangs is found, named, and the run ends so that it can be started again."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch.distributed as dist
from support.runs import command, environment, free_port, overrides, start

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
    arguments = overrides(tmp_path, tiny_model, judged, "training.step_timeout=20", "training.steps=200")
    for stage in ("collect", "judge", "filter"):
        start([stage, *arguments])
    process = subprocess.Popen(
        command("train", *arguments, ranks=2),
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        wait_for(lambda: len(read_metrics(tmp_path / "r")) >= 2, process)
        (stopped,) = [pid for pid in children(process.pid) if rank_of(pid) == "1"]
        os.kill(stopped, signal.SIGSTOP)
        shown = process.communicate(timeout=200)[0]
    finally:
        process.kill()
    assert process.returncode == 1 and "train: rank 1 has not gone on after" in shown
    done = len(read_metrics(tmp_path / "r"))
    start(["train", *arguments[:-1], f"training.steps={done + 1}"])
    assert len(read_metrics(tmp_path / "r")) == done + 1


def wait_for(reached: Any, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 300
    while not reached():
        assert process.poll() is None and time.monotonic() < deadline, process.stdout
        time.sleep(0.05)


def children(pid: int) -> list[int]:
    path = Path(f"/proc/{pid}/task/{pid}/children")
    return [int(child) for child in path.read_text(encoding="utf-8").split()]


def rank_of(pid: int) -> str:
    entries = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    return next((entry[5:].decode() for entry in entries if entry.startswith(b"RANK=")), "")
