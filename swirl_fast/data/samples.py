"""runs/NAME/samples/step_000012.jsonl: the actions that a training step sampled, and what was learned from each; a JSON object a line.

    {"step": 12, "place": 0, "trajectory": "q7/3", "question_id": "q7", "task": "gsm8k", "question": "…", "state": 1, "sample": 0,
     "text": "…", "kind": "tool", "tool": "calculator", "argument": "3 * 4", "error": "", "tokens": 27, "cut_off": false,
     "policy_version": 11, "observation": null, "verdict": "GOOD", "reward": 1.0, "reason": "…", "advantage": 0.5714286}

Training writes them (training/samples.py) until the folder is full, and then full.json, which names the first step that is missing. The
report shows them. Reading them needs no torch.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, get_type_hints

from swirl_fast.files import read_json, write_json, write_text

FOLDER, FULL = "samples", "full.json"
_NAME = re.compile(r"step_(\d+)\.jsonl")


@dataclass(frozen=True)
class Sample:
    """An action that training sampled. A step's file has them in the order of place, state and sample.

    step: of the training, the first is 1. place: of its trajectory among those of the step, from 0: a trajectory that comes twice in a step
    has two places. state: how many steps of the trajectory lie before the action. sample: its number among the actions drawn at this state,
    from 0. With algorithm.reward=outcome the trajectory is itself sampled, and its states have one action each.

    text: all that the model wrote. kind: tool, answer or malformed. tool: the name of the called one. argument: of the call, or the answer.
    error: why it is malformed. tokens: how many were sampled. cut_off: whether it reached the limit of tokens. policy_version: training
    steps done by the policy that drew it. observation: what the tool answered, null where none was called: only
    algorithm.reward=outcome calls tools.

    verdict: GOOD, BAD or UNKNOWN. reward: in [0, 1], null where the verdict is UNKNOWN. reason: of the verdict. advantage: null where the
    action is left out of the loss.
    """

    step: int
    place: int
    trajectory: str
    question_id: str
    task: str
    question: str
    state: int
    sample: int
    text: str
    kind: str
    tool: str | None
    argument: str
    error: str
    tokens: int
    cut_off: bool
    policy_version: int
    observation: str | None
    verdict: str
    reward: float | None
    reason: str
    advantage: float | None

    @property
    def line(self) -> str:
        """Its line in a step's file, line end included. Lone surrogates, which models write and UTF-8 lacks, become JSON's \\ud83d."""
        text = json.dumps(vars(self), ensure_ascii=False, allow_nan=False) + "\n"
        return text.encode("utf-8", "backslashreplace").decode("utf-8")


@cache
def _kinds() -> dict[str, Any]:
    """The types of the fields; a whole number is a number."""
    hints = get_type_hints(Sample)
    return {
        field.name: hints[field.name] | int if "float" in str(hints[field.name]) else hints[field.name]
        for field in dataclasses.fields(Sample)
    }


def samples_file(folder: Path, step: int) -> Path:
    """folder: of the run."""
    return folder / FOLDER / f"step_{step:06d}.jsonl"


def sample_steps(folder: Path) -> list[int]:
    """The training steps whose samples are kept in the run's folder, in order."""
    found = (_NAME.fullmatch(path.name) for path in (Path(folder) / FOLDER).glob("step_*.jsonl"))
    return sorted(int(match[1]) for match in found if match)


def read_samples(folder: Path, step: int) -> Iterator[Sample]:
    """The samples of a step, read as they are asked for. folder: of the run.

    Raises ValueError when there are none of this step, and for a damaged line, with the file and the number of the line.
    """
    path = samples_file(Path(folder), step)
    if not path.is_file():
        kept = sample_steps(folder)
        there = f"there are those of {len(kept)} steps, {kept[0]} to {kept[-1]}" if kept else "there are none"
        raise ValueError(f"{path} does not exist: {there} (training.samples_mb limits how many are kept)")
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                yield _parse(line)
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: {error}; remove the file to go on without it") from None


def _parse(line: bytes) -> Sample:
    row = json.loads(line)
    if not isinstance(row, dict):
        raise ValueError("not a JSON object")
    for name, kind in _kinds().items():
        if name not in row:
            raise ValueError(f"there is no {name!r}")
        if not isinstance(row[name], kind):
            raise ValueError(f"{name!r} is {str(row[name])[:80]!r}")
    return Sample(**{name: row[name] for name in _kinds()})  # a later version may write more


def write_samples(folder: Path, step: int, lines: Iterable[str]) -> None:
    """Replaces the file of a step in the run's folder. lines: `Sample.line` of each."""
    write_text(samples_file(folder, step), "".join(lines))


def mark_full(folder: Path, step: int, size: int) -> None:
    """Writes down that the samples of a step, `size` bytes, did not fit."""
    write_json(folder / FOLDER / FULL, {"step": step, "bytes": size})


def full_from(folder: Path) -> tuple[int, int] | None:
    """(the first step whose samples did not fit, their bytes), None where all did. Raises ValueError for a damaged file."""
    path = Path(folder) / FOLDER / FULL
    try:
        row = read_json(path)
        return None if row is None else (int(row["step"]), int(row["bytes"]))
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{path} is damaged; remove it to go on without it") from None


def unmark_full(folder: Path) -> None:
    (folder / FOLDER / FULL).unlink(missing_ok=True)


def drop_samples(folder: Path, after: int) -> None:
    """Removes what is there of later steps than `after`, and what a process left that was killed while it wrote."""
    for path in (folder / FOLDER).glob("*"):
        match = _NAME.fullmatch(path.name)
        cut_off = path.name.startswith(("step_", FULL)) and path.name.endswith(".tmp")
        if cut_off or (match and int(match[1]) > after):
            path.unlink()


def samples_bytes(folder: Path) -> int:
    """The size of all that is kept."""
    return sum(samples_file(folder, step).stat().st_size for step in sample_steps(folder))
