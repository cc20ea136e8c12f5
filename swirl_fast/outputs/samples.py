"""runs/NAME/samples/step_00000N.jsonl: the actions that training step N sampled, one JSON object a line."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SAMPLES = "samples"  # the folder in a run's folder


def sample_steps(folder: Path) -> list[int]:
    """The training steps whose sampled actions a run's folder holds, ascending; empty where it holds none."""
    names = (re.fullmatch(r"step_(\d+)\.jsonl", path.name) for path in (folder / SAMPLES).glob("step_*.jsonl"))
    return sorted(int(name[1]) for name in names if name)


def read_samples(folder: Path, step: int) -> Iterator[dict[str, Any]]:
    """The sampled actions of a training step, one after the other: step, trajectory, question, state (0-based), text, kind, tool, argument,
    error, tokens, verdict, reward, advantage, reason. A last line that is still being written is left out.

    Raises ValueError where the run's folder has no samples of this step, naming those it has, and for a line that is damaged.
    """
    steps = sample_steps(folder)
    if step not in steps:
        raise ValueError(f"{folder / SAMPLES} has no sampled actions of training step {step}: {_which(steps)}")
    (path,) = [each for each in (folder / SAMPLES).glob("step_*.jsonl") if each.stem.removeprefix("step_").isdigit()
               and int(each.stem.removeprefix("step_")) == step]  # fmt: skip
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith("\n"):
                return
            try:
                row = json.loads(line)
            except ValueError as error:
                raise ValueError(
                    f"{path}:{number} is not readable as JSON ({error}): remove the line or the file"
                ) from None
            if not isinstance(row, dict):
                raise ValueError(
                    f"{path}:{number} holds {line.strip()[:80]} instead of an object: remove the line or the file"
                )
            yield row


def _which(steps: list[int]) -> str:
    if not steps:
        return "none were written, as by a version without them, before the first step, or by training without sampling"
    if len(steps) == 1:
        return f"it has those of step {steps[0]}"
    if steps == list(range(steps[0], steps[-1] + 1)):
        return f"it has those of steps {steps[0]} to {steps[-1]}"
    return f"it has those of steps {', '.join(map(str, steps))}"
