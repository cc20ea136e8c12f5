"""`swirl-fast config` and docs/configuration.md say of every setting what it is, from one source."""

from __future__ import annotations

import dataclasses
import shlex
import subprocess
import sys
from typing import get_args

import pytest
from support.paths import ROOT
from support.runs import environment

from swirl_fast import cli
from swirl_fast.config import Config, load
from swirl_fast.config.describe import document, meaning, meanings
from swirl_fast.config.fields import Range, sections, settings
from swirl_fast.config.judge_schema import COVERAGES
from swirl_fast.config.schema import CHECKPOINTING, TASKS
from swirl_fast.experiments import grid
from swirl_fast.tasks import _KINDS
from swirl_fast.tools.search.dense import INDEXES


def shown(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert cli.main(["config", *arguments]) == 0
    return capsys.readouterr().out


def test_every_setting_and_every_section_has_its_meaning() -> None:
    for key, entry in settings(Config).items():
        assert len(meaning(entry)) > 10 and meaning(entry)[-1] in ".…", key
    for name, section in sections(Config).items():
        assert section.__doc__ and not section.__doc__.startswith(section.__name__), name
    described = {field for kind, field in meanings(grid) if kind == "ExperimentSpec"}
    assert described == {entry.name for entry in dataclasses.fields(grid.ExperimentSpec)}


def test_the_document_is_what_the_generator_writes() -> None:
    path = ROOT / "docs" / "configuration.md"
    assert path.read_text(encoding="utf-8") == document(), (
        "python -m swirl_fast.config.describe > docs/configuration.md"
    )


def test_a_section_lists_all_of_its_keys_and_those_of_its_sections(capsys: pytest.CaptureFixture[str]) -> None:
    for name in sections(Config):
        text = shown(capsys, name)
        for key, entry in settings(Config).items():
            assert (f"\n{key}=" in text) == key.startswith(f"{name}."), key
            assert " ".join(meaning(entry).split()) in " ".join(text.split()) or not key.startswith(f"{name}.")
    everything = shown(capsys)
    assert all(f"\n{key}=" in everything for key in settings(Config))


def test_a_key_prints_itself_with_what_it_accepts_its_default_and_its_value(
    capsys: pytest.CaptureFixture[str],
) -> None:
    text = shown(capsys, "training.learning_rate", "--config", str(ROOT / "configs" / "quickstart.yaml"))
    assert text.startswith(
        "training.learning_rate=2.0e-05\n    number, above 0; default 1.0e-06\n    Step size of AdamW"
    )
    assert text.count("=") == 1
    text = shown(capsys, "algorithm.name", "algorithm.name=GRPO")
    assert text.startswith("algorithm.name=grpo\n    one of reinforce, rloo, grpo, ppo, raft, sft; default rloo\n")
    assert shown(capsys, "run.name", "run.name=${nope}").startswith('run.name="${nope}"\n')
    # data files are not asked for
    text = shown(capsys, "tasks.path", "--config", str(ROOT / "configs" / "gsm8k.yaml"))
    assert text.startswith("tasks.path=train.jsonl\n    text or null; default null\n")
    assert shown(capsys, "engine.launch.port").startswith("engine.launch.port=30000\n    whole number, in [1, 65535];")


def test_changed_shows_what_differs_from_the_defaults_and_can_be_given_back(capsys: pytest.CaptureFixture[str]) -> None:
    file = str(ROOT / "configs" / "quickstart.yaml")
    lines = shown(capsys, "--changed", "--config", file, "training.steps=7").splitlines()
    assert "training.steps=7" in lines and not any(line.startswith("training.betas=") for line in lines)
    assert load(None, shlex.split(" ".join(lines)), files=False) == load(file, ["training.steps=7"], files=False)
    assert cli.main(["config", "training", "--changed"]) == 0
    said = capsys.readouterr()
    assert said.out == "" and "nothing differs from the defaults" in said.err


def test_a_reader_that_has_seen_enough_is_no_error() -> None:
    line = f"{sys.executable} -m swirl_fast config | head -n 1"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, env=environment(), timeout=60)
    assert done.stdout.startswith("# run: ") and done.stderr == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trainin"], "trainin: no section and no key; did you mean training?"),
        (["training.lr"], "did you mean training.learning_rate?"),
        (["training", "lr=1"], "lr (command line): unknown key; did you mean training.learning_rate?"),
        (["training", "--config", "no.yaml"], "--config no.yaml: no such file"),
    ],
)
def test_what_is_not_there_is_an_error(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["config", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_accepted_words_are_those_that_have_code() -> None:
    known = settings(Config)
    assert known["tasks.kind"].known == TASKS == tuple(_KINDS)
    assert known["search.index"].words == tuple(INDEXES)
    assert known["judge.rules.coverage"].words == COVERAGES
    assert known["training.activation_checkpointing"].words == CHECKPOINTING
    assert get_args(known["filter.kind"].kind) == known["filter.kind"].words


@pytest.mark.parametrize(
    ("limits", "text", "accepted", "refused"),
    [
        ({"minimum": 1}, "at least 1", [1, 1.5, [1, 2]], [0.5, 0, float("inf"), float("nan"), [1, 0]]),
        ({"above": 0}, "above 0", [1e-9], [0, -1]),
        ({"above": 0, "endless": True}, "above 0", [float("inf")], [float("nan"), 0]),
        ({"above": 0, "maximum": 1}, "in (0, 1]", [0.5, 1], [0, 1.1]),
        ({"minimum": 0, "below": 1}, "in [0, 1)", [0, 0.9], [1, -0.1]),
        ({"minimum": 1, "maximum": 65535}, "in [1, 65535]", [1, 65535], [0, 65536]),
        ({"length": 2}, "", [[1, 2]], [[1], [1, 2, 3]]),
        ({}, "", [-1e9, "x", None, True], [float("inf")]),
    ],
)
def test_ranges(limits: dict, text: str, accepted: list, refused: list) -> None:
    limit = Range(**limits)
    assert str(limit) == text
    assert all(limit.accepts(value) for value in accepted) and not any(limit.accepts(value) for value in refused)
