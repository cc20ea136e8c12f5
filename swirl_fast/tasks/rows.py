"""Rows of a data file or of a Hugging Face data set, and what is held out of them."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from swirl_fast.config import ConfigError
from swirl_fast.config.check import looks_like_file
from swirl_fast.files import UNPACKING_ERRORS, is_file, is_folder, unpacker
from swirl_fast.tasks.task import Split
from swirl_fast.tools.characters import whole_values

_FOREIGN = {
    b"(\xb5/\xfd": "packed with zstd",
    b"PK\x03\x04": "a zip archive or a spreadsheet",
    b"\xd0\xcf\x11\xe0": "an old spreadsheet",
    b"ARROW1": "an Arrow file",
    b"SQLite format 3": "a database",
}
Key = TypeVar("Key", str, bytes)
HELD_OUT = 0.1  # share of the rows, from the end, that is held out when there is no eval_path


class Row(NamedTuple):
    """where: the place as an error names it, `file:line` or `file, row 3`. fields: the row as it was read. head: the place of the names of
    its fields, where they stand once for all rows."""

    where: str
    fields: dict[str, Any]
    head: str = ""

    def text(self, field: str) -> str:
        """A field that must be text, and not blank. Raises ValueError naming file, line and field."""
        value = self.fields.get(field)
        if not isinstance(value, str) or not value.strip():
            raise self.error(field, "must be text" if field in self.fields else "is missing")
        return value.strip()

    def texts(self, field: str) -> list[str]:
        """A field that must be a list of texts, [] where it is missing; blank ones are dropped. Raises as `text` does."""
        value = self.fields.get(field, [])
        if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
            raise self.error(field, "must be a list of texts")
        return [one.strip() for one in value if one.strip()]

    def error(self, field: str, remedy: str) -> ValueError:
        shown = repr(self.fields.get(field))
        shown = f" = {shown[:80]}{'…' if len(shown) > 80 else ''}" if field in self.fields else ""
        return ValueError(f"{self.where}: field '{field}'{shown}: {remedy}")


def read_splits(path: str | None, eval_path: str | None, hub: tuple[str, str]) -> dict[Split, list[Row]]:
    """All rows of both splits, in the order of their files.

    Without eval_path the last tenth of `path`, at least one row, is held out. hub: the configuration and the name of
    the evaluation split of a Hugging Face data set (its training split is called `train` everywhere); a name given as
    `NAME:CONFIGURATION` has its own. Raises ConfigError for missing or unreadable sources, ValueError for malformed
    ones.
    """
    if not path:
        raise ConfigError("tasks.path: give a data file in the official format, or a Hugging Face data set's name")
    configuration, eval_split = hub
    rows = _read("tasks.path", path, configuration, "train")
    if eval_path:
        return {"train": rows, "eval": _read("tasks.eval_path", eval_path, configuration, eval_split)}
    held_out = max(1, round(len(rows) * HELD_OUT))
    if len(rows) <= held_out:
        raise ConfigError(f"tasks.path={path}: {len(rows)} rows cannot be split; give at least 2, or tasks.eval_path")
    return {"train": rows[:-held_out], "eval": rows[-held_out:]}


def held_out_groups(sizes: Mapping[Key, int], share: float) -> set[Key]:
    """Of groups that are not divided, those with the smallest keys, until they have about the share of all: a group that would make it more
    than half as much again is passed over. The smallest group where none is small enough.

    sizes: by keys that are hashes, so that the choice is the same in every order, and a later group moves few.
    """
    wanted = max(1, round(share * sum(sizes.values())))
    found: set[Key] = set()
    held = 0
    for key in sorted(sizes):
        if held < wanted and held + sizes[key] <= 1.5 * wanted:
            found.add(key)
            held += sizes[key]
    return found or {min(sizes, key=lambda key: (sizes[key], key))}


def gold_answers(value: object) -> tuple[str, ...] | None:
    """Of a text, a number, or a list of those, each once; None for anything else, and for a blank text or no entry."""
    found = [_gold_answer(one) for one in (value if isinstance(value, list) else [value])]
    return tuple(dict.fromkeys(one for one in found if one)) if found and all(found) else None


def _gold_answer(value: object) -> str | None:
    if isinstance(value, str):
        return value.strip() or None
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        return json.dumps(value)
    return None


def question_id(task: str, text: str) -> str:
    """An id that depends on nothing but the question: the same in every order, subset and split of its file, composed or decomposed."""
    text = unicodedata.normalize("NFC", text)
    return f"{task}-{hashlib.sha256(text.encode('utf-8', 'surrogatepass')).hexdigest()[:16]}"


def side_of(text: str) -> Split:
    """The one split that may have a generated question: the last bit of its hash."""
    return "eval" if hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[-1] & 1 else "train"


_ENDINGS = (".gz", ".bz2", ".xz", ".json", ".jsonl", ".jsonlines", ".ndjson", ".csv", ".tsv", ".parquet", ".txt")


def plain_name(path: str, otherwise: str) -> str:
    """What a task is called by its file: `data/My units.jsonl.gz` -> `My_units`. otherwise: where nothing is left."""
    name = Path(path).name
    while Path(name).suffix.lower() in _ENDINGS:
        name = Path(name).stem
    return re.sub(r"[^A-Za-z0-9._-]+", "_", name) or otherwise


def _read(key: str, path: str, configuration: str, split: str) -> list[Row]:
    file = Path(path).expanduser()
    if is_folder(file) and looks_like_file(path):
        raise ConfigError(f"{key}={path}: is a folder; name a data file in it")
    if is_file(file):
        rows = read_file(file)
    elif looks_like_file(path):
        raise ConfigError(f"{key}={path}: no such file")
    else:
        rows = _read_hub(key, path, configuration, split)
    if not rows:
        raise ConfigError(f"{key}={path}: has no rows")
    return rows


def read_file(file: Path) -> list[Row]:
    """By the ending: .csv, .tsv, .parquet; else one JSON list of objects, one object that holds it as `data`, or one object a line. Any of
    them may be packed: .gz, .bz2, .xz."""
    content = _unpacked(file)
    ending = Path(re.sub(r"\.(gz|bz2|xz)$", "", file.name.lower())).suffix
    if ending == ".parquet":
        return _parquet_rows(file, content)
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: not UTF-8 at byte {error.start}") from None
    if ending in (".csv", ".tsv"):
        return list(_table_rows(file, text, "\t" if ending == ".tsv" else _delimiter(text)))
    rows = _json_rows(file, text)
    for row in rows:
        if not isinstance(row.fields, dict):
            raise ValueError(f"{row.where}: must be a JSON object, not {type(row.fields).__name__}")
    return rows


def _unpacked(file: Path) -> bytes:
    opened = unpacker(file)
    try:
        with opened(file) if opened else file.open("rb") as stream:
            content = stream.read()
    except UNPACKING_ERRORS as error:
        raise ValueError(f"{file}: not readable as {'gzip, bzip2 or xz' if opened else 'a file'}: {error}") from None
    for begin, name in _FOREIGN.items():
        if content.startswith(begin):
            raise ValueError(
                f"{file}: is {name}, which is not read: unpack it, or save it as CSV, JSON Lines or Parquet"
            )
    return content


def _delimiter(text: str) -> str:
    """The comma, unless the first line has none and a semicolon or tabs instead, as spreadsheets write them in much of Europe."""
    head = text.lstrip().partition("\n")[0]
    return next((mark for mark in ",;\t" if mark in head), ",")


def _table_rows(file: Path, text: str, delimiter: str) -> Iterator[Row]:
    """Every value is text; nothing is guessed to be a number."""
    csv.field_size_limit(2**31 - 1)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    header: list[str] = []
    head = ""
    try:
        for values in reader:
            if not any(value.strip() for value in values):
                continue
            if not header:
                header, head = [value.strip() for value in values], f"{file}:{reader.line_num}"
                if twice := [name for name, count in Counter(header).items() if count > 1]:
                    raise ValueError(f"{head}: two columns are called {twice[0]!r}")
                continue
            if len(values) != len(header):
                raise ValueError(
                    f"{file}:{reader.line_num}: has {len(values)} values, and there are {len(header)} columns: {', '.join(header)}"
                )
            yield Row(f"{file}:{reader.line_num}", dict(zip(header, values, strict=True)), head)
    except csv.Error as error:
        raise ValueError(f"{file}:{reader.line_num}: {error}") from None


def _parquet_rows(file: Path, content: bytes) -> list[Row]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ModuleNotFoundError:
        raise ConfigError(f"{file}: to read Parquet, run: pip install pyarrow") from None
    try:
        rows = parquet.read_table(io.BytesIO(content)).to_pylist()
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise ValueError(f"{file}: not readable as Parquet: {error}") from None
    return [Row(f"{file}, row {i} of {len(rows)}", fields) for i, fields in enumerate(rows, 1)]


def _json_rows(file: Path, text: str) -> list[Row]:
    items = _listed(file, text)
    if items is not None:
        return [Row(f"{file}, row {i} of {len(items)}", item) for i, item in enumerate(items, 1)]
    rows = []
    for i, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            rows.append(Row(f"{file}:{i}", _parsed(line)))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{file}:{i}: not a JSON object: {error}") from None
    return rows


def _parsed(text: str) -> Any:
    """JSON can write half a character, `\\ud83d`, as UTF-8 cannot: each becomes U+FFFD."""
    value = json.loads(text)
    return whole_values(value) if re.search(r"\\u[dD]", text) else value


def _listed(file: Path, text: str) -> list[Any] | None:
    """The rows of a file that is one JSON value; None where they stand one a line."""
    try:
        whole = _parsed(text)
    except (ValueError, RecursionError) as error:  # ValueError also for a number of more than 4,300 digits
        if text.lstrip().startswith("["):
            line = f":{error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
            raise ValueError(f"{file}{line}: not valid JSON: {error}") from None
        return None
    if (
        isinstance(whole, dict)
        and "data" not in whole
        and whole
        and all(isinstance(value, list) for value in whole.values())
    ):
        raise ConfigError(
            f"{file}: its lists are called {', '.join(whole)}; give the rows as a list, as `data`, or one a line"
        )
    if isinstance(whole, dict):
        whole = whole.get("data")
    return whole if isinstance(whole, list) else None


def _read_hub(key: str, path: str, configuration: str, split: str) -> list[Row]:
    try:
        import datasets
    except ModuleNotFoundError:
        raise ConfigError(
            f"{key}={path}: no such file; to load it as a Hugging Face data set, run: pip install datasets"
        ) from None
    name, _, own = path.partition(":")
    try:
        loaded = datasets.load_dataset(name, own or configuration, split=split)
    except Exception as error:  # the library raises a dozen unrelated kinds: network, hub, file and value errors
        raise ConfigError(
            f"{key}={path}: no such file, and not loadable as a Hugging Face data set: {error}"
        ) from error
    return [Row(f"{path} ({split}), row {i}", dict(fields)) for i, fields in enumerate(loaded, 1)]
