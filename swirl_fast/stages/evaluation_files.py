"""Where an evaluation lies, evaluations/NAME.json, NAME.db and NAME.yaml, and how an earlier one of the same name is set aside."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from swirl_fast.config import ConfigError
from swirl_fast.config.check import PLAIN, is_plain_name
from swirl_fast.data.store import Store
from swirl_fast.files import lock
from swirl_fast.outputs.run import COLLECTED

FILES = (
    "db",
    "db-wal",
    "db-shm",
    "db-journal",
    "db.lock",
    "json",
    "yaml",
)  # of the evaluation NAME: evaluations/NAME.db and so on


def check_evaluation_name(name: str) -> None:
    """Raises ConfigError for a name of an evaluation that is not a plain file name, or that of the collection."""
    if not is_plain_name(name):
        raise ConfigError(f"--name {name}: must be a plain file name: {PLAIN}")
    if name == COLLECTED:
        raise ConfigError(f"--name {name}: is what `show` and the report call the collection; give another one")


def make_room(folder: Path, name: str, wanted: Mapping[str, Any]) -> None:
    """Renames the files of an evaluation of other weights or settings to NAME-K, so that a longer training is evaluated again and
    nothing is lost; one that was renamed so before, and is the wanted one, becomes NAME again.

    wanted: the fingerprint of the evaluation that is about to begin.
    """
    path = folder / f"{name}.db"
    stored = _fingerprint(path)
    if path.is_file() and (stored is None or stored == _plain(wanted)):
        return
    if path.is_file():
        k = next(k for k in range(1, 10_000) if not (folder / f"{name}-{k}.db").exists())
        held = lock(path)  # so that no command is writing there
        try:
            _rename(folder, name, f"{name}-{k}")
        finally:
            os.close(held)
        print(f"evaluate: the evaluation {name} was of other weights or settings; it is kept as {name}-{k}")
    for earlier in sorted(folder.glob("*-*.db")):
        if re.fullmatch(re.escape(name) + r"-\d+", earlier.stem) and _fingerprint(earlier) == _plain(wanted):
            if _name_in(earlier.with_name(f"{earlier.stem}.json")) == name:  # and not the name that was asked for
                _rename(folder, earlier.stem, name)
                print(f"evaluate: {earlier.stem} was of these weights and settings; it is the evaluation {name} again")
                return


def _fingerprint(path: Path) -> Any:
    """None for a file that is not there, or that the writer will have something to say about."""
    try:
        with Store(path, writable=False) as store:
            return store.meta().get("evaluation")
    except ValueError:
        return None


def _name_in(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))["name"]
    except (OSError, ValueError, LookupError, TypeError):
        return None


def _plain(value: Any) -> Any:
    """As it comes back from JSON."""
    return json.loads(json.dumps(value))


def _rename(folder: Path, old: str, new: str) -> None:
    for ending in FILES:
        if (file := folder / f"{old}.{ending}").exists():
            file.rename(folder / f"{new}.{ending}")
