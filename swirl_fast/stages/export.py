"""A checkpoint of stage 3 as a Hugging Face folder, or its adapters as one of peft's."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from swirl_fast.config import Config


def export(
    config: Config, checkpoint: str, out: str | None = None, dtype: str | None = None, adapter: bool = False
) -> None:
    """Writes the weights of a checkpoint (`best`, `step_000020`) to a Hugging Face folder, by default runs/NAME/model-CHECKPOINT.

    dtype: in place of training.export_dtype. adapter: the adapters alone (model.lora), by default to runs/NAME/adapter-CHECKPOINT."""
    from swirl_fast.ranks import start, stop
    from swirl_fast.training.build import export_checkpoint

    if dtype is not None:
        config = replace(config, training=replace(config.training, export_dtype=dtype))
    ranks = start()
    try:
        export_checkpoint(config, ranks, checkpoint, export_folder(config, checkpoint, out, adapter), adapter)
    finally:
        stop()


def export_folder(config: Config, checkpoint: str, out: str | None, adapter: bool) -> Path:
    return Path(out or config.folder / f"{'adapter' if adapter else 'model'}-{checkpoint}")
