"""The trainer on one NVIDIA GPU under torchrun (nccl, FSDP2), against one process on the CPU: `make test-gpu`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support import small_models
from support.parallel_variants import train
from support.torchrun import CPU, read, torchrun

from swirl_fast.ranks import Ranks

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

SAME = ("plain", "accumulated", "accumulated_sharded", "full", "selective", "compiled", "offloaded", "resumed")


def test_three_steps_on_a_gpu_are_those_on_a_cpu(tmp_path: Path) -> None:
    """Float32 with the Triton kernels: accumulated, checkpointed, compiled, with the reference in CPU memory, resumed from an
    asynchronous checkpoint. bfloat16 learns about the same."""
    llama = tmp_path / "llama"
    small_models.build("llama", torch.float32).save_pretrained(llama)
    wanted, reference = train(llama, "plain", Ranks(0, 1, CPU), tmp_path)
    torchrun(1, tmp_path, *(f"{llama}:{variant}" for variant in (*SAME, "bfloat16")))
    for variant in SAME:
        found, parameters = read(tmp_path, variant)
        for one, other in zip(wanted["metrics"], found["metrics"], strict=True):
            assert other["reward"] == one["reward"], variant
            for key in ("loss", "grad_norm", "kl"):
                assert other[key] == pytest.approx(one[key], abs=1e-5, rel=1e-5), (variant, key)
        for name, tensor in reference.items():
            torch.testing.assert_close(
                parameters[name], tensor, rtol=0, atol=1e-5, msg=lambda text, at=(variant, name): f"{at}: {text}"
            )
    found, _ = read(tmp_path, "bfloat16")
    for one, other in zip(wanted["metrics"], found["metrics"], strict=True):
        assert other["grad_norm"] == pytest.approx(one["grad_norm"], rel=0.05)
