"""Texts and numbers for a reader. What a model, a tool or a data file wrote goes through `visible` before a terminal or a page shows it."""

from __future__ import annotations

import math
import re
from typing import Any, TypeGuard

# Control characters steer a terminal, and they, lone surrogates and noncharacters have no place in an HTML file; bidirectional controls
# could make a line read as another.
_INVISIBLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff]"
)
_LONE = re.compile("[\ud800-\udfff]")


def visible(text: str) -> str:
    """The text with what cannot be shown as Python escapes: `\\x1b`, `\\ud83d`. Line ends and tabs stay."""
    return _INVISIBLE.sub(lambda match: ascii(match[0])[1:-1], text)


def clean(value: Any) -> Any:
    """A JSON value whose texts are valid Unicode: lone surrogates, which models write and pandas, Arrow and most readers of JSON refuse,
    become U+FFFD."""
    if isinstance(value, str):
        return _LONE.sub("\ufffd", value)
    if isinstance(value, dict):
        return {key: clean(each) for key, each in value.items()}
    return [clean(each) for each in value] if isinstance(value, list) else value


def one_line(text: str, chars: int) -> str:
    """One line of at most `chars` characters of the text, not escaped."""
    line = " ".join(text.split())
    return line if len(line) <= chars else line[: chars - 1] + "…"


def is_number(value: object) -> TypeGuard[float]:
    """A finite number: files of an unfinished run may hold anything."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def show(value: object, unit: str) -> str:
    """A number to read: unit "%" for a share in [0, 1], "s" for seconds (from two minutes on as min, from two hours
    on as h)."""
    if not is_number(value):
        return "–"
    if unit == "%":
        return f"{100 * value:.1f}%"
    if unit == "s" and value >= 7200:
        return f"{value / 3600:.1f} h"
    if unit == "s" and value >= 120:
        return f"{value / 60:.1f} min"
    if abs(value) >= 1000 or float(value).is_integer():
        text = f"{value:,.0f}"
    else:
        text = f"{value:.3g}" if abs(value) >= 1e-3 else f"{value:.2e}"
    return f"{text} s" if unit == "s" else text
