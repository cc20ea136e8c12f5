"""tasks.worked_examples: conversations that a prompt shows before the question, from a file."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from swirl_fast.formats.tags import parse
from swirl_fast.tasks.rows import read_file
from swirl_fast.tasks.task import Example
from swirl_fast.tools.tool import ToolSpec


def read_examples(file: Path, tools: Sequence[ToolSpec]) -> tuple[Example, ...]:
    """Rows {"question": text, "actions": [text, …], "observations": [text, …]}: the model's turns, the last with the answer, and between
    each two of them what the tool gave back, as `QUERY -> RESULT`. Raises ValueError naming file, line and field."""
    examples = []
    for row in read_file(file.expanduser()):
        actions, observations = row.texts("actions"), row.texts("observations")
        if not actions or "<answer>" not in actions[-1]:
            raise row.error("actions", "must be a list of the model's turns, the last with <answer>…</answer>")
        if len(observations) != len(actions) - 1:
            raise row.error(
                "observations",
                f"must be a list of {len(actions) - 1}: one between each two of the {len(actions)} actions",
            )
        for turn, action in enumerate(map(partial(parse, tools=tools), actions)):
            if action.kind != ("answer" if turn == len(actions) - 1 else "tool"):
                raise row.error(
                    "actions",
                    f"turn {turn + 1} is no {'call' if turn < len(actions) - 1 else 'answer'}: {action.error}",
                )
        examples.append(Example(row.text("question"), tuple(actions), tuple(observations)))
    if not examples:
        raise ValueError(f"tasks.worked_examples={file}: has no rows")
    return tuple(examples)
