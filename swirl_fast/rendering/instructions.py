"""The conversation before the first action: the system message, worked examples, the question."""

from __future__ import annotations

from collections.abc import Sequence

from swirl_fast.config import ConfigError
from swirl_fast.formats.format import Action, Format, results_in
from swirl_fast.formats.tags import ANSWER_TAG, TAGS, parse
from swirl_fast.rendering.template import Message
from swirl_fast.tasks.task import Example
from swirl_fast.tools.tool import BUILT_IN, ToolSpec


def instructions(tools: Sequence[ToolSpec], max_steps: int, own: str = "", form: Format = TAGS) -> str:
    """The system message: how an action is written and how the conversation goes (points of the paper's appendix, in our words). With a
    native format the chat template itself says what the tools are and how they are called.

    own: in place of it; `{tools}` in it becomes the lines about tools and answer. Raises ConfigError for an own text from which no model
    can know how to act.
    """
    lines = [] if form.native else [_usage(tool) for tool in tools]
    if tools:
        result = "" if form.native else " The result comes back as QUERY -> RESULT."
        each = "" if form.native else ", one a turn"
        lines.append(
            f"You may make up to {max_steps - 1} {'turns with calls' if form.native else f'calls{each}'}.{result} "
            "Never repeat a call that was already made."
        )
    if form.answer == "tag":
        lines.append(f"When you have enough information, write <{ANSWER_TAG}>…</{ANSWER_TAG}>.")
    else:
        lines.append("When you have enough information, write the answer without any call.")
    if tools:
        one = "calls" if form.native else "one call"
        lines.append(f"A turn has either {one} or the answer, never both.")
    if not own:
        return "\n".join(["Answer the question in a few words.", *lines])
    tags = [] if form.native else [spec.tag for spec in tools]
    tags += [ANSWER_TAG] if form.answer == "tag" else []
    missing = [f"<{tag}>" for tag in tags if f"<{tag}>" not in own]
    if "{tools}" not in own and missing:
        raise ConfigError(
            f"tasks.instructions: the text says nothing of {', '.join(missing)}, so that no model could know how to act; write {{tools}} "
            "where the description of tools and tags belongs"
        )
    return own.replace("{tools}", "\n".join(lines))


def _usage(tool: ToolSpec) -> str:
    if tool.name in BUILT_IN:
        return f"To use the {tool.name}, write {tool.usage}: {tool.description}"
    arguments = f" Arguments: {tool.arguments}." if tool.arguments else ""
    return f"To use {tool.name}, write {tool.usage}: {tool.description}{arguments}"


def conversation(
    question: str,
    tools: Sequence[ToolSpec],
    max_steps: int,
    examples: Sequence[Example],
    own_instructions: str = "",
    form: Format = TAGS,
) -> list[Message]:
    """System message, the worked examples as earlier turns, and the question. Worked examples are written with tags, and become what
    the format makes of them."""
    messages: list[Message] = [
        {"role": "system", "content": instructions(tools, max_steps, own_instructions, form)},
    ]
    for example in examples:
        messages.append({"role": "user", "content": example.question})
        for i, text in enumerate(example.actions):
            action = parse(text, tools)
            messages.append(message_of(action, form, text))
            if i < len(example.observations):
                messages += observed(action, example.observations[i], form)
    messages.append({"role": "user", "content": question})
    return messages


def message_of(action: Action, form: Format, text: str) -> Message:
    """An action as the message of an assistant. text: the turn as it was written with tags."""
    if form.native and action.kind == "tool":
        calls = [
            {
                "type": "function",
                "id": f"{i:09d}",
                "function": {"name": call.tool, "arguments": dict(call.arguments or {})},
            }
            for i, call in enumerate(action.calls)
        ]
        return {"role": "assistant", "content": "", "tool_calls": calls}
    if action.kind == "answer" and form.answer == "message":
        return {"role": "assistant", "content": action.argument}
    return {"role": "assistant", "content": text}


def observed(action: Action, text: str, form: Format, results: Sequence[str] | None = None) -> list[Message]:
    """What follows an action, as messages: the results of calls in the tool's role where the format is native, else a user's turn.

    text: the observation. results: those of the calls, where they are known apart.
    """
    if not form.native or action.kind != "tool":
        return [{"role": "user", "content": text}]
    if results is None:
        results = results_in(action.calls, text) or [text] * len(action.calls)
    return [
        {"role": "tool", "name": call.tool, "tool_call_id": f"{i:09d}", "content": result}
        for i, (call, result) in enumerate(zip(action.calls, results, strict=True))
    ]
