"""`load` is the only entrance to the settings: defaults, a YAML file, `key=value` overrides, checked."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from swirl_fast.config.check import ConfigError, check
from swirl_fast.config.schema import Config


def load(path: str | Path | None = None, overrides: Sequence[str] = (), files: bool = True) -> Config:
    """Defaults, then the YAML file, then `section.key=value` overrides; checked. Tables are merged key by key, but for `{}`: it empties a
    table of free keys, such as `tasks.options`. files: whether those that the settings name must be there.

    Raises ConfigError for a missing or unreadable file, an unknown key, a wrong type or an impossible value.
    """
    from omegaconf import (
        DictConfig,
        OmegaConf,
    )  # here, so that the benchmarks of a step need torch and transformers alone
    from omegaconf.errors import OmegaConfBaseException

    merged = OmegaConf.structured(Config)
    if path is not None:
        if not Path(path).is_file():
            raise ConfigError(f"--config {path}: no such file; ready ones lie in configs/")
        try:
            layer = OmegaConf.load(path)
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise ConfigError(f"--config {path}: not readable as YAML: {error}") from None
        if not isinstance(layer, DictConfig):
            raise ConfigError(f"--config {path}: must hold sections (run:, model:, …), not a list")
        merged = _merge(merged, layer, str(path))
    for override in overrides:
        key, separator, _ = override.partition("=")
        if not separator or not key.strip():
            raise ConfigError(f"override {override!r}: write it as section.key=value, e.g. training.steps=20")
    try:
        merged = _layered(merged, [OmegaConf.from_dotlist([override]) for override in overrides])
    except (OmegaConfBaseException, yaml.YAMLError):  # one by one, to name the one that is wrong
        for override in overrides:
            try:
                layer = OmegaConf.from_dotlist([override])
            except (OmegaConfBaseException, yaml.YAMLError) as error:
                raise ConfigError(f"override {override!r}: the value is not readable as YAML: {error}") from None
            merged = _merge(merged, layer, "command line")
    config = OmegaConf.to_object(merged)
    assert isinstance(config, Config), "OmegaConf.to_object builds the structured type"
    check(config, files)
    return config


def dump(config: Config) -> str:
    """The whole config as YAML; `load` reads it back."""
    from omegaconf import OmegaConf

    return OmegaConf.to_yaml(OmegaConf.structured(config))


def _layered(base: Any, layers: Sequence[Any]) -> Any:
    """`layers` on top of `base`, one after the other; a free table that one sets to {} is empty from there on."""
    from omegaconf import OmegaConf

    waiting: list[Any] = []  # merged together, for that copies the base, which is most of the work
    for layer in layers:
        waiting.append(layer)
        if emptied := [key for key in _free_tables(Config) if _at(layer, key) == {}]:
            base, waiting = OmegaConf.merge(base, *waiting), []
            for key in emptied:
                OmegaConf.update(base, key, {}, merge=False)
    return OmegaConf.merge(base, *waiting)


def _at(layer: Any, key: str) -> Any:
    """The value of a dotted key as it was written; None where it is not set."""
    from omegaconf import OmegaConf

    value: Any = OmegaConf.to_container(layer, resolve=False)
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def _merge(base: Any, layer: Any, source: str) -> Any:
    from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

    try:
        return _layered(base, [layer])
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", None) or next(iter(layer), "?")
        what = str(error).splitlines()[0]
        hint = ""
        if isinstance(error, ConfigKeyError):
            close = difflib.get_close_matches(key, [known for known, _ in _fields(Config)], n=3, cutoff=0.5)
            what = "unknown key"
            hint = f"; did you mean {' or '.join(close)}?" if close else "; swirl_fast/config.py lists every key"
        raise ConfigError(f"{key} ({source}): {what}{hint}") from None


def _free_tables(kind: type) -> list[str]:
    """The settings that are tables whose keys are not declared here."""
    return [key for key, entry in _fields(kind) if entry.default_factory is dict]


def _fields(kind: type, prefix: str = "") -> Iterator[tuple[str, dataclasses.Field[Any]]]:
    """(dotted key, field) of all settings."""
    for entry in dataclasses.fields(kind):
        section = entry.default_factory if isinstance(entry.default_factory, type) else None
        if section is not None and dataclasses.is_dataclass(section):
            yield from _fields(section, f"{prefix}{entry.name}.")
        else:
            yield prefix + entry.name, entry
