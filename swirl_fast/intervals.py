"""95 % intervals: of a share (Wilson), of the difference of two shares (Newcombe), of means over seeds and questions (bootstrap)."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

DRAWS = 4000
KEPT_BYTES = 2**29  # of draws that are used again

Floats = NDArray[np.float64]
Sizes = tuple[tuple[int, ...], ...]
Counts = tuple[NDArray[Any], NDArray[np.int64] | slice]  # how often each question was drawn, and which rows of it count
Drawn = tuple[
    int, NDArray[np.int64], dict[tuple[int, int], Counts]
]  # a seed, the draws that drew it, by pair and number of questions

_kept: dict[tuple[Sizes, tuple[int, ...], frozenset[int]], list[Drawn]] = {}  # what was used last is last


def wilson(successes: float, n: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share: (low, high), both in [0, 1]; (0, 1) for n = 0.

    successes: may be fractional, e.g. a sum of means over samples. Raises ValueError unless 0 <= successes <= n.

    centre ± width = (p + z²/2n ± z sqrt(p(1-p)/n + z²/4n²)) / (1 + z²/n), z = 1.959964 (Wilson 1927).
    """
    if not 0 <= successes <= n:
        raise ValueError(f"successes={successes} of n={n}: must be between 0 and n")
    if n == 0:
        return 0.0, 1.0
    z = 1.959963984540054
    p = successes / n
    centre = p + z * z / (2 * n)
    width = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    return max(0.0, (centre - width) / scale), min(1.0, (centre + width) / scale)


def difference_interval(
    old: float, old_interval: tuple[float, float], new: float, new_interval: tuple[float, float]
) -> tuple[float, float]:
    """95 % interval of `new - old`, two shares with Wilson intervals: Newcombe 1998, method 10.

    low = d - sqrt((p2 - low2)² + (high1 - p1)²), high = d + sqrt((high2 - p2)² + (p1 - low1)²), d = p2 - p1
    """
    difference = new - old
    low = difference - math.hypot(new - new_interval[0], old_interval[1] - old)
    return low, difference + math.hypot(new_interval[1] - new, old - old_interval[0])


def bootstrap(
    groups: Sequence[Sequence[Floats]],
    statistic: Callable[[Floats], Floats],
    pairs: Sequence[int] = (0,),
    crossed: Collection[int] = (),
) -> list[float]:
    """95 % percentile interval of a statistic of means, with two levels: seeds are drawn with replacement, then the questions of each.

    groups: for each quantity the values of every seed. statistic: [quantities, draws] means -> [draws]. pairs: a number for each
    quantity; those with the same number have the same questions, and are drawn together. crossed: numbers
    of `pairs` whose questions are the same, in the same order, for every seed: they are drawn once for all seeds of a draw, for asking a
    question again with another seed does not make it another question."""
    seeds = len(groups[0])
    means = np.zeros((len(groups), DRAWS))
    sizes = tuple(tuple(map(len, values)) for values in groups)
    for seed, here, counts in _draws(sizes, tuple(pairs), frozenset(crossed)):
        shares = {key: times[rows].astype(np.float64) / key[1] for key, (times, rows) in counts.items()}
        for quantity, (pair, values) in enumerate(zip(pairs, groups, strict=True)):
            means[quantity, here] += shares[pair, len(values[seed])] @ values[seed] / seeds
    low, high = np.quantile(statistic(means), [0.025, 0.975])
    return [float(low), float(high)]


def _draws(sizes: Sizes, pairs: tuple[int, ...], crossed: frozenset[int]) -> list[Drawn]:
    """As `_draw`. Drawing takes far longer than the means, and a summary draws the same for all its arms: what was used last is kept, up
    to KEPT_BYTES."""
    key = sizes, pairs, crossed
    found = _kept.pop(key, None) or _draw(*key)
    _kept[key] = found
    while _kept and sum(map(_bytes, _kept.values())) > KEPT_BYTES:
        del _kept[next(iter(_kept))]
    return found


def _bytes(found: list[Drawn]) -> int:
    each = {id(times): times.nbytes for _, _, counts in found for times, _ in counts.values()}
    return sum(each.values())


def _draw(sizes: Sizes, pairs: tuple[int, ...], crossed: frozenset[int]) -> list[Drawn]:
    """As often as there are seeds. sizes: questions of every seed, for each quantity."""
    draw = np.random.default_rng(0)
    seeds = len(sizes[0])
    once = {
        pair: _small(draw.multinomial(own[0], np.full(own[0], 1 / own[0]), DRAWS))
        for pair, own in dict(zip(pairs, sizes, strict=True)).items()
        if pair in crossed
    }
    found = []
    for _ in range(seeds):
        chosen = draw.integers(0, seeds, DRAWS)
        for seed in range(seeds):
            here = np.flatnonzero(chosen == seed)
            counts: dict[tuple[int, int], Counts] = {}
            for pair, own in zip(pairs, sizes, strict=True):
                n = own[seed]
                if pair in once:
                    counts[pair, n] = once[pair], here
                elif (pair, n) not in counts:
                    counts[pair, n] = _small(draw.multinomial(n, np.full(n, 1 / n), len(here))), slice(None)
            found.append((seed, here, counts))
    return found


def _small(counts: NDArray[np.int64]) -> NDArray[Any]:
    """In the smallest integers that hold them: bytes, as a rule."""
    return counts.astype(np.min_scalar_type(int(counts.max(initial=0))))
