"""Evaluations side by side: means, their intervals as bars, and what training changed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from swirl_fast.intervals import difference_interval
from swirl_fast.outputs.text import is_number, show
from swirl_fast.report.charts import interval_bar
from swirl_fast.report.inputs import Run
from swirl_fast.report.markup import escape

# Key of the evaluation, name, unit, direction that is better (0: neither; None: no change is shown), explanation.
ROWS = (
    ("accuracy", "Accuracy", "%", 1, "answers that equal a gold answer"),
    ("judge_accuracy", "Accuracy by the judge", "%", 1, "answers that the outcome judge finds equal to a gold answer"),
    ("process_label", "Mean process label", "%", 1, "steps judged GOOD, averaged within, then across trajectories"),
    ("f1", "Token F1", "%", 1, "overlap of answer and gold answer"),
    ("answered", "Answered", "%", 1, "trajectories that end with an answer"),
    ("malformed", "Malformed", "%", -1, "of all steps"),
    ("repeated", "Repeated calls", "%", -1, "of all steps"),
    ("cut_off", "Cut off", "%", -1, "of all steps: the length limit was reached"),
    ("outside_tag", "Text outside the tag", "%", 0, "of well-formed steps, in characters"),
    ("action_length", "Action length", "", 0, "tokens a step"),
    ("action_length_good", "Length of GOOD steps", "", 0, "tokens"),
    ("action_length_bad", "Length of BAD steps", "", 0, "tokens"),
    ("steps", "Steps", "", 0, "a trajectory"),
    ("unknown", "Steps without a verdict", "", 0, "left out of the process label"),
    ("unknown_answers", "Answers without a verdict", "", 0, "left out of the accuracy by the judge"),
    ("questions", "Questions", "", None, "held out from training"),
    ("trajectories", "Trajectories", "", None, "evaluated"),
    ("temperature", "Temperature", "", None, ""),
    ("seconds", "Time", "s", None, ""),
)
JUDGED = {  # what a judge's verdicts are in -> which judge
    **dict.fromkeys(("process_label", "unknown", "action_length_good", "action_length_bad"), "judge"),
    **dict.fromkeys(("judge_accuracy", "unknown_answers"), "outcome_judge"),
}
REPEATS = {"f1": "accuracy", "trajectories": "questions"}  # rows left out where they equal another one

INTERVALS = (
    "Bars run from 0 to 100%: the dot is the mean, the line its 95% interval (Wilson, questions as units). "
    "The interval of a change is Newcombe's; it ignores that both answered the same questions, which makes it wide."
)


def headline(run: Run) -> str:
    """The table of all evaluations; with base and trained among them that can be compared, a column for the change between these two."""
    evaluations, pair = run.evaluations, run.compared
    if not evaluations:
        return "<p>No evaluation is finished yet.</p>\n"
    rows = []
    for key, name, unit, direction, explanation in ROWS:
        if not any(key in one for one in evaluations.values()):
            continue
        if key in REPEATS and all(one.get(key) == one.get(REPEATS[key]) for one in evaluations.values()):
            continue
        cells = "".join(f"<td>{_cell(one, key, unit)}</td>" for one in evaluations.values())
        if pair:
            differ = key in JUDGED and run.judges_differ(JUDGED[key])
            cells += f"<td>{'' if differ else _change(*pair, key, unit, direction)}</td>"
        first = ' class="first"' if key in ("accuracy", "process_label") else ""
        rows.append(f'<tr{first}><th scope="row">{name}<small>{explanation}</small></th>{cells}</tr>\n')
    several = len({one.get("task") for one in evaluations.values()}) > 1
    head = "".join(
        f'<th scope="col">{escape(name)}{_task(one) if several else ""}</th>' for name, one in evaluations.items()
    )
    if pair:
        between = "<small>base to trained</small>" if len(evaluations) > 2 else ""
        head += f'<th scope="col">change{between}</th>'
    models = "; ".join(
        f"{escape(name)}: <code>{escape(str(one.get('model', '?')))}</code>" for name, one in evaluations.items()
    )
    judges = sorted({escape(str(one["judge"])) for one in evaluations.values() if "judge" in one})
    judged = f" Process judge: <code>{'</code>, <code>'.join(judges)}</code>." if judges else ""
    return (
        '<div class="headline wide" tabindex="0" role="region" aria-label="Evaluations"><table>\n'
        f"<caption>Evaluations on held-out questions</caption>\n<thead><tr><td></td>{head}</tr></thead>\n"
        f"<tbody>\n{''.join(rows)}</tbody></table></div>\n"
        f'{_why_not(run)}<p class="note">{INTERVALS}</p>\n<p class="note">Weights – {models}.{judged}</p>\n'
    )


def _why_not(run: Run) -> str:
    """Why a difference is not shown."""
    if run.incomparable:
        return f'<p class="note">base and trained are not compared: {escape(run.incomparable)}.</p>\n'
    names = {"judge": "process judge", "outcome_judge": "outcome judge"}
    differ = [name for key, name in names.items() if run.compared and run.judges_differ(key)]
    return "".join(
        f'<p class="note">base and trained had not the same {name}: what depends on it is not compared.</p>\n'
        for name in differ
    )


def _task(evaluation: Mapping[str, Any]) -> str:
    return f"<small>{escape(str(evaluation.get('task', '?')))}</small>"


def _interval(evaluation: Mapping[str, Any], key: str) -> tuple[float, float] | None:
    ends = evaluation.get(f"{key}_interval")
    if isinstance(ends, list) and len(ends) == 2 and all(map(is_number, ends)) and is_number(evaluation.get(key)):
        return ends[0], ends[1]
    return None


def _cell(evaluation: Mapping[str, Any], key: str, unit: str) -> str:
    value = evaluation.get(key)
    if not is_number(value):
        return "–"
    text = f'<data value="{value!r}">{show(value, unit)}</data>'
    ends = _interval(evaluation, key)
    if ends is None:
        return text
    return f"{text}{interval_bar(value, *ends)}<small>{show(ends[0], '%')} – {show(ends[1], '%')}</small>"


def _change(base: Mapping[str, Any], trained: Mapping[str, Any], key: str, unit: str, direction: int | None) -> str:
    """The difference, and its 95 % interval where both have one."""
    old, new = base.get(key), trained.get(key)
    if direction is None or not (is_number(old) and is_number(new)):
        return ""
    difference = new - old
    kind = "better" if difference * direction > 0 else "worse" if difference * direction < 0 else ""
    points = f'{100 * difference:+.1f} <small class="unit">points</small>'
    text = points if unit == "%" else f"{difference:+}" if isinstance(difference, int) else f"{difference:+.2f}"
    text = f'<span class="{kind}">{text}</span>' if kind else text
    left, right = _interval(base, key), _interval(trained, key)
    if not (left and right):
        return text
    low, high = (100 * end for end in difference_interval(old, left, new, right))
    chance = ", may be chance" if low <= 0 <= high else ""
    return f"{text}<small>95%: {low:+.1f} to {high:+.1f}{chance}</small>"
