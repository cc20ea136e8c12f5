"""What policy_loss computes (PolicyLossSpec) and what it counts on the way (PolicyLossMetrics)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

Ratio = Literal["token", "step", "step_token", "step_sum"]
Clip = Literal["none", "ppo", "dual", "cispo", "sapo", "vespo"]
Kl = Literal["none", "k1", "k2", "k3"]
Correction = Literal["none", "tis", "icepop", "mask"]
Level = Literal["token", "step", "step_mean"]

STEP_SUM_BOUNDS = (math.log(1e-8), 20.0)  # of log r with ratio "step_sum"


@dataclass(frozen=True)
class PolicyLossSpec:
    """The loss of token t of step s: weight * (-ω f(r, A) + kl_coef * kl). Means and sums run over tokens of weight not 0.

    ratio: r, with d = logp - old_logp. sg stops the gradient.
        token       exp(d)                                            PPO, GRPO
        step        exp(mean of d over the step)                      GSPO, arXiv 2507.18071, equation 7
        step_token  sg(exp(mean of d)) * exp(logp - sg(logp))         GSPO-token, its equation 14: the value of `step`, but every
                                                                      token's gradient goes with its own advantage
        step_sum    exp(sum of d over the step)                       VESPO, arXiv 2602.10693; |d| <= 20 a token, r in [1e-8, e^20]
    clip: f. lo = 1 - clip_low, hi = 1 + clip_high.
        none        r A
        ppo         min(r A, clip(r, lo, hi) A)                       arXiv 1707.06347, equation 7
        dual        the same, and at least dual_clip * A where A < 0  arXiv 1912.09729, equation 5
        cispo       sg(clip(r, lo, hi)) A logp                        arXiv 2506.13585, equation 4
        sapo        4 / τ sigmoid(τ (r - 1)) A                        arXiv 2511.20347: τ = sapo[0] where A > 0, else sapo[1]
        vespo       sg(r^k exp(λ (1 - r))) A logp                     its soft weight, 1 at r = 1; only with ratio="step_sum", and that
                    only with it; k, λ = vespo[:2] where A >= 0, else vespo[2:]
    clip_low: inf for no lower bound; clip_high: inf for no upper one.
    kl: with x = ref_logp - logp (Schulman, "Approximating KL divergence", 2020). The gradient is that of the expression:
        k1          -x                 d/d logp = 1: on policy it is 0 in expectation, and pulls nowhere
        k2          x^2 / 2            d/d logp = -x: on policy, in expectation, the gradient of KL(policy || reference)
        k3          exp(x) - 1 - x     d/d logp = 1 - exp(x): in expectation that of KL(reference || policy)
    kl_limit: the estimate is clipped to [-kl_limit, kl_limit] and has no gradient outside.
    kl_importance: the clipped estimate is multiplied by r, with gradient through both: what tokens of the old policy say about the
        new one's KL without bias (DeepSeek-V3.2, arXiv 2512.02556). Not with ratio="step" under cispo, nor with vespo.
    correction: ω, detached, from c = exp(old_logp - rollout_logp): what the trainer's old policy gives a token over what the
        rollout engine gave it. lo, hi = correction_low, correction_high.
        tis         clip(c, lo, hi)                                   truncated importance sampling
        icepop      c inside [lo, hi], 0 outside                      (TRL: token_mask, sequence_mask)
        mask        1 inside [lo, hi], 0 outside                      rejection without a weight
    correction_level: c of a token (token), the product over its step (step), or its geometric mean over the step (step_mean).
    correction_gate: the level of the c that icepop and mask hold against lo and hi; None: correction_level. So whole steps can be
        rejected while the tokens of the others keep their own weights (level "token", gate "step_mean": OpenRLHF's seq-mask-tis).

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
    correction_gate: Level | None = None
    kl_importance: bool = False
    sapo: tuple[float, float] = (1.0, 1.05)
    vespo: tuple[float, float, float, float] = (2.0, 3.0, 3.0, 2.0)

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

        self._check_gate_and_soft_clips()

    def _check_gate_and_soft_clips(self) -> None:
        if self.correction_gate is not None:
            if self.correction_gate not in get_args(Level):
                raise ValueError(
                    f"correction_gate is {self.correction_gate!r}; use one of {', '.join(get_args(Level))}"
                )
            if self.correction not in ("icepop", "mask"):
                raise ValueError(
                    f"correction_gate is {self.correction_gate!r} with correction={self.correction!r}; only icepop and mask reject"
                )
        if (self.ratio == "step_sum") != (self.clip == "vespo"):
            raise ValueError(
                f"ratio is {self.ratio!r} with clip={self.clip!r}; 'step_sum' and 'vespo' go with each other"
            )
        if self.clip == "vespo" and self.correction != "none":
            raise ValueError(
                f"correction is {self.correction!r} with clip='vespo', which takes weights into its ratio; pass them as importance="
            )
        if self.kl_importance and (
            self.kl == "none" or self.clip == "vespo" or (self.ratio, self.clip) == ("step", "cispo")
        ):
            raise ValueError(
                f"kl_importance with kl={self.kl!r}, ratio={self.ratio!r}, clip={self.clip!r}; it needs a KL term and a ratio that has "
                "a gradient"
            )
        if len(self.sapo) != 2 or not all(0 < x < math.inf for x in self.sapo):
            raise ValueError(f"sapo is {self.sapo}; give two positive temperatures, for A > 0 and for the others")
        if len(self.vespo) != 4 or not all(0 <= x < math.inf for x in self.vespo):
            raise ValueError(f"vespo is {self.vespo}; give k and λ for A >= 0, k and λ for the others, none below 0")

    @property
    def gate(self) -> Level:
        """The level whose c is held against the bounds."""
        return self.correction_gate or self.correction_level

    @property
    def by_token(self) -> bool:
        """Whether ratio and correction of a token are its own, so that no mean or sum over its segment is needed."""
        corrected = self.correction != "none"
        return self.ratio == "token" and not (corrected and (self.correction_level, self.gate) != ("token", "token"))

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

    They add up: `a + b` or `sum(…)` for micro-batches; for ranks, all_reduce `sums` with SUM and `ratio_max` with MAX. `means` at the end.
    """

    sums: Tensor
    ratio_max: Tensor

    def __add__(self, other: PolicyLossMetrics) -> PolicyLossMetrics:
        return PolicyLossMetrics(self.sums + other.sums, torch.maximum(self.ratio_max, other.ratio_max))

    def __radd__(self, other: int) -> PolicyLossMetrics:
        """0 + metrics, so that sum() adds them up."""
        return self if other == 0 else NotImplemented

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
