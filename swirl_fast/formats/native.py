"""actions.format=native: calls as the model was trained to write them, in the syntax that its chat template writes (syntaxes.py).

A turn has calls, one or several, or the answer, never both. With actions.answer=tag the answer stands between <answer> and </answer>; with
message it is the turn without a call. Broken calls, unknown tools, arguments that are missing, too many or of a wrong type, and two answers
are malformed, with a reason that is shown to the model as the next observation.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from typing import Any, Literal

from swirl_fast.formats.format import CUT_OFF, Action, Call, malformed
from swirl_fast.formats.syntaxes import CallError, Syntax, WrittenCall
from swirl_fast.formats.tags import ANSWER_TAG
from swirl_fast.tools.arguments import ArgumentError, checked_arguments, fits, strict_json
from swirl_fast.tools.tool import MAX_ARGUMENT_CHARS, ToolSpec

MAX_CALLS = 32
_ANSWER = re.compile(rf"<(/?){ANSWER_TAG}>")


class NativeFormat:
    """parallel: whether the chat template can write several calls in one turn."""

    native = True

    def __init__(self, syntax: Syntax, answer: Literal["tag", "message"] = "tag", parallel: bool = True) -> None:
        self.syntax, self.answer, self.parallel = syntax, answer, parallel
        self.identity = f"native-{syntax.name}-{answer}" + ("" if parallel else "-single")

    def parse(self, text: str, tools: Collection[ToolSpec], truncated: bool = False) -> Action:
        offered = {spec.name: spec for spec in sorted(tools, key=lambda spec: spec.name)}
        answer = f"<{ANSWER_TAG}>…</{ANSWER_TAG}>" if self.answer == "tag" else "the answer as plain text"
        wanted = f"a call of {' or '.join(offered)}, or {answer}" if offered else answer
        if truncated:
            return malformed(f"{CUT_OFF} Be brief and end with {wanted}.")
        try:
            written, rest = self.syntax.find(self.syntax.visible(text))
        except CallError as error:
            return malformed(f"{error} Write {wanted}.")
        answers = self._answers(rest)
        if isinstance(answers, str):
            return malformed(f"{answers} Write {wanted}.")
        if written and answers:
            return malformed(f"The turn has both a call and an answer. Write {wanted}.")
        if written:
            return self._calls(written, offered, wanted)
        if len(answers) > 1:
            return malformed(f"The turn has more than one answer. Write {wanted}.")
        if not answers and self.answer == "message" and rest.strip():
            answers = [rest.strip()]
        if not answers:
            return malformed(f"The turn has neither a call nor an answer. Write {wanted}.")
        if not answers[0]:
            return malformed(f"The answer is empty. Write {wanted}.")
        if len(answers[0]) > MAX_ARGUMENT_CHARS and self.answer == "tag":
            return malformed(f"The text in <{ANSWER_TAG}> is longer than {MAX_ARGUMENT_CHARS} characters.")
        return Action("answer", argument=answers[0])

    def _answers(self, text: str) -> list[str] | str:
        """The texts between answer tags; or what is wrong with the tags."""
        if self.answer == "message":
            return []
        pieces = _ANSWER.split(text)  # text, "" or "/", text, …
        marks = pieces[1::2]
        if marks != ["", "/"] * (len(marks) // 2):
            return f"The tag <{ANSWER_TAG}> is not opened and closed exactly once."
        return [piece.strip() for piece in pieces[2::4]]

    def _calls(self, written: list[WrittenCall], offered: dict[str, ToolSpec], wanted: str) -> Action:
        if len(written) > 1 and not self.parallel:
            return malformed("The turn has more than one call. Make one call a turn.")
        if len(written) > MAX_CALLS:
            return malformed(f"The turn has {len(written)} calls; {MAX_CALLS} are the most.")
        calls = []
        for call in written:
            spec = offered.get(call.name)
            if spec is None:
                return malformed(f"There is no tool {call.name[:100]!r} here. Write {wanted}.")
            try:
                values = dict(call.arguments) if call.typed else _typed(call, spec)
                arguments = checked_arguments(spec, values, f"the arguments as {spec.arguments_form}")
            except ArgumentError as error:
                return malformed(str(error))
            argument = argument_text(spec, arguments)
            if not argument:
                return malformed(f"The call of {spec.name} is empty. Write {wanted}.")
            if len(argument) > spec.max_chars:
                return malformed(f"The arguments of {spec.name} are longer than {spec.max_chars} characters.")
            calls.append(Call(spec.name, argument, arguments))
        return Action.of_calls(calls)

    def outside(self, text: str, action: Action) -> int:
        if self.answer == "message" and action.kind == "answer":
            return 0
        visible = self.syntax.visible(text)
        if action.kind == "answer":
            return max(0, len(visible) - len(action.argument) - 2 * len(ANSWER_TAG) - 5)
        try:
            return len(self.syntax.find(visible)[1].strip())
        except CallError:  # a turn that was read with other tools
            return 0


def argument_text(spec: ToolSpec, arguments: dict[str, Any]) -> str:
    """The text of a call, as judges and people see it."""
    if spec.text_parameter:
        return str(arguments[spec.text_parameter]).strip()
    return json.dumps(arguments, ensure_ascii=False)


def _typed(call: WrittenCall, spec: ToolSpec) -> dict[str, Any]:
    """Texts as values of the types that the schema names: what is JSON is read as JSON, unless only the text itself fits the schema. A
    JSON text in its quotes stays as it is where it fits, for templates write texts without quotes."""
    properties = spec.parameters.get("properties", {})
    return {name: _value(spec, name, text, properties.get(name)) for name, text in call.arguments.items()}


def _value(spec: ToolSpec, name: str, text: str, schema: Any) -> Any:
    if isinstance(schema, dict) and schema.get("type") in ("string", ["string"]):
        return text
    try:
        value = strict_json(text.strip())
    except ValueError:
        words = {"True": True, "False": False, "None": None}  # as templates in Jinja write them
        value = words.get(text.strip(), text)
    if fits(spec, name, text) and (isinstance(value, str) or not fits(spec, name, value)):
        return text
    return value
