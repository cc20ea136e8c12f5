"""`swirl-fast experiment FILE`: does the cells of an experiment, whose file experiments/grid.py reads.

A finished cell is one file, cells/ARM-SEED-DIGEST.json, all that the summary and the report need, and is not done again; the digest is
that of its settings, so that a changed experiment does what changed. Settings name models and data files by their paths: the file keeps
hashes of what lay there, and where that has changed the experiment is refused. A filter that keeps just what another arm's keeps would
give the same training, so that arm's numbers are taken (`same_as` in the file). The same command started twice, also on other machines
with the same folder, shares the work: a cell belongs to whoever holds the lock in its run's folder.
"""

from __future__ import annotations

import contextlib
import copy
import fcntl
import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from swirl_fast import stages
from swirl_fast.config import ConfigError
from swirl_fast.data.shards import read_manifest
from swirl_fast.experiments.grid import Cell, Experiment
from swirl_fast.experiments.inputs import changed, inputs
from swirl_fast.files import write_json, write_text
from swirl_fast.metrics import read_metrics


def run_experiment(experiment: Experiment, cells: Sequence[Cell] | None = None) -> list[str]:
    """Does the cells that are not done and not being done elsewhere, then writes summary.json and report.html of all that are done.

    cells: some of the experiment's, None: all. A cell that fails does not stop the others. Returns what is missing of them, a line a cell.
    Raises ConfigError, before any work, when a finished cell was made of a model or a data file that has changed since.
    """
    _check_inputs(experiment)
    failed: dict[str, str] = {}
    for number, cell in enumerate(experiment.cells, 1):
        if cells is not None and cell not in cells:
            continue
        path = experiment.path(cell)
        if path.is_file():
            continue
        try:
            with _claimed(cell.config.folder / "lock", wait=False) as mine:
                if not mine or path.is_file():
                    continue
                print(
                    f"experiment {experiment.name}: {number} of {len(experiment.cells)}, {cell.arm}, seed {cell.seed}"
                )
                write_text(
                    path, json.dumps(_run_cell(experiment, cell)) + "\n"
                )  # one line: a study's cells are kept in git
                _clean(experiment, cell)
        except (ValueError, ImportError, OSError, RuntimeError, FloatingPointError) as error:
            failed[cell.name] = str(error)
            print(f"experiment {experiment.name}: {cell.arm}, seed {cell.seed}: {error}")
    if experiment.done():
        write_outputs(experiment)
    return [
        f"{cell.arm}, seed {cell.seed}: {failed.get(cell.name, 'is being done elsewhere, or was interrupted there')}"
        for cell in (experiment.cells if cells is None else cells)
        if not experiment.path(cell).is_file()
    ]


def _check_inputs(experiment: Experiment) -> None:
    """Cells that were done before their files kept this have no `inputs`: nothing is known about them."""
    finished = experiment.done()
    now = inputs(one for cell in experiment.cells if (cell.arm, cell.seed) in finished for one in cell.configs)
    stale: dict[str, list[str]] = {}
    for (arm, seed), result in finished.items():
        for path in changed(result.get("inputs", {}), now):
            stale.setdefault(path, []).append(f"{arm}, seed {seed}")
    if stale:
        listed = "; ".join(f"{path} has changed since {' and '.join(cells)}" for path, cells in stale.items())
        raise ConfigError(
            f"experiment {experiment.name}: {listed}: what is done is in {experiment.results / 'cells'} and could not be compared with "
            "what is done now. Put back what was there, or give the experiment another name (and other results)"
        )


def write_outputs(experiment: Experiment) -> None:
    """summary.json, report.html and the table on the screen, from the cells that are done. Raises ValueError when none is."""
    from swirl_fast.experiments.summary import results_table, summarise
    from swirl_fast.report.experiment import write_experiment_report

    results = experiment.done()
    if not results:
        raise ValueError(
            f"experiment {experiment.name}: none of its {len(experiment.cells)} cells is done in {experiment.results / 'cells'}, so "
            "there is nothing to report; start it without --report"
        )
    summary = summarise(
        experiment.arms,
        experiment.evaluations,
        experiment.seeds,
        experiment.compare,
        results,
        experiment.pairs,
        experiment.fewer_seeds,
    )
    write_json(experiment.summary, summary)
    report = write_experiment_report(
        experiment.results, experiment.name, summary, results, experiment.differs, experiment.command
    )
    print(f"\n{results_table(summary)}\n\n{experiment.summary}  {report}")


def _run_cell(experiment: Experiment, cell: Cell) -> dict[str, Any]:
    result: dict[str, Any] = {"arm": cell.arm, "seed": cell.seed, "trained": cell.trained}
    weights = None
    _make_start(experiment, cell)
    result["inputs"] = inputs(cell.configs)
    if cell.trained:
        _collect_and_filter(cell)
        result["filter"] = json.loads((cell.config.folder / "filter.json").read_text(encoding="utf-8"))
        if same := _same_training(experiment, cell):
            print(
                f"experiment {experiment.name}: {cell.arm} keeps the trajectories of {same['arm']}, whose numbers are taken"
            )
            return result | {key: same[key] for key in ("training", "evaluations")} | {"same_as": same["arm"]}
        stages.train(cell.config)
        weights = str(cell.model)
        result["training"] = _cost(cell.config.folder)
    result["evaluations"] = {name: stages.evaluate(one, name, weights) for name, one in cell.evaluations.items()}
    return result


def _make_start(experiment: Experiment, cell: Cell) -> None:
    """The model that a cell starts from, where it is not there: its arm was not asked for, or failed, or only its numbers were kept."""
    start = next((one for one in experiment.cells if one.name == cell.start), None)
    if start is None or (start.model / "config.json").is_file():
        return
    _make_start(experiment, start)
    with _claimed(start.config.folder / "lock", wait=True):
        if not (start.model / "config.json").is_file():  # it was being made elsewhere
            _collect_and_filter(start)
            stages.train(start.config)


def _same_training(experiment: Experiment, cell: Cell) -> dict[str, Any] | None:
    """What is in the file of a finished cell that was trained on the same shards with the same settings; None without one."""
    for one in experiment.cells:
        if one.name == cell.name or one.besides_filter != cell.besides_filter or not experiment.path(one).is_file():
            continue
        if _shards(one) == _shards(cell) is not None:
            found: dict[str, Any] = json.loads(experiment.path(one).read_text(encoding="utf-8"))
            return found
    return None


def _shards(cell: Cell) -> str | None:
    folder = cell.config.folder / "shards"
    return read_manifest(folder).content_hash if folder.is_dir() else None


def _collect_and_filter(cell: Cell) -> None:
    collection = copy.deepcopy(cell.config)
    collection.run.name = cell.config.store.parent.name
    with _claimed(cell.config.store.with_name("lock"), wait=True):
        stages.collect(collection)
        stages.judge(cell.config)
    stages.filter(cell.config)


def _cost(folder: Path) -> dict[str, Any]:
    """What a training took and how its reward went."""
    rows = read_metrics(folder)

    def total(key: str) -> float:
        return sum(row[key] for row in rows)

    return {
        "steps": len(rows),
        "seconds": total("seconds"),
        "generated_tokens": total("action_tokens"),
        "actions": total("actions"),
        "tokens_computed": total("tokens_computed"),
        "reward": [row["reward"] if row["reward"] == row["reward"] else None for row in rows],
    }


def _clean(experiment: Experiment, cell: Cell) -> None:
    if experiment.keep in ("results", "models"):
        shutil.rmtree(cell.config.folder / "checkpoints", ignore_errors=True)
    if experiment.keep == "results" and not any(one.start == cell.name for one in experiment.cells):
        shutil.rmtree(cell.model, ignore_errors=True)


@contextlib.contextmanager
def _claimed(path: Path, wait: bool) -> Iterator[bool]:
    """Holds a lock that the system releases when its holder dies; False when another one holds it and `wait` is false."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        yield True
