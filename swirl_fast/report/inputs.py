"""What a run's folder holds for the report, each part of it possibly missing, unfinished or damaged."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from swirl_fast.metrics import METRICS_FILE, read_metrics
from swirl_fast.report.markup import escape, is_number, show

STAGES = {  # file -> the command that writes it
    "config.yaml": "run",
    "evaluations/base.json": "evaluate --of base",
    "trajectories.db": "collect",
    "filter.json": "filter",
    METRICS_FILE: "train",
    "evaluations/trained.json": "evaluate --of trained",
}


@dataclass
class Run:
    """What lies in a run's folder. problems: what is not there or cannot be read, as HTML."""

    folder: Path
    config_text: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    metrics: list[dict[str, Any]] = field(default_factory=list)
    evaluations: dict[str, dict[str, Any]] = field(default_factory=dict)
    filter: dict[str, Any] | None = None
    summary: dict[str, Any] | None = None
    problems: list[str] = field(default_factory=list)

    def setting(self, key: str) -> Any:
        """A value of the config by its dotted key; None where there is none."""
        value: Any = self.config
        for part in key.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        return value

    @property
    def store(self) -> Path:
        """The database of collected trajectories, which may be shared with other runs."""
        return Path(self.setting("collect.store") or self.folder / "trajectories.db").expanduser()

    @property
    def compared(self) -> tuple[dict[str, Any], dict[str, Any]] | None:
        """The two evaluations whose difference is shown: base and trained; None unless both are there and can be compared."""
        base, trained = self.evaluations.get("base"), self.evaluations.get("trained")
        return None if base is None or trained is None or self.incomparable else (base, trained)

    @property
    def incomparable(self) -> str:
        """Why the difference of base and trained would say nothing, as text; empty where it does, or one of them is not there."""
        base, trained = self.evaluations.get("base"), self.evaluations.get("trained")
        if base is None or trained is None:
            return ""
        if base.get("task") != trained.get("task"):
            return f"they are on different tasks, {base.get('task')} and {trained.get('task')}"
        asked = [set(by_question(one, "accuracy")) for one in (base, trained)]
        numbers = [one.get("questions") for one in (base, trained)]
        if (all(asked) and asked[0] != asked[1]) or numbers[0] != numbers[1]:
            return f"they were asked different questions ({numbers[0]} and {numbers[1]} of them)"
        if base.get("temperature") != trained.get("temperature"):
            return f"their temperatures are {base.get('temperature')} and {trained.get('temperature')}"
        return ""

    def judges_differ(self, key: str) -> bool:
        """Whether base and trained were judged by two judges, so that their labels cannot be compared. key: judge | outcome_judge."""
        judges = [self.evaluations[name].get(key) for name in ("base", "trained") if name in self.evaluations]
        return len({str(judge) for judge in judges if judge is not None}) > 1

    @property
    def judge_id(self) -> str | None:
        """The judge of the collected trajectories: that of the filter; before there is one, that of the evaluations."""
        named = [one.get("judge") for one in (self.filter or {}, *self.evaluations.values())]
        return next((judge for judge in named if isinstance(judge, str)), None)


def by_question(evaluation: dict[str, Any], key: str) -> dict[str, float]:
    """Question id -> its number, where there is one."""
    rows = evaluation.get("by_question")
    found = {id_: row.get(key) for id_, row in rows.items() if isinstance(row, dict)} if isinstance(rows, dict) else {}
    return {id_: number for id_, number in found.items() if is_number(number)}


def load_run(folder: Path) -> Run:
    """Reads only. What cannot be read is named in `problems`."""
    run = Run(folder)
    config = folder / "config.yaml"
    if config.is_file():
        run.config_text = config.read_text(encoding="utf-8", errors="replace")
        try:
            parsed = yaml.safe_load(run.config_text)
            run.config = parsed if isinstance(parsed, dict) else {}
        except yaml.YAMLError as error:
            run.problems.append(f"<code>config.yaml</code> is not readable as YAML: {escape(str(error))}")
    run.metrics = [row for row in read_metrics(folder) if isinstance(row, dict) and is_number(row.get("step"))]
    run.filter, run.summary = _json(run, "filter.json"), _json(run, "summary.json")
    files = (folder / "evaluations").glob("*.json")
    for name in sorted((file.stem for file in files), key=lambda name: (name != "base", name != "trained", name)):
        evaluation = _json(run, f"evaluations/{name}.json")
        if evaluation is not None:
            run.evaluations[name] = evaluation
    run.problems += [
        f"<code>{file}</code> is not there yet: <code>swirl-fast {command}</code> writes it"
        for file, command in STAGES.items()
        if not (run.store if file == "trajectories.db" else folder / file).is_file()
    ]
    wanted = run.setting("training.steps")
    if run.metrics and isinstance(wanted, int) and run.metrics[-1]["step"] < wanted:
        step = show(run.metrics[-1]["step"], "")
        run.problems.append(
            f"training is at step {step} of {wanted:,}: <code>swirl-fast train</code> goes on from there"
        )
    run.problems += _outdated(run)
    return run


def _outdated(run: Run) -> list[str]:
    """Evaluations of the run's own model/ that a longer training has replaced."""
    model = run.folder / "model"
    if not (model / "config.json").is_file():
        return []
    from swirl_fast.models.load import weights_hash  # loads torch

    now, found = weights_hash(model), []
    for name, one in run.evaluations.items():
        of, before = Path(str(one.get("model"))), one.get("weights")
        own = (of.parent.name, of.name) == (run.folder.resolve().name, "model")  # the folder above may have moved
        aside = one.get("name") != name  # renamed when a longer training was evaluated
        if own and not aside and isinstance(before, str) and before != now:
            found.append(
                f"<code>model/</code> has other weights by now than the evaluation {escape(name)} was made with: "
                f"<code>swirl-fast evaluate --of trained --name {escape(name)}</code> evaluates these"
            )
    return found


def _json(run: Run, name: str) -> dict[str, Any] | None:
    path = run.folder / name
    if not path.is_file():
        return None
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        run.problems.append(f"<code>{escape(name)}</code> is not readable as JSON: {escape(str(error))}")
        return None
    if not isinstance(value, dict):
        run.problems.append(f"<code>{escape(name)}</code> holds {escape(repr(value)[:80])} instead of an object")
        return None
    return value
