"""Trajectories from worked solutions: grounded, done with the real calculator, and trained on like any other."""

from __future__ import annotations

from pathlib import Path

import pytest

from swirl_fast import cli
from swirl_fast.config import TasksConfig
from swirl_fast.data.store import Store
from swirl_fast.tasks import load_task
from swirl_fast.tasks.solutions import step_expressions
from swirl_fast.tools.numerals import numbers
from swirl_fast.trajectory import Finish


@pytest.mark.parametrize(
    ("question", "solution", "answer", "expected"),
    [
        (
            "48 clips in April, half as many in May?",
            "48/2 = <<48/2=24>>24 in May. 48+24 = <<48+24=72>>72 in all.\n#### 72",
            "72",
            ("48/2", "48+24"),
        ),
        ("64 and 52 pears?", "64 pears + 52 pears = 116 pears.\n#### 116", "116", ("64 + 52",)),
        ("35 apples, 3 times as many kiwis?", "35 × 3 = 105 kiwis, so 105 + 35 = 140", "140", ("35 × 3", "105 + 35")),
        ("At $5 each, 3 of them?", "$5 * 3 = $15", "15", ("5 * 3",)),
        ("4 boxes?", "4 * 17 = 68", "68", ()),  # 17 comes from nowhere
        ("4 boxes of 17?", "4 * 17 = 69", "69", ()),  # wrong
        ("4 boxes of 17, 8 lost?", "4 * 17 = 68, so 60 are left.", "60", ()),  # the last step is in words
        ("4 boxes?", "There are 4 = 4 boxes.", "4", ()),
        ("4 and 17 of 10 cm³?", "Boxes = 4\n(4 + 17) = 21 and (4 + 17)cm³ = 21", "21", ("(4 + 17)",)),
        ("4 and 17?", "4 + 17\n= 21, 21 * 2 = 42", "42", ("4 + 17", "21 * 2")),
    ],
)
def test_the_calculations_of_a_solution(question: str, solution: str, answer: str, expected: tuple[str, ...]) -> None:
    assert step_expressions(question, solution, answer) == expected


@pytest.mark.parametrize("piece", ["1", "1 ", "1,", "1a ", "a ", "= ", "=$ ", "1=", "(1)"])
def test_the_calculations_of_what_is_no_solution(piece: str) -> None:
    """Patterns that try all beginnings and ends of a run of digits would take hours."""
    assert step_expressions("4 boxes?", "5a" + piece * 10_000 + " #### 4", "4") == ()


def settings(folder: Path, model: Path, *more: str) -> list[str]:
    return [
        f"run.folder={folder}",
        "run.name=r",
        f"model.path={model}",
        "tasks.dataset=gsm_symbolic",
        "tasks.limit=24",
        "tasks.eval_limit=2",
        "tasks.examples=0",
        "collect.source=solutions",
        "collect.trajectories_per_question=1",
        "tasks.max_steps=3",
        "filter.kind=none",
        "algorithm.name=sft",
        "algorithm.kl_coef=0",
        "training.steps=3",
        "training.trajectories_per_step=4",
        "training.learning_rate=1e-3",
        "training.tensorboard=false",
        *more,
    ]


def test_demonstrations_are_whole_trajectories_and_teach(tmp_path: Path, tiny_model: Path) -> None:
    arguments = settings(tmp_path, tiny_model)
    for stage in ("collect", "collect", "judge", "filter", "train"):
        assert cli.main([stage, *arguments]) == 0
    task = load_task(TasksConfig(dataset="gsm_symbolic", limit=24, eval_limit=2), 0)
    questions = {question.id: question for question in task.questions("train")}
    with Store(tmp_path / "r" / "trajectories.db", writable=False) as store:
        written = list(store.trajectories(store.ids(finished=True)))
    assert 3 <= len(written) <= 24
    for one in written:
        question = questions[one.question_id]
        one.check()
        assert one.finish is Finish.ANSWER and task.score(question, one.answer).exact_match == 1.0
        *calls, answer = one.steps
        assert [call.action.argument for call in calls] == list(task.demonstration(question))
        assert all(call.observation and call.observation.startswith(f"{call.action.argument} -> ") for call in calls)
        assert numbers(calls[-1].observation.split(" -> ")[1]) == numbers(answer.action.argument)  # type: ignore[union-attr]
    from swirl_fast.metrics import read_metrics

    nll = [row["nll"] for row in read_metrics(tmp_path / "r")]
    assert nll[-1] < 0.8 * nll[0]


def test_a_task_without_worked_solutions_is_refused(
    tmp_path: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["collect", *settings(tmp_path, tiny_model, "tasks.dataset=chain_sum")]) == 2
    assert "collect.source=solutions: no question of chain_sum has a worked solution" in capsys.readouterr().err


def test_recorded_states_that_do_not_fit_are_refused_before_training(
    tmp_path: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The model of the tests has a context of 512 tokens."""
    arguments = settings(tmp_path, tiny_model, "tasks.max_steps=7")
    for stage in ("collect", "judge", "filter"):
        assert cli.main([stage, *arguments]) == 0
    assert cli.main(["train", *arguments]) == 2
    shown = capsys.readouterr().err
    assert "tasks.max_steps=7: trajectory" in shown and "exceeds the model's context of 512" in shown
