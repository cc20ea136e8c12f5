"""Training steps under torchrun (parallel_variants.py), and what they leave."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
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


def assert_same_run(
    of: Run, run: Run, before: Path, micro_batches: bool, lora: bool = False, rel: float = 1e-6
) -> None:
    """before: the folder that both began with."""
    (wanted, reference), (found, parameters) = of, run
    for one, other in zip(wanted["metrics"], found["metrics"], strict=True):
        assert one["grad_norm"] > 0.5, "clipping is to be at work"
        assert other["reward"] == one["reward"]
        for key in ("loss", "grad_norm", "kl"):
            assert other[key] == pytest.approx(one[key], abs=1e-5, rel=rel), key
    assert wanted["metrics"][-1]["kl"] > 1e-5, "nothing was learned"
    weights = load_file(before / "model.safetensors")
    assert parameters.keys() == reference.keys() == weights.keys()
    for name, tensor in reference.items():
        frozen = lora and not name.endswith("_proj.weight")
        assert (tensor - weights[name]).abs().max() > 2e-4 or frozen, f"{name} has not moved"
        assert torch.equal(tensor, weights[name]) or not frozen, f"{name} has moved"
        torch.testing.assert_close(
            parameters[name], tensor, rtol=0, atol=1e-5 if lora else 1e-6, msg=lambda text, name=name: f"{name}: {text}"
        )
    assert found["micro_batches"] >= 4 if micro_batches else found["micro_batches"] == 1
