"""The differentiable frame of linear_logprob: which rows take part, what the backward knows of them, who multiplies.

Legend: N selected rows, H hidden size, V vocabulary.

For an upstream gradient g of a row's logp and h of its entropy, at logit z with p = exp(z - lse):

    dL/dz = g (onehot(target) - p) - h p (log p + entropy)

Its common factor -s / temperature, with s = g, or s = max(|g|, |h|) where an entropy is differentiated, is applied to the H
numbers of a row instead of to V. What remains of dz has the size of probabilities, whatever the size of the upstream
gradients, so that it can be stored in 16 bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from swirl_kernels.backend import Backend

# exp of it is exactly zero in float64 too. Where p log p is needed, a logit of -inf (a bias that forbids a token) is
# raised to it, so that 0 * inf does not come out of the sum.
MIN_LOGP = -1e4
# fp16 ends at 6e-8: unscaled, a uniform distribution over 152k tokens (p = 7e-6) would keep 7 bits, and a tail nothing.
HALF_SCALE = 256.0


@dataclass(frozen=True)
class Settings:
    """The checked arguments of linear_logprob that are not tensors. compute_dtype: of the matrix products."""

    compute_dtype: torch.dtype
    temperature: float
    softcap: float | None
    valid_vocab: int
    entropy: bool
    ignore_index: int
    workspace_mb: float

    @property
    def statistics(self) -> torch.dtype:
        """fp32, or float64 for float64 inputs."""
        return torch.promote_types(self.compute_dtype, torch.float32)

    @property
    def dlogits_scale(self) -> float:
        """Factor under which dz is stored in the compute dtype."""
        return HALF_SCALE if self.compute_dtype == torch.float16 else 1.0


@dataclass(frozen=True)
class Upstream:
    """What the backward knows of its rows, each [N] in the statistics' dtype.

    lse, entropy: of the forward. factor: -s / temperature. at_target: dz / factor at the target (before the slope of the
    soft-cap). dlogp, dentropy: g / s and h / s; None where no entropy is differentiated, and g / s is 1.
    """

    lse: Tensor
    entropy: Tensor
    factor: Tensor
    at_target: Tensor
    dlogp: Tensor | None
    dentropy: Tensor | None

    @classmethod
    def of(
        cls,
        g: Tensor,
        h: Tensor | None,
        logp: Tensor,
        lse: Tensor,
        entropy: Tensor,
        inverse_temperature: Tensor | float,
    ) -> Upstream:
        at_target = torch.expm1(logp)  # p - 1 keeps its digits for a target that is nearly certain
        if h is None:
            return cls(lse, entropy, -inverse_temperature * g, at_target, None, None)
        size = torch.maximum(g.abs(), h.abs())
        g, h = g / size, h / size
        at_target = at_target * g + logp.exp() * h * (logp.clamp(min=MIN_LOGP) + entropy)
        return cls(lse, entropy, -inverse_temperature * size, at_target, g, h)


class Tiles(Protocol):
    """Selected rows against the vocabulary; one class each in linear_logprob_torch and linear_logprob_triton."""

    kept: dict[tuple[int, int], Tensor]  # tiles of logits that the forward leaves for the backward

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: Tensor | None,
        selected: Tensor,
        settings: Settings,
    ) -> None: ...

    @property
    def inverse_temperature(self) -> Tensor | float: ...  # [N]

    def forward(self, *, keep: bool) -> tuple[Tensor, Tensor, Tensor]: ...

    def reuse(self, kept: dict[tuple[int, int], Tensor], chosen: Tensor, num_live: int) -> None: ...

    def backward(
        self, upstream: Upstream, need_hidden: bool, need_weight: bool, need_bias: bool
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]: ...


def tiles_of(backend: Backend) -> type[Tiles]:
    if backend == "triton":
        from swirl_kernels.linear_logprob.triton import TritonTiles

        return TritonTiles
    from swirl_kernels.linear_logprob.eager import TorchTiles

    return TorchTiles


def merge_statistics(top: Tensor, others: Tensor, weighted: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """logp, lse, entropy [N] from the target's logit and, of all others: a bound on top of them (their maximum, or more), the sum
    of exp(z - top), and that of (z - top) exp(z - top).

    The target stays out of the sum over the others: beside its 1 the digits of a small sum, and of the logp, would be lost.
    """
    shift = (top - torch.maximum(top, target)).clamp(min=MIN_LOGP)
    weighted = (weighted + others * shift) * shift.exp()
    others = others * shift.exp()
    top = torch.maximum(top, target)
    t = target - top
    total = others + t.exp()
    logp = torch.where(t > -1, -torch.log1p(others * torch.exp(-t.clamp(min=-1))), t - total.log())
    log_total = torch.where(t > -1, t - logp, total.log())
    return logp, top + log_total, log_total - (weighted + t.exp() * t.clamp(min=MIN_LOGP)) / total


class LinearLogprob(torch.autograd.Function):
    """(logp [N], entropy [N]) of checked arguments; temperature [N] overrides settings.temperature; entropy means
    something only with settings.entropy."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, temperature, settings, backend):  # type: ignore[no-untyped-def]
        live = torch.nonzero(targets != settings.ignore_index)[:, 0]
        logp, lse, entropy = (hidden.new_zeros(len(targets), dtype=settings.statistics) for _ in range(3))
        kept: dict[tuple[int, int], Tensor] = {}
        if len(live):
            with torch.autocast(hidden.device.type, enabled=False), torch.cuda.device_of(hidden):
                tiles = tiles_of(backend)(hidden, weight, bias, targets, temperature, live, settings)
                logp[live], lse[live], entropy[live] = tiles.forward(keep=any(ctx.needs_input_grad[:3]))
            kept = tiles.kept
        ctx.settings, ctx.backend, ctx.kept = settings, backend, list(kept)
        ctx.set_materialize_grads(False)
        if not settings.entropy:
            ctx.mark_non_differentiable(entropy)
        # The kept tiles are saved as tensors: so they go with the graph, not with the last reference to a result.
        results = logp, lse, entropy
        ctx.save_for_backward(hidden, weight, bias, targets, temperature, *results, live, *kept.values())
        return logp, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx, dlogp, dentropy):  # type: ignore[no-untyped-def]
        hidden, weight, bias, targets, temperature, logp, lse, entropy, live, *kept = ctx.saved_tensors
        dlogp = torch.zeros_like(logp) if dlogp is None else dlogp
        flows = dlogp != 0 if dentropy is None else (dlogp != 0) | (dentropy != 0)
        chosen = torch.nonzero(flows[live])[:, 0]
        if not len(chosen):
            needs = zip((hidden, weight, bias), ctx.needs_input_grad, strict=False)
            return (
                *(torch.zeros_like(x) if x is not None and need else None for x, need in needs),
                None,
                None,
                None,
                None,
            )
        rows = live[chosen]
        with torch.autocast(hidden.device.type, enabled=False), torch.cuda.device_of(hidden):
            tiles = tiles_of(ctx.backend)(hidden, weight, bias, targets, temperature, rows, ctx.settings)
            # Kept tiles bind the rows to the forward's blocks, which few rows would leave nearly empty.
            if kept and 2 * len(chosen) >= len(live):
                tiles.reuse(dict(zip(ctx.kept, kept, strict=True)), chosen, len(live))
            upstream = Upstream.of(
                dlogp[rows],
                None if dentropy is None else dentropy[rows],
                logp[rows],
                lse[rows],
                entropy[rows],
                tiles.inverse_temperature,
            )
            dhidden, dweight, dbias = tiles.backward(upstream, *ctx.needs_input_grad[:3])
        if dhidden is not None and (len(rows) < len(hidden) or dhidden.dtype != hidden.dtype):
            del tiles  # with its copy of the rows, which this one replaces
            dhidden = torch.zeros_like(hidden).index_copy_(0, rows, dhidden.to(hidden.dtype))
        return dhidden, dweight, dbias, None, None, None, None
