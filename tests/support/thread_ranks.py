"""Ranks that are threads of one process: what they tell each other, without torch.distributed."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from swirl_fast.ranks import Group, Ranks

T = TypeVar("T")


@dataclass
class _Board:
    barrier: threading.Barrier
    values: dict[Any, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ThreadRanks(Ranks):
    board: _Board = field(default_factory=lambda: _Board(threading.Barrier(1)))

    def numbers(self, value: float, group: Group) -> list[float]:
        values = self._all(value)
        return [values[member] for member in group.members]

    def max(self, values: Tensor) -> Tensor:
        return torch.stack(self._all(values)).amax(0)

    def exchange(self, given: Mapping[int, Any], givers: Sequence[int]) -> list[Any]:
        sent = self._all(dict(given))
        assert sorted(givers) == [giver for giver, values in enumerate(sent) if self.rank in values]
        return [sent[giver][self.rank] for giver in givers]

    def _all(self, value: T) -> list[T]:
        self.board.values[self.rank] = value
        self.board.barrier.wait(60)
        found = [self.board.values[rank] for rank in range(self.size)]
        self.board.barrier.wait(60)
        return found


def on_ranks(size: int, work: Callable[[Ranks], T]) -> list[T]:
    """What `work` returns on each of `size` ranks."""
    board = _Board(threading.Barrier(size))
    with ThreadPoolExecutor(size) as threads:
        return list(threads.map(work, [ThreadRanks(rank, size, torch.device("cpu"), board) for rank in range(size)]))
