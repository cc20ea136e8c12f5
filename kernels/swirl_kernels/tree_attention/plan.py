"""The structure of a packed tree, derived once per packing and shared by all layers.

Legend: T packed tokens (keys), Q queries, B blocks of one batched call, L tokens of a block.

A segment is a maximal run of equal `subtree_end`: a stretch of the tree without a branch. Two kinds of calls cover
every visible pair exactly once, and none of them needs a mask unless a window cuts into it:

    own     the queries of a segment against the keys of the same segment: plain causal attention; segments of like
            length (the teeth of a comb) are padded to one length and go as one batch
    below   the keys of a segment against the queries of everything below it: no mask at all, since all of them see
            all of it, and in preorder they are one contiguous slice

    preorder index    0 1 2 3 4 5 6 7 8 9            0 1 2 ─┬─ 3 4 ─┬─ 5 6
    subtree_end      10 . . 9 . 7 . 9 . 10                  │       └─ 7 8
    own               [0 3) [3 5) [5 7) [7 9) [9 10)        └─ 9
    below             keys [0 3) x queries [3 10);  keys [3 5) x queries [5 9)
"""

from __future__ import annotations

import itertools
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from numbers import Integral
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

PIECE = 1024  # longest segment in one call; cutting longer ones gives a CPU's threads more (head, block) pairs to share
ALONE = 512  # segments this long gain nothing from a batch
MASK_ELEMENTS = 1 << 22  # largest mask of one call


@dataclass(frozen=True)
class Rows:
    """Rows of a [heads, N, …] tensor laid out as [heads, blocks, length, …], short blocks padded with zeros.

    index: the real rows, in order. slots: where each of them lies in the flattened [blocks * length] grid; None without
    padding.
    """

    index: slice | Tensor
    blocks: int
    length: int
    slots: Tensor | None = None

    def take(self, x: Tensor) -> Tensor:
        rows = x[:, self.index] if isinstance(self.index, slice) else _select(x, self.index)
        if self.slots is not None:
            grid = rows.new_zeros(x.shape[0], self.blocks * self.length, *x.shape[2:])
            rows = grid.index_copy_(1, self.slots, rows)
        return rows.unflatten(1, (self.blocks, self.length))

    def drop_padding(self, grid: Tensor) -> Tensor:
        """The inverse of the layout: [heads, blocks, length, …] to [heads, real rows, …]."""
        rows = grid.flatten(1, 2)
        return rows if self.slots is None else _select(rows, self.slots)


def _select(x: Tensor, index: Tensor) -> Tensor:
    """x[:, index]. On token-major memory index_select along the heads' side would copy all of x first (4x slower)."""
    if x.stride(1) > x.stride(0):
        return x.transpose(0, 1).index_select(0, index).transpose(0, 1)
    return x.index_select(1, index)


@dataclass(frozen=True)
class Part:
    """One attention call. causal: query and key blocks are the same tokens. masked: positions and depths decide."""

    queries: Rows
    keys: Rows
    causal: bool = False
    masked: bool = False


@dataclass(frozen=True)
class TreePlan:
    """What `tree_plan` found out. Opaque to callers; everything but the sizes lies on `subtree_end`'s device.

    Each backend derives what it needs from these tensors when it first asks: the parts here, Triton's tiles in
    tree_blocks.py (kept in `derived`).
    """

    num_keys: int
    num_queries: int
    window: int | None
    chunk: int | None
    # False when no two tokens are `window` apart in depth, or in two chunks, so that nothing is hidden
    window_cuts: bool
    subtree_end: Tensor  # int64 [T]
    depth: Tensor  # int64 [T]
    origin: Tensor  # int64 [T] a query i sees a key j only when origin[i] - depth[j] < span
    position: Tensor  # int64 [Q] preorder index of every query, ascending
    order: Tensor | None  # int64 [Q] puts the caller's queries into ascending order; None when they are
    sparse: bool  # whether a query_index was given; False: every token is a query
    derived: dict[Any, Any] = field(default_factory=dict, repr=False, compare=False)
    handle: Tensor | None = field(default=None, repr=False, compare=False)  # what operators are given: `plan_of`

    @property
    def span(self) -> int | None:
        """None: every depth is seen."""
        return self.window if self.chunk is None else 1

    @property
    def own(self) -> tuple[Part, ...]:
        """Together they hold every query exactly once."""
        return self._parts[0]

    @property
    def below(self) -> tuple[Part, ...]:
        return self._parts[1]

    @cached_property
    def _parts(self) -> tuple[tuple[Part, ...], tuple[Part, ...]]:
        """One copy to the host and one Python step per segment (1 to 2 ms for a comb of 8k tokens and 100 teeth)."""
        end, depth, origin, position = (x.cpu() for x in (self.subtree_end, self.depth, self.origin, self.position))
        longest = self.window if self.chunk is None else self.chunk
        builder = _Builder(end, depth, origin, position, self.span, longest, self.depth.device)
        own, below = builder.parts(_segments(end))
        return tuple(own), tuple(below)

    def visible(self, part: Part) -> Tensor:
        """The mask of a masked part, [B, Lq, Lk], True = visible; padding sees nothing and is seen by nothing."""
        q = part.queries.take(self.position[None] + 1)[0] - 1
        k = part.keys.take(torch.arange(1, self.num_keys + 1, device=self.depth.device)[None])[0] - 1
        seen = (k[:, None, :] >= 0) & (k[:, None, :] <= q[:, :, None])
        if self.span is not None:
            distance = self.origin[q.clamp(min=0)][:, :, None] - self.depth[k.clamp(min=0)][:, None, :]
            seen &= distance < self.span
        return seen


@torch.compiler.disable  # a graph breaks here: what is found out is Python
def tree_plan(
    subtree_end: Tensor,
    *,
    depth: Tensor | None = None,
    window: int | None = None,
    chunk: int | None = None,
    query_index: Tensor | None = None,
    trusted: bool = False,
    longest_path: int | None = None,
) -> TreePlan:
    """Checks a packing and derives what every layer needs. Do it once per packing (and window or chunk), not once per layer.

    subtree_end: integer [T], first preorder index after each token's subtree.
    depth: integer [T], position on the path from the root, used only by window and chunk; None: the number of ancestors.
    window: a query sees keys whose depth is less than `window` below its own; None: all.
    chunk: a query sees keys of its own chunk, depths [n chunk, (n + 1) chunk); None: all. Not with a window.
    query_index: integer [Q], preorder index of each query, any order; None: every token is a query.
    trusted: nothing is checked but shapes and dtypes, and the host does not wait for the device. For a packing that is known to be
    right, as one that was checked where it was made, on the CPU. Wrong ones then give wrong numbers, or reads outside of the tensors.
    longest_path: read with trusted alone: all depths are below it, so that a longer window or chunk is known to cut nothing. None: each
    is taken to cut, which costs time where it does not.

    Cost: a few sorts and passes over T integers on subtree_end's device, and unless trusted one wait for that device, for the verdict.
    The torch path adds one Python step per segment when it first uses the plan.

    Raises ValueError when subtree_end is no preorder (`j < end[j] <= T`, intervals nested), a shape or dtype is wrong,
    an index lies outside, window or chunk is no integer or < 1, both are given, or one of them and the depth does not rise from a
    token to its child.
    """
    end = _integers(subtree_end, "subtree_end", subtree_end.device)
    num_keys, device = len(end), end.device
    if window is not None and not (isinstance(window, Integral) and window >= 1):
        raise ValueError(
            f"window is {window}; use an integer of at least 1 (a token always sees itself), or None for no window"
        )
    if chunk is not None and (not (isinstance(chunk, Integral) and chunk >= 1) or window is not None):
        raise ValueError(
            f"chunk is {chunk} and window {window}; give a chunk of at least 1 token, an integer, or a window, not both"
        )
    natural = count_ancestors(end) if depth is None or not trusted else end
    given = natural if depth is None else _integers(depth, "depth", device)
    if len(given) != num_keys:
        raise ValueError(f"depth has {len(given)} entries, subtree_end {num_keys}; give one per packed token")
    if query_index is None:
        position, index = torch.arange(num_keys, device=device), None
    else:
        index = _integers(query_index, "query_index", device)
        position, order = index.sort(stable=True)
    origin, span = (given, window) if chunk is None else (given - given % chunk, 1)
    limit = window if chunk is None else chunk
    unsorted, window_cuts = index is not None, limit is not None and (longest_path is None or longest_path > limit)
    if not trusted:
        unsorted, window_cuts = _checked(end, natural, given, origin, span, index, counted=depth is None)
    plan = TreePlan(
        num_keys=num_keys,
        num_queries=len(position),
        window=window,
        chunk=chunk,
        window_cuts=window_cuts,
        subtree_end=end,
        depth=given,
        origin=origin,
        position=position,
        order=order if unsorted else None,
        sparse=index is not None,
    )
    return _with_handle(plan)


def token_major(x: Tensor, width: int, dtype: torch.dtype | None = None) -> Tensor:
    """Uninitialised [heads, tokens, width] with the heads and tokens of x [heads, tokens, …], in memory [tokens, heads, width]."""
    return x.new_empty(x.shape[1], x.shape[0], width, dtype=dtype).transpose(0, 1)


_PLANS: WeakValueDictionary[int, TreePlan] = WeakValueDictionary()
_numbers = itertools.count()


def plan_of(handle: Tensor) -> TreePlan:
    """The plan that `plan.handle` stands for. Raises ValueError when it is gone."""
    plan = _PLANS.get(int(handle))
    if plan is None:
        raise ValueError("the plan of this attention is gone; keep what tree_plan returned until the backward has run")
    return plan


def _with_handle(plan: TreePlan) -> TreePlan:
    """The handle keeps a copy of the plan without a handle alive: so does autograd, which keeps the handle, and nothing is a circle."""
    number = next(_numbers)
    handle = torch.tensor([number], device="cpu")
    handle.plan = plan  # type: ignore[attr-defined]
    _PLANS[number] = plan
    return replace(plan, handle=handle)


def _checked(
    end: Tensor,
    natural: Tensor,
    given: Tensor,
    origin: Tensor,
    span: int | None,
    index: Tensor | None,
    counted: bool,
) -> tuple[bool, bool]:
    """Whether the queries are out of order, and whether a token does not see all of its ancestors. Waits for the device.

    counted: the given depths are the natural ones. Raises ValueError as tree_plan does.
    """
    num_keys = len(end)
    none = torch.zeros((), dtype=torch.bool, device=end.device)
    verdict = [
        _malformed(end, natural),
        none if index is None else ((index < 0) | (index >= num_keys)).any(),
        none if index is None else (index.diff() < 0).any(),
        none if span is None or counted else _does_not_rise(given, natural).any(),
        none if span is None or num_keys == 0 else origin.max() - given.min() >= span,
    ]
    malformed, outside, unsorted, contradicts, window_cuts = torch.stack(verdict).tolist()
    if malformed:
        _explain(end.tolist())
    if outside:
        assert index is not None, "no query_index, yet an index outside"
        i = int(torch.nonzero((index < 0) | (index >= num_keys))[0])
        raise ValueError(
            f"query_index[{i}] is {int(index[i])}, outside [0, {num_keys}): it must name one of the packed tokens"
        )
    if contradicts:
        j = int(torch.nonzero(_does_not_rise(given, natural))[0])
        up = int(parents(natural)[j])
        word = "falls" if given[j] < given[up] else "stays"
        raise ValueError(
            f"depth {word} from {int(given[up])} at token {up} to {int(given[j])} at its child {j}; a window or chunk needs depths "
            "that rise along a path (leave depth out to count ancestors)"
        )
    return unsorted, window_cuts


def parents(ancestors: Tensor) -> Tensor:
    """Index of every token's parent in a preorder, -1 for roots. ancestors: int64 [T], number of each token's ancestors.

    It is the last token before it with one ancestor less: what lies between the two hangs below the parent.
    """
    num = len(ancestors)
    index = torch.arange(num, device=ancestors.device)
    ranked = (ancestors * num + index).sort().values  # by ancestors, then by index
    before = torch.searchsorted(ranked, (ancestors - 1) * num + index) - 1
    return torch.where(ancestors > 0, ranked[before.clamp(min=0)] % max(num, 1), -1)


def _integers(x: Tensor, name: str, device: torch.device) -> Tensor:
    if x.dim() != 1 or x.is_floating_point() or x.is_complex() or x.dtype == torch.bool:
        raise ValueError(
            f"{name} has shape {tuple(x.shape)} and dtype {x.dtype}; give a one-dimensional integer tensor"
        )
    return x.detach().to(device, torch.int64, copy=True)  # a caller may reuse the buffer


def count_ancestors(end: Tensor) -> Tensor:
    """Tokens before i whose subtree has ended are not ancestors of i; the others are."""
    index = torch.arange(len(end), device=end.device)
    return index - torch.searchsorted(end.sort().values, index, right=True)


def _malformed(end: Tensor, ancestors: Tensor) -> Tensor:
    """Whether `end` is no preorder, a bool without a trip to the host.

    Intervals in [0, T] nest iff every token's rank in postorder (by end, inner before outer) is end - 1 - ancestors: on
    both sides count who ends inside (j, end[j]]. The left counts an interval that begins before j and ends inside it,
    the right one that begins inside and ends beyond; of all crossing intervals the first has only the latter.
    """
    num = len(end)
    index = torch.arange(num, device=end.device)
    postorder = (end * (num + 1) - index).argsort()
    rank = torch.empty_like(index).scatter_(0, postorder, index)
    return ((end <= index) | (end > num) | (rank != end - 1 - ancestors)).any()


def _does_not_rise(depth: Tensor, ancestors: Tensor) -> Tensor:
    up = parents(ancestors)
    return (up >= 0) & (depth <= depth[up.clamp(min=0)])


def _explain(end: list[int]) -> None:
    """Raises ValueError naming the first tokens that make `end` no preorder."""
    open_ends: list[tuple[int, int]] = []
    for j, e in enumerate(end):
        if not j < e <= len(end):
            raise ValueError(
                f"subtree_end[{j}] is {e}, outside [{j + 1}, {len(end)}]: a token's subtree holds the token itself "
                "and ends inside the packing; a leaf has subtree_end = index + 1"
            )
        while open_ends and open_ends[-1][0] <= j:
            open_ends.pop()
        if open_ends and e > open_ends[-1][0]:
            outer, i = open_ends[-1]
            raise ValueError(
                f"subtree_end is no preorder: token {j} ends at {e}, but lies in the subtree of token {i}, which ends "
                f"at {outer}; pack every subtree contiguously, parents before children"
            )
        if not open_ends or e < open_ends[-1][0]:
            open_ends.append((e, j))
    raise AssertionError("subtree_end was found malformed, but its intervals nest")


def _segments(end: Tensor) -> list[int]:
    """First index of every run of equal `end`."""
    return torch.nonzero(torch.diff(end, prepend=end.new_tensor([-1])))[:, 0].tolist()


@dataclass(frozen=True)
class _Builder:
    end: Tensor
    depth: Tensor
    origin: Tensor
    position: Tensor
    span: int | None
    longest: int | None  # tokens of a path that may see each other
    device: torch.device

    def parts(self, starts: list[int]) -> tuple[list[Part], list[Part]]:
        complete: list[_Span] = []
        masked: list[_Span] = []
        below: list[Part] = []
        distinct = bool((torch.diff(self.position) > 0).all())
        every = distinct and len(self.position) == len(self.end)
        position: Sequence[int] = range(len(self.end)) if every else self.position.tolist()
        ends = self.end.tolist()
        for a, b in self._pieces(starts):
            q0, q1, q2 = (bisect_left(position, at) for at in (a, b, ends[a]))
            if q0 < q1:
                last = position[q1 - 1] + 1  # keys after the segment's last query are seen by none of its queries
                whole = distinct and q1 - q0 == last - a
                span = _Span(q0, q1, a, last)
                (complete if whole and not self._window_cuts(a, last) else masked).append(span)
            if q1 < q2:
                below.extend(self._below(q1, q2, a, b))
        own = [self._batch(spans, causal=True) for spans in _buckets(complete)]
        own += [self._batch(spans, causal=False) for spans in _buckets(masked)]
        return own, below

    def _pieces(self, starts: list[int]) -> Iterator[tuple[int, int]]:
        # A piece no longer than the window needs no mask of its own; below 256 tokens a mask beats more calls.
        longest = PIECE if self.longest is None else min(PIECE, max(self.longest, 256))
        edges = [*starts, len(self.end)]
        for a, b in zip(edges, edges[1:], strict=False):
            cuts = -(-(b - a) // longest)
            pieces = [a + (b - a) * i // cuts for i in range(cuts + 1)]
            yield from zip(pieces, pieces[1:], strict=False)

    def _window_cuts(self, a: int, b: int) -> bool:
        return self.span is not None and int(self.origin[a:b].max() - self.depth[a:b].min()) >= self.span

    def _below(self, q0: int, q1: int, k0: int, k1: int) -> Iterator[Part]:
        keys = Rows(slice(k0, k1), 1, k1 - k0)
        if self.span is None:
            yield Part(Rows(slice(q0, q1), 1, q1 - q0), keys)
            return
        origin_q, depth_k = self.origin[self.position[q0:q1]], self.depth[k0:k1]
        sees_all = origin_q - depth_k.min() < self.span
        sees_some = (origin_q - depth_k.max() < self.span) & ~sees_all
        if sees_all.any():
            yield Part(self._rows(q0 + torch.nonzero(sees_all)[:, 0]), keys)
        rows = q0 + torch.nonzero(sees_some)[:, 0]
        step = max(1, MASK_ELEMENTS // (k1 - k0))
        for i in range(0, len(rows), step):
            yield Part(self._rows(rows[i : i + step]), keys, masked=True)

    def _rows(self, rows: Tensor) -> Rows:
        first, n = int(rows[0]), len(rows)
        if int(rows[-1]) - first + 1 == n:
            return Rows(slice(first, first + n), 1, n)
        return Rows(rows.to(self.device), 1, n)

    def _batch(self, spans: list[_Span], *, causal: bool) -> Part:
        queries = self._grid([span.q0 for span in spans], [span.queries for span in spans])
        keys = self._grid([span.k0 for span in spans], [span.keys for span in spans])
        return Part(queries, keys, causal=causal, masked=not causal)

    def _grid(self, starts: list[int], lengths: list[int]) -> Rows:
        if len(starts) == 1:
            return Rows(slice(starts[0], starts[0] + lengths[0]), 1, lengths[0])
        length, blocks = max(lengths), len(lengths)
        within = torch.arange(length).expand(blocks, length)
        real = within < torch.tensor(lengths)[:, None]
        index = (within + torch.tensor(starts)[:, None])[real]
        slots = None if real.all() else torch.nonzero(real.flatten())[:, 0].to(self.device)
        return Rows(index.to(self.device), blocks, length, slots)


@dataclass(frozen=True)
class _Span:
    """The queries [q0, q1) of one segment and its keys [k0, k1)."""

    q0: int
    q1: int
    k0: int
    k1: int

    @property
    def queries(self) -> int:
        return self.q1 - self.q0

    @property
    def keys(self) -> int:
        return self.k1 - self.k0


def _buckets(spans: list[_Span]) -> Iterator[list[_Span]]:
    """Segments of like length together: padding to the longest costs less than a call of its own."""
    bucket: list[_Span] = []
    most = 0
    for span in sorted(spans, key=lambda s: (s.keys, s.queries), reverse=True):
        if bucket:
            longest = bucket[0].keys
            like = span.keys >= 0.8 * longest or longest <= 32
            mask = (len(bucket) + 1) * max(most, span.queries) * longest
            if longest >= ALONE or not like or mask > MASK_ELEMENTS:
                yield bucket
                bucket, most = [], 0
        most = max(most, span.queries)
        bucket.append(span)
    if bucket:
        yield bucket
