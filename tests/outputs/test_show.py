"""`swirl-fast show`: every word of a trajectory is there, and none of it steers the terminal."""

from __future__ import annotations

import shlex
import subprocess
from pathlib import Path

import pytest
from support.run_folders import HOSTILE, run_folder
from support.runs import attempt, command, environment

from swirl_fast import open_run
from swirl_fast.data.samples import read_samples
from swirl_fast.outputs.text import visible


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_folder(tmp_path_factory.mktemp("show"))


def shown(folder: Path, *arguments: str) -> str:
    done = attempt(["show", str(folder), *arguments])
    assert done.returncode == 0, done.stderr
    assert not set(done.stdout) & set(map(chr, [*range(9), *range(11, 32), *range(127, 160), 0x202E, 0xD83D]))
    return done.stdout


def test_the_overview_has_every_kind_and_says_how_to_see_more(folder: Path) -> None:
    out = shown(folder)
    with open_run(folder) as run:
        ids = [one.trajectory.id for one in run.trajectories()]
    assert len(ids) == 7 and all(id_ in out for id_ in ids)
    assert "= gold" in out and "≠ gold" in out and "no answer" in out and "2 of 2 GOOD" in out
    assert "--step 2" in out
    few = shown(folder, "--limit", "2")
    assert sum(id_ in few.split("--trajectory")[0] for id_ in ids) == 2 and "2 of 7" in few


def test_a_trajectory_is_shown_step_by_step(folder: Path) -> None:
    with open_run(folder) as run:
        wrong = next(one for one in run.trajectories() if one.trajectory.id.endswith("/1"))
    out = shown(folder, "--trajectory", wrong.trajectory.id)
    flat = " ".join(out.split())
    assert visible(wrong.trajectory.question) in flat and f"gold {' | '.join(wrong.gold)}" in flat
    for i, step in enumerate(wrong.trajectory.steps):
        assert f"step {i}" in out and " ".join(visible(step.text).split()) in flat
        assert step.observation is None or step.observation in out
    for text in (
        "calls calculator   BAD, reward 0",
        "malformed   BAD, reward 0",
        "UNKNOWN   1 token\n",
        f"answers   BAD, reward {wrong.judgements[3].reward:g}   1 token\n",
        "hardly",
    ):
        assert text in out
    assert "\\x1b[2J" in out and " ".join(visible(HOSTILE).split()) in flat


def test_the_trajectories_of_a_question(folder: Path) -> None:
    with open_run(folder) as run:
        first = run.questions()[0]
    out = shown(folder, "--question", first.id)
    assert [f"{first.id}/{k}" in out for k in (0, 1, 7)] == [True] * 3 and out.count("question  ") == 1
    assert "2 more trajectories of this question: --limit 3" in shown(folder, "--question", first.id, "--limit", "1")


def test_the_samples_of_a_training_step(folder: Path) -> None:
    out = shown(folder, "--step", "2")
    rows = list(map(vars, read_samples(folder, 2)))
    assert f"trajectory {rows[0]['trajectory']}, state 1" in out and out.count("question  ") == 1
    for row in rows:
        assert " ".join(visible(row["text"]).split()) in " ".join(out.split())
    assert "GOOD, reward 1   advantage +0.500   5 tokens" in out and "UNKNOWN   5 tokens" in out
    assert "3 more actions of step 2: --limit 4" in shown(folder, "--step", "2", "--limit", "1")
    assert "sampled no action of trajectory other" in shown(folder, "--step", "2", "--trajectory", "other")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--trajectory", "nobody"], "--trajectory nobody: collected has no such trajectory; there are "),
        (["--question", "nobody"], "--question nobody: collected has no such question; there are "),
        (["--step", "9"], "step_000009.jsonl does not exist: there are those of 1 steps, 2 to 2"),
        (["--of", "base"], "base.db does not exist: the trajectories of this run are collected"),
    ],
)
def test_what_is_not_there_is_said(folder: Path, arguments: list[str], said: str) -> None:
    done = attempt(["show", str(folder), *arguments])
    assert done.returncode == 1 and said in done.stderr


def test_a_question_in_the_place_of_a_trajectory(folder: Path) -> None:
    with open_run(folder) as run:
        id_ = run.questions()[0].id
    assert f"use --question {id_}" in attempt(["show", str(folder), "--trajectory", id_]).stderr


def test_head_ends_it_quietly(folder: Path) -> None:
    text = "x" * 200_000  # more than a pipe holds
    rows = (folder / "samples" / "step_000002.jsonl").read_text(encoding="utf-8").splitlines()
    (folder / "samples" / "step_000003.jsonl").write_text(rows[0].replace("<answer>1", text) + "\n", encoding="utf-8")
    line = f"{shlex.join(command('show', str(folder), '--step', '3'))} | head -n 1"
    done = subprocess.run(["bash", "-o", "pipefail", "-c", line], env=environment(), capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.startswith("training step 3")
    (folder / "samples" / "step_000003.jsonl").unlink()


def test_a_terminal_that_knows_ascii_only(folder: Path) -> None:
    ascii_only = {**environment(), "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    done = subprocess.run(command("show", str(folder)), env=ascii_only, capture_output=True)
    assert done.returncode == 0 and b"\\u2260 gold" in done.stdout, done.stderr
