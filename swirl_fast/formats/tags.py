"""Tags <-> actions: what one model turn does, or why it is malformed.

An action is free reasoning and then exactly one of

    <search_query>…</search_query>    <math_exp>…</math_exp>    <answer>…</answer>

Nothing else is accepted: two tags, an unclosed or empty tag, a tag of a tool the task does not offer, or a turn cut off by
the length limit are malformed, with a reason that is shown to the model as the next observation.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

ANSWER_TAG = "answer"
TOOL_TAGS = {"calculator": "math_exp", "search": "search_query"}  # tool name -> tag
MAX_ARGUMENT_CHARS = 2_000

CUT_OFF = "The turn was too long and was cut off."

_TAG = re.compile(r"<(/?)(search_query|math_exp|answer)>")


@dataclass(frozen=True)
class Action:
    """kind "tool": `tool` names it and `argument` is the text inside its tag; "answer": `argument` is the answer;
    "malformed": `error` says why, in a sentence addressed to the model."""

    kind: Literal["tool", "answer", "malformed"]
    tool: str | None = None
    argument: str = ""
    error: str = ""

    @property
    def cut_off(self) -> bool:
        """Whether the turn hit the length limit."""
        return self.error.startswith(CUT_OFF)


def _malformed(error: str) -> Action:
    return Action("malformed", error=error)


def parse(text: str, tools: Collection[str], truncated: bool = False) -> Action:
    """The action in one model turn. Never raises, whatever the text; linear in its length.

    tools: names of the tools on offer, e.g. {"calculator"}.
    truncated: the turn hit the length limit before it ended.
    """
    tags = [(match.group(1) == "/", match.group(2), match.start(), match.end()) for match in _TAG.finditer(text)]
    wanted = " or ".join(f"<{tag}>…</{tag}>" for tag in [*(TOOL_TAGS[name] for name in sorted(tools)), ANSWER_TAG])
    if truncated:
        return _malformed(f"{CUT_OFF} Be brief and end with {wanted}.")
    if not tags:
        return _malformed(f"The turn has no tag. End it with {wanted}.")
    if len(tags) > 2:
        return _malformed(f"The turn has more than one tag. Use exactly one: {wanted}.")
    (closing, name, _, begin), *rest = tags
    if closing or not rest or not rest[0][0] or rest[0][1] != name:
        return _malformed(f"The tag <{name}> is not opened and closed exactly once. Write {wanted}.")
    argument = text[begin : rest[0][2]].strip()
    if not argument:
        return _malformed(f"The tag <{name}> is empty. Write {wanted}.")
    if len(argument) > MAX_ARGUMENT_CHARS:
        return _malformed(f"The text in <{name}> is longer than {MAX_ARGUMENT_CHARS} characters.")
    if name == ANSWER_TAG:
        return Action("answer", argument=argument)
    tool = next((tool for tool, tag in TOOL_TAGS.items() if tag == name), None)
    if tool not in tools:
        return _malformed(f"There is no tool <{name}> here. Use {wanted}.")
    return Action("tool", tool=tool, argument=argument)


def render(action: Action) -> str:
    """The tag form of a tool call or an answer; `parse(render(a))` is `a`. Raises ValueError for a malformed action."""
    if action.kind == "malformed":
        raise ValueError(f"a malformed action has no tag form: {action.error}")
    tag = ANSWER_TAG if action.kind == "answer" else TOOL_TAGS[action.tool or ""]
    return f"<{tag}>{action.argument}</{tag}>"
