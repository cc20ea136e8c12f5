"""Trainings that are killed, told to stop, and started again, on one rank and on two: what comes out is what an undisturbed one gives."""

from __future__ import annotations

import itertools
import json
import math
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support import forks
from support.paths import SUPPORT
from support.runs import command, copy_of, environment, kill_when, overrides, weights

from swirl_fast import cli, stages
from swirl_fast.config import ConfigError, load
from swirl_fast.engines.engine import Request, Sampling
from swirl_fast.exits import EXIT_RESUMABLE
from swirl_fast.judges.judge import Judge
from swirl_fast.metrics import read_metrics
from swirl_fast.rollouts import pipeline
from swirl_fast.rollouts.at_states import SampledAction
from swirl_fast.training import build
from swirl_fast.training.checkpoint_reader import read_metadata
from swirl_fast.training.trainer import Metrics, Trainer
from swirl_fast.verdict import Judgement, Verdict

STEPS = 10


def arguments(folder: Path, model: Path, judged: str, *more: str) -> list[str]:
    """18 trajectories, 6 a step: three steps are an epoch."""
    small = ("training.trajectories_per_step=6", "training.group_size=2", f"training.steps={STEPS}")
    rest = ("training.learning_rate=1e-4", "training.weight_decay=0.1", "training.checkpoint_every=100")
    return overrides(folder, model, judged, *small, *rest, *more)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, judged: str) -> Path:
    folder = tmp_path_factory.mktemp("prepared")
    for stage in ("collect", "judge", "filter"):
        assert cli.main([stage, *arguments(folder, tiny_model, judged)]) == 0
    return folder


@pytest.fixture(scope="module")
def straight(prepared: Path, tiny_model: Path, judged: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten steps without a disturbance, on one rank."""
    folder = copy_of(prepared, tmp_path_factory.mktemp("straight"))
    done = faulty(folder, "none", ["train", *arguments(folder, tiny_model, judged)])
    assert done.returncode == 0, done.stderr
    return folder


def faulty(
    folder: Path, faults: str, stage: list[str], ranks: int = 0, restarts: int = 0
) -> subprocess.CompletedProcess[str]:
    """Under torchrun where ranks are given."""
    script = [str(SUPPORT / "faulty.py"), str(folder), faults, *stage]
    if not ranks:
        return forks.run(script, environment(), timeout=1200, new_session="group" in faults)
    line = [*command(ranks=ranks)[:-2], "--max-restarts", str(restarts), *script]
    return subprocess.run(line, env=environment(), capture_output=True, text=True, timeout=1200)


def checkpoints(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "r" / "checkpoints").iterdir())


def assert_same_bits(found: Path, wanted: Path) -> None:
    one, other = weights(found), weights(wanted)
    assert one.keys() == other.keys()
    for name, tensor in other.items():
        assert torch.equal(tensor, one[name]), name
    for row, expected in zip(read_metrics(found / "r"), read_metrics(wanted / "r"), strict=True):
        for key in ("step", "loss", "grad_norm", "reward", "kl", "action_tokens"):
            assert row[key] == expected[key], key


def test_killed_told_to_stop_and_killed_while_it_writes_a_checkpoint(
    prepared: Path, straight: Path, tiny_model: Path, judged: str, tmp_path: Path
) -> None:
    """10 steps = 4, SIGKILL, 2, SIGTERM, 2, SIGKILL in the write of step 8, and 4 again: bit for bit."""
    folder = copy_of(prepared, tmp_path)
    every = [["train", *arguments(folder, tiny_model, judged, f"training.checkpoint_every={n}")] for n in (4, 100, 8)]
    kill_when(every[0], lambda: "step_000004" in (checkpoints(folder) if (folder / "r/checkpoints").exists() else ()))
    assert checkpoints(folder) == ["step_000004"]
    assert not (folder / "r" / "model").exists()

    told = faulty(folder, "6:0:term", every[1])
    assert told.returncode == EXIT_RESUMABLE == 75, told.stderr
    assert "SIGTERM: stopped at step 6 of 10, start it again" in told.stderr
    assert checkpoints(folder) == ["step_000004", "step_000006"]
    assert [row["step"] for row in read_metrics(folder / "r")] == list(range(1, 7))

    killed = faulty(folder, "8:0:write", every[2])
    assert killed.returncode == -signal.SIGKILL
    assert checkpoints(folder) == ["step_000004", "step_000006", "step_000008.tmp"]

    done = faulty(folder, "none", every[1])
    assert done.returncode == 0, done.stderr
    assert checkpoints(folder) == ["step_000006", "step_000010"]
    assert_same_bits(folder, straight)


def test_adapters_alone_are_in_checkpoints_and_a_kill_leaves_no_trace(
    prepared: Path, tiny_model: Path, judged: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """SIGKILL in the third step of four; then both forms of export, the merged one from the checkpoint as from the training itself."""
    wanted, folder = copy_of(prepared, tmp_path / "straight"), copy_of(prepared, tmp_path / "killed")
    lora = ("model.lora.rank=4", "training.steps=4", "training.learning_rate=1e-3", "training.checkpoint_every=2")
    stage, other = (arguments(place, tiny_model, judged, *lora) for place in (folder, wanted))
    assert cli.main(["train", *other]) == 0
    said = capsys.readouterr().out
    assert "train: 7,424 of 98,752 parameters are trained (7.5 %): adapters of rank 4 at 14 linear layers" in said
    assert faulty(folder, "3:0:kill", ["train", *stage]).returncode == -signal.SIGKILL
    done = faulty(folder, "none", ["train", *stage])
    assert done.returncode == 0, done.stderr
    assert_same_bits(folder, wanted)
    before, after = load_file(tiny_model / "model.safetensors"), weights(folder)
    moved = {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}
    assert moved == {name for name in before if name.endswith("_proj.weight")}

    held = read_metadata(folder / "r" / "checkpoints" / "step_000004").state_dict_metadata
    assert all("lora_" in name for name in held if "param_groups" not in name)
    assert {name.split(".")[0] for name in held} == {"model", "optimizer"}

    export = ["export", *stage, "--checkpoint", "step_000004"]
    assert cli.main([*export, "--merged"]) == 0 == cli.main([*export, "--adapter"])
    exported = folder / "r" / "model-step_000004" / "model.safetensors"
    assert exported.read_bytes() == (folder / "r" / "model" / "model.safetensors").read_bytes()
    assert (folder / "r" / "adapter-step_000004" / "adapter_config.json").is_file()
    assert cli.main(["train", *arguments(folder, tiny_model, judged, *lora[1:])]) == 2
    assert "model.lora" in capsys.readouterr().err


def test_told_to_stop_in_the_last_step_it_does_not_go_on_to_evaluate(
    prepared: Path, tiny_model: Path, judged: str, tmp_path: Path
) -> None:
    folder = copy_of(prepared, tmp_path)
    stage = ["run", *arguments(folder, tiny_model, judged, "training.steps=2", "tasks.eval_limit=1")]
    told = faulty(folder, "2:0:term", stage)
    assert told.returncode == EXIT_RESUMABLE, told.stderr
    assert "SIGTERM: stopped at step 2 of 2, start it again" in told.stderr
    assert checkpoints(folder) == ["step_000002"]
    assert not (folder / "r" / "model").exists() and not (folder / "r" / "evaluations" / "trained.json").exists()
    done = faulty(folder, "none", stage)
    assert done.returncode == 0, done.stderr
    assert checkpoints(folder) == ["step_000002"] and (folder / "r" / "evaluations" / "trained.json").exists()


def test_told_to_stop_together_with_the_process_of_its_engine(
    prepared: Path, tiny_model: Path, judged: str, tmp_path: Path
) -> None:
    """torchrun and Slurm signal whole groups; the step under way still updates the engine's weights."""
    folder = copy_of(prepared, tmp_path)
    beside = ("engine.own_process=true", "engine.threads=1", "training.lag=1", "algorithm.importance_cap=2")
    stage = ["train", *arguments(folder, tiny_model, judged, *beside)]
    told = faulty(folder, "4:0:group", stage)
    assert told.returncode == EXIT_RESUMABLE, told.stderr
    (stopped,) = checkpoints(folder)
    assert (folder / "4:0:group").exists() and f"SIGTERM: stopped at step {int(stopped[5:])} of 10" in told.stderr
    done = faulty(folder, "none", stage)
    assert done.returncode == 0, done.stderr
    assert checkpoints(folder) == [stopped, "step_000010"] and (folder / "r" / "model").exists()


def test_a_rank_dies_and_torchrun_goes_on_then_one_rank_finishes_what_two_began(
    prepared: Path, straight: Path, tiny_model: Path, judged: str, tmp_path: Path
) -> None:
    """Two ranks: one dies in step 3, torchrun starts both again; in step 5 torchrun gets SIGTERM. One rank goes on to step 10."""
    folder = copy_of(prepared, tmp_path)
    stage = ["train", *arguments(folder, tiny_model, judged, "training.checkpoint_every=2")]
    two = faulty(folder, "3:1:kill,5:1:agent", stage, ranks=2, restarts=1)
    assert two.returncode != 0 and "SIGTERM: stopped at step 5 of 10" in two.stderr, two.stderr
    assert {path.name for path in folder.glob("*:*")} == {"3:1:kill", "5:1:agent"}
    assert checkpoints(folder) == ["step_000004", "step_000005"]
    one = faulty(folder, "none", stage)
    assert one.returncode == 0, one.stderr

    steps = {
        step: [
            id_
            for path in sorted(folder.glob(f"{step}-*.json"))
            for id_ in json.loads(path.read_text(encoding="utf-8"))
        ]
        for step in range(1, STEPS + 1)
    }
    assert len(list(folder.glob("[1-5]-1.json"))) == 5 and not list(folder.glob("[6-9]-1.json"))
    everything = {id_ for step in (1, 2, 3) for id_ in steps[step]}
    assert len(everything) == 18
    for epoch in ((1, 2, 3), (4, 5, 6), (7, 8, 9)):
        assert sorted(id_ for step in epoch for id_ in steps[step]) == sorted(everything), "lost or doubled"
    for step in range(1, STEPS + 1):
        assert sorted(steps[step]) == sorted(json.loads((straight / f"{step}-0.json").read_text(encoding="utf-8")))

    before = load_file(tiny_model / "model.safetensors")
    wanted, found = weights(straight), weights(folder)
    moved = max(float((wanted[name] - before[name]).abs().max()) for name in wanted)
    apart = max(float((found[name] - wanted[name]).abs().max()) for name in wanted)
    assert moved > 5e-4 and apart < 1e-5, (moved, apart)


@pytest.mark.parametrize("wrong", [float("nan"), float("-inf")])
def test_steps_without_an_update_leave_everything_as_it_was(
    wrong: float, prepared: Path, tiny_model: Path, judged: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In step 2 the log-probs are not numbers, or that of every third token is minus infinity, which an importance weight of 0 would
    hide from the loss; in step 5 the judge is silent: no parameter and no moment moves, the rest trains."""
    folder = copy_of(prepared, tmp_path)
    seen: list[list[torch.Tensor]] = []
    under_way = 0
    real_judge = pipeline.judge_sampled

    class Watched(Trainer):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            self.policy.register_forward_hook(lambda *call: spoilt(call[-1]) if under_way == 2 else None)

        def train_step(self) -> Metrics:
            nonlocal under_way
            under_way = self.step + 1
            metrics = super().train_step()
            of_optimizer = [value for state in self.optimizer.state.values() for _, value in sorted(state.items())]
            seen.append([tensor.detach().clone() for tensor in (*self.policy.parameters(), *of_optimizer)])
            assert self.engine.generate([request]).pop().pop().policy_version == under_way
            return metrics

    def spoilt(logp_N: torch.Tensor) -> torch.Tensor:
        return logp_N * wrong if math.isnan(wrong) else logp_N.masked_fill(torch.arange(len(logp_N)) % 3 == 0, wrong)

    request = Request(tokens=(1, 2), sampling=Sampling(1), n=1, stop_ids=(), seed=0, cache_key="x")

    def silent(sampled: list[SampledAction], judge: Judge) -> list[Judgement]:
        judgements = real_judge(sampled, judge)
        if under_way != 5:
            return judgements
        unknown = Judgement(Verdict.UNKNOWN, "not there")
        return [
            own if one.action.kind == "malformed" else unknown for one, own in zip(sampled, judgements, strict=True)
        ]

    monkeypatch.setattr(build, "Trainer", Watched)
    monkeypatch.setattr(pipeline, "judge_sampled", silent)
    more = (
        "algorithm.importance_cap=2",
        "algorithm.kl_coef=0",
        "training.steps=6",
        "training.keep_checkpoints=9",
        "training.checkpoint_every=2",
        "training.keep_best=reward",
    )
    with pytest.warns(UserWarning, match="no update was made") as caught:
        assert cli.main(["train", *arguments(folder, tiny_model, judged, *more)]) == 0
    texts = [str(one.message) for one in caught if "no update was made" in str(one.message)]
    assert len(texts) == 2 and "step 2: the gradient norm is" in texts[0] and "step 5: the judge" in texts[1]
    unchanged = [all(map(torch.equal, one, other)) for one, other in itertools.pairwise(seen)]
    assert unchanged == [True, False, False, True, False]
    rows = read_metrics(folder / "r")
    assert [(row["skipped_steps"], row["unknown_steps"]) for row in rows] == [(0, 0), *[(1, 0)] * 3, (1, 1), (1, 1)]
    assert math.isnan(rows[1]["grad_norm"]) == math.isnan(wrong) and rows[4]["grad_norm"] == 0
    assert rows[4]["malformed"] > 0, "these have a verdict, and alone they are not to be learned from"
    assert checkpoints(folder) == ["best", "step_000003", "step_000004", "step_000006"], "put off to the next good step"
    state = json.loads((folder / "r" / "checkpoints" / "step_000006" / "state.json").read_text(encoding="utf-8"))
    assert state["guards"] | {"skipped_steps": 1, "unknown_steps": 1, "in_a_row": 0} == state["guards"]
    assert state["best"]["mean"] == rows[5]["reward"], "the silent step must not count"


def test_gradients_that_stay_broken_stop_training(
    prepared: Path,
    tiny_model: Path,
    judged: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = copy_of(prepared, tmp_path)
    real = torch.nn.utils.clip_grad_norm_
    calls = itertools.count(1)
    monkeypatch.setattr(
        torch.nn.utils, "clip_grad_norm_", lambda *a: real(*a) * (1.0 if next(calls) == 1 else float("inf"))
    )
    more = ("training.checkpoint_every=1", "training.max_skipped_steps=2")
    with pytest.warns(UserWarning, match="step 2: the gradient norm is inf: no update"):
        assert cli.main(["train", *arguments(folder, tiny_model, judged, *more)]) == 1
    text = capsys.readouterr().err
    for part in ("step 3: the gradient norm is inf", "2 steps in a row", "learning_rate", "float32", "is intact"):
        assert part in text
    assert checkpoints(folder) == ["step_000001"] and not (folder / "r" / "model").exists()


def test_a_time_limit_that_has_passed_starts_no_step(
    prepared: Path, tiny_model: Path, judged: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = copy_of(prepared, tmp_path)
    late = arguments(folder, tiny_model, judged, "training.time_limit=0.0001")
    assert cli.main(["train", *late]) == EXIT_RESUMABLE
    assert "training.time_limit=0.0001 minutes: stopped at step 0 of 10" in capsys.readouterr().err
    assert not read_metrics(folder / "r") and not checkpoints(folder)


def test_a_judge_that_refuses_later_is_no_fault_of_the_settings_and_costs_no_finished_step(
    prepared: Path, tiny_model: Path, judged: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With lag, batch 3 fails beside step 2: step 2 and its checkpoint count."""
    folder = copy_of(prepared, tmp_path)
    real, calls = pipeline.judge_sampled, itertools.count(1)

    def refused(*arguments: Any) -> list[Judgement]:
        if next(calls) == 3:
            raise ConfigError("judge.model.url: the server answers 404")
        return real(*arguments)

    monkeypatch.setattr(pipeline, "judge_sampled", refused)
    lagging = ("training.lag=1", "algorithm.importance_cap=2", "engine.own_process=true", "training.checkpoint_every=2")
    assert cli.main(["train", *arguments(folder, tiny_model, judged, *lagging)]) == 1
    assert [row["step"] for row in read_metrics(folder / "r")] == [1, 2] and checkpoints(folder) == ["step_000002"]


def test_a_checkpoint_is_exported_and_a_finished_training_is_not_repeated(
    prepared: Path, tiny_model: Path, judged: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same settings end at once; others are refused, with the setting that differs."""
    folder = copy_of(prepared, tmp_path)
    more = (
        "training.steps=2",
        "training.checkpoint_every=1",
        "training.keep_best=reward",
        "training.keep_checkpoints=2",
    )
    stage = arguments(folder, tiny_model, judged, *more, "training.kl_warning=1e-9")
    with pytest.warns(
        UserWarning, match="training step 2: the KL to the reference is .* above training.kl_warning=1e-09"
    ):
        assert cli.main(["train", *stage]) == 0
    assert cli.main(["export", *stage, "--checkpoint", "step_000002"]) == 0
    exported, final = folder / "r" / "model-step_000002", folder / "r" / "model"
    assert (exported / "model.safetensors").read_bytes() == (final / "model.safetensors").read_bytes()
    assert cli.main(["export", *stage, "--checkpoint", "step_000002"]) == 2
    assert "is already there" in capsys.readouterr().err
    assert cli.main(["export", *stage]) == 0 and (folder / "r" / "model-best" / "tokenizer.json").is_file()
    assert cli.main(["export", *stage, "--checkpoint", "step_7"]) == 1
    assert "is not a checkpoint; those in" in capsys.readouterr().err

    assert cli.main(["train", *stage]) == 0 and "is trained to step 2 already" in capsys.readouterr().out
    assert cli.main(["train", *stage, "training.on_policy_batches=1"]) == 2
    assert "training.on_policy_batches was 0, is 1 now" in capsys.readouterr().err


def test_a_coverage_of_a_task_that_is_not_there_is_named(tmp_path: Path) -> None:
    overrides = ["tasks.limit=2", "tasks.eval_limit=1", "judge.rules.coverage_by_task.svmap=single"]
    config = load(None, [*overrides, f"run.folder={tmp_path}"])
    with pytest.raises(ConfigError, match="coverage_by_task: no task here is called svmap; there is chain_sum"):
        stages.judge(config)
