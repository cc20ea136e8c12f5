"""policy_loss as losses of verl's registry (0.9.1), with verl's own signature, normalisers and metrics.

    actor_rollout_ref.actor.policy_loss.loss_mode=swirl_vanilla          or swirl_gspo, swirl_cispo, swirl_sapo
    VERL_USE_EXTERNAL_MODULES=swirl_kernels.integrations.verl_plugin     in the environment of driver and workers: registers them

Formulas: verl/trainer/ppo/core_algos.py, compute_policy_loss_vanilla, _gspo, _cispo, _sapo and agg_loss. Their bounds on exponents
(|log_prob - old_log_prob| <= 20, gspo's sequence ratio <= e^10) are not repeated: they lie outside any useful training.

Left out: KL and entropy terms, which verl adds itself.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from swirl_kernels.integrations.padded import mean_over, padded_policy_loss
from swirl_kernels.policy_loss.spec import PolicyLossSpec

MODES = ("vanilla", "gspo", "cispo", "sapo")


def register(prefix: str = "swirl_") -> list[str]:
    """Puts prefix + mode into verl's registry for every mode and returns these names; an empty prefix replaces verl's own losses."""
    from verl.trainer.ppo.core_algos import register_policy_loss

    for mode in MODES:
        register_policy_loss(prefix + mode)(policy_loss_fn(mode))
    return [prefix + mode for mode in MODES]


def policy_loss_fn(mode: str) -> Callable[..., tuple[Tensor, dict[str, Any]]]:
    """compute_policy_loss of one mode, with verl's signature. Raises ValueError for a mode that is not here."""
    if mode not in MODES:
        raise ValueError(f"mode is {mode!r}; use one of {', '.join(MODES)}")
    return functools.partial(_compute_policy_loss, mode)


def _compute_policy_loss(
    mode: str,
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "token-mean",
    config: Any = None,
    rollout_is_weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, Any]]:
    """log-probs, advantages, mask and weights: [B, T]. config: ActorConfig, of which the clip ranges, tau_pos and tau_neg, and
    global_batch_info (dp_size, batch_num_tokens, global_batch_size, loss_scale_factor) are read.

    Returns the loss [] and actor/pg_clipfrac, actor/ppo_kl, actor/pg_clipfrac_lower as floats. Raises ValueError without a config, and
    for an aggregation that agg_loss does not know or has too little for.
    """
    if config is None:
        raise ValueError(
            "config is None; verl passes its ActorConfig, which holds the clip ranges and global_batch_info"
        )
    # verl's paper of sapo has no other aggregation, whatever loss_agg_mode says.
    how = "seq-mean-token-mean" if mode == "sapo" else loss_agg_mode
    weight = token_weights(response_mask, how, log_prob.dtype, **config.global_batch_info)
    loss, metrics = padded_policy_loss(
        _spec(mode, config), log_prob, old_log_prob, advantages, weight, rollout_is_weights
    )
    tokens = metrics.tokens.clamp(min=1)
    drift = mean_over(old_log_prob - log_prob, response_mask)
    values = torch.stack(
        [(metrics.clipped_low + metrics.clipped_high) / tokens, drift.double(), metrics.clipped_dual / tokens]
    )
    return loss, dict(
        zip(("actor/pg_clipfrac", "actor/ppo_kl", "actor/pg_clipfrac_lower"), values.tolist(), strict=True)
    )


def _spec(mode: str, config: Any) -> PolicyLossSpec:
    low, high = (config.clip_ratio if x is None else x for x in (config.clip_ratio_low, config.clip_ratio_high))
    if mode == "sapo":
        return PolicyLossSpec(clip="sapo", sapo=(float(config.tau_pos), float(config.tau_neg)))
    return PolicyLossSpec(
        ratio="step_token" if mode == "gspo" else "token",
        clip={"vanilla": "dual", "gspo": "ppo", "cispo": "cispo"}[mode],  # type: ignore[arg-type]
        clip_low=low,
        clip_high=high,
        dual_clip=getattr(config, "clip_ratio_c", 3.0),
    )


def token_weights(
    mask: Tensor,
    loss_agg_mode: str,
    dtype: torch.dtype,
    *,
    dp_size: int = 1,
    batch_num_tokens: Any = None,
    global_batch_size: Any = None,
    loss_scale_factor: Any = None,
) -> Tensor:
    """What agg_loss multiplies the loss of each token by, [B, T] in at least fp32. mask: [B, T].

    Without the global numbers those of this batch; with dp_size > 1 they must be there (ValueError, as in verl)."""
    mask = mask.to(torch.promote_types(dtype, torch.float32))
    counts = mask.sum(-1, keepdim=True)
    if loss_agg_mode == "token-sum":
        return mask * dp_size
    by_token = loss_agg_mode == "token-mean"
    if not by_token and loss_agg_mode not in ("seq-mean-token-sum", "seq-mean-token-sum-norm", "seq-mean-token-mean"):
        raise ValueError(f"loss_agg_mode is {loss_agg_mode!r}; use one that verl's agg_loss knows")
    total = batch_num_tokens if by_token else global_batch_size
    if total is None:
        if dp_size > 1:
            name = "batch_num_tokens" if by_token else "global_batch_size"
            raise ValueError(
                f"global_batch_info has no {name}, which loss_agg_mode={loss_agg_mode!r} needs with dp_size={dp_size}"
            )
        total = (mask.sum() if by_token else (counts > 0).sum()).clamp(min=1)
    weight = mask / total * dp_size
    if loss_agg_mode == "seq-mean-token-mean":
        weight = weight / (counts + 1e-8)  # verl's guard
    elif loss_agg_mode == "seq-mean-token-sum-norm":
        weight = weight / (mask.shape[-1] if loss_scale_factor is None else loss_scale_factor)
    return weight
