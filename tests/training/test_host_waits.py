"""No micro-batch makes the host wait for the device: on PyTorch's meta device, where tensors have no values, whoever asks for one fails."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
import torch
from support import small_models
from torch.utils._python_dispatch import TorchDispatchMode

from swirl_fast.comb.tree import SampledState, Trunk
from swirl_fast.config import load
from swirl_fast.models.policy import Policy, model_size
from swirl_fast.ranks import Ranks
from swirl_fast.training import backward as backward_module
from swirl_fast.training.backward import backward
from swirl_fast.training.batch import Packer, RankActions
from swirl_fast.training.step_metrics import StepSums

WAITS = ("nonzero", "_local_scalar_dense", "is_nonzero", "equal", "masked_select", "_unique2", "item")
VOCABULARY = 60


def actions(trajectories: int) -> RankActions:
    draw = np.random.default_rng(0)
    trunks = [
        Trunk(
            draw.integers(1, VOCABULARY, 24).astype(np.int32),
            tuple(
                SampledState(
                    length, (draw.integers(1, VOCABULARY, 5).astype(np.int32),) * 2, (4 * t + i, 4 * t + i + 1)
                )
                for i, length in ((0, 8), (2, 20))
            ),
        )
        for t in range(trajectories)
    ]
    numbers = draw.normal(size=4 * trajectories).astype(np.float32)
    return RankActions(trunks, numbers, abs(numbers), [np.zeros(5, np.float32)] * len(numbers), [None] * len(numbers))


class Counted(TorchDispatchMode):
    """asked: operators whose result depends on values, which a GPU's host would have to wait for."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func.__name__.partition(".")[0] in WAITS:
            self.asked.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_a_micro_batch_asks_the_device_for_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """From packing to the end of the backward; what an update tells of its loss is read once, behind all micro-batches."""
    policy = Policy(small_models.build(name, torch.float32))
    ranks = Ranks(0, 1, torch.device("meta"))
    config = load(None, ["training.token_budget=60", "algorithm.kl_coef=0"])
    batches = Packer(config, ranks, model_size(policy.model), max_context=512).micro_batches(actions(3))
    assert len(batches) > 1
    # autocast knows no meta device
    monkeypatch.setattr(Policy, "_autocast", lambda self, tokens: contextlib.nullcontext())
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *device: False)
    monkeypatch.setattr(backward_module, "LossSums", None)  # the reading
    with Counted() as counted, pytest.raises(AttributeError, match="'NoneType' object has no attribute 'of'"):
        backward(policy.to("meta"), batches, config, ranks, StepSums(), first=True)
    assert all(parameter.grad is not None for parameter in policy.parameters())
    assert counted.asked == []
