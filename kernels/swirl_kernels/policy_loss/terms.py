"""What policy_loss computes of one token, in Triton: bounds, KL estimates, surrogates, corrections. Used by both kernels."""

from __future__ import annotations

import math

import triton
import triton.language as tl
from torch import Tensor

from swirl_kernels.policy_loss.spec import STEP_SUM_BOUNDS, PolicyLossSpec

LOG_LEAST = tl.constexpr(STEP_SUM_BOUNDS[0])
LOG2_E = tl.constexpr(1 / math.log(2))
SERIES_BELOW = tl.constexpr(0.5)  # |x| up to which exp(x) - 1 - x is a series


@triton.jit
def exp(x):
    return tl.exp2(x * LOG2_E)


@triton.jit
def clip(x, low, high):
    """NaN stays NaN."""
    return tl.where(x < low, low, tl.where(x > high, high, x))


@triton.jit
def log_weight(x):
    return clip(tl.log(x), LOG_LEAST, 20.0)


@triton.jit
def kl_terms(x, limit, KL: tl.constexpr, LIMITED: tl.constexpr = True):
    """The estimate and its derivative by logp; x: ref_logp - logp."""
    if KL == "k1":
        kl = -x
        slope = x * 0.0 + 1.0
    elif KL == "k2":
        kl = x * x * 0.5
        slope = -x
    else:
        # x^2 (1/2! + x/3! + x^2/4! + …): policy and reference are close, so that the difference would cancel. Seven terms leave
        # 4e-8 of it at |x| = 0.5, where the difference has lost 8e-7.
        series = x * (1.0 / 40320.0) + 1.0 / 5040.0
        series = x * series + 1.0 / 720.0
        series = x * series + 1.0 / 120.0
        series = x * series + 1.0 / 24.0
        series = x * series + 1.0 / 6.0
        series = x * series + 0.5
        kl = tl.where(tl.abs(x) < SERIES_BELOW, x * x * series, exp(x) - 1.0 - x)
        slope = -(x + kl)
    if LIMITED:
        slope = tl.where(tl.abs(kl) > limit, 0.0, slope)
        kl = clip(kl, -limit, limit)
    return kl, slope


@triton.jit
def surrogate(r, adv, now, log_ratio, used, low, high, dual_clip, CLIP: tl.constexpr, SOFT: tl.constexpr):
    """f(r, A), its derivative by logp, and which tokens the lower, the upper and the dual bound act on."""
    value = r * adv
    flow = value
    below = used & (r < r)  # nowhere
    above = below
    beyond = below
    if CLIP == "sapo":
        tau = tl.where(adv > 0.0, SOFT[0], SOFT[1])
        gate = tl.sigmoid(tau * (r - 1.0))
        other = tl.sigmoid(tau * (1.0 - r))
        value = 4.0 / tau * gate * adv
        flow = tl.where(other > 0.0, 4.0 * gate * other * r * adv, 0.0)
    elif CLIP == "vespo":
        k = tl.where(adv >= 0.0, SOFT[0], SOFT[2])
        scale = tl.maximum(tl.where(adv >= 0.0, SOFT[1], SOFT[3]), 1e-4)
        flow = exp(scale * (1.0 - r) + k * log_ratio) * adv
        value = flow * now
    elif CLIP != "none":
        bounded = clip(r, low, high)
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
            flow = tl.where(stopped, 0.0, flow)
    return value, flow, below, above, beyond


@triton.jit
def correction(c, gate, used, low, high, CORRECTION: tl.constexpr):
    """ω from c, and whether the correction changed it; gate: the c that is held against the bounds."""
    within = (gate >= low) & (gate <= high)
    if CORRECTION == "tis":
        omega = clip(c, low, high)
    elif CORRECTION == "icepop":
        omega = tl.where(within, c, 0.0)
    else:
        omega = tl.where(within, 1.0, 0.0)
    return tl.where(used, omega, 0.0), used & (within == 0)


def soft_numbers(spec: PolicyLossSpec) -> tuple[float, ...] | None:
    """Known when the kernel is compiled, so that kernels without them are what they would be if there were no such clips."""
    return {"sapo": spec.sapo, "vespo": spec.vespo}.get(spec.clip)


def kind(x: Tensor | None, tokens: int) -> str:
    """What x has one of: "token", "segment", "scalar" (for all) or "none"."""
    if x is None:
        return "none"
    return "scalar" if not x.dim() else "token" if len(x) == tokens else "segment"
