"""Tags <-> actions: what one model turn does, or why it is malformed.

An action is free reasoning and then exactly one tag: of a tool on offer, around its argument, or of the answer.

    <search_query>…</search_query>    <convert>{"value": 3, "to": "m"}</convert>    <answer>…</answer>

Nothing else is accepted: two tags, an unclosed or empty tag, a tag of a tool the task does not offer, arguments that the tool does not
take, or a turn cut off by the length limit are malformed, with a reason that is shown to the model as the next observation.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Literal

from swirl_fast.tools.arguments import ArgumentError, read_arguments
from swirl_fast.tools.tool import BUILT_IN, MAX_ARGUMENT_CHARS, ToolSpec

ANSWER_TAG = "answer"

CUT_OFF = "The turn was too long and was cut off."


@dataclass(frozen=True)
class Action:
    """kind "tool": `tool` names it, `argument` is the text inside its tag, and `arguments` what that says, by name; "answer": `argument`
    is the answer; "malformed": `error` says why, in a sentence addressed to the model. arguments: None for an action that was stored."""

    kind: Literal["tool", "answer", "malformed"]
    tool: str | None = None
    argument: str = ""
    error: str = ""
    arguments: Mapping[str, Any] | None = field(default=None, compare=False)

    @property
    def cut_off(self) -> bool:
        """Whether the turn hit the length limit."""
        return self.error.startswith(CUT_OFF)


def tag_of(tool: str) -> str:
    """The tag of a tool by its name: own tools' tags are their names."""
    return BUILT_IN[tool].tag if tool in BUILT_IN else tool


def _malformed(error: str) -> Action:
    return Action("malformed", error=error)


@lru_cache(maxsize=64)
def _pattern(names: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile(rf"<(/?)({'|'.join(names)})>")


def parse(text: str, tools: Collection[ToolSpec], truncated: bool = False) -> Action:
    """The action in one model turn. Never raises, whatever the text; linear in its length.

    tools: those on offer. truncated: the turn hit the length limit before it ended.
    """
    offered = {spec.tag: spec for spec in sorted(tools, key=lambda spec: spec.name)}
    known = dict.fromkeys([*(spec.tag for spec in BUILT_IN.values()), *offered, ANSWER_TAG])
    tags = [
        (match.group(1) == "/", match.group(2), match.start(), match.end())
        for match in _pattern(tuple(known)).finditer(text)
    ]
    wanted = " or ".join([*(spec.usage for spec in offered.values()), f"<{ANSWER_TAG}>…</{ANSWER_TAG}>"])
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
    spec = offered.get(name)
    if not argument and (spec is None or spec.parameters.get("required") or spec.text_parameter):
        return _malformed(f"The tag <{name}> is empty. Write {wanted}.")
    limit = spec.max_chars if spec else MAX_ARGUMENT_CHARS
    if len(argument) > limit:
        return _malformed(f"The text in <{name}> is longer than {limit} characters.")
    if name == ANSWER_TAG:
        return Action("answer", argument=argument)
    if spec is None:
        return _malformed(f"There is no tool <{name}> here. Use {wanted}.")
    try:
        return Action("tool", tool=spec.name, argument=argument, arguments=read_arguments(spec, argument))
    except ArgumentError as error:
        return _malformed(str(error))


def render(action: Action) -> str:
    """The tag form of a tool call or an answer; `parse(render(a))` is `a`. Raises ValueError for a malformed action."""
    if action.kind == "malformed":
        raise ValueError(f"a malformed action has no tag form: {action.error}")
    tag = ANSWER_TAG if action.kind == "answer" else tag_of(action.tool or "")
    return f"<{tag}>{action.argument}</{tag}>"
