"""Labelled steps: a JSON object a line, for measuring how far a judge agrees with people or with what is known by construction.

    {"task": "gsm8k", "tools": ["calculator"], "question": "…", "history": [["<math_exp>1+2</math_exp>", "1+2 -> 3.0"]],
     "action_text": "<answer>3</answer>", "label": "GOOD", "kind": "answer is the result", "source": "human"}

kind (why the label is what it is) and source are free to leave out; an empty label is one still to be given.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from swirl_fast.data.store import Store
from swirl_fast.files import write_text
from swirl_fast.formats.format import Action
from swirl_fast.formats.tags import parse
from swirl_fast.tools.tool import BUILT_IN, ToolSpec
from swirl_fast.trajectory import StepView
from swirl_fast.verdict import Verdict

SOURCES = ("human", "rule", "construction")
KEYS = ("task", "tools", "question", "history", "action_text", "label", "kind", "source")


@dataclass(frozen=True)
class LabelledStep:
    """tools: those on offer. label: GOOD, BAD, or None where it is still to be given. line: in its file, 0 elsewhere."""

    view: StepView
    tools: tuple[ToolSpec, ...]
    label: Verdict | None
    kind: str = ""
    source: str = ""
    line: int = 0

    @property
    def action(self) -> Action:
        """An action cut off at the length limit cannot be told only from its text; such a one has no complete tag, mostly."""
        return parse(self.view.action_text, self.tools)


def read_labels(path: str | Path, known: Mapping[str, ToolSpec] = BUILT_IN) -> list[LabelledStep]:
    """known: the tools that a line may name. Raises ValueError with file:line, the key, the value and the remedy for a line that is none
    of ours, for a task whose lines offer different tools (a judge is told the tools by task), and for one step with two different
    labels."""
    file = Path(path)
    try:
        lines = file.read_text(encoding="utf-8-sig").split("\n")
    except FileNotFoundError:
        raise ValueError(f"{file}: no such file; one labelled step a line, see swirl_fast/judges/labels.py") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: not UTF-8 at byte {error.start}") from None
    steps = [_step(line, number, f"{file}:{number}", known) for number, line in enumerate(lines, 1) if line.strip()]
    tools: dict[str, LabelledStep] = {}
    labels: dict[StepView, LabelledStep] = {}
    for step in steps:
        first = tools.setdefault(step.view.task, step)
        if step.tools != first.tools:
            raise ValueError(
                f"{file}:{step.line}: key 'tools' = {_names(step)}: task {step.view.task!r} has {_names(first)} in line "
                f"{first.line}; give steps with other tools another task"
            )
        if step.label is not None:
            first = labels.setdefault(step.view, step)
            if step.label is not first.label:
                raise ValueError(
                    f"{file}:{step.line}: key 'label' = {step.label.value!r}: the same step is {first.label.value!r} in line "  # type: ignore[union-attr]
                    f"{first.line}; keep one of them"
                )
    return steps


def write_labels(path: str | Path, steps: Iterable[LabelledStep]) -> int:
    """Returns the number of lines written."""
    rows = [
        {
            "task": step.view.task,
            "tools": _names(step),
            "question": step.view.question,
            "history": [list(turn) for turn in step.view.history],
            "action_text": step.view.action_text,
            "label": step.label.value if step.label else "",
            "kind": step.kind,
            "source": step.source,
        }
        for step in steps
    ]
    # ensure_ascii keeps lone surrogates, which UTF-8 has no bytes for
    write_text(Path(path), "".join(json.dumps(row) + "\n" for row in rows))
    return len(rows)


def _names(step: LabelledStep) -> list[str]:
    return [spec.name for spec in step.tools]


def steps_to_label(
    store: Store, ids: Sequence[str], tools_by_task: Mapping[str, Sequence[ToolSpec]], count: int, seed: int
) -> list[LabelledStep]:
    """`count` well-formed steps of these trajectories, drawn evenly from all, without a label; steps that look the same to a judge count
    once, and malformed ones are not a matter of judgement."""
    places: dict[str, tuple[str, int]] = {}  # content hash -> (trajectory, step)
    for trajectory in store.trajectories(ids):
        for i, (step, key) in enumerate(zip(trajectory.steps, trajectory.content_hashes(), strict=True)):
            if step.action.kind != "malformed":
                places.setdefault(key, (trajectory.id, i))
    drawn = random.Random(seed).sample(list(places.values()), min(count, len(places)))
    trajectories = store.trajectories([id_ for id_, _ in drawn])
    views = (trajectory.view(i) for trajectory, (_, i) in zip(trajectories, drawn, strict=True))
    return [LabelledStep(view, tuple(tools_by_task[view.task]), None, "", "human") for view in views]


def _step(line: str, number: int, where: str, known: Mapping[str, ToolSpec]) -> LabelledStep:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: not a JSON object: {error}") from None
    if not isinstance(row, dict):
        raise ValueError(f"{where}: must be a JSON object, not {type(row).__name__}")

    def fail(key: str, remedy: str) -> ValueError:
        shown = f" = {repr(row[key])[:80]}" if key in row else ""
        return ValueError(f"{where}: key {key!r}{shown}: {remedy}")

    def text(key: str, default: str | None = None) -> str:
        value = row.get(key, default)
        if not isinstance(value, str):
            raise fail(key, "must be text" if key in row else "is missing")
        return value

    if unknown := sorted(set(row) - set(KEYS)):
        raise fail(unknown[0], f"is unknown; the keys are {', '.join(KEYS)}")
    history: Any = row.get("history")
    if not isinstance(history, list) or not all(
        isinstance(turn, list) and len(turn) == 2 and all(isinstance(one, str) for one in turn) for turn in history
    ):
        raise fail("history", "must be a list of [action_text, observation], empty for a first step")
    tools: Any = row.get("tools")
    if not isinstance(tools, list) or not tools or not all(isinstance(tool, str) and tool in known for tool in tools):
        raise fail("tools", f"must be a list of {', '.join(known)}; tasks.tools names others")
    label = text("label")
    if label not in ("", "GOOD", "BAD"):
        raise fail("label", "must be GOOD or BAD, or empty where it is still to be given")
    if (source := text("source", "")) not in ("", *SOURCES):
        raise fail("source", f"must be one of {', '.join(SOURCES)}")
    view = StepView(text("task"), text("question"), tuple((a, o) for a, o in history), text("action_text"))
    verdict = Verdict(label) if label else None
    return LabelledStep(
        view, tuple(known[name] for name in sorted(set(tools))), verdict, text("kind", ""), source, number
    )
