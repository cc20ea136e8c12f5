"""Files of logged conversations, read a row at a time: JSON Lines or a JSON list, also packed (.gz, .bz2, .xz), and Parquet."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, cast

from swirl_fast.config import ConfigError
from swirl_fast.files import UNPACKING_ERRORS, unpacker
from swirl_fast.tasks.messages import BrokenRow, Conversation, read_conversation


def read_log(file: Path) -> Iterator[Conversation | BrokenRow]:
    """One for each row that is not blank, in order: the conversation, or what is wrong with it. What is read is held a row at a time, but
    for a JSON list, which is one value.

    Raises ValueError, naming the file, where it is not readable at all.
    """
    for where, row in _rows(file):
        if isinstance(row, BrokenRow):
            yield row
            continue
        try:
            yield read_conversation(where, row)
        except BrokenRow as error:
            yield error


def _rows(file: Path) -> Iterator[tuple[str, Any]]:
    """(place, row as JSON gives it, or a BrokenRow)."""
    if re.search(r"\.parquet(\.(gz|bz2|xz))?$", file.name.lower()):
        yield from _parquet_rows(file)
        return
    try:
        with _opened(file) as lines:
            first = next((line for line in lines if line.removeprefix(b"\xef\xbb\xbf").strip()), b"")
        whole = _whole(file, first)
        if whole is not None:
            yield from ((f"{file}, row {i} of {len(whole)}", row) for i, row in enumerate(whole, 1))
            return
        with _opened(file) as lines:
            for i, line in enumerate(lines, 1):
                if line.removeprefix(b"\xef\xbb\xbf").strip():
                    yield f"{file}:{i}", _parsed(f"{file}:{i}", line)
    except UNPACKING_ERRORS as error:
        kind = "gzip, bzip2 or xz" if file.is_file() and unpacker(file) else "a file"
        raise ValueError(f"{file}: not readable as {kind}: {error}; unpack it, or write it again") from None


def _opened(file: Path) -> IO[bytes]:
    return cast(IO[bytes], (unpacker(file) or open)(file, "rb"))


def _parsed(where: str, line: bytes) -> Any:
    """A BrokenRow where it is no JSON."""
    try:
        return json.loads(line.decode("utf-8-sig"), parse_constant=_no_constant)
    except UnicodeDecodeError as error:
        return BrokenRow(f"{where}: not UTF-8 at byte {error.start} of the line")
    except RecursionError:
        return BrokenRow(f"{where}: is nested too deeply")
    except ValueError as error:
        return BrokenRow(f"{where}: is not valid JSON: {error}; write one conversation a line")


def _whole(file: Path, first: bytes) -> list[Any] | None:
    """The rows of a file that is one JSON value; None where they stand one a line. first: the first line that is not blank."""
    head = _parsed("", first)
    if isinstance(head, dict) and not isinstance(head.get("data"), list):
        return None
    if isinstance(head, list) and any(isinstance(one, dict) and ("role" in one or "from" in one) for one in head):
        return None  # a bare list of messages
    if first.lstrip(b"\xef\xbb\xbf \t\r\n")[:1] not in (b"[", b"{"):
        return None
    with _opened(file) as lines:
        found = _parsed("", lines.read())
    if isinstance(found, dict):
        found = found["data"] if isinstance(found.get("data"), list) else [found]
    return found if isinstance(found, list) else None


def _parquet_rows(file: Path) -> Iterator[tuple[str, Any]]:
    if unpacker(file):
        raise ConfigError(f"{file}: Parquet is compressed inside; unpack the file")
    try:
        import pyarrow
        from pyarrow import parquet
    except ModuleNotFoundError:
        raise ConfigError(f"{file}: to read Parquet, run: pip install pyarrow") from None
    try:
        source = parquet.ParquetFile(file)
        count, total = 0, source.metadata.num_rows
        for batch in source.iter_batches(batch_size=256):
            for row in batch.to_pylist():
                count += 1
                yield f"{file}, row {count} of {total}", _without_nulls(row)
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{file}: not readable as Parquet: {error}") from None


def _without_nulls(value: Any) -> Any:
    """A column of Parquet has the keys of all rows: those that a row does not have are null."""
    if isinstance(value, dict):
        return {key: _without_nulls(one) for key, one in value.items() if one is not None}
    return [_without_nulls(one) for one in value] if isinstance(value, list) else value


def _no_constant(word: str) -> Any:
    raise ValueError(f"{word} is not a number in JSON")
