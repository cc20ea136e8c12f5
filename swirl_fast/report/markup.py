"""Text and numbers as HTML. Every text of a model, a tool or a data file goes through `escape` or `block`, nowhere
else."""

from __future__ import annotations

import html
import math
import re
from typing import TypeGuard

from swirl_fast.formats.tags import ANSWER_TAG, TOOL_TAGS

MAX_CHARS = 4_000  # of one text; three quarters from its beginning, the rest from its end, where the tag is

# Control characters, lone surrogates and noncharacters have no place in an HTML file; bidirectional controls could
# make a line read as another.
_INVISIBLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff]"
)
_TAGGED = re.compile(rf"<({'|'.join([*TOOL_TAGS.values(), ANSWER_TAG])})>.*?</\1>", re.DOTALL)


def escape(text: str) -> str:
    """For element content and quoted attributes. Characters that cannot be shown stand as Python escapes: `\\ud83d`."""
    return html.escape(_INVISIBLE.sub(lambda match: ascii(match[0])[1:-1], text))


def block(text: str, mark_tags: bool = False) -> str:
    """A text as it is, to be set with `white-space: pre-wrap`; the middle of one longer than MAX_CHARS says how
    much is left out.

    mark_tags: the tag of an action is marked.
    """
    write = _mark if mark_tags else escape
    if len(text) <= MAX_CHARS:
        return write(text)
    tail = MAX_CHARS // 4
    head = MAX_CHARS - tail
    note = f'<span class="cut">[{len(text) - MAX_CHARS:,} characters are not shown here]</span>'
    return f"{write(text[:head])} {note} {write(text[-tail:])}"


def _mark(text: str) -> str:
    parts, at = [], 0
    for match in _TAGGED.finditer(text):
        parts += [escape(text[at : match.start()]), f"<mark>{escape(match[0])}</mark>"]
        at = match.end()
    return "".join([*parts, escape(text[at:])])


def short(text: str, chars: int) -> str:
    """One line of at most `chars` characters, escaped."""
    line = " ".join(text.split())
    return escape(line if len(line) <= chars else line[: chars - 1] + "…")


def badge(verdict: str, reward: float | None = None) -> str:
    """A verdict to see at a glance, with its reward where that is a graded one."""
    look = verdict.lower().replace(" ", "-")
    graded = f" {show(reward, '')}" if is_number(reward) and reward not in (0, 1) else ""
    return f'<span class="badge {escape(look)}">{escape(verdict)}{graded}</span>'


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
