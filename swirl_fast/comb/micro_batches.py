"""Cuts the actions of a rank into micro-batches under a token budget, and off what it gives to other ranks.

    walk through the whole tree   ã11 ã12 │ ã21 ã22 ã23 │ ã31 …      a cut repeats the path that the actions on its two sides share

Nothing is packed here: `tree.pack` makes a comb of each plan, of exactly as many tokens as planned.

Legend: A actions, in the order of the walk.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from swirl_fast.comb.flops import ONLY_TOKENS, ModelSize, flops
from swirl_fast.comb.tree import PlacedAction, SampledState, TreeNode, Trunk, grown_tree, preorder

# A little more than the least that the largest group can be: fewer paths are computed twice (benchmarks/scale.py).
EVENNESS = 1.06


@dataclass(frozen=True)
class MicroBatchPlan:
    """Trunks, with the actions of one micro-batch. tokens: what `pack` makes of them, exactly. flops: an estimate, in which only
    neighbouring actions share edges."""

    trunks: tuple[Trunk, ...]
    tokens: int
    flops: float


def micro_batches(
    trunks: Sequence[Trunk],
    token_budget: int,
    max_path: int | None = None,
    size: ModelSize = ONLY_TOKENS,
    allowed: Callable[[int], int] | None = None,
) -> list[MicroBatchPlan]:
    """Splits the actions into groups whose combs have at most `token_budget` tokens; an action without tokens is left out.

    The actions are in the order of the walk through the whole tree, along the trunk and with the teeth of a state together; a cut
    before an action repeats the path that it shares with the one before. Of all ways to cut into the fewest groups the one that
    repeats least is taken. Depends neither on the order of `trunks` nor on chance.

    allowed: is told the fewest groups there can be, 0 where there are no actions, and answers how many there may be; where it is
    given, they are used to make the largest group's estimated work small. max_path: longest state with its action, in tokens; None: no
    limit. Raises ValueError when one is longer, or does not fit into a group of its own.
    """
    walk = Walk.of(trunks, size)
    for action in walk.actions:
        check_path(action.state, len(action.tokens), token_budget, max_path)
    limit = float("inf")
    fewest = len(walk.greedy(token_budget, limit))
    if allowed is not None:
        wanted = max(fewest, allowed(fewest))
        limit = walk.flops(0, len(walk.actions))
        low = 0.0
        for _ in range(24 if walk.actions else 0):  # to 1e-7 of the total work
            middle = (low + limit) / 2
            if len(walk.greedy(token_budget, middle)) <= wanted:
                limit = middle
            else:
                low = middle
    cuts = walk.cheapest(token_budget, limit * EVENNESS)
    return [
        MicroBatchPlan(walk.trunks(trunks, a, b), walk.tokens(a, b), walk.flops(a, b))
        for a, b in zip(cuts, cuts[1:], strict=False)
    ]


def split_off(
    trunks: Sequence[Trunk], works: Sequence[float], size: ModelSize = ONLY_TOKENS, sharing: bool = True
) -> tuple[list[Trunk], list[list[Trunk]]]:
    """(what is kept, what is cut off for each of `works`): a stretch of the walk for each, of about so much estimated work.

    A part computes the path again that it shares with what is left. Of all stretches that is taken with which neither what is got nor what
    is saved is far from the work that was wanted.
    sharing: False where every action is a row of its own.
    """
    walk = Walk.of(trunks, size, sharing)
    given = []
    for work in works:
        a, b = next(iter(walk.stretches(work, size)), (0, 0))
        given.append(list(walk.trunks(trunks, a, b)))
        walk = walk.without(a, b, size)
    return list(walk.trunks(trunks, 0, len(walk.actions))), given


def splits(
    trunks: Sequence[Trunk], work: float, size: ModelSize = ONLY_TOKENS, sharing: bool = True
) -> Iterator[tuple[list[Trunk], list[Trunk]]]:
    """(what is kept, what is cut off): as `split_off` does it for one part, then in other ways, one after the other, the nearest to what
    is wanted first."""
    walk = Walk.of(trunks, size, sharing)
    for a, b in walk.stretches(work, size):
        left = walk.without(a, b, size)
        yield list(left.trunks(trunks, 0, len(left.actions))), list(walk.trunks(trunks, a, b))


def check_path(state: int, action: int, token_budget: int, max_path: int | None) -> None:
    """Raises ValueError for a state of `state` tokens whose action of `action` tokens fits no micro-batch, or is longer with it than
    max_path."""
    path = state + action
    what = f"a state of {state} tokens with an action of {action} exceeds training."
    if path - 1 > token_budget:
        raise ValueError(f"{what}token_budget={token_budget}; set it to at least {path - 1}")
    if max_path is not None and path > max_path:
        raise ValueError(
            f"{what}max_path_tokens={max_path} (where that is 0, the model's context); set it to at least {path}"
        )


@dataclass(frozen=True)
class Walk:
    """The actions that predict something, in the order of the walk through their tree.

    shared_A: computed tokens each has in common with the one before it; a stretch of actions [a, b) therefore computes
    `shared_A[a] + token_sum[b] - token_sum[a]` tokens, and the same holds for work.
    """

    actions: list[PlacedAction]
    shared_A: NDArray[np.int64]
    token_sum: NDArray[np.int64]
    shared_flops_A: NDArray[np.float64]
    flops_sum: NDArray[np.float64]

    @classmethod
    def of(cls, trunks: Sequence[Trunk], size: ModelSize, sharing: bool = True) -> Walk:
        """sharing: False where every action is a row of its own; then they are in the order of their length."""
        root, grown = grown_tree(trunks)
        if not sharing:
            rows = sorted((action for action in grown if len(action.tokens)), key=lambda one: (one.length, one.index))
            return cls._of(rows, [0] * len(rows), size)
        ending: dict[TreeNode, list[PlacedAction]] = {}
        for action in grown:
            if len(action.tokens):
                ending.setdefault(action.node.holding(action.length - 1), []).append(action)
        actions: list[PlacedAction] = []
        shared = []
        low = before = 0  # low: the least depth at which the walk has branched off since the action before
        for node in preorder(root):
            low = min(low, node.depth)
            for action in sorted(ending.get(node, ()), key=lambda action: (action.length, action.index)):
                actions.append(action)
                shared.append(min(low, before))
                low = before = action.length
        return cls._of(actions, shared, size)

    @classmethod
    def _of(cls, actions: list[PlacedAction], shared: list[int], size: ModelSize) -> Walk:
        length_A = np.array([action.length for action in actions], np.int64)
        shared_A = np.array(shared, np.int64)
        state_A = np.array([action.state for action in actions], np.int64)
        # targets among the shared tokens are edges of the action before as well, where they lie after both states
        both_A = np.maximum(state_A, np.concatenate([state_A[:1], state_A[:-1]]))
        edges_A = length_A + 1 - state_A - np.maximum(shared_A - both_A, 0)
        shared_flops_A = path_flops(shared_A, size)
        new_A = path_flops(length_A, size) - shared_flops_A + 6.0 * size.output * edges_A
        return cls(actions, shared_A, _sums(length_A - shared_A), shared_flops_A, _sums(new_A))

    def tokens(self, a: int, b: int) -> int:
        return int(self.shared_A[a] + self.token_sum[b] - self.token_sum[a])

    def flops(self, a: int, b: int) -> float:
        if a == b:
            return 0.0
        return float(self.shared_flops_A[a] + self.flops_sum[b] - self.flops_sum[a])

    def reach(self, a: int, token_budget: int, limit: float) -> int:
        """The largest b for which [a, b) stays below the budget and, unless it is a single action, the limit of work."""
        tokens = self.token_sum[a] + token_budget - self.shared_A[a]
        work = self.flops_sum[a] + limit - self.shared_flops_A[a]
        by_tokens = int(np.searchsorted(self.token_sum, tokens, "right")) - 1
        by_work = int(np.searchsorted(self.flops_sum, work, "right")) - 1
        return min(by_tokens, max(by_work, a + 1))

    def stretches(self, work: float, size: ModelSize) -> Iterable[tuple[int, int]]:
        """Actions [a, b) that are worth so much work to whoever gets them, and save whoever gives them as much, the nearest first; those
        that are farther off than nothing at all are left out."""
        end, sums = len(self.actions), self.flops_sum
        by_part = np.searchsorted(sums, sums[:end] + work - self.shared_flops_A)
        by_saved = np.searchsorted(sums, sums[:end] + work)
        b_S = np.concatenate([by_part - 1, by_part, by_saved - 1, by_saved, by_saved + 1])
        a_S = np.tile(np.arange(end), 5)
        fits = (a_S < b_S) & (b_S <= end)
        a_S, b_S = a_S[fits], b_S[fits]
        if not len(a_S):
            return ()
        part_S = self.shared_flops_A[a_S] + sums[b_S] - sums[a_S]
        # what follows must compute again what it shared with the stretch, but not with what lies before it
        shared_A = np.append(self.shared_A, 0)
        least_S = np.minimum.reduceat(np.append(shared_A, 0), np.column_stack([a_S, b_S + 1]).ravel())[::2]
        saved_S = sums[b_S] - sums[a_S] - path_flops(shared_A[b_S], size) + path_flops(least_S, size)
        error_S = np.maximum(np.abs(part_S - work), np.abs(saved_S - work))
        nearest = np.argsort(error_S, kind="stable")
        nearest = nearest[error_S[nearest] < work]
        return dict.fromkeys(zip(a_S[nearest].tolist(), b_S[nearest].tolist(), strict=True))

    def without(self, a: int, b: int, size: ModelSize) -> Walk:
        """Of the actions but for [a, b)."""
        shared = self.shared_A.tolist()
        if a < b < len(self.actions):
            shared[b] = min(shared[a : b + 1])
        return Walk._of(self.actions[:a] + self.actions[b:], shared[:a] + shared[b:], size)

    def greedy(self, token_budget: int, limit: float) -> list[int]:
        """Where the groups end that are filled as far as they go: the fewest possible."""
        if not self.actions:
            return []
        ends = [self.reach(0, token_budget, limit)]
        while ends[-1] < len(self.actions):
            ends.append(self.reach(ends[-1], token_budget, limit))
        return ends

    def cheapest(self, token_budget: int, limit: float) -> list[int]:
        """The cuts 0, …, A with the fewest groups, and of these the fewest repeated tokens: a shortest path over cuts, in which a
        later start reaches at least as far (so the starts that still reach are a window, kept with its minima)."""
        group = 1 << 40  # more than all repeated tokens
        starts: deque[tuple[int, int, int]] = deque()  # (cost, start, reach), costs ascending
        best, previous = [0], [0]
        shared = self.shared_A.tolist()
        for b in range(1, len(self.actions) + 1):
            a = b - 1
            cost = best[a] + group + shared[a]
            while starts and starts[-1][0] > cost:
                starts.pop()
            starts.append((cost, a, self.reach(a, token_budget, limit)))
            while starts[0][2] < b:
                starts.popleft()
            best.append(starts[0][0])
            previous.append(starts[0][1])
        cuts = [len(self.actions)]
        while cuts[-1]:
            cuts.append(previous[cuts[-1]])
        return cuts[::-1]

    def trunks(self, source: Sequence[Trunk], a: int, b: int) -> tuple[Trunk, ...]:
        """Those of `source` with only the actions [a, b)."""
        kept: dict[int, dict[int, list[PlacedAction]]] = {}
        for action in self.actions[a:b]:
            kept.setdefault(action.trunk, {}).setdefault(action.state, []).append(action)
        return tuple(
            Trunk(
                source[number].tokens[: max(states)],
                tuple(
                    SampledState(length, tuple(a.tokens for a in actions), tuple(a.index for a in actions))
                    for length, actions in sorted(states.items())
                ),
            )
            for number, states in kept.items()
        )


def _sums(values: NDArray) -> NDArray:
    return np.concatenate([np.zeros(1, values.dtype), np.cumsum(values)])


def path_flops(length: NDArray[np.int64], size: ModelSize) -> NDArray[np.float64]:
    """Work of the first `length` tokens of a path, without its edges."""

    def visible_pairs(window: int | None) -> NDArray[np.float64]:
        full = length if window is None else np.minimum(length, window)
        return full * (full + 1) / 2 + (length - full) * float(window or 0)

    return flops(size, length.astype(np.float64), np.zeros(len(length)), visible_pairs)
