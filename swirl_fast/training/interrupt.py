"""Orderly stops: SIGTERM, SIGUSR1 (what Slurm is usually told to send ahead of a time limit) and `training.time_limit` stop training after
the current step, with a checkpoint and an exit code that means: start me again.

torchrun passes SIGTERM on to its workers and kills them 30 s later: `--shutdown-timeout SECONDS` must leave time for a step and a
checkpoint. SIGUSR1 ends torchrun itself, unless it is told to pass it on: `--signals-to-handle SIGTERM,SIGINT,SIGUSR1`. It
shows the workers' exit code in its report, its own is 1. After a stop by `time_limit` it uses up its `--max-restarts`; as the time is
counted from the start of torchrun, each restart does at most one step.
"""

from __future__ import annotations

import math
import os
import signal
import threading
import time
from collections import deque
from pathlib import Path
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from swirl_fast.ranks import Ranks

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
_RECENT = 10  # the next step is taken to be as long as the longest of so many


class Interrupts:
    """While this is entered, in the main thread, signals set a flag instead of ending the process. minutes: 0 for no limit."""

    def __init__(self, ranks: Ranks, minutes: float = 0.0) -> None:
        self._ranks, self._minutes = ranks, minutes
        self._deadline = _launched() + 60 * minutes if minutes else math.inf
        self._steps: deque[float] = deque(maxlen=_RECENT)
        self._signal = 0
        self._before: dict[int, Any] = {}

    def measure(self, seconds: float) -> None:
        """How long a step took."""
        self._steps.append(seconds)

    def reason(self, reserve: float = 0.0) -> str:
        """Why to stop before another step, the same on all ranks; "" to go on. Collective.

        reserve: seconds that must be left after the next step; -inf where there is none, so that only signals count.
        """
        import torch

        late = time.monotonic() + max(self._steps, default=0.0) + reserve > self._deadline
        number, too_late = self._ranks.max(torch.tensor([self._signal, late], dtype=torch.float64)).tolist()
        if number:
            return signal.Signals(int(number)).name
        return f"training.time_limit={self._minutes:g} minutes" if too_late else ""

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._signal = number
        if self._ranks.main:  # print() may have been interrupted itself
            os.write(2, f"{signal.Signals(number).name}: stopping after this step, with a checkpoint\n".encode())

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():  # Python allows handlers there only
            for number in SIGNALS:
                self._before[number] = signal.signal(number, self._note) or signal.SIG_DFL
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


def _launched() -> float:
    """When this process, or the torchrun that started it, was started, on the clock of time.monotonic(); now where there is no /proc."""
    process = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else os.getpid()
    try:
        # after the name in parentheses, which may hold blanks; starttime is field 22, in clock ticks since the machine started
        ticks = int(Path(f"/proc/{process}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[19])
        running = float(Path("/proc/uptime").read_text(encoding="utf-8").split()[0]) - ticks / os.sysconf("SC_CLK_TCK")
    except OSError:
        return time.monotonic()
    return time.monotonic() - max(running, 0.0)
