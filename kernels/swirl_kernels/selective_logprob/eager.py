"""selective_logprob in plain PyTorch, a block of rows at a time. Legend: N rows, V vocabulary."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from swirl_kernels.linear_logprob.autograd import MIN_LOGP

BLOCK_ELEMENTS = 2**22  # of logits that are widened at a time: 16 MiB in fp32


class BackwardRows(NamedTuple):
    """What the backward knows of its rows, [N] each. flows: bool, a gradient comes in. largest + log_total: logsumexp of
    the forward. at_target: the gradient of z at the target. g, h: upstream of logp and entropy."""

    targets: Tensor
    flows: Tensor
    inverse_temperature: Tensor
    largest: Tensor
    log_total: Tensor
    entropy: Tensor
    at_target: Tensor
    g: Tensor
    h: Tensor | None


def statistics_torch(
    logits: Tensor, targets: Tensor, live: Tensor, inverse_temperature: Tensor, valid: int, entropy: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Arguments of merge_statistics, [N] each, with meaning in the live rows: a bound on top of all logits but the target's, the
    sum of their exp(z - top), that of (z - top) exp(z - top) (zero without entropy), and the target's logit."""
    top, others, weighted, target = (torch.zeros_like(inverse_temperature) for _ in range(4))
    for rows in torch.nonzero(live)[:, 0].split(max(1, BLOCK_ELEMENTS // valid)):
        z = logits[rows, :valid].to(top.dtype) * inverse_temperature[rows, None]
        column = targets[rows, None].long()
        target[rows] = z.gather(1, column)[:, 0]
        z.scatter_(1, column, -torch.inf)
        # Where all others are forbidden the bound must stay finite, else inf - inf makes it NaN.
        top[rows] = z.amax(1).clamp(min=torch.finfo(z.dtype).min / 2)
        z.sub_(top[rows, None])
        p = z.exp()
        others[rows] = p.sum(1)
        if entropy:
            weighted[rows] = z.clamp_(min=MIN_LOGP).mul_(p).sum(1)
    return top, others, weighted, target


def dlogits_torch(out: Tensor, logits: Tensor, rows: BackwardRows, valid: int) -> None:
    """Writes the gradient of the logits into out, which may be the logits."""
    out[torch.nonzero(~rows.flows)[:, 0]] = 0
    out[:, valid:] = 0
    for block in torch.nonzero(rows.flows)[:, 0].split(max(1, BLOCK_ELEMENTS // valid)):
        inverse_temperature = rows.inverse_temperature[block, None]
        z = logits[block, :valid].to(rows.largest.dtype) * inverse_temperature
        log_p = z.sub_(rows.largest[block, None]).sub_(rows.log_total[block, None])
        dz = log_p.exp().neg_()
        if rows.h is None:
            dz.mul_(rows.g[block, None])
        else:
            log_p.clamp_(min=MIN_LOGP).add_(rows.entropy[block, None]).mul_(rows.h[block, None])
            dz.mul_(log_p.add_(rows.g[block, None]))
        dz.scatter_(1, rows.targets[block, None].long(), rows.at_target[block, None])
        out[block, :valid] = dz.mul_(inverse_temperature).to(out.dtype)
