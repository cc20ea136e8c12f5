"""The learning rate by hand."""

from __future__ import annotations

import pytest

from swirl_fast.config import TrainingConfig
from swirl_fast.training.schedule import learning_rate


def test_warm_up_then_constant() -> None:
    training = TrainingConfig(steps=6, learning_rate=2.0, warmup_steps=4, schedule="constant")
    assert [learning_rate(training, step) for step in range(6)] == [0.5, 1.0, 1.5, 2.0, 2.0, 2.0]


def test_warm_up_then_a_cosine_down_to_zero() -> None:
    training = TrainingConfig(steps=6, learning_rate=2.0, warmup_steps=2, schedule="cosine")
    rates = [learning_rate(training, step) for step in range(7)]
    assert rates[:3] == [1.0, 2.0, 2.0] and rates[4] == pytest.approx(1.0) and rates[6] == pytest.approx(0.0)
    assert all(later < earlier for earlier, later in zip(rates[2:], rates[3:], strict=False))
