"""Numbers by task, where a run has several: of an evaluation and of a training step, on one rank and on two."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from support.scores import scored

from swirl_fast.formats.format import Action
from swirl_fast.stages.scores import accuracy_table
from swirl_fast.tasks.scoring import score_auto
from swirl_fast.tasks.task import Question
from swirl_fast.training.step_metrics import rewards_by_task
from swirl_fast.trajectory import Finish, Step, StepView, Trajectory
from swirl_fast.verdict import Judgement, Verdict


def answered(task: str, number: int, answer: str) -> tuple[Question, Trajectory]:
    question = Question(f"{task}{number}", task, f"{task} {number}?", ("yes",))
    step = Step(1, 2, "", Action("answer", argument=answer), [0.0], 0)
    return question, Trajectory(
        f"{question.id}/0", question.id, task, question.text, 0, 1, np.zeros(2, np.int32), [step], Finish.ANSWER
    )


def test_an_evaluation_of_a_mixture_says_each_tasks_numbers() -> None:
    pairs = [answered("a", 0, "yes"), answered("a", 1, "no"), answered("b", 0, "yes")]
    rewards = [1.0, 0.25, 0.5]
    judgements = {one.id: [Judgement.graded(reward, "")] for (_, one), reward in zip(pairs, rewards, strict=True)}
    task: Any = SimpleNamespace(score=lambda question, answer: score_auto(answer, question.answers))
    summary = scored(task, [q for q, _ in pairs], [t for _, t in pairs], judgements).summary()
    assert summary["process_label"] == sum(rewards) / 3
    by_task = summary["by_task"]
    assert {name: (one["accuracy"], one["process_label"], one["questions"]) for name, one in by_task.items()} == {
        "a": (0.5, 0.625, 2),
        "b": (1.0, 0.5, 1),
    }
    lines = accuracy_table({"base": summary}).split("\n")
    assert [line.split()[0] for line in lines[1:]] == ["base", "a", "b"] and len({len(line) for line in lines}) == 1
    alone = scored(task, [q for q, _ in pairs[:2]], [t for _, t in pairs[:2]], judgements).summary()
    assert "by_task" not in alone


def test_an_evaluation_without_a_step_counts_none() -> None:
    """Where prompts fill the context, say."""
    pairs = [answered("a", 0, "yes"), answered("a", 1, "yes")]
    for _, one in pairs:
        one.steps, one.finish = [], Finish.CONTEXT_LIMIT
    task: Any = SimpleNamespace(score=lambda question, answer: score_auto(answer, question.answers))
    summary = scored(task, [q for q, _ in pairs], [t for _, t in pairs], {one.id: [] for _, one in pairs}).summary()
    assert (summary["trajectories"], summary["steps"], summary["malformed"]) == (2, 0, 0)
    assert summary["repeated"] is None and summary["process_label"] is None
    assert "0.00" in accuracy_table({"base": summary})


def batch(tasks: str, rewards: list[float | None], questions: list[int] | None = None, trajectories: str = "") -> Any:
    judgements = [
        Judgement(Verdict.UNKNOWN, "") if reward is None else Judgement.graded(reward, "") for reward in rewards
    ]
    places = [int(one) for one in trajectories] or range(len(tasks))
    sampled = [
        SimpleNamespace(view=StepView(task, "", (), ""), trajectory=place)
        for task, place in zip(tasks, places, strict=True)
    ]
    return SimpleNamespace(sampled=sampled, judgements=judgements, questions=questions)


def test_rewards_of_a_step_by_task() -> None:
    one_rank: Any = SimpleNamespace(sum=lambda tensor: tensor)
    two_ranks: Any = SimpleNamespace(sum=lambda tensor: tensor + torch.tensor([[0.0, 1.0], [0.0, 0.0], [0.0, 0.0]]))
    given = batch("aaab", [1.0, 0.5, None, 0.25])
    found = rewards_by_task(one_rank, given, ["a", "b", "c"])
    assert found["reward/a"] == 0.75 and found["reward/b"] == 0.25 and np.isnan(found["reward/c"])
    assert rewards_by_task(two_ranks, given, ["a", "b", "c"])["reward/a"] == 0.5
    assert rewards_by_task(one_rank, given, ["a"]) == {}
    whole = batch("aab", [1.0, 1.0, 0.0], questions=[0, 1], trajectories="001")
    assert rewards_by_task(one_rank, whole, ["a", "b"]) == {"reward/a": 1.0, "reward/b": 0.0}
