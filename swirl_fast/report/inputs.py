"""What a run's folder holds for the report: its files, what can be compared, and what is not there yet."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from swirl_fast.metrics import METRICS_FILE
from swirl_fast.outputs.folder import RunFolder, by_question
from swirl_fast.outputs.text import show

STAGES = {  # file -> the command that writes it
    "config.yaml": "run",
    "evaluations/base.json": "evaluate --of base",
    "trajectories.db": "collect",
    "filter.json": "filter",
    METRICS_FILE: "train",
    "evaluations/trained.json": "evaluate --of trained",
}


class Run(RunFolder):
    """With what the evaluations say of each other."""

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


def load_run(folder: Path) -> Run:
    """Reads only. What cannot be read, or is not there yet, is named in `problems`."""
    run = Run.read(folder)
    run.problems += [
        f"`{file}` is not there yet: `swirl-fast {command}` writes it"
        for file, command in STAGES.items()
        if not (run.store if file == "trajectories.db" else folder / file).is_file()
    ]
    wanted = run.setting("training.steps")
    if run.metrics and isinstance(wanted, int) and run.metrics[-1]["step"] < wanted:
        step = show(run.metrics[-1]["step"], "")
        run.problems.append(f"training is at step {step} of {wanted:,}: `swirl-fast train` goes on from there")
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
                f"`model/` has other weights by now than the evaluation {name} was made with: "
                f"`swirl-fast evaluate --of trained --name {name}` evaluates these"
            )
    return found
