"""The learning rate over the steps of a training."""

from __future__ import annotations

import math

from swirl_fast.config import TrainingConfig


def learning_rate(training: TrainingConfig, step: int) -> float:
    """That of batch `step` (0-based): linear warm-up over `warmup_steps`, then constant, or a cosine down to 0 at `steps`."""
    if step < training.warmup_steps:
        return training.learning_rate * (step + 1) / training.warmup_steps
    if training.schedule == "constant":
        return training.learning_rate
    progress = (step - training.warmup_steps) / max(training.steps - training.warmup_steps, 1)
    return training.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))
