"""policy_loss on padded [B, T] tensors, as verl and OpenRLHF have them.

Legend: B sequences, T padded length.
"""

from __future__ import annotations

import torch
from torch import Tensor

from swirl_kernels.policy_loss import policy_loss
from swirl_kernels.policy_loss.spec import PolicyLossMetrics, PolicyLossSpec


def padded_policy_loss(
    spec: PolicyLossSpec,
    logp: Tensor,
    old_logp: Tensor,
    advantages: Tensor,
    weight: Tensor,
    importance: Tensor | None = None,
) -> tuple[Tensor, PolicyLossMetrics]:
    """All [B, T] or expandable to it; a row is one segment. Only logp gets a gradient."""
    rows, length = logp.shape
    offsets = torch.arange(rows + 1, device=logp.device) * length

    def flat(x: Tensor) -> Tensor:
        return x.detach().expand(rows, length).flatten()

    return policy_loss(
        logp.flatten(),
        flat(old_logp),
        flat(advantages),
        offsets,
        spec,
        importance=None if importance is None else flat(importance),
        weight=flat(weight),
    )


def mean_over(values: Tensor, mask: Tensor) -> Tensor:
    """Over the tokens of the mask, whatever stands beside it; 0 without one."""
    return torch.where(mask != 0, values.detach(), 0.0).sum() / (mask != 0).sum().clamp(min=1)
