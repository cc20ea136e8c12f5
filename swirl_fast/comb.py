"""The comb: recorded trajectories as shared trunks, freshly sampled actions as teeth, merged into one prefix tree and packed into
one row.

    trunk   prompt ─┬─ a1 o1 ─┬─ a2 o2 ─┬─ …          computed  <= |trunk| + Σ (|teeth| - 1)
    teeth           ├ ã11     ├ ã21     ├ ã31         effective =  Σ_i Σ_g (|s_i| + |ã_ig|), what separate rows would compute
                    └ ã12     └ ã22     └ ã32

Every action stands for the sequence state + action, and equal beginnings are computed once, whoever owns them: teeth that begin
alike, a tooth that begins as the recorded continuation does, prompts and states that trajectories share. The last token of an
action predicts nothing and is not computed at all. What cannot be shared is a forest; plain packing is a forest of rows.

The packed row is a preorder walk of the tree, the smaller of two subtrees first, so that teeth lie right behind the token they
hang on. Token j's subtree is the index range [j, subtree_end[j]), and query i sees key j exactly if j lies on i's path:
`j <= i < subtree_end[j]`. A prediction is an edge (row whose hidden state predicts, target token), and equal edges are computed
once, too. The trunk "a b c" with the actions "x y", "x z" and "b c" behind its first token and "d" behind its last (rows are
queries, columns keys):

    index         0  1  2  3              a x b c        action   x  y   x  z   b  c   d
    token         a  x  b  c          a   1 . . .        row      0  1   0  1   0  2   3
    depth         0  1  1  2          x   1 1 . .        edge     1  2   1  3   0  4   5
    subtree_end   4  2  4  4          b   1 . 1 .
                                      c   1 . 1 1

`depth` is the position id. Losses and gradients equal those of separate rows (tests/test_packing.py).

Legend: T packed tokens, A actions, N predicted tokens (those of all actions, one after another), E edges.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int32]
Number = TypeVar("Number", float, NDArray)


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

    def renumbered(self, offset: int) -> Branch:
        """The same with `offset` added to every action's number."""
        moved = (replace(state, indices=tuple(index + offset for index in state.indices)) for state in self.states)
        return replace(self, states=tuple(moved))


@dataclass(frozen=True)
class ModelSize:
    """What an estimate of work needs to know of a model.

    linear: weights that one token is multiplied with: all matrices but the embedding table and the output layer.
    attention: one entry a layer: (query heads * head size, sliding window or None). output: hidden size * vocabulary.
    """

    linear: float
    attention: tuple[tuple[int, int | None], ...] = ()
    output: int = 0


ONLY_TOKENS = ModelSize(linear=1.0)  # work is the number of tokens


def flops(size: ModelSize, tokens: Number, edges: Number, visible_pairs: Callable[[int | None], Number]) -> Number:
    """Floating-point operations of one forward and backward, multiplications and additions counted apart:

        6 linear tokens + Σ_layers 12 width visible_pairs(window) + 6 output edges

    (2 forward and 4 backward a weight; attention has two products, each of 2 width a pair). Nothing is counted for what a kernel or
    activation checkpointing computes again, norms, or softmax. Numbers or numpy arrays of them.
    """
    total = 6.0 * size.linear * tokens + 6.0 * size.output * edges
    windows = dict.fromkeys(
        window for _, window in size.attention
    )  # a set's order, and with it the rounding, changes by process
    for window in windows:
        width = sum(width for width, of_layer in size.attention if of_layer == window)
        total = total + 12.0 * width * visible_pairs(window)
    return total


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


def common_prefix(a: NDArray[np.integer], b: NDArray[np.integer]) -> int:
    """Number of leading tokens that two sequences share."""
    n = min(len(a), len(b))
    different = np.flatnonzero(a[:n] != b[:n])
    return int(different[0]) if len(different) else n


def pack(branches: Sequence[Branch]) -> Comb:
    """Merges the branches into one prefix tree and walks it in preorder. One Python step an action and a stretch of the tree, numpy
    for tokens.

    The result does not depend on the order of `branches`, nor on which of them brings a token. Raises ValueError for a state
    outside its trunk and for a number that two actions carry.
    """
    root, actions = _grown(branches)
    walk = _preorder(root)
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


class _Node:
    """A stretch of the tree without a branch. depth: tokens before it on its path; start, size: where its subtree lies in the walk."""

    __slots__ = ("tokens", "depth", "parent", "children", "start", "size")

    def __init__(self, tokens: Ints, depth: int, parent: _Node | None) -> None:
        self.tokens, self.depth, self.parent = tokens, depth, parent
        self.children: dict[int, _Node] = {}
        self.start = self.size = 0

    def holding(self, depth: int) -> _Node:
        """The node on this one's path that holds the token at `depth`, which lies at most at this node's end."""
        node = self
        while node.depth > depth:
            assert node.parent is not None, "the root has depth 0"
            node = node.parent
        return node


@dataclass(eq=False)
class _Action:
    """tokens behind a state of `state` tokens; node: ends at or above it. branch: where it came from."""

    index: int
    tokens: Ints
    state: int
    branch: int
    node: _Node

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


def _grown(branches: Sequence[Branch]) -> tuple[_Node, list[_Action]]:
    """The tree of all that must be computed, whose shape is the same in whatever order it grew, and the actions in it."""
    root = _Node(np.zeros(0, np.int32), 0, None)
    actions = []
    seen: set[int] = set()
    for number, branch in enumerate(branches):
        trunk = np.asarray(branch.trunk, np.int32)
        for state in branch.states:
            if not 1 <= state.length <= len(trunk):
                raise ValueError(f"a state of {state.length} tokens does not lie on its trunk of {len(trunk)} tokens")
        used = [state for state in branch.states if any(map(len, state.actions))]
        end = _grow(root, 0, trunk[: max((state.length for state in used), default=0)])
        for state in branch.states:
            for index, tokens in zip(state.indices, state.actions, strict=True):
                if index in seen:
                    raise ValueError(f"two actions carry the number {index}")
                seen.add(index)
                tokens = np.asarray(tokens, np.int32)
                node = root
                if len(tokens):
                    node = _grow(end.holding(state.length - 1), state.length, tokens[:-1])
                actions.append(_Action(index, tokens, state.length, number, node))
    return root, actions


def _grow(node: _Node, at: int, tokens: Ints) -> _Node:
    """Adds `tokens` behind the first `at` tokens of the path that ends in `node`. Returns the node that holds the last of them."""
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
            child = node.children[int(tokens[0])] = _Node(tokens, at, node)
            return child
        node = child


def _split(node: _Node, at: int) -> _Node:
    """A new node for what `node` holds before depth `at`; `node` keeps the rest and its children, so that whoever remembers it finds
    every token of its path there or above."""
    parent = node.parent
    assert parent is not None, "the root holds no tokens"
    upper = _Node(node.tokens[: at - node.depth], node.depth, parent)
    parent.children[int(upper.tokens[0])] = upper
    node.tokens, node.depth, node.parent = node.tokens[at - node.depth :], at, upper
    upper.children[int(node.tokens[0])] = node
    return upper


def _preorder(root: _Node) -> list[_Node]:
    """All nodes in the order of the walk, their `start` and `size` set."""
    nodes = [root]
    for node in nodes:
        nodes.extend(node.children.values())
    for node in reversed(nodes):  # children stand behind their parents
        node.size = len(node.tokens) + sum(child.size for child in node.children.values())
    walk: list[_Node] = []
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
    """first, first + 1, … count numbers of each run, one run behind the other."""
    behind = np.cumsum(counts)
    return np.arange(behind[-1] if len(behind) else 0) + np.repeat(firsts - behind + counts, counts)


def _joined(parts: Sequence[Ints]) -> Ints:
    return np.concatenate([np.zeros(0, np.int32), *parts])


@dataclass(frozen=True)
class Group:
    """Branches for one micro-batch. tokens: what `pack` makes of them, exactly. flops: an estimate, in which only neighbouring actions
    share edges."""

    branches: tuple[Branch, ...]
    tokens: int
    flops: float


def micro_batches(
    branches: Sequence[Branch],
    token_budget: int,
    max_path: int | None = None,
    ranks: int = 1,
    size: ModelSize = ONLY_TOKENS,
) -> list[Group]:
    """Splits the actions into groups whose combs have at most `token_budget` tokens; an action without tokens is left out.

    The actions stand in the order of the walk through the whole tree, along the trunk and with the teeth of a state together; a cut
    before an action repeats the path that it shares with the one before. Of all ways to cut into the fewest groups the one that
    repeats least is taken. For several ranks the number of groups may grow to the next multiple of `ranks`, which then is used to
    make the largest group's estimated work small. Depends neither on the order of `branches` nor on chance.

    max_path: longest state with its action, in tokens; None: no limit. Raises ValueError when one is longer, or does not fit into a
    group of its own.
    """
    walk = _Walk.of(branches, size)
    for action in walk.actions:
        path = action.state + len(action.tokens)
        if path - 1 > token_budget or (max_path is not None and path > max_path):
            what = f"a state of {action.state} tokens with an action of {len(action.tokens)} exceeds training."
            if path - 1 > token_budget:
                raise ValueError(f"{what}token_budget={token_budget}; set it to at least {path - 1}")
            raise ValueError(
                f"{what}max_path_tokens={max_path} (where that is 0, the model's context); set it to at least {path}"
            )
    if not walk.actions:
        return []
    limit = float("inf")
    if ranks > 1:
        wanted = -(-len(walk.greedy(token_budget, limit)) // ranks) * ranks
        limit = walk.flops(0, len(walk.actions))
        low = 0.0
        for _ in range(24):  # to 1e-7 of the total work
            middle = (low + limit) / 2
            if len(walk.greedy(token_budget, middle)) <= wanted:
                limit = middle
            else:
                low = middle
    cuts = walk.cheapest(token_budget, limit)
    return [
        Group(walk.branches(branches, a, b), walk.tokens(a, b), walk.flops(a, b))
        for a, b in zip(cuts, cuts[1:], strict=False)
    ]


@dataclass(frozen=True)
class _Walk:
    """The actions that predict something, in the order of the walk through their tree.

    shared_A: computed tokens each has in common with the one before it; a stretch of actions [a, b) therefore computes
    `shared_A[a] + token_sum[b] - token_sum[a]` tokens, and the same holds for work.
    """

    actions: list[_Action]
    shared_A: NDArray[np.int64]
    token_sum: NDArray[np.int64]
    shared_flops_A: NDArray[np.float64]
    flops_sum: NDArray[np.float64]

    @classmethod
    def of(cls, branches: Sequence[Branch], size: ModelSize) -> _Walk:
        root, grown = _grown(branches)
        ending: dict[_Node, list[_Action]] = {}
        for action in grown:
            if len(action.tokens):
                ending.setdefault(action.node.holding(action.length - 1), []).append(action)
        actions: list[_Action] = []
        shared = []
        low = before = 0  # low: the least depth at which the walk has branched off since the action before
        for node in _preorder(root):
            low = min(low, node.depth)
            for action in sorted(ending.get(node, ()), key=lambda action: (action.length, action.index)):
                actions.append(action)
                shared.append(min(low, before))
                low = before = action.length
        length_A = np.array([action.length for action in actions], np.int64)
        shared_A = np.array(shared, np.int64)
        state_A = np.array([action.state for action in actions], np.int64)
        # targets among the shared tokens are edges of the action before as well, where they lie behind both states
        both_A = np.maximum(state_A, np.concatenate([state_A[:1], state_A[:-1]]))
        edges_A = length_A + 1 - state_A - np.maximum(shared_A - both_A, 0)
        shared_flops_A = _path_flops(shared_A, size)
        new_A = _path_flops(length_A, size) - shared_flops_A + 6.0 * size.output * edges_A
        return cls(actions, shared_A, _sums(length_A - shared_A), shared_flops_A, _sums(new_A))

    def tokens(self, a: int, b: int) -> int:
        return int(self.shared_A[a] + self.token_sum[b] - self.token_sum[a])

    def flops(self, a: int, b: int) -> float:
        return float(self.shared_flops_A[a] + self.flops_sum[b] - self.flops_sum[a])

    def reach(self, a: int, token_budget: int, limit: float) -> int:
        """The largest b for which [a, b) stays below the budget and, unless it is a single action, the limit of work."""
        tokens = self.token_sum[a] + token_budget - self.shared_A[a]
        work = self.flops_sum[a] + limit - self.shared_flops_A[a]
        by_tokens = int(np.searchsorted(self.token_sum, tokens, "right")) - 1
        by_work = int(np.searchsorted(self.flops_sum, work, "right")) - 1
        return min(by_tokens, max(by_work, a + 1))

    def greedy(self, token_budget: int, limit: float) -> list[int]:
        """Where the groups end that are filled as far as they go: the fewest possible."""
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

    def branches(self, source: Sequence[Branch], a: int, b: int) -> tuple[Branch, ...]:
        """Those of `source` with the actions [a, b) alone."""
        kept: dict[int, dict[int, list[_Action]]] = {}
        for action in self.actions[a:b]:
            kept.setdefault(action.branch, {}).setdefault(action.state, []).append(action)
        return tuple(
            Branch(
                source[number].trunk,
                tuple(
                    SampledState(length, tuple(one.tokens for one in here), tuple(one.index for one in here))
                    for length, here in sorted(states.items())
                ),
            )
            for number, states in kept.items()
        )


def _sums(values: NDArray) -> NDArray:
    return np.concatenate([np.zeros(1, values.dtype), np.cumsum(values)])


def _path_flops(length: NDArray[np.int64], size: ModelSize) -> NDArray[np.float64]:
    """Work of the first `length` tokens of a path, without its edges."""

    def visible_pairs(window: int | None) -> NDArray[np.float64]:
        full = length if window is None else np.minimum(length, window)
        return full * (full + 1) / 2 + (length - full) * float(window or 0)

    return flops(size, length.astype(np.float64), np.zeros(len(length)), visible_pairs)


def balance(costs: Sequence[float], ranks: int) -> list[list[int]]:
    """Deals jobs to ranks so that all have equally many, up to one, and sums and rounds are alike; deterministic.

    The k-th jobs of all ranks run at the same time (their collectives wait for each other). So the costliest `ranks` jobs make the
    first round, the next the second, and so on; in each round the costliest job goes to the rank that has least so far.
    """
    order = sorted(range(len(costs)), key=lambda job: (-costs[job], job))
    jobs: list[list[int]] = [[] for _ in range(ranks)]
    load = [0.0] * ranks
    for first in range(0, len(order), ranks):
        by_load = sorted(range(ranks), key=lambda rank: (load[rank], rank))
        for rank, job in zip(by_load, order[first : first + ranks], strict=False):
            jobs[rank].append(job)
            load[rank] += costs[job]
    return jobs
