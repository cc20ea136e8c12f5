"""Weights that make policy_loss aggregate as papers and libraries do, and the settings of those libraries.

Legend: N tokens, A segments (steps). T, S: numbers of used tokens and of steps in the WHOLE batch, over micro-batches and ranks.

    preset = PRESETS["trl.dapo"]                                or trl_preset("dapo", epsilon_high=0.28)
    totals = preset.counts(offsets, mask)                       add up over micro-batches, all_reduce(SUM) over ranks
    weight = preset.weights(offsets, totals, mask)
    loss, metrics = policy_loss(logp, old_logp, advantage, offsets, preset.spec, weight=weight)

The loss is the sum over micro-batches and ranks. A wrapper that averages gradients over ranks (DDP, FSDP) wants it times their number.

Left out of all presets: entropy bonus, auxiliary losses, advantages. The libraries guard exponentials and divisions by constants
(named below) that lie outside any useful training; only there do the presets differ.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from swirl_kernels.policy_loss.spec import Clip, Correction, Kl, Level, PolicyLossSpec
from swirl_kernels.segment_reduce import check_offsets, segment_reduce

Aggregation = Literal["token_mean", "step_token_mean", "step_token_sum", "sum"]


def loss_counts(offsets: Tensor, mask: Tensor | None = None, *, empty_steps: bool = False) -> Tensor:
    """float64 [2]: used tokens and steps of one micro-batch; their sums over the batch are the `totals` of loss_weights.

    offsets: int32 or int64 [A + 1]. mask: [N], 0 or False for tokens that are not used; None: all are. empty_steps: count steps without a
    used token too. Nothing is read back from the device.
    """
    used = _used(offsets, mask)
    steps = used.new_full((), len(used)) if empty_steps else (used > 0).sum()
    return torch.stack([used.sum(), steps]).double()


def loss_weights(
    offsets: Tensor, aggregation: Aggregation, totals: Tensor, mask: Tensor | None = None, *, constant: float = 1.0
) -> Tensor:
    """The weight of every token: [A], one a segment, or with a mask [N], 0 where the mask is; in the dtype of totals.

    totals: [2], T and S. With n used tokens in a token's own step:
        token_mean        1 / T               mean over all tokens
        step_token_mean   1 / (S n)           mean over steps of the mean over their tokens
        step_token_sum    1 / (S constant)    mean over steps of the sum over their tokens; over a constant length: Dr. GRPO
        sum               1 / constant        sum over all tokens
    T and S count as at least 1. Raises ValueError for another word, for a constant that is not positive, and for totals that are
    not [2].
    """
    if aggregation not in get_args(Aggregation):
        raise ValueError(f"aggregation is {aggregation!r}; use one of {', '.join(get_args(Aggregation))}")
    if not 0 < constant < math.inf:
        raise ValueError(f"constant is {constant}; it divides the loss and must be positive and finite")
    if totals.shape != (2,) or not totals.is_floating_point():
        raise ValueError(f"totals have shape {tuple(totals.shape)} and dtype {totals.dtype}; give those of loss_counts")
    tokens, steps = totals.clamp(min=1).unbind()
    used = _used(offsets, mask).to(totals.dtype)
    each = {
        "token_mean": 1 / tokens,
        "step_token_mean": 1 / (steps * used.clamp(min=1)),
        "step_token_sum": 1 / (steps * constant),
        "sum": torch.ones_like(steps) / constant,
    }[aggregation]
    weight = torch.where(used > 0, each, 0.0)
    if mask is None:
        return weight
    owner = torch.searchsorted(offsets[1:].contiguous(), torch.arange(len(mask), device=mask.device), right=True)
    return torch.where(mask != 0, weight[owner.clamp(max=len(weight) - 1)], 0.0) if len(mask) else weight.new_zeros(0)


def _used(offsets: Tensor, mask: Tensor | None) -> Tensor:
    check_offsets(offsets, 0, "mask", readable=False)  # their dtype and shape
    return offsets.diff() if mask is None else segment_reduce((mask != 0).float(), offsets, "sum")


@dataclass(frozen=True)
class PolicyLossPreset:
    """What a library computes: a spec, and the arguments of loss_counts and loss_weights. source: version and function."""

    spec: PolicyLossSpec
    aggregation: Aggregation
    source: str
    constant: float = 1.0
    empty_steps: bool = False

    def counts(self, offsets: Tensor, mask: Tensor | None = None) -> Tensor:
        return loss_counts(offsets, mask, empty_steps=self.empty_steps)

    def weights(self, offsets: Tensor, totals: Tensor, mask: Tensor | None = None) -> Tensor:
        return loss_weights(offsets, self.aggregation, totals, mask, constant=self.constant)


def trl_preset(
    loss_type: Literal["grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo"] = "dapo",
    *,
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
    delta: float | None = None,
    beta: float = 0.0,
    importance_sampling_level: Literal["token", "sequence"] = "token",
    max_completion_length: int = 512,
    vllm_importance_sampling_mode: (
        Literal["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"] | None
    ) = None,
    vllm_importance_sampling_clip_min: float | None = None,
    vllm_importance_sampling_clip_max: float | None = 3.0,
    use_bias_correction_kl: bool = False,
    sapo_temperature_pos: float = 1.0,
    sapo_temperature_neg: float = 1.05,
    vespo_k_pos: float = 2.0,
    vespo_lambda_pos: float = 3.0,
    vespo_k_neg: float = 3.0,
    vespo_lambda_neg: float = 2.0,
) -> PolicyLossPreset:
    """TRL 1.16.0, GRPOTrainer._compute_loss, under the names and defaults of GRPOConfig, but for two: the mode None means no
    correction, and use_bias_correction_kl, which GRPOConfig turns on, is off here until it is asked for.

    The weights are those of the whole batch. TRL agrees when its micro-batches hold equal numbers of sequences (grpo, dr_grpo), and
    for bnpo when there is one. grpo: DeepSeekMath, arXiv 2402.03300, equation 3; dr_grpo: arXiv 2503.20783; dapo: arXiv
    2503.14476, equation 8; cispo: arXiv 2506.13585, where epsilon_high is the largest ratio itself (say 5.0); sapo: arXiv 2511.20347;
    luspo: arXiv 2602.05261, which wants importance_sampling_level="sequence"; vespo: arXiv 2602.10693, whose ratio is the product over
    the sequence whatever the level, and takes TRL's importance_sampling_ratio as policy_loss(importance=…).
    rollout_logp: sampling log-probs; where they are NaN TRL takes a ratio of 1, so put old_logp there.

    Raises ValueError for words TRL does not know and for a delta below 1 + epsilon_high (TRL would clip positive advantages by it),
    and for vespo with a mode or with use_bias_correction_kl.
    """
    high = epsilon if epsilon_high is None else epsilon_high
    if loss_type == "cispo":
        if high < 1:
            raise ValueError(f"epsilon_high is {high}; with loss_type='cispo' it is the largest ratio: give at least 1")
        clip, clip_low, clip_high = "cispo", math.inf, high - 1
    elif loss_type in ("sapo", "vespo"):
        clip, clip_low, clip_high = loss_type, epsilon, high
    else:
        clip, clip_low, clip_high = "ppo" if delta is None else "dual", epsilon, high
    if delta is not None and delta < 1 + high and clip == "dual":
        raise ValueError(f"delta is {delta}, below 1 + epsilon_high = {1 + high}; raise it, or leave it out")
    aggregations: dict[str, Aggregation] = {
        "grpo": "step_token_mean",
        "dr_grpo": "step_token_sum",
        "bnpo": "token_mean",
        "dapo": "token_mean",
        "cispo": "token_mean",
        "sapo": "step_token_mean",
        "luspo": "step_token_sum",
        "vespo": "token_mean",
    }
    corrections: dict[str | None, tuple[Correction, Level]] = {
        None: ("none", "token"),
        "token_truncate": ("tis", "token"),
        "token_mask": ("icepop", "token"),
        "sequence_truncate": ("tis", "step"),
        "sequence_mask": ("icepop", "step"),
    }
    correction, level = _word("vllm_importance_sampling_mode", vllm_importance_sampling_mode, corrections)
    ratio = _word("importance_sampling_level", importance_sampling_level, {"token": "token", "sequence": "step"})
    if loss_type == "vespo" and (correction != "none" or use_bias_correction_kl):
        raise ValueError(
            f"loss_type='vespo' with vllm_importance_sampling_mode={vllm_importance_sampling_mode!r} and use_bias_correction_kl="
            f"{use_bias_correction_kl}; leave both out, and pass TRL's importance_sampling_ratio as policy_loss(importance=...)"
        )
    low, cap = vllm_importance_sampling_clip_min, vllm_importance_sampling_clip_max
    spec = PolicyLossSpec(
        ratio="step_sum" if loss_type == "vespo" else ratio,
        clip=clip,  # type: ignore[arg-type]
        clip_low=clip_low,
        clip_high=clip_high,
        dual_clip=3.0 if delta is None else delta,
        kl="none" if beta == 0 else "k3",
        kl_coef=beta,
        correction=correction,
        correction_level=level,
        correction_low=0.0 if low is None else low,
        correction_high=math.inf if cap is None else cap,
        kl_importance=use_bias_correction_kl and beta != 0,
        sapo=(sapo_temperature_pos, sapo_temperature_neg),
        vespo=(vespo_k_pos, vespo_lambda_pos, vespo_k_neg, vespo_lambda_neg),
    )
    return PolicyLossPreset(
        spec,
        _word("loss_type", loss_type, aggregations),
        f"TRL 1.16.0, trl/trainer/grpo_trainer.py, GRPOTrainer._compute_loss, loss_type={loss_type}",
        constant=max_completion_length if loss_type == "dr_grpo" else 1.0,
        empty_steps=True,
    )


def verl_preset(
    loss_mode: Literal["vanilla", "gspo", "cispo", "sapo"] = "vanilla",
    *,
    clip_ratio_low: float = 0.2,
    clip_ratio_high: float = 0.2,
    clip_ratio_c: float = 3.0,
    loss_agg_mode: Literal[
        "token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm"
    ] = "token-mean",
    loss_scale_factor: float | None = None,
    kl_loss_type: Literal["kl", "k1", "mse", "k2", "low_var_kl", "k3"] | None = None,
    kl_loss_coef: float = 0.001,
    rollout_is: Literal["token", "sequence"] | None = None,
    rollout_is_threshold: float = 2.0,
    tau_pos: float = 1.0,
    tau_neg: float = 1.05,
) -> PolicyLossPreset:
    """verl 0.8.0.dev (commit b178a3c), trainer/ppo/core_algos.py: compute_policy_loss_vanilla, _gspo, _cispo or _sapo, agg_loss and
    kl_penalty, with the weights of rollout_corr_helper.compute_rollout_correction_weights (rollout_logp: rollout log-probs).

    vanilla: PPO with the dual clip, arXiv 1912.09729. gspo: arXiv 2507.18071, sapo: arXiv 2511.20347, both always
    seq-mean-token-mean; verl takes gspo's gradient as GSPO-token does, and the KL term by loss_agg_mode: here all by
    seq-mean-token-mean. kl_loss_type None: use_kl_loss
    is off. verl's guards, not repeated: |logp - old_logp| <= 20 (gspo: the log-ratio <= 10), |old_logp - rollout| <= 20, and 1e-8
    added to token counts.

    Raises ValueError for words verl does not know and for seq-mean-token-sum-norm without loss_scale_factor (verl would take the
    padded length).
    """
    aggregations: dict[str, Aggregation] = {
        "token-mean": "token_mean",
        "seq-mean-token-sum": "step_token_sum",
        "seq-mean-token-mean": "step_token_mean",
        "seq-mean-token-sum-norm": "sum",
    }
    estimators: dict[str | None, Kl] = {
        None: "none",
        "kl": "k1",
        "k1": "k1",
        "mse": "k2",
        "k2": "k2",
        "low_var_kl": "k3",
        "k3": "k3",
    }
    by_step = loss_mode in ("gspo", "sapo")
    aggregation = _word("loss_agg_mode", "seq-mean-token-mean" if by_step else loss_agg_mode, aggregations)
    if aggregation == "sum" and loss_scale_factor is None:
        raise ValueError("loss_agg_mode='seq-mean-token-sum-norm' needs loss_scale_factor, the constant that divides")
    clips: dict[str, Clip] = {"vanilla": "dual", "gspo": "ppo", "cispo": "cispo", "sapo": "sapo"}
    kl = _word("kl_loss_type", kl_loss_type, estimators)
    levels: dict[str | None, Level] = {None: "token", "token": "token", "sequence": "step"}
    spec = PolicyLossSpec(
        ratio="step_token" if loss_mode == "gspo" else "token",
        clip=_word("loss_mode", loss_mode, clips),
        clip_low=clip_ratio_low,
        clip_high=clip_ratio_high,
        dual_clip=clip_ratio_c,
        kl=kl,
        kl_coef=0.0 if kl == "none" else kl_loss_coef,
        kl_limit=10.0 if kl == "k3" else math.inf,
        correction="none" if rollout_is is None else "tis",
        correction_level=_word("rollout_is", rollout_is, levels),
        correction_high=rollout_is_threshold,
        sapo=(tau_pos, tau_neg),
    )
    return PolicyLossPreset(
        spec,
        aggregation,
        f"verl 0.8.0.dev (b178a3c), verl/trainer/ppo/core_algos.py, compute_policy_loss_{loss_mode}",
        constant=loss_scale_factor if aggregation == "sum" and loss_scale_factor is not None else 1.0,
    )


def openrlhf_preset(
    *,
    eps_clip_low_high: tuple[float, float] = (0.2, 0.2),
    dual_clip: float | None = None,
    token_level_loss: bool = True,
    kl_estimator: Literal["k1", "k2", "k3"] | None = None,
    kl_coef: float = 0.01,
    is_correction_type: Literal["tis", "icepop", "seq-mask-tis"] | None = None,
    is_correction_threshold: tuple[float, float] = (0.5, 5.0),
) -> PolicyLossPreset:
    """OpenRLHF 0.11.0 (commit 3c3be62), models/loss.py, PolicyLoss with policy_loss_type="ppo" and aggregate_loss, and the KL term of
    models/utils.py, compute_approx_kl (kl_estimator None: algo.kl.use_loss is off).

    is_correction_type None: no correction; seq-mask-tis: steps whose mean ratio lies outside are dropped, the tokens of the others keep
    their own. Its guards, not repeated: |logp - old_logp| <= 20, and 1e-8 added to token counts.
    Raises ValueError for a word OpenRLHF does not know.
    """
    corrections: dict[str | None, Correction] = {
        None: "none",
        "tis": "tis",
        "icepop": "icepop",
        "seq-mask-tis": "icepop",
    }
    estimators: dict[str | None, Kl] = {None: "none", "k1": "k1", "k2": "k2", "k3": "k3"}
    low, high = is_correction_threshold
    kl = _word("kl_estimator", kl_estimator, estimators)
    spec = PolicyLossSpec(
        clip="ppo" if dual_clip is None else "dual",
        clip_low=eps_clip_low_high[0],
        clip_high=eps_clip_low_high[1],
        dual_clip=3.0 if dual_clip is None else dual_clip,
        kl=kl,
        kl_coef=0.0 if kl == "none" else kl_coef,
        kl_limit=10.0,
        correction=_word("is_correction_type", is_correction_type, corrections),
        correction_low=low,
        correction_high=high,
        correction_gate="step_mean" if is_correction_type == "seq-mask-tis" else None,
    )
    return PolicyLossPreset(
        spec,
        "token_mean" if token_level_loss else "step_token_mean",
        "OpenRLHF 0.11.0 (3c3be62), openrlhf/models/loss.py, PolicyLoss",
    )


def _word(name, word, meanings):  # type: ignore[no-untyped-def]
    if word not in meanings:
        raise ValueError(f"{name} is {word!r}; use one of {', '.join(map(str, meanings))}")
    return meanings[word]


# With the defaults of the libraries.
PRESETS: Mapping[str, PolicyLossPreset] = {
    "trl.grpo": trl_preset("grpo"),
    "trl.dr_grpo": trl_preset("dr_grpo"),
    "trl.dapo": trl_preset("dapo"),
    "trl.sapo": trl_preset("sapo"),
    "trl.luspo": trl_preset("luspo", importance_sampling_level="sequence"),
    "trl.vespo": trl_preset("vespo"),
    "verl.ppo": verl_preset("vanilla"),
    "verl.gspo": verl_preset("gspo"),
    "verl.sapo": verl_preset("sapo"),
    "openrlhf.ppo": openrlhf_preset(),
}
