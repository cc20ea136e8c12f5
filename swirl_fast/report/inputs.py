"""What a run's folder holds for the report, each part of it possibly missing, unfinished or damaged."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from swirl_fast.report.markup import escape, is_number, show
from swirl_fast.training.metrics import METRICS_FILE, read_metrics

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
        """The two evaluations whose difference is shown: base and trained; None unless both are there, on one task."""
        base, trained = self.evaluations.get("base"), self.evaluations.get("trained")
        if base is None or trained is None or base.get("task") != trained.get("task"):
            return None
        return base, trained

    @property
    def judge_id(self) -> str | None:
        """The judge of this run's evaluations, which is that of its collected trajectories as well."""
        return next((one["judge"] for one in self.evaluations.values() if "judge" in one), None)


def load(folder: Path) -> Run:
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
            f"training stands at step {step} of {wanted:,}: <code>swirl-fast train</code> goes on from there"
        )
    return run


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
