"""`collect.source=conversations`: a log through all stages, with a random model, no tool and a reward of a user's own."""

from __future__ import annotations

import json
import re
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
from support import forks
from support.logs import hermes_model
from support.runs import attempt, environment, start

from swirl_fast.api import open_run
from swirl_fast.data.store import Store
from swirl_fast.files import read_json

REWARD = '''
def reward(step):
    """Half of what a random model writes; logged actions are good."""
    if step.action.kind == "tool" or step.action.argument.startswith("It is"):
        return 1.0
    return (len(step.action_text) % 2) / 2
'''
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "add",
            "description": "Adds.",
            "parameters": {
                "type": "object",
                "properties": {"a": {"type": "number"}, "b": {"type": "number"}},
                "required": ["a", "b"],
            },
        },
    }
]


def conversation(i: int) -> dict[str, Any]:
    calls = [{"id": "c", "type": "function", "function": {"name": "add", "arguments": json.dumps({"a": i, "b": 1})}}]
    return {
        "id": f"n{i}",
        "tools": TOOLS if i % 3 else [],
        "messages": [
            {"role": "system", "content": "Use the tool."},
            {"role": "user", "content": f"What is {i} + 1?"},
            {"role": "assistant", "content": "I add.", "tool_calls": calls},
            {"role": "tool", "tool_call_id": "c", "content": str(i + 1)},
            {"role": "assistant", "content": f"It is {i + 1}."},
        ],
    }


def overrides(folder: Path, *more: str) -> list[str]:
    return [
        f"run.folder={folder}",
        "run.name=r",
        f"model.path={folder / 'model'}",
        "actions={format: native, answer: message}",
        "collect.source=conversations",
        f"collect.path={folder / 'log.jsonl'}",
        "tasks.limit=0",
        f"judge.kind={folder / 'mine.py'}:reward",
        "training.steps=2",
        "training.trajectories_per_step=4",
        "training.group_size=4",
        "training.max_action_tokens=12",
        "evaluate={max_action_tokens: 12, temperature: 1.0}",
        "training.learning_rate=1e-3",
        "training.token_budget=2048",
        "training.tensorboard=false",
        *more,
    ]


def make(folder: Path) -> Path:
    rows = [conversation(i) for i in range(40)]
    (folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (folder / "mine.py").write_text(REWARD, encoding="utf-8")
    hermes_model(folder / "model", [json.dumps(rows[:3])])
    return folder


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A whole run, and what it printed."""
    folder = make(tmp_path_factory.mktemp("logs"))
    return folder, start(["run", *overrides(folder)]).stdout


@pytest.mark.parametrize("stage", ["run", "collect", "judge", "filter", "evaluate", "train"])
def test_a_dry_run_of_every_stage(done: tuple[Path, str], stage: str) -> None:
    shown = start([stage, *overrides(done[0]), "--dry-run"]).stdout
    assert re.search(r"^task log: \d+ questions to train on, \d+ held out; tools: add$", shown, re.MULTILINE), shown
    assert shown.endswith(f"nothing was started; `swirl-fast {stage}` without --dry-run does it\n")


def test_a_run_imports_judges_trains_and_compares(done: tuple[Path, str]) -> None:
    folder, shown = done
    summary = read_json(folder / "r" / "summary.json")
    assert summary is not None
    for name in ("base", "trained"):
        row, evaluation = summary[name], read_json(folder / "r" / "evaluations" / f"{name}.json")
        assert evaluation is not None and row["accuracy"] is None and "accuracy" not in evaluation
        low, high = row["process_label_interval"]
        assert 0 <= low <= row["process_label"] <= high <= 1 and row["questions"] > 0
        assert evaluation["states"] == 2 * row["questions"] and set(evaluation["by_task"]) == {"log", "log-2"}
        assert 0 < evaluation["malformed"] < 1
        values = [one["process_label"] for one in evaluation["by_question"].values()]
        assert sum(values) / len(values) == pytest.approx(row["process_label"])
    held_out = {f"n{i}" for i in range(40)} & set(evaluation["by_question"])
    with open_run(folder / "r") as run:
        questions = [question.id for question in run.questions()]
        assert len(questions) + len(held_out) == 40 and not held_out & set(questions)
        readings = list(run.trajectories())
        assert all(reading.good == "2 of 2 GOOD" and reading.matches is None for reading in readings)
        (first, *_) = readings
        assert first.trajectory.steps[0].action.tool == "add" and first.trajectory.steps[0].observation is not None
        assert {sample["verdict"] for step in run.sample_steps() for sample in run.samples(step)} >= {"GOOD", "BAD"}
        assert str(run.status()).count("done") >= 6
    assert "accuracy" in shown and (folder / "r" / "report.html").is_file()
    assert "collect: 40 trajectories" not in shown and "collect: " in shown


def test_a_second_run_does_nothing_again(done: tuple[Path, str]) -> None:
    folder, _ = done
    before = (folder / "r" / "summary.json").read_bytes()
    start(["run", *overrides(folder)])
    assert (folder / "r" / "summary.json").read_bytes() == before


def test_it_can_be_shown_and_handed_on(done: tuple[Path, str], tmp_path: Path) -> None:
    folder, _ = done
    run = str(folder / "r")
    shown = start(["show", run, "--of", "base", "--limit", "2"]).stdout
    assert "What is" in shown
    assert (
        "I add." in start(["show", run, "--limit", "1"]).stdout
        or "I add." in start(["show", run, "--question", "n1"]).stdout
    )
    for kind in ("messages", "steps", "prm", "jsonl"):
        start(["dataset", run, "--as", kind, "--out", str(tmp_path / kind)])
    row = json.loads((tmp_path / "messages" / "messages.jsonl").read_text(encoding="utf-8").splitlines()[0])
    assert [m["content"] for m in row["messages"][:2]] == ["Use the tool.", row["messages"][1]["content"]]
    assert row["messages"][1]["content"].startswith("What is")


def contents(path: Path) -> list[Any]:
    """But log-probs, whose last digits depend on what was computed beside them."""
    with Store(path, writable=False) as store:
        return [(one.id, one.tokens.tolist(), one.finish, [s.text for s in one.steps]) for one in store.trajectories()]


def test_an_import_and_an_evaluation_that_were_interrupted_go_on(done: tuple[Path, str], tmp_path: Path) -> None:
    """Of both a part is there, as a kill between two batches leaves it."""
    folder, _ = done
    make(tmp_path)
    shutil.rmtree(tmp_path / "model")
    shutil.copytree(folder / "model", tmp_path / "model")
    start(["collect", *overrides(tmp_path, "tasks.limit=3")])
    start(["evaluate", "--of", "base", *overrides(tmp_path, "tasks.eval_limit=1")])
    assert len(contents(tmp_path / "r" / "trajectories.db")) == 3
    start(["collect", *overrides(tmp_path)])
    start(["evaluate", "--of", "base", *overrides(tmp_path)])
    for name in ("trajectories.db", "evaluations/base.db"):
        assert contents(tmp_path / "r" / name) == contents(folder / "r" / name)


KILLED = """
import os, signal, sys
from swirl_fast import cli
from swirl_fast.rollouts.logged import LogWriter
from swirl_fast.stages import roll_out

roll_out.BATCH = 8
count = LogWriter._count

def killed_at_the_twentieth(writer, trajectory, where):
    count(writer, trajectory, where)
    if where.endswith(":20"):
        os.kill(os.getpid(), signal.SIGKILL)

LogWriter._count = killed_at_the_twentieth
cli.main(sys.argv[1:])
"""


def test_an_import_that_was_killed_goes_on(done: tuple[Path, str], tmp_path: Path) -> None:
    folder, _ = done
    make(tmp_path)
    shutil.rmtree(tmp_path / "model")
    shutil.copytree(folder / "model", tmp_path / "model")
    killed = forks.Fork(["-c", KILLED, "collect", *overrides(tmp_path)], environment())
    assert killed.wait() == -signal.SIGKILL, killed.printed()
    assert 8 <= len(contents(tmp_path / "r" / "trajectories.db")) < 20
    start(["collect", *overrides(tmp_path)])
    assert contents(tmp_path / "r" / "trajectories.db") == contents(folder / "r" / "trajectories.db")


def test_another_log_is_another_run(done: tuple[Path, str], tmp_path: Path) -> None:
    folder, _ = done
    shutil.copytree(folder / "r", tmp_path / "r")
    (tmp_path / "log.jsonl").write_text(
        "".join(json.dumps(conversation(i)) + "\n" for i in range(41)), encoding="utf-8"
    )
    given = [one.replace(f"run.folder={folder}", f"run.folder={tmp_path}") for one in overrides(folder)]
    refused = attempt(["collect", *given, f"collect.path={tmp_path / 'log.jsonl'}"])
    assert refused.returncode != 0 and "log.path" in refused.stderr and "another run.name" in refused.stderr


def test_imitation_needs_no_judge_of_fresh_actions(done: tuple[Path, str], tmp_path: Path) -> None:
    folder, _ = done
    shutil.copytree(
        folder / "r", tmp_path / "r", ignore=shutil.ignore_patterns("model", "checkpoints", "metrics.jsonl", "samples")
    )
    given = [one.replace(f"run.folder={folder}", f"run.folder={tmp_path}") for one in overrides(folder)]
    start(["train", *given, "algorithm.name=sft", "algorithm.kl_coef=0"])
    assert (tmp_path / "r" / "model" / "config.json").is_file()
