"""OpenRLHF's PolicyLoss (0.11.2, openrlhf/models/loss.py) on policy_loss: the same settings, arguments and results.

    from swirl_kernels.integrations.openrlhf import PolicyLoss

Its bound on exponents (|log_probs - old_log_probs| <= 20) is not repeated: it lies outside any useful training.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from swirl_kernels.integrations.padded import mean_over, padded_policy_loss
from swirl_kernels.policy_loss.spec import PolicyLossSpec


class PolicyLoss(nn.Module):
    """PPO or GSPO with dual clip and the correction between rollout engine and trainer.

    Raises ValueError for words and combinations that OpenRLHF refuses.
    """

    def __init__(
        self,
        clip_eps_low: float = 0.2,
        clip_eps_high: float = 0.2,
        dual_clip: float | None = None,
        token_level_loss: bool = True,
        policy_loss_type: str = "ppo",
        is_correction_level: str = "off",
        is_correction_mode: str = "mask",
        is_correction_gating: str = "ratio",
        is_correction_threshold: Sequence[float] = (0.5, 5.0),
    ) -> None:
        super().__init__()
        for name, word, words in (
            ("policy_loss_type", policy_loss_type, ("ppo", "gspo")),
            ("is_correction_level", is_correction_level, ("off", "token", "seq")),
            ("is_correction_mode", is_correction_mode, ("mask", "clip")),
            ("is_correction_gating", is_correction_gating, ("ratio", "binary_kl", "tv")),
        ):
            if word not in words:
                raise ValueError(f"{name} is {word!r}; use one of {', '.join(words)}")
        if is_correction_mode == "clip" and (is_correction_level == "seq" or is_correction_gating != "ratio"):
            raise ValueError(
                "is_correction_mode='clip' needs is_correction_level='token' and is_correction_gating='ratio'"
            )
        if is_correction_gating != "ratio" and is_correction_level != "off" and is_correction_threshold[0] > 0:
            raise ValueError(
                f"is_correction_threshold is {is_correction_threshold}; is_correction_gating={is_correction_gating!r} takes an upper bound "
                "alone: let the lower one be 0 or below"
            )
        self.spec = PolicyLossSpec(
            ratio="step" if policy_loss_type == "gspo" else "token",
            clip="ppo" if dual_clip is None else "dual",
            clip_low=clip_eps_low,
            clip_high=clip_eps_high,
            dual_clip=3.0 if dual_clip is None else dual_clip,
        )
        self.token_level_loss = token_level_loss and policy_loss_type != "gspo"
        self.policy_loss_type = policy_loss_type
        self.is_correction_level, self.is_correction_mode = is_correction_level, is_correction_mode
        self.is_correction_gating, self.is_correction_threshold = is_correction_gating, is_correction_threshold

    def forward(
        self,
        log_probs: Tensor,
        old_log_probs: Tensor,
        advantages: Tensor,
        action_mask: Tensor | None = None,
        rollout_log_probs: Tensor | None = None,
        dp_size: int = 1,
        batch_num_tokens: float | Tensor | None = None,
        global_batch_size: float | Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
        """[B, T] each. Returns loss, clip_ratio, ppo_kl, vllm_kl and is_filter_ratio, [] each, the last two None without a correction.

        Raises ValueError where the correction needs rollout_log_probs and they are missing."""
        mask = torch.ones_like(log_probs) if action_mask is None else action_mask
        corrected = self.is_correction_level != "off"
        if corrected and rollout_log_probs is None:
            raise ValueError(
                f"rollout_log_probs is None with is_correction_level={self.is_correction_level!r}; give it"
            )
        before, weights, vllm_kl, filtered = old_log_probs, None, None, None
        if corrected and rollout_log_probs is not None:
            if self.policy_loss_type == "gspo":  # the ratio itself is taken against the rollout engine
                before = rollout_log_probs
            else:
                weights, filtered = self._correction(old_log_probs.detach(), rollout_log_probs.detach(), mask)
                vllm_kl = mean_over(rollout_log_probs - old_log_probs, mask)
        weight = self._weight(
            mask.to(torch.promote_types(log_probs.dtype, torch.float32)), dp_size, batch_num_tokens, global_batch_size
        )
        loss, metrics = padded_policy_loss(self.spec, log_probs, before, advantages, weight, weights)
        clip_ratio = (metrics.clipped_low + metrics.clipped_high) / metrics.tokens.clamp(min=1)
        return loss, clip_ratio.to(loss.dtype), mean_over(old_log_probs - log_probs, mask), vllm_kl, filtered

    def _weight(
        self, mask: Tensor, dp_size: int, tokens: float | Tensor | None, sequences: float | Tensor | None
    ) -> Tensor:
        """aggregate_loss as the weight of every token."""
        if self.token_level_loss:
            return mask / mask.sum() if tokens is None else mask / tokens * dp_size
        counts = mask.sum(-1, keepdim=True)
        weight = mask / (counts + 1e-8)  # OpenRLHF's guard
        return weight / (counts > 0).sum() if sequences is None else weight / sequences * dp_size

    def _correction(self, old: Tensor, rollout: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """The weight of every token, [B, T], and the share of tokens or sequences that the bounds hold back."""
        low, high = self.is_correction_threshold
        by_sequence = self.is_correction_level == "seq"
        gap = old - rollout

        def mean(x: Tensor) -> Tensor:
            return torch.where(mask != 0, x, 0.0).sum(-1, keepdim=True) / (mask != 0).sum(-1, keepdim=True)

        if self.is_correction_gating == "ratio":
            statistic = (mean(gap) if by_sequence else gap).exp()
        else:
            p, q = (x.exp().clamp(1e-6, 1 - 1e-6) for x in (rollout, old))
            if self.is_correction_gating == "tv":
                statistic = (p - q).abs()
            else:
                statistic = p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()
            statistic = mean(statistic) if by_sequence else statistic
        inside = (statistic >= low) & (statistic <= high)
        if self.is_correction_mode == "clip":
            weights = statistic.clamp(low, high)
        else:
            weights = torch.where(inside, gap.exp(), 0.0)
        outside = (~inside).to(gap.dtype)
        return weights, outside.mean() if by_sequence else mean_over(outside, mask)
