"""Ranks that are threads of one process: what they tell each other, without torch.distributed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from queue import Queue
from typing import Any, TypeVar

import torch
from torch import Tensor

from swirl_fast.ranks import Group, Ranks

T = TypeVar("T")


@dataclass(frozen=True)
class ThreadRanks(Ranks):
    """mail: from whom, to whom -> what was sent and not yet received."""

    mail: Mapping[tuple[int, int], Queue[Any]] = field(default_factory=dict)

    def group(self, partition: Sequence[Sequence[int]]) -> Group:
        return Group(next(part for part in partition if self.rank in part))

    def numbers(self, value: float, group: Group) -> list[float]:
        return self._tell(value, group.members)

    def max(self, values: Tensor) -> Tensor:
        return torch.stack(self._tell(values, range(self.size))).amax(0)

    def sum(self, values: Tensor) -> Tensor:
        return torch.stack(self._tell(values, range(self.size))).sum(0)

    def exchange(self, given: Mapping[int, Any], givers: Sequence[int]) -> list[Any]:
        for taker, value in given.items():
            self.mail[self.rank, taker].put(value)
        return [self.mail[giver, self.rank].get(timeout=60) for giver in givers]

    def _tell(self, value: T, members: Sequence[int]) -> list[T]:
        return self.exchange(dict.fromkeys(members, value), members)


def on_ranks(size: int, work: Callable[[Ranks], T]) -> list[T]:
    """What `work` returns on each of `size` ranks."""
    mail: dict[tuple[int, int], Queue[Any]] = {
        (giver, taker): Queue() for giver in range(size) for taker in range(size)
    }
    with ThreadPoolExecutor(size) as threads:
        found = list(threads.map(work, [ThreadRanks(rank, size, torch.device("cpu"), mail) for rank in range(size)]))
    assert all(box.empty() for box in mail.values()), "something was sent that nobody took"
    return found
