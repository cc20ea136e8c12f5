"""`swirl-fast experiment FILE`: a grid of runs (filter x algorithm x data x task), each with several seeds, every one evaluated alike.

    name: filters                    # results go to runs/filters
    config: ../quickstart.yaml       # a run's config, relative to this file (optional)
    settings: {training: {steps: 5}} # on top of it, for every run
    seeds: [0, 1, 2]
    arms:                            # what is compared: each a few settings
      base: {train: false}           # the model as it is
      swirl: {filter.kind: process}
      sft: {filter.kind: process, algorithm.name: sft}
      longer: {from: swirl, filter.kind: process}   # starts from the model that swirl ends with, of the same seed
    grid: {filter.max_trajectories: [16, 64]}   # optional: every trained arm with every combination
    evaluations:                     # "in_domain" and others; each a few settings
      in_domain: {}
      sums: {tasks.dataset: chain_sum}
    compare: [swirl, base]           # whose relative gain the summary states
    keep: models                     # of a run's files: results | models | all (checkpoints, too)
    results: ../../docs/filters      # where cells and report go, relative to this file (optional; default: runs/filters)
    summary: ../../docs/filters.json # (optional; default: summary.json there)

A cell is one arm with one seed. Cells whose settings up to the collection agree share one collection. A finished cell is one file,
cells/ARM-SEED-DIGEST.json, all that the summary and the report need, and is not done again; the digest is that of its settings, so that a
changed experiment does what changed. Settings name models and data files by their paths: the file keeps hashes of what lay there, and
where that has changed the experiment is refused. A filter that keeps just what another arm's keeps would give the same training, so that
arm's numbers are taken (`same_as` in the file). The same command started twice, also on other machines with the same folder, shares the
work: a cell belongs to whoever holds the lock in its run's folder.
"""

from __future__ import annotations

import contextlib
import copy
import fcntl
import hashlib
import itertools
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from swirl_fast import stages
from swirl_fast.config import Config, ConfigError, load
from swirl_fast.data.shards import read_manifest
from swirl_fast.experiments.inputs import changed, inputs
from swirl_fast.files import write_json
from swirl_fast.metrics import read_metrics

KEYS = (
    "name",
    "folder",
    "config",
    "settings",
    "seeds",
    "arms",
    "grid",
    "evaluations",
    "compare",
    "keep",
    "results",
    "summary",
)
KEEP = ("results", "models", "all")


@dataclass(frozen=True)
class Cell:
    """evaluations: name -> config. config: of the run; one that is not trained is only evaluated. digest: of all settings. besides_filter:
    of all but the filter's. start: the name of the cell whose model it starts from."""

    arm: str
    seed: int
    trained: bool
    config: Config
    evaluations: Mapping[str, Config]
    digest: str
    besides_filter: str
    start: str | None = None

    @property
    def model(self) -> Path:
        """What it ends with."""
        return self.config.folder / "model"

    @property
    def configs(self) -> list[Config]:
        """Of all that is done for it."""
        return [*([self.config] if self.trained else []), *self.evaluations.values()]

    @property
    def name(self) -> str:
        return f"{self.arm}-{self.seed}-{self.digest}"


@dataclass(frozen=True)
class Experiment:
    name: str
    results: Path
    summary: Path
    seeds: tuple[int, ...]
    cells: tuple[Cell, ...]
    compare: tuple[str, str]
    keep: str

    @property
    def arms(self) -> list[str]:
        return list(dict.fromkeys(cell.arm for cell in self.cells))

    @property
    def evaluations(self) -> list[str]:
        return list(self.cells[0].evaluations)

    def path(self, cell: Cell) -> Path:
        return self.results / "cells" / f"{cell.name}.json"

    def done(self) -> dict[tuple[str, int], dict[str, Any]]:
        """(arm, seed) -> what the finished cells' files hold."""
        paths = {(cell.arm, cell.seed): self.path(cell) for cell in self.cells}
        return {key: json.loads(path.read_text()) for key, path in paths.items() if path.is_file()}


def read_experiment(path: str | Path, overrides: Sequence[str] = ()) -> Experiment:
    """overrides: `section.key=value`, on top of `settings`. Every config is built and checked here, before any work.

    Raises ConfigError naming the file, the key and the remedy.
    """
    path = Path(path)

    def fail(key: str, remedy: str) -> ConfigError:
        return ConfigError(f"{path}: {key}: {remedy}")

    if not path.is_file():
        raise ConfigError(f"{path}: no such file; ready ones lie in configs/experiments/")
    try:
        spec = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: not readable as YAML: {error}") from None
    if not isinstance(spec, dict):
        raise ConfigError(f"{path}: must hold the keys {', '.join(KEYS)}")
    if unknown := sorted(set(map(str, spec)) - set(KEYS)):
        raise fail(unknown[0], f"unknown key; an experiment has {', '.join(KEYS)}")
    name, folder = spec.get("name") or path.stem, Path(spec.get("folder") or "runs").expanduser()
    if not isinstance(name, str) or "/" in name or name.startswith("."):
        raise fail("name", f"{name!r} is no plain folder name")
    seeds = spec.get("seeds", [0])
    if not isinstance(seeds, list) or not seeds or not all(type(seed) is int and seed >= 0 for seed in seeds):
        raise fail("seeds", f"{seeds!r} is no list of whole numbers, such as [0, 1, 2]")
    arms, grid, evaluations = (_tables(spec.get(key), key, fail) for key in ("arms", "grid", "evaluations"))
    if not arms:
        raise fail("arms", "give at least one, such as swirl: {filter.kind: process}")
    if "in_domain" not in evaluations:
        raise fail("evaluations", "one must be called in_domain, e.g. in_domain: {}")
    if (keep := spec.get("keep", "models")) not in KEEP:
        raise fail("keep", f"{keep!r} must be one of {', '.join(KEEP)}")
    named = path.parent / spec["config"] if spec.get("config") else None
    common = [*_overrides(spec.get("settings") or {}), *overrides]
    crossed = _crossed(arms, grid, fail)
    compare = spec.get("compare", [])
    if compare and (not isinstance(compare, list) or len(compare) != 2 or not set(compare) <= set(crossed)):
        raise fail("compare", f"{compare!r} must be two of the arms {', '.join(crossed)}")
    first, last = next(iter(crossed)), list(crossed)[-1]
    cells: list[Cell] = []
    for seed, (arm, entries) in itertools.product(seeds, crossed.items()):
        trained, start = entries.get("train", True), None
        own = [*common, *_overrides({k: v for k, v in entries.items() if k not in ("train", "from")})]
        own += [f"run.seed={seed}", f"run.folder={json.dumps(str(folder / name))}"]
        if "from" in entries:
            start = next((c for c in cells if (c.arm, c.seed) == (entries["from"], seed) and c.trained), None)
            if start is None:
                raise fail(f"arms.{arm}.from", f"{entries['from']!r} must be a trained arm that stands before it")
            own.append(f"model.path={json.dumps(str(start.model))}")
        try:
            config = load(named, own)
            evaluated = {key: load(named, [*own, *_overrides(more)]) for key, more in evaluations.items()}
        except ConfigError as error:
            raise ConfigError(f"{path}, arm {arm}: {error}") from None
        cell = _cell(arm, seed, trained, config, evaluated)
        cells.append(replace(cell, start=start.name) if start else cell)
    results = path.parent / Path(spec["results"]).expanduser() if spec.get("results") else folder / name
    summary = path.parent / Path(spec["summary"]).expanduser() if spec.get("summary") else results / "summary.json"
    return Experiment(name, results, summary, tuple(seeds), tuple(cells), tuple(compare) or (last, first), keep)  # type: ignore[arg-type]


def _tables(value: Any, key: str, fail: Any) -> dict[str, Any]:
    value = {} if value is None else value
    if not isinstance(value, dict):
        raise fail(key, f"{value!r} must be a table of names")
    for name, entry in value.items():
        if not isinstance(name, str) or "/" in name:
            raise fail(key, f"{name!r} is no name")
        if key == "grid":
            if not isinstance(entry, list) or not entry:
                raise fail(f"grid.{name}", f"{entry!r} must be a list of values")
        elif entry is not None and not isinstance(entry, dict):
            raise fail(f"{key}.{name}", f"{entry!r} must be a table of settings, such as {{filter.kind: process}}")
    return {name: entry or {} for name, entry in value.items()}


def _crossed(arms: Mapping[str, Any], grid: Mapping[str, list[Any]], fail: Any) -> dict[str, dict[str, Any]]:
    """Arm -> settings; with a grid every trained arm once for each combination, named by its values."""
    crossed: dict[str, dict[str, Any]] = {}
    for name, entries in arms.items():
        if type(entries.get("train", True)) is not bool:
            raise fail(f"arms.{name}.train", f"{entries['train']!r} must be true or false")
        if not grid or not entries.get("train", True):
            crossed[name] = dict(entries)
            continue
        for values in itertools.product(*grid.values()):
            chosen = dict(zip(grid, values, strict=True))
            label = ",".join([name, *(f"{key.split('.')[-1]}={value}" for key, value in chosen.items())])
            crossed[label] = {**entries, **chosen}
    return crossed


def _overrides(settings: Mapping[str, Any]) -> list[str]:
    """Nested or dotted settings as `key=value`."""
    found = []
    for key, value in settings.items():
        if isinstance(value, dict) and value and "." not in key and key != "options":
            found += [f"{key}.{entry}" for entry in _overrides(value)]
        else:
            found.append(f"{key}={json.dumps(value)}")
    return found


def _cell(arm: str, seed: int, trained: bool, config: Config, evaluations: dict[str, Config]) -> Cell:
    def content(config: Config) -> dict[str, Any]:
        """What differs from the defaults, so that a new setting changes no digest."""
        return {**_changed(asdict(config), asdict(Config())), "run": {"seed": seed}}

    whole = {"trained": trained, "evaluations": {name: content(one) for name, one in evaluations.items()}}
    if trained:
        whole["config"] = content(config)
    digest = _digest(whole)
    for one in whole.get("config", {}), *whole["evaluations"].values():
        one.pop("filter", None)
    cell = Cell(arm, seed, trained, config, evaluations, digest, _digest(whole))
    folder = Path(config.run.folder)
    before = {key: content(config).get(key) for key in ("model", "tasks", "search", "collect")}
    collection = _digest({**before, "seed": seed, "dtype": config.engine.dtype})
    for one in (config, *evaluations.values()):
        one.run.name = cell.name
    config.collect.store = config.collect.store or str(folder / f"collection-{seed}-{collection}" / "trajectories.db")
    return cell


def _changed(value: Mapping[str, Any], default: Mapping[str, Any]) -> dict[str, Any]:
    found = {}
    for key, entry in value.items():
        if isinstance(entry, dict) and isinstance(default.get(key), dict) and default[key]:
            entry = _changed(entry, default[key])
            if not entry:
                continue
        elif entry == default.get(key):
            continue
        found[key] = entry
    return found


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:8]


def run_experiment(experiment: Experiment) -> list[str]:
    """Does the cells that are not done and not being done elsewhere, then writes summary.json and report.html.

    A cell that fails does not stop the others. Returns what is missing, a line a cell, empty when all are done. Raises ConfigError, before
    any work, when a finished cell was made of a model or a data file that has changed since.
    """
    _check_inputs(experiment)
    failed: dict[str, str] = {}
    for number, cell in enumerate(experiment.cells, 1):
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
                write_json(path, _run_cell(experiment, cell))
                _clean(experiment, cell)
        except (ValueError, ImportError, OSError, RuntimeError, FloatingPointError) as error:
            failed[cell.name] = str(error)
            print(f"experiment {experiment.name}: {cell.arm}, seed {cell.seed}: {error}")
    if experiment.done():
        write_outputs(experiment)
    return [
        f"{cell.arm}, seed {cell.seed}: {failed.get(cell.name, 'is being done elsewhere, or was interrupted there')}"
        for cell in experiment.cells
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
    summary = summarise(experiment.arms, experiment.evaluations, experiment.seeds, experiment.compare, results)
    write_json(experiment.summary, summary)
    report = write_experiment_report(experiment.results, experiment.name, summary, results)
    print(f"\n{results_table(summary)}\n\n{experiment.summary}  {report}")


def _run_cell(experiment: Experiment, cell: Cell) -> dict[str, Any]:
    result: dict[str, Any] = {"arm": cell.arm, "seed": cell.seed, "trained": cell.trained}
    weights = None
    if start := next((one for one in experiment.cells if one.name == cell.start), None):
        with _claimed(start.config.folder / "lock", wait=True):
            if not (start.model / "config.json").is_file():  # another process failed, or only its numbers were kept
                _collect_and_filter(start)
                stages.train(start.config)
    result["inputs"] = inputs(cell.configs)
    if cell.trained:
        _collect_and_filter(cell)
        result["filter"] = json.loads((cell.config.folder / "filter.json").read_text())
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


def _same_training(experiment: Experiment, cell: Cell) -> dict[str, Any] | None:
    """What is in the file of a finished cell that was trained on the same shards with the same settings; None without one."""
    for one in experiment.cells:
        if one.name == cell.name or one.besides_filter != cell.besides_filter or not experiment.path(one).is_file():
            continue
        if _shards(one) == _shards(cell) is not None:
            found: dict[str, Any] = json.loads(experiment.path(one).read_text())
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
    with open(path, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        yield True
