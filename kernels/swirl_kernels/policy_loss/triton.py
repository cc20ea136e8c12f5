"""policy_loss in Triton: one program a segment, loss, metrics and gradient in one launch.

Legend: N tokens, A segments.

A program goes through its segment's tokens a block at a time, once more where the ratio or the correction needs a mean over the
step first, and once more where the gradient does (ratio "step"); a segment of one block stays in the cache. Sums are kept per
lane, added up once and written to the segment's own place; adding up the segments is torch's, in float64.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from swirl_kernels.policy_loss.spec import STEP_SUM_BOUNDS, SUMS, PolicyLossSpec
from swirl_kernels.segment_reduce.triton import bounds

BLOCK = 256  # one token a lane: with two some specs spill (8 to 24 B)
WARPS = 8
LOG_LEAST = tl.constexpr(STEP_SUM_BOUNDS[0])
SERIES_BELOW = tl.constexpr(0.5)  # |x| up to which exp(x) - 1 - x is a series


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


@triton.jit
def _clip(x, low, high):
    """NaN stays NaN."""
    return tl.where(x < low, low, tl.where(x > high, high, x))


@triton.jit
def _log_weight(x):
    return _clip(tl.log(x), LOG_LEAST, 20.0)


@triton.jit
def _kl(x, limit, KL: tl.constexpr):
    """The estimate and its derivative by logp; x: ref_logp - logp."""
    if KL == "k1":
        kl = -x
        slope = x * 0.0 + 1.0
    elif KL == "k2":
        kl = x * x * 0.5
        slope = -x
    else:
        # x^2/2 (1 + x/3 (1 + x/4 (…))): policy and reference are close, so that the difference would cancel
        series = x * (1.0 / 11.0) + 1.0
        series = x * (1.0 / 10.0) * series + 1.0
        series = x * (1.0 / 9.0) * series + 1.0
        series = x * (1.0 / 8.0) * series + 1.0
        series = x * (1.0 / 7.0) * series + 1.0
        series = x * (1.0 / 6.0) * series + 1.0
        series = x * (1.0 / 5.0) * series + 1.0
        series = x * (1.0 / 4.0) * series + 1.0
        series = x * (1.0 / 3.0) * series + 1.0
        kl = tl.where(tl.abs(x) < SERIES_BELOW, x * x * 0.5 * series, tl.exp(x) - 1.0 - x)
        slope = -(x + kl)
    return _clip(kl, -limit, limit), tl.where(tl.abs(kl) > limit, 0.0, slope)


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
    begin, end, right = bounds(offsets, tokens, segments, False)
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
                drifts += _clip(_values(logp, position, used) - o, -20.0, 20.0)
                if IMPORTANCE == "token":
                    drifts += tl.where(used, _log_weight(_values(given, position, used)), 0.0)
            elif RATIO != "token":
                drifts += _values(logp, position, used) - o
            if CORRECTION != "none" and (LEVEL != "token" or GATE != "token"):
                gaps += o - _values(behaviour, position, used)
        count = tl.maximum(tl.sum(counts), 1.0)
        if RATIO == "step_sum":
            mean = tl.sum(drifts)
            if IMPORTANCE == "segment":
                mean += _log_weight(tl.load(given + segment).to(tl.float32))
            mean = _clip(mean, LOG_LEAST, 20.0)
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
        w = tl.where(used, w, 0.0)
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
        value = r * adv
        flow = value
        if CLIP == "sapo":
            tau = tl.where(adv > 0.0, SOFT[0], SOFT[1])
            gate = tl.sigmoid(tau * (r - 1.0))
            other = tl.sigmoid(tau * (1.0 - r))
            value = 4.0 / tau * gate * adv
            flow = tl.where(other > 0.0, 4.0 * gate * other * r * adv, 0.0)
        elif CLIP == "vespo":
            k = tl.where(adv >= 0.0, SOFT[0], SOFT[2])
            scale = tl.maximum(tl.where(adv >= 0.0, SOFT[1], SOFT[3]), 1e-4)
            flow = tl.exp(scale * (1.0 - r) + k * mean) * adv
            value = flow * now
        elif CLIP != "none":
            bounded = _clip(r, low, high)
            below = used & (r < low)
            above = used & (r > high)
            if CLIP == "cispo":
                flow = bounded * adv
                value = flow * now
            else:
                below = below & (adv < 0.0)
                above = above & (adv > 0.0)
                stopped = below | above
                value = tl.where(stopped, bounded * adv, value)
                if CLIP == "dual":
                    beyond = used & (r > dual_clip) & (adv < 0.0)
                    value = tl.where(beyond, dual_clip * adv, value)
                    stopped = stopped | beyond
                    dual_tokens += tl.where(beyond, 1.0, 0.0)
                flow = tl.where(stopped, 0.0, flow)
            below_tokens += tl.where(below, 1.0, 0.0)
            above_tokens += tl.where(above, 1.0, 0.0)
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
            if GATE == LEVEL:
                within = (c >= correction_low) & (c <= correction_high)
            else:
                if GATE == "token":
                    held = tl.exp(o - _values(behaviour, position, used))
                else:
                    held = tl.exp(tl.zeros((BLOCK,), dtype=tl.float32) + gate_gap)
                within = (held >= correction_low) & (held <= correction_high)
            if CORRECTION == "tis":
                c = _clip(c, correction_low, correction_high)
            elif CORRECTION == "icepop":
                c = tl.where(within, c, 0.0)
            else:
                c = tl.where(within, 1.0, 0.0)
            omega = tl.where(used, c, 0.0)
            truncated += tl.where(used & (within == 0), 1.0, 0.0)
        # A ratio that overflowed must not reach the loss as 0 * inf through a token that has no say.
        acting = (omega != 0.0) & (adv != 0.0)
        loss = tl.where(acting, -omega * value, 0.0)
        flow = tl.where(acting, w * omega * flow, 0.0)
        gradient = -flow
        if KL != "none":
            kl, kl_slope = _kl(_values(ref, position, used) - now, kl_limit, KL)
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
            gradient = tl.zeros((BLOCK,), dtype=tl.float32) - shared
            if KL != "none":
                x = _values(ref, position, used) - _values(logp, position, used)
                _, kl_slope = _kl(x, kl_limit, KL)
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


def policy_loss_triton(
    logp: Tensor,
    old: Tensor,
    advantage: Tensor,
    offsets: Tensor,
    weight: Tensor | None,
    ref: Tensor | None,
    behaviour: Tensor | None,
    importance: Tensor | None,
    spec: PolicyLossSpec,
    differentiable: bool,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """loss [] and d loss / d logp [N] (None unless differentiable) in fp32, sums [9] and ratio_max [] in float64."""
    tokens, segments = len(logp), len(offsets) - 1
    # Tokens that wrong offsets leave out keep the NaN.
    slope = torch.full((tokens,), math.nan, dtype=torch.float32, device=logp.device) if differentiable else None
    partial = torch.empty(len(SUMS) + 2, segments, dtype=torch.float32, device=logp.device)
    if not segments:
        zeros = partial.new_zeros(len(SUMS), dtype=torch.float64)
        return zeros.new_full((), math.nan if tokens else 0.0).float(), slope, zeros, zeros[0].clone()
    inputs = (logp, old, advantage, weight, ref, behaviour, importance)
    logp, old, advantage, weight, ref, behaviour, importance = (None if x is None else x.contiguous() for x in inputs)  # type: ignore[assignment]
    low, high = spec.ratio_bounds
    with torch.cuda.device_of(logp):
        _policy_loss_kernel[(segments,)](
            logp,
            old,
            advantage,
            weight,
            ref,
            behaviour,
            importance,
            offsets.contiguous(),
            slope,
            partial,
            tokens,
            segments,
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
            WEIGHT=_kind(weight, tokens),
            IMPORTANCE=_kind(importance, tokens),
            ADVANTAGE_PER_TOKEN=len(advantage) == tokens,
            UNIT=segments == tokens,
            HAS_SLOPE=differentiable,
            BLOCK=BLOCK,
            num_warps=WARPS,
        )
    sums = partial[:-1].sum(1, dtype=torch.float64)
    return sums[0].float(), slope, sums[1:], partial[-1].amax().double()


def soft_numbers(spec: PolicyLossSpec) -> tuple[float, ...] | None:
    """Known when the kernel is compiled, so that kernels without them are what they would be if there were no such clips."""
    return {"sapo": spec.sapo, "vespo": spec.vespo}.get(spec.clip)


def _kind(weight: Tensor | None, tokens: int) -> str:
    if weight is None:
        return "none"
    return "scalar" if not weight.dim() else "token" if len(weight) == tokens else "segment"
