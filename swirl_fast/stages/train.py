"""Stage 3: step-wise reinforcement learning on the shards; runs/NAME/checkpoints/, metrics.jsonl, hardware.json
and model/."""

from __future__ import annotations

from swirl_fast.config import Config
from swirl_fast.stages.build import save_config


def train(config: Config) -> None:
    """Under torchrun, one call a rank."""
    from swirl_fast.files import write_json
    from swirl_fast.ranks import joined
    from swirl_fast.training.build import open_training
    from swirl_fast.training.hardware import hardware

    with joined() as ranks, open_training(config, ranks) as training:
        # not before the settings are accepted: what lies there may have been made with others
        if ranks.main:
            save_config(config)
            write_json(config.folder / "hardware.json", hardware(ranks))
        training.run()
