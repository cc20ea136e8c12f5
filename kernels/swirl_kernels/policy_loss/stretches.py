"""policy_loss in Triton where every token has its own ratio: one warp a stretch of tokens, whatever the segments.

Legend: N tokens, A segments, P programs.

A program finds the segment that owns its first token, walks on from there a block of tokens at a time, never across the end of a
segment, and keeps all sums per lane; lanes meet once, at its end. Where nothing belongs to a segment (offsets=None) or every segment
is one token, blocks are whole. The length of a stretch follows from N alone, so that sums do not depend on the device.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from swirl_kernels.policy_loss.spec import SUMS, PolicyLossSpec
from swirl_kernels.policy_loss.terms import correction, exp, kind, kl_terms, soft_numbers, surrogate
from swirl_kernels.segment_reduce.stretches import first_segment, levels, piece, wrong_segments

BLOCK, DENSE_BLOCK = 64, 128  # tokens of one warp at a time, between ends of segments and without any
PROGRAMS = 4224  # at most: 32 on each of 132 multiprocessors
SHORTEST = 128  # tokens of a stretch at least


@triton.jit
def _read(pointer, lanes, inside, KIND: tl.constexpr):
    """fp32 of a block's tokens, anything outside of it; of its segment or of all tokens where KIND says so; 1 where there is none."""
    if KIND == "none":
        x = tl.full(lanes.shape, 1.0, dtype=tl.float32)
    elif KIND == "token":
        x = tl.load(pointer + lanes, mask=inside).to(tl.float32)
    else:
        x = tl.zeros(lanes.shape, dtype=tl.float32) + tl.load(pointer).to(tl.float32)
    return x


@triton.jit
def _block(
    logp, old, advantage, weight, ref, behaviour, given, slope, lanes, inside, owned,
    losses, used_tokens, below_tokens, above_tokens, dual_tokens, kls, ratios, importances, squares, truncated, top,
    scale, low, high, dual_clip, kl_coef, kl_limit, correction_low, correction_high,
    CLIP: tl.constexpr, KL: tl.constexpr, KL_ACTS: tl.constexpr, KL_LIMITED: tl.constexpr, CORRECTION: tl.constexpr,
    KL_IMPORTANCE: tl.constexpr, SOFT: tl.constexpr, WEIGHT: tl.constexpr, IMPORTANCE: tl.constexpr, ADVANTAGE: tl.constexpr,
    METRICS: tl.constexpr, HAS_SLOPE: tl.constexpr,
):  # fmt: skip
    """The sums with the tokens of one block, whose pointers these are. Tokens that nobody owns get NaN for a slope.

    What stands beside a token of weight 0 is computed with and selected away at the end."""
    w = _read(weight, lanes, inside, WEIGHT)
    used = inside & owned & (w != 0.0)
    now = _read(logp, lanes, inside, "token")
    before = _read(old, lanes, inside, "token")
    adv = _read(advantage, lanes, inside, ADVANTAGE)
    r = exp(now - before)
    value, flow, below, above, beyond = surrogate(r, adv, now, 0.0, used, low, high, dual_clip, CLIP, SOFT)
    # A ratio that overflowed must not reach the loss as 0 * inf through a token that has no say.
    acting = adv != 0.0
    if CORRECTION != "none":
        c = exp(before - _read(behaviour, lanes, inside, "token"))
        omega, changed = correction(c, c, used, correction_low, correction_high, CORRECTION)
        if METRICS:
            truncated += tl.where(changed, 1.0, 0.0)
    elif IMPORTANCE != "none":
        omega = tl.where(used, _read(given, lanes, inside, IMPORTANCE), 0.0)
    if CORRECTION != "none" or IMPORTANCE != "none":
        acting = acting & (omega != 0.0)
        value *= omega
        flow *= omega
    loss = tl.where(acting, -value, 0.0)
    gradient = tl.where(acting, -flow, 0.0)
    if KL != "none":
        x = _read(ref, lanes, inside, "token") - now
        kl, kl_slope = kl_terms(x, kl_limit, KL, KL_LIMITED)
        if KL_IMPORTANCE:
            kl = r * kl
            kl_slope = r * kl_slope + kl
        if KL_ACTS:
            loss += kl_coef * kl
            gradient += kl_coef * kl_slope
        if METRICS:
            kls += tl.where(used, kl, 0.0)
    w *= scale
    losses += tl.where(used, w * loss, 0.0)
    if HAS_SLOPE:
        tl.store(slope + lanes, tl.where(used, w * gradient, tl.where(owned, 0.0, float("nan"))), mask=inside)
    if METRICS:
        used_tokens += tl.where(used, 1.0, 0.0)
        if CLIP == "ppo" or CLIP == "dual" or CLIP == "cispo":
            below_tokens += tl.where(below, 1.0, 0.0)
            above_tokens += tl.where(above, 1.0, 0.0)
        if CLIP == "dual":
            dual_tokens += tl.where(beyond, 1.0, 0.0)
        r = tl.where(used, r, 0.0)
        ratios += r
        v = r
        if CORRECTION != "none" or IMPORTANCE != "none":
            v = tl.where(omega != 0.0, r * omega, 0.0)
            importances += v
        squares += v * v
        top = tl.maximum(top, r)
    return losses, used_tokens, below_tokens, above_tokens, dual_tokens, kls, ratios, importances, squares, truncated, top


@triton.jit(do_not_specialize=["tokens", "segments", "blocks"])
def stretch_kernel(
    logp, old, advantage, weight, ref, behaviour, given, offsets, slope, partial, tokens, segments, blocks,
    scale, low, high, dual_clip, kl_coef, kl_limit, correction_low, correction_high,
    CLIP: tl.constexpr, KL: tl.constexpr, KL_ACTS: tl.constexpr, KL_LIMITED: tl.constexpr, CORRECTION: tl.constexpr,
    KL_IMPORTANCE: tl.constexpr, SOFT: tl.constexpr, WEIGHT: tl.constexpr, IMPORTANCE: tl.constexpr, ADVANTAGE: tl.constexpr,
    METRICS: tl.constexpr, HAS_SLOPE: tl.constexpr, LAYOUT: tl.constexpr, LEVELS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """partial [11, P]: loss, the nine sums of SUMS, the largest ratio. slope [N]: d loss / d logp.

    LAYOUT: "segments" by offsets; "units", segments of one token each; "tokens", no segments. blocks: of a stretch.
    WEIGHT, IMPORTANCE, ADVANTAGE: "token", "segment", "scalar" (weight alone) or "none"."""
    program = tl.program_id(0)
    lanes = tl.arange(0, BLOCK)
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
    wrong = tl.zeros((BLOCK,), dtype=tl.int32)

    start = program.to(tokens.dtype) * blocks * BLOCK
    stop = tl.minimum(start + blocks * BLOCK, tokens)
    if LAYOUT == "segments":
        wrong += wrong_segments(offsets, tokens, segments, BLOCK)
        cursor = start
        segment = first_segment(offsets, start, segments, LEVELS)
        begin = tl.load(offsets + segment).to(tokens.dtype)
        end = tl.load(offsets + tl.minimum(segment + 1, segments)).to(tokens.dtype)
        until, owned = piece(begin, end, segment, cursor, stop, tokens, segments)
        while cursor < stop:
            ahead = tl.load(offsets + tl.minimum(segment + 2, segments)).to(tokens.dtype)
            at = tl.minimum(segment, segments - 1)
            losses, used_tokens, below_tokens, above_tokens, dual_tokens, kls, ratios, importances, squares, truncated, top = _block(
                logp + cursor, old + cursor, advantage + (cursor if ADVANTAGE == "token" else at),
                None if WEIGHT == "none" else weight + (cursor if WEIGHT == "token" else at if WEIGHT == "segment" else 0),
                None if KL == "none" else ref + cursor, None if CORRECTION == "none" else behaviour + cursor,
                None if IMPORTANCE == "none" else given + (cursor if IMPORTANCE == "token" else at),
                slope + cursor if HAS_SLOPE else None, lanes, lanes < until - cursor, owned,
                losses, used_tokens, below_tokens, above_tokens, dual_tokens, kls, ratios, importances, squares, truncated, top,
                scale, low, high, dual_clip, kl_coef, kl_limit, correction_low, correction_high,
                CLIP, KL, KL_ACTS, KL_LIMITED, CORRECTION, KL_IMPORTANCE, SOFT, WEIGHT, IMPORTANCE, ADVANTAGE, METRICS, HAS_SLOPE,
            )  # fmt: skip
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
                    end = tl.load(offsets + tl.minimum(segment + 1, segments)).to(tokens.dtype)
                until, owned = piece(begin, end, segment, cursor, stop, tokens, segments)
    else:
        for cursor in range(start, stop, BLOCK):
            inside = lanes < stop - cursor
            owned = inside
            if LAYOUT == "units":
                place = cursor + lanes
                begin = tl.load(offsets + place, mask=inside, other=0)
                end = tl.load(offsets + place + 1, mask=inside, other=0)
                owned = (begin == place) & (end == place + 1)
                wrong += tl.where(inside & (owned == 0), 1, 0)
            losses, used_tokens, below_tokens, above_tokens, dual_tokens, kls, ratios, importances, squares, truncated, top = _block(
                logp + cursor, old + cursor, advantage + cursor,
                None if WEIGHT == "none" else weight + (cursor if WEIGHT == "token" else 0),
                None if KL == "none" else ref + cursor, None if CORRECTION == "none" else behaviour + cursor,
                None if IMPORTANCE == "none" else given + cursor, slope + cursor if HAS_SLOPE else None, lanes, inside, owned,
                losses, used_tokens, below_tokens, above_tokens, dual_tokens, kls, ratios, importances, squares, truncated, top,
                scale, low, high, dual_clip, kl_coef, kl_limit, correction_low, correction_high,
                CLIP, KL, KL_ACTS, KL_LIMITED, CORRECTION, KL_IMPORTANCE, SOFT, WEIGHT, IMPORTANCE, ADVANTAGE, METRICS, HAS_SLOPE,
            )  # fmt: skip

    if CORRECTION == "none" and IMPORTANCE == "none":
        importances = ratios
    programs = tl.num_programs(0)
    place = partial + program
    tl.store(place, tl.where(tl.sum(wrong) == 0, tl.sum(losses), float("nan")))
    if METRICS:
        tl.store(place + 1 * programs, tl.sum(used_tokens))
        tl.store(place + 2 * programs, tl.sum(below_tokens))
        tl.store(place + 3 * programs, tl.sum(above_tokens))
        tl.store(place + 4 * programs, tl.sum(dual_tokens))
        tl.store(place + 5 * programs, tl.sum(kls))
        tl.store(place + 6 * programs, tl.sum(ratios))
        tl.store(place + 7 * programs, tl.sum(importances))
        tl.store(place + 8 * programs, tl.sum(squares))
        tl.store(place + 9 * programs, tl.sum(truncated))
        tl.store(place + 10 * programs, tl.max(top))


def stretch_loss(
    logp: Tensor,
    old: Tensor,
    advantage: Tensor,
    weight: Tensor | None,
    ref: Tensor | None,
    behaviour: Tensor | None,
    importance: Tensor | None,
    offsets: Tensor | None,
    spec: PolicyLossSpec,
    differentiable: bool,
    scale: float,
    metrics: bool,
) -> tuple[Tensor, Tensor | None]:
    """partial [11, P] (all but its first row unwritten without metrics) and d loss / d logp [N]."""
    tokens, segments = len(logp), 0 if offsets is None else len(offsets) - 1
    layout = "tokens" if offsets is None else "units" if segments == tokens else "segments"
    block = BLOCK if layout == "segments" else DENSE_BLOCK
    blocks = max(triton.cdiv(SHORTEST, block), triton.cdiv(tokens, block * PROGRAMS))
    programs = max(1, triton.cdiv(tokens, blocks * block))
    slope = torch.empty(tokens, dtype=torch.float32, device=logp.device) if differentiable else None
    partial = torch.empty(len(SUMS) + 2, programs, dtype=torch.float32, device=logp.device)
    low, high = spec.ratio_bounds
    acts = spec.kl_coef != 0
    stretch_kernel[(programs,)](
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
        blocks,
        scale,
        low,
        high,
        spec.dual_clip,
        spec.kl_coef,
        spec.kl_limit,
        spec.correction_low,
        spec.correction_high,
        CLIP=spec.clip,
        KL=spec.kl if metrics or acts else "none",
        KL_ACTS=acts,
        KL_LIMITED=math.isfinite(spec.kl_limit),
        CORRECTION=spec.correction,
        KL_IMPORTANCE=spec.kl_importance,
        SOFT=soft_numbers(spec),
        WEIGHT=kind(weight, tokens),
        IMPORTANCE=kind(importance, tokens),
        ADVANTAGE=kind(advantage, tokens),
        METRICS=metrics,
        HAS_SLOPE=differentiable,
        LAYOUT=layout,
        LEVELS=levels(segments),
        BLOCK=block,
        num_warps=1,
    )
    return partial, slope
