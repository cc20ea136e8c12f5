"""What a field of a config class is to the outside: a dotted key with a type, accepted words or a range, and a default."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from types import NoneType
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin, get_type_hints

_NAMES = {int: "whole number", float: "number", str: "text", bool: "true or false"}


if TYPE_CHECKING:
    AsWritten = Any
else:

    class AsWritten:
        """The type of a value that is read later, as the settings that it holds."""


@dataclass(frozen=True)
class Range:
    """The numbers that a setting accepts; of a list, each entry. Infinity only where `endless`, never nan.

    minimum, maximum: the ends where they are accepted themselves. above, below: the ends where they are not. length: of a list.
    """

    minimum: float | None = None
    above: float | None = None
    maximum: float | None = None
    below: float | None = None
    endless: bool = False
    length: int | None = None

    def accepts(self, value: Any) -> bool:
        if isinstance(value, list):
            return self.length in (None, len(value)) and all(self.accepts(entry) for entry in value)
        if isinstance(value, bool) or not isinstance(value, int | float):
            return True
        return (
            (self.minimum is None or value >= self.minimum)
            and (self.above is None or value > self.above)
            and (self.maximum is None or value <= self.maximum)
            and (self.below is None or value < self.below)
            and (isinstance(value, int) or math.isfinite(value) or (self.endless and not math.isnan(value)))
        )

    def __str__(self) -> str:
        """Such as `at least 1`, `above 0`, `in (0, 1]`; empty for every number."""
        low, high = self.above if self.minimum is None else self.minimum, self.below
        high = self.maximum if high is None else high
        if low is not None and high is not None:
            return f"in {'[' if self.above is None else '('}{low:g}, {high:.10g}{']' if self.below is None else ')'}"
        if low is not None:
            return f"{'at least' if self.above is None else 'above'} {low:g}"
        return "" if high is None else f"{'at most' if self.below is None else 'below'} {high:g}"


Reads = Literal["", "file", "place", "template", "reference", "tasks"]


def setting(default: Any, *, reads: Reads = "", known: Sequence[str] = (), **limits: Any) -> Any:
    """A dataclass field with more than a type. limits: those of `Range`. known: the built-in names that a text accepts.

    reads: what a text names, which is found beside the YAML file that says it. file: a file or folder, where there is one of this name.
    place: a file, folder or URL that is looked for in the working directory alone; `~` is the home folder. template: as file, or a shipped
    chat template (shipped.py). reference: also a user's own Python (references.py). tasks: of a list of tables, each with the keys of a
    task.
    """
    metadata = {"range": Range(**limits), "reads": reads, "known": tuple(known)}
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Setting:
    """key: dotted. kind: the type as it is declared. owner: the class that declares it, under the name `field`. reads, known: see
    `setting`."""

    key: str
    kind: Any
    default: Any
    range: Range
    owner: type
    field: str
    reads: Reads = ""
    known: tuple[str, ...] = ()

    @property
    def optional(self) -> bool:
        return NoneType in get_args(self.kind)

    @property
    def plain_kind(self) -> Any:
        """The type of a value that is not null."""
        return next(kind for kind in get_args(self.kind) if kind is not NoneType) if self.optional else self.kind

    @property
    def words(self) -> tuple[Any, ...]:
        """The accepted words, empty where every value of the type is accepted."""
        return get_args(self.kind) if get_origin(self.kind) is Literal else ()

    @property
    def is_table(self) -> bool:
        """Whether its keys are the user's own."""
        return get_origin(self.kind) is dict

    @property
    def type_name(self) -> str:
        """Such as `whole number`, `text or null`, `list of numbers`, `one of rules, model`."""
        if self.words:
            listed = ", ".join(str(word) for word in self.words if word != "")
            return f"one of {listed}{', or empty' if '' in self.words else ''}"
        if self.reads == "reference":
            own = "FILE.py:NAME or MODULE:NAME"
            each = "list of names, each " if get_origin(self.kind) is list else ""
            return f"{each}one of {', '.join(self.known)}, or {own}" if self.known else f"{each}{own}"
        if self.reads == "tasks":
            return "list of tables"
        if self.optional:
            return f"{_NAMES[self.plain_kind]} or null"
        arguments = get_args(self.kind)
        if self.is_table:
            if words := get_args(arguments[1]) if get_origin(arguments[1]) is Literal else ():
                return f"table with values of {', '.join(words)}"
            values = {str: "texts", dict: "tables", list: "lists"}.get(get_origin(arguments[1]) or arguments[1])
            return f"table of {values}" if values else "table"
        if get_origin(self.kind) is list:
            entries = f"{_NAMES[arguments[0]]}s" if arguments[0] in _NAMES else "values"
            return f"list of {self.range.length} {entries}" if self.range.length else f"list of {entries}"
        return _NAMES[self.kind]

    @property
    def accepted(self) -> str:
        """The type and the range, as in `whole number, at least 1`."""
        limits = f"each {self.range}" if isinstance(self.default, list) and str(self.range) else str(self.range)
        return f"{self.type_name}, {limits}" if limits else self.type_name


@cache
def settings(kind: type) -> dict[str, Setting]:
    """Every setting of a config class and of its sections, by key, in the order in which they are declared."""
    return {entry.key: entry for entry in _settings(kind, "")}


@cache
def sections(kind: type) -> dict[str, type]:
    """Every section of a config class by its dotted name, those within sections too."""
    return dict(_sections(kind, ""))


@cache
def declared_types(kind: type) -> dict[str, Any]:
    """Field -> type of a config class."""
    return get_type_hints(kind)


def _settings(kind: type, prefix: str) -> Iterator[Setting]:
    for entry in dataclasses.fields(kind):
        declared = declared_types(kind)[entry.name]
        if dataclasses.is_dataclass(declared):
            yield from _settings(declared, f"{prefix}{entry.name}.")  # type: ignore[arg-type]
        else:
            factory = entry.default_factory
            default = entry.default if factory is dataclasses.MISSING else factory()
            limits, reads = entry.metadata.get("range", Range()), entry.metadata.get("reads", "")
            known = entry.metadata.get("known", ())
            yield Setting(prefix + entry.name, declared, default, limits, kind, entry.name, reads, known)


def _sections(kind: type, prefix: str) -> Iterator[tuple[str, type]]:
    for entry in dataclasses.fields(kind):
        declared = declared_types(kind)[entry.name]
        if dataclasses.is_dataclass(declared):
            assert isinstance(declared, type)
            yield prefix + entry.name, declared
            yield from _sections(declared, f"{prefix}{entry.name}.")
