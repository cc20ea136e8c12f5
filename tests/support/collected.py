"""A run's store as collect would leave it, without a model."""

from __future__ import annotations

from pathlib import Path

from swirl_fast.config import load
from swirl_fast.data.store import Store
from swirl_fast.formats.tags import parse
from swirl_fast.rollouts.collector import trajectory_ids
from swirl_fast.tasks import load_task
from swirl_fast.tasks.task import Question
from swirl_fast.tools.tool import CALCULATOR
from swirl_fast.trajectory import Finish, Step, Trajectory

ANSWERS = {"right": "$10", "wrong": "12", "silent": "ten or so", "none": None, "again": "$10"}


def trajectory(id_: str, question: Question, answer: str | None) -> Trajectory:
    text = "<math_exp>5+5</math_exp>" if answer is None else f"<answer>{answer}</answer>"
    step = Step(1, 2, text, parse(text, [CALCULATOR]), [0.0], 0, "5+5 -> 10.0" if answer is None else None)
    finish = Finish.STEP_LIMIT if answer is None else Finish.ANSWER
    return Trajectory(id_, question.id, question.task, question.text, 0, 1, [7, 8], [step], finish)


def collected(folder: Path, *more: str) -> list[str]:
    """The overrides of a run, in whose store lies what collect would leave: four trajectories of a step each."""
    run = [f"run.folder={folder}", "run.name=r", "tasks.limit=4", "tasks.eval_limit=1", *more]
    run += ["collect.trajectories_per_question=1"]
    config = load(None, run)
    questions = load_task(config.tasks, config.run.seed).questions("train")
    ids = trajectory_ids(questions, 1)
    made = [trajectory(*each) for each in zip(ids, questions, ANSWERS.values(), strict=False)]
    with Store(folder / "r" / "trajectories.db") as store:
        store.add_questions(questions)
        store.record(made)
    return run
