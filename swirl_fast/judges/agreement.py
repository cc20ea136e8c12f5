"""How far a judge agrees with labels: the numbers, and how they are printed.

UNKNOWN is not an opinion: it is left out of accuracy, precision, recall and kappa, and its share is reported beside them;
accuracy_unknown_wrong counts it as wrong. GOOD is the positive class: a false positive is a BAD step that the judge calls GOOD, which a
policy is then paid for.

    kappa = (accuracy - chance) / (1 - chance), chance = agreement of two raters with these shares of GOOD who look at nothing
    (Cohen 1960)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from swirl_fast.intervals import wilson
from swirl_fast.judges.labels import LabelledStep
from swirl_fast.verdict import Judgement, Verdict

GOOD, BAD, UNKNOWN = Verdict.GOOD, Verdict.BAD, Verdict.UNKNOWN
SHOWN = 10  # disagreements that are printed; the file holds all
WIDTH = 100  # characters of a text that are printed


def agreement(steps: Sequence[LabelledStep], judgements: Sequence[Judgement]) -> dict[str, Any]:
    """JSON-able; judgements: one a step. Numbers whose denominator is 0 are None. Raises ValueError for a step without a label."""
    if any(step.label is None for step in steps):
        raise ValueError("a step without a label: leave those out first")
    pairs = list(zip(steps, judgements, strict=True))

    def split(key: Callable[[LabelledStep], str]) -> dict[str, Any]:
        names = sorted({key(step) for step in steps})
        return {name: _measures([pair for pair in pairs if key(pair[0]) == name]) for name in names}

    return {
        **_measures(pairs),
        "by_task": split(lambda step: step.view.task),
        "by_tool": split(lambda step: "+".join(spec.name for spec in step.tools)),
        "by_source": split(lambda step: step.source or "not told"),
        "by_kind": split(lambda step: step.kind or "not told"),
        "disagreements": [_disagreement(*pair) for pair in pairs if pair[1].verdict is not pair[0].label],
    }


def _measures(pairs: Sequence[tuple[LabelledStep, Judgement]]) -> dict[str, Any]:
    count = {label: {v: 0 for v in Verdict} for label in (GOOD, BAD)}
    for step, judgement in pairs:
        assert step.label is not None, "agreement() refuses these"
        count[step.label][judgement.verdict] += 1
    tp, fn, fp, tn = count[GOOD][GOOD], count[GOOD][BAD], count[BAD][GOOD], count[BAD][BAD]
    known, right = tp + fn + fp + tn, tp + tn
    chance = _ratio((tp + fn) * (tp + fp) + (fp + tn) * (fn + tn), known * known)
    return {
        "steps": len(pairs),
        "labelled_good": tp + fn + count[GOOD][UNKNOWN],
        "accuracy": _ratio(right, known),
        "accuracy_interval": list(wilson(right, known)),
        "accuracy_unknown_wrong": _ratio(right, len(pairs)),
        "precision": _ratio(tp, tp + fp),
        "recall": _ratio(tp, tp + fn),
        "false_positives": fp,
        "false_negatives": fn,
        "kappa": None if chance in (None, 1.0) else (_ratio(right, known) - chance) / (1 - chance),
        "unknown": len(pairs) - known,
        "unknown_share": _ratio(len(pairs) - known, len(pairs)),
        "confusion": {label.value: {v.value: n for v, n in row.items()} for label, row in count.items()},
    }


def _ratio(part: int, whole: int) -> Any:
    return part / whole if whole else None


def _disagreement(step: LabelledStep, judgement: Judgement) -> dict[str, Any]:
    assert step.label is not None, "agreement() refuses these"
    return {
        "line": step.line,
        "task": step.view.task,
        "kind": step.kind,
        "label": step.label.value,
        "verdict": judgement.verdict.value,
        "reward": judgement.reward,
        "reason": judgement.reason,
        "question": step.view.question,
        "history": [list(turn) for turn in step.view.history],
        "action_text": step.view.action_text,
    }


def describe(report: dict[str, Any], shown: int = SHOWN) -> str:
    """The report as text, with the first `shown` disagreements."""
    low, high = report["accuracy_interval"]
    lines = [
        f"{report['steps']} labelled steps, {report['labelled_good']} of them GOOD",
        f"accuracy {_percent(report['accuracy'])} [{low:.1%}, {high:.1%}] of the steps with a verdict, "
        f"{_percent(report['accuracy_unknown_wrong'])} with UNKNOWN counted as wrong; Cohen's kappa {_number(report['kappa'])}",
        f"GOOD: precision {_percent(report['precision'])}, recall {_percent(report['recall'])}; "
        f"{report['false_positives']} false positives, {report['false_negatives']} false negatives",
        f"UNKNOWN: {report['unknown']} ({_percent(report['unknown_share'])})",
        *_confusion_table(report["confusion"]),
    ]
    for title, key in (("task", "by_task"), ("tool", "by_tool"), ("source", "by_source"), ("kind", "by_kind")):
        if key == "by_kind" or len(report[key]) > 1:
            lines += _accuracy_table(title, report[key])
    wrong = report["disagreements"]
    lines += ["", f"{len(wrong)} disagreements" + (f", the first {shown}" if len(wrong) > shown else "")]
    for disagreement in wrong[:shown]:
        lines += _describe_disagreement(disagreement)
    return "\n".join(lines)


def _confusion_table(confusion: dict[str, dict[str, int]]) -> list[str]:
    head = f"{'label':10}" + "".join(f"{'judged ' + v.value:>16}" for v in Verdict)
    rows = (f"{label:10}" + "".join(f"{row[v.value]:16d}" for v in Verdict) for label, row in confusion.items())
    return ["", head, *rows]


def _accuracy_table(title: str, parts: dict[str, dict[str, Any]]) -> list[str]:
    wide = max(map(len, (title, *parts))) + 2
    lines = ["", f"{title:{wide}}{'steps':>7}{'GOOD':>7}{'accuracy':>10}{'false +':>9}{'false -':>9}{'UNKNOWN':>9}"]
    for name, part in parts.items():
        lines.append(
            f"{name:{wide}}{part['steps']:7d}{part['labelled_good']:7d}{_percent(part['accuracy']):>10}"
            f"{part['false_positives']:9d}{part['false_negatives']:9d}{part['unknown']:9d}"
        )
    return lines


def _describe_disagreement(step: dict[str, Any]) -> list[str]:
    lines = [f"  line {step['line']}, {step['kind'] or step['task']}: label {step['label']}, judged {step['verdict']}"]
    for name in ("question", "action_text", "reason"):
        text = " ".join(step[name].split())
        lines.append(f"    {name.split('_')[0]:9}{text[:WIDTH]}{'…' if len(text) > WIDTH else ''}")
    return lines


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{share:.1%}"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"
