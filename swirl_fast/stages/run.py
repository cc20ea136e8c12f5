"""Every stage in order, base -> trained."""

from __future__ import annotations

import time
from typing import Any

from swirl_fast.config import Config
from swirl_fast.data.shard_source import check_clients
from swirl_fast.files import read_json, write_json
from swirl_fast.metrics import read_metrics, without_gradient
from swirl_fast.ranks import Ranks, joined
from swirl_fast.stages.build import build_task
from swirl_fast.stages.collect import check_collection, collect
from swirl_fast.stages.evaluate import evaluate, evaluate_trained
from swirl_fast.stages.filter import filter
from swirl_fast.stages.judge import check_tasks, judge
from swirl_fast.stages.report import report
from swirl_fast.stages.scores import accuracy_table
from swirl_fast.stages.train import train
from swirl_fast.training.build import check_machine
from swirl_fast.training.resume import check_newest

SHOWN = (
    "accuracy",
    "accuracy_interval",
    "process_label",
    "process_label_interval",
    "unknown",
    "malformed",
    "questions",
)


def run(config: Config) -> None:
    """Every stage in order, then the table base -> trained and summary.json. Under torchrun, one call a rank."""
    with joined() as ranks:
        _run(config, ranks)


def _run(config: Config, ranks: Ranks) -> None:
    started = time.perf_counter()
    previous = read_json(config.folder / "summary.json")
    check_clients(config.filter.upload)
    check_machine(config, ranks)  # hours before training would say so
    check_tasks(config, build_task(config))
    check_collection(config)  # before the evaluation sets an earlier one aside
    check_newest(config, build_task)
    base = evaluate(config, "base")
    collect(config)
    judge(config)
    filter(config)
    train(config)
    trained = evaluate_trained(config)
    if ranks.main:
        _write_summary(config, base, trained, previous, time.perf_counter() - started)
    report(config)
    if ranks.main:
        table = accuracy_table({"base": base, "trained": trained})
        if nothing := without_gradient(read_metrics(config.folder)):
            table += f"\n\n{nothing}"
        seconds = read_json(config.folder / "summary.json")["seconds"]
        print(f"\n{table}\n\n{config.folder / 'summary.json'}  ({seconds:.0f} s)")


def _write_summary(
    config: Config, base: dict[str, Any], trained: dict[str, Any], previous: dict[str, Any] | None, seconds: float
) -> None:
    rows = {"base": {key: base.get(key) for key in SHOWN}, "trained": {key: trained.get(key) for key in SHOWN}}
    if previous is not None and {name: previous.get(name) for name in rows} == rows:
        seconds = previous["seconds"]  # everything was there already: keep the time that it took to make
    write_json(config.folder / "summary.json", {**rows, "seconds": seconds})
