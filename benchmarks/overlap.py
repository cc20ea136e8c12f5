"""What does sampling the next batch beside the training save (training.lag=1), and does it learn as well?

    python -m benchmarks.overlap --quick --out FILE                                   the method on a small part of the quickstart
    python -m benchmarks.overlap --out benchmarks/results/DATE-overlap.json           the quickstart, three seeds
    python -m benchmarks.overlap --out FILE training.on_policy_batches=2 training.steps=24    the same with other settings

The same shards are trained on with lag 0 and 1 and several seeds, the local engine in a process of its own, each process with one
thread. hidden_share: of the shorter of a step's two halves (sampling the next batch; learning from this one; handing over the
weights, when both wait, is neither), how much of it ran beside the other, in the steps that lag;
hidden_share_of_run: in all of them, those before training.on_policy_batches included. reward_mean: over the steps of a run. With
lag 1 every batch but the first (and training.on_policy_batches more) comes from the policy one update before, which moves the
curve by one step; reward_of_policies is the mean over the same policies for both, those after 0, 1, 2, … updates, and tells
whether an update teaches as much. The differences of the means over seeds are given in standard errors.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from benchmarks.environment import environment
from swirl_fast.files import write_text
from swirl_fast.metrics import read_metrics

QUICK = (
    "tasks.limit=8",
    "collect.trajectories_per_question=2",
    "filter.when_empty=none",
    "training.steps=3",
    "training.trajectories_per_step=2",
    "training.group_size=4",
)
SAMPLING = ("seconds_data", "seconds_rollout", "seconds_judge")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--config", default="quickstart")
    parser.add_argument(
        "--folder", type=Path, default=Path("runs/overlap"), help="for the runs; shards there are used again"
    )
    parser.add_argument("--again", action="store_true", help="runs that are done in the folder are not made again")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    options = parser.parse_args(arguments)
    overrides = ["algorithm.importance_cap=2", *(QUICK if options.quick else ()), *options.overrides]
    seeds = range(1 if options.quick else options.seeds)

    for stage in ("collect", "judge", "filter"):
        _stage(options, stage, "data", overrides)
    runs = []
    for seed in seeds:
        for lag in (0, 1):
            name = f"lag{lag}-seed{seed}"
            done = options.again and (options.folder / name / "model" / "trained.json").is_file()
            if not done:
                shutil.rmtree(options.folder / name, ignore_errors=True)
            more = [f"training.shards={options.folder / 'data' / 'shards'}", f"training.lag={lag}", f"run.seed={seed}"]
            more += ["engine.own_process=true", "engine.threads=1"]
            if not done:
                _stage(options, "train", name, [*more, *overrides])
            rows = read_metrics(options.folder / name)
            settings = yaml.safe_load((options.folder / name / "config.yaml").read_text(encoding="utf-8"))
            after = settings["training"]["on_policy_batches"]
            runs.append({"lag": lag, "seed": seed, **measure(rows, lag, after)})
            print(json.dumps({key: value for key, value in runs[-1].items() if key != "steps"}), file=sys.stderr)
    result = {"environment": environment(), "overrides": overrides, "summary": summary(runs), "runs": runs}
    write_text(options.out, json.dumps(result, indent=1) + "\n")
    print(json.dumps(result["summary"], indent=1))


def measure(rows: Sequence[dict[str, float]], lag: int, on_policy_batches: int = 0) -> dict[str, Any]:
    """What one run's metrics say. With lag, batches on_policy_batches and on_policy_batches + 1 come from the same policy."""
    hidden = shorter = lagging = 0.0
    for i, (row, following) in enumerate(zip(rows, rows[1:], strict=False)):
        sampling = sum(following[name] for name in SAMPLING)
        learning = row["seconds"] - row["seconds_wait_for_rollout"] - row["seconds_weight_sync"]
        if not lag or i <= on_policy_batches:  # its own batch was sampled in the step
            learning -= sum(row[name] for name in SAMPLING)
        hidden += row["seconds_hidden"]
        shorter += min(sampling, learning)
        lagging += min(sampling, learning) if lag and i >= on_policy_batches else 0.0
    return {
        "seconds": sum(row["seconds"] for row in rows),
        "hidden_share": hidden / lagging if lagging else 0.0,
        "hidden_share_of_run": hidden / shorter if shorter else 0.0,
        "reward_mean": _mean_reward(rows),
        "reward_of_policies": _mean_reward(
            [*rows[:on_policy_batches], *rows[on_policy_batches + 1 :]] if lag else rows[:-1]
        ),
        "steps": [
            {key: row[key] for key in ("step", "reward", "engine_gap_mean", "seconds", "seconds_hidden", *SAMPLING)}
            for row in rows
        ],
    }


def summary(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    by_lag = {lag: [run for run in runs if run["lag"] == lag] for lag in (0, 1)}
    return {
        **{key: statistics.fmean(run[key] for run in by_lag[1]) for key in ("hidden_share", "hidden_share_of_run")},
        "seconds": {f"lag{lag}": statistics.fmean(run["seconds"] for run in own) for lag, own in by_lag.items()},
        **{key: _compared(by_lag, key) for key in ("reward_mean", "reward_of_policies")},
    }


def _compared(by_lag: dict[int, list[dict[str, Any]]], key: str) -> dict[str, Any]:
    values = {lag: [run[key] for run in own] for lag, own in by_lag.items()}
    difference = statistics.fmean(values[1]) - statistics.fmean(values[0])
    error = math.sqrt(sum(statistics.variance(own) / len(own) for own in values.values() if len(own) > 1))
    return {
        **{f"lag{lag}": own for lag, own in values.items()},
        "difference": difference,
        "difference_in_standard_errors": difference / error if error else None,
    }


def _mean_reward(rows: Sequence[dict[str, float]]) -> float:
    return statistics.fmean(row["reward"] for row in rows if math.isfinite(row["reward"]))


def _stage(options: argparse.Namespace, stage: str, name: str, overrides: Sequence[str]) -> None:
    command = [sys.executable, "-m", "swirl_fast", stage, "--config", options.config]
    command += [f"run.folder={options.folder}", f"run.name={name}", *overrides]
    if stage == "train":
        command.append("training.tensorboard=false")
    done = subprocess.run(
        command, env=os.environ | ({"OMP_NUM_THREADS": "1"} if stage == "train" else {}), stdout=sys.stderr
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed with code {done.returncode}")


if __name__ == "__main__":
    main()
