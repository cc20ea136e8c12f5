"""filter.states=variance as a stage: which states are kept, what is written, and that a filter that was killed goes on where it was.

The engine is scripted: what it draws at a state says itself which reward it will get.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from support import html_page, small_models
from support.run_folders import CALL, made
from support.runs import overrides as run_overrides
from support.runs import start
from support.stores import read_samples

from swirl_fast import cli
from swirl_fast.config import load
from swirl_fast.data import store as store_module
from swirl_fast.data.samples import read_samples as read_training_samples
from swirl_fast.data.shards import verify_shards
from swirl_fast.data.store import Store
from swirl_fast.engines.engine import Completion, Request
from swirl_fast.metrics import read_metrics
from swirl_fast.rollouts.collector import trajectory_ids
from swirl_fast.stages import states
from swirl_fast.tasks import load_task

UNKNOWN, MALFORMED = 7.0, 8.0  # in the script: the judge cannot say; no tag
REWARD = """
def reward(step):
    value = float(step.action.argument)
    return None if value == 7 else value
"""
# trajectory, state -> rewards of the four actions that are drawn there
SCRIPT: dict[tuple[int, int], list[float]] = {
    (0, 0): [1, 1, 1, 1],
    (0, 1): [0, 1, 1, 0],
    (1, 0): [0, 0, 0, 1],
    (1, 1): [UNKNOWN, UNKNOWN, UNKNOWN, 1],
    (2, 0): [0.1, 0.1, 0.1, 0.1],
    (2, 1): [MALFORMED, 0, 0, MALFORMED],
    (3, 0): [1, 1, 1, 0.5],
    (3, 1): [MALFORMED, 1, MALFORMED, UNKNOWN],
}
KEPT = {0: [False, True], 1: [True, False], 3: [True, True]}


class Scripted:
    """fails: at which call it raises, as a process that dies there."""

    max_context = 4096

    def __init__(self, ids: Sequence[str]) -> None:
        self.ids, self.asked, self.calls, self.fails = list(ids), list[tuple[int, int]](), 0, 0

    def generate(self, requests: Sequence[Request]) -> list[list[Completion]]:
        self.calls += 1
        if self.calls == self.fails:
            raise KeyboardInterrupt
        drawn = []
        for request in requests:
            assert request.n == 4 and request.sampling.max_new_tokens == 24 and request.sampling.temperature == 0.5
            place = self.ids.index(str(request.cache_key)), (len(request.tokens) - 2) // 2
            self.asked.append(place)
            codes = [np.array([round(1000 * value), request.seed % 1000], np.int32) for value in SCRIPT[place]]
            drawn.append([Completion(code, [-1.0, -1.0], "stop", 0) for code in codes])
        return drawn

    def close(self) -> None:
        pass


def text(tokens: Sequence[int]) -> str:
    return "no tag" if tokens[0] == 1000 * MALFORMED else f"<answer>{tokens[0] / 1000}</answer>"


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    small_models.build("llama", torch.float32).save_pretrained(folder)
    return folder


@pytest.fixture
def run(tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[list[str], Scripted]:
    """The overrides of a run with four trajectories of two steps, and its engine."""
    (tmp_path / "mine.py").write_text(REWARD, encoding="utf-8")
    overrides = [f"run.folder={tmp_path}", "run.name=r", f"model.path={llama}", "tasks.limit=4", "tasks.eval_limit=1"]
    overrides += [
        "collect.trajectories_per_question=1",
        "filter.kind=none",
        f"judge.kind={tmp_path / 'mine.py'}:reward",
    ]
    overrides += ["training.max_action_tokens=24", "training.temperature=0.5"]
    overrides += ["filter.states=variance", "filter.states_group=4"]
    config = load(None, overrides)
    questions = load_task(config.tasks, config.run.seed).questions("train")
    with Store(config.store) as store:
        store.add_questions(questions)
        store.record(made(question, 0, [CALL, "<answer>2</answer>"]) for question in questions)
    engine = Scripted(trajectory_ids(questions, 1))

    @contextlib.contextmanager
    def opened(*arguments: Any) -> Iterator[Scripted]:
        yield engine

    monkeypatch.setattr(states, "built_engine", opened)
    monkeypatch.setattr(states, "open_renderer", lambda model: SimpleNamespace(stop_ids=(1,), text=text))
    return overrides, engine


def kept(tmp_path: Path, engine: Scripted) -> dict[int, list[bool]]:
    found = read_samples(tmp_path / "r" / "shards")
    return {engine.ids.index(sample.trajectory.id): sample.kept for sample in found}


def test_states_whose_rewards_vary_are_kept_and_written(
    run: tuple[list[str], Scripted], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    overrides, engine = run
    assert cli.main(["filter", *overrides]) == 0
    assert kept(tmp_path, engine) == KEPT and sorted(engine.asked) == sorted(SCRIPT)
    manifest = verify_shards(tmp_path / "r" / "shards")
    assert (manifest.trajectories, manifest.steps, manifest.states) == (3, 6, 4)
    assert manifest.fingerprint["filter"]["states_sampling"]["group"] == 4
    told = capsys.readouterr().out
    assert "filter none kept 3 of 4 trajectories: 1 without a state that filter.states=variance keeps" in told
    assert (
        "filter.states=variance kept 4 of 8 states: 1 with less than two known rewards, 3 with rewards that vary too little"
    ) in told
    found = json.loads((tmp_path / "r" / "filter.json").read_text(encoding="utf-8"))
    assert found["kept"] == 3 and found["states"]["kept"] == 4 and found["states"]["total"] == 8
    assert cli.main(["report", *overrides]) == 0
    assert "3 of 4 trajectories kept (none), 4 of their 8 states" in status(overrides, capsys)
    page = html_page.page((tmp_path / "r" / "report.html").read_text(encoding="utf-8"))
    assert len(page.all("table", "survivors")) == 2


def status(overrides: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    folder, name = (one.partition("=")[2] for one in overrides[:2])
    capsys.readouterr()
    assert cli.main(["status", f"{folder}/{name}"]) == 0
    return capsys.readouterr().out


def test_the_longest_state_is_one_that_is_kept(run: tuple[list[str], Scripted], tmp_path: Path) -> None:
    overrides, engine = run
    assert cli.main(["filter", *overrides, "filter.states_max_mean=0.3"]) == 0
    assert kept(tmp_path, engine) == {1: [True, False]}, (
        "of malformed actions, and of those without a reward, only the former count"
    )
    manifest = verify_shards(tmp_path / "r" / "shards")
    assert (manifest.longest_state["tokens"], manifest.longest_path["tokens"]) == (2, 3)


def test_another_window_draws_nothing_again_and_other_samples_do(
    run: tuple[list[str], Scripted], tmp_path: Path
) -> None:
    overrides, engine = run
    windows = {
        "filter.states_min_mean=0.3": {0: [False, True], 3: [True, True]},
        "filter.states_max_mean=0.5": {0: [False, True], 1: [True, False], 3: [False, True]},
        "filter.states_min_variance=0.2": {0: [False, True], 3: [False, True]},
        "filter.states_group=4": KEPT,
    }
    for window, wanted in windows.items():
        assert cli.main(["filter", *overrides, window]) == 0
        assert kept(tmp_path, engine) == wanted, window
        assert len(engine.asked) == len(SCRIPT)
    assert cli.main(["filter", *overrides, "judge.kind=recorded_action"]) == 1, (
        "none of the answers is the recorded one"
    )
    assert len(engine.asked) == 2 * len(SCRIPT), "another reward"


def test_a_filter_that_was_killed_goes_on_and_ends_as_one_that_was_not(
    run: tuple[list[str], Scripted], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    overrides, engine = run
    monkeypatch.setattr(store_module, "BATCH", 1)
    assert cli.main(["filter", *overrides]) == 0
    undisturbed, shards = list(engine.asked), verify_shards(tmp_path / "r" / "shards")
    for path in ("states.db", "shards", "filter.json"):
        (tmp_path / "r" / path).rename(tmp_path / path)
    engine.asked, engine.calls, engine.fails = [], 0, 3
    assert cli.main(["filter", *overrides]) != 0
    assert not (tmp_path / "r" / "shards").exists() and len(engine.asked) == 4
    assert cli.main(["filter", *overrides]) == 0
    assert engine.asked == undisturbed, "nothing was drawn twice"
    assert verify_shards(tmp_path / "r" / "shards") == shards


def test_where_no_state_varies_the_remedy_is_named(
    run: tuple[list[str], Scripted], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    overrides, _ = run
    assert cli.main(["filter", *overrides, "filter.states_min_variance=0.249", "filter.states_max_mean=0.4"]) != 0
    told = capsys.readouterr().err
    assert "nothing is left to train on: filter none kept 0 of 4 trajectories" in told
    assert "widen filter.states_min_mean and filter.states_max_mean" in told and "Traceback" not in told
    assert not (tmp_path / "r" / "shards").exists()


def test_states_without_room_for_an_action_are_not_drawn_at(
    run: tuple[list[str], Scripted], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    overrides, engine = run
    engine.max_context = 24 + 3  # the first state has 2 tokens, the second 4
    assert cli.main(["filter", *overrides]) == 0
    assert {state for _, state in engine.asked} == {0} and kept(tmp_path, engine) == {
        1: [True, False],
        3: [True, False],
    }
    assert "4 with no room for an action of training.max_action_tokens" in capsys.readouterr().out


def test_what_a_judge_did_not_reply_to_is_drawn_again(
    run: tuple[list[str], Scripted], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    overrides, engine = run
    judge_sampled, silent = states.judge_sampled, {"on": True}

    def judged(sampled: Any, judge: Any) -> Any:
        found = judge_sampled(sampled, judge)
        if not silent["on"]:
            return found
        lost = states.NO_REPLY + ": the server is gone"
        return [
            type(one)(type(one.verdict)("UNKNOWN"), lost) if sample.trajectory == 3 else one
            for sample, one in zip(sampled, found, strict=True)
        ]

    monkeypatch.setattr(states, "judge_sampled", judged)
    assert cli.main(["filter", *overrides]) == 0
    assert kept(tmp_path, engine) == {0: KEPT[0], 1: KEPT[1]}
    silent["on"] = False
    assert cli.main(["filter", *overrides]) == 0
    assert kept(tmp_path, engine) == KEPT and engine.asked[len(SCRIPT) :] == [(3, 0), (3, 1)]


def test_rewards_that_filter_did_not_write_are_refused(
    run: tuple[list[str], Scripted], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    overrides, _ = run
    assert cli.main(["filter", *overrides]) == 0
    with Store(tmp_path / "r" / states.STORE) as store:
        for key in store.meta():
            store.set_meta(key, [[2.0], [0.5]])
    assert cli.main(["filter", *overrides]) != 0
    assert "states.db, table meta, key 'rewards/" in capsys.readouterr().err


def test_pivotrl_runs_from_the_base_model_to_the_trained_one(tiny_model: Path, tmp_path: Path) -> None:
    """A real model, whose own trajectories stand for the recorded ones; what training drew lies at the states that filter kept."""
    overrides = run_overrides(
        tmp_path, tiny_model, "judge.kind=recorded_action", "filter.states=variance", "training.steps=2"
    )
    start(["run", *overrides, "filter.states_group=4", "training.refill=true", "evaluate.samples=1"])
    folder = tmp_path / "r"
    found = json.loads((folder / "filter.json").read_text(encoding="utf-8"))["states"]
    marks = {sample.trajectory.id: sample.kept for sample in read_samples(folder / "shards")}
    assert 0 < found["kept"] == sum(map(sum, marks.values())) < found["total"]
    for step in (1, 2):
        samples = list(read_training_samples(folder, step))
        assert samples and all(marks[one.trajectory][one.state] for one in samples)
        assert {one.verdict for one in samples} == {"GOOD", "BAD"}
    rows = read_metrics(folder)
    assert len(rows) == 2 and all(row["states_without_signal"] < row["states"] <= row["states_drawn"] for row in rows)
    base = json.loads((folder / "evaluations" / "base.json").read_text(encoding="utf-8"))
    assert base["process_label"] is None and base["unknown"] > 0, "nothing is recorded for held-out questions"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("filter.states_group=1", "filter.states_group=1: must be at least 2"),
        ("filter.states_max_mean=-0.1", "filter.states_max_mean=-0.1: must be in"),
        ("filter.states_min_variance=0.25", "filter.states_min_variance=0.25: must be in"),
        (
            "filter={states_min_mean: 0.6, states_max_mean: 0.5}",
            "filter.states_min_mean=0.6: no mean reward is at least 0.6",
        ),
        ("algorithm.reward=outcome", "filter.states=variance: algorithm.reward=outcome draws whole trajectories"),
    ],
)
def test_windows_that_hold_nothing_are_refused(
    run: tuple[list[str], Scripted], override: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["filter", *run[0], override]) == 2
    assert message in capsys.readouterr().err
