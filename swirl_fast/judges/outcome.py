"""The outcome judge: is a trajectory's answer right, by the answer key? Exact comparison by the task, or a model (judges/model) whose
verdicts are kept in the store, under the hash of question, key and answer.

    filter.outcome, evaluate.outcome = exact | judge; the model's endpoint is judge.model, whatever judge.kind is
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

from swirl_fast.config import EndpointConfig
from swirl_fast.data.store import Store
from swirl_fast.judges.cached import judge_missing
from swirl_fast.judges.model import GivenAnswer, ModelJudge, model_answer_judge_id
from swirl_fast.tasks.task import Question
from swirl_fast.trajectory import Trajectory
from swirl_fast.verdict import GOOD_FROM, Judgement


def judge_outcomes(
    config: EndpointConfig, store: Store, trajectories: Iterable[Trajectory], questions: Mapping[str, Question]
) -> None:
    """Asks about every answer without a verdict, and keeps the verdicts. trajectories: read one by one. questions: by id. Raises
    ConfigError for an endpoint that cannot work; one that is not needed is not tried."""
    judge = ModelJudge(config)
    checked = False

    def ask(answers: Sequence[GivenAnswer]) -> list[Judgement]:
        nonlocal checked
        if not checked:
            judge.check()
            checked = True
        return judge.judge_answers(answers)

    try:
        answers = ((answer.content_hash(), answer) for _, answer in _given_answers(trajectories, questions))
        judge_missing(store, judge.outcome_id, answers, ask, "judge answers")
    finally:
        judge.close()


def outcome_judge_id(config: EndpointConfig) -> str:
    """Under which the answers' verdicts are stored. Opens no connection."""
    return model_answer_judge_id(config)


def lacks_outcome(judge_id: str, store: Store, trajectory: Trajectory, questions: Mapping[str, Question]) -> bool:
    """Whether the judge would be asked about its answer."""
    return (
        trajectory.answer is not None
        and read_outcomes(judge_id, store, [trajectory], questions).get(trajectory.id) is None
    )


def read_outcomes(
    judge_id: str,
    store: Store,
    trajectories: Iterable[Trajectory],
    questions: Mapping[str, Question],
    min_reward: float = GOOD_FROM,
) -> dict[str, bool | None]:
    """Trajectory id -> is its answer right; None where the judge gave no verdict or was not asked. Only trajectories with an answer.
    judge_id: of `outcome_judge_id`. min_reward: the least probability of an answer that is right, where probabilities are read."""
    keys = {id_: answer.content_hash() for id_, answer in _given_answers(trajectories, questions)}
    stored = store.verdicts(judge_id, keys.values())
    rewards = {id_: stored[key].reward if key in stored else None for id_, key in keys.items()}
    return {id_: None if reward is None else reward >= min_reward for id_, reward in rewards.items()}


def _given_answers(
    trajectories: Iterable[Trajectory], questions: Mapping[str, Question]
) -> Iterator[tuple[str, GivenAnswer]]:
    """(trajectory id, its answer beside the key) of those that have one."""
    for trajectory in trajectories:
        if trajectory.answer is not None:
            question = questions[trajectory.question_id]
            yield trajectory.id, GivenAnswer(question.text, question.answers, trajectory.answer)
