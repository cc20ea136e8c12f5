"""policy_loss in plain torch, vectorised over the tokens, with its gradient written out.

Legend: N tokens, A segments.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from swirl_kernels.policy_loss.spec import STEP_SUM_BOUNDS, SUMS, Level, PolicyLossSpec
from swirl_kernels.segment_reduce.eager import segment_sums

SERIES_BELOW = 0.5  # |x| up to which exp(x) - 1 - x is a series; above, the difference keeps its digits


def policy_loss_torch(
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
    """loss [], d loss / d logp [N] (None unless differentiable), sums [9] and ratio_max [] in float64 (zeros without metrics)."""
    offsets = torch.tensor([0, len(logp)], device=logp.device) if offsets is None else offsets
    dtype = torch.promote_types(logp.dtype, torch.float32)
    tokens, lengths = len(logp), offsets.diff()

    def spread(x: Tensor) -> Tensor:
        """[A] -> [N]."""
        return torch.repeat_interleave(x, lengths, output_size=tokens)

    def per_token(x: Tensor) -> Tensor:
        """[], [A] or [N] -> [N] in the loss's dtype."""
        x = x.to(dtype)
        return x.expand(tokens) if not x.dim() else x if len(x) == tokens else spread(x)

    w = logp.new_ones(tokens, dtype=dtype) if weight is None else per_token(weight)
    used = w != 0
    w = w * scale

    def kept(x: Tensor) -> Tensor:
        return torch.where(used, x, 0.0)

    count = segment_sums(used.to(dtype), offsets).clamp(min=1)
    advantage, logp = kept(per_token(advantage)), kept(logp.to(dtype))
    old = kept(old.to(dtype))
    d = logp - old
    if spec.ratio == "step_sum":
        log_ratio = spread(_log_step_ratio(d, importance, used, offsets))
    else:
        log_ratio = d if spec.ratio == "token" else spread(segment_sums(d, offsets) / count)
    ratio = kept(log_ratio.exp())
    value, slope, clipped = _surrogate(ratio, log_ratio, advantage, logp, spec)
    omega, truncated = used.to(dtype), torch.zeros_like(used)
    if importance is not None and spec.ratio != "step_sum":
        omega = kept(per_token(importance))
    if behaviour is not None:
        omega, truncated = _correction(old - kept(behaviour.to(dtype)), count, offsets, spread, spec)
        omega, truncated = kept(omega), truncated & used
    # A ratio that overflowed must not reach the loss as 0 * inf through a token that has no say.
    acting = used & (omega != 0) & (advantage != 0)
    loss, gradient = (torch.where(acting, -w * omega * x, 0.0) for x in (value, slope))
    if spec.ratio == "step" and spec.clip != "cispo":
        gradient = kept(spread(segment_sums(gradient, offsets) / count))
    kl = torch.zeros_like(w)
    if ref is not None:
        kl, kl_slope = _kl(kept(ref.to(dtype)) - logp, spec)
        if spec.kl_importance:
            kl, kl_slope = kept(ratio * kl), kept(ratio * kl_slope)
        if spec.kl_coef != 0:
            if spec.kl_importance:
                through_ratio = kept(w * spec.kl_coef * kl)
                shared = spec.ratio == "step"
                gradient = gradient + (
                    kept(spread(segment_sums(through_ratio, offsets) / count)) if shared else through_ratio
                )
            loss = loss + kept(w * spec.kl_coef * kl)
            gradient = gradient + kept(w * spec.kl_coef * kl_slope)
    weighted = torch.where(omega != 0, ratio * omega, 0.0)
    total = loss.sum(dtype=torch.float64).to(dtype)
    if not metrics:
        zeros = torch.zeros(len(SUMS), dtype=torch.float64, device=logp.device)
        return total, gradient if differentiable else None, zeros, zeros[0].clone()
    counted = (used, *(x & used for x in clipped), kl, ratio, weighted, weighted.square(), truncated)
    sums = torch.stack([x.sum(dtype=torch.float64) for x in counted])
    return total, gradient if differentiable else None, sums, ratio.amax().double() if tokens else sums.new_zeros(())


def _log_step_ratio(d: Tensor, importance: Tensor | None, used: Tensor, offsets: Tensor) -> Tensor:
    """log r of "step_sum", [A]: with the weights, one a token or one a segment, in the product."""
    low, high = STEP_SUM_BOUNDS
    total = segment_sums(d.clamp(-high, high), offsets)
    if importance is not None:
        logs = importance.to(d.dtype).log().clamp(low, high)
        total = total + (segment_sums(torch.where(used, logs, 0.0), offsets) if len(logs) == len(d) else logs)
    return total.clamp(low, high)


def _surrogate(
    ratio: Tensor, log_ratio: Tensor, advantage: Tensor, logp: Tensor, spec: PolicyLossSpec
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor, Tensor]]:
    """f, its derivative by logp (through a token's own ratio), and which of the three bounds acts; [N] each."""
    low, high = spec.ratio_bounds
    nowhere = torch.zeros_like(ratio, dtype=torch.bool)
    if spec.clip == "none":
        return ratio * advantage, ratio * advantage, (nowhere, nowhere, nowhere)
    if spec.clip == "sapo":
        tau = _choose(advantage > 0, spec.sapo, ratio)
        gate, other = torch.sigmoid(tau * (ratio - 1)), torch.sigmoid(tau * (1 - ratio))
        return (
            4 / tau * gate * advantage,
            torch.where(other > 0, 4 * gate * other * ratio * advantage, 0.0),
            (nowhere,) * 3,
        )
    if spec.clip == "vespo":
        k, scale = (_choose(advantage >= 0, spec.vespo[i::2], ratio) for i in range(2))
        phi = (scale.clamp(min=1e-4) * (1 - ratio) + k * log_ratio).exp()
        return phi * advantage * logp, phi * advantage, (nowhere,) * 3
    bounded = ratio.clamp(low, high)
    below, above = ratio < low, ratio > high
    if spec.clip == "cispo":
        return bounded * advantage * logp, bounded * advantage, (below, above, nowhere)
    below, above = below & (advantage < 0), above & (advantage > 0)
    value = torch.minimum(ratio * advantage, bounded * advantage)
    beyond = (ratio > spec.dual_clip) & (advantage < 0) if spec.clip == "dual" else nowhere
    value = torch.where(beyond, spec.dual_clip * advantage, value)
    return value, torch.where(below | above | beyond, 0.0, ratio * advantage), (below, above, beyond)


def _choose(condition: Tensor, pair: Sequence[float], like: Tensor) -> Tensor:
    """The first number where the condition holds, else the second, in the dtype of `like`."""
    return torch.where(condition, like.new_tensor(pair[0]), like.new_tensor(pair[1]))


def _correction(gap: Tensor, count: Tensor, offsets: Tensor, spread, spec: PolicyLossSpec) -> tuple[Tensor, Tensor]:  # type: ignore[no-untyped-def]
    """ω and whether it differs from c, [N] each; gap: old_logp - rollout_logp."""

    def of(level: Level) -> Tensor:
        if level == "token":
            return gap.exp()
        total = segment_sums(gap, offsets)
        return spread(total if level == "step" else total / count).exp()

    c = of(spec.correction_level)
    gate = c if spec.gate == spec.correction_level else of(spec.gate)
    low, high = spec.correction_low, spec.correction_high
    outside = ~((gate >= low) & (gate <= high))
    if spec.correction == "tis":
        return c.clamp(low, high), outside
    return torch.where(outside, 0.0, c if spec.correction == "icepop" else torch.ones_like(c)), outside


def _kl(x: Tensor, spec: PolicyLossSpec) -> tuple[Tensor, Tensor]:
    """The estimate and its derivative by logp, [N] each; x: ref_logp - logp."""
    if spec.kl == "k1":
        kl, slope = -x, torch.ones_like(x)
    elif spec.kl == "k2":
        kl, slope = x.square() / 2, -x
    else:
        kl = _exp_minus_1_minus(x)
        slope = -(x + kl)  # 1 - exp(x)
    return kl.clamp(-spec.kl_limit, spec.kl_limit), torch.where(kl.abs() > spec.kl_limit, 0.0, slope)


def _exp_minus_1_minus(x: Tensor) -> Tensor:
    """exp(x) - 1 - x with all its digits: policy and reference are close, so the difference would cancel.

    x^2/2 (1 + x/3 (1 + x/4 (1 + …))); 16 terms leave less than 1e-17 at |x| = 0.5."""
    series = torch.ones_like(x)
    for n in range(18, 2, -1):
        series = 1 + x / n * series
    return torch.where(x.abs() < SERIES_BELOW, x.square() / 2 * series, x.exp() - 1 - x)
