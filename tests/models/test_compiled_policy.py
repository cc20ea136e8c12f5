"""Compiled decoder layers: one graph for layers that are alike and rows of any length, with the numbers of eager ones."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from support import small_models
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from swirl_fast.comb.tree import SampledState, Trunk, pack
from swirl_fast.config import TrainingConfig
from swirl_fast.config.schema import Checkpointing
from swirl_fast.models.policy import DeviceComb, Policy
from swirl_fast.training import layers
from swirl_fast.training.fsdp import decoder_layers


def row(length: int) -> DeviceComb:
    """A trunk, two actions at its middle and one at its end."""
    draw = np.random.default_rng(length)
    trunk, *teeth = (draw.integers(1, 97, n).astype(np.int32) for n in (length, 5, 4, 3))
    states = (SampledState(length // 2, tuple(teeth[:2]), (0, 1)), SampledState(length, tuple(teeth[2:]), (2,)))
    return DeviceComb.of(pack([Trunk(trunk, states)]))


def results(policy: Policy, length: int) -> list[Tensor]:
    """Log-probs and the gradients of all parameters."""
    policy.zero_grad()
    logp = policy(row(length))
    logp.square().mean().backward()
    return [logp.detach(), *(p.grad.clone() for p in policy.parameters() if p.grad is not None)]


@pytest.mark.parametrize(
    ("family", "checkpointing", "graphs"),
    [("llama", "none", 1), ("gemma2", "full", 2)],  # a window in every second layer of Gemma 2
)
def test_layers_share_a_graph_over_all_lengths(
    monkeypatch: pytest.MonkeyPatch, family: str, checkpointing: Checkpointing, graphs: int
) -> None:
    policy = Policy(small_models.build(family, torch.float32))
    lengths = (20, 29, 37, 51)
    expected = [results(policy, length) for length in lengths]
    counter = CompileCounterWithBackend("aot_eager")
    for layer in decoder_layers(policy):
        monkeypatch.setattr(layer, "compile", functools.partial(layer.compile, backend=counter, fullgraph=True))
    torch._dynamo.reset()
    with torch._dynamo.config.patch(specialize_float=False):  # the default, back again afterwards
        layers.prepare(policy, TrainingConfig(compile=True, activation_checkpointing=checkpointing))
        for length, wanted in zip(lengths, expected, strict=True):
            for a, b in zip(results(policy, length), wanted, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
            assert counter.frame_count == graphs
    operators = [str(node.target) for graph in counter.graphs for node in graph.graph.nodes]
    assert operators.count("swirl_kernels.tree_attention.default") == graphs
