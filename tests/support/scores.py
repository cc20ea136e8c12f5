"""An evaluation's numbers from trajectories that lie in memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from swirl_fast.stages.scores import EvaluationScores
from swirl_fast.tasks.task import Question, Task
from swirl_fast.trajectory import Trajectory
from swirl_fast.verdict import Judgement


def scored(
    task: Task,
    questions: Sequence[Question],
    trajectories: Sequence[Trajectory],
    judgements: Mapping[str, Sequence[Judgement]],
    outcomes: Mapping[str, bool | None] | None = None,
) -> EvaluationScores:
    """judgements: trajectory id -> one a step. outcomes: trajectory id -> of the outcome judge, of those with an answer."""
    scores = EvaluationScores(task, questions)
    for trajectory in trajectories:
        scores.add(trajectory, judgements[trajectory.id], (outcomes or {}).get(trajectory.id, False))
    return scores
