"""What policy_loss computes (PolicyLossSpec) and what it counts on the way (PolicyLossMetrics)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

Ratio = Literal["token", "step", "step_token"]
Clip = Literal["none", "ppo", "dual", "cispo"]
Kl = Literal["none", "k1", "k2", "k3"]
Correction = Literal["none", "tis", "icepop", "mask"]
Level = Literal["token", "step", "step_mean"]


@dataclass(frozen=True)
class PolicyLossSpec:
    """The loss of token t of step s: weight * (-ω f(r, A) + kl_coef * kl). Means and sums run over tokens of weight not 0.

    ratio: r, with d = logp - old_logp. sg stops the gradient.
        token       exp(d)                                            PPO, GRPO
        step        exp(mean of d over the step)                      GSPO, arXiv 2507.18071, equation 7
        step_token  sg(exp(mean of d)) * exp(logp - sg(logp))         GSPO-token, its equation 14: the value of `step`, but every
                                                                      token's gradient goes with its own advantage
    clip: f. lo = 1 - clip_low, hi = 1 + clip_high.
        none        r A
        ppo         min(r A, clip(r, lo, hi) A)                       arXiv 1707.06347, equation 7
        dual        the same, and at least dual_clip * A where A < 0  arXiv 1912.09729, equation 5
        cispo       sg(clip(r, lo, hi)) A logp                        arXiv 2506.13585, equation 4
    clip_low: inf for no lower bound; clip_high: inf for no upper one.
    kl: with x = ref_logp - logp (Schulman, "Approximating KL divergence", 2020). The gradient is that of the expression:
        k1          -x                 d/d logp = 1: on policy it is 0 in expectation, and pulls nowhere
        k2          x^2 / 2            d/d logp = -x: on policy, in expectation, the gradient of KL(policy || reference)
        k3          exp(x) - 1 - x     d/d logp = 1 - exp(x): in expectation that of KL(reference || policy)
    kl_limit: the estimate is clipped to [-kl_limit, kl_limit] and has no gradient outside.
    correction: ω, detached, from c = exp(old_logp - rollout_logp): what the trainer's old policy gives a token over what the
        rollout engine gave it. lo, hi = correction_low, correction_high.
        tis         clip(c, lo, hi)                                   truncated importance sampling
        icepop      c inside [lo, hi], 0 outside                      (TRL: token_mask, sequence_mask)
        mask        1 inside [lo, hi], 0 outside                      rejection without a weight
    correction_level: c of a token (token), the product over its step (step), or its geometric mean over the step (step_mean).

    Raises ValueError for an unknown word and for numbers that cannot work.
    """

    ratio: Ratio = "token"
    clip: Clip = "ppo"
    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float = 3.0
    kl: Kl = "none"
    kl_coef: float = 0.0
    kl_limit: float = math.inf
    correction: Correction = "none"
    correction_level: Level = "token"
    correction_low: float = 0.0
    correction_high: float = 2.0

    def __post_init__(self) -> None:
        for name, words in (
            ("ratio", Ratio),
            ("clip", Clip),
            ("kl", Kl),
            ("correction", Correction),
            ("correction_level", Level),
        ):
            if getattr(self, name) not in get_args(words):
                raise ValueError(f"{name} is {getattr(self, name)!r}; use one of {', '.join(get_args(words))}")
        if not (self.clip_low >= 0 and self.clip_high >= 0):
            raise ValueError(f"clip_low is {self.clip_low} and clip_high {self.clip_high}; neither may be below 0")
        if not self.dual_clip > 1:
            raise ValueError(f"dual_clip is {self.dual_clip}; it bounds the ratio from above and must exceed 1")
        if not math.isfinite(self.kl_coef) or (self.kl == "none" and self.kl_coef != 0):
            raise ValueError(
                f"kl_coef is {self.kl_coef} with kl={self.kl!r}; use a finite number, and 0 without a KL term"
            )
        if not self.kl_limit > 0:
            raise ValueError(f"kl_limit is {self.kl_limit}; use a positive number, or inf for no limit")
        if not 0 <= self.correction_low < self.correction_high:
            raise ValueError(
                f"correction_low is {self.correction_low} and correction_high {self.correction_high}; they must ascend from 0"
            )

    @property
    def ratio_bounds(self) -> tuple[float, float]:
        """lo and hi of the clip; a ratio is never below 0."""
        return max(0.0, 1 - self.clip_low), 1 + self.clip_high


# The order of PolicyLossMetrics.sums.
SUMS = (
    "tokens",
    "clipped_low",
    "clipped_high",
    "clipped_dual",
    "kl",
    "ratio",
    "importance",
    "importance_squared",
    "truncated",
)


@dataclass(frozen=True)
class PolicyLossMetrics:
    """Sums over the tokens of weight not 0, detached and on the loss's device: nothing waits for it until they are read.

    sums: float64 [9], in the order of SUMS:
        tokens              how many there are
        clipped_low, _high  ppo, dual: the lower (upper) bound of the clip took the gradient; cispo: it changed the ratio
        clipped_dual        dual: dual_clip took the gradient
        kl                  the KL estimate
        ratio               r
        importance          v = r ω, and importance_squared v^2
        truncated           the correction changed c (tis) or set it to 0 (icepop, mask)
    ratio_max: float64 [], the largest r; 0 without tokens.

    They add up: `a + b` for micro-batches; for ranks, all_reduce `sums` with SUM and `ratio_max` with MAX. `means` at the end.
    """

    sums: Tensor
    ratio_max: Tensor

    def __add__(self, other: PolicyLossMetrics) -> PolicyLossMetrics:
        return PolicyLossMetrics(self.sums + other.sums, torch.maximum(self.ratio_max, other.ratio_max))

    def __getattr__(self, name: str) -> Tensor:
        if name not in SUMS:
            raise AttributeError(f"PolicyLossMetrics has no {name!r}; its sums are {', '.join(SUMS)}")
        return self.sums[SUMS.index(name)]

    def means(self) -> dict[str, Tensor]:
        """Means over the tokens, the largest ratio, and the effective sample size (Σ v)^2 / Σ v^2 over the tokens: 1 when all
        tokens count alike. Zeros without tokens."""
        tokens = self.tokens.clamp(min=1)
        names = ("clipped_low", "clipped_high", "clipped_dual", "kl", "ratio", "truncated")
        effective = self.importance.square() / self.importance_squared / tokens
        return {name: getattr(self, name) / tokens for name in names} | {
            "ratio_max": self.ratio_max,
            "effective_samples": torch.where(self.importance_squared > 0, effective, 0.0),
        }
