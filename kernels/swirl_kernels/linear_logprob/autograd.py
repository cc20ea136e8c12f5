"""What forward and backward of linear_logprob share: the settings, what the backward knows of its rows, and who multiplies.

Legend: N selected rows, H hidden size, V vocabulary.

For an upstream gradient g of a row's logp and h of its entropy, at logit z with p = exp(z - lse):

    dL/dz = g (onehot(target) - p) - h p (log p + entropy)

Its common factor -s / temperature, with s = g, or s = max(|g|, |h|) where an entropy is differentiated, is applied to the H
numbers of a row instead of to V. What remains of dz has the size of probabilities, whatever the size of the upstream
gradients, so that it can be stored in 16 bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

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
    all_rows: bool = False
    invariant: bool = False

    @property
    def workspace(self) -> int:
        """Bytes."""
        return int(self.workspace_mb * 2**20)

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

    logp, lse, entropy: of the forward. factor: -s / temperature. at_target: dz / factor at the target (before the slope of the
    soft-cap). dlogp, dentropy: g / s and h / s; None where no entropy is differentiated, and g / s is 1. flows: bool, the rows that take
    part; None: all. Of the others nothing counts, and factor is 0.
    """

    logp: Tensor
    lse: Tensor
    entropy: Tensor
    factor: Tensor
    at_target: Tensor
    dlogp: Tensor | None
    dentropy: Tensor | None
    flows: Tensor | None = None

    @classmethod
    def of(
        cls,
        g: Tensor,
        h: Tensor | None,
        logp: Tensor,
        lse: Tensor,
        entropy: Tensor,
        inverse_temperature: Tensor | float,
        flows: Tensor | None = None,
    ) -> Upstream:
        def live(x: Tensor) -> Tensor:
            return x if flows is None else x.masked_fill(~flows, 0.0)

        at_target = torch.expm1(logp)  # p - 1 keeps its digits for a target that is nearly certain
        if h is None:
            return cls(logp, lse, entropy, live(-inverse_temperature * g), at_target, None, None, flows)
        size = torch.maximum(g.abs(), h.abs())
        g, h = live(g / size), live(h / size)
        at_target = at_target * g + logp.exp() * h * (logp.clamp(min=MIN_LOGP) + entropy)
        return cls(logp, lse, entropy, live(-inverse_temperature * size), at_target, g, h, flows)


class Kept(NamedTuple):
    """What a forward leaves for its backward, beside the results. logits: flat, of as many tiles as fit; tops: flat, fp32, what they are
    relative to. Either may have no elements."""

    logits: Tensor
    tops: Tensor


class Tiles(Protocol):
    """Rows against the vocabulary; one class each in eager, chunks and triton."""

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: Tensor | None,
        settings: Settings,
    ) -> None: ...

    @staticmethod
    def keepable(num_rows: int, weight: Tensor, settings: Settings) -> tuple[int, torch.dtype, int]:
        """Elements and type of Kept.logits, elements of Kept.tops for at most so many rows. num_rows may be symbolic: nothing may be
        decided by it."""
        ...

    @property
    def inverse_temperature(self) -> Tensor | float: ...  # [N]

    def forward(self, kept: Kept | None) -> tuple[Tensor, Tensor, Tensor]:
        """logp, lse and entropy, [N] each in the statistics' dtype; the entropy means something only when settings ask for it. kept is
        filled, where there is one. A target outside the vocabulary gives NaN."""
        ...

    def reuse(self, kept: Kept, places: Tensor | None, num_live: int) -> None:
        """Before backward: what a forward over num_live rows kept. places: [N], which of them these are; None: all."""
        ...

    def backward(
        self, upstream: Upstream, need_hidden: bool, need_weight: bool, need_bias: bool
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Gradients: of the hidden states in the statistics' dtype, of weight and bias in their own."""
        ...


def tiles_of(backend: Backend, settings: Settings) -> type[Tiles]:
    if backend == "torch":
        from swirl_kernels.linear_logprob.eager import TorchTiles

        return TorchTiles
    if settings.invariant:
        from swirl_kernels.linear_logprob.triton import InvariantTiles

        return InvariantTiles
    from swirl_kernels.linear_logprob.chunks import ChunkTiles

    return ChunkTiles


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
