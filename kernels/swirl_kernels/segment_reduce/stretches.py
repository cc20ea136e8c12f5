"""Parts of Triton kernels that go through packed segments in stretches of positions, so that work is even whatever the segments are.

Legend: M positions, S segments.
"""

from __future__ import annotations

import triton
import triton.language as tl

PROBES = tl.constexpr(64)


def levels(segments: int) -> int:
    """Rounds in which first_segment finds its place among so many."""
    return 3 if segments < 64**3 else 6


@triton.jit
def first_segment(offsets, position, segments, LEVELS: tl.constexpr):
    """The last s in [0, segments] with offsets[s] <= position, 0 where there is none; anything in range where offsets descend."""
    low = position * 0
    high = low + segments + 1
    for _ in tl.static_range(LEVELS):
        step = (high - low + PROBES - 1) // PROBES
        probes = low + step * (tl.arange(0, PROBES) + 1)
        there = probes < high
        before = there & (tl.load(offsets + probes, mask=there, other=0).to(tl.int64) <= position)
        low += step * tl.sum(before.to(tl.int32))
        high = tl.minimum(low + step, high)
    return low


@triton.jit
def is_right(begin, end, segment, positions, segments):
    """Whether a segment with these offsets is one: in order, from 0 and to the end without a gap."""
    right = (begin >= 0) & (begin <= end) & (end <= positions)
    right &= (segment > 0) | (begin == 0)
    return right & ((segment < segments - 1) | (end == positions))


@triton.jit
def wrong_segments(offsets, positions, segments, LANES: tl.constexpr):
    """How many of this program's share of all segments have wrong offsets, one number a lane."""
    share = tl.cdiv(segments, tl.num_programs(0))
    first = tl.program_id(0) * share
    wrong = tl.zeros((LANES,), dtype=tl.int32)
    for start in range(0, share, LANES):
        segment = first + start + tl.arange(0, LANES)
        mine = (segment < segments) & (segment < first + share)
        begin = tl.load(offsets + segment, mask=mine, other=0).to(tl.int64)
        end = tl.load(offsets + segment + 1, mask=mine, other=0).to(tl.int64)
        right = is_right(begin, end, segment, positions, segments)
        wrong += tl.where(mine & (right == 0), 1, 0)
    return wrong


@triton.jit
def piece(begin, end, segment, cursor, stop, positions, segments):
    """Where the piece ends that begins at cursor, and whether `segment` (with these offsets) owns it. Nobody owns what lies
    before, behind and between segments. It may be empty."""
    outside = segment >= segments
    gap = begin > cursor
    until = tl.where(outside, stop, tl.minimum(tl.where(gap, begin, end), stop))
    owned = is_right(begin, end, segment, positions, segments) & (outside == 0) & (gap == 0)
    return tl.maximum(until, cursor), owned
