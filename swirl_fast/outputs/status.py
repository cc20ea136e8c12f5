"""`swirl-fast status`: how far a run is, as text."""

from __future__ import annotations

from swirl_fast.outputs.progress import Status
from swirl_fast.outputs.text import visible

MARKS = {"done": "done", "running": "under way", "unfinished": "can go on", "waiting": "–", "skipped": "left out"}


def describe(status: Status) -> str:
    """A line a stage, then problems, then the command that comes next."""
    lines = [f"{status.folder}"]
    width = max((len(stage.name) for stage in status.stages), default=0)
    for stage in status.stages:
        lines.append(f"  {stage.name:{width}}  {MARKS[stage.state]:9}  {stage.detail}".rstrip())
    if status.problems:
        lines += ["", "cannot be read:", *(f"  {problem}" for problem in status.problems)]
    if status.next:
        lines += ["", f"next: {status.next}"]
    elif any(stage.state == "running" for stage in status.stages):
        lines += ["", "next: wait until the stage that is under way ends"]
    else:
        lines += ["", "nothing is left to do"]
    return "\n".join(visible(line) for line in lines)
