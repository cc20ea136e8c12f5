"""Finds a rank that hangs: one that died is torchrun's matter, one that neither dies nor goes on would keep all others waiting for hours.

Every rank says in the store that torchrun's ranks share how far it is, with each part of a step that it has done. A thread on each rank
watches what all of them say. When nothing has changed for `timeout` seconds, those that are behind the others are the ones that all wait
for: they are named, and the process ends, so that torchrun ends the others too. The run goes on from its last checkpoint when it is started
again.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any, Self

import torch.distributed as dist

from swirl_fast.exits import EXIT_RESUMABLE
from swirl_fast.ranks import Ranks

_KEY = "swirl_fast/progress"


class Heartbeat:
    """A context manager. timeout: seconds; 0 or infinity: nothing is watched. store: what the ranks share; None: nothing is watched either.

    end: what ends the process, given an exit code.
    """

    def __init__(
        self, ranks: Ranks, timeout: float, store: dist.Store | None, end: Callable[[int], Any] = os._exit
    ) -> None:
        self._ranks, self._timeout, self._end = ranks, timeout, end
        self._watched = store is not None and ranks.size > 1 and 0 < timeout < float("inf")
        self._store = store
        self._marks = 0
        self.last = ""  # the part of a step that this rank has done last
        self._stopped = threading.Event()

    def __enter__(self) -> Self:
        if self._watched:
            assert self._store is not None
            self.mark("the start")
            self._ranks.barrier()  # every rank's key is there
            threading.Thread(target=self._watch, args=(self._store.clone(),), name="heartbeat", daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stopped.set()

    def mark(self, done: str) -> None:
        """This rank has done a part of a step. done: in words, for the message."""
        self._marks += 1
        self.last = done
        if self._watched:
            assert self._store is not None
            self._store.set(f"{_KEY}/{self._ranks.rank}", f"{self._marks} {done}")

    def _watch(self, store: dist.Store) -> None:
        store.set_timeout(timedelta(seconds=max(10.0, self._timeout)))
        keys = [f"{_KEY}/{rank}" for rank in range(self._ranks.size)]
        last, changed = {}, time.monotonic()
        while not self._stopped.wait(min(self._timeout / 10, 10.0)):
            try:
                said = {rank: store.get(key).decode() for rank, key in enumerate(keys)}
            except (RuntimeError, ValueError):  # the store is gone: torchrun is ending the ranks
                return
            if said != last:
                last, changed = said, time.monotonic()
            elif time.monotonic() - changed >= self._timeout and not self._stopped.is_set():
                print(f"train: {hung(said, self._timeout)}", file=sys.stderr, flush=True)
                self._end(EXIT_RESUMABLE)
                return


def hung(said: Mapping[int, str], timeout: float) -> str:
    """The message. said: rank -> its number of parts done and the last of them."""
    marks = {rank: int(text.partition(" ")[0]) for rank, text in said.items()}
    least = min(marks.values())
    behind = [rank for rank, count in marks.items() if count == least]
    done = said[behind[0]].partition(" ")[2]
    if len(behind) == len(marks):
        who = "no rank has"
    else:
        who = f"rank {', '.join(map(str, behind))} {'has' if len(behind) == 1 else 'have'} not"
    return (
        f"{who} gone on after {done} for {timeout:g} seconds (training.step_timeout); the run ends, and goes on from its last checkpoint "
        "when it is started again"
    )
