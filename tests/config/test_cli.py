"""The command line: exit codes, and what is refused before torch is loaded."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from support.paths import ROOT
from support.runs import environment

from swirl_fast import cli
from swirl_fast.config import dump, load

WITHOUT_TORCH = """
import sys
from swirl_fast import cli
code = cli.main(sys.argv[1:])
assert "torch" not in sys.modules and "transformers" not in sys.modules, "loaded for a config that cannot work"
sys.exit(code)
"""


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["train", "training.lr=1"], 2, "did you mean training.learning_rate?"),
        (["collect", "--config", "none.yaml"], 2, "none.yaml: no such file"),
        (["experiment", str(ROOT / "configs" / "warm_up.yaml")], 2, "is the config of a run, not an experiment"),
        (["config", "training.steps"], 0, ""),
    ],
)
def test_a_config_is_checked_before_torch_is_loaded(arguments: list[str], code: int, message: str) -> None:
    command = [sys.executable, "-c", WITHOUT_TORCH, *arguments]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True)
    assert done.returncode == code and message in done.stderr and "Traceback" not in done.stderr, done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--training.steps=3"], "a setting is written without dashes: training.steps=3"),
        (["train", "--frobnicate"], "unknown argument --frobnicate"),
        (["evaluate", "--of", ""], "--of '': must be base, trained, or a Hugging Face folder"),
        (["evaluate", "--name", ""], "--name '': is empty; leave it out, or give a value"),
        (["export", "--out", ""], "--out '': is empty"),
        (["status", ""], "an argument '' is empty"),
        (["judge", "--out", "x"], "--out names the report of --against"),
        (["judge", "--count", "0", "--export-steps", "x"], "--count 0: must be at least 1"),
        (["fly"], "invalid choice: 'fly'"),
        ([], "STAGE"),
    ],
)
def test_a_command_line_that_cannot_work(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["training"], "override training: write it as section.key=value"),
        (["run.seed=1", "--config", "x.yaml", "training.steps"], "--config x.yaml: no such file"),
        (["run.name=a/b"], "run.name=a/b: must be a plain folder name"),
        (["run.name=."], "run.name=.: must be a plain folder name"),
        (["run.name=a\nb"], "run.name=a\nb: must be a plain folder name"),
        ([f"run.name={'ä' * 150}"], f"run.name={'ä' * 150}: must be a plain folder name"),
        (["tasks.options=[1"], "override tasks.options=[1: the value is not readable as YAML"),
        (["model.chat_template=${oc.env:HOME}"], "model.chat_template=${oc.env:HOME}: no such file"),
    ],
)
def test_every_error_of_the_config_is_a_message_and_exit_code_2(
    overrides: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["report", *overrides]) == 2
    assert f"swirl-fast report: {message}" in capsys.readouterr().err


def test_overrides_may_come_after_options(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("training: {steps: 3}\n")
    for arguments in (
        ["training.steps", "training.steps=4", "--config", str(file)],
        ["--config", str(file), "training.steps=4", "training.steps"],
        ["training.steps", "--config", str(file), "training.steps=4"],
    ):
        assert cli.main(["config", *arguments]) == 0
        assert capsys.readouterr().out.startswith("training.steps=4\n")


def test_a_report_shows_a_text_as_it_was_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKEN", "a secret")
    overrides = [f"run.folder={tmp_path}", "run.name=${oc.env:TOKEN}", "judge.model.model=???"]
    config = load(None, overrides)
    assert config.folder == tmp_path / "${oc.env:TOKEN}"
    config.folder.mkdir()
    (config.folder / "config.yaml").write_text(dump(config), encoding="utf-8")
    assert cli.main(["report", *overrides]) == 0
    page = (config.folder / "report.html").read_text(encoding="utf-8")
    assert "${oc.env:TOKEN}" in page and "???" in page and "a secret" not in page
