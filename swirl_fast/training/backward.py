"""Forward and backward over the micro-batches of an update, and the sums that are read from them."""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Sequence

import torch
from torch import Tensor

from swirl_fast.config import Config
from swirl_fast.models.policy import Policy
from swirl_fast.objective import LossSums, policy_loss
from swirl_fast.ranks import Ranks
from swirl_fast.training.batch import MicroBatch
from swirl_fast.training.fsdp import set_gradient_sync
from swirl_fast.training.step_metrics import StepSums
from swirl_kernels import PolicyLossMetrics


def backward(
    policy: Policy, batches: Sequence[MicroBatch], config: Config, ranks: Ranks, sums: StepSums, first: bool
) -> list[Tensor]:
    """Adds the gradients of this rank's micro-batches to the policy's. Collective. Returns the loss of each, NaN where a log-prob of a
    trained token is not finite.

    sums: are added to. first: whether it is the first update on the batch, which the metrics describe.
    """
    metrics: list[PolicyLossMetrics] = []
    losses: list[Tensor] = []
    shown: list[Tensor] = []  # of each micro-batch: its loss, negative log-prob, the sum and the largest of the gaps
    for i, batch in enumerate(batches):
        if ranks.distributed:
            set_gradient_sync(policy, i == len(batches) - 1, config.training.shard_accumulated_gradients)
        logp_N = policy(batch.row)
        loss, part = policy_loss(
            logp_N,
            logp_N.detach() if batch.old_logp_N is None else batch.old_logp_N,
            batch.advantage_N,
            batch.weight_N,
            config.algorithm,
            batch.ref_logp_N,
            batch.rollout_logp_N,
            batch.offsets_A,
        )
        (loss * ranks.size).backward()  # FSDP averages gradients over ranks; the loss is a global sum
        metrics.append(part)
        seen_N = torch.where(batch.weight_N != 0, logp_N.detach(), 0.0)
        # An importance weight of 0 would hide a log-prob of minus infinity from the loss.
        losses.append(torch.where(seen_N.isfinite().all(), loss.detach(), math.nan))
        if first:
            # A log-prob that the policy has no number for skips the step, and is not the engine's fault.
            counted_N = (batch.weight_N != 0) & seen_N.isfinite()
            gap_N = torch.where(counted_N, (seen_N - batch.rollout_logp_N).abs(), 0.0)
            gap_max = gap_N.max() if len(gap_N) else gap_N.sum()
            shown.append(torch.stack([loss.detach(), -seen_N.sum(), gap_N.sum(), gap_max]).double())
    # Read here and not in the loop: the host would wait for the device after every micro-batch.
    if metrics:
        sums.add_loss(LossSums.of(functools.reduce(operator.add, metrics)), first)
    if first:
        for batch in batches:
            if batch.row.routing is not None:
                different, compared = batch.row.routing.compared()
                sums.routed_otherwise += different
                sums.routed += compared
    for loss_here, nll, gap, gap_max_here in torch.stack(shown).tolist() if shown else ():
        sums.loss += loss_here
        sums.nll += nll
        sums.gap += gap
        sums.gap_max = max(sums.gap_max, gap_max_here)
    return losses
