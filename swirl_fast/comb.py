"""The comb: recorded trajectories as shared trunks, freshly sampled actions as teeth, packed in preorder into one row.

    trunk   prompt ─┬─ a1 o1 ─┬─ a2 o2 ─┬─ …          computed  = |trunk| + Σ |teeth|
    teeth           ├ ã11     ├ ã21     ├ ã31         effective = Σ_i Σ_g (|s_i| + |ã_ig|), what separate rows would compute
                    └ ã12     └ ã22     └ ã32

The packed row is a preorder walk of the prefix tree, each tooth directly behind the token it hangs on. Token j's subtree is the
index range [j, subtree_end[j]), and query i sees key j exactly if j lies on i's path: `j <= i < subtree_end[j]`. Two teeth "x y"
and "z" behind the first token of the trunk "a b" (rows are queries, columns keys):

    index         0  1  2  3  4              a x y z b
    token         a  x  y  z  b          a   1 . . . .
    depth         0  1  2  1  1          x   1 1 . . .
    subtree_end   5  3  3  4  5          y   1 1 1 . .
                                         z   1 . . 1 .
                                         b   1 . . . 1

Trajectories with common prefixes (the worked examples of a prompt, several trajectories of one question) are branches of one
tree; those without are a forest; both are the same mask. `depth` is the position id. Losses and gradients equal those of
separate rows (tests/test_comb.py).

Legend: T packed tokens, N predicted tokens (all in teeth), A actions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int32]


@dataclass(frozen=True)
class SampledState:
    """The state `trunk[:length]` and the actions drawn there.

    indices: the caller's number of each action, unique over a whole batch; results come back in the order of these.
    """

    length: int
    actions: tuple[Ints, ...]
    indices: tuple[int, ...]


@dataclass(frozen=True)
class Branch:
    """One trajectory's trunk (token ids, int32) and its states, lengths in [1, len(trunk)]."""

    trunk: Ints
    states: tuple[SampledState, ...]

    def trimmed(self) -> Branch:
        """Without states that have no action, and without the tokens behind the last state: nothing sees or predicts them."""
        states = tuple(state for state in self.states if state.actions)
        return Branch(self.trunk[: max((state.length for state in states), default=0)], states)


@dataclass(frozen=True)
class Comb:
    """One packed row, all arrays int32.

    tokens_T, depth_T, subtree_end_T: the preorder walk. rows_N: index into T of the token whose hidden state predicts; targets_N:
    the predicted token. offsets: [A + 1] start of each action in rows_N (an empty action has length 0). indices_A: the caller's
    number of each action. effective_tokens: what one row per action would compute.
    """

    tokens_T: Ints
    depth_T: Ints
    subtree_end_T: Ints
    rows_N: Ints
    targets_N: Ints
    offsets: Ints
    indices_A: Ints
    effective_tokens: int

    @property
    def computed_tokens(self) -> int:
        return len(self.tokens_T)


def common_prefix(a: NDArray[np.integer], b: NDArray[np.integer]) -> int:
    """Number of leading tokens that two sequences share."""
    n = min(len(a), len(b))
    different = np.flatnonzero(a[:n] != b[:n])
    return int(different[0]) if len(different) else n


def pack(branches: Sequence[Branch]) -> Comb:
    """Merges the branches into one prefix tree and walks it in preorder. O(T) numpy work, a Python loop over spans only.

    The result does not depend on the order of `branches`. Raises ValueError for a state outside its trunk.
    """
    branches = _in_order([branch.trimmed() for branch in branches])
    if not branches:
        empty = np.zeros(0, np.int32)
        return Comb(empty, empty, empty, empty, empty, np.zeros(1, np.int32), empty, 0)
    trunks = [branch.trunk for branch in branches]
    shared = [0, *(common_prefix(a, b) for a, b in zip(trunks, trunks[1:], strict=False))]

    # teeth_at[k][p]: actions behind the first p tokens of trunk k, kept with the first trunk that emits token p - 1
    teeth_at: list[dict[int, list[tuple[int, Ints]]]] = [{} for _ in branches]
    owners: list[tuple[int, int]] = []  # (first depth, trunk) of the pieces of the current path
    for k, branch in enumerate(branches):
        owners = [piece for piece in owners if piece[0] < shared[k]]
        if shared[k] < len(trunks[k]):
            owners.append((shared[k], k))
        for state in branch.states:
            if not 1 <= state.length <= len(branch.trunk):
                raise ValueError(
                    f"a state of {state.length} tokens does not lie on its trunk of {len(branch.trunk)} tokens"
                )
            owner = next(trunk for first, trunk in reversed(owners) if first < state.length)
            teeth_at[owner].setdefault(state.length, []).extend(zip(state.indices, state.actions, strict=True))

    tokens: list[Ints] = []
    depth: list[Ints] = []
    ends: list[Ints] = []
    trunk_pieces: list[
        tuple[int, int, int, int]
    ] = []  # (position in the lists above, trunk, first depth, last depth + 1)
    begins: list[int] = []  # packed index at which each trunk starts
    rows: dict[int, Ints] = {}
    targets: dict[int, Ints] = {}
    effective = at = 0
    for k, trunk in enumerate(trunks):
        begins.append(at)
        first = shared[k]
        for cut in sorted({*teeth_at[k], len(trunk)}):
            if cut > first:
                trunk_pieces.append((len(tokens), k, first, cut))
                tokens.append(trunk[first:cut])
                depth.append(np.arange(first, cut, dtype=np.int32))
                ends.append(np.zeros(cut - first, np.int32))
                at += cut - first
            parent = at - 1
            for index, action in teeth_at[k].get(cut, []):
                if index in rows:
                    raise ValueError(f"two actions carry the number {index}")
                n = len(action)
                effective += cut + n
                # row of the first token is the trunk token it hangs on; a tooth's last token predicts nothing
                rows[index] = np.concatenate([[parent], np.arange(at, at + n - 1)]).astype(np.int32)[:n]
                targets[index] = action.astype(np.int32)
                tokens.append(action)
                depth.append(np.arange(cut, cut + n, dtype=np.int32))
                ends.append(np.full(n, at + n, np.int32))
                at += n
            first = max(first, cut)
    begins.append(at)
    for where, k, first, last in trunk_pieces:
        # a token at depth d lives until the first later trunk that shares no more than d tokens with the path before it
        open_until = last
        for later in range(k + 1, len(trunks) + 1):
            keep = shared[later] if later < len(trunks) else 0
            if keep < open_until:
                ends[where][max(keep, first) - first : open_until - first] = begins[later]
                open_until = max(keep, first)
            if open_until <= first:
                break
    order = sorted(rows)
    return Comb(
        tokens_T=np.concatenate(tokens).astype(np.int32),
        depth_T=np.concatenate(depth),
        subtree_end_T=np.concatenate(ends),
        rows_N=np.concatenate([rows[i] for i in order]),
        targets_N=np.concatenate([targets[i] for i in order]),
        offsets=np.cumsum([0, *(len(rows[i]) for i in order)]).astype(np.int32),
        indices_A=np.asarray(order, np.int32),
        effective_tokens=effective,
    )


def micro_batches(branches: Sequence[Branch], token_budget: int) -> list[list[Branch]]:
    """Splits branches into groups whose combs have at most `token_budget` tokens each; the order is deterministic.

    Neighbours in token order share most and go together. A trajectory that is too large alone is split between its actions, with
    the needed part of the trunk in each part. Raises ValueError when one trunk with one action does not fit.
    """
    groups: list[list[Branch]] = []
    used = 0
    pieces = [piece for branch in branches for piece in _split(branch.trimmed(), token_budget)]
    for branch in _in_order(pieces):
        teeth = sum(len(action) for state in branch.states for action in state.actions)
        size = len(branch.trunk) + teeth
        if groups:
            size_here = size - common_prefix(groups[-1][-1].trunk, branch.trunk)
            if used + size_here <= token_budget:
                groups[-1].append(branch)
                used += size_here
                continue
        groups.append([branch])
        used = size
    return groups


def _in_order(branches: Sequence[Branch]) -> list[Branch]:
    """Those with actions, by token order of the trunks, so that common prefixes are neighbours; ties by the first action's number."""
    return sorted(
        (branch for branch in branches if branch.states),
        key=lambda branch: (branch.trunk.tolist(), branch.states[0].indices),
    )


def _split(branch: Branch, token_budget: int) -> list[Branch]:
    total = len(branch.trunk) + sum(len(action) for state in branch.states for action in state.actions)
    if total <= token_budget:
        return [branch]
    parts: list[list[SampledState]] = [[]]
    used = 0
    for state in sorted(branch.states, key=lambda state: state.length):
        for action, index in zip(state.actions, state.indices, strict=True):
            if state.length + len(action) > token_budget:
                raise ValueError(
                    f"a state of {state.length} tokens with an action of {len(action)} exceeds training.token_budget={token_budget}; "
                    f"set it to at least {state.length + len(action)}"
                )
            trunk_before = parts[-1][-1].length if parts[-1] else 0
            if used + max(state.length, trunk_before) - trunk_before + len(action) > token_budget:
                parts.append([])
                used = trunk_before = 0
            used += max(state.length, trunk_before) - trunk_before + len(action)
            parts[-1].append(SampledState(state.length, (action,), (index,)))
    return [Branch(branch.trunk, tuple(part)).trimmed() for part in parts]
