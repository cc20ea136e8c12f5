"""Whether what a stage reads is there, said before torch is imported."""

from __future__ import annotations

from pathlib import Path

from swirl_fast.config import Config, ConfigError
from swirl_fast.files import is_file

MANIFEST = "manifest.json"  # as data/shards.py writes it, last


def check_shards(config: Config) -> None:
    """Raises ConfigError, with the commands that come first, where `train` has no shards to read. A URL is left to `train`."""
    given, made = config.training.shards, config.folder / "shards"
    if "://" in given:
        return
    if given and not is_file(Path(given) / MANIFEST):
        raise ConfigError(
            f"training.shards={given}: {Path(given) / MANIFEST} does not exist; give a folder that filter wrote"
        )
    if given or (made / MANIFEST).is_file():
        return
    if not config.store.is_file():
        raise ConfigError(
            f"run.name={config.run.name}: {config.folder} has no collection yet: run collect, judge and filter first, in this order "
            "(`swirl-fast run` does all of it), or check run.folder and run.name"
        )
    raise ConfigError(
        f"run.name={config.run.name}: {made} holds no shards yet: run judge and filter first, in this order"
    )
