"""A file of labelled steps."""

from __future__ import annotations

from pathlib import Path

from swirl_fast.judges.labels import LabelledStep, write_labels
from swirl_fast.tools.tool import CALCULATOR
from swirl_fast.trajectory import StepView
from swirl_fast.verdict import Verdict

SUM = "Calculate 12 + 34 - 5."


CALL = ("<math_exp>12+34-5</math_exp>", "12+34-5 -> 41.0")


def labels(folder: Path) -> Path:
    """Two right verdicts of the rules judge, one wrong, one malformed, one still to be labelled."""
    rows = [
        ((CALL,), "<answer>41</answer>", Verdict.GOOD, "result"),
        ((CALL,), "<answer>40</answer>", Verdict.BAD, "not the result"),
        ((), "<math_exp>12+34</math_exp>", Verdict.BAD, "a strict reader"),
        ((), "no tag", Verdict.BAD, "malformed"),
        ((), "<answer>41</answer>", None, ""),
    ]
    steps = [
        LabelledStep(StepView("sums", SUM, history, action), (CALCULATOR,), label, kind, "human")
        for history, action, label, kind in rows
    ]
    write_labels(folder / "labels.jsonl", steps)
    return folder / "labels.jsonl"
