"""Tags <-> actions: what one model turn does, or why it is malformed.

An action is free reasoning and then exactly one tag: of a tool on offer, around its argument, or of the answer.

    <search_query>…</search_query>    <convert>{"value": 3, "to": "m"}</convert>    <answer>…</answer>

Nothing else is accepted: two tags, an unclosed or empty tag, a tag of a tool the task does not offer, arguments that the tool does not
take, or a turn cut off by the length limit are malformed, with a reason that is shown to the model as the next observation. With
actions.answer=message a turn without a tag is the answer. Tags inside a thought, `<think>…</think>`, are none.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from functools import lru_cache
from typing import Literal

from swirl_fast.formats.format import CUT_OFF, Action, malformed, without_thoughts
from swirl_fast.tools.arguments import ArgumentError, read_arguments
from swirl_fast.tools.tool import BUILT_IN, MAX_ARGUMENT_CHARS, ToolSpec

ANSWER_TAG = "answer"


def tag_of(tool: str) -> str:
    """The tag of a tool by its name: own tools' tags are their names."""
    return BUILT_IN[tool].tag if tool in BUILT_IN else tool


@lru_cache(maxsize=64)
def _pattern(names: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile(rf"<(/?)({'|'.join(names)})>")


class TagsFormat:
    """actions.format=tags."""

    native = False

    def __init__(self, answer: Literal["tag", "message"] = "tag") -> None:
        self.answer = answer
        self.identity = "" if answer == "tag" else "tags-message"

    def parse(self, text: str, tools: Collection[ToolSpec], truncated: bool = False) -> Action:
        offered = {spec.tag: spec for spec in sorted(tools, key=lambda spec: spec.name)}
        known = dict.fromkeys([*(spec.tag for spec in BUILT_IN.values()), *offered, ANSWER_TAG])
        answer = f"<{ANSWER_TAG}>…</{ANSWER_TAG}>" if self.answer == "tag" else "the answer without a tag"
        wanted = " or ".join([*(spec.usage for spec in offered.values()), answer])
        if truncated:
            return malformed(f"{CUT_OFF} Be brief and end with {wanted}.")
        text = without_thoughts(text)
        tags = [
            (match.group(1) == "/", match.group(2), match.start(), match.end())
            for match in _pattern(tuple(known)).finditer(text)
        ]
        if not tags and self.answer == "message" and text.strip():
            return Action("answer", argument=text.strip())
        if not tags:
            return malformed(f"The turn has no tag. End it with {wanted}.")
        if len(tags) > 2:
            return malformed(f"The turn has more than one tag. Use exactly one: {wanted}.")
        (closing, name, _, begin), *rest = tags
        if closing or not rest or not rest[0][0] or rest[0][1] != name:
            return malformed(f"The tag <{name}> is not opened and closed exactly once. Write {wanted}.")
        argument = text[begin : rest[0][2]].strip()
        spec = offered.get(name)
        if not argument and (spec is None or spec.parameters.get("required") or spec.text_parameter):
            return malformed(f"The tag <{name}> is empty. Write {wanted}.")
        limit = spec.max_chars if spec else MAX_ARGUMENT_CHARS
        if len(argument) > limit:
            return malformed(f"The text in <{name}> is longer than {limit} characters.")
        if name == ANSWER_TAG:
            return Action("answer", argument=argument)
        if spec is None:
            return malformed(f"There is no tool <{name}> here. Use {wanted}.")
        try:
            return Action("tool", tool=spec.name, argument=argument, arguments=read_arguments(spec, argument))
        except ArgumentError as error:
            return malformed(str(error))

    def outside(self, text: str, action: Action) -> int:
        written = len(action.argument) if self.answer == "message" and action.kind == "answer" else len(render(action))
        return max(0, len(without_thoughts(text)) - written)


TAGS = TagsFormat()
parse = TAGS.parse  # with an answer tag, which is how worked examples and labelled steps are written


def render(action: Action) -> str:
    """The tag form of a tool call or an answer; `parse(render(a))` is `a`. Raises ValueError for a malformed action."""
    if action.kind == "malformed":
        raise ValueError(f"a malformed action has no tag form: {action.error}")
    tag = ANSWER_TAG if action.kind == "answer" else tag_of(action.tool or "")
    return f"<{tag}>{action.argument}</{tag}>"
