"""The outcome judge: is a trajectory's answer right, by the answer key? Exact comparison by the task, or a model (judges/model) whose
verdicts are kept in the store, under the hash of question, key and answer.

    filter.outcome, evaluate.outcome = exact | judge; the model's endpoint is judge.model, whatever judge.kind is
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from swirl_fast.config import EndpointConfig
from swirl_fast.data.store import Store
from swirl_fast.judges.cached import judge_missing
from swirl_fast.judges.model import GivenAnswer, ModelJudge, model_answer_judge_id
from swirl_fast.tasks.task import Question
from swirl_fast.trajectory import Trajectory
from swirl_fast.verdict import Verdict


def judge_outcomes(
    config: EndpointConfig, store: Store, trajectories: Sequence[Trajectory], questions: Mapping[str, Question]
) -> None:
    """Asks about every answer without a verdict, and keeps the verdicts; questions: by id. Raises ConfigError for an endpoint that
    cannot work."""
    judge = ModelJudge(config)
    try:
        given = {one.content_hash(): one for one in _given(trajectories, questions).values()}
        if store.missing(judge.outcome_id, given):
            judge.check()
        judge_missing(store, judge.outcome_id, given, judge.judge_answers, "judge answers")
    finally:
        judge.close()


def outcome_judge_id(config: EndpointConfig) -> str:
    """Under which the answers' verdicts are stored. Opens no connection."""
    return model_answer_judge_id(config)


def read_outcomes(
    config: EndpointConfig, store: Store, trajectories: Sequence[Trajectory], questions: Mapping[str, Question]
) -> dict[str, bool | None]:
    """Trajectory id -> is its answer right; None where the judge gave no verdict or was not asked. Only trajectories with an answer."""
    keys = {id_: one.content_hash() for id_, one in _given(trajectories, questions).items()}
    stored = store.verdicts(outcome_judge_id(config), keys.values())
    right = {Verdict.GOOD: True, Verdict.BAD: False, Verdict.UNKNOWN: None}
    return {id_: right[stored[key].verdict] if key in stored else None for id_, key in keys.items()}


def _given(trajectories: Sequence[Trajectory], questions: Mapping[str, Question]) -> dict[str, GivenAnswer]:
    return {
        t.id: GivenAnswer(questions[t.question_id].text, questions[t.question_id].answers, t.answer)
        for t in trajectories
        if t.answer is not None
    }
