"""The command line with faults built in, for tests/stages/test_faults.py: `python faulty.py FOLDER FAULTS ARGUMENTS…`

FAULTS: STEP:RANK:KIND,…; each happens once, in the middle of that step, between its rollout and its update:
    kill    SIGKILL to the rank itself            write   the same, while it writes the step's checkpoint
    term    SIGTERM to the rank itself            agent   SIGTERM to torchrun, which passes it on to every rank
    group   SIGTERM to all processes of the rank's session, which must be its own
FOLDER remembers what has happened, and gets the ids of the trajectories of every step: STEP-RANK.json.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any

from swirl_fast import cli
from swirl_fast.rollouts import pipeline
from swirl_fast.training import checkpoint, interrupt
from swirl_fast.training.trainer import Metrics, Trainer

folder, faults = Path(sys.argv[1]), sys.argv[2].split(",")
now = ""
noted = threading.Event()
real_step, real_sample, real_judge = Trainer.train_step, pipeline.sample_actions, pipeline.judge_sampled
real_hash, real_note = checkpoint.hash_file, interrupt.Interrupts._note


def due(kind: str, place: str) -> bool:
    fault = f"{place}:{kind}"
    if fault not in faults or (folder / fault).exists():
        return False
    (folder / fault).touch()
    return True


def train_step(self: Trainer) -> Metrics:
    global now
    now = f"{self.step + 1}:{self.ranks.rank}"
    return real_step(self)


def sample_actions(trajectories: Any, *arguments: Any) -> Any:
    ids = [trajectory.id for trajectory in trajectories]
    (folder / f"{now.replace(':', '-')}.json").write_text(json.dumps(ids), encoding="utf-8")
    return real_sample(trajectories, *arguments)


def judge_sampled(*arguments: Any) -> Any:
    if due("kill", now):
        os.kill(os.getpid(), signal.SIGKILL)
    if due("term", now):
        os.kill(os.getpid(), signal.SIGTERM)
    if due("group", now):
        assert os.getsid(0) == os.getpid(), "others would be ended too"
        os.killpg(os.getpid(), signal.SIGTERM)
    if due("agent", now):
        os.kill(os.getppid(), signal.SIGTERM)
        while not noted.is_set():
            noted.wait(0.05)  # the handler runs between two of these
    return real_judge(*arguments)


def note(self: interrupt.Interrupts, *arguments: Any) -> None:
    real_note(self, *arguments)
    noted.set()


def hash_of(file: Path) -> str:
    if file.parent.suffix == ".tmp" and due("write", f"{int(file.parent.stem.removeprefix('step_'))}:0"):
        os.kill(os.getpid(), signal.SIGKILL)
    return real_hash(file)


if __name__ == "__main__":  # the engine's process imports this file too
    Trainer.train_step = train_step  # type: ignore[method-assign]
    pipeline.sample_actions, pipeline.judge_sampled = sample_actions, judge_sampled
    checkpoint.hash_file, interrupt.Interrupts._note = hash_of, note  # type: ignore[method-assign]
    sys.exit(cli.main(sys.argv[3:]))
