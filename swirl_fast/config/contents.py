"""What settings stand for: for fingerprints the hash of a file or of a user's code, in place of where it lies; for a saved config the
whole path of a file."""

from __future__ import annotations

import dataclasses
import functools
import operator
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from swirl_fast.config import references
from swirl_fast.config.fields import Setting, settings
from swirl_fast.files import UNPACKING_ERRORS, content_hash, hash_tree, is_file, is_folder, unpacker

DATA = (
    ".parquet",
    ".arrow",
    ".json",
    ".jsonl",
    ".csv",
    ".tsv",
    ".txt",
    ".gz",
    ".zst",
)  # of a folder that datasets loads
TEXTS = ("tasks.instructions", "tasks.worked_examples", "search.corpus", "judge.model.rubric")


def contents(section: Any, prefix: str) -> dict[str, Any]:
    """A section as a JSON-able table. Raises ConfigError for a reference that names nothing."""
    kind: type = type(section)
    known = settings(kind)
    table = {}
    for entry in dataclasses.fields(section):
        value, key = getattr(section, entry.name), f"{prefix}.{entry.name}"
        table[entry.name] = (
            contents(value, key) if dataclasses.is_dataclass(value) else _content(known[entry.name], value, key)
        )
    return table


def identified(config: Any) -> dict[str, Any]:
    """A whole config as a table, with the identity of a user's own code, and of the texts that steer a model or a judge, in place of their
    paths. Raises ConfigError as `contents` does."""

    def change(entry: Setting, value: Any) -> Any:
        known = entry.reads in ("reference", "tasks") or entry.key in TEXTS
        return _content(entry, value, entry.key) if known else value

    return _changed(config, change)


def located(config: Any) -> dict[str, Any]:
    """A whole config as a table, with the whole paths of the files and folders that it names, where they are there."""
    return _changed(config, _located)


def _changed(config: Any, change: Callable[[Setting, Any], Any]) -> dict[str, Any]:
    """A config as a table, with what `change` makes of each setting and its value."""
    kind: type = type(config)
    table = dataclasses.asdict(config)
    for key, entry in settings(kind).items():
        *parents, name = key.split(".")
        section = functools.reduce(operator.getitem, parents, table)
        section[name] = change(entry, section[name])
    return table


def _located(entry: Setting, value: Any) -> Any:
    if entry.reads == "tasks":
        known = settings(entry.owner)
        return [{name: _located(known[name], one) for name, one in table.items()} for table in value]
    is_path = entry.reads in ("file", "template") and value and value != entry.default
    return os.path.abspath(value) if is_path and os.path.exists(value) else value


def _content(entry: Setting, value: Any, key: str) -> Any:
    if entry.reads == "tasks":
        tables = []
        for i, table in enumerate(value):
            whole = contents(entry.owner(**table), f"{key}[{i}]")
            tables.append({name: whole[name] for name in table})
        return tables
    if entry.reads == "reference":
        names = [references.identity(key, one, entry.known) for one in (value if isinstance(value, list) else [value])]
        return names if isinstance(value, list) else names[0]
    if entry.reads not in ("file", "template") or not value:
        return value
    place = Path(value).expanduser()
    if is_file(place):
        return f"xxh64 {_unpacked_hash(place) or content_hash(place)}"
    if key == "search.corpus" and is_folder(place):
        return hash_tree(place, (".txt", ".md"))
    folder, _, configuration = value.partition(":")  # as tasks/rows.py reads the name of a data set
    if key.endswith(("path", "eval_path")) and key.startswith("tasks") and is_folder(folder):
        return f"{hash_tree(Path(folder).expanduser(), DATA)}:{configuration}"
    return value


def _unpacked_hash(file: Path) -> str | None:
    """Of a packed file: the hash of what it was before. None for any other file."""
    import xxhash  # as in files.py

    opened = unpacker(file)
    if opened is None:
        return None
    state = xxhash.xxh64()
    try:
        with opened(file) as stream:
            while block := stream.read(1 << 22):
                state.update(block)
    except UNPACKING_ERRORS:  # whoever reads it says so
        return None
    return state.hexdigest()
