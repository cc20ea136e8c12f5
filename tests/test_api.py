"""swirl_fast from Python: what the three functions give, against the folder; the page and the notebook about them run as they are."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from support.paths import ROOT
from support.run_folders import CALL, JUDGE, made, run_folder
from support.runs import environment, overrides

import swirl_fast
from swirl_fast import load_config, open_run, run
from swirl_fast.config import ConfigError
from swirl_fast.data.store import Store
from swirl_fast.verdict import Judgement, Verdict


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run named quickstart, for the page and the notebook."""
    base = tmp_path_factory.mktemp("api")
    made_in = run_folder(base)
    (base / "runs").mkdir()
    return made_in.rename(base / "runs" / "quickstart")


def test_importing_the_package_is_cheap() -> None:
    code = "import swirl_fast, sys; swirl_fast.__version__; assert not {'torch', 'numpy', 'yaml'} & sys.modules.keys(); dir(swirl_fast)"
    subprocess.run([sys.executable, "-c", code], env=environment(), check=True)
    assert {"load_config", "open_run", "run"} <= set(dir(swirl_fast))
    with pytest.raises(AttributeError, match="no attribute 'open_runs'"):
        swirl_fast.open_runs  # noqa: B018
    assert (ROOT / "swirl_fast" / "py.typed").is_file() and "py.typed" in (ROOT / "setup.py").read_text(
        encoding="utf-8"
    )


def test_settings_come_from_a_file_a_table_and_overrides(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("training: {steps: 3}\n", encoding="utf-8")
    assert load_config(file).training.steps == load_config({"training": {"steps": 3}}).training.steps == 3
    assert load_config(file, ["training.steps=4"]).training.steps == 4
    with pytest.raises(ValueError, match="did you mean training.learning_rate"):
        load_config({"training": {"lr": 1}})


def test_steps_are_rows_of_the_store(folder: Path) -> None:
    with open_run(folder) as opened, Store(folder / "trajectories.db", writable=False) as store:
        rows = {(row["trajectory"], row["step"]): row for row in opened.steps()}
        assert opened.questions() == store.questions()
        for one in store.trajectories():
            stored = store.verdicts(JUDGE, one.content_hashes())
            for i, (step, key) in enumerate(zip(one.steps, one.content_hashes(), strict=True)):
                row = rows.pop((one.id, i))
                assert (row["question_id"], row["question"], row["task"]) == (one.question_id, one.question, one.task)
                assert (row["kind"], row["tool"], row["argument"]) == (
                    step.action.kind,
                    step.action.tool,
                    step.action.argument,
                )
                assert (row["text"], row["observation"], row["tokens"]) == (
                    step.text.replace("\ud83d", "\ufffd"),
                    step.observation,
                    step.end - step.start,
                )
                assert row["logprob"] == sum(step.logprobs) and row["right"] == (
                    {0: True, 1: False}.get(int(one.id[-1]))
                )
                if step.action.kind == "malformed":
                    assert (row["verdict"], row["reward"]) == ("BAD", 0.0)
                else:
                    assert (row["verdict"], row["reward"], row["reason"]) == (
                        stored[key].verdict.value, stored[key].reward, stored[key].reason,
                    )  # fmt: skip
        assert not rows


def test_metrics_samples_and_settings(folder: Path) -> None:
    with open_run(str(folder)) as opened:
        assert [row["step"] for row in opened.metrics()] == [1, 2] and math.isnan(opened.metrics()[0]["kl"])
        assert opened.sample_steps() == [2] and [row["sample"] for row in opened.samples(2)] == [0, 1, 2, 3]
        assert opened.config.training.steps == 4 and opened.evaluations() == {}
        with pytest.raises(ValueError, match="step_000001.jsonl does not exist: there are those of 1 steps, 2 to 2"):
            opened.samples(1)


def test_another_judge_may_be_asked_for(tmp_path: Path) -> None:
    folder = run_folder(tmp_path)
    with Store(folder / "trajectories.db") as store:
        first = next(store.trajectories(store.ids_of(store.questions()[0].id)))
        store.add_verdicts("other", {first.content_hashes()[0]: Judgement(Verdict.BAD, "so says the other")})
    with open_run(folder) as opened:
        assert [one.verdicts for one in opened.trajectories(ids=[first.id])] == [["GOOD", "GOOD"]]
        assert [one.verdicts for one in opened.trajectories(ids=[first.id], judge="other")] == [["BAD", "NONE"]]


def test_a_run_is_read_while_it_is_written_and_closed(tmp_path: Path) -> None:
    folder = run_folder(tmp_path)
    opened = open_run(folder)
    before = len(list(opened.trajectories()))
    with Store(folder / "trajectories.db") as writer:
        writer.record([made(writer.questions()[1], 5, [CALL, "<answer>1</answer>"])])
        assert len(list(opened.trajectories())) == before + 1
    with pytest.raises(ValueError, match="open for reading only"):
        opened.store().set_meta("x", 1)
    opened.close()
    opened.close()
    with pytest.raises(ValueError, match="is closed: open the run again"):
        list(opened.steps())


def test_a_run_of_somebody_else_can_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = run_folder(tmp_path)
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)  # root may write everywhere
    before = sorted(folder.iterdir())
    with open_run(folder) as opened:
        count = len(list(opened.steps()))
        assert count == 19 and sorted(folder.iterdir()) == before  # no file beside the database, where none can be made
    with Store(folder / "trajectories.db") as writer:
        writer.record([made(writer.questions()[1], 5, [CALL, "<answer>1</answer>"])])
        with open_run(folder) as opened:
            assert len(list(opened.steps())) == count + 2


def test_what_is_not_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is not a folder: check run.folder and run.name"):
        open_run(tmp_path / "none")
    with open_run(tmp_path) as opened:
        assert opened.metrics() == [] and opened.sample_steps() == [] and opened.evaluations() == {}
        with pytest.raises(ValueError, match="collect first"):
            list(opened.steps())
        with pytest.raises(ConfigError, match="the first stage of a run writes it"):
            _ = opened.config
        (tmp_path / "metrics.jsonl").write_bytes(b"\xff\xff")
        with pytest.raises(ValueError, match="metrics.jsonl. is not readable as text"):
            opened.metrics()


def test_a_whole_run_from_python(tmp_path: Path, tiny_model: Path) -> None:
    config = load_config(
        None, [*overrides(tmp_path, tiny_model), "training.steps=1", "tasks.limit=2", "tasks.eval_limit=2"]
    )
    with run(config) as done:
        assert done.folder == config.folder and done.config == config
        assert done.sample_steps() == [1] and {row["step"] for row in done.samples(1)} == {1}
        assert len(done.metrics()) == 1 and done.evaluations().keys() == {"base", "trained"}
        assert {row["right"] for row in done.steps("trained")} <= {True, False, None}
        assert done.status().next is None and {stage.state for stage in done.status().stages} == {"done"}
        assert {one.trajectory.question_id for one in done.trajectories("base")} == {
            one.id for one in done.questions("base")
        }
    with open_run(config) as again:
        assert again.evaluation_names() == ["base", "trained"]


# ---- the page and the notebook


def executed(code: str, where: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=where,
        env={**environment(), "MPLBACKEND": "agg"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_code_of_the_page_runs(folder: Path) -> None:
    pytest.importorskip("pandas")
    (code,) = re.findall(
        r"```python\n(.*?)```", (ROOT / "docs" / "python_api.md").read_text(encoding="utf-8"), re.DOTALL
    )
    out = executed(code, folder.parents[1])
    assert "step 2 of 4, reward 0.250" in out and "malformed" in out and "for a reason" in out


def test_the_notebook_runs(folder: Path) -> None:
    pytest.importorskip("pandas")
    pytest.importorskip("matplotlib")
    notebook = json.loads((ROOT / "examples" / "python_api.ipynb").read_text(encoding="utf-8"))
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert len(cells) > 5 and not any(cell["outputs"] or cell["execution_count"] for cell in cells)
    ends = "\nassert len(steps) == 19 and list(metrics['step']) == [1, 2] and len(samples) == 4 and axes.lines"
    out = executed("\n".join("".join(cell["source"]) for cell in cells) + ends, folder.parents[1])
    assert "gold:" in out
