"""Layers of settings, as YAML trees of words -> values of the declared types -> one config object.

A text is the text as it was written; a number, a truth value or an accepted word is read by what the setting is, never by how it looks.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import operator
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar, get_args, get_origin

import yaml

from swirl_fast.config import references
from swirl_fast.config.error import ConfigError
from swirl_fast.config.fields import AsWritten, Setting, declared_types, sections, settings
from swirl_fast.config.hints import unknown_key
from swirl_fast.config.shipped import find, ready
from swirl_fast.config.yaml_text import Tree, Word, parse, plain, shown, unquoted
from swirl_fast.files import is_file

T = TypeVar("T")

_TRUE, _FALSE = ("true", "yes", "on", "y", "1"), ("false", "no", "off", "n", "0")


class Layer(NamedTuple):
    """source: where the tree was written, for messages. folder: of the file that it is written in; what it names is looked for there
    first."""

    tree: Tree
    source: str
    folder: Path | None = None


def read_file(path: str | Path, option: str = "") -> Layer:
    """Raises ConfigError for a file that is missing, not readable as YAML, or no table. option: put before the path in messages."""
    shown = f"{option} {path}".strip()
    if not is_file(path):
        raise ConfigError(f"{shown}: no such file; {ready('config')}")
    file = Path(path).expanduser()
    try:
        tree = parse(file.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"{shown}: not readable as YAML: {error}") from None
    if _is_nothing(tree):
        tree = {}
    if not isinstance(tree, dict):
        raise ConfigError(
            f"{shown}: must hold sections (run:, model:, …), not a {'list' if isinstance(tree, list) else 'word'}"
        )
    return Layer(tree, str(path), file.parent)


def read_override(kind: type, override: str) -> Layer:
    """`section.key=value`. A value of a text setting is the rest as it is; one of a list or a table is read as YAML."""
    key, separator, text = override.partition("=")
    key = key.strip()
    if not separator or not key:
        raise ConfigError(f"override {shown(override)}: write it as section.key=value, e.g. training.steps=20")
    entry = settings(kind).get(key) or _table_of(kind, key)
    one_word = entry is not None and get_origin(entry.kind) not in (list, dict)
    if one_word or (entry is not None and entry.key != key and get_args(entry.kind)[1] is str):
        return Layer({key: unquoted(text)}, "command line")
    try:
        return Layer({key: parse(text)}, "command line")
    except (ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"override {shown(override)}: the value is not readable as YAML: {error}") from None


def fill(kind: type[T], layers: Sequence[Layer]) -> T:
    """The defaults of a config class with the layers on top, the later ones over the earlier. Tables are merged key by key, but for `{}`,
    which empties one. Raises ConfigError for an unknown key and for a value of a wrong type."""
    values: dict[str, Any] = {}
    for tree, source, folder in layers:
        for entry, value in _values(kind, tree, source):
            value = _found(entry, value, folder)
            merge = entry.is_table and value
            values[entry.key] = _merged(values.get(entry.key, entry.default), value) if merge else value
    return _made(kind, values, "")


def keys_of(kind: type, layer: Layer) -> set[str]:
    """The settings that a layer sets. Raises ConfigError as `fill` does."""
    return {entry.key for entry, _ in _values(kind, layer.tree, layer.source)}


def _made(kind: type[T], values: dict[str, Any], prefix: str) -> T:
    owner: type = kind
    declared = declared_types(owner)
    arguments = {}
    for entry in dataclasses.fields(kind):  # type: ignore[arg-type]
        key = prefix + entry.name
        if dataclasses.is_dataclass(declared[entry.name]):
            arguments[entry.name] = _made(declared[entry.name], values, f"{key}.")
        elif key in values:
            arguments[entry.name] = values[key]
    return kind(**arguments)


def _found(entry: Setting, value: Any, folder: Path | None) -> Any:
    """A value with the whole path of what it names beside the file that it is written in."""
    if isinstance(value, list) and entry.reads == "tasks":
        return [_entry(entry, one, f"{entry.key}[{i}]", folder) for i, one in enumerate(value)]
    if isinstance(value, list):
        return [_found(entry, one, folder) for one in value]
    if not isinstance(value, str) or not value:
        return value
    if entry.reads == "reference":
        alike = [name for name in entry.known if name.lower() == value.strip().lower()]
        return alike[0] if alike else references.absolute(value.strip(), folder)
    if entry.reads == "place":
        return os.path.expanduser(value)
    if entry.reads not in ("file", "template"):
        return value
    if folder is not None and os.path.exists(path := folder / value):
        here = os.path.exists(value) and os.path.samefile(path, value)
        return value if here else os.path.abspath(path)
    return str(find("template", value)) if entry.reads == "template" else value


def _entry(entry: Setting, tree: Tree, key: str, folder: Path | None) -> dict[str, Any]:
    """A table with keys of the section that has the list itself. Raises ConfigError naming its place in the list."""
    if not isinstance(tree, dict):
        raise ConfigError(f"{key}={shown(tree)}: must be a table, such as {{kind: gsm8k, path: FILE}}")
    if entry.field in tree:
        raise ConfigError(f"{key}.{entry.field}: a task of a mixture cannot be a mixture")
    try:
        filled: Any = fill(entry.owner, [Layer(tree, key, folder)])
        check_each(filled)
    except ConfigError as error:
        raise ConfigError(f"{key}.{error}") from None
    return {name: getattr(filled, name) for name in dict.fromkeys(str(key).partition(".")[0] for key in tree)}


def _merged(base: Any, more: Any) -> Any:
    if not isinstance(base, dict) or not isinstance(more, dict):
        return more
    return {**base, **{key: _merged(base.get(key), value) for key, value in more.items()}}


def _values(kind: type, tree: Tree, source: str, prefix: str = "") -> Iterator[tuple[Setting, Any]]:
    """What a layer sets. Keys may be nested or dotted; an empty section sets nothing."""
    for name, node in tree.items():
        key = prefix + str(name)
        if key in sections(kind):
            if _is_nothing(node):
                continue
            if not isinstance(node, dict):
                known = ", ".join(f"{key}.{entry.name}" for entry in dataclasses.fields(sections(kind)[key])[:3])
                raise ConfigError(
                    f"{key}={shown(node)}: must be a table, for it is a section with keys ({known}, …){_place(source)}"
                )
            yield from _values(kind, node, source, f"{key}.")
        elif key in settings(kind):
            entry = settings(kind)[key]
            if not (entry.is_table and _is_nothing(node)):
                yield entry, _value(entry, node, source)
        elif (table := _table_of(kind, key)) is not None:
            for part in reversed(key.removeprefix(f"{table.key}.").split(".")):
                node = {part: node}
            yield table, _value(table, node, source)
        else:
            raise unknown_key(kind, key, node, source)


def _table_of(kind: type, key: str) -> Setting | None:
    """The table of free keys that a dotted key lies in."""
    return next(
        (entry for entry in settings(kind).values() if entry.is_table and key.startswith(f"{entry.key}.")), None
    )


def _value(entry: Setting, node: Tree, source: str) -> Any:
    if isinstance(node, Word) and not node.quoted and node in ("", "null"):
        if entry.optional:
            return None
        # where an empty text means "none", null means it too
        if entry.default == "" or "" in entry.words:
            return ""
    if entry.reads == "reference" and get_origin(entry.kind) is list and isinstance(node, Word):
        node = [node]
    try:
        return _converted(entry.plain_kind, node)
    except UnicodeError:
        remedy = "holds a character that no file can hold, NUL or half of a surrogate pair"
    except OverflowError:
        remedy = f"is too large; must be {_article(entry.accepted)}, and below 2**63"
    except ValueError:
        remedy = f"must be {_article(entry.accepted)}"
    raise ConfigError(f"{entry.key}={shown(node)}: {remedy}{_place(source)}")


def _converted(kind: Any, node: Tree) -> Any:
    """Raises ValueError for a value of another type."""
    origin, arguments = get_origin(kind), get_args(kind)
    if kind is AsWritten:
        return node
    if kind is Any:
        return _checked_texts(plain(node))
    if origin is dict:
        if _is_nothing(node):
            return {}
        if not isinstance(node, dict):
            raise ValueError
        return {_text(name): _converted(arguments[1], value) for name, value in node.items()}
    if origin is list:
        if not isinstance(node, list):
            raise ValueError
        return [_converted(arguments[0], value) for value in node]
    if not isinstance(node, Word):
        raise ValueError
    if origin is Literal:
        return _one_of(arguments, node)
    return {str: _text, bool: truth, int: _whole, float: _number}[kind](node)


def _text(word: str) -> str:
    """Raises UnicodeError for text that no file name or no UTF-8 file can hold."""
    if "\0" in word:
        raise UnicodeError
    return word.encode("utf-8").decode("utf-8")


def _checked_texts(value: Any) -> Any:
    if isinstance(value, str):
        return _text(value)
    for entry in [*value, *value.values()] if isinstance(value, dict) else value if isinstance(value, list) else ():
        _checked_texts(entry)
    return value


def truth(word: Word) -> bool:
    if word.strip().lower() not in _TRUE + _FALSE:
        raise ValueError
    return word.strip().lower() in _TRUE


def _whole(word: Word) -> int:
    """`010` is ten; `0x10`, `0o10`, `0b10` and `1_000` as in Python. Raises OverflowError for one that takes more than 64 bits."""
    try:
        number = int(word)
    except ValueError:
        number = int(word, 0)
    if abs(number) >= 2**63:
        raise OverflowError
    return number


def _number(word: Word) -> float:
    text = word.strip()
    if re.fullmatch(r"[-+]?\.(inf|nan)", text, re.IGNORECASE):
        text = text.replace(".", "")
    try:
        return float(text)
    except ValueError:
        return float(int(text, 0))


def _one_of(words: Sequence[Any], word: Word) -> Any:
    """In the case of the accepted word, whatever the case that it was written in."""
    exact = [accepted for accepted in words if str(accepted) == word]
    alike = exact or [accepted for accepted in words if str(accepted).lower() == word.strip().lower()]
    if len(alike) != 1:
        raise ValueError
    return alike[0]


def check_each(config: Any) -> None:
    """The accepted words and the range of every setting. Raises ConfigError."""
    kind: type = type(config)
    for key, entry in settings(kind).items():
        value = operator.attrgetter(key)(config)
        if entry.words and value not in entry.words:
            raise ConfigError(f"{key}={value}: must be {entry.accepted}")
        if entry.reads == "reference":
            for name in value if isinstance(value, list) else [value]:
                if name and name not in entry.known and not references.is_reference(name):
                    accepted = entry.accepted.removeprefix("list of names, each ")
                    raise ConfigError(f"{key}={name}: must be {accepted}{_meant(name, entry.known)}")
        if not entry.range.accepts(value):
            limits = entry.accepted if isinstance(value, list) or entry.optional else str(entry.range)
            if isinstance(value, float) and not math.isfinite(value):
                limits = f"{limits}, and a {'' if entry.range.endless else 'finite '}number"
            raise ConfigError(f"{key}={value}: must be {_article(limits)}")


def _meant(name: str, known: Sequence[str]) -> str:
    """The end of a message about a name that is neither known nor a reference."""
    if name.endswith(".py"):
        return f"; write {name}:NAME, with the name of what is in that file"
    close = difflib.get_close_matches(name, known, 1)
    return f"; did you mean {close[0]}?" if close else ""


def _article(accepted: str) -> str:
    return f"a {accepted}" if accepted.startswith(("whole", "number", "list", "table")) else accepted


def _place(source: str) -> str:
    return "" if source == "command line" else f" (in {source})"


def _is_nothing(node: Tree) -> bool:
    return isinstance(node, Word) and not node.quoted and node in ("", "null", "~")
