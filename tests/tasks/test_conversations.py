"""A log in the place of a task: its parts, what is held out, what is left out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from swirl_fast.config import Config, ConfigError, load
from swirl_fast.tasks import offered_tools, open_task, parts_of
from swirl_fast.tasks.conversations import Conversations


def tool(name: str, **properties: Any) -> dict[str, Any]:
    return {"name": name, "description": f"{name}s", "parameters": {"type": "object", "properties": properties}}


def log(question: str, *more: Any, **fields: Any) -> dict[str, Any]:
    said = more or ({"role": "assistant", "content": f"About {question}."},)
    return {"messages": [{"role": "user", "content": question}, *said], **fields}


def calling(name: str, **arguments: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": name, "arguments": arguments}}]}


def settings(folder: Path, *more: str) -> Config:
    given = [
        "collect.source=conversations",
        f"collect.path={folder / 'log.jsonl'}",
        "actions.format=native",
        "actions.answer=message",
    ]
    return load(
        None,
        [
            *given,
            "tasks.limit=0",
            "tasks.eval_limit=0",
            "judge.kind=model",
            "judge.model.url=http://127.0.0.1:9/v1",
            *more,
        ],
    )


def opened(folder: Path, rows: list[Any], *more: str) -> Conversations:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (folder / "log.jsonl").write_text("\n".join(lines), encoding="utf-8")
    task = open_task(settings(folder, *more))
    assert isinstance(task, Conversations)
    return task


def texts(task: Conversations, split: Any) -> list[str]:
    return [question.text for question in task.questions(split)]


def test_conversations_with_the_same_opening_lie_on_one_side(tmp_path: Path) -> None:
    """Whatever the order of the log; what was logged later moves few."""
    rows = [
        log(f"q{i}", {"role": "assistant", "content": f"try {k}"}, id=f"c{i}-{k}") for i in range(40) for k in range(3)
    ]
    task = opened(tmp_path, rows)
    train, held_out = set(texts(task, "train")), set(texts(task, "eval"))
    assert not train & held_out and len(train | held_out) == 40 and len(held_out) == 4
    assert len(task.questions("train")) == 3 * len(train) and len(task.questions("eval")) == 3 * len(held_out)
    pairs = list(task.conversations("train"))
    assert [question for question, _ in pairs] == list(task.questions("train"))
    assert all(read.question == question.text and read.id == question.id for question, read in pairs)
    assert set(texts(opened(tmp_path, list(reversed(rows))), "eval")) == held_out
    grown = opened(tmp_path, [*rows, *(log(f"more {i}", id=f"m{i}") for i in range(40))])
    assert 16 <= len(grown.questions("eval")) <= 18 and len(held_out & set(texts(grown, "eval"))) >= 3


def test_duplicates_are_left_out_and_never_on_both_sides(tmp_path: Path) -> None:
    rows = [log(f"q{i}") for i in range(30)]
    task = opened(tmp_path, [*rows, *rows, *rows[:3]])
    assert len(task.questions("train")) + len(task.questions("eval")) == 30
    assert task.notes == [
        f"33 conversations of {tmp_path / 'log.jsonl'} come a second time and are left out",
        "3 of 30 conversations are held out; collect.eval_path gives them a file of their own",
    ]
    ids = [question.id for split in ("train", "eval") for question in task.questions(split)]  # type: ignore[arg-type]
    assert len(set(ids)) == 30 and all(id_.startswith("log-") for id_ in ids)


def test_where_all_have_one_opening_the_whole_decides(tmp_path: Path) -> None:
    rows = [log("Hello", {"role": "assistant", "content": f"Hello {i}"}) for i in range(30)]
    task = opened(tmp_path, rows)
    assert task.questions("eval") and len(task.questions("train")) + len(task.questions("eval")) == 30


@pytest.mark.parametrize(
    ("openings", "least", "most"),
    [
        ({"Hi": 99, "x": 1}, 10, 10),
        ({"Hi": 60, **{f"q{i}": 1 for i in range(40)}}, 10, 10),
        ({"Hi": 45, "Hello": 45, **{f"q{i}": 1 for i in range(10)}}, 10, 10),
        ({f"q{i}": 30 if i < 3 else 1 for i in range(30)}, 10, 15),
        ({f"q{i}": 4 for i in range(5)}, 4, 4),
        ({"a": 33, "b": 34, "c": 33}, 33, 33),
        ({"a": 50, "b": 50}, 50, 50),
    ],
)
def test_about_a_tenth_is_held_out_whatever_they_begin_with(
    tmp_path: Path, openings: dict[str, int], least: int, most: int
) -> None:
    rows = [
        log(opening, {"role": "assistant", "content": f"{opening} {i}"})
        for opening in openings
        for i in range(openings[opening])
    ]
    task = opened(tmp_path, rows)
    held_out = len(task.questions("eval"))
    assert least <= held_out <= most and held_out + len(task.questions("train")) == len(rows)
    both = set(texts(task, "train")) & set(texts(task, "eval"))
    assert both <= {"Hi"} and f"{held_out} of {len(rows)} conversations are held out" in task.notes[-1]
    assert sorted(texts(opened(tmp_path, rows[::-1]), "eval")) == sorted(texts(task, "eval"))


def test_a_held_out_file_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "held.jsonl").write_text("\n".join(json.dumps(log(f"q{i}")) for i in range(3, 6)), encoding="utf-8")
    task = opened(tmp_path, [log(f"q{i}", id=i) for i in range(5)], f"collect.eval_path={tmp_path / 'held.jsonl'}")
    assert (texts(task, "train"), texts(task, "eval")) == (["q0", "q1", "q2"], ["q3", "q4", "q5"])
    assert "2 conversations have the opening of a held-out one" in task.notes[0]
    with pytest.raises(ConfigError, match="every conversation is also held out"):
        opened(tmp_path, [log("q3")], f"collect.eval_path={tmp_path / 'held.jsonl'}")


def test_a_part_for_each_set_of_tools(tmp_path: Path) -> None:
    a, b = tool("a", x={"type": "number"}), tool("b")
    rows = [
        log("q0", tools=[a]),
        log("q1", tools=[a, b]),
        log("q2", tools=[tool("a")]),
        log("q3", tools=[a]),
        log("q4"),
        log("q5", calling("c", y=1)),
    ]
    task = opened(tmp_path, rows)
    assert list(parts_of(task)) == ["log", "log-2", "log-3", "log-4"]
    offered = offered_tools(task)
    assert [[spec.name for spec in specs] for specs in offered.values()] == [["a"], ["a", "b"], ["a"], ["c"]]
    of = {question.text: question.task for split in ("train", "eval") for question in task.questions(split)}  # type: ignore[arg-type]
    assert of == {"q0": "log", "q1": "log-2", "q2": "log-3", "q3": "log", "q4": "log-4", "q5": "log-4"}
    assert offered["log"][0].identity != offered["log-3"][0].identity
    (open_,) = offered["log-4"]  # called, and described nowhere: any arguments
    assert open_.parameters["additionalProperties"] is True
    assert opened(tmp_path, rows, "tasks.name=mine").name == "mine"


def test_limits_are_said(tmp_path: Path) -> None:
    task = opened(tmp_path, [log(f"q{i}") for i in range(60)], "tasks.limit=5", "tasks.eval_limit=1")
    assert len(task.questions("train")) == 5 and len(task.questions("eval")) == 1
    assert ["tasks.limit=5" in task.notes[1], "tasks.eval_limit=1" in task.notes[2]] == [True, True]


def test_broken_rows_stop_the_reading_or_are_counted(tmp_path: Path) -> None:
    rows = [log("q0"), "{", log("q1"), {"messages": []}, log("q2"), log("q3", id="a"), log("q4", id="a")]
    with pytest.raises(ValueError, match=r"log\.jsonl:2: is not valid JSON.*collect\.broken_lines=skip"):
        opened(tmp_path, rows)
    task = opened(tmp_path, rows, "collect.broken_lines=skip")
    assert len(task.questions("train")) + len(task.questions("eval")) == 4
    assert task.notes[0].startswith("3 lines cannot be read and are skipped: ")
    for shown in (
        "log.jsonl:2: is not valid JSON",
        "log.jsonl:4: messages: holds no message",
        "log.jsonl:7: id = 'a': an earlier",
    ):
        assert shown in task.notes[0]


@pytest.mark.parametrize(
    ("rows", "shown"),
    [
        ([], "holds no conversation"),
        (["{"], "not valid JSON"),
        ([log("q0")], "1 conversation(s) cannot be split"),
    ],
)
def test_logs_that_cannot_be_used(tmp_path: Path, rows: list[Any], shown: str) -> None:
    with pytest.raises(ConfigError) as error:
        opened(tmp_path, rows, "collect.broken_lines=skip")
    assert shown in str(error.value)


def test_ids_without_what_ids_cannot_have(tmp_path: Path) -> None:
    task = opened(tmp_path, [log(f"q{i}", id=f"repo/issue {i}\n") for i in range(3)])
    assert {question.id for question in task.questions("train")} <= {f"repo_issue {i}" for i in range(3)}


def test_with_tags_calls_stand_in_the_text(tmp_path: Path) -> None:
    more = ("actions.format=tags", "actions.answer=tag", "tasks.tools=[calculator]")
    rows = [log(f"q{i}", {"role": "assistant", "content": "<math_exp>1+1</math_exp>"}) for i in range(3)]
    assert [spec.name for spec in offered_tools(opened(tmp_path, rows, *more))["log"]] == ["calculator"]
    with pytest.raises(
        ValueError, match=r"log\.jsonl:4: has tool_calls, and actions\.format=tags reads calls in the text"
    ):
        opened(tmp_path, [*rows, log("q", calling("c"))], *more)


@pytest.mark.parametrize(
    ("override", "shown"),
    [
        ("collect.path=null", "collect.path=None: collect.source=conversations needs the path of a log"),
        ("collect.path=nowhere.jsonl", "collect.path=nowhere.jsonl: no such file"),
        ("algorithm.reward=outcome", "algorithm.reward=outcome: a log has neither tools that run nor gold answers"),
        ("filter.kind=process_and_outcome", "filter.kind=process_and_outcome: a log has neither"),
        ("evaluate.outcome=judge", "evaluate.outcome=judge: a log has neither"),
        ("judge.kind=rules", "judge.kind=rules: cannot judge the actions of a log"),
        ("tasks.mix=[{kind: reasoning_gym}]", "tasks.mix="),
        ("tasks.skip=3", "tasks.skip=3: the conversations of a log are taken from the first on"),
        ("collect.source=policy", "is read by collect.source=conversations"),
    ],
)
def test_settings_that_a_log_cannot_have(tmp_path: Path, override: str, shown: str) -> None:
    (tmp_path / "log.jsonl").write_text(json.dumps(log("q")), encoding="utf-8")
    with pytest.raises(ConfigError) as error:
        settings(tmp_path, override)
    assert shown in str(error.value)


def test_states_are_evaluated_of_logs_only() -> None:
    with pytest.raises(
        ConfigError, match=r"evaluate\.states=True: only collect\.source=conversations has held-out states"
    ):
        load(None, ["evaluate.states=true"])
