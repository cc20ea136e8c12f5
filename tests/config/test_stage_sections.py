"""`swirl-fast STAGE --help` names the sections that the stage reads: they are what real stages read, and nothing else is read."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from support.runs import overrides

from swirl_fast import cli, stages
from swirl_fast.config import Config, load

SMALL = [
    *("training.steps=1", "training.group_size=2", "training.trajectories_per_step=2", "training.max_action_tokens=8"),
    *("tasks.limit=2", "tasks.eval_limit=2", "collect.trajectories_per_question=2", "collect.max_action_tokens=8"),
]
SECTIONS = {entry.name for entry in fields(Config)}


class Recorder(Config):
    """Notes every section that is read, but by `dump`, which writes all of them."""

    read: set[str] = set()

    def __getattribute__(self, name: str) -> Any:
        if name in SECTIONS and sys._getframe(1).f_globals["__name__"] != "dataclasses":
            Recorder.read.add(name)
        return super().__getattribute__(name)


@contextmanager
def reading(stage: str, read: dict[str, set[str]]) -> Iterator[None]:
    Recorder.read = set()
    yield
    read.setdefault(stage, set()).update(Recorder.read)


@pytest.fixture(scope="module")
def read(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> dict[str, set[str]]:
    """Stage -> the sections that it reads, over rewards and algorithms."""
    read: dict[str, set[str]] = {}
    folder = tmp_path_factory.mktemp("sections")

    def config(*more: str) -> Recorder:
        made = load(None, overrides(folder, tiny_model, *SMALL, *more))
        return Recorder(**{name: getattr(made, name) for name in SECTIONS})

    with reading("collect", read):
        stages.collect(config())
    with reading("judge", read):
        stages.judge(config())
    with reading("filter", read):
        stages.filter(config())
    coin = folder / "coin.py"
    coin.write_text("def reward(step):\n    return sum(step.action_text.encode()) % 2\n", encoding="utf-8")
    with reading("filter", read):
        # longer actions than training draws: cut off, all would be malformed
        longer = ("training.max_action_tokens=24", f"judge.kind={coin}:reward")
        stages.filter(config("filter.states=variance", *longer))
    with reading("filter", read):
        stages.filter(config())
    with reading("train", read):
        stages.train(config())
    with reading("export", read):
        stages.export(config(), "step_000001")
    for name, more in (("outcome", "algorithm.reward=outcome"), ("sft", "algorithm.name=sft")):
        shards = f"training.shards={folder / 'r' / 'shards'}"
        with reading("train", read):
            stages.train(config(more, shards, f"run.name={name}"))
    with reading("evaluate", read):
        stages.evaluate(config(), "base")
    with reading("report", read):
        stages.report(config())
    logged = log_overrides(folder, tiny_model)
    with reading("collect", read):
        stages.collect(config(*logged))
    with reading("evaluate", read):
        stages.evaluate(config(*logged), "base")
    return read


def log_overrides(folder: Path, model: Path) -> list[str]:
    """Of a log of texts, in which tags are calls."""
    said = {"role": "assistant", "content": "<answer>2</answer>"}
    rows = [{"messages": [{"role": "user", "content": f"{i} + 1?"}, said]} for i in range(4)]
    (folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return [
        "run.name=log",
        "collect.source=conversations",
        f"collect.path={folder / 'log.jsonl'}",
        "tasks.tools=[calculator]",
    ]


@pytest.mark.parametrize("stage", ["collect", "judge", "filter", "train", "export", "evaluate", "report"])
def test_the_sections_of_its_help_are_those_that_a_stage_reads(stage: str, read: dict[str, set[str]]) -> None:
    assert set(cli.READS[stage]) == read[stage]


def test_help_names_the_sections_and_the_command_that_explains_them(capsys: pytest.CaptureFixture[str]) -> None:
    for stage, sections in cli.READS.items():
        with pytest.raises(SystemExit) as stop:
            cli.main([stage, "--help"])
        shown = " ".join(capsys.readouterr().out.split())
        assert stop.value.code == 0 and f"{stage} reads the sections {', '.join(sections)}." in shown
        assert "`swirl-fast config` lists all keys" in shown
    assert set(cli.READS["run"]) == SECTIONS
