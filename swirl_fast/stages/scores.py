"""The numbers of an evaluation: held-out questions, scored against gold answers and judged by process.

Accuracy is the exact match of the task (numeric equality, or the official normalisation). Intervals are Wilson's at 95 % with
the questions as units; for a mean of values in [0, 1] that are not all 0 or 1 this is conservative.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from swirl_fast.formats.format import Format
from swirl_fast.formats.tags import TAGS
from swirl_fast.intervals import wilson
from swirl_fast.rollouts.gaming import GamingSigns, gaming_metrics
from swirl_fast.tasks.task import SHOWN_TASKS, Question, Score, Task
from swirl_fast.trajectory import Trajectory
from swirl_fast.verdict import Judgement


@dataclass(frozen=True, slots=True)
class _TrajectoryScore:
    """score: of its answer. label: mean reward of its steps with a verdict, the share of GOOD where
    rewards are not graded; None without one. judged_right: by the outcome judge."""

    question_id: str
    task: str
    score: Score
    label: float | None
    judged_right: bool | None


class EvaluationScores:
    """Takes the trajectories of an evaluation one after the other, and holds no more of each than its scores."""

    def __init__(self, task: Task, questions: Sequence[Question], form: Format = TAGS) -> None:
        self._task, self._form = task, form
        self._questions = {question.id: question for question in questions}
        self._scores: list[_TrajectoryScore] = []
        self._signs = GamingSigns()
        self._steps = self._malformed = self._unknown = self._answered = 0

    def add(
        self,
        trajectory: Trajectory,
        judgements: Sequence[Judgement],
        judged_right: bool | None = False,
        first: int = 0,
    ) -> None:
        """judgements: one a step. judged_right: whether the outcome judge found the answer right, None for UNKNOWN; False where there is no
        answer, or no such judge. first: steps before this one are not the policy's, and are not counted."""
        steps, judgements = trajectory.steps[first:], judgements[first:]
        verdicts = [judgement.verdict for judgement in judgements]
        known = [judgement.reward for judgement in judgements if judgement.reward is not None]
        label = sum(known) / len(known) if known else None
        score = self._task.score(self._questions[trajectory.question_id], trajectory.answer)
        self._scores.append(_TrajectoryScore(trajectory.question_id, trajectory.task, score, label, judged_right))
        self._steps += len(steps)
        self._malformed += sum(step.action.kind == "malformed" for step in steps)
        self._unknown += len(verdicts) - len(known)
        self._answered += trajectory.answer is not None
        actions = [step.action for step in trajectory.steps]
        for i, (step, verdict) in enumerate(zip(steps, verdicts, strict=True), first):
            self._signs.observe(step.text, step.action, step.end - step.start, verdict, actions[:i], self._form)

    def summary(self, outcome_judge: bool = False) -> dict[str, Any]:
        """JSON-able numbers. outcome_judge: with the accuracy by the outcome judge.

        process_label: mean reward of the steps with a verdict, the share of GOOD where rewards are not graded, averaged within, then
        across trajectories (paper, section 4); None, as its interval, where no step has one. unknown: steps without a verdict.
        malformed: share of all steps. answered: share of trajectories with an answer. action_length … repeated: see
        rollouts.gaming.gaming_metrics; None for nothing to average.
        """
        scores = self._scores
        accuracy, accuracy_interval = _mean_over_questions(scores, lambda one: one.score.exact_match)
        process_label, process_interval = _mean_over_questions(scores, lambda one: one.label)
        count = max(len(scores), 1)
        signs = {
            name: None if math.isnan(value) else value for name, value in gaming_metrics(vars(self._signs)).items()
        }
        return {
            "questions": len({one.question_id for one in scores}),
            "trajectories": len(scores),
            "accuracy": accuracy,
            "accuracy_interval": accuracy_interval,
            "f1": _mean_over_questions(scores, lambda one: one.score.f1)[0],
            "precision": _mean_over_questions(scores, lambda one: one.score.precision)[0],
            "recall": _mean_over_questions(scores, lambda one: one.score.recall)[0],
            "process_label": process_label,
            "process_label_interval": process_interval,
            "malformed": self._malformed / max(self._steps, 1),
            **signs,
            "answered": self._answered / count,
            "steps": self._steps / count,
            "unknown": self._unknown,
            **(self._judged_accuracy() if outcome_judge else {}),
            **self._by_task(),
        }

    def _by_task(self) -> dict[str, Any]:
        """The main numbers of each task, where there are several."""
        groups: dict[str, list[_TrajectoryScore]] = {}
        for one in self._scores:
            groups.setdefault(one.task, []).append(one)
        if not 1 < len(groups) <= SHOWN_TASKS:
            return {}
        found = {}
        for task, group in sorted(groups.items()):
            accuracy, accuracy_interval = _mean_over_questions(group, lambda one: one.score.exact_match)
            label, label_interval = _mean_over_questions(group, lambda one: one.label)
            found[task] = {
                "questions": len({one.question_id for one in group}),
                "accuracy": accuracy,
                "accuracy_interval": accuracy_interval,
                "process_label": label,
                "process_label_interval": label_interval,
            }
        return {"by_task": found}

    def by_question(self) -> dict[str, dict[str, Any]]:
        """Question id -> its means: accuracy, f1, process_label (None where no step has a verdict), and its task where there are several.
        For comparisons in pairs."""
        several = 1 < len({one.task for one in self._scores}) <= SHOWN_TASKS
        groups: dict[str, list[_TrajectoryScore]] = {}
        for one in self._scores:
            groups.setdefault(one.question_id, []).append(one)
        return {
            id_: {
                "accuracy": _mean_over_questions(group, lambda one: one.score.exact_match)[0],
                "f1": _mean_over_questions(group, lambda one: one.score.f1)[0],
                "process_label": _mean_over_questions(group, lambda one: one.label)[0],
                **({"task": group[0].task} if several else {}),
            }
            for id_, group in groups.items()
        }

    def _judged_accuracy(self) -> dict[str, Any]:
        """Share of right answers by the outcome judge: no answer is wrong, an answer it gave no verdict on is left out and counted. None
        where nothing is left."""
        mean, ends = _mean_over_questions(
            self._scores, lambda one: None if one.judged_right is None else float(one.judged_right)
        )
        unknown = sum(one.judged_right is None for one in self._scores)
        return {"judge_accuracy": mean, "judge_accuracy_interval": ends, "unknown_answers": unknown}


def _mean_over_questions(
    scores: Sequence[_TrajectoryScore], value_of: Callable[[_TrajectoryScore], float | None]
) -> tuple[float, list[float]] | tuple[None, None]:
    """Mean over questions of the mean over a question's trajectories, and its interval; trajectories without a value are left out, and
    where none has one there is no mean."""
    by_question: dict[str, list[float]] = {}
    for one in scores:
        if (value := value_of(one)) is not None:
            by_question.setdefault(one.question_id, []).append(value)
    means = [sum(values) / len(values) for values in by_question.values()]
    if not means:
        return None, None
    return sum(means) / len(means), list(wilson(sum(means), len(means)))


def accuracy_table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """Evaluations side by side, as text: the ends of 95 % intervals in brackets, a dash where there is nothing to average, and the
    numbers of steps and answers that their judges gave no verdict on."""

    def share(row: Mapping[str, Any], key: str) -> str:
        if row.get(key) is None:
            return f"{'–':>6}"
        low, high = row[f"{key}_interval"]
        return f"{row[key]:6.1%} [{low:.1%}, {high:.1%}]"

    answers = any("judge_accuracy" in row for row in rows.values())  # judged by an outcome judge
    tasks = {f"  {task}" for row in rows.values() for task in row.get("by_task", {})}
    width = max(12, *(len(name) + 2 for name in [*rows, *tasks]))
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
        for task, one in row.get("by_task", {}).items():
            judged = f"{'':26}{'':11}" if answers else ""
            line = f"{'  ' + task:{width}}{share(one, 'accuracy'):26}{judged}{share(one, 'process_label'):26}"
            lines.append(f"{line}{'':37}{one['questions']:11d}")
    return "\n".join(lines)
