"""Stage 4: held-out questions, step by step with tools, scored against gold answers and judged by process.

Accuracy is the exact match of the task (numeric equality, or the official normalisation). Intervals are Wilson's at 95 % with
the questions as units; for a mean of values in [0, 1] that are not all 0 or 1 this is conservative.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from swirl_fast.config import ConfigError
from swirl_fast.data.store import Store
from swirl_fast.files import lock
from swirl_fast.intervals import wilson
from swirl_fast.rollouts.collector import as_told
from swirl_fast.rollouts.gaming import GamingSigns, gaming_metrics
from swirl_fast.tasks.task import Question, Task
from swirl_fast.trajectory import Trajectory
from swirl_fast.verdict import Judgement, Verdict

FILES = ("db", "db-wal", "db-shm", "db.lock", "json", "yaml")  # of the evaluation NAME: evaluations/NAME.db and so on


def check_name(name: str) -> None:
    """Raises ConfigError for a name of an evaluation that is no plain file name."""
    if not name or "/" in name or name.startswith("."):
        raise ConfigError(
            f"--name {name}: must be a plain file name, e.g. --name {name.strip('./').replace('/', '-') or 'other'}"
        )


def make_room(folder: Path, name: str, wanted: Mapping[str, Any]) -> None:
    """Renames the files of an evaluation of other weights or settings to NAME-K, so that a longer training is evaluated anew and
    nothing is lost; one that was renamed so before, and is the wanted one, becomes NAME again.

    wanted: the fingerprint of the evaluation that is about to begin.
    """
    path = folder / f"{name}.db"
    stored = _fingerprint(path)
    if path.is_file() and (stored is None or stored == _plain(as_told(stored, wanted))):
        return
    if path.is_file():
        k = next(k for k in range(1, 10_000) if not (folder / f"{name}-{k}.db").exists())
        held = lock(path)  # not away from under a command that writes there
        try:
            _rename(folder, name, f"{name}-{k}")
        finally:
            os.close(held)
        print(f"evaluate: the evaluation {name} was of other weights or settings; it is kept as {name}-{k}")
    for earlier in sorted(folder.glob("*-*.db")):
        if re.fullmatch(re.escape(name) + r"-\d+", earlier.stem) and _fingerprint(earlier) == _plain(wanted):
            if _name_in(earlier.with_name(f"{earlier.stem}.json")) == name:  # and not the name that was asked for
                _rename(folder, earlier.stem, name)
                print(f"evaluate: {earlier.stem} was of these weights and settings; it is the evaluation {name} again")
                return


def _fingerprint(path: Path) -> Any:
    """None for a file that is not there, or that the writer will have something to say about."""
    try:
        with Store(path, writable=False) as store:
            return store.meta().get("evaluation")
    except ValueError:
        return None


def _name_in(path: Path) -> Any:
    try:
        return json.loads(path.read_text())["name"]
    except (OSError, ValueError, LookupError, TypeError):
        return None


def _plain(value: Any) -> Any:
    """As it comes back from JSON."""
    return json.loads(json.dumps(value))


def _rename(folder: Path, old: str, new: str) -> None:
    for ending in FILES:
        if (file := folder / f"{old}.{ending}").exists():
            file.rename(folder / f"{new}.{ending}")


def summarise(
    task: Task,
    questions: Sequence[Question],
    trajectories: Sequence[Trajectory],
    judgements: Mapping[str, Sequence[Judgement]],
    outcomes: Mapping[str, bool | None] | None = None,
) -> dict[str, Any]:
    """JSON-able numbers of one evaluation; judgements: trajectory id -> one a step. outcomes: of the outcome judge, None for UNKNOWN.

    process_label: share of GOOD among the steps with a verdict, averaged within, then across trajectories (paper, section 4); None, as its
    interval, where no step has one. unknown: steps without a verdict.
    malformed: share of all steps. answered: share of trajectories with an answer. action_length … repeated: see
    behaviour.gaming_metrics; None for nothing to average.
    """
    by_id = {question.id: question for question in questions}
    scores = {t.id: task.score(by_id[t.question_id], t.answer) for t in trajectories}
    labels: dict[str, float] = {}
    unknown = 0
    for trajectory in trajectories:
        verdicts = [judgement.verdict for judgement in judgements[trajectory.id]]
        known = [verdict for verdict in verdicts if verdict is not Verdict.UNKNOWN]
        unknown += len(verdicts) - len(known)
        if known:
            labels[trajectory.id] = sum(verdict is Verdict.GOOD for verdict in known) / len(known)
    accuracy, accuracy_interval = _mean(trajectories, {id_: score.exact_match for id_, score in scores.items()})
    process_label, process_interval = _mean(trajectories, labels)
    steps = max(sum(t.num_steps for t in trajectories), 1)
    behaviour = GamingSigns()
    for trajectory in trajectories:
        actions = [step.action for step in trajectory.steps]
        for i, (step, judgement) in enumerate(zip(trajectory.steps, judgements[trajectory.id], strict=True)):
            behaviour.observe(step.text, step.action, step.end - step.start, judgement.verdict, actions[:i])
    return {
        "questions": len({t.question_id for t in trajectories}),
        "trajectories": len(trajectories),
        "accuracy": accuracy,
        "accuracy_interval": accuracy_interval,
        "f1": _mean(trajectories, {id_: score.f1 for id_, score in scores.items()})[0],
        "precision": _mean(trajectories, {id_: score.precision for id_, score in scores.items()})[0],
        "recall": _mean(trajectories, {id_: score.recall for id_, score in scores.items()})[0],
        "process_label": process_label,
        "process_label_interval": process_interval,
        "malformed": sum(s.action.kind == "malformed" for t in trajectories for s in t.steps) / steps,
        **{name: None if math.isnan(value) else value for name, value in gaming_metrics(vars(behaviour)).items()},
        "answered": sum(t.answer is not None for t in trajectories) / max(len(trajectories), 1),
        "steps": steps / max(len(trajectories), 1),
        "unknown": unknown,
        **(_judged_accuracy(trajectories, outcomes) if outcomes is not None else {}),
    }


def by_question(
    task: Task,
    questions: Sequence[Question],
    trajectories: Sequence[Trajectory],
    judgements: Mapping[str, Sequence[Judgement]],
) -> dict[str, dict[str, float | None]]:
    """Question id -> its means: accuracy, f1, process_label (None where no step has a verdict). For comparisons in pairs."""
    asked = {question.id: question for question in questions}
    groups: dict[str, list[Trajectory]] = {}
    for trajectory in trajectories:
        groups.setdefault(trajectory.question_id, []).append(trajectory)
    found: dict[str, dict[str, float | None]] = {}
    for id_, own in groups.items():
        numbers = summarise(task, [asked[id_]], own, judgements)
        found[id_] = {key: numbers[key] for key in ("accuracy", "f1", "process_label")}
    return found


def _judged_accuracy(trajectories: Sequence[Trajectory], outcomes: Mapping[str, bool | None]) -> dict[str, Any]:
    """Share of right answers by the outcome judge: no answer is wrong, an answer it gave no verdict on is left out and counted. None where
    nothing is left."""
    values = {
        t.id: float(outcomes.get(t.id, False) or False) for t in trajectories if outcomes.get(t.id, False) is not None
    }
    mean, ends = _mean(trajectories, values)
    return {"judge_accuracy": mean, "judge_accuracy_interval": ends, "unknown_answers": len(trajectories) - len(values)}


def _mean(
    trajectories: Sequence[Trajectory], values: Mapping[str, float]
) -> tuple[float, list[float]] | tuple[None, None]:
    """Mean over questions of the mean over a question's trajectories, and its interval; trajectories without a value are left out, and
    where none has one there is no mean."""
    by_question: dict[str, list[float]] = {}
    for trajectory in trajectories:
        if trajectory.id in values:
            by_question.setdefault(trajectory.question_id, []).append(values[trajectory.id])
    means = [sum(own) / len(own) for own in by_question.values()]
    if not means:
        return None, None
    return sum(means) / len(means), list(wilson(sum(means), len(means)))


def table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """Evaluations side by side, as text: the ends of 95 % intervals in brackets, a dash where there is nothing to average, and the
    numbers of steps and answers that their judges gave no verdict on."""

    def share(row: Mapping[str, Any], key: str) -> str:
        if row.get(key) is None:
            return f"{'–':>6}"
        low, high = row[f"{key}_interval"]
        return f"{row[key]:6.1%} [{low:.1%}, {high:.1%}]"

    answers = any("judge_accuracy" in row for row in rows.values())  # judged by an outcome judge
    width = max(12, *(len(name) + 2 for name in rows))
    head = f"{'':{width}}{'accuracy':26}" + (f"{'by the judge':26}{'unknown':>9}  " if answers else "")
    lines = [
        f"{head}{'mean process label':26}{'unknown':>9}{'malformed':>11}{'repeated':>10}{'steps':>7}{'questions':>11}"
    ]
    for name, row in rows.items():
        line = f"{name:{width}}{share(row, 'accuracy'):26}"
        if answers:
            line += f"{share(row, 'judge_accuracy'):26}{row.get('unknown_answers', '–'):>9}  "
        lines.append(
            f"{line}{share(row, 'process_label'):26}{row['unknown']:9d}{row['malformed']:11.1%}{row['repeated'] or 0:10.1%}"
            f"{row['steps']:7.2f}{row['questions']:11d}"
        )
    return "\n".join(lines)
