"""The comb: recorded trajectories as shared trunks, freshly sampled actions as teeth, merged into one prefix tree and packed into
one row.

    trunk   prompt ─┬─ a1 o1 ─┬─ a2 o2 ─┬─ …          computed  <= |trunk| + Σ (|teeth| - 1)
    teeth           ├ ã11     ├ ã21     ├ ã31         effective =  Σ_i Σ_g (|s_i| + |ã_ig|), what separate rows would compute
                    └ ã12     └ ã22     └ ã32

Every action stands for the sequence state + action, and equal beginnings are computed once, whoever owns them: teeth that begin
alike, a tooth that begins as the recorded continuation does, prompts and states that trajectories share. The last token of an
action predicts nothing and is not computed at all. What cannot be shared is a forest; plain packing is a forest of rows.

The packed row is a preorder walk of the tree, the smaller of two subtrees first, so that teeth lie right after the token they
hang on. Token j's subtree is the index range [j, subtree_end[j]), and query i sees key j exactly if j lies on i's path:
`j <= i < subtree_end[j]`. A prediction is an edge (row whose hidden state predicts, target token), and equal edges are computed
once, too. The trunk "a b c" with the actions "x y", "x z" and "b c" after its first token and "d" after its last (rows are
queries, columns keys):

    index         0  1  2  3              a x b c        action   x  y   x  z   b  c   d
    token         a  x  b  c          a   1 . . .        row      0  1   0  1   0  2   3
    depth         0  1  1  2          x   1 1 . .        edge     1  2   1  3   0  4   5
    subtree_end   4  2  4  4          b   1 . 1 .
                                      c   1 . 1 1

`depth` is the position id. Losses and gradients equal those of separate rows (tests/comb/test_packing.py).

Legend: T packed tokens, A actions, N predicted tokens (those of all actions, one after another), E edges.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from swirl_fast.comb.flops import ModelSize, flops
from swirl_fast.prefixes import common_prefix

Ints = NDArray[np.int32]


@dataclass(frozen=True)
class SampledState:
    """The state `tokens[:length]` of a trunk and the actions drawn there.

    indices: the caller's number of each action, unique over a whole batch; results come back in the order of these.
    """

    length: int
    actions: tuple[Ints, ...]
    indices: tuple[int, ...]


@dataclass(frozen=True)
class Trunk:
    """One trajectory's tokens (ids, int32) and the states on it, lengths in [1, len(tokens)]."""

    tokens: Ints
    states: tuple[SampledState, ...]

    def renumbered(self, number: Mapping[int, int] | Sequence[int]) -> Trunk:
        """The same with number[i] in the place of every action's number i."""
        moved = (replace(state, indices=tuple(number[index] for index in state.indices)) for state in self.states)
        return replace(self, states=tuple(moved))


@dataclass(frozen=True)
class Comb:
    """One packed row, all arrays int32.

    tokens_T, depth_T, subtree_end_T: the preorder walk. rows_E: index into T of the token whose hidden state predicts, ascending;
    targets_E: the predicted token; no pair twice. offsets [A + 1]: action a owns edge_N[offsets[a]:offsets[a + 1]], the edges of its
    tokens in order (none for an action without tokens). indices_A: the caller's number of each action, ascending. effective_tokens:
    what one row per action would compute.
    """

    tokens_T: Ints
    depth_T: Ints
    subtree_end_T: Ints
    rows_E: Ints
    targets_E: Ints
    edge_N: Ints
    offsets: Ints
    indices_A: Ints
    effective_tokens: int

    @property
    def computed_tokens(self) -> int:
        return len(self.tokens_T)

    def row_ends(self) -> Ints | None:
        """[R + 1] int32, where the rows of a comb without branches end, after a 0; None where something branches."""
        roots = np.flatnonzero(self.depth_T == 0)
        ends = np.append(roots, len(self.depth_T))
        straight = np.diff(self.depth_T)[self.depth_T[1:] > 0] == 1
        return ends.astype(np.int32) if straight.all() else None

    def visible_pairs(self, window: int | None = None) -> int:
        """Pairs of query and key that attention computes: Σ (depth + 1), at most `window` a query."""
        seen_T = self.depth_T.astype(np.int64) + 1
        return int(seen_T.sum() if window is None else np.minimum(seen_T, window).sum())

    def flops(self, size: ModelSize) -> float:
        return flops(
            size, float(self.computed_tokens), float(len(self.rows_E)), lambda window: float(self.visible_pairs(window))
        )


def pack(trunks: Sequence[Trunk]) -> Comb:
    """Merges the trunks into one prefix tree and walks it in preorder. One Python step an action and a stretch of the tree, numpy
    for tokens.

    The result does not depend on the order of `trunks`, nor on which of them brings a token. Raises ValueError for a state
    outside its trunk and for a number that two actions carry.
    """
    root, actions = grown_tree(trunks)
    walk = preorder(root)
    lengths = np.array([len(node.tokens) for node in walk])
    starts = np.array([node.start for node in walk])
    actions.sort(key=lambda action: action.index)
    runs = np.array([run for action in actions for run in action.rows()], np.int64).reshape(-1, 2)
    rows_N = _runs(runs[:, 0], runs[:, 1])
    targets_N = _joined([action.tokens for action in actions])
    # one number a pair: sorting these is faster than sorting rows of two columns
    edges, edge_N = np.unique(rows_N << 32 | targets_N.astype(np.int64), return_inverse=True)
    return Comb(
        tokens_T=_joined([node.tokens for node in walk]),
        depth_T=_runs(np.array([node.depth for node in walk]), lengths).astype(np.int32),
        subtree_end_T=np.repeat(starts + [node.size for node in walk], lengths).astype(np.int32),
        rows_E=(edges >> 32).astype(np.int32),
        targets_E=(edges & 0xFFFFFFFF).astype(np.int32),
        edge_N=edge_N.astype(np.int32),
        offsets=np.cumsum([0, *(len(action.tokens) for action in actions)]).astype(np.int32),
        indices_A=np.array([action.index for action in actions], np.int32),
        effective_tokens=sum(action.state + len(action.tokens) for action in actions if len(action.tokens)),
    )


class TreeNode:
    """A stretch of the tree without a branch. depth: tokens before it on its path; start, size: where its subtree lies in the walk."""

    __slots__ = ("tokens", "depth", "parent", "children", "start", "size")

    def __init__(self, tokens: Ints, depth: int, parent: TreeNode | None) -> None:
        self.tokens, self.depth, self.parent = tokens, depth, parent
        self.children: dict[int, TreeNode] = {}
        self.start = self.size = 0

    def holding(self, depth: int) -> TreeNode:
        """The node on this one's path that holds the token at `depth`, which lies at most at this node's end."""
        node = self
        while node.depth > depth:
            assert node.parent is not None, "the root has depth 0"
            node = node.parent
        return node


@dataclass(eq=False)
class PlacedAction:
    """tokens: after a state of `state` tokens. trunk: the number of the one it came from. node: the action ends in it or above it."""

    index: int
    tokens: Ints
    state: int
    trunk: int
    node: TreeNode

    @property
    def length(self) -> int:
        """Computed tokens of the whole path; 0 when nothing is predicted."""
        return self.state + len(self.tokens) - 1 if len(self.tokens) else 0

    def rows(self) -> list[tuple[int, int]]:
        """The packed indices that predict its tokens, as (first, count) in order, once the tree has been walked."""
        low, high = self.state - 1, self.length
        runs = []
        node = self.node
        while low < high:
            node = node.holding(high - 1)
            first = max(low, node.depth)
            runs.append((node.start + first - node.depth, high - first))
            high = first
        return runs[::-1]


def grown_tree(trunks: Sequence[Trunk]) -> tuple[TreeNode, list[PlacedAction]]:
    """The tree of all that must be computed, whose shape is the same in whatever order it grew, and the actions in it."""
    root = TreeNode(np.zeros(0, np.int32), 0, None)
    actions = []
    seen: set[int] = set()
    for number, trunk in enumerate(trunks):
        whole = np.asarray(trunk.tokens, np.int32)
        for state in trunk.states:
            if not 1 <= state.length <= len(whole):
                raise ValueError(f"a state of {state.length} tokens does not lie on its trunk of {len(whole)} tokens")
        used = [state for state in trunk.states if any(map(len, state.actions))]
        end = _grow(root, 0, whole[: max((state.length for state in used), default=0)])
        for state in trunk.states:
            for index, tokens in zip(state.indices, state.actions, strict=True):
                if index in seen:
                    raise ValueError(f"two actions carry the number {index}")
                seen.add(index)
                tokens = np.asarray(tokens, np.int32)
                node = root
                if len(tokens):
                    node = _grow(end.holding(state.length - 1), state.length, tokens[:-1])
                actions.append(PlacedAction(index, tokens, state.length, number, node))
    return root, actions


def _grow(node: TreeNode, at: int, tokens: Ints) -> TreeNode:
    """Adds `tokens` after the first `at` tokens of the path that ends in `node`. Returns the node that holds the last of them."""
    while True:
        rest = node.tokens[at - node.depth :]
        same = common_prefix(rest, tokens)
        at, tokens = at + same, tokens[same:]
        if not len(tokens):
            return node
        if same < len(rest):
            node = _split(node, at)
        child = node.children.get(int(tokens[0]))
        if child is None:
            child = node.children[int(tokens[0])] = TreeNode(tokens, at, node)
            return child
        node = child


def _split(node: TreeNode, at: int) -> TreeNode:
    """A new node for what `node` holds before depth `at`; `node` keeps the rest and its children, so that whoever remembers it finds
    every token of its path there or above."""
    parent = node.parent
    assert parent is not None, "the root holds no tokens"
    upper = TreeNode(node.tokens[: at - node.depth], node.depth, parent)
    parent.children[int(upper.tokens[0])] = upper
    node.tokens, node.depth, node.parent = node.tokens[at - node.depth :], at, upper
    upper.children[int(node.tokens[0])] = node
    return upper


def preorder(root: TreeNode) -> list[TreeNode]:
    """All nodes in the order of the walk, their `start` and `size` set."""
    nodes = [root]
    for node in nodes:
        nodes.extend(node.children.values())
    for node in reversed(nodes):  # children come after their parents
        node.size = len(node.tokens) + sum(child.size for child in node.children.values())
    walk: list[TreeNode] = []
    at = 0
    stack = [root]
    while stack:
        node = stack.pop()
        walk.append(node)
        node.start = at
        at += len(node.tokens)
        stack.extend(sorted(node.children.values(), key=lambda child: (child.size, int(child.tokens[0])), reverse=True))
    return walk


def _runs(firsts: NDArray[np.int64], counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """first, first + 1, … count numbers of each run, one run after the other."""
    ends = np.cumsum(counts)
    return np.arange(ends[-1] if len(ends) else 0) + np.repeat(firsts - ends + counts, counts)


def _joined(parts: Sequence[Ints]) -> Ints:
    return np.concatenate([np.zeros(0, np.int32), *parts])
