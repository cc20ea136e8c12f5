"""The files of a run's folder, each of them possibly missing, unfinished or damaged."""

from __future__ import annotations

import contextlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import yaml

from swirl_fast.data.store import Store
from swirl_fast.judges.self_consistency import PREFIX
from swirl_fast.metrics import METRICS_FILE, read_metrics
from swirl_fast.outputs.text import is_number


@dataclass
class RunFolder:
    """What lies in a run's folder. config: config.yaml as it is written, unchecked. problems: what cannot be read, as sentences in which
    `names of files and commands` are in backticks."""

    folder: Path
    config_text: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    metrics: list[dict[str, Any]] = field(default_factory=list)
    evaluations: dict[str, dict[str, Any]] = field(default_factory=dict)
    filter: dict[str, Any] | None = None
    summary: dict[str, Any] | None = None
    hardware: dict[str, Any] | None = None
    problems: list[str] = field(default_factory=list)

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Reads only, also while a stage writes. What cannot be read is named in `problems`."""
        run = cls(folder)
        config = folder / "config.yaml"
        if config.is_file():
            run.config_text = config.read_text(encoding="utf-8", errors="replace")
            try:
                parsed = yaml.safe_load(run.config_text)
                run.config = parsed if isinstance(parsed, dict) else {}
            except yaml.YAMLError as error:
                run.problems.append(f"`config.yaml` is not readable as YAML: {error}; {_remedy('config.yaml')}")
        try:
            rows = read_metrics(folder)
        except ValueError as error:
            rows = []
            run.problems.append(f"`{METRICS_FILE}` is not readable as text: {error}; {_remedy(METRICS_FILE)}")
        run.metrics = [row for row in rows if isinstance(row, dict) and is_number(row.get("step"))]
        run.filter, run.summary = run._json("filter.json"), run._json("summary.json")
        run.hardware = run._hardware()
        files = (folder / "evaluations").glob("*.json")
        for name in sorted((file.stem for file in files), key=lambda name: (name != "base", name != "trained", name)):
            evaluation = run._json(f"evaluations/{name}.json")
            if evaluation is not None:
                run.evaluations[name] = evaluation
        return run

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
    def judge_id(self) -> str | None:
        """The judge of the collected trajectories: that of the filter; before there is one, that of the evaluations. None: the one with
        most verdicts in the store."""
        if isinstance(judge := (self.filter or {}).get("judge"), str):
            return judge
        named = [one.get("judge") for one in self.evaluations.values()]
        judge = next((judge for judge in named if isinstance(judge, str)), None)
        if self.setting("judge.self_consistency") is True:  # which evaluations are without, and the stored verdicts
            with (
                contextlib.suppress(ValueError, RuntimeError),
                contextlib.closing(Store(self.store, writable=False)) as store,
            ):
                judge = PREFIX + found if (found := judge or store.main_judge()) else None
        return judge

    def _hardware(self) -> dict[str, Any] | None:
        """processor, cores (None on a GPU), ranks, nodes; a file that holds anything else is a problem."""
        found = self._json("hardware.json")
        if found is None:
            return None
        processor, cores, ranks, nodes = (found.get(key) for key in ("processor", "cores", "ranks", "nodes"))
        counts = [ranks, nodes, *([] if cores is None else [cores])]
        whole = all(isinstance(count, int) and count > 0 for count in counts)
        if not isinstance(processor, str) or not whole:
            self.problems.append(
                f"`hardware.json` holds {repr(found)[:80]}, which no training writes; {_remedy('hardware.json')}"
            )
            return None
        return {"processor": processor, "cores": cores, "ranks": ranks, "nodes": nodes}

    def _json(self, name: str) -> dict[str, Any] | None:
        path = self.folder / name
        if not path.is_file():
            return None
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            self.problems.append(f"`{name}` is not readable as JSON: {error}; {_remedy(name)}")
            return None
        if not isinstance(value, dict):
            self.problems.append(f"`{name}` holds {repr(value)[:80]} instead of an object; {_remedy(name)}")
            return None
        return value


def _remedy(name: str) -> str:
    remedies = {
        "config.yaml": "a stage that is started with the settings of the run writes it again",
        METRICS_FILE: "remove what is damaged; `swirl-fast train` goes on from the newest checkpoint",
        "filter.json": "`swirl-fast filter` writes it again",
        "summary.json": "`swirl-fast run` writes it again",
        "hardware.json": "`swirl-fast train` writes it again",
    }
    return remedies.get(name, f"`swirl-fast evaluate --name {Path(name).stem}` writes it again")


def by_question(evaluation: dict[str, Any], key: str) -> dict[str, float]:
    """Question id -> its number, where there is one."""
    rows = evaluation.get("by_question")
    found = {id_: row.get(key) for id_, row in rows.items() if isinstance(row, dict)} if isinstance(rows, dict) else {}
    return {id_: number for id_, number in found.items() if is_number(number)}
