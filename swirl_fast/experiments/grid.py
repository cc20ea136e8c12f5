"""Reads the file of an experiment: a grid of runs (filter x algorithm x data x task), each with several seeds, all evaluated alike.

    name: filters                    # results go to runs/filters
    config: ../quickstart.yaml       # a run's config, relative to this file (optional)
    settings: {training: {steps: 5}} # on top of it, for every run
    seeds: [0, 1, 2]
    arms:                            # what is compared: each a few settings
      base: {train: false}           # the model as it is
      swirl: {filter.kind: process}
      sft: {filter.kind: process, algorithm.name: sft}
      longer: {from: swirl, filter.kind: process}   # starts from the model that swirl ends with, of the same seed
      unfiltered: {seeds: [0, 1], filter.kind: none}   # with fewer seeds than the others
    grid: {filter.max_trajectories: [16, 64]}   # optional: every trained arm with every combination
    evaluations:                     # "in_domain" and others; each a few settings
      in_domain: {}
      sums: {tasks.dataset: chain_sum}
    compare: [swirl, base]           # whose relative gain the summary states
    pairs: {longer_or_sft: [longer, sft]}   # what else is compared (optional)
    keep: models                     # of a run's files: results | models | all (checkpoints, too)
    results: ../../docs/filters      # where cells and report go, relative to this file (optional; default: runs/filters)
    summary: ../../docs/filters.json # (optional; default: summary.json there)

A cell is one arm with one seed; they are done arm after arm, so that the first ones listed are there for all seeds first. Cells whose
settings up to the collection agree share one collection.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from swirl_fast.config import Config, ConfigError
from swirl_fast.config.check import PLAIN, is_plain_name
from swirl_fast.config.contents import identified
from swirl_fast.config.fields import sections, setting, settings
from swirl_fast.config.load import load_layers, read_config
from swirl_fast.config.read import AsWritten, Layer, check_each, fill, keys_of, read_file, read_override, truth
from swirl_fast.config.shipped import find, ready
from swirl_fast.config.yaml_text import Word, plain, shown

# What an experiment sets for every run, and the key of its own that says so.
SET_BY = {"run.name": "name", "run.folder": "folder", "run.seed": "seeds"}


@dataclass
class ExperimentSpec:
    """The file as it is written; settings are read with the runs that they belong to."""

    name: str = ""
    """Results go to folder/name; empty: the name of the file."""
    folder: str = "runs"
    """The folder that holds all runs."""
    config: str | None = None
    """A run's config, relative to this file, that all runs start from."""
    settings: dict[str, AsWritten] = field(default_factory=dict)
    """Settings of every run, on top of the config."""
    seeds: list[int] = setting([0], minimum=0)
    """Every arm is run once with each."""
    arms: dict[str, dict[str, AsWritten]] = field(default_factory=dict)
    """What is compared: name -> settings; `train: false` for the model as it is, `from: ARM` to start from an arm's model, `seeds: […]`
    for some of the seeds."""
    grid: dict[str, list[AsWritten]] = field(default_factory=dict)
    """Setting -> values: every trained arm is run with every combination."""
    evaluations: dict[str, dict[str, AsWritten]] = field(default_factory=dict)
    """Name -> settings; one is called in_domain."""
    compare: list[str] = field(default_factory=list)
    """Two arms, whose relative gain the summary states; empty: the last against the first."""
    pairs: dict[str, list[AsWritten]] = field(default_factory=dict)
    """Name -> two arms, the first of which the summary compares with the second, in pairs of seeds and questions."""
    keep: Literal["results", "models", "all"] = "models"
    """Of a run's files: only the results, the models too, or all, checkpoints as well."""
    results: str | None = None
    """Where cells and report go, relative to this file; null: folder/name."""
    summary: str | None = None
    """Where the summary goes, relative to this file; null: summary.json among the results."""


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
    pairs: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    differs: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """Arm -> what its entry in the file says, a line a setting."""
    command: str = ""
    """Starts it."""

    @property
    def arms(self) -> list[str]:
        return list(dict.fromkeys(cell.arm for cell in self.cells))

    @property
    def fewer_seeds(self) -> dict[str, list[int]]:
        """Arm -> its seeds, of those that have not all."""
        own = {arm: [cell.seed for cell in self.cells if cell.arm == arm] for arm in self.arms}
        return {arm: seeds for arm, seeds in own.items() if len(seeds) < len(self.seeds)}

    @property
    def evaluations(self) -> list[str]:
        return list(self.cells[0].evaluations)

    def path(self, cell: Cell) -> Path:
        return self.results / "cells" / f"{cell.name}.json"

    def done(self) -> dict[tuple[str, int], dict[str, Any]]:
        """(arm, seed) -> what the finished cells' files hold."""
        paths = {(cell.arm, cell.seed): self.path(cell) for cell in self.cells}
        return {key: json.loads(path.read_text(encoding="utf-8")) for key, path in paths.items() if path.is_file()}


def read_experiment(path: str | Path, overrides: Sequence[str] = ()) -> Experiment:
    """overrides: `section.key=value`, on top of `settings`. Every config is built and checked here, before any work.

    Raises ConfigError naming the file, the key and the remedy.
    """
    path = find("experiment", path)
    spec = _read_spec(path)
    name, folder = spec.name, Path(spec.folder).expanduser()
    base = [read_config(path.parent / spec.config, f"{path}: config")] if spec.config else []
    own = [
        Layer(spec.settings, f"{path}, settings", path.parent),
        *(read_override(Config, override) for override in overrides),
    ]
    arms = _crossed(spec, path)
    cells: list[Cell] = []
    for (arm, (trained, start, entries, seeds)), seed in itertools.product(arms.items(), spec.seeds):
        if seed not in seeds:
            continue
        entered = Layer(entries, f"{path}, arms.{arm}", path.parent)
        more = {key: Layer(tree, f"{path}, evaluations.{key}", path.parent) for key, tree in spec.evaluations.items()}
        layers = [*base, *own, entered]
        layers.append(
            Layer({"run.seed": Word(str(seed)), "run.folder": Word(str(folder / name), quoted=True)}, str(path))
        )
        earlier = None
        if start is not None:
            earlier = next((one for one in cells if (one.arm, one.seed) == (start, seed) and one.trained), None)
            if earlier is None:
                raise ConfigError(
                    f"{path}: arms.{arm}.from={start}: must be a trained arm that is listed before it, with its seeds"
                )
            layers.append(Layer({"model.path": Word(str(earlier.model), quoted=True)}, str(path)))
        try:
            _refuse([*own, entered], SET_BY)
            _refuse([entered], {"model.path": f"arms.{arm}.from"} if start is not None else {})
            _refuse(more.values(), {key: SET_BY[key] for key in ("run.name", "run.folder")})
            config = load_layers(layers)
            evaluations = {key: load_layers([*layers, layer]) for key, layer in more.items()}
        except ConfigError as error:
            raise ConfigError(f"{path}, arm {arm}: {error}") from None
        if any(one.collect.source == "conversations" for one in (config, *evaluations.values())):
            raise ConfigError(
                f"{path}, arm {arm}: collect.source=conversations: an experiment compares accuracies, and a log has no gold answers; use "
                "swirl-fast run for each"
            )
        cell = _cell(arm, seed, trained, config, evaluations)
        cells.append(replace(cell, start=earlier.name) if earlier else cell)
    results = path.parent / Path(spec.results).expanduser() if spec.results else folder / name
    summary = path.parent / Path(spec.summary).expanduser() if spec.summary else results / "summary.json"
    compare = (spec.compare[0], spec.compare[1]) if spec.compare else (list(arms)[-1], next(iter(arms)))
    pairs = {key: (str(pair[0]), str(pair[1])) for key, pair in spec.pairs.items()}
    differs = {arm: _said(*arms[arm][:3]) for arm in arms}
    command = shlex.join(["swirl-fast", "experiment", str(path), *overrides])
    return Experiment(
        name, results, summary, tuple(spec.seeds), tuple(cells), compare, spec.keep, pairs, differs, command
    )


def _refuse(layers: Iterable[Layer], keys: Mapping[str, str]) -> None:
    """Raises ConfigError for a setting that would be overwritten. keys: setting -> what sets it."""
    for layer in layers:
        for key in keys_of(Config, layer) & keys.keys():
            raise ConfigError(
                f"{key} (in {layer.source}): is set by the experiment's own key {keys[key]}: leave it out, or change that one"
            )


def chosen(experiment: Experiment, arms: str | None, seeds: str | None) -> list[Cell]:
    """The cells of some arms and seeds, each `a,b`; None: of all. An arm goes with all its combinations of a grid. Raises ConfigError for
    one that there is not, and where no cell is left."""
    written = {arm: arm.partition(",")[0] for arm in experiment.arms}  # as it is called in the file
    there = {"--arms": list(dict.fromkeys(written.values())), "--seeds": [str(seed) for seed in experiment.seeds]}
    wanted = {}
    for option, given in ("--arms", arms), ("--seeds", seeds):
        wanted[option] = there[option] if given is None else [word.strip() for word in given.split(",")]
        if unknown := [word for word in wanted[option] if word not in there[option]]:
            raise ConfigError(f"{option} {given}: {unknown[0]!r} is none of {', '.join(there[option])}")
    cells = [
        cell
        for cell in experiment.cells
        if written[cell.arm] in wanted["--arms"] and str(cell.seed) in wanted["--seeds"]
    ]
    if not cells:
        raise ConfigError(f"--arms {arms} --seeds {seeds}: these arms have other seeds")
    return cells


def _said(trained: bool, start: str | None, entries: Mapping[str, Any]) -> list[str]:
    first = (
        f"trained from the model of {start}" if start else "trained" if trained else "the model as it is, not trained"
    )
    return [first, *(f"{key}: {shown(value)}" for key, value in entries.items())]


def _read_spec(path: Path) -> ExperimentSpec:
    """Without the settings of the runs, which need the runs to be read."""
    if not path.is_file():
        raise ConfigError(f"{path}: no such file; {ready('experiment')}")
    layer = read_file(path)
    keys = {str(key).partition(".")[0] for key in layer.tree}
    if keys & set(sections(Config)) and not keys & set(settings(ExperimentSpec)):
        raise ConfigError(f"{path}: is the config of a run, not an experiment: swirl-fast run --config {path}")
    if misplaced := sorted(keys & set(sections(Config))):
        raise ConfigError(f"{path}: {misplaced[0]}: unknown key; write it below settings")
    try:
        spec = fill(ExperimentSpec, [layer])
        check_each(spec)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None

    def fail(key: str, remedy: str) -> ConfigError:
        return ConfigError(f"{path}: {key}: {remedy}")

    spec.name = spec.name or path.stem
    if not is_plain_name(spec.name):
        raise fail(f"name={spec.name}", f"must be a plain folder name: {PLAIN}")
    if not spec.seeds:
        raise fail("seeds=[]", "must be a list of whole numbers, such as [0, 1, 2]")
    if len(set(spec.seeds)) < len(spec.seeds):
        raise fail(f"seeds={spec.seeds}", "names a seed twice, whose runs would be alike and count twice")
    if not spec.arms:
        raise fail("arms", "give at least one, such as swirl: {filter.kind: process}")
    if "in_domain" not in spec.evaluations:
        raise fail("evaluations", "one must be called in_domain, e.g. in_domain: {}")
    for name in spec.evaluations:
        if not is_plain_name(name) or name == "collected":  # as the report calls the collection
            raise fail(f"evaluations.{name}", f"must have a plain name: {PLAIN}; and not collected")
    for key, values in spec.grid.items():
        if not values:
            raise fail(f"grid.{key}=[]", "must be a list of values")
    return spec


def _crossed(spec: ExperimentSpec, path: Path) -> dict[str, tuple[bool, str | None, dict[str, Any], list[int]]]:
    """Arm -> whether it is trained, the arm that it starts from, settings, seeds. With a grid every trained arm is there once for each
    combination, named by its values."""
    arms: dict[str, tuple[bool, str | None, dict[str, Any], list[int]]] = {}
    for name, written in spec.arms.items():
        entries = dict(written)
        train, start = entries.pop("train", Word("true")), entries.pop("from", None)
        own = entries.pop("seeds", None)
        seeds = (
            spec.seeds if own is None else [seed for seed in spec.seeds if isinstance(own, list) and str(seed) in own]
        )
        if own is not None and (not isinstance(own, list) or not own or len(seeds) < len(own)):
            raise ConfigError(f"{path}: arms.{name}.seeds={shown(own)}: must be some of the seeds {spec.seeds}")
        try:
            trained = truth(train)
        except (ValueError, AttributeError):
            raise ConfigError(f"{path}: arms.{name}.train={shown(train)}: must be true or false") from None
        for values in itertools.product(*spec.grid.values()) if trained and spec.grid else [()]:
            chosen = dict(zip(spec.grid, values, strict=False))
            label = ",".join([name, *(f"{key.split('.')[-1]}={_word(value)}" for key, value in chosen.items())])
            if not is_plain_name(label):
                raise ConfigError(f"{path}: arms.{label}: must have a plain name: {PLAIN}")
            arms[label] = trained, start and str(start), {**entries, **chosen}, seeds
    for key, pair in {"compare": spec.compare, **{f"pairs.{name}": pair for name, pair in spec.pairs.items()}}.items():
        two = isinstance(pair, list) and len(pair) == 2 and {str(arm) for arm in pair} <= set(arms)
        if not two and (pair or key != "compare"):
            raise ConfigError(f"{path}: {key}={shown(pair)}: must be two of the arms {', '.join(arms)}")
    return arms


def _word(value: Any) -> str:
    """A value of a grid in the name of an arm: as it is, but for a path and what is long, which are cut and told apart by a hash."""
    text = str(plain(value))
    if len(text) <= 40 and is_plain_name(text.lstrip(".")):
        return text
    return f"{re.sub(r'[^A-Za-z0-9.-]+', '_', text).strip('_')[-24:]}-{_digest(text)[:4]}"


def _cell(arm: str, seed: int, trained: bool, config: Config, evaluations: dict[str, Config]) -> Cell:
    def content(config: Config) -> dict[str, Any]:
        """What differs from the defaults, so that a new setting changes no digest."""
        return {**_changed(identified(config), asdict(Config())), "run": {"seed": config.run.seed}}

    whole = {"trained": trained, "evaluations": {name: content(one) for name, one in evaluations.items()}}
    if trained:
        whole["config"] = content(config)
    digest = _digest(whole)
    for one in whole.get("config", {}), *whole["evaluations"].values():
        one.pop("filter", None)
    cell = Cell(arm, seed, trained, config, evaluations, digest, _digest(whole))
    folder = Path(config.run.folder)
    settings_of = content(config)
    settings_of.get("tools", {}).pop("concurrency", None)  # changes no trajectory
    before = {key: settings_of.get(key) for key in ("model", "tasks", "search", "collect")}
    before |= {key: settings_of[key] for key in ("actions", "tools") if settings_of.get(key)}
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
