"""The examples, as their README files say, from a copy of their folders and on a tiny model."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support.paths import ROOT
from support.runs import environment, start

from swirl_fast.config import load
from swirl_fast.formats.tags import parse
from swirl_fast.judges import judge_id
from swirl_fast.metrics import read_metrics
from swirl_fast.stages.build import build_task, opened_tools, task_judge
from swirl_fast.tasks import offered_tools
from swirl_fast.tasks.worked_examples import read_examples
from swirl_fast.tools.tool import observation
from swirl_fast.tools.toolbox import ToolCall
from swirl_fast.trajectory import StepView

SMALL = [
    "tasks.limit=4",
    "tasks.eval_limit=2",
    "tasks.examples=1",
    "collect.trajectories_per_question=2",
    "collect.max_action_tokens=16",
    "training.max_action_tokens=16",
    "training.steps=1",
    "training.trajectories_per_step=4",
    "training.group_size=2",
    "training.tensorboard=false",
]


def commands(folder: Path) -> list[str]:
    """The lines of shell in its README, without comments."""
    text = (folder / "README.md").read_text(encoding="utf-8")
    lines = [line for block in re.findall(r"```\n(.*?)```", text, re.DOTALL) for line in block.splitlines()]
    return [line.partition("#")[0].strip() for line in lines]


@pytest.fixture
def copied(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of an example, which is the working directory."""
    folder = tmp_path / request.param
    shutil.copytree(ROOT / "examples" / request.param, folder, ignore=shutil.ignore_patterns("data", "runs"))
    monkeypatch.chdir(folder)
    return folder


@pytest.mark.parametrize("copied", ["sql"], indirect=True)
def test_sql(copied: Path, tiny_model: Path) -> None:
    make, run = commands(copied)
    assert make.split()[0] == "python" and run.split()[:2] == ["swirl-fast", "run"]
    subprocess.run([sys.executable, *make.split()[1:]], env=environment(), check=True)
    start([*run.split()[1:], *SMALL, f"model.path={tiny_model}"])
    assert len(read_metrics(copied / "runs" / "sql")) == 1
    assert len((copied / "orders.py").read_text(encoding="utf-8").splitlines()) <= 60
    assert len((copied / "sql.yaml").read_text(encoding="utf-8").splitlines()) <= 25
    check_sql(copied)


def check_sql(folder: Path) -> None:
    """The tool on good and bad queries; the worked examples are what it gives; the reward."""
    config = load("sql.yaml")
    task = build_task(config)
    offered = offered_tools(task)
    (spec,) = offered["orders"]
    with opened_tools(config, task, offered) as boxes, task_judge(config, task) as judge:

        def ask(*queries: str) -> list[str]:
            return boxes["orders"].call([ToolCall("t", "sql", {"query": query}) for query in queries])

        for example in read_examples(folder / "worked.jsonl", [spec]):
            argument = parse(example.actions[0], [spec]).argument
            assert observation(argument, *ask(argument)) == example.observations[0]
            assert example.actions[1] == f"<answer>{ask(argument)[0]}</answer>"
            assert all(example.question != q.text for split in ("train", "eval") for q in task.questions(split))
        endless = "WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM c) SELECT count(*) FROM c"
        assert ask(
            "DELETE FROM orders", "ATTACH 'x' AS y", "VACUUM INTO 'x'", endless, "SELECT 1; SELECT 2", "SELEC"
        ) == [
            "ERROR: attempt to write a readonly database",
            "ERROR: too many attached databases - max 0",
            "ERROR: too many attached databases - max 0",
            "ERROR: interrupted",
            "ERROR: You can only execute one statement at a time.",
            'ERROR: near "SELEC": syntax error',
        ]
        assert not (folder / "x").exists() and boxes["orders"].counts["sql"].errors == 0
        assert ask(*["SELECT count(*) FROM orders"] * 20) == ["273"] * 20
        question = task.questions("eval")[0]
        name, item = re.search(r"(Karl|Lena)", question.text)[0], re.search(r"(\w+)( did|\?$)", question.text)
        column = "number" if "buy" in question.text else "price"
        item = question.text.split()[2] if column == "number" else question.text.split()[-1].strip("?")
        right = f"<sql>SELECT sum({column}) FROM orders WHERE item = '{item}' AND name = '{name}'</sql>"
        history = ((right, f"… -> {question.answers[0]}"),)
        answer = f"<answer>{question.answers[0]}</answer>"
        told = [
            ((), right, 1.0), ((), "<sql>SELECT 1</sql>", 0.25), ((), "<sql>SELEC</sql>", 0.0), ((), answer, 0.0),
            (history, answer, 1.0), (history, "<answer>0</answer>", 0.0), (history, right, 0.0),
        ]  # fmt: skip
        steps = [StepView("orders", question.text, history, text) for history, text, _ in told]
        assert [judgement.reward for judgement in judge.judge(steps)] == [reward for *_, reward in told]


@pytest.mark.parametrize("copied", ["own_data"], indirect=True)
def test_own_data(copied: Path, tiny_model: Path, judged: str) -> None:
    with_model, with_rules = commands(copied)
    url = re.search(r"http[^'}]+", judged)[0]
    for line, name in (
        (with_model.partition(" judge.model.url")[0] + f" judge.model.url={url}", "model"),
        (with_rules, "rules"),
    ):
        start([*line.split()[1:], *SMALL, f"model.path={tiny_model}", f"run.name={name}"])
        assert len(read_metrics(copied / "runs" / name)) == 1
        judge = json.loads((copied / "runs" / name / "filter.json").read_text(encoding="utf-8"))["judge"]
        assert name in judge
    task = build_task(load("own_data.yaml"))
    plain = load("own_data.yaml", ["judge.model.rubric="])
    assert judge_id(load("own_data.yaml").judge, {}) != judge_id(plain.judge, {})
    assert len(task.questions("train")) == 18 and task.questions("eval")[0].id == "questions.csv-p18".replace(
        ".csv", ""
    )
    assert all(task.score(q, q.answers[0]).reward == 1 for q in task.questions("train"))
