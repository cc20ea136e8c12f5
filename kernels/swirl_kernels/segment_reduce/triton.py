"""segment_reduce in Triton: one program a segment, which goes through its positions a block at a time.

Legend: N entries of x, M positions, S segments.

Sums are kept per lane of the block and added up once, in a fixed order. A segment whose offsets or index leave the bounds reads
nothing outside them and comes out as NaN.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 512
WARPS = 4
NOWHERE = tl.constexpr(2**62)


@triton.jit
def bounds(offsets, positions, segments, PARTIAL: tl.constexpr):
    """begin and end of this program's segment, and whether they are right; where not, the segment is empty.

    PARTIAL: offsets need not start at 0 nor end at `positions`."""
    segment = tl.program_id(0)
    begin = tl.load(offsets + segment).to(tl.int64)
    end = tl.load(offsets + segment + 1).to(tl.int64)
    right = (begin >= 0) & (begin <= end) & (end <= positions)
    if not PARTIAL:
        right &= (segment > 0) | (begin == 0)
        right &= (segment < segments - 1) | (end == positions)
    return tl.where(right, begin, 0), tl.where(right, end, 0), right


@triton.jit(
    do_not_specialize=["entries", "positions", "segments"],
    do_not_specialize_on_alignment=["x", "offsets", "index", "out", "chosen"],
)
def _reduce_kernel(
    x,
    offsets,
    index,
    out,
    chosen,
    entries,
    positions,
    segments,
    OP: tl.constexpr,
    HAS_INDEX: tl.constexpr,
    PARTIAL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    segment = tl.program_id(0)
    begin, end, right = bounds(offsets, positions, segments, PARTIAL)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    top = float("-inf")
    top_at = begin * 0 + NOWHERE
    nan_at = begin * 0 + NOWHERE
    for start in range(begin, end, BLOCK):
        position = start + tl.arange(0, BLOCK).to(tl.int64)
        inside = position < end
        entry = position
        readable = inside
        if HAS_INDEX:
            entry = tl.load(index + position, mask=inside, other=0).to(tl.int64)
            readable = inside & (entry >= 0) & (entry < entries)
        value = tl.load(x + entry, mask=readable, other=0.0).to(tl.float32)
        value = tl.where(readable | (position >= end), value, float("nan"))
        if OP == "max":
            number = inside & (value == value)
            block_top = tl.max(tl.where(number, value, float("-inf")))
            block_at = tl.min(tl.where(number & (value == block_top), position, NOWHERE))
            better = (block_top > top) | (top_at == NOWHERE)
            top_at = tl.where(better, block_at, top_at)
            top = tl.maximum(top, block_top)
            nan_at = tl.minimum(nan_at, tl.min(tl.where(inside & (value != value), position, NOWHERE)))
        else:
            total += value
    if OP == "max":
        at = tl.where(nan_at != NOWHERE, nan_at, top_at)
        found = at != NOWHERE
        if HAS_INDEX:
            at = tl.load(index + tl.where(found, at, 0), mask=found, other=0).to(tl.int64)
        tl.store(chosen + segment, tl.where(found, at, -1))
        result = tl.where(nan_at != NOWHERE, float("nan"), top)
    else:
        result = tl.sum(total)
        if OP == "mean":
            result = result / tl.maximum(end - begin, 1).to(tl.float32)
    tl.store(out + segment, tl.where(right, result, float("nan")))


@triton.jit(do_not_specialize=["positions", "segments"], do_not_specialize_on_alignment=["values", "offsets", "out"])
def _spread_kernel(values, offsets, out, positions, segments, BLOCK: tl.constexpr):
    value = tl.load(values + tl.program_id(0))
    begin, end, _ = bounds(offsets, positions, segments, False)
    for start in range(begin, end, BLOCK):
        position = start + tl.arange(0, BLOCK).to(tl.int64)
        tl.store(out + position, tl.zeros((BLOCK,), dtype=value.dtype) + value, mask=position < end)


def segment_reduce_triton(
    x: Tensor, offsets: Tensor, op: str, index: Tensor | None, *, partial: bool = False
) -> tuple[Tensor, Tensor]:
    """out [S] fp32, and for "max" the int64 [S] entry of x that was chosen, -1 where there is none (else an empty tensor).

    partial: the segments need not cover all positions."""
    x, offsets = x.contiguous(), offsets.contiguous()
    index = None if index is None else index.contiguous()
    segments = len(offsets) - 1
    out = torch.empty(segments, dtype=torch.float32, device=x.device)
    chosen = torch.empty(segments if op == "max" else 0, dtype=torch.int64, device=x.device)
    if segments:
        with torch.cuda.device_of(x):
            _reduce_kernel[(segments,)](
                x,
                offsets,
                index,
                out,
                chosen,
                len(x),
                len(x) if index is None else len(index),
                segments,
                OP=op,
                HAS_INDEX=index is not None,
                PARTIAL=partial,
                BLOCK=BLOCK,
                num_warps=WARPS,
            )
    return out, chosen


def segment_spread_triton(values: Tensor, offsets: Tensor, positions: int) -> Tensor:
    """[positions], at p the value of the segment that owns p; NaN where none does."""
    out = torch.full((positions,), math.nan, dtype=values.dtype, device=values.device)
    segments = len(offsets) - 1
    if segments and positions:
        with torch.cuda.device_of(values):
            _spread_kernel[(segments,)](
                values.contiguous(), offsets.contiguous(), out, positions, segments, BLOCK=BLOCK, num_warps=WARPS
            )
    return out
