"""The kernels of linear_logprob that stream over logits which a matrix product has written in fp32.

Legend: N rows, C columns of a chunk of the vocabulary. A program is one warp and takes one segment of ROWS rows (one, but in
tests): SEGMENT columns, from a multiple of SEGMENT on, all in its registers. Rows of a chunk lie a multiple of SEGMENT apart, so
that every load and store is as wide as the machine has them and none needs a mask; what stands behind the last column is never
looked at.

Exponentials are powers of two: x = log2(e) z, exp(z) = 2^x, and a sum of exponentials is kept as k and the sum of 2^(x - k) with
a whole number k, so that putting two of them together rounds once, in the addition.
"""

from __future__ import annotations

import triton
import triton.language as tl

from swirl_kernels.linear_logprob.autograd import MIN_LOGP

ROWS = 1
SEGMENT = 1024  # 32 logits a lane
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
LOWEST = tl.constexpr(-1.7e38)  # below every logit, and still finite when subtracted from one
LEAST = tl.constexpr(MIN_LOGP * 1.4426950408889634)


@triton.jit
def capped(z, softcap, HAS_SOFTCAP: tl.constexpr):
    """Logits under the soft-cap, and its slope (1 without one)."""
    slope = 1.0
    if HAS_SOFTCAP:
        tanh = 1.0 - 2.0 / (tl.exp2(z * (2.0 * LOG2E / softcap)) + 1.0)
        slope = 1.0 - tanh * tanh
        z = softcap * tanh
    return z, slope


@triton.jit
def _place(N, segments, ROWS: tl.constexpr):
    """Rows and segment of this program. Behind the last row stands the last row again, which writes what it writes anyway."""
    rows = tl.program_id(0) // segments * ROWS + tl.arange(0, ROWS)
    return tl.minimum(rows, N - 1), tl.program_id(0) % segments


@triton.jit
def _in_rows(start, columns, stride, rows):
    return rows.to(tl.int64)[:, None] * stride + (start + columns)[None, :]


@triton.jit
def _any(found):
    return tl.max(found.to(tl.int32), axis=0) > 0


@triton.jit
def _logits(z, bias, columns, softcap, HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr):
    """A segment before the temperature, with its slope. z: pointers. bias: of as many columns as the segments have."""
    y = tl.load(z)
    if HAS_BIAS:
        y += tl.load(bias + columns).to(tl.float32)[None, :]
    return capped(y, softcap, HAS_SOFTCAP)


@triton.jit
def _power_of_two(n):
    """2^n exactly, n whole; 0 below what fp32 has."""
    bits = (tl.minimum(tl.maximum(n, -127.0), 127.0).to(tl.int32) + 127) << 23
    return bits.to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=["N", "width", "segments", "first"])
def chunk_stats(
    z,
    bias,
    targets,
    inverse_temperature,
    tops,
    others,
    weighted,
    target_logits,
    kept,
    N,
    width,
    segments,
    first,
    stride,
    kept_stride,
    softcap,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    ENTROPY: tl.constexpr,
    KEEP: tl.constexpr,
    ROWS: tl.constexpr,
    SEGMENT: tl.constexpr,
):
    """Of each segment and row, without the target: k (whole, a bound on x), the sum of 2^(x - k) and that of (x - k) 2^(x - k), into
    [segments, N]; the target's logit; and where KEEP, 2^(x - k) times the slope of the soft-cap, rounded to kept's type."""
    rows, segment = _place(N, segments, ROWS)
    columns, start = tl.arange(0, SEGMENT), segment * SEGMENT
    places = _in_rows(start, columns, stride, rows)
    y, slope = _logits(z + places, bias, start + columns, softcap, HAS_BIAS, HAS_SOFTCAP)
    inverse = tl.load(inverse_temperature + rows)
    target = tl.load(targets + rows) - first - start
    if start + SEGMENT > width:
        y = tl.where((start + columns < width)[None, :], y, float("-inf"))
    here = (target >= 0) & (target < tl.minimum(SEGMENT, width - start))
    if _any(here):
        at_target = columns[None, :] == target[:, None]
        tl.store(target_logits + rows, tl.sum(tl.where(at_target, y, 0.0), axis=1) * inverse, mask=here)
        y = tl.where(at_target, float("-inf"), y)
    scale = inverse * LOG2E
    top = tl.maximum(tl.ceil(tl.max(y, axis=1) * scale), LOWEST)
    shifted = y * scale[:, None] - top[:, None]
    p = tl.exp2(shifted)
    place = segment.to(tl.int64) * N + rows
    tl.store(tops + place, top)
    tl.store(others + place, tl.sum(p, axis=1))
    if ENTROPY:
        tl.store(weighted + place, tl.sum(p * tl.maximum(shifted, LEAST), axis=1))
    if KEEP:
        tl.store(kept + _in_rows(start, columns, kept_stride, rows), (p * slope).to(kept.dtype.element_ty))


@triton.jit(do_not_specialize=["N", "S"])
def merge_segments(
    tops,
    others,
    weighted,
    top_N,
    others_N,
    weighted_N,
    N,
    S,
    ENTROPY: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Folds [S, N] into [N], in an order that N has no part in, and from powers of two into exponentials."""
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    top = tl.full((BLOCK_N,), LOWEST, dtype=tl.float32)
    total = tl.zeros((BLOCK_N,), dtype=tl.float32)
    total_weighted = tl.zeros((BLOCK_N,), dtype=tl.float32)
    for start in range(0, S, BLOCK_S):
        segments = start + tl.arange(0, BLOCK_S)
        inside = (segments < S)[:, None] & (rows < N)[None, :]
        places = segments.to(tl.int64)[:, None] * N + rows[None, :]
        here = tl.load(tops + places, mask=inside, other=LOWEST)
        more = tl.load(others + places, mask=inside, other=0.0)
        new_top = tl.maximum(top, tl.max(here, axis=0))
        mine, theirs = tl.exp2(top - new_top), tl.exp2(here - new_top[None, :])
        if ENTROPY:
            more_weighted = tl.load(weighted + places, mask=inside, other=0.0)
            more_weighted += more * tl.maximum(here - new_top[None, :], LEAST)
            total_weighted = (total_weighted + total * tl.maximum(top - new_top, LEAST)) * mine
            total_weighted += tl.sum(more_weighted * theirs, axis=0)
        total = total * mine + tl.sum(more * theirs, axis=0)
        top = new_top
    tl.store(top_N + rows, top * LN2, mask=rows < N)
    tl.store(others_N + rows, total, mask=rows < N)
    if ENTROPY:
        tl.store(weighted_N + rows, total_weighted * LN2, mask=rows < N)


@triton.jit(do_not_specialize=["N", "segments", "first"])
def chunk_dz(
    z,
    bias,
    targets,
    inverse_temperature,
    exponent,
    factor,
    at_target,
    lse,
    dlogp,
    dentropy,
    entropy,
    dz,
    N,
    segments,
    first,
    stride,
    softcap,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    ENTROPY: tl.constexpr,
    ROWS: tl.constexpr,
    SEGMENT: tl.constexpr,
):
    """The chunk's gradient from its logits, divided by `factor` and by 2^(K - log2 sum 2^x), K = `exponent`; rows of factor 0 are 0. dz may
    be z."""
    rows, segment = _place(N, segments, ROWS)
    columns, start = tl.arange(0, SEGMENT), segment * SEGMENT
    places = _in_rows(start, columns, stride, rows)
    flows = tl.load(factor + rows) != 0.0
    if _any(flows):
        y, slope = _logits(z + places, bias, start + columns, softcap, HAS_BIAS, HAS_SOFTCAP)
        inverse = tl.load(inverse_temperature + rows)
        grad = tl.exp2(y * (inverse * LOG2E)[:, None] - tl.load(exponent + rows)[:, None])
        if ENTROPY:
            surprise = tl.maximum(y * inverse[:, None] - tl.load(lse + rows)[:, None], LEAST * LN2)
            surprise += tl.load(entropy + rows)[:, None]
            grad *= tl.load(dlogp + rows)[:, None] + tl.load(dentropy + rows)[:, None] * surprise
        _store_dz(dz + places, grad, slope, columns, start, rows, targets, first, at_target, flows, ROWS, SEGMENT)
    else:
        tl.store(dz + places, tl.zeros((ROWS, SEGMENT), dtype=dz.dtype.element_ty))


@triton.jit
def _store_dz(
    out, grad, slope, columns, start, rows, targets, first, at_target, flows, ROWS: tl.constexpr, SEGMENT: tl.constexpr
):
    """grad, but for the target's, times the slope."""
    target = tl.load(targets + rows) - first - start
    if _any((target >= 0) & (target < SEGMENT)):
        grad = tl.where(columns[None, :] == target[:, None], tl.load(at_target + rows)[:, None], grad)
    grad *= slope
    if ROWS > 1:
        grad = tl.where(flows[:, None], grad, 0.0)
    tl.store(out, grad.to(out.dtype.element_ty))


@triton.jit(do_not_specialize=["N", "num_kept", "segments", "first"])
def kept_dz(
    kept,
    tops,
    places,
    targets,
    exponent,
    factor,
    at_target,
    dz,
    N,
    num_kept,
    segments,
    first,
    kept_stride,
    stride,
    HAS_PLACES: tl.constexpr,
    ROWS: tl.constexpr,
    SEGMENT: tl.constexpr,
):
    """The same from what chunk_stats kept of num_kept rows: multiplying by a power of two rounds nothing. places: the rows' own there."""
    rows, segment = _place(N, segments, ROWS)
    columns, start = tl.arange(0, SEGMENT), segment * SEGMENT
    out = dz + _in_rows(start, columns, stride, rows)
    flows = tl.load(factor + rows) != 0.0
    if _any(flows):
        place = rows
        if HAS_PLACES:
            place = tl.load(places + rows)
        top = tl.load(tops + segment.to(tl.int64) * num_kept + place)
        grad = tl.load(kept + _in_rows(start, columns, kept_stride, place)).to(tl.float32)
        grad *= _power_of_two(top - tl.load(exponent + rows))[:, None]
        _store_dz(out, grad, 1.0, columns, start, rows, targets, first, at_target, flows, ROWS, SEGMENT)
    else:
        tl.store(out, tl.zeros((ROWS, SEGMENT), dtype=dz.dtype.element_ty))
