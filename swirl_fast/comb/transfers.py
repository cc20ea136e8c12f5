"""Which rank gives how much work to which, so that all have the same."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Transfer(NamedTuple):
    """Rank `giver` gives `work` to rank `taker`."""

    giver: int
    taker: int
    work: float


def transfers(work: Sequence[float], slack: float = 0.01) -> list[Transfer]:
    """work: of every rank. What ranks above the mean give to those below it, in the order of ranks; every rank that calls this with the
    same numbers gets the same list. At most one transfer fewer than there are ranks; those below `slack` of the mean are left out.
    """
    mean = sum(work) / max(1, len(work))
    given = [(rank, own - mean) for rank, own in enumerate(work) if own > mean]
    taken = [(rank, mean - own) for rank, own in enumerate(work) if own < mean]
    found = []
    g = t = 0
    giver, surplus = given[0] if given else (0, 0.0)
    taker, gap = taken[0] if taken else (0, 0.0)
    while g < len(given) and t < len(taken):
        moved = min(surplus, gap)
        if moved > slack * mean:
            found.append(Transfer(giver, taker, moved))
        surplus, gap = surplus - moved, gap - moved
        if surplus <= gap:
            g += 1
            giver, surplus = given[g] if g < len(given) else (0, 0.0)
        else:
            t += 1
            taker, gap = taken[t] if t < len(taken) else (0, 0.0)
    return found
