"""Separate rows: one for each state with an action, for models over which prefixes cannot be shared, and to compare the comb with.

    packed    one row after another in one packed row, a forest without branches     ─── ──── ──      computed = Σ (|s| + |a| - 1)
    padded    a rectangle of rows, each filled up to the longest at its right        ──── ───· ──··   computed = rows * longest

Both are combs (tree.py), only without what is shared, so that all that reads a comb reads these. In a model that looks backwards only,
nothing depends on the padding, which predicts nothing either: it has token 0, and counts as computed.

Legend: A actions, R rows, E edges.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np

from swirl_fast.comb.flops import ONLY_TOKENS, ModelSize
from swirl_fast.comb.micro_batches import MicroBatchPlan, check_path, path_flops
from swirl_fast.comb.tree import Comb, SampledState, Trunk

# What one more micro-batch costs, in tokens: tens of milliseconds of calls on a GPU (an estimate). Padding up to this is cheaper.
_MICRO_BATCH = 256


def pack_rows(trunks: Sequence[Trunk], padded: bool = False) -> Comb:
    """A row for each action with tokens, in the order of their numbers, as one comb. Raises ValueError for a number that two actions
    carry."""
    actions = sorted(_actions(trunks), key=lambda action: action[2])
    indices = [index for _, _, index in actions]
    if len(set(indices)) < len(indices):
        raise ValueError("two actions carry the same number")
    rows = [(np.concatenate([state, action[:-1]]), len(state), action) for state, action, _ in actions if len(action)]
    longest = max((len(tokens) for tokens, _, _ in rows), default=0)
    widths = [longest if padded else len(tokens) for tokens, _, _ in rows]
    starts = np.cumsum([0, *widths])
    tokens_T = np.zeros(starts[-1], np.int32)
    for (tokens, _, _), start in zip(rows, starts, strict=False):
        tokens_T[start : start + len(tokens)] = tokens
    none = np.zeros(0, np.int32)
    depths = [np.arange(width) for width in widths]
    predicting = [
        start + np.arange(state - 1, len(tokens)) for (tokens, state, _), start in zip(rows, starts, strict=False)
    ]
    targets_E = np.concatenate([none, *(action for _, _, action in rows)])
    return Comb(
        tokens_T=tokens_T,
        depth_T=np.concatenate([none, *depths]).astype(np.int32),
        subtree_end_T=np.repeat(starts[1:], widths).astype(np.int32),
        rows_E=np.concatenate([none, *predicting]).astype(np.int32),
        targets_E=targets_E.astype(np.int32),
        edge_N=np.arange(len(targets_E), dtype=np.int32),
        offsets=np.cumsum([0, *(len(action) for _, action, _ in actions)]).astype(np.int32),
        indices_A=np.array(indices, np.int32),
        effective_tokens=sum(len(tokens) + 1 for tokens, _, _ in rows),
    )


def row_batches(
    trunks: Sequence[Trunk],
    token_budget: int,
    max_path: int | None = None,
    size: ModelSize = ONLY_TOKENS,
    allowed: Callable[[int], int] | None = None,
    padded: bool = False,
) -> list[MicroBatchPlan]:
    """As `micro_batches.micro_batches`, for separate rows: plans of at most `token_budget` tokens, padding included, each trunk of which
    holds one row. Rows of like length come together; of all ways to cut the rows by length, that with the fewest tokens and micro-batches.

    Where `allowed` is given, the cuts are as even as the number of plans that it answers lets them be. Depends neither on the order of
    `trunks` nor on chance. Raises ValueError for an action that is longer than max_path, or than the budget.
    """
    actions = [action for action in _actions(trunks) if len(action[1])]
    for state, action, _ in actions:
        check_path(len(state), len(action), token_budget, max_path)
    actions.sort(key=lambda action: (-len(action[0]) - len(action[1]), action[2]))
    length_A = np.array([len(state) + len(action) - 1 for state, action, _ in actions])
    cuts = _cuts(length_A, token_budget, padded)
    if allowed is not None:
        wanted = max(len(cuts) - 1, allowed(len(cuts) - 1))
        low, high = int(length_A.max(initial=0)), token_budget
        while low < high:
            middle = (low + high) // 2
            found = _cuts(length_A, middle, padded)
            if len(found) - 1 <= wanted:
                cuts, high = found, middle
            else:
                low = middle + 1
    edges_A = np.array([len(action) for _, action, _ in actions])
    plans = []
    for a, b in pairwise(cuts):
        computed = np.full(b - a, length_A[a]) if padded else length_A[a:b]
        work = path_flops(computed, size).sum() + 6.0 * size.output * edges_A[a:b].sum()
        rows = (Trunk(state, (SampledState(len(state), (action,), (index,)),)) for state, action, index in actions[a:b])
        plans.append(MicroBatchPlan(tuple(rows), int(computed.sum()), float(work)))
    return plans


def _actions(trunks: Sequence[Trunk]) -> list[tuple[np.ndarray, np.ndarray, int]]:
    """(state, action, number), int32."""
    for trunk in trunks:
        assert all(1 <= state.length <= len(trunk.tokens) for state in trunk.states), "a state lies on its trunk"
    return [
        (np.asarray(trunk.tokens[: state.length], np.int32), np.asarray(action, np.int32), index)
        for trunk in trunks
        for state in trunk.states
        for action, index in zip(state.actions, state.indices, strict=True)
    ]


def _cuts(length_A: np.ndarray, budget: int, padded: bool) -> list[int]:
    """Where to cut rows of these lengths, descending, the longest of which fits the budget: 0, …, A."""
    sums = np.concatenate([[0], np.cumsum(length_A)])
    best = np.full(len(sums), np.inf)
    best[0] = 0
    previous = np.zeros(len(sums), np.int64)
    for a, length in enumerate(length_A):
        if padded:
            tokens = length * np.arange(1, min(budget // length, len(length_A) - a) + 1)
        else:
            tokens = sums[a + 1 : np.searchsorted(sums, sums[a] + budget, "right")] - sums[a]
        ends = slice(a + 1, a + 1 + len(tokens))
        better = best[a] + tokens + _MICRO_BATCH < best[ends]
        best[ends] = np.where(better, best[a] + tokens + _MICRO_BATCH, best[ends])
        previous[ends] = np.where(better, a, previous[ends])
    cuts = [len(length_A)]
    while cuts[-1]:
        cuts.append(int(previous[cuts[-1]]))
    return cuts[::-1]
