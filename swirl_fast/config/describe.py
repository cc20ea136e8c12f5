"""What the settings are, in words: for `swirl-fast config` and for docs/configuration.md, which this module writes:

    python -m swirl_fast.config.describe > docs/configuration.md

The meaning of a setting is the docstring below its field, read from the source, so that it is written once.
"""

from __future__ import annotations

import ast
import inspect
import operator
import shlex
import sys
import textwrap
from collections.abc import Sequence
from functools import cache
from typing import Any

from swirl_fast.config.error import ConfigError
from swirl_fast.config.fields import Setting, sections, settings
from swirl_fast.config.hints import did_you_mean
from swirl_fast.config.schema import Config
from swirl_fast.config.yaml_text import write_value

WIDTH = 100

_HEAD = """\
<!-- Written by `python -m swirl_fast.config.describe > docs/configuration.md` from swirl_fast/config/schema.py; do not edit it here. -->
# Configuration

One YAML file holds the settings of all stages, and `section.key=value` on the command line goes on top of it:

    swirl-fast run --config quickstart training.steps=20 'tasks.options={min_terms: 3}'

`swirl-fast config` prints what is below; `swirl-fast config training`, `swirl-fast config training.learning_rate` a part of it; with
`--config FILE` and `key=value` the values that they give, with `--changed` only those that differ from the defaults.

- A text is the text as it is written: `run.name=1e3`, `yes` and `3.10` are not read as numbers or truth values, and nothing in a text is
  interpolated. `null` without quotes, or nothing, means none where there can be none.
- Words are accepted in any case: `algorithm.name=GRPO`.
- Tables and sections are merged key by key, lists are replaced. `{}` empties a table.
"""


@cache
def meanings(module: Any) -> dict[tuple[str, str], str]:
    """(class, field) -> the docstring below the field, in one line."""
    found = {}
    for node in ast.parse(inspect.getsource(module)).body:
        if not isinstance(node, ast.ClassDef):
            continue
        for entry, below in zip(node.body, node.body[1:], strict=False):
            if isinstance(entry, ast.AnnAssign) and isinstance(entry.target, ast.Name) and isinstance(below, ast.Expr):
                if isinstance(below.value, ast.Constant) and isinstance(below.value.value, str):
                    found[node.name, entry.target.id] = " ".join(below.value.value.split())
    return found


def meaning(entry: Setting) -> str:
    return meanings(sys.modules[entry.owner.__module__])[entry.owner.__name__, entry.field]


def selected(names: Sequence[str]) -> list[Setting]:
    """The settings of the named sections and keys, all without a name. Raises ConfigError for a name that is neither."""
    known = settings(Config)
    for name in names:
        if name not in known and name not in sections(Config):
            raise ConfigError(f"{name}: no section and no key{did_you_mean(Config, name)}")
    return [
        entry for key, entry in known.items() if not names or any(f"{key}.".startswith(f"{name}.") for name in names)
    ]


def describe(names: Sequence[str], config: Config, changed: bool = False) -> str:
    """Of each setting its key and value in `config`, what is accepted, the default and the meaning; of each section what it is for.
    changed: only the keys and values of those that differ from their defaults, each quoted as a shell wants it; empty where none does."""
    if changed:
        here = {entry.key: (operator.attrgetter(entry.key)(config), entry.default) for entry in selected(names)}
        return "\n".join(
            shlex.quote(f"{key}={write_value(value)}") for key, (value, default) in here.items() if value != default
        )
    parts, last = [], ""
    for entry in selected(names):
        section = entry.key.rpartition(".")[0]
        if section != last and entry.key not in names:
            parts.append(f"# {section}: {_one_line(sections(Config)[section])}")
        last = section
        value = operator.attrgetter(entry.key)(config)
        lines = [
            f"{entry.key}={write_value(value)}",
            *_wrapped(f"{entry.accepted}; default {write_value(entry.default)}"),
            *_wrapped(meaning(entry)),
        ]
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def document() -> str:
    """docs/configuration.md."""
    parts, rows, last = [_HEAD], [], ""
    for entry in settings(Config).values():
        section = entry.key.rpartition(".")[0]
        if section != last:
            rows = ["| key | accepted | default | meaning |", "| --- | --- | --- | --- |"]
            parts += [f"\n## {section}\n\n{_one_line(sections(Config)[section])}\n", *rows]
            last = section
        cells = (f"`{entry.key}`", entry.accepted, f"`{write_value(entry.default)}`", meaning(entry))
        parts.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    return "\n".join(parts) + "\n"


def _one_line(section: type) -> str:
    return " ".join((section.__doc__ or "").split())


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, initial_indent="    ", subsequent_indent="    ", break_on_hyphens=False)


if __name__ == "__main__":
    print(document(), end="")
