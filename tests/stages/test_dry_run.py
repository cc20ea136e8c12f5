"""`--dry-run`: what it says, that it finds what the stage would find, and that nothing is loaded or written."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from support.labels import labels
from support.runs import attempt, free_port, overrides

from swirl_fast.models import load


@pytest.fixture(autouse=True)
def no_weights(monkeypatch: pytest.MonkeyPatch, done: Path) -> None:
    def loaded(*_: object, **__: object) -> None:
        raise AssertionError("weights are loaded")

    monkeypatch.setattr(load.AutoModelForCausalLM, "from_pretrained", loaded)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """The folder above a run that went through all stages."""
    folder = tmp_path_factory.mktemp("done")
    run = attempt(["run", *overrides(folder, tiny_model, "training.steps=1")])
    assert run.returncode == 0, run.stderr
    labels(folder)
    return folder


@pytest.mark.parametrize("stage", ["run", "collect"])
def test_a_stage_that_can_work(stage: str, tmp_path: Path, tiny_model: Path) -> None:
    done = attempt([stage, *overrides(tmp_path, tiny_model), "--dry-run"])
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[-1] == f"nothing was started; `swirl-fast {stage}` without --dry-run does it"
    assert lines[-2].startswith(f"folder: {tmp_path}/r (new; ")
    if stage == "run":
        assert lines[0].startswith(f"model: {tiny_model}, llama, context ") and "shared prefixes" in lines[0]
        assert lines[1].startswith("memory of a GPU: ") and "GiB a rank" in lines[1]
        assert lines[2].startswith("disk: the model, the checkpoints that training.keep_checkpoints=")
        assert lines[3:6] == [
            "task chain_sum: 6 questions to train on, 6 held out; tools: calculator",
            "collect: 18 trajectories, 3 a question",
            "train: 4 steps of 4 trajectories, 4 actions at each of their states",
        ]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "arguments",
    [
        ["judge"],
        ["judge", "--against", "{done}/labels.jsonl"],
        ["judge", "--export-steps", "{done}/new.jsonl"],
        ["filter"],
        ["train"],
        ["evaluate"],
        ["evaluate", "--of", "{done}/r/model", "--name", "again"],
        ["export", "--checkpoint", "step_000001"],
        ["report"],
    ],
)
def test_a_stage_that_has_what_it_reads(arguments: list[str], done: Path, tiny_model: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in done.rglob("*") if path.is_file()}
    given = [argument.format(done=done) for argument in arguments]
    tried = attempt([*given, *overrides(done, tiny_model, "training.steps=1"), "--dry-run"])
    assert tried.returncode == 0, tried.stderr
    assert tried.stdout.splitlines()[-2].startswith(f"folder: {done}/r (what lies there is gone on with; ")
    assert {path: path.stat().st_mtime_ns for path in done.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["judge", "--against", "/nonexistent.jsonl"], "/nonexistent.jsonl"),
        (["judge", "--against", "{done}/labels.jsonl", "--out", "{done}/labels.jsonl"], "is no report of --against"),
        (["judge", "--export-steps", "{done}/labels.jsonl"], "the file is there already"),
        (["judge", "judge.rules.coverage_by_task={{nosuch: single}}"], "no task here is called nosuch"),
        (["run", "judge.rules.coverage_by_task={{nosuch: single}}"], "no task here is called nosuch"),
        (["evaluate", "--of", "/nonexistent"], "--of /nonexistent: no folder with a config.json"),
        (["evaluate", "--of", "base", "--name", "a/b"], "--name a/b: must be a plain file name"),
        (["export", "--checkpoint", "nosuch"], "nosuch is not a checkpoint; those in"),
        (["export", "--out", "{done}"], "is already there"),
        (["export", "--adapter"], "without model.lora.rank all weights were trained"),
        (["evaluate", "search.corpus={done}/labels.jsonl"], "no tool searches in it; add search to tasks.tools"),
        (["collect", "search.corpus={done}/labels.jsonl"], "no tool searches in it; add search to tasks.tools"),
        (["judge", "run.name=new"], "trajectories.db"),
        (["filter", "run.name=new"], "trajectories.db"),
        (["report", "run.name=new"], "new is not a folder: check run.folder and run.name"),
        (["evaluate", "run.name=new"], "holds no trained model yet; run train first"),
        (["export", "run.name=new"], "is not a checkpoint; those in"),
    ],
)
@pytest.mark.parametrize("dry", ["--dry-run", ""])
def test_what_a_stage_is_given_and_cannot_use_is_said(
    dry: str, arguments: list[str], message: str, done: Path, tiny_model: Path
) -> None:
    """Before any work, as the stage itself says it."""
    stage, *given = (argument.format(done=done) for argument in arguments)
    if not dry and "search.corpus" in arguments[-1]:
        pytest.skip("tools are opened with the engine")
    tried = attempt([stage, *overrides(done, tiny_model, "training.steps=1"), *given, *[dry] * bool(dry)])
    assert tried.returncode in (1, 2) and message in tried.stderr, tried.stderr


def test_what_is_less_than_asked_for_is_said(tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = "".join(f"how much is {i} plus 1?,{i + 1}\n" for i in range(20))
    (tmp_path / "d.csv").write_text(f"question,answer\n{rows}", encoding="utf-8")
    given = ["tasks.kind=qa", f"tasks.path={tmp_path}/d.csv", "tasks.options={}", "tasks.examples=0", "tasks.limit=18"]
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    done = attempt(["run", *overrides(tmp_path, tiny_model, *given), "--dry-run"])
    assert done.returncode == 0, done.stderr
    assert "task: there are 2 held-out questions, and tasks.eval_limit=6 would take more" in done.stdout
    assert "and tasks.limit" not in done.stdout
    assert "; ONLY 0.0 GiB ARE FREE: name another run.folder, or a smaller training.keep_checkpoints" in done.stdout


@pytest.mark.parametrize(
    ("stage", "settings", "message"),
    [
        ("run", ["model.path=/nowhere"], "model.path=/nowhere"),
        ("run", ["filter.upload=s3://bucket/x"], "pip install s3fs"),
        (
            "run",
            ["judge.kind=model", "judge.model.retries=0", "judge.model.url=http://127.0.0.1:{port}/v1"],
            "judge.model.url",
        ),
        ("train", [], "has no collection yet: run collect, judge and filter first"),
        ("collect", ["run.folder={tmp}/file"], "is a file; name a folder"),
    ],
)
def test_what_cannot_work_is_said_as_the_stage_says_it(
    stage: str, settings: list[str], message: str, tmp_path: Path, tiny_model: Path
) -> None:
    (tmp_path / "file").touch()
    given = [setting.format(port=free_port(), tmp=tmp_path) for setting in settings]
    done = attempt([stage, *overrides(tmp_path, tiny_model), *given, "--dry-run"])
    assert done.returncode in (1, 2) and message in done.stderr, done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
