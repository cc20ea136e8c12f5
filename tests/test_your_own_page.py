"""docs/your_own.md: its files are used as they are, and what it says of mistakes is what comes back."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from support.paths import ROOT

from swirl_fast.config import ConfigError, load
from swirl_fast.formats.tags import parse
from swirl_fast.judges import load_judge
from swirl_fast.stages.build import build_task, opened_tools, task_judge
from swirl_fast.tasks import offered_tools, parts_of
from swirl_fast.tasks.corpus import passages_of
from swirl_fast.tools.toolbox import ToolCall
from swirl_fast.trajectory import StepView

PAGE = (ROOT / "docs" / "your_own.md").read_text(encoding="utf-8")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The files of the page, and a folder of notes."""
    blocks = re.findall(r"`(\w+\.\w+)`[^`]*:\n\n```\w+\n(.*?)```", PAGE, re.DOTALL)
    assert len(blocks) == len(re.findall(r"^```\w+", PAGE, re.MULTILINE)), "every block says which file it is"
    for name, text in blocks:
        (tmp_path / name).write_text(text, encoding="utf-8")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "feet.md").write_text("A foot is 0.3048 metres.\n\nA yard has 3 feet.", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_tools_and_a_reward(folder: Path) -> None:
    config = load("units.yaml", ["tasks.tools=[units.py:convert, units.py:Shelf, calculator]"])
    task = build_task(config)
    (question,) = task.questions("train")
    offered = offered_tools(task)
    call = '<convert>{"value": 10, "to": "m"}</convert>'
    action = parse(call, offered[task.name])
    with opened_tools(config, task, offered) as boxes, task_judge(config, task) as judge:
        box = boxes[task.name]
        box.begin("t", question)
        assert box.call([ToolCall("t", "convert", action.arguments)]) == ["3.05"]
        assert box.call([ToolCall("t", "take", {"count": n}) for n in (3, 4)]) == ["7", "3"]
        box.end("t")
        history = ((call, f"{action.argument} -> 3.05"),)
        steps = [
            StepView(task.name, question.text, *rest)
            for rest in (((), call), (history, "<answer>3.05</answer>"), (history, "<answer>3</answer>"),
                         ((), "<math_exp>10 * 0.3</math_exp>"))
        ]  # fmt: skip
        assert [judgement.reward for judgement in judge.judge(steps)] == [1.0, 1.0, 0.0, 0.2]


def test_tasks_and_a_corpus(folder: Path) -> None:
    made = build_task(load("units.yaml", ["tasks.kind=made.py:Lengths"]))
    question = made.questions("train")[9]
    assert question.text == "How many metres are 10 feet?" and made.score(question, "3.05").reward == 1
    config = load("corpus.yaml")
    assert passages_of(config, build_task(config)) == [
        ("feet", "A foot is 0.3048 metres."),
        ("feet", "A yard has 3 feet."),
    ]
    config = load("mix.yaml")
    task = build_task(config)
    assert {name: len(part.questions("train")) for name, part in parts_of(task).items()} == {
        "lengths": 1, "chain_sum": 20,
    }  # fmt: skip
    load_judge(config.judge, offered_tools(task))


ROWS = re.findall(r"^\| `(\w+\..*?)` \| `(.*?)` \|$", PAGE, re.MULTILINE)


@pytest.mark.parametrize(("override", "message"), ROWS)
def test_what_comes_back(folder: Path, override: str, message: str) -> None:
    with pytest.raises((ConfigError, ValueError), match=re.escape(message)):
        config = load("units.yaml", [override])
        task = build_task(config)
        with task_judge(config, task):
            pass


def test_every_row_was_read() -> None:
    assert len(ROWS) == 7
