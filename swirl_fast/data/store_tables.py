"""The tables of trajectories.db, whether a file holds these and nothing else, and whether a row is as it was written.

SQLite keeps statements in its files (triggers, views, generated columns), which run when somebody else's file is opened and used, and it
reads a flipped bit as it finds it. Hence the comparison with the schema below, text by text, and a hash in every row. The hash finds
accidents; whoever writes a row on purpose can make one that fits, so what comes out of a row is checked as well.
"""

from __future__ import annotations

import json
import re
import sqlite3
from collections.abc import Sequence
from functools import cache
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from swirl_fast.formats.format import Call

SCHEMA = 3
APPLICATION_ID = 0x5357524C  # "SWRL" in the header of the file: tells our databases from others
REMEDY = "copy the file again from where it is whole, or use another run.name"

# Files are compared with this text, comments included: whoever changes it raises SCHEMA.
TABLES = (
    "CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL, hash BLOB NOT NULL) WITHOUT ROWID",
    """CREATE TABLE questions (
        position INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, task TEXT NOT NULL, text TEXT NOT NULL,
        answers TEXT NOT NULL, -- JSON list
        hash BLOB NOT NULL
    )""",
    """CREATE TABLE trajectories (
        number INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, question_id TEXT NOT NULL REFERENCES questions(id),
        seed TEXT NOT NULL, -- decimal: Python integers may exceed 64 bits
        prompt BLOB NOT NULL, -- little-endian int32
        finish TEXT,
        hash BLOB NOT NULL -- of a finished one with that of its last step
    )""",
    """CREATE TABLE steps (
        trajectory INTEGER NOT NULL REFERENCES trajectories(number), i INTEGER NOT NULL,
        start INTEGER NOT NULL, stop INTEGER NOT NULL, text TEXT NOT NULL,
        kind TEXT NOT NULL, tool TEXT, argument TEXT NOT NULL, error TEXT NOT NULL,
        further TEXT NOT NULL, -- JSON list of [tool, argument]: the other calls of the turn
        observation TEXT, policy_version INTEGER NOT NULL,
        tokens BLOB NOT NULL, -- little-endian int32: everything after the step before
        logprobs BLOB NOT NULL, -- little-endian float32
        hash BLOB NOT NULL, -- with that of the step before
        PRIMARY KEY (trajectory, i)
    )""",
    """CREATE TABLE verdicts (
        judge_id TEXT NOT NULL, content_hash TEXT NOT NULL, verdict TEXT NOT NULL, reason TEXT NOT NULL,
        reward REAL, -- in [0, 1]; NULL where the verdict is UNKNOWN
        hash BLOB NOT NULL,
        PRIMARY KEY (judge_id, content_hash)
    ) WITHOUT ROWID""",
)
_TYPES: dict[str, type] = {"INTEGER": int, "TEXT": str, "BLOB": bytes, "REAL": float}
_NAMES = {int: "an integer", str: "text in UTF-8", bytes: "bytes", float: "a number", type(None): "NULL"}


_Columns = list[tuple[str, tuple[type, ...]]]


@cache
def _wanted() -> tuple[dict[tuple[Any, ...], str], dict[str, _Columns]]:
    """(type, name, table) -> SQL of all that belongs into a file; table -> its columns with the types of their values."""
    db = sqlite3.connect(":memory:")
    try:
        for table in TABLES:
            db.execute(table)
        entries = _entries(db)
        columns: dict[str, _Columns] = {
            name: [
                (column, (_TYPES[kind],) if not_null or key else (_TYPES[kind], type(None)))
                for _, column, kind, not_null, _, key in db.execute(f"PRAGMA table_info({name})")
            ]
            for kind, name, _ in entries
            if kind == "table"
        }
    finally:
        db.close()
    return entries, columns


def _entries(db: sqlite3.Connection) -> dict[tuple[Any, ...], str]:
    rows = db.execute("SELECT type, name, tbl_name, sql FROM sqlite_master ORDER BY type DESC, name")
    return {(kind, name, table): sql for kind, name, table, sql in rows}


def check_schema(db: sqlite3.Connection, path: Path) -> None:
    """Raises ValueError, naming it, for anything in the file that TABLES does not make, or makes otherwise."""
    wanted, found = _wanted()[0], _entries(db)
    for entry in (*found, *wanted):
        if found.get(entry, "") == wanted.get(entry, ""):
            continue
        kind, name, _ = entry
        if entry not in found:
            problem = f"the {kind} {name} is missing"
        elif entry in wanted:
            problem = f"the {kind} {name} is not declared as swirl-fast declares it"
        else:
            problem = (
                f"it holds the {kind} {name}, which swirl-fast does not make and which could run statements of its own"
            )
        raise ValueError(f"{path}: {problem}. Nothing was read from it: {REMEDY}")


def text_of(data: bytes) -> str | bytes:
    """A text of the file; bytes that are no UTF-8 stay bytes, for `checked` to refuse."""
    try:
        return data.decode("utf-8", "surrogatepass")
    except UnicodeDecodeError:
        return data


def utf8(text: str) -> bytes:
    """For CAST(? AS TEXT): SQLite's own binding of a str refuses the lone surrogates that JSON answers may contain."""
    return text.encode("utf-8", "surrogatepass")


def int32_bytes(tokens: NDArray[np.int32]) -> bytes:
    return tokens.astype("<i4", copy=False).tobytes()


def natural(id_: str) -> tuple[list[str | int], str]:
    """For sorting: 2 before 10."""
    parts: list[str | int] = list(re.split(r"([0-9]+)", id_))
    parts[1::2] = [int(digits) for digits in parts[1::2]]
    return parts, id_


def columns(table: str, prefix: str = "") -> str:
    """The columns of a table in the order in which they were declared, for SELECT."""
    return ", ".join(prefix + name for name, _ in _wanted()[1][table])


def row_hash(*values: Any) -> bytes:
    """8 bytes over values of any types of SQLite, each with its type and length: 3 µs a row and a second a GB."""
    digest = blake2b(digest_size=8)
    for value in values:
        if isinstance(value, str):
            value = value.encode("utf-8", "surrogatepass")
        elif not isinstance(value, bytes):
            value = repr(value).encode()
        digest.update(b"%d:" % len(value))
        digest.update(value)
    return digest.digest()


def end_hash(steps: int, last: bytes) -> bytes:
    """What the hash of a finished trajectory covers of its steps. last: the hash of the last one."""
    return b"%d " % steps + last


def check_types(path: Path, table: str, row: Sequence[Any]) -> None:
    """row: all columns in order. Raises ValueError, with file, table, row and column, for a value of a type that is not the column's."""
    for (column, types), value in zip(_wanted()[1][table], row, strict=True):
        if type(value) not in types:
            wanted = " or ".join(_NAMES[kind] for kind in types)
            raise damaged(path, table, row, f"{column} is {_NAMES[type(value)]} and should be {wanted}")


def check_row(path: Path, table: str, row: Sequence[Any], more: bytes = b"") -> None:
    """As `check_types`, and for a row whose last column is not the hash of the others, and of `more`."""
    check_types(path, table, row)
    if row_hash(*row[:-1], more) != row[-1]:
        raise damaged(path, table, row, "its contents do not match their hash")


def damaged(path: Path, table: str, row: Sequence[Any], problem: object) -> ValueError:
    """The error about a row, which is named by its first two columns."""
    names = [name for name, _ in _wanted()[1][table]][:2]
    where = ", ".join(f"{name} {_short(value)}" for name, value in zip(names, row, strict=False))
    return ValueError(f"{path}, table {table}, {where}: {problem}; the file was damaged or changed: {REMEDY}")


def _short(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 80 else f"{shown[:79]}…"


def json_of(path: Path, table: str, row: Sequence[Any], text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise damaged(path, table, row, f"no JSON ({error})") from error


def further_text(calls: Sequence[Call]) -> str:
    """The column `further` of a step: all calls of a turn but the first."""
    return json.dumps([[call.tool, call.argument] for call in calls])


def further_calls(path: Path, row: Sequence[Any], text: str) -> tuple[Call, ...]:
    """What `further_text` has written. Raises ValueError for anything else. row: of the table steps."""
    found = json_of(path, "steps", row, text)
    if not isinstance(found, list) or not all(
        isinstance(one, list) and len(one) == 2 and all(isinstance(word, str) for word in one) for one in found
    ):
        raise damaged(path, "steps", row, "further is no list of calls")
    return tuple(Call(tool, argument) for tool, argument in found)
