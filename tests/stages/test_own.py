"""A user's own tool, reward and data, in a folder outside the repository, through every stage as they are started."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import yaml as yaml_text
from support.own import own_folder, teach_calls
from support.runs import attempt, kill_when, start
from support.stores import count_rows
from transformers import AutoTokenizer

from swirl_fast.config import load
from swirl_fast.data import samples
from swirl_fast.data.store import Store
from swirl_fast.metrics import read_metrics


@pytest.fixture(scope="module")
def calling(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that calls the tool."""
    return teach_calls(tmp_path_factory.mktemp("calling"))


@pytest.fixture(scope="module")
def done(calling: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory in which a whole run was made; the folder `mine` beside it holds the user's files."""
    base = tmp_path_factory.mktemp("own")
    own_folder(base / "mine", calling)
    (base / "work").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(base / "work")
        start(["run", *CONFIG])
    return base / "work"


def copied(done: Path, to: Path, *without: str) -> Path:
    """Working directory and files, without parts of the run. Returns the working directory."""
    shutil.copytree(done.parent, to, dirs_exist_ok=True)
    for name in without:
        target = to / "work" / "runs" / "r" / name
        shutil.rmtree(target) if target.is_dir() else target.unlink()
    return to / "work"


TRAINED = ("checkpoints", "model", "samples", "metrics.jsonl")
CONFIG = ("--config", "../mine/mine.yaml")


def trajectories(database: Path) -> list[tuple]:
    with Store(database, writable=False) as store:
        return [
            (t.id, t.finish, t.tokens.tolist(), [(s.text, s.observation) for s in t.steps])
            for t in store.trajectories()
        ]


def test_a_folder_of_ones_own_is_run_from_elsewhere(done: Path, calling: Path) -> None:
    run = done / "runs" / "r"
    with Store(run / "trajectories.db", writable=False) as store:
        collected = list(store.trajectories())
    prompt = AutoTokenizer.from_pretrained(calling).decode(collected[0].tokens[: collected[0].prompt_length].tolist())
    assert 'write <convert>{"n": …, "to": …}</convert>: Turns feet into metres, and metres into feet.' in prompt
    assert 'n (number): the length; to ("m" or "ft"): the unit that is wanted' in prompt
    called = [step for t in collected for step in t.steps if step.action.kind == "tool"]
    assert len(called) > 9 and all(
        step.observation.startswith(f"{step.action.argument} -> ") and "ERROR" not in step.observation
        for step in called
    )
    rewards = [row["reward"] for row in read_metrics(run)]
    assert len(rewards) == 2 and all(0.1 < reward < 1 for reward in rewards)
    assert all(row["grad_norm"] > 0 for row in read_metrics(run)), "rewards must differ, or nothing here is tested"
    assert json.loads((run / "hardware.json").read_text(encoding="utf-8"))["ranks"] == 1
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    assert summary["base"]["questions"] == summary["trained"]["questions"] == 4


def test_two_ranks_train_with_them_as_one(done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work = copied(done, tmp_path, *TRAINED)
    monkeypatch.chdir(work)
    start(["train", *CONFIG], ranks=2)
    for one, two in zip(read_metrics(done / "runs" / "r"), read_metrics(work / "runs" / "r"), strict=True):
        assert two["reward"] == pytest.approx(one["reward"], abs=1e-12)
        assert two["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-3)


def test_a_changed_reward_meets_no_earlier_verdict_and_no_checkpoint(
    done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = copied(done, tmp_path)
    monkeypatch.chdir(work)
    mine = tmp_path / "mine" / "mine.py"
    mine.write_text(mine.read_text(encoding="utf-8").replace("else 0.3", "else 0.2"), encoding="utf-8")
    shown = attempt(["filter", *CONFIG, "filter.kind=process"])
    assert shown.returncode == 1 and "well-formed steps have no verdict by the judge own-reward@" in shown.stderr
    shown = attempt(["train", *CONFIG])
    assert shown.returncode == 2 and "judge" in shown.stderr, shown.stderr
    assert len(read_metrics(work / "runs" / "r")) == 2


def test_an_engine_in_a_process_of_its_own_and_a_batch_ahead(
    done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = copied(done, tmp_path, *TRAINED)
    monkeypatch.chdir(work)
    lag = ["engine.own_process=true", "engine.threads=1", "training.lag=1", "algorithm.importance_cap=2"]
    start(["train", *CONFIG, *lag])
    first, second = read_metrics(work / "runs" / "r")
    assert first["reward"] == pytest.approx(read_metrics(done / "runs" / "r")[0]["reward"], abs=1e-12)
    assert first["seconds_hidden"] > 0 and second["grad_norm"] > 0


def test_an_experiment_finds_them_beside_its_own_file(
    calling: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own_folder(tmp_path / "mine", calling)
    spec = {
        "name": "e",
        "config": "mine.yaml",
        "settings": {"tasks.limit": 3, "tasks.eval_limit": 2, "training.steps": 1},
        "arms": {"graded": {}, "strict": {"judge.kind": "mine.py:strict"}},
        "evaluations": {"in_domain": {}},
        "compare": ["graded", "strict"],
    }
    (tmp_path / "mine" / "grid.yaml").write_text(yaml_text.safe_dump(spec), encoding="utf-8")
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    start(["experiment", "../mine/grid.yaml"])
    cells = [json.loads(one.read_text(encoding="utf-8")) for one in Path("runs/e/cells").glob("*.json")]
    rewards = {cell["arm"]: cell["training"]["reward"] for cell in cells}
    assert rewards.keys() == {"graded", "strict"} and rewards["graded"] != rewards["strict"]


def test_state_of_a_question_survives_a_kill_and_gives_rewards_for_the_outcome(
    calling: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    yaml = str(own_folder(tmp_path / "mine", calling))
    counting = ["--config", yaml, "tasks.tools=[mine/mine.py:Counting]", "collect.temperature=0.6"]
    start(["collect", *counting])
    killed = ["collect", *counting, "run.name=killed", "collect.batch=6"]
    database = tmp_path / "runs" / "killed" / "trajectories.db"

    def begun() -> bool:
        try:
            with Store(database, writable=False) as store:
                return count_rows(store, "steps", "observation IS NOT NULL") >= 6
        except (ValueError, OSError):
            return False

    kill_when(killed, begun)
    with Store(database, writable=False) as store:
        assert store.ids(finished=False)
    shown = start(killed)
    assert "was made again" not in shown.stderr
    expected = trajectories(tmp_path / "runs" / "r" / "trajectories.db")
    assert trajectories(database) == expected
    seen = [text for *_, steps in expected for _, text in steps if text]
    assert any("-> call 1 for What is" in text for text in seen) and any("-> call 2 for" in text for text in seen)
    for stage in ("judge", "filter", "train"):
        start([stage, *counting, "algorithm.reward=outcome", "training.steps=1", "judge.kind=mine/mine.py:strict"])
    (row,) = read_metrics(tmp_path / "runs" / "r")
    assert row["actions"] > 0 and 0 <= row["reward"] <= 1


def test_a_tool_that_always_raises_is_counted_and_stops_nothing(
    calling: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    yaml = str(own_folder(tmp_path / "mine", calling))
    shown = start(["collect", "--config", yaml, "tasks.tools=[mine/mine.py:Broken]"])
    found = trajectories(tmp_path / "runs" / "r" / "trajectories.db")
    observed = [text for *_, steps in found for _, text in steps if text and "KeyError" in text]
    assert observed and all(text.endswith("-> ERROR: KeyError: 'no such unit'") for text in observed)
    count = len(observed)
    assert f"tools: {count} of {count} calls of convert failed; the first: KeyError: 'no such unit' (" in shown.stdout
    assert "mine.py, line" in shown.stdout


def test_several_tasks_with_tools_of_their_own(calling: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own_folder(tmp_path / "mine", calling)
    monkeypatch.chdir(tmp_path)
    mixed = tmp_path / "mine" / "mixed.yaml"
    settings = yaml_text.safe_load((tmp_path / "mine" / "mine.yaml").read_text(encoding="utf-8"))
    lengths = {key: settings["tasks"].pop(key) for key in ("kind", "path", "fields", "tools")}
    sums = {"kind": "reasoning_gym", "options": {"min_terms": 2, "max_terms": 2, "max_digits": 1}, "examples": 1}
    settings["tasks"]["mix"] = [{**lengths, "name": "lengths"}, sums]
    settings["judge.kind"] = "mine.py:strict"
    mixed.write_text(yaml_text.safe_dump(settings), encoding="utf-8")
    for stage in ("collect", "judge", "filter", "train", "evaluate"):
        start([stage, "--config", str(mixed), "training.steps=1"])
    with Store(load(mixed).store, writable=False) as store:
        tools = {
            (t.task, step.action.tool) for t in store.trajectories() for step in t.steps if step.action.kind == "tool"
        }
        assert {t.task for t in store.trajectories()} == {"lengths", "chain_sum"}
    assert ("lengths", "convert") in tools and not {("chain_sum", "convert"), ("lengths", "calculator")} & tools
    (row,) = read_metrics(tmp_path / "runs" / "r")
    by_task = {name: row[f"reward/{name}"] for name in ("lengths", "chain_sum")}
    kept = list(samples.read_samples(tmp_path / "runs" / "r", 1))
    for name, reward in by_task.items():
        rewards = [one.reward for one in kept if one.trajectory.startswith(f"{name}-") and one.reward is not None]
        assert reward == pytest.approx(sum(rewards) / len(rewards)) if rewards else math.isnan(reward)
    assert not all(math.isnan(reward) for reward in by_task.values())
    assert json.loads(Path("runs/r/evaluations/trained.json").read_text(encoding="utf-8"))["questions"] == 4
