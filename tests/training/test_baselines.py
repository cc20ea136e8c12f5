"""The baselines that step-wise training is compared with, against the obvious way: one row per recorded action, by plain transformers."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from support.runs import overrides
from support.stores import read_samples
from transformers import AutoModelForCausalLM

from swirl_fast import cli
from swirl_fast.config import ConfigError
from swirl_fast.data import samples
from swirl_fast.metrics import read_metrics
from swirl_fast.objective import Actions, advantages, trajectory_advantages
from swirl_fast.rollouts.whole import WholeRollouts
from swirl_fast.tasks import load_task
from swirl_fast.training import build
from swirl_fast.training.resume import check_state
from swirl_fast.trajectory import Finish, Trajectory


def settings(folder: Path, model: Path, *more: str) -> list[str]:
    own = (
        "run.seed=5",  # questions whose answer the model that was taught some sums likes to give
        "tasks.eval_limit=4",
        "collect.trajectories_per_question=2",
        "algorithm.kl_coef=0",
        "training.steps=1",
        "training.group_size=6",
    )
    return overrides(folder, model, *own, *more)


@pytest.fixture(scope="module")
def collected(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    folder = tmp_path_factory.mktemp("baselines")
    for stage in ("collect", "judge", "filter"):
        assert cli.main([stage, *settings(folder, tiny_model)]) == 0
    return folder


def naive_gradient(model_path: Path, weighted: list[tuple[Trajectory, list[float]]]) -> tuple[float, float]:
    """(norm of the gradient of -Σ weight Σ log p, mean negative log-prob a token) over the actions of trajectories, one row an action.

    weighted: each trajectory with the weight of each of its actions.
    """
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    nll, tokens = 0.0, 0
    for trajectory, weights in weighted:
        for step, weight in zip(trajectory.steps, weights, strict=True):
            row = torch.tensor(trajectory.tokens[: step.end].tolist())
            logits = model(row[None]).logits[0, step.start - 1 : -1]
            logp = logits.log_softmax(-1).gather(1, row[step.start :, None]).sum()
            (-weight * logp).backward()
            nll, tokens = nll - float(logp.detach()), tokens + step.end - step.start
    gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    return float(gradient.norm()), nll / tokens


def test_sft_is_cross_entropy_on_the_recorded_actions(
    collected: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every state weighs the same, an action's tokens are summed; no engine is loaded and nothing is judged."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("sft needs no engine")

    monkeypatch.setattr(build, "load_engine", refuse)
    recorded = [sample.trajectory for sample in read_samples(collected / "r" / "shards")]
    assert len(recorded) == 12
    arguments = settings(collected, tiny_model, "algorithm.name=sft", "training.trajectories_per_step=12")
    assert cli.main(["train", *arguments, f"training.shards={collected}/r/shards", "run.name=sft"]) == 0
    (row,) = read_metrics(collected / "sft")
    states = sum(t.num_steps for t in recorded)
    norm, nll = naive_gradient(tiny_model, [(t, [1 / states] * t.num_steps) for t in recorded])
    assert row["grad_norm"] == pytest.approx(norm, rel=1e-4)
    assert row["nll"] == pytest.approx(nll, rel=1e-5)
    assert row["states"] == row["actions"] == states and math.isnan(row["reward"]), "nothing is rewarded"
    assert math.isnan(row["entropy"]), "nothing is sampled"
    assert math.isnan(row["engine_gap_mean"]) and math.isnan(row["engine_gap_max"]), "there is no engine"
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step 1/")]
    assert " grad " in line and not any(word in line for word in ("nan", "gap", "reward", "label", "entropy"))
    assert not (collected / "sft" / "samples").exists()
    assert row["tokens_computed"] < sum(len(t.tokens) for t in recorded), "prompts of one question are shared"
    assert (collected / "sft" / "model" / "model.safetensors").is_file()


def test_outcome_broadcasts_the_score_of_whole_fresh_trajectories(
    collected: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The policy is the one that was taught some sums, so that answers are right at times; its trajectories use the real calculator."""
    seen: list[tuple[list[Trajectory], list[int], list[Trajectory]]] = []

    class Watched(WholeRollouts):
        def roll_out(self, recorded, seeds):  # type: ignore[no-untyped-def]
            fresh, questions = super().roll_out(recorded, seeds)
            seen.append((fresh, questions, list(recorded)))
            return fresh, questions

    monkeypatch.setattr(build, "WholeRollouts", Watched)
    more = ("algorithm.reward=outcome", "algorithm.weighting=trajectory", "training.trajectories_per_step=12")
    arguments = settings(collected, tiny_model, *more)
    assert cli.main(["train", *arguments, f"training.shards={collected}/r/shards", "run.name=outcome"]) == 0
    (row,) = read_metrics(collected / "outcome")
    ((fresh, places, recorded),) = seen
    assert len(fresh) == 12 * 6 and places == [place for place in range(12) for _ in range(6)]
    assert len({tuple(t.tokens) for t in fresh}) > 4, "samples differ"
    assert all(t.finish in (Finish.ANSWER, Finish.STEP_LIMIT) and t.num_steps <= 3 for t in fresh)
    called = [s for t in fresh for s in t.steps if s.action.kind == "tool" and s.observation is not None]
    assert called and all(s.observation.startswith(f"{s.action.argument} -> ") for s in called if s.observation)
    from swirl_fast.config import load

    task = load_task(load(None, arguments).tasks, 5)
    gold = {q.id: q for q in task.questions("train")}
    right = [float(task.score(gold[t.question_id], t.answer).exact_match == 1.0) for t in fresh]
    assert 0 < sum(right) < len(right), "otherwise nothing is tested here"
    assert row["reward"] == pytest.approx(sum(right) / len(right))
    kept = iter(samples.read_samples(collected / "outcome", 1))
    weighted = []
    for number, (t, mine, place) in enumerate(zip(fresh, right, places, strict=True)):
        assert t.question_id == recorded[place].question_id
        others = [r for r, p in zip(right, places, strict=True) if p == place]
        advantage = mine - (sum(others) - mine) / (len(others) - 1)
        weighted.append((t, [advantage / len(fresh) / t.num_steps] * t.num_steps))
        for i, (step, sample) in enumerate(zip(t.steps, kept, strict=False)):
            assert (sample.place, sample.state, sample.trajectory, sample.text) == (number, i, t.id, step.text)
            assert sample.observation == step.observation and sample.reward == mine
            assert sample.advantage == pytest.approx(advantage, abs=1e-6)
    assert next(kept, None) is None, "the file holds these and no others"
    norm, _ = naive_gradient(tiny_model, weighted)
    assert row["grad_norm"] == pytest.approx(norm, rel=1e-4)
    assert row["engine_gap_mean"] < 1e-4


def test_a_question_that_the_task_does_not_have_cannot_be_scored(
    collected: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = settings(collected, tiny_model, "algorithm.reward=outcome", "run.seed=6", "run.name=other")
    assert cli.main(["train", *arguments, f"training.shards={collected}/r/shards"]) == 2
    shown = capsys.readouterr().err
    assert "algorithm.reward=outcome: the recorded question" in shown and "run.seed" in shown


def test_a_trajectory_counts_once_whatever_its_length() -> None:
    """Two questions; one right trajectory of three steps must not shift the baseline as three would."""
    trajectories = torch.tensor([0, 0, 0, 1, 2, 3, 3])
    rewards = torch.tensor([1.0, 1, 1, 0, 0, 1, 1])
    actions = Actions(rewards, torch.ones(7, dtype=torch.bool), torch.arange(7), trajectories, torch.ones(7).long())
    advantage, valid = trajectory_advantages(actions, torch.tensor([0, 0, 1, 1]), "rloo")
    assert valid.all() and advantage.tolist() == [1, 1, 1, -1, -1, 1, 1]
    # with one step each it is the advantage of actions that share a state
    one = Actions(rewards[2:6], actions.known[2:6], torch.tensor([0, 0, 1, 1]), torch.arange(4), torch.ones(4).long())
    for name in ("reinforce", "rloo", "grpo"):
        whole, _ = trajectory_advantages(one, torch.tensor([0, 0, 1, 1]), name)
        assert torch.equal(whole, advantages(one, name)[0])


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("algorithm.reward=outcome", "algorithm.reward=outcome"),
        ("training.lag=1", "training.lag=1"),
        ("algorithm.updates_per_batch=2", "algorithm.updates_per_batch=2"),
        ("algorithm.importance_level=action", "algorithm.importance_cap=2"),
    ],
)
def test_sft_refuses_what_it_cannot_do(override: str, named: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", "algorithm.name=sft", "algorithm.importance_cap=2", override]) == 2
    assert named in capsys.readouterr().err


def test_an_unknown_reward_names_the_accepted_ones(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", "algorithm.reward=gold"]) == 2
    assert "algorithm.reward=gold: must be one of process, outcome" in capsys.readouterr().err


def test_the_settings_of_an_outcome_training_hold_what_its_trajectories_depend_on(tiny_model: Path) -> None:
    from swirl_fast.config import load

    def of(*more: str) -> dict[str, object]:
        return build.settings_of(load(None, settings(Path("x"), tiny_model, *more)), "judge")

    assert of("tasks.max_steps=4") == of("tasks.max_steps=5")
    assert of("algorithm.reward=outcome", "tasks.max_steps=4") != of("algorithm.reward=outcome", "tasks.max_steps=5")
    json.dumps(of("algorithm.reward=outcome"))


@pytest.mark.parametrize(
    ("setting", "other", "same"),
    [
        ("training.token_budget=120", "training.token_budget=130", "training.max_path_tokens=120"),
        ("training.max_path_tokens=120", "training.max_path_tokens=130", "training.token_budget=120"),
        ("tools.timeout=20", "tools.timeout=.inf", "tools.concurrency=3"),
        ("tools.result_chars=500", "tools.result_chars=600", "tools.concurrency=3"),
    ],
)
def test_an_outcome_training_is_not_resumed_where_its_trajectories_would_end_elsewhere(
    tiny_model: Path, setting: str, other: str, same: str
) -> None:
    """Length and observations of whole fresh trajectories; of actions at recorded states neither depends on these."""
    from swirl_fast.config import load

    def of(*more: str) -> dict[str, Any]:
        made = build.settings_of(load(None, settings(Path("x"), tiny_model, *more)), "judge")
        return json.loads(json.dumps(made))

    check_state(Path("x"), {"settings": of(setting), "step": 1}, of(other), 1)
    whole = "algorithm.reward=outcome"
    recorded = {"settings": of(whole, setting), "step": 1}
    name = setting.partition("=")[0].rpartition(".")[2]
    with pytest.raises(ConfigError, match=rf"x was trained with other settings: outcome\..*{name}.* was .*, is .* now"):
        check_state(Path("x"), recorded, of(whole, other), 1)
    check_state(Path("x"), recorded, of(whole, setting, same), 1)
