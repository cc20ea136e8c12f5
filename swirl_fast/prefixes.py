"""In which order prompts go to a server with a prefix cache, so that what they share is computed once.

Prompts that arrive together share nothing: none of them is in the cache while the others are looked up. So of every group that shares
something the longest prompt is computed first ("warmed"). Then those that are prefixes of it, as all states of a trajectory are, find
everything, and those that leave its path find what lies before; of these, those that share more with each other are groups again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

WORTH = 32  # elements shared, below which waiting for another prompt costs more than computing them twice


def common_prefix(a: NDArray[np.integer], b: NDArray[np.integer]) -> int:
    """Number of leading tokens that two sequences share."""
    n = min(len(a), len(b))
    different = np.flatnonzero(a[:n] != b[:n])
    return int(different[0]) if len(different) else n


def cacheable(prompts: Sequence[Sequence[int] | np.ndarray]) -> int:
    """How many tokens of prompts that meet a cold cache together an ideal prefix cache would not compute again: the sum of
    (length - 1) minus the number of distinct prefixes among all `prompt[:-1]`. The last token of a prompt is always
    computed: its logits are needed. Raises ValueError for an empty prompt."""
    if any(len(prompt) == 0 for prompt in prompts):
        raise ValueError("an empty prompt has no last token; give at least one token")
    # Sorted, a prefix that came before is one of the neighbour before.
    contexts = [np.asarray(context, np.int64) for context in sorted(list(prompt[:-1]) for prompt in prompts)]
    return sum(common_prefix(a, b) for a, b in pairwise(contexts))


@dataclass(frozen=True)
class WarmGroup:
    """warm: number of the prompt that is computed first; None: nothing to wait for. ready: (number, how many of its elements are
    computed by then) of those that may be sent next. later: groups that share more than what is computed by then."""

    warm: int | None
    ready: list[tuple[int, int]]
    later: list[WarmGroup] = field(default_factory=list)


def warm_order(
    prompts: Sequence[np.ndarray], samples: Sequence[int], known: Sequence[int], worth: int = WORTH
) -> list[WarmGroup]:
    """Groups that share nothing worth waiting for; every prompt is in exactly one `ready`.

    prompts: arrays of integers, not negative. samples: how many completions of each are asked for. known: how many of its elements are
    in the cache already. worth: how many elements a group must share.
    """
    order = sorted(range(len(prompts)), key=lambda i: prompts[i].astype(">i8").tobytes())  # neighbours share most
    return _groups(order, prompts, samples, dict(enumerate(known)), worth)


def _groups(
    order: list[int], prompts: Sequence[np.ndarray], samples: Sequence[int], known: Mapping[int, int], worth: int
) -> list[WarmGroup]:
    runs: list[list[int]] = []
    for i in order:
        last = runs[-1][-1] if runs else None
        if last is not None and common_prefix(prompts[last], prompts[i]) - max(known[last], known[i]) >= worth:
            runs[-1].append(i)
        else:
            runs.append([i])
    groups = []
    for run in runs:
        first = max(run, key=lambda i: len(prompts[i]) - known[i])
        if sum(samples[i] for i in run) < 2 or len(prompts[first]) - known[first] < worth:
            groups.append(WarmGroup(None, [(i, known[i]) for i in run]))
            continue
        then = {i: max(known[i], common_prefix(prompts[i], prompts[first])) for i in run}
        left = [i for i in run if len(prompts[i]) - then[i] >= worth]
        ready = [(i, then[i]) for i in run if i not in left]
        groups.append(WarmGroup(first, ready, _groups(left, prompts, samples, then, worth)))
    return groups
