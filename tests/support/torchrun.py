"""Training steps under torchrun (parallel_variants.py), and what they leave."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from support.forks import ranks_of, run_all
from support.paths import SUPPORT
from support.runs import environment, free_port

CPU = torch.device("cpu")


Run = tuple[dict[str, Any], dict[str, torch.Tensor]]


def torchrun(ranks: int, out: Path, *variants: str) -> str:
    """What they print together. Without a GPU they are forks with the environment that torchrun gives its processes."""
    script = [str(SUPPORT / "parallel_variants.py"), str(out), *variants]
    if torch.cuda.is_available():  # CUDA is not for forks
        line = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks)]
        line += ["--master-port", str(free_port()), *script]
        done = subprocess.run(line, env=environment(), capture_output=True, text=True, timeout=600)
    else:
        done = run_all(script, ranks_of(ranks, environment(), free_port()), timeout=600)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


def read(out: Path, variant: str) -> Run:
    return json.loads((out / f"{variant}.json").read_text(encoding="utf-8")), load_file(out / f"{variant}.safetensors")
