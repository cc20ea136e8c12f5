"""Training steps under torchrun (parallel_variants.py), and what they leave."""

from __future__ import annotations

import json
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
    """What they print together. Forks with the environment that torchrun gives its processes."""
    script = SUPPORT / "parallel_variants.py"
    done = run_all([str(script), str(out), *variants], ranks_of(ranks, environment(), free_port()), timeout=600)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


def read(out: Path, variant: str) -> Run:
    return json.loads((out / f"{variant}.json").read_text(encoding="utf-8")), load_file(out / f"{variant}.safetensors")
