"""Resident memory of linear_logprob's CPU path, measured in a process of its own: nothing but what the call itself adds."""

import pytest
from support import forks
from support.runs import environment

ROWS, SIZE, VOCAB, WORKSPACE = 400, 64, 152_064, 64
BOUND = 1.1 * (WORKSPACE + ROWS * SIZE * 4 / 2**20)

PROGRAM = f"""
import torch
from benchmarks.step_training.measure import PeakMemory
from swirl_kernels import linear_logprob

dtype = torch.DTYPE
hidden = torch.randn({ROWS}, {SIZE}).to(dtype).requires_grad_()
weight = (torch.randn({VOCAB}, {SIZE}) / 16).to(dtype).requires_grad_()
targets, upstream = torch.randint(0, {VOCAB}, ({ROWS},)), torch.randn({ROWS})
memory = PeakMemory("cpu")
logp = linear_logprob(hidden, weight, targets, workspace_mb={WORKSPACE})
gradients = torch.autograd.grad(logp, (hidden, weight), upstream)
if memory.mib() is not None:
    print(memory.mib() - sum(x.numel() * x.element_size() for x in gradients) / 2**20)
"""


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_resident_memory_stays_within_the_workspace(dtype: str) -> None:
    """V = 152k, forward and backward, above the two gradients that are returned; the matrix library's own buffers included."""
    done = forks.run(["-c", PROGRAM.replace("DTYPE", dtype)], environment(), timeout=200)
    assert done.returncode == 0, done.stderr
    if not done.stdout:
        pytest.skip("this system does not let a process reset its high-water mark")
    extra = float(done.stdout)
    assert WORKSPACE / 4 < extra < BOUND, f"{extra:.1f} MiB; full logits would be {ROWS * VOCAB * 4 / 2**20:.0f}"
