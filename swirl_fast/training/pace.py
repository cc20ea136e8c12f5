"""How long a training still takes, and a sign of life while a step takes long: lines of rank 0 on the screen, nothing else."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable

QUIET = 60.0  # seconds without a line before there is a sign of life
STEPS = 10  # the last ones, of which the mean is taken


class Pace:
    """Of the steps that this process does. steps: training.steps. done: the part of a step that was done last, in words. clock: seconds.

    Between `start` and `stop` a thread says where a step is that has taken QUIET seconds, and again after as many.
    """

    def __init__(
        self, steps: int, done: Callable[[], str] | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._steps, self._done, self._clock = steps, done, clock
        self._ends = deque([clock()], maxlen=STEPS + 1)  # of steps; the first is the beginning
        self._step = 0
        self._stopped = threading.Event()

    def finish(self, step: int) -> str:
        """A step is done. Returns what its line says of the rest, such as `  12 min left`; empty after the last."""
        self._step = step
        self._ends.append(self._clock())
        left = (self._ends[-1] - self._ends[0]) / (len(self._ends) - 1) * (self._steps - step)
        return f"  {duration(left)} left" if step < self._steps else ""

    def start(self) -> None:
        threading.Thread(target=self._watch, name="pace", daemon=True).start()

    def stop(self) -> None:
        self._stopped.set()

    def _watch(self) -> None:
        said = self._ends[-1]
        while not self._stopped.wait(QUIET / 10):
            now, began = self._clock(), self._ends[-1]
            if now - max(said, began) >= QUIET:
                said = now
                print(self.sign(now - began), flush=True)

    def sign(self, seconds: float) -> str:
        """seconds: since the step began."""
        done = self._done() if self._done else ""
        number = f"step {self._step + 1}/{self._steps}" if self._step else "the first step"
        return f"train: {number} is under way for {duration(seconds)}{f'; done so far: {done}' if done else ''}"


def duration(seconds: float) -> str:
    """Such as `45 s`, `12 min`, `3 h 05 min`, `2 d 4 h`."""
    minutes = round(seconds / 60)
    if seconds < 100:
        return f"{seconds:.0f} s"
    if minutes < 100:
        return f"{minutes} min"
    if minutes < 48 * 60:
        return f"{minutes // 60} h {minutes % 60:02} min"
    return f"{minutes // 1440} d {minutes % 1440 // 60} h"
