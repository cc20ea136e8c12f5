"""Training steps under torchrun (parallel_variants.py), and what they leave."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from support.paths import SUPPORT
from support.runs import environment, free_port

CPU = torch.device("cpu")


Run = tuple[dict[str, Any], dict[str, torch.Tensor]]


def torchrun(ranks: int, out: Path, *variants: str) -> str:
    start = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks)]
    script = SUPPORT / "parallel_variants.py"
    command = [*start, "--master-port", str(free_port()), str(script), str(out), *variants]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


def read(out: Path, variant: str) -> Run:
    return json.loads((out / f"{variant}.json").read_text(encoding="utf-8")), load_file(out / f"{variant}.safetensors")
