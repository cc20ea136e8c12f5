"""`run`: what it checks before it starts, and what it says at the end."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest
from support.runs import attempt, overrides


@pytest.mark.parametrize(
    ("missing", "settings", "install"),
    [
        ("s3fs", ["filter.upload=s3://bucket/x"], "s3://bucket/x needs a package that is not there"),
        ("gcsfs", ["training.shards=gs://b/x"], "pip install gcsfs"),
        (
            "peft",
            ["model.lora.rank=4"],
            "model.lora.rank=4: the package peft is missing; run: pip install 'swirl-fast[lo",
        ),
        ("wandb", ["training.wandb=mine"], "training.wandb=mine: the package is missing; run: pip install wandb"),
    ],
)
def test_a_missing_package_is_found_before_any_work(
    missing: str,
    settings: list[str],
    install: str,
    tmp_path: Path,
    tiny_model: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == missing else real(name, *more))
    monkeypatch.setitem(sys.modules, missing, None)
    for stage in ["run", *["filter"] * (missing == "s3fs")]:
        done = attempt([stage, *overrides(tmp_path, tiny_model, *settings)])
        assert done.returncode in (1, 2) and install in done.stderr, done.stderr
        assert not list(tmp_path.iterdir())


def test_a_run_that_had_nothing_to_learn_from_says_so_at_its_end(tmp_path: Path, tiny_model: Path) -> None:
    """Random weights: no action is well-formed."""
    short = ("training.steps=2", "tasks.limit=2", "tasks.eval_limit=1", "collect.trajectories_per_question=2")
    done = attempt(["run", *overrides(tmp_path, tiny_model, *short, "training.trajectories_per_step=2")])
    assert done.returncode == 0, done.stderr
    table = done.stdout.rpartition("mean process label")[2]
    assert "no step had a gradient from rewards: all actions of a state had the same reward (0.00" in table
    assert "a warm-up with algorithm.name=sft" in table


def test_settings_that_training_would_refuse_are_refused_before_the_stages_before_it(
    tmp_path: Path, tiny_model: Path
) -> None:
    short = ("training.steps=1", "tasks.limit=2", "tasks.eval_limit=1", "collect.trajectories_per_question=2")
    settings = overrides(tmp_path, tiny_model, *short, "training.trajectories_per_step=2")
    assert attempt(["run", *settings]).returncode == 0
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    for changed, said in {
        "judge.rules.coverage=full": "judge was ",
        "training.group_size=3": "group_size was 4",
    }.items():
        for more in ([], ["--dry-run"]):
            done = attempt(["run", *settings, changed, *more])
            assert done.returncode == 2 and said in done.stderr, done.stderr
            assert "was trained with other settings" in done.stderr and "evaluate" not in done.stdout
            assert ("The judge's name says what it is made of" in done.stderr) == ("judge" in changed)
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    fewer = [setting for setting in settings if not setting.startswith("training.steps")]
    (checkpoint,) = (tmp_path / "r" / "checkpoints").glob("step_0*")
    state = json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))
    (checkpoint / "state.json").write_text(json.dumps({**state, "step": 2}), encoding="utf-8")
    assert attempt(["run", *settings, "--dry-run"]).returncode == 0, "the model is there: no checkpoint is asked for"
    (tmp_path / "r" / "model" / "trained.json").rename(tmp_path / "trained.json")
    done = attempt(["run", *fewer, "training.steps=1", "--dry-run"])
    assert done.returncode == 2 and "is at step 2 already; ask for at least as many" in done.stderr
    (tmp_path / "trained.json").rename(tmp_path / "r" / "model" / "trained.json")
    (checkpoint / "state.json").write_text(json.dumps(state), encoding="utf-8")
    assert attempt(["run", *settings]).returncode == 0, "what is there is gone on with"
