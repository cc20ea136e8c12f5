"""Stage 3: step-wise reinforcement learning on the shards; runs/NAME/checkpoints/, metrics.jsonl and model/."""

from __future__ import annotations

from swirl_fast.config import Config
from swirl_fast.stages.build import save_config


def train(config: Config) -> None:
    """Under torchrun, one call a rank."""
    from swirl_fast.ranks import start, stop
    from swirl_fast.training.build import run_training

    ranks = start()
    try:
        # not before the settings are accepted: what lies there may have been made with others
        run_training(config, ranks, lambda: save_config(config))
    finally:
        stop()
