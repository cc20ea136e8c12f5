"""policy_loss in Triton: which kernel runs, and the one for losses that need a mean over a segment first, a program a segment.

Legend: N tokens, A segments.

A program goes through its segment's tokens a block at a time, once for the mean over the step that the ratio or the correction
needs, once for the loss, and once more where the gradient does (ratio "step"); a segment of one block stays in the cache. Sums are
kept per lane, added up once and written to the segment's own place; adding up the segments is torch's, in float64. Losses whose
tokens stand for themselves take the kernel in stretches.py.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from swirl_kernels.policy_loss.spec import SUMS, PolicyLossSpec
from swirl_kernels.policy_loss.stretches import stretch_loss
from swirl_kernels.policy_loss.terms import LOG_LEAST, clip, correction, kind, kl_terms, log_weight, soft_numbers, surrogate
from swirl_kernels.segment_reduce.stretches import is_right

BLOCK = 256  # one token a lane: with two some specs spill (8 to 24 B)
WARPS = 8
SCALE_BLOCK, SCALE_PROGRAMS = 4096, 528


@triton.jit
def _weights(weight, segment, position, inside, WEIGHT: tl.constexpr):
    """fp32 weights of a block, and which of its tokens are used."""
    if WEIGHT == "token":
        w = tl.load(weight + position, mask=inside, other=0.0).to(tl.float32)
    elif WEIGHT == "segment":
        w = tl.load(weight + segment + position * 0, mask=inside, other=0.0).to(tl.float32)
    elif WEIGHT == "scalar":
        w = tl.load(weight + position * 0, mask=inside, other=0.0).to(tl.float32)
    else:
        w = tl.where(inside, 1.0, 0.0)
    return w, inside & (w != 0.0)


@triton.jit
def _values(pointer, position, used):
    """fp32; what is not used is not read, and 0."""
    return tl.load(pointer + position, mask=used, other=0.0).to(tl.float32)


@triton.jit(
    do_not_specialize=["tokens", "segments"],
    do_not_specialize_on_alignment=[
        "logp", "old", "advantage", "weight", "ref", "behaviour", "given", "offsets", "slope", "partial",
    ],
)  # fmt: skip
def _policy_loss_kernel(
    logp,
    old,
    advantage,
    weight,
    ref,
    behaviour,
    given,
    offsets,
    slope,
    partial,
    tokens,
    segments,
    scale,
    low,
    high,
    dual_clip,
    kl_coef,
    kl_limit,
    correction_low,
    correction_high,
    RATIO: tl.constexpr,
    CLIP: tl.constexpr,
    KL: tl.constexpr,
    CORRECTION: tl.constexpr,
    LEVEL: tl.constexpr,
    GATE: tl.constexpr,
    KL_IMPORTANCE: tl.constexpr,
    SOFT: tl.constexpr,
    WEIGHT: tl.constexpr,
    IMPORTANCE: tl.constexpr,
    ADVANTAGE_PER_TOKEN: tl.constexpr,
    UNIT: tl.constexpr,
    HAS_SLOPE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """partial [11, A]: loss, the nine sums of SUMS, the largest ratio. slope [N]: d loss / d logp.

    UNIT: every segment must be one token. SOFT: the numbers of sapo or vespo."""
    segment = tl.program_id(0)
    begin = tl.load(offsets + segment).to(tl.int64)
    end = tl.load(offsets + segment + 1).to(tl.int64)
    right = is_right(begin, end, segment, tokens, segments)
    begin, end = tl.where(right, begin, 0), tl.where(right, end, 0)
    if UNIT:
        right &= end - begin == 1
        end = tl.where(right, end, begin)
    lanes = tl.arange(0, BLOCK).to(tl.int64)

    SEPARATE_GRADIENT: tl.constexpr = HAS_SLOPE and RATIO == "step" and CLIP != "cispo"
    count = 1.0
    mean = 0.0
    step_gap = 0.0
    gate_gap = 0.0
    if RATIO != "token" or (CORRECTION != "none" and (LEVEL != "token" or GATE != "token")):
        counts = tl.zeros((BLOCK,), dtype=tl.float32)
        drifts = tl.zeros((BLOCK,), dtype=tl.float32)
        gaps = tl.zeros((BLOCK,), dtype=tl.float32)
        for start in range(begin, end, BLOCK):
            position = start + lanes
            _, used = _weights(weight, segment, position, position < end, WEIGHT)
            counts += tl.where(used, 1.0, 0.0)
            o = _values(old, position, used)
            if RATIO == "step_sum":
                drifts += clip(_values(logp, position, used) - o, -20.0, 20.0)
                if IMPORTANCE == "token":
                    drifts += tl.where(used, log_weight(_values(given, position, used)), 0.0)
            elif RATIO != "token":
                drifts += _values(logp, position, used) - o
            if CORRECTION != "none" and (LEVEL != "token" or GATE != "token"):
                gaps += o - _values(behaviour, position, used)
        count = tl.maximum(tl.sum(counts), 1.0)
        if RATIO == "step_sum":
            mean = tl.sum(drifts)
            if IMPORTANCE == "segment":
                mean += log_weight(tl.load(given + segment).to(tl.float32))
            mean = clip(mean, LOG_LEAST, 20.0)
        else:
            mean = tl.sum(drifts) / count
        step_gap = tl.sum(gaps)
        gate_gap = step_gap
        if LEVEL == "step_mean":
            step_gap = step_gap / count
        if GATE == "step_mean":
            gate_gap = gate_gap / count

    losses = tl.zeros((BLOCK,), dtype=tl.float32)
    used_tokens = tl.zeros((BLOCK,), dtype=tl.float32)
    below_tokens = tl.zeros((BLOCK,), dtype=tl.float32)
    above_tokens = tl.zeros((BLOCK,), dtype=tl.float32)
    dual_tokens = tl.zeros((BLOCK,), dtype=tl.float32)
    kls = tl.zeros((BLOCK,), dtype=tl.float32)
    ratios = tl.zeros((BLOCK,), dtype=tl.float32)
    importances = tl.zeros((BLOCK,), dtype=tl.float32)
    squares = tl.zeros((BLOCK,), dtype=tl.float32)
    truncated = tl.zeros((BLOCK,), dtype=tl.float32)
    top = tl.zeros((BLOCK,), dtype=tl.float32)
    step_slope = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in range(begin, end, BLOCK):
        position = start + lanes
        inside = position < end
        w, used = _weights(weight, segment, position, inside, WEIGHT)
        w = tl.where(used, w * scale, 0.0)
        now = _values(logp, position, used)
        o = _values(old, position, used)
        if ADVANTAGE_PER_TOKEN:
            adv = _values(advantage, position, used)
        else:
            adv = _values(advantage, segment + position * 0, used)
        if RATIO == "token":
            r = tl.exp(now - o)
        else:
            r = tl.exp(tl.zeros((BLOCK,), dtype=tl.float32) + mean)
        r = tl.where(used, r, 0.0)
        value, flow, below, above, beyond = surrogate(r, adv, now, mean, used, low, high, dual_clip, CLIP, SOFT)
        below_tokens += tl.where(below, 1.0, 0.0)
        above_tokens += tl.where(above, 1.0, 0.0)
        dual_tokens += tl.where(beyond, 1.0, 0.0)
        omega = tl.where(used, 1.0, 0.0)
        if RATIO != "step_sum":
            if IMPORTANCE == "token":
                omega = _values(given, position, used)
            elif IMPORTANCE == "segment":
                omega = _values(given, segment + position * 0, used)
        if CORRECTION != "none":
            if LEVEL == "token":
                c = tl.exp(o - _values(behaviour, position, used))
            else:
                c = tl.exp(tl.zeros((BLOCK,), dtype=tl.float32) + step_gap)
            gate = c
            if GATE != LEVEL:
                if GATE == "token":
                    gate = tl.exp(o - _values(behaviour, position, used))
                else:
                    gate = tl.exp(tl.zeros((BLOCK,), dtype=tl.float32) + gate_gap)
            omega, changed = correction(c, gate, used, correction_low, correction_high, CORRECTION)
            truncated += tl.where(changed, 1.0, 0.0)
        # A ratio that overflowed must not reach the loss as 0 * inf through a token that has no say.
        acting = (omega != 0.0) & (adv != 0.0)
        loss = tl.where(acting, -omega * value, 0.0)
        flow = tl.where(acting, w * omega * flow, 0.0)
        gradient = -flow
        if KL != "none":
            kl, kl_slope = kl_terms(_values(ref, position, used) - now, kl_limit, KL)
            if KL_IMPORTANCE:
                kl = tl.where(used, r * kl, 0.0)
                kl_slope = r * kl_slope
                through_ratio = tl.where(kl_coef != 0.0, w * kl_coef * kl, 0.0)
                if SEPARATE_GRADIENT:
                    flow -= through_ratio
                else:
                    gradient += through_ratio
            kls += tl.where(used, kl, 0.0)
            loss += tl.where(kl_coef != 0.0, kl_coef * kl, 0.0)
            gradient += tl.where(kl_coef != 0.0, w * kl_coef * kl_slope, 0.0)
        losses += tl.where(used, w * loss, 0.0)
        used_tokens += tl.where(used, 1.0, 0.0)
        ratios += r
        importance = tl.where(omega != 0.0, r * omega, 0.0)
        importances += importance
        squares += importance * importance
        top = tl.maximum(top, r)
        if SEPARATE_GRADIENT:
            step_slope += flow
        elif HAS_SLOPE:
            tl.store(slope + position, tl.where(used, gradient, 0.0), mask=inside)

    if SEPARATE_GRADIENT:
        shared = tl.sum(step_slope) / count
        for start in range(begin, end, BLOCK):
            position = start + lanes
            inside = position < end
            w, used = _weights(weight, segment, position, inside, WEIGHT)
            w *= scale
            gradient = tl.zeros((BLOCK,), dtype=tl.float32) - shared
            if KL != "none":
                x = _values(ref, position, used) - _values(logp, position, used)
                _, kl_slope = kl_terms(x, kl_limit, KL)
                if KL_IMPORTANCE:
                    kl_slope = tl.exp(mean) * kl_slope
                gradient += tl.where(kl_coef != 0.0, w * kl_coef * kl_slope, 0.0)
            tl.store(slope + position, tl.where(used, gradient, 0.0), mask=inside)

    place = partial + segment
    tl.store(place, tl.where(right, tl.sum(losses), float("nan")))
    tl.store(place + 1 * segments, tl.sum(used_tokens))
    tl.store(place + 2 * segments, tl.sum(below_tokens))
    tl.store(place + 3 * segments, tl.sum(above_tokens))
    tl.store(place + 4 * segments, tl.sum(dual_tokens))
    tl.store(place + 5 * segments, tl.sum(kls))
    tl.store(place + 6 * segments, tl.sum(ratios))
    tl.store(place + 7 * segments, tl.sum(importances))
    tl.store(place + 8 * segments, tl.sum(squares))
    tl.store(place + 9 * segments, tl.sum(truncated))
    tl.store(place + 10 * segments, tl.max(top))


@triton.jit(do_not_specialize=["tokens"])
def _scale_kernel(slope, factor, tokens, BLOCK: tl.constexpr):
    """slope [N] times factor [], in place; where that is 1 nothing is read."""
    by = tl.load(factor)
    if by != 1.0:
        first = tl.program_id(0).to(tl.int64) * BLOCK
        for start in range(first, tokens, tl.num_programs(0) * BLOCK):
            place = start + tl.arange(0, BLOCK)
            inside = place < tokens
            tl.store(slope + place, tl.load(slope + place, mask=inside) * by, mask=inside)


def policy_loss_triton(
    logp: Tensor,
    old: Tensor,
    advantage: Tensor,
    offsets: Tensor | None,
    weight: Tensor | None,
    ref: Tensor | None,
    behaviour: Tensor | None,
    importance: Tensor | None,
    spec: PolicyLossSpec,
    differentiable: bool,
    scale: float = 1.0,
    metrics: bool = True,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """loss [] and d loss / d logp [N] (None unless differentiable) in fp32, sums [9] and ratio_max [] in float64."""
    tokens, segments = len(logp), 1 if offsets is None else len(offsets) - 1
    inputs = (logp, old, advantage, weight, ref, behaviour, importance, offsets)
    inputs = tuple(None if x is None else x.contiguous() for x in inputs)  # type: ignore[misc]
    if not segments:
        zeros = torch.zeros(len(SUMS), dtype=torch.float64, device=logp.device)
        slope = torch.full((tokens,), math.nan, device=logp.device) if differentiable else None
        return zeros.new_full((), math.nan if tokens else 0.0).float(), slope, zeros, zeros[0].clone()
    run = stretch_loss if spec.by_token else _segment_loss
    with torch.cuda.device_of(logp):
        partial, slope = run(*inputs, spec, differentiable, scale, metrics)  # type: ignore[operator]
    if not metrics:
        zeros = partial.new_zeros(len(SUMS), dtype=torch.float64)
        return partial[0].sum(dtype=torch.float64).float(), slope, zeros, zeros[0].clone()
    sums = partial[:-1].sum(1, dtype=torch.float64)
    return sums[0].float(), slope, sums[1:], partial[-1].amax().double()


def scaled_in_place(slope: Tensor, factor: Tensor) -> Tensor:
    """slope [N] times factor [], fp32, written over it, without a pass over it where the factor is 1. Nothing is read back."""
    tokens = len(slope)
    if tokens:
        with torch.cuda.device_of(slope):
            grid = (min(triton.cdiv(tokens, SCALE_BLOCK), SCALE_PROGRAMS),)
            _scale_kernel[grid](slope, factor.contiguous(), tokens, BLOCK=SCALE_BLOCK, num_warps=WARPS)
    return slope


def _segment_loss(
    logp: Tensor,
    old: Tensor,
    advantage: Tensor,
    weight: Tensor | None,
    ref: Tensor | None,
    behaviour: Tensor | None,
    importance: Tensor | None,
    offsets: Tensor,
    spec: PolicyLossSpec,
    differentiable: bool,
    scale: float,
    metrics: bool,
) -> tuple[Tensor, Tensor | None]:
    """partial [11, A] and the slope; the metrics come with it whether they are wanted or not."""
    tokens, segments = len(logp), len(offsets) - 1
    # Tokens that wrong offsets leave out keep the NaN.
    slope = torch.full((tokens,), math.nan, dtype=torch.float32, device=logp.device) if differentiable else None
    partial = torch.empty(len(SUMS) + 2, segments, dtype=torch.float32, device=logp.device)
    low, high = spec.ratio_bounds
    _policy_loss_kernel[(segments,)](
        logp,
        old,
        advantage,
        weight,
        ref,
        behaviour,
        importance,
        offsets,
        slope,
        partial,
        tokens,
        segments,
        scale,
        low,
        high,
        spec.dual_clip,
        spec.kl_coef,
        spec.kl_limit,
        spec.correction_low,
        spec.correction_high,
        RATIO=spec.ratio,
        CLIP=spec.clip,
        KL=spec.kl,
        CORRECTION=spec.correction,
        LEVEL=spec.correction_level,
        GATE=spec.gate,
        KL_IMPORTANCE=spec.kl_importance,
        SOFT=soft_numbers(spec),
        WEIGHT=kind(weight, tokens),
        IMPORTANCE=kind(importance, tokens),
        ADVANTAGE_PER_TOKEN=len(advantage) == tokens,
        UNIT=segments == tokens,
        HAS_SLOPE=differentiable,
        BLOCK=BLOCK,
        num_warps=WARPS,
    )
    return partial, slope
