"""The whole way on a small real model: every stage as a user starts it, killed and resumed, on one rank and on two."""

from __future__ import annotations

import copy
import functools
import json
import operator
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from support.runs import STEPS, attempt, copy_of, kill_when, overrides, start, weights
from support.small_models import CHAT_TEMPLATE
from support.stores import count_rows, read_samples
from support.task_files import write_lines
from transformers import PreTrainedConfig
from transformers.masking_utils import create_sliding_window_causal_mask
from transformers.models.llama import modeling_llama

from benchmarks import quickstart
from swirl_fast import cli
from swirl_fast.config import load as load_config
from swirl_fast.data.store import Store
from swirl_fast.metrics import read_metrics
from swirl_fast.models.load import weights_hash
from swirl_fast.objective import policy_loss
from swirl_fast.rollouts import pipeline
from swirl_fast.rollouts.at_states import SampledAction, sample_actions
from swirl_fast.training import backward, build
from swirl_fast.training.trainer import Trainer
from swirl_kernels import PolicyLossMetrics


@pytest.fixture(scope="module")
def collected(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, judged: str) -> Path:
    """A folder in which `r` is collected, judged and filtered."""
    folder = tmp_path_factory.mktemp("collected")
    for stage in ("collect", "judge", "filter"):
        start([stage, *overrides(folder, tiny_model, judged)])
    return folder


@pytest.fixture(scope="module")
def trained(collected: Path, tiny_model: Path, judged: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted training on one process without torchrun: what all others are compared with."""
    folder = copy_of(collected, tmp_path_factory.mktemp("trained"))
    start(["train", *overrides(folder, tiny_model, judged)])
    return folder


def test_run_does_everything_and_a_second_run_is_quick(tmp_path: Path, tiny_model: Path, judged: str) -> None:
    arguments = overrides(tmp_path, tiny_model, judged, "training.tensorboard=true", "evaluate.outcome=judge")
    first = start(["run", *arguments], own_process=True)
    folder = tmp_path / "r"
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    for name in ("base", "trained"):
        assert summary[name]["questions"] == 6
        assert summary[name].keys() >= {"accuracy", "process_label", "malformed", "questions"}
        full = json.loads((folder / "evaluations" / f"{name}.json").read_text(encoding="utf-8"))
        assert {key: full[key] for key in summary[name]} == summary[name]
        assert 0 <= full["judge_accuracy"] <= full["answered"] and full["unknown_answers"] < 6
        assert full["weights"] == weights_hash(tiny_model if name == "base" else folder / "model")
        assert full["outcome_judge"].startswith("outcome-")
        with Store(folder / "evaluations" / f"{name}.db", writable=False) as store:
            lengths = [step.end - step.start for t in store.trajectories() for step in t.steps]
        assert full["action_length"] == pytest.approx(sum(lengths) / len(lengths))
    assert summary["seconds"] > 0
    assert "<html" in (folder / "report.html").read_text(encoding="utf-8")
    # invariant 8: screen, metrics.jsonl and TensorBoard show the same numbers
    rows = read_metrics(folder)
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(folder / "tensorboard"))
    board.Reload()
    for name in rows[0]:
        shown = [event.value for event in board.Scalars(name)]
        assert shown == pytest.approx([row[name] for row in rows], rel=1e-6), name
    for row in rows:
        assert f"reward {row['reward']:.3f}" in first.stdout
    assert all(row["grad_norm"] > 0 for row in rows), "rewards must differ within states, else nothing here is tested"
    assert any(row["unknown"] > 0 for row in rows)
    for row in rows:
        assert row["action_length"] == pytest.approx(row["action_tokens"] / row["actions"])
        known = row["actions"] - row["unknown"]
        good = row["reward"] * known
        both = row["action_length_good"] * good + row["action_length_bad"] * (known - good)
        assert 0 < both <= row["action_tokens"] * (1 + 1e-9) and all(
            0 <= row[n] < 1 for n in ("cut_off", "outside_tag", "repeated")
        )
    assert all(row["engine_gap_mean"] < 1e-4 for row in rows), "engine and trainer disagree on log-probs"  # invariant 4
    kept = tmp_path / "kept.json"
    quickstart.main(["--run", str(folder), "--out", str(kept)])
    assert [row["reward"] for row in json.loads(kept.read_text(encoding="utf-8"))["steps"]] == [
        row["reward"] for row in rows
    ]
    second = start(["run", *arguments])
    assert "trained to step" in second.stdout
    assert "tokens generated" not in second.stdout, "nothing is drawn again"
    assert json.loads((folder / "summary.json").read_text(encoding="utf-8")) == summary


def test_trajectories_nest_and_shards_hold_them(collected: Path) -> None:
    """Invariant 3 on what was really collected, and the same datum in the store and in the shards."""
    with Store(collected / "r" / "trajectories.db", writable=False) as store:
        stored = {t.id: t for t in store.trajectories(store.ids(finished=True))}
    assert len(stored) == 18
    for trajectory in stored.values():
        trajectory.check()
        for i in range(1, trajectory.num_steps):
            state = trajectory.state(i)
            before = trajectory.steps[i - 1]
            assert np.shares_memory(state, trajectory.tokens), "a view, never a copy"
            assert np.array_equal(state[: before.end], trajectory.tokens[: before.end])
            assert np.array_equal(state[: before.start], trajectory.state(i - 1))
    assert {s.trajectory.id: s.trajectory for s in read_samples(collected / "r" / "shards")} == stored


def test_collect_killed_at_any_moment_loses_and_doubles_nothing(
    collected: Path, tiny_model: Path, tmp_path: Path
) -> None:
    """Invariant 6, and 9: what comes out is what an uninterrupted collection gives."""
    arguments = ["collect", *overrides(tmp_path, tiny_model)]
    db = tmp_path / "r" / "trajectories.db"

    def steps() -> int:
        if not db.exists():
            return 0
        try:
            with Store(db, writable=False) as store:
                return count_rows(store, "steps")
        except ValueError:  # the tables are not there yet
            return 0

    for wanted in (1, 14):
        kill_when(arguments, lambda wanted=wanted: steps() >= wanted)
    start(arguments)
    found, expected = [], []
    for folder, into in ((tmp_path, found), (collected, expected)):
        with Store(folder / "r" / "trajectories.db", writable=False) as store:
            into += [(t.id, t.finish, t.tokens.tolist(), [s.text for s in t.steps]) for t in store.trajectories()]
    assert found == expected


def test_training_killed_and_resumed_equals_uninterrupted(
    collected: Path, trained: Path, tiny_model: Path, judged: str, tmp_path: Path
) -> None:
    """Invariant 6 and 9: bit for bit the same parameters, and every step stands once in the metrics."""
    folder = copy_of(collected, tmp_path)
    arguments = ["train", *overrides(folder, tiny_model, judged)]
    for step in (1, 3):
        kill_when(arguments, lambda step=step: (folder / "r" / "checkpoints" / f"step_{step:06d}").exists())
    start(arguments)
    assert [row["step"] for row in read_metrics(folder / "r")] == list(range(1, STEPS + 1))
    wanted, found = weights(trained), weights(folder)
    assert wanted.keys() == found.keys()
    for name, tensor in wanted.items():
        assert torch.equal(tensor, found[name]), name


def test_a_batch_that_is_sampled_beside_the_training_is_one_update_old_and_never_lost(
    collected: Path, tiny_model: Path, judged: str, tmp_path: Path
) -> None:
    """training.lag=1, with the engine in a process of its own, killed and started again."""
    folder = copy_of(collected, tmp_path)
    lagging = ["training.lag=1", "algorithm.importance_cap=2", "engine.own_process=true", "engine.threads=1"]
    arguments = ["train", *overrides(folder, tiny_model, judged, *lagging, "training.max_engine_gap=1e-4")]
    kill_when(arguments, (folder / "r" / "checkpoints" / "step_000002").exists)
    first = len(read_metrics(folder / "r"))
    start(arguments)
    rows = read_metrics(folder / "r")
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    # the first batch of either process is drawn by the policy that learns from it, every other one by the policy before
    resumed = next(row["step"] for row in rows[1:] if row["engine_gap_mean"] < 1e-5)
    assert 2 < resumed <= first + 1
    assert all((row["engine_gap_mean"] < 1e-5) == (row["step"] in (1, resumed)) for row in rows)
    assert all((row["seconds_hidden"] > 0) == (row["step"] < STEPS) for row in rows)
    state = json.loads((folder / "r" / "checkpoints" / f"step_{STEPS:06d}" / "state.json").read_text(encoding="utf-8"))
    assert state["stream"]["position"] == STEPS * 4, "every batch was trained on once"


def test_the_first_batches_are_drawn_on_policy_when_asked_for(
    collected: Path, tiny_model: Path, judged: str, tmp_path: Path
) -> None:
    """training.on_policy_batches=2: three batches of the policy that learns from them, then lag; on two ranks as on one."""
    folder, other = copy_of(collected, tmp_path / "one"), copy_of(collected, tmp_path / "two")
    lagging = [
        "training.lag=1",
        "training.on_policy_batches=2",
        "algorithm.importance_cap=2",
        "algorithm.importance_level=action",
    ]
    own = ["engine.own_process=true", "engine.threads=1"]
    start(["train", *overrides(folder, tiny_model, judged, *lagging, *own)])
    rows = read_metrics(folder / "r")
    assert [row["step"] for row in rows if row["engine_gap_mean"] < 1e-5] == [1, 2, 3]
    assert [row["step"] for row in rows if row["seconds_hidden"] > 0] == list(range(3, STEPS))
    start(["train", *overrides(other, tiny_model, judged, *lagging, *own)], ranks=2)
    for one, two in zip(rows, read_metrics(other / "r"), strict=True):
        for key in ("reward", "actions", "action_tokens"):
            assert two[key] == pytest.approx(one[key], abs=1e-12), key
        for key in ("loss", "grad_norm", "engine_gap_mean"):
            assert two[key] == pytest.approx(one[key], rel=1e-3, abs=1e-5), key


def test_training_goes_on_from_uploaded_shards_as_from_its_own(
    trained: Path, tiny_model: Path, judged: str, tmp_path: Path
) -> None:
    """`filter` uploads, and a checkpoint made with the run's own folder is resumed from the copy, with other reading ahead."""
    folder = copy_of(trained, tmp_path)
    shutil.rmtree(folder / "r" / "model")
    shutil.rmtree(folder / "r" / "checkpoints" / f"step_{STEPS:06d}")
    before = (folder / "r" / "shards").stat().st_ino
    target, cache = tmp_path / "store", tmp_path / "cache"
    done = start(["filter", *overrides(folder, tiny_model, judged, f"filter.upload={target}")])
    assert f"uploaded to {target}" in done.stdout
    assert (folder / "r" / "shards").stat().st_ino == before
    shutil.rmtree(folder / "r" / "shards")
    elsewhere = (
        f"training.shards=file://{target}",
        f"training.shards_cache={cache}",
        "training.shards_cache_limit=1gb",
    )
    start(
        ["train", *overrides(folder, tiny_model, judged, *elsewhere, "training.prefetch=0", "training.bad_shards=skip")]
    )
    assert list(cache.glob("*/*.mds"))
    assert [row["skipped_samples"] for row in read_metrics(folder / "r")] == [0] * STEPS
    for name, tensor in weights(trained).items():
        assert torch.equal(tensor, weights(folder)[name]), name


def test_two_ranks_equal_one(collected: Path, trained: Path, tiny_model: Path, judged: str, tmp_path: Path) -> None:
    """Invariant 2: loss, gradient norm and parameters, with FSDP2 and other micro-batches, from the same seed."""
    folder = copy_of(collected, tmp_path)
    start(["train", *overrides(folder, tiny_model, judged, "training.token_budget=512")], ranks=2)
    before = load_file(tiny_model / "model.safetensors")
    assert any(not torch.equal(tensor, before[name]) for name, tensor in weights(trained).items()), (
        "nothing was learned"
    )
    for one, two in zip(read_metrics(trained / "r"), read_metrics(folder / "r"), strict=True):
        for key in ("reward", "unknown", "states", "actions", "action_tokens"):
            assert two[key] == pytest.approx(one[key], abs=1e-12), key
        for key in ("loss", "grad_norm", "entropy", "process_label"):
            assert two[key] == pytest.approx(one[key], rel=1e-4, abs=1e-5), key
        for kind in ("computed", "effective"):
            name = f"tokens_{kind}_per_second"
            assert two[name] > 0 and two[f"{name}_per_rank"] == pytest.approx(two[name] / 2)
    wanted, found = weights(trained), weights(folder)
    assert wanted.keys() == found.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(
            found[name], tensor, rtol=1e-3, atol=2e-5, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_a_damaged_checkpoint_gives_way_to_the_one_before(
    collected: Path, trained: Path, tiny_model: Path, judged: str, tmp_path: Path
) -> None:
    folder = copy_of(trained, tmp_path)
    shutil.rmtree(folder / "r" / "model")
    newest = folder / "r" / "checkpoints" / f"step_{STEPS:06d}"
    file = next(newest.glob("*.distcp"))
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    done = start(["train", *overrides(folder, tiny_model, judged)])
    assert "does not match its hash" in done.stderr
    for name, tensor in weights(trained).items():
        assert torch.equal(tensor, weights(folder)[name]), name


def test_other_settings_do_not_continue_a_checkpoint(
    trained: Path, tiny_model: Path, judged: str, tmp_path: Path
) -> None:
    folder = copy_of(trained, tmp_path)
    arguments = ["train", *overrides(folder, tiny_model, judged, "training.learning_rate=2e-3")]
    done = attempt(arguments)
    assert done.returncode == 2 and "training.learning_rate was 0.001, is 0.002 now" in done.stderr


def test_a_judge_without_verdicts_stops_training(
    collected: Path, tiny_model: Path, judged: str, tmp_path: Path
) -> None:
    folder = copy_of(collected, tmp_path)
    arguments = ["train", *overrides(folder, tiny_model, judged.replace("/v1", "/silent/v1"))]
    done = attempt(arguments)
    assert done.returncode == 1 and "gave no verdict on any of" in done.stderr and "max_skipped_steps" in done.stderr
    assert not (folder / "r" / "model").exists()
    rows = read_metrics(folder / "r")
    assert [row["unknown_steps"] for row in rows] == [1, 2] and all(row["grad_norm"] == 0 for row in rows)
    assert not list((folder / "r" / "checkpoints").iterdir()), "the batches that were not judged are to be done again"


def test_an_engine_of_another_model_stops_training_before_anything_is_learned(
    collected: Path,
    tiny_model: Path,
    judged: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = copy_of(collected, tmp_path)
    trainers: list[Trainer] = []

    class Kept(Trainer):
        def run(self) -> None:
            trainers.append(self)
            super().run()

    wrong = float("nan")

    def lower(*arguments: object) -> list[SampledAction]:
        """The engine's log-probs are not numbers, or those of another model: too low by 1."""
        return [
            replace(one, completion=replace(one.completion, logprobs=[p - wrong for p in one.completion.logprobs]))
            for one in sample_actions(*arguments)
        ]

    monkeypatch.setattr(pipeline, "sample_actions", lower)
    monkeypatch.setattr(build, "Trainer", Kept)
    arguments = ["train", *overrides(folder, tiny_model, judged, "training.steps=1")]
    assert cli.main(arguments) == 1
    assert "the rollout engine's log-probs differ from the trainer's by nan a token" in capsys.readouterr().err
    wrong = 1.0
    assert cli.main(arguments) == 1
    shown = capsys.readouterr().err
    assert "training step 1: the rollout engine's log-probs differ from the trainer's by 1 a token" in shown
    assert "training.max_engine_gap=0.1" in shown and "algorithm.importance_cap=2" in shown
    assert not (folder / "r" / "model").exists() and not read_metrics(folder / "r")
    before = load_file(tiny_model / "model.safetensors")
    after = trainers[0].policy.model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    # who knows the reason raises the limit, and weighs: all tokens are e times likelier than the engine says, and are cut at 2
    assert cli.main([*arguments, "training.max_engine_gap=1.01", "algorithm.importance_cap=2"]) == 0
    (row,) = read_metrics(folder / "r")
    assert row["importance_truncated"] == 1 and row["engine_gap_mean"] == pytest.approx(1, abs=1e-4)
    assert any(not torch.equal(weights(folder)[name], tensor) for name, tensor in before.items())


def test_a_model_that_is_not_exact_over_prefixes_is_refused_before_training(
    collected: Path, tiny_model: Path, judged: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A family with a window in its masks that neither its configuration nor its attention knows of."""
    folder = copy_of(collected, tmp_path)

    def windowed(config: PreTrainedConfig, **arguments: object) -> object:
        config = copy.copy(config)
        config.sliding_window = 10
        return create_sliding_window_causal_mask(config, **arguments)

    monkeypatch.setattr(modeling_llama, "create_causal_mask", windowed)
    arguments = ["train", *overrides(folder, tiny_model, judged, "training.steps=1")]
    done = attempt(arguments)
    assert done.returncode == 2 and "training.check_model: model type llama" in done.stderr, done.stderr
    assert "nats a token (limit 0.001)" in done.stderr and "training.sharing=false" in done.stderr
    assert not (folder / "r" / "checkpoints").exists()
    start([*arguments, "training.check_model=false"])


def test_reusing_a_batch_moves_the_ratio_and_clips_it(
    collected: Path, tiny_model: Path, judged: str, tmp_path: Path
) -> None:
    folder = copy_of(collected, tmp_path)
    ppo = (
        "algorithm.name=ppo",
        "algorithm.updates_per_batch=3",
        "algorithm.kl_coef=0.1",
        "training.learning_rate=1e-2",
    )
    start(["train", *overrides(folder, tiny_model, judged, *ppo, "training.steps=2")])
    first, second = read_metrics(folder / "r")
    assert first["ratio_max"] > 1.2 and 0 < first["clip_fraction"] < 1
    assert first["kl"] == pytest.approx(0, abs=1e-6) and second["kl"] > 1e-6


def test_the_first_update_on_a_batch_has_ratio_one_and_the_second_has_not(
    collected: Path, tiny_model: Path, judged: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In this process, to see the metrics of every loss; old log-probs come from the same packing, in several micro-batches."""
    folder = copy_of(collected, tmp_path)
    of_update: dict[tuple[int, int], list[PolicyLossMetrics]] = {}
    current = (0, 0)

    class Watched(Trainer):
        def _update(self, *arguments: object, first: bool) -> float:
            nonlocal current
            current = (self.step, 0 if first else 1)
            return super()._update(*arguments, first=first)

    def watched(*arguments: object) -> tuple[torch.Tensor, PolicyLossMetrics]:
        loss, metrics = policy_loss(*arguments)
        of_update.setdefault(current, []).append(metrics)
        return loss, metrics

    monkeypatch.setattr(build, "Trainer", Watched)
    monkeypatch.setattr(backward, "policy_loss", watched)
    ppo = ("algorithm.name=ppo", "algorithm.updates_per_batch=2", "training.steps=2", "training.token_budget=512")
    assert cli.main(["train", *overrides(folder, tiny_model, judged, *ppo)]) == 0
    assert of_update.keys() == {(step, update) for step in range(2) for update in range(2)}
    for (_, update), parts in of_update.items():
        assert len(parts) > 1
        ratios = functools.reduce(operator.add, parts).means()
        if update == 0:
            assert ratios["ratio"] == pytest.approx(1, abs=1e-6) and ratios["ratio_max"] == pytest.approx(1, abs=1e-6)
        else:
            assert abs(ratios["ratio"] - 1) > 1e-5 and ratios["ratio_max"] > 1.01
    for step, row in enumerate(read_metrics(folder / "r")):
        assert row["ratio_max"] == max(
            float(m.ratio_max) for parts in (of_update[step, 0], of_update[step, 1]) for m in parts
        )


def test_asking_for_fewer_questions_uses_those_alone(
    collected: Path, tiny_model: Path, judged: str, tmp_path: Path
) -> None:
    folder = copy_of(collected, tmp_path)
    fewer = ("tasks.limit=4", "collect.trajectories_per_question=2")
    for stage in ("collect", "judge", "filter"):
        done = start([stage, *overrides(folder, tiny_model, judged, *fewer)])
    assert "kept 8 of 8" in done.stdout
    for count in (6, 4):
        start(["evaluate", *overrides(folder, tiny_model, judged, f"tasks.eval_limit={count}"), "--of", "base"])
        assert (
            json.loads((folder / "r" / "evaluations" / "base.json").read_text(encoding="utf-8"))["questions"] == count
        )


def test_another_task_is_evaluated_in_the_same_run_under_a_name_of_its_own(
    collected: Path, tiny_model: Path, judged: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = copy_of(collected, tmp_path)
    rows = [
        {
            "id": f"id{i}",
            "question": f"Who founded town {i}?",
            "answer": f"Founder {i}",
            "answer_aliases": [],
            "answerable": True,
            "paragraphs": [{"title": f"Town {i}", "paragraph_text": f"Its founder was founder {i}."}],
        }
        for i in range(3)
    ]
    dev = write_lines(tmp_path / "dev.jsonl", rows)
    config = (folder / "r" / "config.yaml").read_text(encoding="utf-8")
    arguments = ["evaluate", *overrides(folder, tiny_model, judged), f"search.cache={tmp_path}", "--of"]
    musique = ("tasks.kind=musique", f"tasks.path={dev}", f"tasks.eval_path={dev}")
    assert cli.main([*arguments, "base"]) == 0
    assert cli.main([*arguments, "base", *musique]) == 2
    assert "base.json is an evaluation on chain_sum; give this one on musique a name" in capsys.readouterr().err
    assert cli.main([*arguments, "base", "--name", "base-musique", *musique]) == 0
    assert cli.main([*arguments, str(tiny_model), "--name", "other", *musique]) == 0
    evaluations = folder / "r" / "evaluations"
    for name, task, questions in (("base", "chain_sum", 6), ("base-musique", "musique", 3), ("other", "musique", 3)):
        summary = json.loads((evaluations / f"{name}.json").read_text(encoding="utf-8"))
        assert (summary["name"], summary["task"], summary["questions"]) == (name, task, questions)
        kind = "reasoning_gym" if task == "chain_sum" else task
        assert load_config(evaluations / f"{name}.yaml").tasks.kind == kind
    with Store(evaluations / "base-musique.db", writable=False) as store:
        assert [question.text for question in store.questions()] == [row["question"] for row in rows]
    assert (folder / "r" / "config.yaml").read_text(encoding="utf-8") == config
    assert cli.main(["report", *overrides(folder, tiny_model, judged)]) == 0
    assert "Founder 2" in (folder / "r" / "report.html").read_text(encoding="utf-8")
    # no training question is left when one file is both
    assert cli.main(["collect", *overrides(tmp_path / "new", tiny_model, judged), *musique]) == 2
    assert f"tasks.path={dev}: every row is also held out" in capsys.readouterr().err


def test_a_budget_below_the_longest_trunk_is_refused_before_any_work(
    collected: Path, tiny_model: Path, judged: str, tmp_path: Path
) -> None:
    folder = copy_of(collected, tmp_path)
    arguments = ["train", *overrides(folder, tiny_model, judged, "training.token_budget=64")]
    done = attempt(arguments)
    assert done.returncode == 2 and "training.token_budget=64" in done.stderr and "at least" in done.stderr
    assert not (folder / "r" / "checkpoints").exists()


def test_another_prompt_is_another_collection(
    tiny_model: Path, judged: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The contents of the template, not its path."""
    template = tmp_path / "template.jinja"
    template.write_text(CHAT_TEMPLATE, encoding="utf-8")
    few = (f"model.chat_template={template}", "tasks.limit=1", "tasks.eval_limit=1")
    arguments = overrides(tmp_path, tiny_model, judged, *few, "collect.trajectories_per_question=1")
    assert cli.main(["collect", *arguments]) == 0 and cli.main(["evaluate", *arguments, "--of", "base"]) == 0
    assert cli.main(["collect", *arguments]) == 0 and cli.main(["evaluate", *arguments, "--of", "base"]) == 0
    evaluations = tmp_path / "r" / "evaluations"
    assert sorted(path.name for path in evaluations.glob("*.json")) == ["base.json"]
    template.write_text(CHAT_TEMPLATE.replace("<|im_end|>\n", "<|im_end|>\n\n"), encoding="utf-8")
    assert cli.main(["collect", *arguments]) == 1
    shown = capsys.readouterr().err
    assert "was made with another collection: chat_template was 'xxh64 " in shown and "prompt was '" in shown
    template.write_text(CHAT_TEMPLATE, encoding="utf-8")
    elsewhere = (
        f"model.path={shutil.copytree(tiny_model, tmp_path / 'moved')}",
        f"model.chat_template={shutil.copy(template, tmp_path / 'b')}",
    )
    assert cli.main(["collect", *arguments, *elsewhere]) == 0, "the same model and template in another place"
    assert cli.main(["collect", *arguments, "collect.temperature=0.5"]) == 1
    assert "sampling.temperature was" in capsys.readouterr().err


def test_a_command_that_is_refused_leaves_what_is_finished(
    trained: Path, tiny_model: Path, judged: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = copy_of(trained, tmp_path)
    arguments = overrides(folder, tiny_model, judged, "tasks.eval_limit=2")
    assert cli.main(["evaluate", *arguments, "--of", "base"]) == 0

    def files() -> dict[str, bytes]:
        """Without locks and SQLite's own, which a reader may leave."""
        kept = (path for path in (folder / "r").rglob("*") if path.suffix in (".yaml", ".json", ".db", ".jsonl"))
        return {str(path): path.read_bytes() for path in kept if path.is_file()}

    before = files()
    for stage, stray, code, message in (
        ("run", ["evaluate.temperature=0.7", "collect.temperature=0.5"], 1, "was made with another collection"),
        ("collect", ["tasks.max_steps=2"], 1, "was made with another collection: max_steps was 3, is 2 now"),
        ("train", ["training.learning_rate=2e-3"], 2, "training.learning_rate was 0.001, is 0.002 now"),
    ):
        assert cli.main([stage, *arguments, *stray]) == code
        assert message in capsys.readouterr().err
        assert files() == before, f"{stage} {stray}"
    config = (folder / "r" / "config.yaml").read_bytes()
    assert cli.main(["run", *arguments, "training.learning_rate=2e-3"]) == 2
    assert "training.learning_rate was 0.001, is 0.002 now" in capsys.readouterr().err
    assert (folder / "r" / "config.yaml").read_bytes() == config
    before = files()
    nobody = "judge={kind: model, model: {url: 'http://127.0.0.1:9/v1', retries: 0}}"
    assert cli.main(["evaluate", *arguments, nobody, "evaluate.temperature=0.7", "--of", "base"]) == 2
    assert "does not answer" in capsys.readouterr().err and files() == before


def test_a_full_disk_is_an_error_with_the_file_and_collect_goes_on_when_there_is_room(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["collect", *overrides(tmp_path, tiny_model, "tasks.limit=4")]
    real = Store._open

    def small(self: Store) -> None:
        """The file may grow by four pages: SQLite fails then as it does on a full disk."""
        real(self)
        pages = self._value("PRAGMA page_count")
        self._db.execute(f"PRAGMA max_page_count = {pages + 4}")

    with monkeypatch.context() as patch:
        patch.setattr(Store, "_open", small)
        assert cli.main(arguments) == 1
    shown = capsys.readouterr().err
    assert f"{tmp_path / 'r' / 'trajectories.db'}: database or disk is full. What was written before is kept" in shown
    assert cli.main(arguments) == 0
    assert "12 trajectories of 4 questions" in capsys.readouterr().out
