"""SVAMP in its official format, GSM8K's easier questions, generated two-step problems, and training questions that are passed over."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from support.paths import DATA
from support.task_files import RIGHT, texts, write_lines, write_list

from swirl_fast.config import ConfigError, RulesConfig, TasksConfig, load
from swirl_fast.judges.rules import RulesJudge
from swirl_fast.tasks import load_task
from swirl_fast.tasks.scoring import ZERO, number
from swirl_fast.tasks.svamp import HELD_OUT, bare, held_out_rows
from swirl_fast.tasks.two_step import TEMPLATES
from swirl_fast.tools import describe_tools
from swirl_fast.tools.arithmetic import evaluate, render_value
from swirl_fast.trajectory import StepView

STORIES = (
    ("{n} had {a} red marbles and lost {b} of them in the yard", "How many red marbles are left"),
    ("The waiter served {a} tables before lunch and {b} after {n} came", "How many tables were served"),
    ("At the bakery {n} packs rolls into {a} boxes with {b} rolls per box", "How many rolls were packed"),
    ("Snow fell for {a} hours on Monday and {b} hours on Friday says {n}", "For how long did it snow"),
    ("A train with {a} seats carries {b} sleeping passengers and {n}", "How many seats stay empty tonight"),
)
OPERATIONS = "-+*+-"


def rows(names: str = "Ann Ben Cem Dan") -> list[dict[str, Any]]:
    """Every story once for each name, story after story within a name."""
    found = []
    for i, name in enumerate(names.split()):
        for (body, question), operation in zip(STORIES, OPERATIONS, strict=True):
            a, b = 20.0 + i, 3.0 + i
            equation = f"( {a} {operation} {b} )"
            found.append({"ID": f"chal-{len(found) + 1}", "Body": body.format(n=name, a=int(a), b=int(b)) + "."})
            found[-1] |= {"Question": f"{question}?", "Equation": equation, "Answer": float(evaluate(equation))}
    return found


def svamp(path: Path | str, eval_path: Path | str | None = None, limit: int = 0, eval_limit: int = 0, skip: int = 0):
    config = TasksConfig(kind="svamp", path=str(path), limit=limit, eval_limit=eval_limit, skip=skip)
    config.eval_path = eval_path and str(eval_path)
    return load_task(config, 0)


def test_svamp_is_read_as_it_is_published(tmp_path: Path) -> None:
    path = write_list(tmp_path / "SVAMP.json", rows())
    task = svamp(path, path)
    question = task.questions("eval")[0]
    assert question.text == "Ann had 20 red marbles and lost 3 of them in the yard. How many red marbles are left?"
    assert (
        question.answers == ("17",)
        and task.demonstration(question) == ("20 - 3",)
        and task.solution(question) == (17, 17)
    )
    assert (
        task.score(question, "17 marbles") == RIGHT and task.score(question, "18") == task.score(question, None) == ZERO
    )
    assert (task.name, task.tools, len(task.questions("eval")), len(task.questions("train"))) == (
        "svamp",
        ("calculator",),
        20,
        0,
    )


def test_svamp_holds_whole_stories_out_whatever_the_seed_and_the_order(tmp_path: Path) -> None:
    path = write_list(tmp_path / "SVAMP.json", rows())
    task = svamp(path)
    told = {split: {text.split()[-1] for text in texts(task, split)} for split in ("train", "eval")}
    assert not told["train"] & told["eval"] and (len(told["train"]), len(told["eval"])) == (3, 2)
    shuffled = rows()
    random.Random(1).shuffle(shuffled)
    other = svamp(write_list(tmp_path / "other.json", shuffled))
    assert set(texts(other, "eval")) == set(texts(task, "eval"))
    assert texts(svamp(path, limit=3, eval_limit=2), "eval") == texts(task, "eval")[:2]
    assert texts(svamp(path, limit=3, skip=2), "train") == texts(task, "train")[2:5]


@pytest.mark.parametrize("salt", "abcde")  # other words, and so other hashes
@pytest.mark.parametrize("sizes", [[90, 2, 3, 5], [70, *range(1, 8)], [1] * 26, [5] * 20, [40, 40, 20]])
def test_a_large_story_is_not_held_out_where_smaller_ones_will_do(sizes: list[int], salt: str) -> None:
    stories = [" ".join(f"{salt}{chr(97 + story)}{chr(97 + i)}" for i in range(9)) for story in range(len(sizes))]
    told = [story for story, size in zip(stories, sizes, strict=True) for _ in range(size)]
    held_out = held_out_rows(told)
    most, kept_out = 1.5 * HELD_OUT * len(told), {told[at] for at in held_out}
    fitting = sum(size for size in sizes if size <= most)
    assert min(fitting, HELD_OUT * len(told)) / 2 <= len(held_out) <= most
    assert held_out == {at for at, text in enumerate(told) if text in kept_out}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"Body": None}, "field 'Body' = None: must be text"),
        ({"Equation": "76 dollars"}, "field 'Equation' = '76 dollars': must be a calculation of numbers, such as"),
        ({"Equation": "( 5.0 / 0.0 )"}, "field 'Equation' = '( 5.0 / 0.0 )': must be a calculation"),
        ({"Answer": "many"}, "field 'Answer' = 'many': must be a number, such as 51.0"),
        ({"Answer": True}, "field 'Answer' = True: must be a number"),
    ],
)
def test_a_malformed_entry_of_svamp_is_named(tmp_path: Path, wrong: dict[str, Any], message: str) -> None:
    entries = rows()
    entries[2] |= wrong
    path = write_list(tmp_path / "SVAMP.json", entries)
    with pytest.raises(ValueError) as error:
        svamp(path)
    assert str(error.value).startswith(f"{path}, row 3 of 20: ") and message in str(error.value)


def test_svamp_that_is_one_story_cannot_be_split(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="its 2 rows tell one story, .*; give tasks.eval_path"):
        svamp(write_list(tmp_path / "one.json", [rows()[0], rows()[5]]))


def test_an_expression_that_does_not_give_the_answer_is_no_demonstration(tmp_path: Path) -> None:
    entries = rows()
    entries[0]["Answer"] = 1.0
    entries[1]["Equation"] = "20.0"  # nothing to calculate
    path = write_list(tmp_path / "SVAMP.json", entries)
    task = svamp(path, path)
    assert [bool(task.demonstration(question)) for question in task.questions("eval")] == [False, False] + [True] * 18


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("( 76.0 - 25.0 )", "76 - 25"),
        ("( ( 4.0 + 2.0 ) * ( 3.0 - 1.5 ) )", "( 4 + 2 ) * ( 3 - 1.5 )"),
        ("( 4.0 + 2.0 ) * ( 3.0 - 1.0 )", "( 4 + 2 ) * ( 3 - 1 )"),
        ("10.05 + 0.0", "10.05 + 0"),
        ("( 5", "( 5"),
    ],
)
def test_brackets_and_decimals_that_say_nothing_are_dropped(written: str, read: str) -> None:
    assert bare(written) == read


@pytest.mark.skipif(not (DATA / "svamp/SVAMP.json").is_file(), reason="needs the data of development")
def test_the_real_svamp() -> None:
    task = svamp(DATA / "svamp/SVAMP.json")
    train, held_out = task.questions("train"), task.questions("eval")
    assert (len(train), len(held_out)) == (690, 310)
    assert sum(bool(task.demonstration(question)) for question in train) == 687
    for question in train:
        for expression in task.demonstration(question):
            assert evaluate(expression) == number(question.answers[0])


def marked(n: int) -> list[dict[str, str]]:
    """Question i marks i calculations."""
    steps = [" ".join(f"{k}+{k}=<<{k}+{k}={2 * k}>>{2 * k}" for k in range(1, i + 1)) for i in range(n)]
    return [{"question": f"Question {i}?", "answer": f"{one}\n#### {2 * i}"} for i, one in enumerate(steps)]


def test_the_easier_questions_of_gsm8k_are_those_whose_solutions_are_short(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "train.jsonl", marked(6))
    config = TasksConfig(kind="gsm8k", path=path, eval_path=path, limit=0, eval_limit=0, max_solution_steps=2)
    config.path = write_lines(
        tmp_path / "more.jsonl", [*marked(6), {"question": "New?", "answer": "<<1+1=2>>\n#### 2"}]
    )
    easier = load_task(config, 0)
    assert texts(easier, "eval") == ["Question 1?", "Question 2?"] and texts(easier, "train") == ["New?"]
    assert len(easier.held_out) == 6, "a harder question that is held out is not trained on either"
    others = [row | {"question": f"Other {row['question']}"} for row in marked(9)]
    config.path = write_lines(tmp_path / "more.jsonl", others)
    assert texts(load_task(config, 0), "train") == ["Other Question 1?", "Other Question 2?"]
    config.eval_path = write_lines(tmp_path / "hard.jsonl", marked(6)[4:])
    with pytest.raises(ConfigError, match="tasks.max_solution_steps=2: no solution marks so few"):
        load_task(config, 0)
    with pytest.raises(
        ConfigError, match=r"tasks.max_solution_steps=2: only gsm8k's .* leave it out with tasks.kind=svamp"
    ):
        load(None, ["tasks.kind=svamp", f"tasks.path={path}", "tasks.max_solution_steps=2"])


def two_step(seed: int = 0, limit: int = 60, eval_limit: int = 40, **more: Any):
    return load_task(TasksConfig(kind="two_step", limit=limit, eval_limit=eval_limit, **more), seed)


def test_two_step_problems_are_solved_by_their_calculations_and_need_all_their_numbers() -> None:
    task = two_step(limit=200)
    judge = RulesJudge(RulesConfig(), {"two_step": describe_tools(task.tools)})
    for question in task.questions("train"):
        steps = task.demonstration(question)
        assert len(steps) == 2 and task.solution(question) == tuple(map(evaluate, steps))
        assert all(value > 0 and value.denominator == 1 for value in task.solution(question))
        assert task.score(question, render_value(evaluate(steps[1]))) == RIGHT
        history: list[tuple[str, str]] = []
        for action in (*(f"<math_exp>{step}</math_exp>" for step in steps), f"<answer>{question.answers[0]}</answer>"):
            (judged,) = judge.judge([StepView("two_step", question.text, tuple(history), action)])
            assert judged.verdict.name == "GOOD", (question.text, action, judged.reason)
            call = action.removeprefix("<math_exp>").removesuffix("</math_exp>")
            history.append((action, "" if "<" in call else f"{call} -> {render_value(evaluate(call))}"))
    assert (
        len(
            {question.text.translate(str.maketrans("", "", "0123456789"))[-30:] for question in task.questions("train")}
        )
        >= len(TEMPLATES) - 1
    )


def test_two_step_splits_are_disjoint_over_seeds_and_the_seed_decides() -> None:
    tasks = [two_step(seed) for seed in range(3)]
    train, held_out = ({text for task in tasks for text in texts(task, split)} for split in ("train", "eval"))
    assert not train & held_out and len(train) > 150
    assert texts(two_step(1), "train") == texts(tasks[1], "train") != texts(tasks[2], "train")
    assert texts(two_step(1, limit=10, skip=50), "train") == texts(tasks[1], "train")[50:]
    for wrong, message in (
        ({"limit": 0}, "tasks.limit=0: a generator has no end"),
        ({"options": {"a": 1}}, "two_step has none"),
    ):
        with pytest.raises(ConfigError, match=message):
            two_step(0, **wrong)


@pytest.mark.parametrize("kind", ["reasoning_gym", "gsm8k", "qa", "own"])
def test_questions_are_passed_over(kind: str, tmp_path: Path) -> None:
    config = TasksConfig(kind=kind, path=write_lines(tmp_path / "train.jsonl", marked(20)), limit=12)
    if kind == "own":
        (tmp_path / "own.py").write_text(
            "class Mine:\n    name = 'mine'\n    def questions(self, split):\n"
            "        return [{'question': f'{split} {i}?', 'answer': str(i)} for i in range(18)]\n",
            encoding="utf-8",
        )
        config.kind = f"{tmp_path / 'own.py'}:Mine"
    whole = load_task(config, 0)
    config.skip, config.limit = 5, 7
    assert texts(load_task(config, 0), "train") == texts(whole, "train")[5:]
    assert texts(load_task(config, 0), "eval") == texts(whole, "eval")
    if kind != "reasoning_gym":
        config.skip = 40
        with pytest.raises(ConfigError, match="tasks.skip=40: .* has no more training questions"):
            load_task(config, 0)
