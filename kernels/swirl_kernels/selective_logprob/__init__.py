"""Log-probability of target tokens from logits that the caller already holds; `linear_logprob` needs none.

Legend: N rows, V vocabulary.

    z       = logits / temperature
    logp    = z[target] - logsumexp(z)             d logp / dz    = onehot(target) - p
    entropy = logsumexp(z) - sum(p z)              d entropy / dz = -p (log p + entropy)

Left out: soft-cap, gradient through the temperature, double backward.
"""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from swirl_kernels.backend import Backend, choose_backend
from swirl_kernels.linear_logprob.autograd import MIN_LOGP, merge_statistics
from swirl_kernels.linear_logprob.targets import wide_targets
from swirl_kernels.selective_logprob.eager import BackwardRows, dlogits_torch, statistics_torch


@overload
def selective_logprob(
    logits: Tensor,
    targets: Tensor,
    *,
    temperature: float | Tensor = ...,
    entropy: Literal[False] = ...,
    valid_vocab: int | None = ...,
    ignore_index: int = ...,
    inplace_backward: bool = ...,
) -> Tensor: ...


@overload
def selective_logprob(
    logits: Tensor,
    targets: Tensor,
    *,
    temperature: float | Tensor = ...,
    entropy: Literal[True],
    valid_vocab: int | None = ...,
    ignore_index: int = ...,
    inplace_backward: bool = ...,
) -> tuple[Tensor, Tensor]: ...


def selective_logprob(
    logits: Tensor,
    targets: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    entropy: bool = False,
    valid_vocab: int | None = None,
    ignore_index: int = -100,
    inplace_backward: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """log softmax(logits / temperature)[targets] in one pass over the logits.

    logits: floating [N, V], any strides (a last one other than 1 costs a copy); -inf forbids a token. Triton reads them 16 bytes
        at a time where their row stride is a multiple of 16, and an odd one (50,257 columns, say) 2 to 4 bytes at a time, slower.
    targets: integer [N] of any width, in [0, valid_vocab), or ignore_index.
    temperature: positive float, or a floating tensor [N] with one per row (no gradient).
    entropy: also return the entropy of each row's distribution in nats.
    valid_vocab: only the first so many columns are tokens, the rest is padding without probability or gradient.
    ignore_index: rows with this target return 0 and pass back exactly zero, whatever they hold (NaN included).
    inplace_backward: write the gradient over the logits, which saves a second [N, V]. The backward destroys them: nobody may
        read them afterwards. Operations whose backward needs them (and a second backward of this one) are refused by autograd.

    Returns logp [N], natural logarithm, fp32 (float64 for float64 logits), or (logp, entropy). The gradient comes in the
    dtype of the logits, through both; rows whose upstream gradient is exactly zero get exactly zero.

    Precision: sums are fp32 (float64 for float64); a nearly certain target keeps its digits in logp and gradient.
    Repeatability: nothing is atomic, and a row's bits depend only on that row (in Triton also on whether the rows lie on
    16-byte boundaries, which decides how they are read).

    Raises ValueError for wrong shapes, dtypes, devices or settings, for a target outside the vocabulary (row and value
    named), and for inplace_backward on logits whose storage cannot take the gradient: a leaf that requires grad (its .grad
    would lie upon itself), rows that overlap, a last stride other than 1.

    Cost: the logits are read once in the forward, and read and written once in the backward. Memory: the gradient, unless it is
    written in place.
    """
    targets = wide_targets(targets)
    valid, per_row = _checked(logits, targets, temperature, valid_vocab, ignore_index, inplace_backward)
    backend = choose_backend("selective_logprob", logits)
    statistics = torch.promote_types(logits.dtype, torch.float32)
    if per_row is None:
        inverse_temperature = logits.new_full((len(logits),), 1.0 / float(temperature), dtype=statistics)
    else:
        inverse_temperature = per_row.detach().to(statistics).reciprocal()
    logp, entropies = _SelectiveLogprob.apply(
        logits, targets, inverse_temperature, valid, entropy, ignore_index, inplace_backward, backend
    )
    return (logp, entropies) if entropy else logp


def naive_selective_logprob(
    logits: Tensor,
    targets: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    entropy: bool = False,
    valid_vocab: int | None = None,
    ignore_index: int = -100,
) -> Tensor | tuple[Tensor, Tensor]:
    """The same by log_softmax; the reference to check by eye."""
    targets = wide_targets(targets)
    live = targets != ignore_index
    z = logits[live].to(torch.promote_types(logits.dtype, torch.float32))
    z = z / (temperature[live][:, None] if isinstance(temperature, Tensor) else temperature)
    logp_all = z[:, :valid_vocab].log_softmax(-1)
    zeros = z.new_zeros(len(targets))
    logp = zeros.masked_scatter(live, logp_all.gather(1, targets[live][:, None].long())[:, 0])
    if not entropy:
        return logp
    return logp, zeros.masked_scatter(live, -(logp_all.exp() * logp_all.clamp(min=MIN_LOGP)).sum(-1))


class _SelectiveLogprob(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx, logits, targets, inverse_temperature, valid, entropy, ignore_index, inplace, backend
    ):
        live = targets != ignore_index
        top, others, weighted, target = _statistics(logits, targets, live, inverse_temperature, valid, entropy, backend)
        # Logits of any size: relative to the largest one, so that what is kept of logsumexp keeps its digits.
        top, target = top - (largest := torch.maximum(top, target)), target - largest
        logp, log_total, entropies = merge_statistics(top, others, weighted, target)
        logp, entropies = (x.masked_fill(~live, 0.0) for x in (logp, entropies))
        ctx.valid, ctx.inplace, ctx.backend = valid, inplace, backend
        ctx.set_materialize_grads(False)
        if not entropy:
            ctx.mark_non_differentiable(entropies)
        ctx.save_for_backward(logits, targets, live, inverse_temperature, logp, largest, log_total, entropies)
        return logp, entropies

    @staticmethod
    @once_differentiable
    def backward(ctx, g, h):  # type: ignore[no-untyped-def]
        logits, targets, live, inverse_temperature, logp, largest, log_total, entropies = ctx.saved_tensors
        if g is None and h is None:
            return (None,) * 8
        g = torch.zeros_like(logp) if g is None else g
        flows = live & (g != 0 if h is None else (g != 0) | (h != 0))
        at_target = -g * torch.expm1(logp)  # 1 - p keeps its digits for a target that is nearly certain
        if h is not None:
            at_target = at_target - h * logp.exp() * (logp.clamp(min=MIN_LOGP) + entropies)
        out = logits.detach() if ctx.inplace else torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
        rows = BackwardRows(targets, flows, inverse_temperature, largest, log_total, entropies, at_target, g, h)
        if ctx.backend == "triton":
            from swirl_kernels.selective_logprob.triton import dlogits_triton

            dlogits_triton(out, logits, *rows, ctx.valid)
            torch.autograd.graph.increment_version(out)  # autograd does not see what a kernel writes
        else:
            dlogits_torch(out, logits, rows, ctx.valid)
        return out, None, None, None, None, None, None, None


def _statistics(
    logits: Tensor,
    targets: Tensor,
    live: Tensor,
    inverse_temperature: Tensor,
    valid: int,
    entropy: bool,
    backend: Backend,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Arguments of merge_statistics, [N] each, with meaning in the live rows: a bound on top of all logits but the target's, the
    sum of their exp(z - top), that of (z - top) exp(z - top) (zero without entropy), and the target's logit."""
    if backend == "triton":
        from swirl_kernels.selective_logprob.triton import statistics_triton

        return statistics_triton(logits, targets, live, inverse_temperature, valid, entropy)
    return statistics_torch(logits, targets, live, inverse_temperature, valid, entropy)


def _checked(
    logits: Tensor,
    targets: Tensor,
    temperature: float | Tensor,
    valid_vocab: int | None,
    ignore_index: int,
    inplace_backward: bool,
) -> tuple[int, Tensor | None]:
    """valid_vocab as a number, and the temperature where it is a tensor."""
    if logits.dim() != 2 or not logits.is_floating_point() or not logits.shape[1]:
        raise ValueError(
            f"logits have shape {tuple(logits.shape)} and dtype {logits.dtype}; give floating [N, V] "
            "(flatten a batch dimension first)"
        )
    rows, vocab = logits.shape
    if targets.shape != (rows,):
        raise ValueError(f"targets have shape {tuple(targets.shape)} and dtype {targets.dtype}; give integers [{rows}]")
    devices = {t.device for t in (logits, targets, temperature) if isinstance(t, Tensor)}
    if len(devices) > 1:
        raise ValueError(f"logits, targets, temperature lie on {sorted(map(str, devices))}; use one device")
    valid = vocab if valid_vocab is None else valid_vocab
    if not 1 <= valid <= vocab:
        raise ValueError(f"valid_vocab is {valid}; logits have {vocab} columns, so it must lie in [1, {vocab}]")
    live = targets != ignore_index
    wrong = torch.nonzero(live & ((targets < 0) | (targets >= valid)))
    if len(wrong):
        row = int(wrong[0])
        raise ValueError(
            f"targets[{row}] is {int(targets[row])}, outside the vocabulary [0, {valid}); rows to leave out carry "
            f"ignore_index={ignore_index}"
        )
    if inplace_backward and logits.requires_grad:
        if logits.is_leaf:
            raise ValueError(
                "inplace_backward on logits that are a leaf: their .grad would overwrite them; turn it off"
            )
        if logits.stride(1) != 1 or (rows > 1 and logits.stride(0) < vocab):
            raise ValueError(
                f"inplace_backward on logits of shape {tuple(logits.shape)} with strides {logits.stride()}: rows must be "
                "contiguous and must not overlap; turn it off, or pass logits.contiguous()"
            )
    if not isinstance(temperature, Tensor):
        if not 0 < temperature < float("inf"):
            raise ValueError(
                f"temperature is {temperature}; it must be positive and finite (greedy has no distribution)"
            )
        return valid, None
    if temperature.shape != (rows,) or not temperature.is_floating_point() or temperature.requires_grad:
        raise ValueError(
            f"temperature has shape {tuple(temperature.shape)}, dtype {temperature.dtype}, requires_grad="
            f"{temperature.requires_grad}; give a float, or a floating tensor [{rows}] without gradient"
        )
    wrong = torch.nonzero(live & ~((temperature > 0) & temperature.isfinite()))
    if len(wrong):
        row = int(wrong[0])
        raise ValueError(f"temperature[{row}] is {float(temperature[row])}; it must be positive and finite")
    return valid, temperature
