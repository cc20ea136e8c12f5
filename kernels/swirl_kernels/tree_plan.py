"""The structure of a packed tree, derived once per packing and shared by all layers.

Legend: T packed tokens (keys), Q queries, B blocks of one batched call, L tokens of a block.

A segment is a maximal run of equal `subtree_end`: a stretch of the tree without a branch. Two kinds of calls cover every visible
pair exactly once, and none of them needs a mask unless a window cuts into it:

    own     the queries of a segment against the keys of the same segment: plain causal attention; segments of like length
            (the teeth of a comb) are padded to one length and go as one batch
    below   the keys of a segment against the queries of everything below it: no mask at all, since all of them see all of it,
            and in preorder they are one contiguous slice

    preorder index    0 1 2 3 4 5 6 7 8 9            0 1 2 ─┬─ 3 4 ─┬─ 5 6
    subtree_end      10 . . 9 . 7 . 9 . 10                  │       └─ 7 8
    own               [0 3) [3 5) [5 7) [7 9) [9 10)        └─ 9
    below             keys [0 3) x queries [3 10);  keys [3 5) x queries [5 9)
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

PIECE = 1024  # longest segment in one call: a longer one is cut, so that heads x pieces keep the threads of a CPU evenly busy
ALONE = 512  # segments this long gain nothing from a batch
MASK_ELEMENTS = 1 << 22  # largest mask of one call


@dataclass(frozen=True)
class Rows:
    """Rows of a [heads, N, …] tensor laid out as [heads, blocks, length, …], short blocks padded with zeros.

    index: the real rows, in order. slots: where each of them lies in the flattened [blocks * length] grid; None without padding.
    """

    index: slice | Tensor
    blocks: int
    length: int
    slots: Tensor | None = None

    def take(self, x: Tensor) -> Tensor:
        rows = x[:, self.index] if isinstance(self.index, slice) else x.index_select(1, self.index)
        if self.slots is not None:
            grid = rows.new_zeros(x.shape[0], self.blocks * self.length, *x.shape[2:])
            rows = grid.index_copy_(1, self.slots, rows)
        return rows.unflatten(1, (self.blocks, self.length))

    def drop_padding(self, grid: Tensor) -> Tensor:
        """The inverse of the layout: [heads, blocks, length, …] to [heads, real rows, …]."""
        rows = grid.flatten(1, 2)
        return rows if self.slots is None else rows.index_select(1, self.slots)


@dataclass(frozen=True)
class Part:
    """One attention call. causal: query and key blocks are the same tokens. masked: positions and depths decide."""

    queries: Rows
    keys: Rows
    causal: bool = False
    masked: bool = False


@dataclass(frozen=True)
class TreePlan:
    """What `tree_plan` found out. Opaque to callers; everything but the two sizes lies on `subtree_end`'s device."""

    num_keys: int
    num_queries: int
    window: int | None
    subtree_end: Tensor  # [T]
    depth: Tensor  # [T]
    position: Tensor  # [Q] preorder index of every query, ascending
    order: Tensor | None  # [Q] puts the caller's queries into ascending order; None when they are
    own: tuple[Part, ...]  # together they hold every query exactly once
    below: tuple[Part, ...]

    def visible(self, part: Part) -> Tensor:
        """The mask of a masked part, [B, Lq, Lk], True = visible; padding sees nothing and is seen by nothing."""
        q = part.queries.take(self.position[None] + 1)[0] - 1
        k = part.keys.take(torch.arange(1, self.num_keys + 1, device=self.depth.device)[None])[0] - 1
        seen = (k[:, None, :] >= 0) & (k[:, None, :] <= q[:, :, None])
        if self.window is not None:
            distance = self.depth[q.clamp(min=0)][:, :, None] - self.depth[k.clamp(min=0)][:, None, :]
            seen &= distance < self.window
        return seen


def tree_plan(
    subtree_end: Tensor,
    *,
    depth: Tensor | None = None,
    window: int | None = None,
    query_index: Tensor | None = None,
) -> TreePlan:
    """Checks a packing and derives its calls. Do it once per packing (and window), not once per layer.

    subtree_end: integer [T], first preorder index after each token's subtree.
    depth: integer [T], position on the path from the root, used by the window alone; None: the number of ancestors.
    window: a query sees keys whose depth is less than `window` below its own; None: all.
    query_index: integer [Q], preorder index of each query, any order; None: every token is a query.

    Cost: numpy over T tokens plus one Python step per segment (about 1 ms for a comb of 8k tokens and 100 teeth).

    Raises ValueError when subtree_end is no preorder (`j < end[j] <= T`, intervals nested), a shape or dtype is wrong, an index
    lies outside, or window < 1.
    """
    end = _integers(subtree_end, "subtree_end")
    num_keys = len(end)
    if window is not None and window < 1:
        raise ValueError(f"window is {window}; use at least 1 (a token always sees itself), or None for no window")
    starts = _segments(end)
    if depth is None:
        # Tokens before i whose subtree has ended are no ancestors; the others are.
        index = np.arange(num_keys)
        depths = index - np.searchsorted(np.sort(end), index, side="right")
    else:
        depths = _integers(depth, "depth")
        if len(depths) != num_keys:
            raise ValueError(f"depth has {len(depths)} entries, subtree_end {num_keys}; give one depth per packed token")
    position, order = _positions(query_index, num_keys)
    builder = _Builder(end, depths, position, window, subtree_end.device)
    own, below = builder.parts(starts)

    def tensor(array: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(subtree_end.device)

    return TreePlan(
        num_keys=num_keys,
        num_queries=len(position),
        window=window,
        subtree_end=subtree_end.detach().clone(),  # a caller may reuse the buffer
        depth=tensor(depths),
        position=tensor(position),
        order=None if order is None else tensor(order),
        own=tuple(own),
        below=tuple(below),
    )


def _integers(x: Tensor, name: str) -> np.ndarray[Any, np.dtype[np.int64]]:
    if x.dim() != 1 or x.is_floating_point() or x.is_complex() or x.dtype == torch.bool:
        raise ValueError(f"{name} has shape {tuple(x.shape)} and dtype {x.dtype}; give a one-dimensional integer tensor")
    return x.detach().cpu().numpy().astype(np.int64)


def _segments(end: np.ndarray) -> np.ndarray:
    """First index of every run of equal `end`. Raises ValueError when `end` is no preorder."""
    total = len(end)
    wrong = np.flatnonzero((end <= np.arange(total)) | (end > total))
    if len(wrong):
        j = int(wrong[0])
        raise ValueError(
            f"subtree_end[{j}] is {end[j]}, outside [{j + 1}, {total}]: a token's subtree holds the token itself and ends "
            "inside the packing; a leaf has subtree_end = index + 1"
        )
    starts = np.flatnonzero(np.diff(end, prepend=-1))
    open_ends: list[tuple[int, int]] = []
    for a, e in zip(starts.tolist(), end[starts].tolist(), strict=True):
        while open_ends and open_ends[-1][0] <= a:
            open_ends.pop()
        if open_ends and e > open_ends[-1][0]:
            outer, j = open_ends[-1]
            raise ValueError(
                f"subtree_end is no preorder: token {a} ends at {e}, but lies in the subtree of token {j}, which ends at "
                f"{outer}; pack every subtree contiguously, parents before children"
            )
        open_ends.append((e, a))
    return starts


def _positions(query_index: Tensor | None, num_keys: int) -> tuple[np.ndarray, np.ndarray | None]:
    """Ascending preorder indices of the queries, and the permutation that sorts the caller's (None when sorted)."""
    if query_index is None:
        return np.arange(num_keys), None
    position = _integers(query_index, "query_index")
    wrong = np.flatnonzero((position < 0) | (position >= num_keys))
    if len(wrong):
        i = int(wrong[0])
        raise ValueError(f"query_index[{i}] is {position[i]}, outside [0, {num_keys}): it must name one of the packed tokens")
    if (np.diff(position) >= 0).all():
        return position, None
    order = np.argsort(position, kind="stable")
    return position[order], order


@dataclass(frozen=True)
class _Builder:
    end: np.ndarray
    depth: np.ndarray
    position: np.ndarray
    window: int | None
    device: torch.device

    def parts(self, starts: np.ndarray) -> tuple[list[Part], list[Part]]:
        complete: list[tuple[int, int, int, int]] = []  # query rows [q0, q1), keys [k0, k1) of one segment
        masked: list[tuple[int, int, int, int]] = []
        below: list[Part] = []
        distinct = bool((np.diff(self.position) > 0).all())
        for a, b in self._pieces(starts):
            e = int(self.end[a])
            q0, q1, q2 = np.searchsorted(self.position, (a, b, e)).tolist()
            if q0 < q1:
                last = int(self.position[q1 - 1]) + 1  # keys behind the segment's last query are seen by none of its queries
                span = self.depth[a:last]
                whole = distinct and q1 - q0 == last - a
                cut = self.window is not None and int(span.max() - span.min()) >= self.window
                (complete if whole and not cut else masked).append((q0, q1, a, last))
            if q1 < q2:
                below.extend(self._below(q1, q2, a, b))
        own = [self._batch(members, causal=True) for members in _buckets(complete)]
        own += [self._batch(members, causal=False) for members in _buckets(masked)]
        return own, below

    def _pieces(self, starts: np.ndarray) -> Iterator[tuple[int, int]]:
        longest = PIECE if self.window is None else min(PIECE, max(self.window, 256))
        for a, b in zip(starts.tolist(), [*starts[1:].tolist(), len(self.end)], strict=True):
            cuts = -(-(b - a) // longest)
            edges = [a + (b - a) * i // cuts for i in range(cuts + 1)]
            yield from zip(edges, edges[1:], strict=False)

    def _below(self, q0: int, q1: int, k0: int, k1: int) -> Iterator[Part]:
        keys = Rows(slice(k0, k1), 1, k1 - k0)
        if self.window is None:
            yield Part(Rows(slice(q0, q1), 1, q1 - q0), keys)
            return
        depth_q, depth_k = self.depth[self.position[q0:q1]], self.depth[k0:k1]
        sees_all = depth_q - depth_k.min() < self.window
        sees_some = (depth_q - depth_k.max() < self.window) & ~sees_all
        if sees_all.any():
            yield Part(self._rows(q0 + np.flatnonzero(sees_all)), keys)
        rows = q0 + np.flatnonzero(sees_some)
        step = max(1, MASK_ELEMENTS // (k1 - k0))
        for i in range(0, len(rows), step):
            yield Part(self._rows(rows[i : i + step]), keys, masked=True)

    def _rows(self, rows: np.ndarray) -> Rows:
        first, n = int(rows[0]), len(rows)
        if int(rows[-1]) - first + 1 == n:
            return Rows(slice(first, first + n), 1, n)
        return Rows(torch.from_numpy(rows).to(self.device), 1, n)

    def _batch(self, members: list[tuple[int, int, int, int]], *, causal: bool) -> Part:
        queries = self._grid([(q0, q1) for q0, q1, _, _ in members])
        keys = self._grid([(k0, k1) for _, _, k0, k1 in members])
        return Part(queries, keys, causal=causal, masked=not causal)

    def _grid(self, spans: list[tuple[int, int]]) -> Rows:
        if len(spans) == 1:
            return Rows(slice(*spans[0]), 1, spans[0][1] - spans[0][0])
        length = max(b - a for a, b in spans)
        index = np.concatenate([np.arange(a, b) for a, b in spans])
        slots = np.concatenate([i * length + np.arange(b - a) for i, (a, b) in enumerate(spans)])
        padded = len(slots) < len(spans) * length
        return Rows(
            torch.from_numpy(index).to(self.device),
            len(spans),
            length,
            torch.from_numpy(slots).to(self.device) if padded else None,
        )


def _buckets(members: list[tuple[int, int, int, int]]) -> Iterator[list[tuple[int, int, int, int]]]:
    """Segments of like length together: padding to the longest costs less than a call of its own."""
    bucket: list[tuple[int, int, int, int]] = []
    longest = most = 0
    for member in sorted(members, key=lambda m: (m[3] - m[2], m[1] - m[0]), reverse=True):
        keys, queries = member[3] - member[2], member[1] - member[0]
        like = keys >= 0.8 * longest or longest <= 32
        if bucket and (longest >= ALONE or not like or (len(bucket) + 1) * most * longest > MASK_ELEMENTS):
            yield bucket
            bucket = []
        if not bucket:
            longest, most = keys, queries
        most = max(most, queries)
        bucket.append(member)
    if bucket:
        yield bucket
