"""How far a run is: its stages, what comes next, and the numbers so far."""

from __future__ import annotations

import re
import shlex
import sqlite3
from collections import Counter
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from swirl_fast.data.store import Store, trajectory_ids
from swirl_fast.files import holder
from swirl_fast.outputs.folder import RunFolder
from swirl_fast.outputs.readings import Readings
from swirl_fast.outputs.run import OpenRun
from swirl_fast.outputs.text import is_number, show

State = Literal["done", "running", "unfinished", "waiting", "skipped"]


@dataclass(frozen=True)
class Stage:
    """state: running: a process on this machine is at it; unfinished: begun, and resumed by `arguments`; waiting: not begun; skipped: not
    begun, and a later stage is. detail: its numbers, in words. arguments: of swirl-fast, such as `evaluate --of base`."""

    name: str
    state: State
    detail: str
    arguments: str


@dataclass
class Status:
    """stages: in their order. next: the command that goes on, ready to be copied; None where nothing is left or a stage is running.
    problems: what cannot be read, with the remedy. numbers: questions, trajectories, steps, filter, training, evaluations, as far as
    there are any. `str` gives all of it as text."""

    folder: Path
    stages: list[Stage] = field(default_factory=list)
    next: str | None = None
    problems: list[str] = field(default_factory=list)
    numbers: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """For programs: values that JSON has."""
        return {**asdict(self), "folder": str(self.folder)}

    def __str__(self) -> str:
        from swirl_fast.outputs.status import describe

        return describe(self)


def status(run: OpenRun) -> Status:
    """Reads every recorded step once, to count the verdicts. Takes no lock and writes nothing."""
    files = run.files
    found = Status(run.folder)
    stages = [_collect(run, files, found), _judge(files, found), _filter(files, found), _train(files, found)]
    evaluations = _evaluations(run, files, found)
    base, trained, *others = evaluations
    found.problems += [" ".join(problem.replace("`", "").split()) for problem in files.problems]
    begun = max((i for i, stage in enumerate(stages) if stage.state != "waiting"), default=0)
    if files.setting("training.shards"):  # made elsewhere
        begun = max(begun, len(stages) - 1)
    stages = [
        replace(stage, state="skipped") if stage.state == "waiting" and i < begun else stage
        for i, stage in enumerate(stages)
    ]
    found.stages = [base, *stages, trained, *others, _report(files)]
    found.next = _next(files, found.stages)
    return found


def _collect(run: OpenRun, files: RunFolder, found: Status) -> Stage:
    path = files.store
    if not path.is_file():
        return Stage("collect", "waiting", "no trajectories yet", "collect")
    try:
        with Store(path, writable=False) as store:
            wanted, written = _wanted(store, files), files.setting("collect.source") in ("solutions", "conversations")
            finished, begun = set(store.ids(finished=True)), len(store.ids(finished=False))
            done = sorted(finished if wanted is None else finished.intersection(wanted))
            found.numbers["questions"] = len(store.questions())
            found.numbers["trajectories"] = {"finished": len(done), "wanted": None if wanted is None else len(wanted)}
            found.numbers["steps"] = _verdicts(store, files.judge_id, done)
    except (ValueError, RuntimeError, sqlite3.Error) as error:
        found.problems.append(str(error) if str(path) in str(error) else f"{path}: {error}")
        running = holder(path)
        return Stage(
            "collect", "running" if running else "unfinished", running or f"{path.name} cannot be read", "collect"
        )
    of = "" if wanted is None or written else f" of {len(wanted):,}"
    detail = f"{found.numbers['questions']:,} questions, {len(done):,}{of} trajectories"
    complete = bool(done) and (written or wanted is None or len(done) == len(wanted))
    if not complete and (process := holder(path)):
        return Stage("collect", "running", f"{detail}; {process} is writing", "collect")
    begun_text = f", {begun:,} begun" if begun else ""
    return Stage("collect", "done" if complete else "unfinished", detail + begun_text, "collect")


def _wanted(store: Store, files: RunFolder) -> list[str] | None:
    """The ids that `collect` makes for the settings in config.yaml; None where they cannot be read."""
    count, limit = files.setting("collect.trajectories_per_question"), files.setting("tasks.limit")
    if not isinstance(count, int):
        return None
    questions = store.questions()
    limited = (
        isinstance(limit, int) and limit > 0 and not files.setting("tasks.mix")
    )  # of a mixture every part has its share
    return trajectory_ids(questions[:limit] if limited else questions, count)


def _verdicts(store: Store, judge_id: str | None, ids: list[str]) -> dict[str, int]:
    """Verdict, or NOT_JUDGED -> number of steps; malformed ones are BAD without a judge."""
    counts = Counter(
        judgement.verdict.value if judgement else "NOT_JUDGED"
        for reading in Readings(store, judge_id).of(ids)
        for judgement in reading.judgements
    )
    return {name: counts[name] for name in ("GOOD", "BAD", "UNKNOWN", "NOT_JUDGED")}


def _judge(files: RunFolder, found: Status) -> Stage:
    steps = found.numbers.get("steps")
    if not steps or not sum(steps.values()):
        return Stage("judge", "waiting", "no steps yet" if steps is not None else "", "judge")
    missing = steps["NOT_JUDGED"]
    detail = ", ".join(
        f"{steps[name]:,} {name}" for name in ("GOOD", "BAD", "UNKNOWN") if steps[name] or name != "UNKNOWN"
    )
    if steps["UNKNOWN"]:
        detail += " (asked about again when judge runs again)"
    if not missing:
        return Stage("judge", "done", f"{sum(steps.values()):,} steps: {detail}", "judge")
    collecting = found.numbers["trajectories"]["wanted"] not in (None, found.numbers["trajectories"]["finished"])
    process = None if collecting else holder(files.store)
    # The verdicts of malformed steps need no judge: they do not say that the stage has begun.
    with Store(files.store, writable=False) as store:
        begun = bool(store.main_judge())
    if process:
        return Stage("judge", "running", f"{detail}; {missing:,} to go; {process} is writing", "judge")
    if not begun:
        return Stage("judge", "waiting", f"{missing:,} steps to judge", "judge")
    return Stage("judge", "unfinished", f"{detail}; {missing:,} steps not judged", "judge")


def _filter(files: RunFolder, found: Status) -> Stage:
    if files.filter is None:
        damaged = (files.folder / "filter.json").is_file()
        return Stage(
            "filter", "unfinished" if damaged else "waiting", "filter.json cannot be read" if damaged else "", "filter"
        )
    kept, total = files.filter.get("kept"), files.filter.get("total")
    found.numbers["filter"] = {"kept": kept, "total": total}
    detail = f"{show(kept, '')} of {show(total, '')} trajectories kept ({files.filter.get('kind')})"
    if isinstance(states := files.filter.get("states"), dict):
        detail += f", {show(states.get('kept'), '')} of their {show(states.get('total'), '')} states"
    if not (files.folder / "shards" / "manifest.json").is_file():
        return Stage("filter", "unfinished", f"{detail}, but shards/ is not there", "filter")
    return Stage("filter", "done", detail, "filter")


def _train(files: RunFolder, found: Status) -> Stage:
    wanted, last = files.setting("training.steps"), files.metrics[-1] if files.metrics else {}
    step, checkpoints = last.get("step", 0), files.folder / "checkpoints"
    saved = sorted(path.name for path in checkpoints.glob("step_*") if re.fullmatch(r"step_\d+", path.name))
    reward = last["reward"] if is_number(last.get("reward")) else None
    found.numbers["training"] = {"step": step, "steps": wanted, "reward": reward}
    detail = f"step {show(step, '')} of {show(wanted, '')}"
    if reward is not None:
        detail += f", reward {reward:.3f}"
    process = holder(checkpoints)
    if process:
        return Stage("train", "running", f"{detail}; {process} is training", "train")
    model = (files.folder / "model" / "config.json").is_file()
    if model and isinstance(wanted, int) and (step >= wanted or not files.metrics):
        return Stage("train", "done", detail if files.metrics else "model/ is there, metrics.jsonl is not", "train")
    if not saved and not files.metrics:
        return Stage("train", "waiting", f"{show(wanted, '')} steps" if is_number(wanted) else "", "train")
    return Stage(
        "train", "unfinished", f"{detail}, goes on from {f'checkpoint {saved[-1]}' if saved else 'the start'}", "train"
    )


def _evaluations(run: OpenRun, files: RunFolder, found: Status) -> list[Stage]:
    """base and trained, then the others."""
    names = ["base", "trained"]
    names += sorted({*files.evaluations, *run.evaluation_names()}.difference(names))
    return [_evaluation(name, files, found) for name in names]


def _evaluation(name: str, files: RunFolder, found: Status) -> Stage:
    path = files.folder / "evaluations" / f"{name}.db"
    title = f"evaluate {name}"
    evaluation = files.evaluations.get(name)
    arguments = f"evaluate --of {name}" if name in ("base", "trained") else _evaluate_again(name, evaluation, files)
    if evaluation is not None:
        keys = ("accuracy", "accuracy_interval", "process_label", "process_label_interval", "questions")
        found.numbers.setdefault("evaluations", {})[name] = {key: evaluation.get(key) for key in keys}
        detail = f"accuracy {_share(evaluation, 'accuracy')}, process label {_share(evaluation, 'process_label')}, "
        detail += f"{show(evaluation.get('questions'), '')} questions"
        if name == "trained" and _older(files.folder / "evaluations" / "trained.json", files.folder / "model"):
            return Stage(title, "unfinished", f"{detail}; model/ was written after it", arguments)
        return Stage(title, "done", detail, arguments)
    if not path.is_file():
        return Stage(title, "waiting", "", arguments)
    try:
        with Store(path, writable=False) as store:
            samples = files.setting("evaluate.samples")
            total = len(store.questions()) * samples if isinstance(samples, int) else None
            detail = f"{len(store.ids(finished=True)):,} of {show(total, '')} trajectories"
    except (ValueError, RuntimeError, sqlite3.Error) as error:
        found.problems.append(str(error))
        detail = f"{path.name} cannot be read"
    process = holder(path)
    if process:
        return Stage(title, "running", f"{detail}; {process} is writing", arguments)
    return Stage(title, "unfinished", detail, arguments)


def _evaluate_again(name: str, evaluation: dict[str, Any] | None, files: RunFolder) -> str:
    of = str((evaluation or {}).get("model") or "FOLDER")
    return f"evaluate --of {shlex.quote(of)} --name {shlex.quote(name)}"


def _share(evaluation: dict[str, Any], key: str) -> str:
    ends = evaluation.get(f"{key}_interval")
    shown = show(evaluation.get(key), "%")
    if isinstance(ends, list) and len(ends) == 2 and all(map(is_number, ends)):
        shown += f" [{show(ends[0], '%')}, {show(ends[1], '%')}]"
    return shown


def _older(file: Path, folder: Path) -> bool:
    """Whether weights in a folder were written after the file."""
    weights = [path.stat().st_mtime for path in folder.glob("*.safetensors")]
    return bool(weights) and file.stat().st_mtime < max(weights)


def _report(files: RunFolder) -> Stage:
    path = files.folder / "report.html"
    return Stage("report", "done" if path.is_file() else "waiting", str(path) if path.is_file() else "", "report")


def _next(files: RunFolder, stages: list[Stage]) -> str | None:
    """An interrupted stage first, then those of the pipeline in their order; the base model's evaluation may come late."""
    if any(stage.state == "running" for stage in stages):
        return None
    open_ = [stage for stage in stages if stage.state in ("unfinished", "waiting")]
    if not open_:
        return None
    first = min(
        open_, key=lambda stage: (stage.name == "report", stage.state != "unfinished", stage.name == "evaluate base")
    )
    return command(files, first.arguments)


def command(files: RunFolder, arguments: str) -> str:
    """The command line of a stage with the run's own settings. Where the run has none yet, FILE is to be filled in."""
    path = files.folder / "config.yaml"
    parts = ["swirl-fast", arguments, "--config", shlex.quote(str(path)) if files.config else "FILE"]
    settings = Path(str(files.setting("run.folder") or "runs")).expanduser() / str(files.setting("run.name") or "run")
    here = files.folder.resolve()
    if settings.resolve() != here:  # it was moved, or is named from another working directory
        parts += [f"run.folder={shlex.quote(str(here.parent))}", f"run.name={shlex.quote(here.name)}"]
    return " ".join(parts)
