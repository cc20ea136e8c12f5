"""YAML whose scalars stay the text that was written, so that the type of a setting, not the look of its value, decides what it is.

YAML 1.1 by itself reads `1e3` as text, `3.10` as 3.1, `12:30` as 750, `010` as 8 and `no` as false. Here a scalar is a `Word`, the text
and whether it was quoted; config/read.py turns it into what the setting is. Nothing is interpolated: `${x}` and `???` are text.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from typing import Any

import yaml

# Word | list[Tree] | dict[str, Tree]
Tree = Any
# Far above any config; aliases of aliases reach it in a few lines.
MAX_NODES = 100_000


class Word(str):
    """A scalar as it was written, without its quotes."""

    quoted: bool

    def __new__(cls, text: str, quoted: bool = False) -> Word:
        word = super().__new__(cls, text)
        word.quoted = quoted
        return word


class _Loader(yaml.SafeLoader):
    """Knows scalars, lists, tables, anchors and `<<`; any other tag is an error. Not libyaml's: a few thousand brackets overflow its stack,
    which ends the process."""

    yaml_constructors: dict[Any, Any] = {}

    def construct_word(self, node: yaml.ScalarNode) -> Word:
        tagged = node.tag != self.resolve(yaml.ScalarNode, node.value, (True, False))
        return Word(node.value, bool(node.style) or tagged)

    def construct_table(self, node: yaml.MappingNode) -> Any:
        written = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.value != "<<"]
        if twice := {key for key in written if written.count(key) > 1}:
            raise yaml.constructor.ConstructorError(
                None, None, f"the key {min(twice)!r} is there twice", node.start_mark
            )
        table: dict[Word, Any] = {}
        yield table
        self.flatten_mapping(node)
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, "a key must be a word", key.start_mark)
            table[self.construct_word(key)] = self.construct_object(value, deep=True)


for _tag in ("str", "int", "float", "bool", "null", "timestamp", "value", "merge"):
    _Loader.add_constructor(f"tag:yaml.org,2002:{_tag}", _Loader.construct_word)
_Loader.add_constructor("tag:yaml.org,2002:seq", yaml.SafeLoader.construct_yaml_seq)
_Loader.add_constructor("tag:yaml.org,2002:map", _Loader.construct_table)
_Loader.add_constructor(None, yaml.SafeLoader.construct_undefined)


def parse(text: str) -> Tree:
    """The tree of one document; an empty Word for none. Raises yaml.YAMLError, or ValueError for a tree without an end."""
    try:
        tree = yaml.load(text, _Loader)
        if sum(1 for _ in itertools.islice(_nodes(tree), MAX_NODES + 1)) > MAX_NODES:
            raise ValueError(f"holds more than {MAX_NODES} values")
    except RecursionError:
        raise ValueError("is nested too deeply") from None
    return Word("") if tree is None else tree


def _nodes(tree: Tree) -> Iterator[Tree]:
    yield tree
    for entry in tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else ():
        yield from _nodes(entry)


def unquoted(text: str) -> Word:
    """The text of an override: as it is, but for YAML's quotes around all of it."""
    stripped = text.strip()
    if stripped[:1] in ("'", '"') and stripped[-1:] == stripped[:1]:
        try:
            word = parse(stripped)
        except (yaml.YAMLError, ValueError):
            return Word(text)
        if isinstance(word, Word) and word.quoted:
            return word
    return Word(text)


# YAML 1.2, for tables without declared types
_INT = re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_WORDS = {"": None, "~": None, "null": None, "true": True, "false": False, ".inf": float("inf"), "-.inf": float("-inf")}
_WORDS |= {".nan": float("nan"), "+.inf": float("inf")}


def plain(tree: Tree) -> Any:
    """What a value without a declared type is, by YAML 1.2: numbers, true, false and null where they are not quoted, else text."""
    if isinstance(tree, dict):
        return {str(key): plain(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [plain(entry) for entry in tree]
    if tree.quoted:
        return str(tree)
    if tree.lower() in _WORDS and tree in (tree.lower(), tree.title(), tree.upper()):
        return _WORDS[tree.lower()]
    if _INT.fullmatch(tree):
        return int(tree, 0) if tree[:2] in ("0x", "0o") else int(tree)
    return float(tree) if _FLOAT.fullmatch(tree) else str(tree)


def shown(node: Tree) -> str:
    """A value as it was written, cut where it is long."""
    if isinstance(node, dict):
        text = f"{{{', '.join(f'{key}: {shown(value)}' for key, value in node.items())}}}"
    elif isinstance(node, list):
        text = f"[{', '.join(map(shown, node))}]"
    else:
        text = str(node)
    text = text.encode("utf-8", "backslashreplace").decode("utf-8")
    return text if len(text) <= 200 else f"{text[:200]}…"


class _Dumper(yaml.SafeDumper):
    """Quotes every text that any YAML would read as something else."""

    def represent_text(self, text: str) -> yaml.ScalarNode:
        tag = "tag:yaml.org,2002:str"
        simple = re.fullmatch(r"[\w./~:@+-]([\w ./~:@+-]*[\w./~:@+-])?", text, re.ASCII)
        text_everywhere = (
            isinstance(plain(Word(text)), str) and self.resolve(yaml.ScalarNode, text, (True, False)) == tag
        )
        return self.represent_scalar(tag, text, style=None if simple and text_everywhere else '"')

    def ignore_aliases(self, data: Any) -> bool:
        return True


_Dumper.add_representer(str, _Dumper.represent_text)


def write(tree: Any) -> str:
    """Nested dicts of plain values as YAML that `parse` and every YAML 1.1 or 1.2 reader reads back."""
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=float("inf"))  # type: ignore[arg-type]


def write_value(value: Any) -> str:
    """A value as it can be written after `key=` or in a YAML file, in one line."""
    text = yaml.dump([value], Dumper=_Dumper, default_flow_style=True, allow_unicode=True, width=float("inf"))  # type: ignore[arg-type]
    return text.strip()[1:-1]
