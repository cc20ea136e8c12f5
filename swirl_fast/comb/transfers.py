"""Which rank gives how much work to which, so that all have the same."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

# Up to so many ranks tell each other their work; of more, those of a row and then those of a column.
TOGETHER = 256
# With more than this above the mean of all a rank is relieved.
ABOVE = 0.035


class Transfer(NamedTuple):
    """Rank `giver` gives `work` to rank `taker`."""

    giver: int
    taker: int
    work: float


def transfers(work: Sequence[float], ranks: Sequence[int] | None = None, slack: float = 0.02) -> list[Transfer]:
    """work: of every one of `ranks` (None: 0, 1, …). What those above the mean give to those below it, in their order; every rank that
    calls this with the same numbers gets the same list. At most one transfer fewer than there are ranks; those below `slack` of the mean
    are left out.
    """
    mean = sum(work) / max(1, len(work))
    numbered = list(zip(range(len(work)) if ranks is None else ranks, work, strict=True))
    given = [(rank, own - mean) for rank, own in numbered if own > mean]
    taken = [(rank, mean - own) for rank, own in numbered if own < mean]
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


def relieving(work: Sequence[float], ranks: Sequence[int], mean: float, turn: int) -> list[Transfer]:
    """What ranks with more than ABOVE the mean of all could give to ranks below it, those with the most to those with the least, one each;
    in every turn to others. As `transfers`, the same list on every rank that has the same numbers."""
    given = sorted(
        ((own, rank) for rank, own in zip(ranks, work, strict=True) if own > (1 + ABOVE) * mean), reverse=True
    )
    taken = sorted((own, rank) for rank, own in zip(ranks, work, strict=True) if own < mean)
    if taken:  # one that had no room may have none in the next turn either
        step = next(step for step in (3, 2, 1) if math.gcd(step, len(taken)) == 1)  # so all come to be asked
        first = step * turn % len(taken)
        taken = taken[first:] + taken[:first]
    return [
        Transfer(giver, taker, min(most - mean, mean - least))
        for (most, giver), (least, taker) in zip(given, taken, strict=False)
    ]


def rank_groups(ranks: int) -> list[list[list[int]]]:
    """The groups within which work is shared out, one partition of all ranks after the other: everybody together, or where they are too
    many the rows and then the columns of a rectangle. So a rank tells a few hundred others of its work and not all, and the rows, as long
    as they may be, leave little to do for the columns.
    """
    columns = next(c for c in range(TOGETHER, 0, -1) if ranks % c == 0)
    if ranks <= TOGETHER or columns < TOGETHER // 16:
        return [[list(range(ranks))]]
    return [
        [list(range(start, start + columns)) for start in range(0, ranks, columns)],
        [list(range(column, ranks, columns)) for column in range(columns)],
    ]
