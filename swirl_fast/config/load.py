"""`load` is the only entrance to the settings: defaults, a YAML file or a table, `key=value` overrides, checked."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from swirl_fast.config.check import check
from swirl_fast.config.contents import located
from swirl_fast.config.error import ConfigError
from swirl_fast.config.read import Layer, fill, read_file, read_override
from swirl_fast.config.schema import Config
from swirl_fast.config.shipped import find
from swirl_fast.config.yaml_text import parse, write


def load(
    source: str | Path | Mapping[str, Any] | None = None, overrides: Sequence[str] = (), files: bool = True
) -> Config:
    """Defaults, then the source, then `section.key=value` overrides; checked. Tables are merged key by key, but for `{}`: it empties a
    table of free keys, such as `tasks.options`. files: whether those that the settings name must be there.

    source: a YAML file, or the name of a shipped one (shipped.py); or sections as a table, also one that OmegaConf or Hydra composed, whose
    interpolations are resolved.

    Raises ConfigError for a missing or unreadable file, an unknown key, a wrong type or an impossible value.
    """
    layers = []
    if isinstance(source, Mapping):
        layers = [_read_table(source)]
    elif source is not None:
        layers = [read_config(source)]
    return load_layers([*layers, *(read_override(Config, override) for override in overrides)], files)


def _read_table(table: Mapping[str, Any]) -> Layer:
    from omegaconf import DictConfig, OmegaConf  # here, for the benchmarks of a step need neither it nor its parser
    from omegaconf.errors import OmegaConfBaseException

    if isinstance(table, DictConfig):
        try:
            table = OmegaConf.to_container(table, resolve=True, throw_on_missing=True)  # type: ignore[assignment]
        except OmegaConfBaseException as error:
            raise ConfigError(f"the table of settings cannot be resolved: {str(error).splitlines()[0]}") from None
    return Layer(parse(write(_plain(table, ""))), "table")


def _plain(value: Any, key: str) -> Any:
    """As YAML can write it: a path is its text, and a scalar of numpy or torch its number. Raises ConfigError for what is no setting."""
    if isinstance(value, Mapping):
        return {name: _plain(entry, f"{key}.{name}".lstrip(".")) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry, f"{key}[{i}]") for i, entry in enumerate(value)]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if getattr(value, "ndim", None) == 0:
        value = value.item()
    if isinstance(value, str):
        return str.__str__(value)  # of a subclass, such as an Enum
    try:
        write([value])
    except yaml.YAMLError:
        raise ConfigError(
            f"{key}: a {type(value).__name__} is no setting; give a text, a path, a number, a truth value, a list or a table of them"
        ) from None
    return value


def load_layers(layers: Sequence[Layer], files: bool = True) -> Config:
    """As `load`, of what was read already."""
    config = fill(Config, layers)
    check(config, files)
    return config


def read_config(path: str | Path, option: str = "--config") -> Layer:
    """The YAML file of a run, or the shipped one of this name. option: what named it, for messages. Raises ConfigError as `load` does."""
    layer = read_file(find("config", path), option)
    if {"arms", "evaluations"} <= set(layer.tree):
        raise ConfigError(f"{option} {path}: is an experiment, not the config of a run: swirl-fast experiment {path}")
    return layer


def dump(config: Config) -> str:
    """The whole config as YAML; `load` reads it back, from any folder: files that are there are named by their whole paths."""
    return write(located(config))
