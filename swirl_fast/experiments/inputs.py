"""What the cells of an experiment were made of besides their settings: models and data files, which the settings name only by path."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping
from pathlib import Path

from swirl_fast.config import Config, ConfigError
from swirl_fast.files import hash_file, is_file
from swirl_fast.models.load import model_fingerprint
from swirl_fast.tools.search.dense import folder_hash, model_folder


def inputs(configs: Iterable[Config]) -> dict[str, str]:
    """Path, as the settings have it -> hash of what lies there: of a model folder its weights, of a data file or a chat template all of it.
    Names on the Hugging Face hub are left out, and so is what is not there (any more): nothing is known about them."""
    found: dict[str, str] = {}
    for config in configs:
        path = config.model.path
        if path not in found:
            try:
                name = model_fingerprint(config.model)
            except ConfigError:
                name = path
            if name != path:
                found[path] = name.removeprefix("weights ")
        if config.search.kind == "dense" and config.search.model and config.search.model not in found:
            with contextlib.suppress(ConfigError):
                found[config.search.model] = folder_hash(model_folder(config.search.model))
        for file in (config.tasks.path, config.tasks.eval_path, config.model.chat_template):
            if file and file not in found and is_file(file):
                found[file] = hash_file(Path(file).expanduser())
    return found


def changed(recorded: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """The paths where something else lies now. One that only one side knows is no difference."""
    return [path for path, hashed in recorded.items() if now.get(path, hashed) != hashed]
