"""Commands as a user starts them, on small settings: run to the end, killed, copied, compared."""

from __future__ import annotations

import io
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import torch
from safetensors.torch import load_file
from support import forks
from support.paths import ROOT

from swirl_fast import cli

STEPS = 4


def overrides(folder: Path, model: Path, *more: str) -> list[str]:
    return [
        f"run.folder={folder}",
        "run.name=r",
        f"model.path={model}",
        "tasks.options={min_terms: 2, max_terms: 2, max_digits: 1}",
        "tasks.limit=6",
        "tasks.eval_limit=6",
        "tasks.examples=1",
        "collect.trajectories_per_question=3",
        "tasks.max_steps=3",
        "collect.max_action_tokens=24",
        "collect.batch=8",
        "filter.kind=none",
        f"training.steps={STEPS}",
        "training.trajectories_per_step=4",
        "training.group_size=4",
        "training.max_action_tokens=24",
        "training.learning_rate=1e-3",
        "training.checkpoint_every=1",
        "training.token_budget=1024",
        "training.tensorboard=false",
        *more,
    ]


def command(*arguments: str, ranks: int = 0) -> list[str]:
    start = [sys.executable, "-m"]
    if ranks:
        start += ["torch.distributed.run", "--nproc-per-node", str(ranks), "--master-port", str(free_port()), "-m"]
    return [*start, "swirl_fast", *arguments]


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def environment() -> dict[str, str]:
    root = ROOT
    path = os.pathsep.join([str(root), str(root / "kernels"), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def attempt(arguments: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """A command in this process, its warnings in stderr: most take less time than importing torch and transformers again."""
    out, errors = io.StringIO(), io.StringIO()
    with warnings.catch_warnings(record=True) as warned, redirect_stdout(out), redirect_stderr(errors):
        warnings.simplefilter("always")
        code = cli.main(arguments)
    shown = "".join(f"{warning.category.__name__}: {warning.message}\n" for warning in warned)
    return subprocess.CompletedProcess(list(arguments), code, out.getvalue(), errors.getvalue() + shown)


def start(arguments: Sequence[str], ranks: int = 0, own_process: bool = False) -> subprocess.CompletedProcess[str]:
    """A command that must succeed; with ranks as torchrun would start them."""
    if ranks or own_process:
        envs = forks.ranks_of(ranks, environment(), free_port()) if ranks else [environment()]
        done = forks.run_all(["-m", "swirl_fast", *arguments], envs, timeout=600)
    else:
        done = attempt(arguments)
    assert done.returncode == 0, f"{' '.join(arguments)}\n{done.stdout}\n{done.stderr}"
    return done


def kill_when(arguments: Sequence[str], reached: Callable[[], bool]) -> None:
    """Starts a stage and ends its whole process group with SIGKILL as soon as `reached()`."""
    process = forks.Fork(["-m", "swirl_fast", *arguments], environment(), new_session=True)
    deadline = time.monotonic() + 200
    while not reached():
        assert process.poll() is None, f"ended before it could be killed: {process.printed()[1]}"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def copy_of(source: Path, target: Path) -> Path:
    shutil.copytree(source / "r", target / "r")
    return target


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "r" / "model" / "model.safetensors")
