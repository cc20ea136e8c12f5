"""Text as HTML. Every text of a model, a tool or a data file goes through `escape` or `block`, nowhere
else."""

from __future__ import annotations

import html
import re

from swirl_fast.outputs.text import is_number, one_line, show, visible

MAX_CHARS = 4_000  # of one text; three quarters from its beginning, the rest from its end, where the tag is

_TAGGED = re.compile(
    r"<(?!think(?:ing)?>)([A-Za-z_][A-Za-z0-9_]{0,63})>.*?</\1>", re.DOTALL
)  # of any tool, or the answer


def escape(text: str) -> str:
    """For element content and quoted attributes. Characters that cannot be shown stand as Python escapes: `\\ud83d`."""
    return html.escape(visible(text))


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
    return escape(one_line(text, chars))


def badge(verdict: str, reward: float | None = None) -> str:
    """A verdict to see at a glance, with its reward where that is a graded one."""
    look = verdict.lower().replace(" ", "-")
    graded = f" {show(reward, '')}" if is_number(reward) and reward not in (0, 1) else ""
    return f'<span class="badge {escape(look)}">{escape(verdict)}{graded}</span>'
