"""Sum, mean, maximum and count over segments of a vector that follow one another.

Legend: N entries of x, M positions, S segments. Segment s owns the positions offsets[s] : offsets[s + 1]. Position p means
entry p of x (then M = N), or with `index` for entry index[p]: so several segments may share an entry.

    sum    out[s] = Σ x[index[p]]                   d out[s] / d x[n] = how often n is in segment s
    mean   the sum over the segment's length        the same over the length
    max    the largest                              1 for the entry of the first position that holds it, else 0
    count  the segment's length                     none

Left out: columns ([N, D]), double backward.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from swirl_kernels.backend import Backend, choose_backend
from swirl_kernels.segment_reduce.eager import segment_reduce_torch, segment_sums

Operation = Literal["sum", "mean", "max", "count"]


def segment_reduce(x: Tensor, offsets: Tensor, op: Operation, index: Tensor | None = None) -> Tensor:
    """out[s] = op of x over the positions offsets[s] : offsets[s + 1].

    x: floating [N], any stride. offsets: int32 or int64 [S + 1], from 0 to M without descending; equal neighbours are empty
    segments. op: "sum", "mean", "max" or "count". index: int32 or int64 [M] with values in [0, N), repeats allowed; None: M = N and
    position p is entry p.

    Returns [S], fp32 (float64 for float64 x), and int64 for "count", which looks only at offsets. Sums are accumulated in the
    result's dtype or a wider one. An empty segment has sum 0, mean 0, maximum -inf and no gradient. A maximum over
    NaN is NaN. Gradient for x in its own dtype, accumulated before it is rounded.

    Repeatability: nothing is atomic; the same arguments give the same bits, forward and backward (entries that several
    positions share collect their gradient in the order of positions).

    Raises ValueError for wrong shapes, dtypes and devices, for offsets that do not go from 0 to M and for an index outside x
    (place and value named). On a CUDA device with the Triton backend nothing is read back, so that the call does not wait for
    the device: there a segment with such offsets or such an index comes out as NaN.
    """
    if op not in get_args(Operation):
        raise ValueError(f"op is {op!r}; use one of {', '.join(get_args(Operation))}")
    if x.dim() != 1 or not x.is_floating_point():
        raise ValueError(f"x has shape {tuple(x.shape)} and dtype {x.dtype}; give a floating vector [N]")
    if index is not None and (index.dim() != 1 or index.dtype not in (torch.int32, torch.int64)):
        raise ValueError(f"index has shape {tuple(index.shape)} and dtype {index.dtype}; give int32 or int64 [M]")
    devices = {t.device for t in (x, offsets, index) if t is not None}
    if len(devices) > 1:
        raise ValueError(f"x, offsets, index lie on {sorted(map(str, devices))}; use one device")
    backend = choose_backend("segment_reduce", x)
    positions = len(x) if index is None else len(index)
    readable = not (x.is_cuda and backend == "triton")
    check_offsets(offsets, positions, "x" if index is None else "index", readable)
    if index is not None and readable:
        wrong = torch.nonzero((index < 0) | (index >= len(x)))
        if len(wrong):
            at = int(wrong[0])
            raise ValueError(f"index[{at}] is {int(index[at])}, outside [0, {len(x)}), the entries of x")
    if op == "count":
        return offsets.diff().long()
    out, _ = _SegmentReduce.apply(x, offsets, op, index, backend)
    return out


def naive_segment_reduce(x: Tensor, offsets: Tensor, op: Operation, index: Tensor | None = None) -> Tensor:
    """The same, a segment at a time; the reference to check by eye."""
    taken = x if index is None else x[index.long()]
    taken = taken.to(torch.promote_types(x.dtype, torch.float32))
    empty = taken.new_tensor(-math.inf if op == "max" else 0.0)
    results = []
    for begin, end in zip(offsets.tolist(), offsets.tolist()[1:], strict=False):
        segment = taken[begin:end]
        if op == "count":
            results.append(torch.tensor(len(segment)))
        elif not len(segment):
            results.append(empty)
        elif op == "max":
            first = torch.nonzero((segment == segment.max()) | segment.isnan())[0, 0]
            results.append(segment[first])
        else:
            results.append(segment.sum() if op == "sum" else segment.mean())
    return torch.stack(results) if results else taken.new_zeros(0)


def check_offsets(offsets: Tensor, positions: int, of: str, readable: bool) -> None:
    """Raises ValueError unless offsets are int32 or int64 [S + 1] and, where they may be read, go from 0 to `positions`, the
    length of `of`, without descending."""
    if offsets.dim() != 1 or not len(offsets) or offsets.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"offsets have shape {tuple(offsets.shape)} and dtype {offsets.dtype}; give int32 or int64 [segments + 1]"
        )
    if not readable:
        return
    first, last = int(offsets[0]), int(offsets[-1])
    if first != 0 or last != positions:
        raise ValueError(
            f"offsets go from {first} to {last}; {of} has {positions} entries, so they must go from 0 to that"
        )
    descents = torch.nonzero(offsets.diff() < 0)
    if len(descents):
        at = int(descents[0])
        raise ValueError(f"offsets[{at + 1}] is {int(offsets[at + 1])}, below offsets[{at}] = {int(offsets[at])}")


class _SegmentReduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, offsets, op, index, backend):  # type: ignore[no-untyped-def]
        out, chosen = _reduce(x, offsets, op, index, backend)
        ctx.save_for_backward(offsets, index, chosen)
        ctx.op, ctx.backend, ctx.length, ctx.dtype = op, backend, len(x), x.dtype
        ctx.mark_non_differentiable(chosen)
        ctx.set_materialize_grads(False)
        return out, chosen

    @staticmethod
    @once_differentiable
    def backward(ctx, dout, _):  # type: ignore[no-untyped-def]
        if dout is None:
            return None, None, None, None, None
        offsets, index, chosen = ctx.saved_tensors
        if ctx.op == "max":
            # The entries that were chosen; empty segments chose -1. Segments that share entries may have chosen the same one.
            dx = _collect(dout, chosen, ctx.length, ctx.backend)
        else:
            each = dout if ctx.op == "sum" else dout / offsets.diff().clamp(min=1)
            spread = _spread(each, offsets, ctx.length if index is None else len(index), ctx.backend)
            dx = spread if index is None else _collect(spread, index, ctx.length, ctx.backend)
        return dx.to(ctx.dtype), None, None, None, None


def _reduce(x: Tensor, offsets: Tensor, op: str, index: Tensor | None, backend: Backend) -> tuple[Tensor, Tensor]:
    """out [S], and for "max" the int64 [S] entry of x that was chosen, -1 where there is none (else an empty tensor)."""
    if backend == "triton":
        from swirl_kernels.segment_reduce.triton import segment_reduce_triton

        return segment_reduce_triton(x, offsets, op, index)
    return segment_reduce_torch(x, offsets, op, index)


def _spread(values: Tensor, offsets: Tensor, positions: int, backend: Backend) -> Tensor:
    """[positions], at p the value of the segment that owns p."""
    if backend == "triton":
        from swirl_kernels.segment_reduce.triton import segment_spread_triton

        return segment_spread_triton(values, offsets, positions)
    return torch.repeat_interleave(values, offsets.diff(), output_size=positions)


def _collect(values: Tensor, entries: Tensor, length: int, backend: Backend) -> Tensor:
    """[length], at n the sum of the values whose entry is n, in their order; entries outside [0, length) are left out.

    Once they are sorted by entry, the values of one entry are a segment."""
    entries, order = torch.sort(entries.long(), stable=True)
    edges = torch.searchsorted(entries, torch.arange(length + 1, device=entries.device))
    if backend == "triton":
        from swirl_kernels.segment_reduce.triton import segment_reduce_triton

        return segment_reduce_triton(values, edges, "sum", order, partial=True)[0]
    return segment_sums(values[order], edges)
