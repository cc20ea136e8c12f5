"""The list of metrics, the sums they are made of, and what a real step writes."""

from __future__ import annotations

import dataclasses
import math
import subprocess
import sys
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
import torch
from support import small_models
from support.parallel_variants import config_of, trainer_of
from support.paths import ROOT
from support.runs import environment

from swirl_fast.config import TrainingConfig
from swirl_fast.metrics import (
    BY_NAME,
    CONSOLE,
    GAMING,
    METRICS,
    OVER_RANKS,
    Max,
    Mean,
    PhaseTimer,
    Same,
    Sum,
    console_line,
    glossary,
    values,
)
from swirl_fast.ranks import Ranks
from swirl_fast.rollouts.gaming import GamingSigns
from swirl_fast.rollouts.pipeline import RolloutCounts
from swirl_fast.training.step_metrics import StepSums, over_ranks

CPU = torch.device("cpu")


def test_a_step_has_exactly_the_declared_metrics(tmp_path: Path) -> None:
    """With a peak, so that there is an MFU; with a reference and a shared GPU, so that no phase is missing. The model has no experts."""
    small_models.build("llama", torch.float32).save_pretrained(tmp_path)
    names = [metric.name for metric in METRICS if metric.name != "routing_gap"]
    config = config_of(tmp_path, "turns")
    config.training.peak_tflops = 1.0
    row = trainer_of(config, Ranks(0, 1, CPU), []).train_step()
    assert list(row) == names
    config = config_of(tmp_path, "plain")
    config.training.check_model = False
    row = trainer_of(config, Ranks(0, 1, CPU), []).train_step()
    absent = ("mfu", "mfu_step", "model_check_logprob", "model_check_gradient", "seconds_share_gpu")
    assert list(row) == [name for name in names if name not in absent]


def test_every_sum_is_declared_once_with_its_reduction() -> None:
    fields = [field for part in (StepSums, GamingSigns, RolloutCounts) for field in dataclasses.fields(part)]
    reductions = {field.name: field.metadata[OVER_RANKS] for field in fields if OVER_RANKS in field.metadata}
    assert set(reductions.values()) == {"sum", "max"}
    assert len({field.name for field in fields}) == len(fields) - 1, (
        "only `seconds` is in two: of phases, and of a step"
    )
    reductions["rank_seconds"] = "max"
    for metric in METRICS:
        if isinstance(metric.source, Max):
            assert reductions[metric.source.of] == "max", metric.name
        elif isinstance(metric.source, Sum):
            assert reductions[metric.source.of] == "sum", metric.name
        elif isinstance(metric.source, Mean):
            assert reductions[metric.source.of] == "sum" and metric.source.per in reductions, metric.name


def test_ranks_put_their_sums_together() -> None:
    """By the reductions of a group of two, the other rank of which has 5 of everything."""

    class Two(Ranks):
        def sum(self, values: torch.Tensor) -> torch.Tensor:
            return values + 5

        def max(self, values: torch.Tensor) -> torch.Tensor:
            return values.clamp(min=5)

    parts = (
        StepSums(rewards=2.0, gap_max=7.0, ratio_max=3.0),
        GamingSigns(cut_off=1.0),
        RolloutCounts(seconds={"data": 9.0}),
    )
    together = over_ranks(Two(0, 2, CPU), *parts)
    assert together["rewards"] == 7.0 and together["cut_off"] == 6.0 and together["prompt_tokens"] == 5.0
    assert together["gap_max"] == 7.0 and together["ratio_max"] == 5.0 and together["seconds"] == 5.0


def test_names_are_unique_and_those_used_elsewhere_are_declared() -> None:
    assert len(BY_NAME) == len(METRICS)
    keep_best = set(get_args(get_type_hints(TrainingConfig)["keep_best"])) - {""}
    assert CONSOLE.keys() <= BY_NAME.keys() and keep_best and keep_best <= BY_NAME.keys()
    assert all(metric in METRICS for metric in GAMING)
    assert all(metric.meaning and "|" not in metric.meaning for metric in METRICS)


def test_what_is_not_declared_or_missing_is_refused() -> None:
    with pytest.raises(KeyError, match="not declared as metrics: b"):
        values((), {}, {"b": 1.0})
    assert values((), {}, {"reward/one task": 0.5}) == {"reward/one task": 0.5}
    with pytest.raises(KeyError, match="not declared as metrics: kl/one task"):
        values((), {}, {"kl/one task": 1.0})
    with pytest.raises(KeyError, match="step"):
        values(tuple(metric for metric in METRICS if isinstance(metric.source, Same)), {}, {})


def test_the_console_line() -> None:
    row = {metric.name: 0.25 for metric in METRICS} | {"step": 3}
    assert console_line(row, 10) == (
        "step 3/10  reward 0.250  label 0.250  malformed 0.25  unknown 0  kl 0.2500  entropy 0.25  grad 0.25  gap 2.5e-01  cached 25%  "
        "tok/s 0 (0 effective)  mfu 25.0% (25.0% of the step)  memory 0.2 GiB  0.2 s"
    )


def test_the_console_line_leaves_out_what_is_not_a_number() -> None:
    row = {
        "step": 3,
        "reward": math.nan,
        "unknown": 0,
        "grad_norm": math.nan,
        "engine_gap_mean": math.nan,
        "seconds": 2,
    }
    assert console_line(row, 10) == "step 3/10  unknown 0  grad nan  2.0 s"


def test_a_step_that_computed_nothing_has_no_speed() -> None:
    row = {metric.name: 0.0 for metric in METRICS} | {"step": 3, "reward": 1.0}
    assert "tok/s" not in console_line(row, 10) and "mfu" not in console_line(row, 10)
    assert "grad 0.00" in console_line(row, 10)


def test_the_glossary_is_up_to_date() -> None:
    written = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
    assert written == glossary(), "run: python -m swirl_fast.metrics > docs/metrics.md"


def test_the_list_needs_no_torch() -> None:
    code = "import sys, swirl_fast.metrics; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], env=environment(), timeout=60).returncode == 0


def test_seconds_of_a_phase_are_without_those_of_phases_inside() -> None:
    now = iter([0.0, 1.0, 4.0, 5.0, 20.0, 22.0])
    before = {"data": 8.0}
    timer = PhaseTimer(before, clock=lambda: next(now))
    with timer.phase("pack"), timer.phase("gather"):
        pass
    assert timer.seconds == {"data": 8.0, "gather": 3.0, "pack": 2.0}
    with timer.phase("gather"):
        pass
    assert timer.seconds == {"data": 8.0, "gather": 5.0, "pack": 2.0} and before == {"data": 8.0}
