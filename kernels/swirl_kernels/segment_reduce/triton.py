"""segment_reduce in Triton: a few segments a program, each in lanes of its own, and their gradient in stretches of positions.

Legend: N entries of x, M positions, S segments.

Sums and maxima are kept per lane and put together once, in a fixed order that begins with the segment. A segment whose offsets or
index leave the bounds reads nothing outside them and comes out as NaN.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from swirl_kernels.segment_reduce.stretches import first_segment, is_right, levels, piece

SHORT = 512  # positions of a mean segment up to which one warp takes SHORT_ROWS segments, SHORT_BLOCK positions of each at a time
SHORT_ROWS, SHORT_BLOCK = 4, 128
BLOCK, WARPS = 512, 4  # of longer ones, a program each
SPREAD_BLOCK, SPREAD_PROGRAMS = 128, 4224  # 32 programs of a warp on each of 132 multiprocessors


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
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """PARTIAL: offsets need not start at 0 nor end at `positions`."""
    nowhere = tl.zeros((ROWS, BLOCK), dtype=positions.dtype) + 2147483647  # no lane is that far from its segment's beginning
    segment = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    there = segment < segments
    begin = tl.load(offsets + segment, mask=there, other=0).to(tl.int64)
    end = tl.load(offsets + segment + 1, mask=there, other=0).to(tl.int64)
    if PARTIAL:
        right = (begin >= 0) & (begin <= end) & (end <= positions)
    else:
        right = is_right(begin, end, segment, positions, segments)
    begin = tl.where(right, begin, 0)
    length = tl.where(right & there, end - begin, 0).to(positions.dtype)
    total = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
    top = tl.full((ROWS, BLOCK), float("-inf"), dtype=tl.float32)
    top_at = nowhere
    nan_at = nowhere
    for start in range(0, tl.max(length), BLOCK):
        place = (start + tl.arange(0, BLOCK))[None, :]
        inside = place < length[:, None]
        entry = begin[:, None] + place
        readable = inside
        if HAS_INDEX:
            entry = tl.load(index + entry, mask=inside, other=0).to(tl.int64)
            readable = inside & (entry >= 0) & (entry < entries)
        value = tl.load(x + entry, mask=readable, other=0.0).to(tl.float32)
        if HAS_INDEX:
            value = tl.where(inside & (readable == 0), float("nan"), value)
        if OP == "max":
            better = inside & ((value > top) | ((value == value) & (top_at == nowhere)))
            top = tl.where(better, value, top)
            top_at = tl.where(better, place, top_at)
            nan_at = tl.where(inside & (value != value), tl.minimum(nan_at, place), nan_at)
        else:
            total += value
    if OP == "max":
        result = tl.max(top, axis=1)
        first = tl.min(tl.where(top == result[:, None], top_at, nowhere), axis=1)
        first_nan = tl.min(nan_at, axis=1)
        is_nan = first_nan != 2147483647
        at = begin + tl.where(is_nan, first_nan, first)
        found = is_nan | (first != 2147483647)
        if HAS_INDEX:
            at = tl.load(index + at, mask=there & found, other=0).to(tl.int64)
        tl.store(chosen + segment, tl.where(found, at, -1), mask=there)
        result = tl.where(is_nan, float("nan"), result)
    else:
        result = tl.sum(total, axis=1)
        if OP == "mean":
            result = result / tl.maximum(length, 1).to(tl.float32)
    tl.store(out + segment, tl.where(right, result, float("nan")), mask=there)


@triton.jit(
    do_not_specialize=["positions", "segments", "blocks"], do_not_specialize_on_alignment=["values", "offsets", "out"]
)
def _spread_kernel(values, offsets, out, positions, segments, blocks, LEVELS: tl.constexpr, BLOCK: tl.constexpr):
    """out [positions]: the value of the segment that owns them, NaN where none does. blocks: of a program's stretch."""
    lanes = tl.arange(0, BLOCK)
    cursor = tl.program_id(0).to(positions.dtype) * blocks * BLOCK
    stop = tl.minimum(cursor + blocks * BLOCK, positions)
    segment = first_segment(offsets, cursor, segments, LEVELS)
    begin = tl.load(offsets + segment).to(positions.dtype)
    end = tl.load(offsets + tl.minimum(segment + 1, segments)).to(positions.dtype)
    until, owned = piece(begin, end, segment, cursor, stop, positions, segments)
    while cursor < stop:
        ahead = tl.load(offsets + tl.minimum(segment + 2, segments)).to(positions.dtype)
        value = tl.where(owned, tl.load(values + tl.minimum(segment, segments - 1)), float("nan"))
        tl.store(out + cursor + lanes, tl.zeros((BLOCK,), dtype=tl.float32) + value, mask=lanes < until - cursor)
        cursor += BLOCK
        if cursor >= until:
            cursor = until
            if (cursor >= end) & (segment < segments):
                segment += 1
                begin = end
                end = ahead
            while (cursor >= end) & (segment < segments) & (cursor < stop):  # empty ones
                segment += 1
                begin = end
                end = tl.load(offsets + tl.minimum(segment + 1, segments)).to(positions.dtype)
            until, owned = piece(begin, end, segment, cursor, stop, positions, segments)


def tiles(positions: int, segments: int) -> dict[str, int]:
    """Of _reduce_kernel, by the mean length of a segment."""
    if positions <= SHORT * segments:
        return {"ROWS": SHORT_ROWS, "BLOCK": SHORT_BLOCK, "num_warps": 1}
    return {"ROWS": 1, "BLOCK": BLOCK, "num_warps": WARPS}


def segment_reduce_triton(
    x: Tensor, offsets: Tensor, op: str, index: Tensor | None, *, partial: bool = False
) -> tuple[Tensor, Tensor]:
    """out [S] fp32, and for "max" the int64 [S] entry of x that was chosen, -1 where there is none (else an empty tensor).

    partial: the segments need not cover all positions."""
    x, offsets = x.contiguous(), offsets.contiguous()
    index = None if index is None else index.contiguous()
    segments = len(offsets) - 1
    positions = len(x) if index is None else len(index)
    out = torch.empty(segments, dtype=torch.float32, device=x.device)
    chosen = torch.empty(segments if op == "max" else 0, dtype=torch.int64, device=x.device)
    if segments:
        options = tiles(positions, segments)
        with torch.cuda.device_of(x):
            _reduce_kernel[(triton.cdiv(segments, options["ROWS"]),)](
                x,
                offsets,
                index,
                out,
                chosen,
                len(x),
                positions,
                segments,
                OP=op,
                HAS_INDEX=index is not None,
                PARTIAL=partial,
                **options,
            )
    return out, chosen


def segment_spread_triton(values: Tensor, offsets: Tensor, positions: int) -> Tensor:
    """[positions], at p the value of the segment that owns p; NaN where none does."""
    segments = len(offsets) - 1
    if not segments:
        return torch.full((positions,), math.nan, dtype=values.dtype, device=values.device)
    out = torch.empty(positions, dtype=values.dtype, device=values.device)
    if positions:
        blocks = triton.cdiv(positions, SPREAD_BLOCK * SPREAD_PROGRAMS)
        with torch.cuda.device_of(values):
            _spread_kernel[(triton.cdiv(positions, blocks * SPREAD_BLOCK),)](
                values.contiguous(),
                offsets.contiguous(),
                out,
                positions,
                segments,
                blocks,
                LEVELS=levels(segments),
                BLOCK=SPREAD_BLOCK,
                num_warps=1,
            )
    return out
