"""The policy-gradient loss over packed tokens: ratio, clip, KL term and engine correction as one operation.

Legend: N tokens, A segments. A segment is one action of the policy: one step of an agent, or a whole completion.

    loss = Σ_t weight_t * (-ω_t f(r_t, A_t) + kl_coef * kl_t)            r, f, ω, kl: see PolicyLossSpec

Every aggregation is a choice of weights, made from counts over the whole batch (policy_loss_presets.loss_weights), so that the
loss is a plain sum: it does not change with micro-batches, packing or data parallelism.

Left out: entropy bonus (linear_logprob returns the entropy), value loss, double backward.
"""

from __future__ import annotations

import math
from typing import Literal, overload

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from swirl_kernels.backend import Backend, choose_backend
from swirl_kernels.policy_loss.eager import policy_loss_torch
from swirl_kernels.policy_loss.spec import SUMS, PolicyLossMetrics, PolicyLossSpec
from swirl_kernels.segment_reduce import check_offsets


@overload
def policy_loss(
    logp: Tensor,
    old_logp: Tensor,
    advantage: Tensor,
    offsets: Tensor | None,
    spec: PolicyLossSpec,
    *,
    ref_logp: Tensor | None = ...,
    rollout_logp: Tensor | None = ...,
    importance: Tensor | None = ...,
    weight: Tensor | None = ...,
    loss_scale: float = ...,
    metrics: Literal[True] = ...,
) -> tuple[Tensor, PolicyLossMetrics]: ...


@overload
def policy_loss(
    logp: Tensor,
    old_logp: Tensor,
    advantage: Tensor,
    offsets: Tensor | None,
    spec: PolicyLossSpec,
    *,
    ref_logp: Tensor | None = ...,
    rollout_logp: Tensor | None = ...,
    importance: Tensor | None = ...,
    weight: Tensor | None = ...,
    loss_scale: float = ...,
    metrics: Literal[False],
) -> tuple[Tensor, None]: ...


def policy_loss(
    logp: Tensor,
    old_logp: Tensor,
    advantage: Tensor,
    offsets: Tensor | None,
    spec: PolicyLossSpec,
    *,
    ref_logp: Tensor | None = None,
    rollout_logp: Tensor | None = None,
    importance: Tensor | None = None,
    weight: Tensor | None = None,
    loss_scale: float = 1.0,
    metrics: bool = True,
) -> tuple[Tensor, PolicyLossMetrics | None]:
    """Scalar loss and its metrics, in one pass over the tokens.

    logp: floating [N], log-probabilities of the sampled tokens under the policy in training (natural logarithm).
    old_logp: floating [N], under the policy the ratio is taken against; logp.detach() for a first update.
    advantage: floating [A], one a segment, or [N].
    offsets: int32 or int64 [A + 1], from 0 to N without descending: segment a owns tokens offsets[a] : offsets[a + 1]. Equal
        neighbours are empty segments. None where nothing belongs to a segment: ratio "token", a correction of tokens, and
        advantage, importance and weight by token (weight also []); the Triton kernel then reads no offsets.
    spec: what is computed.
    ref_logp: floating [N], of the reference policy; exactly when spec.kl is not "none".
    rollout_logp: floating [N], what the rollout engine reported; exactly when spec.correction is not "none".
    importance: floating [N] or [A], ω as it is, made elsewhere; None: 1, or what spec.correction says. Only where that is "none".
        With clip "vespo" it is a factor of the ratio instead: [N] with the product over the step, [A] once.
    weight: floating [N], [A] or []; None: 1. Made from global counts; loss_weights makes the usual ones.
    loss_scale: finite factor on loss and gradient, not on metrics; what would otherwise multiply the loss (the number of ranks,
        say). A gradient of 1 that comes into the loss then costs the Triton path nothing.
    metrics: False computes none and returns None in their place.
    Where A = N every segment must be one token, so that [A] and [N] say the same.

    Tokens of weight 0 contribute exactly nothing to loss, gradient, metrics and the means over their segment, whatever stands
    beside them (NaN included). A token whose ω or advantage is 0 adds nothing through its ratio, not even one that overflowed, and
    with kl_coef=0 the KL term is only a metric.

    Returns the loss [], fp32 (float64 for float64 logp), and PolicyLossMetrics. All is computed in the dtype of the loss, sums
    over segments in float64. Gradient only for logp, in its dtype; it is made in the forward and scaled in the backward.

    Repeatability: nothing is atomic; the same arguments give the same bits. No value is read back from the device.
    Triton: one warp goes through a stretch of tokens, whatever the segments; with ratios or corrections of steps a program goes
    through a segment.

    Raises ValueError for wrong shapes, dtypes and devices, for a tensor that is missing or that the spec does not use, for one
    other than logp that requires grad (named), and for offsets that do not go from 0 to N. On a CUDA device with the Triton
    backend offsets are not read back: there wrong ones make the loss NaN, and the gradient of every token they leave out.

    Ratio, clip and correction by the sources named in PolicyLossSpec. The gradient of ratio "step" is that of the expression: with
    n tokens in the step, every token gets 1/n of r times the sum of weight * ω * A over its tokens that are not clipped.
    """
    if logp.dim() != 1 or not logp.is_floating_point():
        raise ValueError(
            f"logp has shape {tuple(logp.shape)} and dtype {logp.dtype}; give the packed tokens, floating [N]"
        )
    backend = choose_backend("policy_loss", logp)
    readable = not (logp.is_cuda and backend == "triton")
    if offsets is not None:
        check_offsets(offsets, len(logp), "logp", readable)
    elif not spec.by_token:
        raise ValueError(
            f"offsets are None with ratio={spec.ratio!r}, correction_level={spec.correction_level!r}, gate={spec.gate!r}; "
            "what is computed by step needs to know the steps"
        )
    if not math.isfinite(loss_scale):
        raise ValueError(f"loss_scale is {loss_scale}; give a finite number")
    _check(logp, old_logp, advantage, offsets, spec, ref_logp, rollout_logp, importance, weight)
    if offsets is not None and readable and len(offsets) == len(logp) + 1:
        others = torch.nonzero(offsets.diff() != 1)
        if len(others):
            at = int(others[0])
            raise ValueError(
                f"{len(logp)} tokens in as many segments, of which segment {at} has {int(offsets[at + 1] - offsets[at])}: a "
                f"vector of length {len(logp)} could be per token or per segment; drop the empty segments"
            )
    loss, sums, ratio_max = _PolicyLoss.apply(
        logp,
        old_logp,
        advantage,
        offsets,
        weight,
        ref_logp,
        rollout_logp,
        importance,
        spec,
        torch.is_grad_enabled() and logp.requires_grad,
        float(loss_scale),
        metrics,
        backend,
    )
    return loss, PolicyLossMetrics(sums, ratio_max) if metrics else None


def naive_policy_loss(
    logp: Tensor,
    old_logp: Tensor,
    advantage: Tensor,
    offsets: Tensor | None,
    spec: PolicyLossSpec,
    *,
    ref_logp: Tensor | None = None,
    rollout_logp: Tensor | None = None,
    importance: Tensor | None = None,
    weight: Tensor | None = None,
    loss_scale: float = 1.0,
) -> tuple[Tensor, PolicyLossMetrics]:
    """The same, a segment at a time and differentiated by autograd; the reference to check by eye."""
    offsets = torch.tensor([0, len(logp)]) if offsets is None else offsets
    weight = torch.ones_like(logp) if weight is None else weight
    low, high = spec.ratio_bounds
    loss = logp[:0].sum(dtype=torch.promote_types(logp.dtype, torch.float32))
    sums = dict.fromkeys(SUMS, 0.0)
    ratio_max = 0.0
    for a, (begin, end) in enumerate(zip(offsets.tolist(), offsets.tolist()[1:], strict=False)):
        w, advantages, given = (
            x[begin:end]
            if len(x.shape) and len(x) == len(logp)
            else x.reshape(-1)[a if len(x.shape) else 0].expand(end - begin)
            for x in (weight, advantage, logp.new_ones(()) if importance is None else importance)
        )
        used = torch.nonzero(w != 0)[:, 0]
        if not len(used):
            continue
        w, A, given = (x[used].to(loss.dtype) for x in (w, advantages, given))
        now, old, ref, behaviour = (
            None if x is None else x[begin:end][used].to(loss.dtype) for x in (logp, old_logp, ref_logp, rollout_logp)
        )
        assert now is not None and old is not None, "logp and old_logp are given"
        d = now - old
        if spec.ratio == "token":
            r = d.exp()
        elif spec.ratio == "step":
            r = d.mean().exp().expand(len(d))
        elif spec.ratio == "step_sum":
            logs = given.log().clamp(math.log(1e-8), 20)
            once = importance is not None and len(importance) != len(logp)
            total = d.clamp(-20, 20).sum() + (logs[0] if once else logs.sum())
            r, given = total.clamp(math.log(1e-8), 20).exp().detach().expand(len(d)), torch.ones_like(now)
        else:
            r = d.mean().exp().detach() * (now - now.detach()).exp()
        clipped_r = r.clamp(low, high)
        if spec.clip == "none":
            f = r * A
        elif spec.clip == "cispo":
            f = clipped_r.detach() * A * now
        elif spec.clip == "sapo":
            tau = torch.where(A > 0, A.new_tensor(spec.sapo[0]), A.new_tensor(spec.sapo[1]))
            f = 4 / tau * torch.sigmoid(tau * (r - 1)) * A
        elif spec.clip == "vespo":
            k, scale = A.new_tensor(spec.vespo).view(2, 2)[(A < 0).long()].unbind(1)
            f = r**k * (scale.clamp(min=1e-4) * (1 - r)).exp() * A * now
        else:
            f = torch.minimum(r * A, clipped_r * A)
            if spec.clip == "dual":
                f = torch.where(A < 0, torch.maximum(f, spec.dual_clip * A), f)
        omega = given
        if behaviour is not None:
            of = {
                "token": lambda e: e.exp(),
                "step": lambda e: e.sum().exp().expand(len(e)),
                "step_mean": lambda e: e.mean().exp().expand(len(e)),
            }
            c, gate = of[spec.correction_level](old - behaviour), of[spec.gate](old - behaviour)
            inside = (gate >= spec.correction_low) & (gate <= spec.correction_high)
            omega = {
                "tis": c.clamp(spec.correction_low, spec.correction_high),
                "icepop": torch.where(inside, c, 0.0),
                "mask": inside.to(c.dtype),
            }[spec.correction].detach()
            sums["truncated"] += float((~inside).sum())
        kl = torch.zeros_like(now)
        if ref is not None:
            x = ref - now
            kl = {"k1": -x, "k2": x**2 / 2, "k3": x.exp() - 1 - x}[spec.kl].clamp(-spec.kl_limit, spec.kl_limit)
            kl = r * kl if spec.kl_importance else kl
        loss = loss + (w * (-omega * f + spec.kl_coef * kl)).sum()
        value = r.detach()
        bound = value > spec.dual_clip if spec.clip == "dual" else torch.zeros_like(used, dtype=torch.bool)
        below, above = value < low, value > high
        hard = spec.clip in ("ppo", "dual", "cispo")
        if spec.clip in ("ppo", "dual"):
            below, above = below & (A < 0), above & (A > 0)
        for name, values in {
            "tokens": torch.ones_like(now),
            "clipped_low": below if hard else torch.zeros_like(now),
            "clipped_high": above if hard else torch.zeros_like(now),
            "clipped_dual": bound & (A < 0),
            "kl": kl,
            "ratio": value,
            "importance": value * omega,
            "importance_squared": (value * omega) ** 2,
        }.items():
            sums[name] += float(values.detach().double().sum())
        ratio_max = max(ratio_max, float(value.max()))
    as_tensor = torch.tensor([sums[name] for name in SUMS], dtype=torch.float64, device=logp.device)
    return loss * loss_scale, PolicyLossMetrics(as_tensor, torch.tensor(ratio_max, dtype=torch.float64, device=logp.device))


class _PolicyLoss(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx, logp, old, advantage, offsets, weight, ref, behaviour, importance, spec, differentiable, scale, metrics, backend
    ):
        loss, slope, sums, ratio_max = _compute(
            logp, old, advantage, offsets, weight, ref, behaviour, importance, spec, differentiable, scale, metrics, backend
        )
        ctx.dtype, ctx.backend = logp.dtype, backend
        ctx.save_for_backward(slope)
        ctx.mark_non_differentiable(sums, ratio_max)
        ctx.set_materialize_grads(False)
        return loss, sums, ratio_max

    @staticmethod
    @once_differentiable
    def backward(ctx, dloss, *_):  # type: ignore[no-untyped-def]
        (slope,) = ctx.saved_tensors
        return (None if dloss is None else _scaled(slope, dloss, ctx.dtype, ctx.backend), *(None,) * 12)


def _scaled(slope: Tensor, factor: Tensor, dtype: torch.dtype, backend: Backend) -> Tensor:
    """slope * factor. Written over the slope, and not at all where the factor is 1, unless the graph is kept and may ask again."""
    kept = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True)()
    if kept or backend != "triton" or dtype != slope.dtype:
        return (slope * factor).to(dtype)
    from swirl_kernels.policy_loss.triton import scaled_in_place

    return scaled_in_place(slope, factor)


def _compute(
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
    scale: float,
    metrics: bool,
    backend: Backend,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """loss [], d loss / d logp [N] in the loss's dtype (None unless differentiable), sums [9], ratio_max []."""
    if backend == "triton":
        from swirl_kernels.policy_loss.triton import policy_loss_triton

        return policy_loss_triton(
            logp, old, advantage, offsets, weight, ref, behaviour, importance, spec, differentiable, scale, metrics
        )
    return policy_loss_torch(
        logp, old, advantage, offsets, weight, ref, behaviour, importance, spec, differentiable, scale, metrics
    )


def _check(
    logp: Tensor,
    old_logp: Tensor,
    advantage: Tensor,
    offsets: Tensor | None,
    spec: PolicyLossSpec,
    ref_logp: Tensor | None,
    rollout_logp: Tensor | None,
    importance: Tensor | None,
    weight: Tensor | None,
) -> None:
    """All but the values of offsets."""
    for name, tensor, setting, word in (
        ("ref_logp", ref_logp, "kl", spec.kl),
        ("rollout_logp", rollout_logp, "correction", spec.correction),
    ):
        if (tensor is None) != (word == "none"):
            remedy = "give it" if tensor is None else f"leave it out, or choose a {setting}"
            raise ValueError(f"{name} is {'missing' if tensor is None else 'given'} with {setting}={word!r}; {remedy}")
    if importance is not None and spec.correction != "none":
        raise ValueError(f"importance is given with correction={spec.correction!r}; leave one of them out")
    tokens = len(logp)
    by_segment = () if offsets is None else ((len(offsets) - 1,),)
    named = {
        "logp": logp,
        "old_logp": old_logp,
        "advantage": advantage,
        "ref_logp": ref_logp,
        "rollout_logp": rollout_logp,
        "importance": importance,
        "weight": weight,
    }
    given = {name: tensor for name, tensor in named.items() if tensor is not None}
    allowed = {
        "advantage": (*by_segment, (tokens,)),
        "importance": ((tokens,), *by_segment),
        "weight": ((tokens,), *by_segment, ()),
    }
    for name, tensor in given.items():
        shapes = allowed.get(name, ((tokens,),))
        if tensor.shape not in shapes or not tensor.is_floating_point():
            wanted = " or ".join(f"[{', '.join(map(str, shape))}]" for shape in shapes)
            raise ValueError(f"{name} has shape {tuple(tensor.shape)} and dtype {tensor.dtype}; give floating {wanted}")
        if tensor.requires_grad and name != "logp":
            raise ValueError(f"{name} requires grad, but only logp gets a gradient; pass {name}.detach()")
    devices = {tensor.device for tensor in (*given.values(), offsets) if tensor is not None}
    if len(devices) > 1:
        raise ValueError(f"{', '.join(given)} and offsets lie on {sorted(map(str, devices))}; use one device")
