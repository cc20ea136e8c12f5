"""`swirl-fast status`: against what lies in a run's folder, complete, under way, damaged or empty."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support.collected import collected
from support.run_folders import CALL, made, run_folder
from support.runs import environment

from swirl_fast import cli, open_run
from swirl_fast.config import dump, load
from swirl_fast.data.store import Store
from swirl_fast.files import holder, lock
from swirl_fast.outputs.progress import Status

WITHOUT_TORCH = """
import sys
from swirl_fast import cli
assert cli.main(["status", sys.argv[1]]) == 0
assert cli.main(["show", sys.argv[1]]) == 0
from swirl_fast import load_config, open_run, run
with open_run(sys.argv[1]) as opened:
    assert list(opened.steps()) and opened.metrics() and opened.samples(2) and opened.config
loaded = {"torch", "transformers"} & sys.modules.keys()
assert not loaded, loaded
"""


def status(folder: Path) -> Status:
    with open_run(folder) as run:
        return run.status()


def states(found: Status) -> dict[str, str]:
    return {stage.name: stage.state for stage in found.stages}


def test_status_show_and_the_reader_load_neither_torch_nor_transformers(tmp_path: Path) -> None:
    folder = run_folder(tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, str(folder)], env=environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_the_numbers_are_those_of_the_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = run_folder(tmp_path)
    (folder / "evaluations").mkdir()
    base = {"accuracy": 0.25, "accuracy_interval": [0.1, 0.5], "process_label": None, "questions": 20}
    (folder / "evaluations" / "base.json").write_text(json.dumps(base), encoding="utf-8")
    found = status(folder)
    assert found.numbers["questions"] == 3
    assert found.numbers["trajectories"] == {"finished": 6, "wanted": 6}  # the seventh was not asked for
    assert found.numbers["steps"] == {"GOOD": 6, "BAD": 9, "UNKNOWN": 3, "NOT_JUDGED": 0}
    assert found.numbers["filter"] == {"kept": 6, "total": 6}
    assert found.numbers["training"] == {"step": 2, "steps": 4, "reward": 0.25}
    assert found.numbers["evaluations"]["base"]["accuracy"] == 0.25
    assert states(found) == {
        "evaluate base": "done", "collect": "done", "judge": "done", "filter": "unfinished",  # shards/ is not there
        "train": "unfinished", "evaluate trained": "waiting", "report": "waiting",
    }  # fmt: skip
    assert cli.main(["status", "r", f"run.folder={tmp_path}"]) == 0  # by its name
    out = capsys.readouterr().out
    assert cli.main(["status", "--config", str(folder / "config.yaml")]) == 0  # by its settings
    assert capsys.readouterr().out == out
    for text in (
        "3 questions, 6 of 6 trajectories",
        "6 GOOD, 9 BAD, 3 UNKNOWN",
        "step 2 of 4, reward 0.250",
        "25.0% [10.0%, 50.0%]",
    ):
        assert text in out
    assert f"next: swirl-fast filter --config {folder / 'config.yaml'}\n" in out
    assert cli.main(["status", "--json", str(folder)]) == 0
    for_programs = json.loads(capsys.readouterr().out)
    assert for_programs["numbers"] == found.numbers and for_programs["next"] == found.next


def test_what_comes_next_can_be_copied_until_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    overrides = collected(tmp_path / "a run's folder", "filter.kind=none")
    folder = tmp_path / "a run's folder" / "r"
    (folder / "config.yaml").write_text(dump(load(None, overrides)), encoding="utf-8")
    moved = tmp_path / "moved"
    shutil.move(folder, moved)  # the settings name another folder now
    for stage in ("judge", "filter"):
        command = shlex.split(status(moved).next or "")
        assert command[:2] == ["swirl-fast", stage]
        assert cli.main(command[1:]) == 0, capsys.readouterr().err
        assert states(status(moved))[stage] == "done"
    assert (status(moved).next or "").startswith("swirl-fast train --config ")


def test_a_run_without_its_first_stages_goes_on_where_it_is(tmp_path: Path) -> None:
    folder = run_folder(tmp_path)
    for path in (folder / "trajectories.db", folder / "filter.json"):
        path.unlink()
    (folder / "checkpoints" / "step_000002").mkdir(parents=True)
    found = status(folder)
    assert {name: state for name, state in states(found).items() if state != "waiting"} == {
        "collect": "skipped", "judge": "skipped", "filter": "skipped", "train": "unfinished",
    }  # fmt: skip
    assert "goes on from checkpoint step_000002" in str(found) and "swirl-fast train" in (found.next or "")


def test_a_run_on_shards_of_another_begins_with_training(tmp_path: Path) -> None:
    overrides = [f"run.folder={tmp_path}", "run.name=r", f"training.shards={tmp_path / 'elsewhere'}"]
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / "config.yaml").write_text(dump(load(None, overrides, files=False)), encoding="utf-8")
    found = status(tmp_path / "r")
    assert states(found)["filter"] == "skipped" and (found.next or "").startswith("swirl-fast train ")


def test_a_run_that_is_being_written(tmp_path: Path) -> None:
    folder = run_folder(tmp_path, "collect.trajectories_per_question=3")
    (folder / "filter.json").unlink()
    with open_run(folder) as run, Store(folder / "trajectories.db") as writer:
        found = run.status()
        assert states(found)["collect"] == "running" and found.next is None
        assert f"process {os.getpid()} on" in str(found) and "6 of 9 trajectories" in str(found)
        question = writer.questions()[0]
        writer.record([made(question, 2, [CALL, "<answer>5</answer>"])])
        assert "7 of 9 trajectories" in str(run.status())  # by the reader that was open before
        assert run.status().numbers["steps"]["NOT_JUDGED"] == 1  # CALL at the first state is known
    with (folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"step": 3, "rew')  # what a writer has flushed so far
    checkpoints = folder / "checkpoints"
    checkpoints.mkdir()
    held = lock(checkpoints)
    try:
        found = status(folder)
        assert states(found)["train"] == "running" and found.numbers["training"]["step"] == 2
    finally:
        os.close(held)
    assert states(status(folder))["train"] == "unfinished"
    assert states(status(folder))["collect"] == "unfinished"


def test_only_who_holds_a_lock_is_named(tmp_path: Path) -> None:
    assert holder(tmp_path / "none") is None
    held = lock(tmp_path / "x")
    assert holder(tmp_path / "x") == (tmp_path / "x.lock").read_text(encoding="utf-8").strip()
    os.close(held)
    assert holder(tmp_path / "x") is None  # the file names the process, which lives, still


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("trajectories.db", b"no database at all", "use another run.name"),
        ("trajectories.db", b"", "is empty: collect trajectories first"),
        ("filter.json", b"{", "swirl-fast filter writes it again"),
        ("filter.json", b"[]", "instead of an object"),
        ("config.yaml", b"run: [", "is not readable as YAML"),
        ("metrics.jsonl", b"\xff\xfe\x00", "goes on from the newest checkpoint"),
        ("evaluations/base.json", b"", "swirl-fast evaluate --name base writes it again"),
        ("evaluations/base.db", b"not one", "use another run.name"),
    ],
)
def test_a_damaged_file_is_named_with_the_remedy(tmp_path: Path, file: str, content: bytes, said: str) -> None:
    folder = run_folder(tmp_path)
    (folder / file).parent.mkdir(exist_ok=True)
    (folder / file).write_bytes(content)
    text = str(status(folder))
    problem = next(line for line in text.splitlines() if file.split("/")[-1] in line and said in line)
    assert "Traceback" not in text and problem
    assert "train " in text  # the others are shown


def test_an_empty_folder_and_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    assert cli.main(["status", str(tmp_path / "empty")]) == 0
    out = capsys.readouterr().out
    assert f"next: swirl-fast collect --config FILE run.folder={tmp_path} run.name=empty" in out
    assert cli.main(["status", f"run.folder={tmp_path}", "run.name=typo"]) == 2
    assert f"there is no run {tmp_path / 'typo'}; {tmp_path} holds no run; name" in capsys.readouterr().err
    run_folder(tmp_path / "runs")
    assert cli.main(["show", "typo", f"run.folder={tmp_path / 'runs'}"]) == 2
    assert f"no run typo or {tmp_path / 'runs' / 'typo'}; {tmp_path / 'runs'} holds r; name" in capsys.readouterr().err
    assert cli.main(["status", str(tmp_path / "runs")]) == 2  # a folder of runs
    assert f"{tmp_path / 'runs'} is not a run; it holds r: name one of them" in capsys.readouterr().err
    assert cli.main(["status", "a", "b"]) == 2 and "give one run" in capsys.readouterr().err
