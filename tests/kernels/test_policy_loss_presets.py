"""Weights and presets in float64 against the formulas as published, and against TRL's own trainer where it is installed.

The formulas stand on padded [B, L] tensors, as the libraries have them; padding and masked tokens hold NaN or nonsense.
"""

import itertools
import math
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from swirl_kernels import (
    PRESETS,
    PolicyLossPreset,
    loss_counts,
    loss_weights,
    openrlhf_preset,
    policy_loss,
    trl_preset,
    verl_preset,
)

B, L = 7, 11
EPS = 0.1  # clip range: many tokens pass it


@pytest.fixture(autouse=True)
def torch_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SWIRL_KERNELS_BACKEND", "torch")


class Batch:
    """Padded tensors [B, L], advantages [B], a mask with gaps, and the same packed."""

    def __init__(self, seed: int = 0, empty: bool = False) -> None:
        torch.manual_seed(seed)
        self.lengths = torch.tensor([L, 1, 4, 8, 2, 6, 9])
        self.real = torch.arange(L) < self.lengths[:, None]
        self.mask = (self.real & (torch.rand(B, L) > 0.2)).double()
        self.mask[:, 0] = 1.0
        if empty:
            self.mask[3] = 0.0
        self.logp = torch.randn(B, L, dtype=torch.float64) - 2
        self.old = self.logp + 0.2 * torch.randn(B, L, dtype=torch.float64)
        self.ref = self.logp + 0.3 * torch.randn(B, L, dtype=torch.float64)
        self.rollout = self.old + 0.1 * torch.randn(B, L, dtype=torch.float64)
        self.advantages = torch.randn(B, dtype=torch.float64)
        self.offsets = torch.cat([torch.zeros(1, dtype=torch.int64), self.lengths.cumsum(0)])

    def packed(self, x: Tensor) -> Tensor:
        return x[self.real]

    def ours(self, preset: PolicyLossPreset, importance: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Loss and gradient [B, L], what is not used poisoned."""
        mask = self.packed(self.mask)
        dead = mask == 0
        logp, old, ref, rollout = (
            self.packed(x).masked_fill(dead, math.nan) for x in (self.logp, self.old, self.ref, self.rollout)
        )
        totals = preset.counts(self.offsets, mask)
        loss, _ = policy_loss(
            logp.requires_grad_(),
            old,
            self.advantages,
            self.offsets,
            preset.spec,
            ref_logp=None if preset.spec.kl == "none" else ref,
            rollout_logp=None if preset.spec.correction == "none" else rollout,
            importance=importance,
            weight=preset.weights(self.offsets, totals, mask),
        )
        (gradient,) = torch.autograd.grad(loss, logp)
        return loss.detach(), torch.zeros(B, L, dtype=torch.float64).masked_scatter(self.real, gradient)

    def agree(self, preset: PolicyLossPreset, formula: Any, importance: Tensor | None = None) -> None:
        """formula: logp [B, L] -> loss."""
        logp = self.logp.clone().requires_grad_()
        expected = formula(logp)
        (gradient,) = torch.autograd.grad(expected, logp)
        assert gradient.norm() > 1e-3
        loss, ours = self.ours(preset, importance)
        torch.testing.assert_close(loss, expected.detach(), rtol=1e-12, atol=0)
        assert (ours - gradient).norm() <= 1e-12 * gradient.norm()
        torch.testing.assert_close(ours, gradient, rtol=1e-11, atol=1e-15)


# The aggregations, in words of the papers.


def test_weights_say_what_their_names_say() -> None:
    batch = Batch(empty=True)
    mask, values = batch.mask, torch.randn(B, L, dtype=torch.float64)
    n = mask.sum(1)
    used = [b for b in range(B) if n[b]]
    means = {
        "token_mean": (values * mask).sum() / mask.sum(),
        "step_token_mean": sum((values[b] * mask[b]).sum() / n[b] for b in used) / len(used),
        "step_token_sum": sum((values[b] * mask[b]).sum() for b in used) / len(used) / 3.0,
        "sum": (values * mask).sum() / 3.0,
    }
    packed, flags = batch.packed(values), batch.packed(mask)
    totals = loss_counts(batch.offsets, flags)
    assert totals.tolist() == [mask.sum(), B - 1] and totals.dtype == torch.float64
    assert loss_counts(batch.offsets, flags, empty_steps=True).tolist() == [mask.sum(), B]
    for name, expected in means.items():
        weight = loss_weights(batch.offsets, name, totals, flags, constant=3.0 if "sum" in name else 1.0)  # type: ignore[arg-type]
        assert (weight[flags == 0] == 0).all()
        torch.testing.assert_close((weight * packed).sum(), expected, rtol=1e-12, atol=1e-15)
        assert torch.equal(
            weight,
            loss_weights(batch.offsets, name, totals, flags.bool(), constant=3.0 if "sum" in name else 1.0),  # type: ignore[arg-type]
        )
    # without a mask, one weight a segment; an empty segment has none
    offsets = torch.tensor([0, 2, 2, 5])
    totals = loss_counts(offsets)
    assert totals.tolist() == [5, 2]
    assert loss_weights(offsets, "step_token_mean", totals).tolist() == [0.25, 0.0, 1 / 6]
    assert loss_weights(offsets, "token_mean", totals).tolist() == [0.2, 0.0, 0.2]
    nothing = torch.zeros(1, dtype=torch.int64)
    assert loss_weights(nothing, "token_mean", loss_counts(nothing), torch.zeros(0)).shape == (0,)


@pytest.mark.parametrize("aggregation", ["token_mean", "step_token_mean", "step_token_sum", "sum"])
def test_global_counts_make_the_loss_independent_of_the_split(aggregation: Any) -> None:
    batch = Batch(empty=True)
    preset = PolicyLossPreset(verl_preset().spec, aggregation, "", constant=2.0 if "sum" in aggregation else 1.0)
    mask = batch.packed(batch.mask)
    whole = preset.weights(batch.offsets, preset.counts(batch.offsets, mask), mask)
    for cut in (0, 1, 3, 4, B):
        at = int(batch.offsets[cut])
        parts = [(batch.offsets[: cut + 1], mask[:at]), (batch.offsets[cut:] - at, mask[at:])]
        totals = sum(preset.counts(*part) for part in parts)
        split = torch.cat([preset.weights(offsets, totals, flags) for offsets, flags in parts])
        torch.testing.assert_close(split, whole, rtol=1e-15, atol=0)


def test_wrong_arguments_are_refused() -> None:
    offsets, totals = torch.tensor([0, 2]), torch.ones(2)
    for message, call in (
        ("aggregation is 'mean'", lambda: loss_weights(offsets, "mean", totals)),  # type: ignore[arg-type]
        ("constant is 0", lambda: loss_weights(offsets, "sum", totals, constant=0)),
        ("totals have shape", lambda: loss_weights(offsets, "sum", torch.ones(3))),
        ("loss_type is 'ppo'", lambda: trl_preset("ppo")),  # type: ignore[arg-type]
        ("delta is 1.1, below 1 . epsilon_high = 1.2", lambda: trl_preset("grpo", delta=1.1)),
        ("epsilon_high is 0.2; .* largest ratio", lambda: trl_preset("cispo")),
        ("vllm_importance_sampling_mode is 'x'", lambda: trl_preset(vllm_importance_sampling_mode="x")),  # type: ignore[arg-type]
        ("importance_sampling_level is 'step'", lambda: trl_preset(importance_sampling_level="step")),  # type: ignore[arg-type]
        ("loss_type='vespo' with", lambda: trl_preset("vespo", vllm_importance_sampling_mode="token_mask")),
        ("loss_mode is 'geo_mean'", lambda: verl_preset("geo_mean")),  # type: ignore[arg-type]
        ("kl_loss_type is 'abs'", lambda: verl_preset(kl_loss_type="abs")),  # type: ignore[arg-type]
        ("needs loss_scale_factor", lambda: verl_preset(loss_agg_mode="seq-mean-token-sum-norm")),
        ("is_correction_type is 'seq'", lambda: openrlhf_preset(is_correction_type="seq")),  # type: ignore[arg-type]
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_presets_carry_the_defaults_of_their_libraries() -> None:
    trl = {f"trl.{name}" for name in ("grpo", "dr_grpo", "dapo", "sapo", "luspo", "vespo")}
    assert set(PRESETS) == trl | {"verl.ppo", "verl.gspo", "verl.sapo", "openrlhf.ppo"}
    assert PRESETS["trl.dr_grpo"].constant == 512
    assert PRESETS["verl.ppo"].spec.dual_clip == 3.0 and PRESETS["openrlhf.ppo"].spec.clip == "ppo"
    assert all(p.spec.clip_low == p.spec.clip_high == 0.2 and p.spec.kl == "none" for p in PRESETS.values())
    assert all(any(c.isdigit() for c in p.source) for p in PRESETS.values())


# The published formulas.


def test_grpo_dr_grpo_and_dapo_as_in_their_papers() -> None:
    """A sequence at a time. DeepSeekMath eq. 3 with its KL estimator eq. 4; Dr. GRPO; DAPO eq. 8."""
    batch = Batch()
    beta, low, high = 0.04, EPS, 2 * EPS

    def token_terms(logp: Tensor, b: int, low: float, high: float, beta: float) -> list[Tensor]:
        terms = []
        for t in range(L):
            if batch.mask[b, t]:
                r = torch.exp(logp[b, t] - batch.old[b, t])
                A = batch.advantages[b]
                surrogate = torch.min(r * A, torch.clamp(r, 1 - low, 1 + high) * A)
                quotient = batch.ref[b, t] - logp[b, t]
                terms.append(surrogate - beta * (torch.exp(quotient) - quotient - 1))
        return terms

    def grpo(logp: Tensor) -> Tensor:
        return -sum(sum(ts) / len(ts) for ts in (token_terms(logp, b, low, low, beta) for b in range(B))) / B  # type: ignore[return-value]

    def dr_grpo(logp: Tensor) -> Tensor:
        return -sum(sum(token_terms(logp, b, low, low, 0.0)) for b in range(B)) / B / 20  # type: ignore[return-value]

    def dapo(logp: Tensor) -> Tensor:
        return -sum(sum(token_terms(logp, b, low, high, 0.0)) for b in range(B)) / batch.mask.sum()  # type: ignore[return-value]

    batch.agree(trl_preset("grpo", epsilon=low, beta=beta), grpo)
    batch.agree(trl_preset("dr_grpo", epsilon=low, max_completion_length=20), dr_grpo)
    batch.agree(trl_preset("dapo", epsilon=low, epsilon_high=high), dapo)


AGGREGATE = {
    "token-mean": lambda x, m: (x * m).sum() / m.sum(),
    "seq-mean-token-sum": lambda x, m: (x * m).sum(1).mean(),
    "seq-mean-token-mean": lambda x, m: ((x * m).sum(1) / m.sum(1)).mean(),
    "seq-mean-token-sum-norm": lambda x, m: (x * m).sum() / 20,
}
KL = {
    None: lambda x: torch.zeros_like(x),
    "k1": lambda x: -x,
    "k2": lambda x: x.square() / 2,
    "low_var_kl": lambda x: (x.exp() - x - 1).clamp(-10, 10),
}


@pytest.mark.parametrize("mode", list(AGGREGATE))
@pytest.mark.parametrize("rollout_is", [None, "token", "sequence"])
@pytest.mark.parametrize("loss_mode", ["vanilla", "cispo"])
def test_verl_ppo_with_dual_clip_and_cispo(mode: Any, rollout_is: Any, loss_mode: Any) -> None:
    """PPO's maximum of two losses, bounded by c A from above for negative advantages; rollout weights truncated from above."""
    for seed, (kl, c) in enumerate(itertools.product(KL, (1.05, 1.4))):
        batch = Batch(seed)
        batch.ref[:, 0] += 3.0  # beyond verl's bound of 10 on k3

        def formula(logp: Tensor, batch: Batch = batch, kl: Any = kl, c: float = c) -> Tensor:
            A = batch.advantages[:, None]
            r = (logp - batch.old).exp()
            bounded = r.clamp(1 - EPS, 1 + 2 * EPS)
            loss = torch.maximum(-A * r, -A * bounded)
            loss = torch.where(A < 0, torch.minimum(loss, -A * c), loss)
            if loss_mode == "cispo":
                loss = -bounded.detach() * A * logp
            log_weight = batch.old - batch.rollout
            if rollout_is == "sequence":
                log_weight = (log_weight * batch.mask).sum(1, keepdim=True)
            if rollout_is:
                loss = loss * log_weight.exp().clamp(max=1.05)
            return AGGREGATE[mode](loss, batch.mask) + 0.1 * AGGREGATE[mode](KL[kl](batch.ref - logp), batch.mask)

        preset = verl_preset(
            loss_mode,
            clip_ratio_low=EPS,
            clip_ratio_high=2 * EPS,
            clip_ratio_c=c,
            loss_agg_mode=mode,
            loss_scale_factor=20,
            kl_loss_type=kl,
            kl_loss_coef=0.1,
            rollout_is=rollout_is,
            rollout_is_threshold=1.05,
        )
        batch.agree(preset, formula)


@pytest.mark.parametrize("rollout_is", [None, "token"])
def test_verl_sapo_by_its_paper(rollout_is: Any) -> None:
    """arXiv 2511.20347: a gate of temperature τ in place of the clip, 4 / τ so that its slope at r = 1 is that of the ratio."""
    batch = Batch()

    def formula(logp: Tensor) -> Tensor:
        A = batch.advantages[:, None]
        tau = torch.where(A > 0, *A.new_tensor([1.3, 1.9]))
        gate = 4 / tau / (1 + (-tau * ((logp - batch.old).exp() - 1)).exp())
        weight = (batch.old - batch.rollout).exp().clamp(max=1.05) if rollout_is else 1.0
        return AGGREGATE["seq-mean-token-mean"](-gate * A * weight, batch.mask)

    batch.agree(
        verl_preset("sapo", tau_pos=1.3, tau_neg=1.9, rollout_is=rollout_is, rollout_is_threshold=1.05), formula
    )


@pytest.mark.parametrize("kl", list(KL))
def test_verl_gspo_is_gspo_token(kl: Any) -> None:
    """arXiv 2507.18071, equation 14: the value of the sequence's geometric mean, the gradient of each token."""
    batch = Batch()

    def formula(logp: Tensor) -> Tensor:
        n = batch.mask.sum(1, keepdim=True)
        mean = (((logp - batch.old) * batch.mask).sum(1, keepdim=True) / n).exp().detach()
        s = mean * logp.exp() / logp.exp().detach()
        A = batch.advantages[:, None]
        surrogate = torch.minimum(s * A, s.clamp(1 - EPS / 2, 1 + EPS / 4) * A)
        return AGGREGATE["seq-mean-token-mean"](0.1 * KL[kl](batch.ref - logp) - surrogate, batch.mask)

    batch.agree(
        verl_preset("gspo", clip_ratio_low=EPS / 2, clip_ratio_high=EPS / 4, kl_loss_type=kl, kl_loss_coef=0.1), formula
    )


def test_gspo_itself_by_equation_7() -> None:
    """TRL's sequence level: one ratio and one clip a sequence; its gradient flows through the mean."""
    batch = Batch()

    def formula(logp: Tensor) -> Tensor:
        losses = []
        for b in range(B):
            used = batch.mask[b] != 0
            s = (logp[b, used].sum() - batch.old[b, used].sum()).div(used.sum()).exp()
            A = batch.advantages[b]
            losses.append(-torch.min(s * A, s.clamp(1 - EPS / 2, 1 + EPS / 4) * A))
        return torch.stack(losses).mean()

    preset = trl_preset("grpo", epsilon=EPS / 2, epsilon_high=EPS / 4, importance_sampling_level="sequence")
    batch.agree(preset, formula)


@pytest.mark.parametrize("token_level", [True, False])
@pytest.mark.parametrize("correction", [None, "tis", "icepop", "seq-mask-tis"])
@pytest.mark.parametrize("dual", [None, 1.15])
def test_openrlhf_ppo(token_level: bool, correction: Any, dual: float | None) -> None:
    for kl, low in ((None, 0.0), ("k1", 0.9), ("k2", 0.0), ("k3", 0.95)):
        batch = Batch()
        batch.ref[:, 0] += 3.0

        def formula(logp: Tensor, batch: Batch = batch, kl: Any = kl, low: float = low) -> Tensor:
            A = batch.advantages[:, None]
            r = (logp - batch.old).exp()
            objective = torch.min(r * A, r.clamp(1 - EPS, 1 + EPS) * A)
            if dual is not None:
                objective = torch.where(A < 0, torch.max(objective, dual * A), objective)
            c = (batch.old - batch.rollout).exp()
            if correction == "tis":
                objective = objective * c.clamp(low, 1.05)
            if correction == "icepop":
                objective = objective * torch.where((c >= low) & (c <= 1.05), c, 0.0)
            if correction == "seq-mask-tis":
                mean = (c.log() * batch.mask).sum(1, keepdim=True) / batch.mask.sum(1, keepdim=True)
                objective = objective * torch.where((mean.exp() >= low) & (mean.exp() <= 1.05), c, 0.0)
            estimate = KL["low_var_kl" if kl == "k3" else kl](batch.ref - logp).clamp(-10, 10)
            aggregate = AGGREGATE["token-mean" if token_level else "seq-mean-token-mean"]
            return aggregate(-objective, batch.mask) + 0.3 * aggregate(estimate, batch.mask)

        preset = openrlhf_preset(
            eps_clip_low_high=(EPS, EPS),
            dual_clip=dual,
            token_level_loss=token_level,
            kl_estimator=kl,
            kl_coef=0.3,
            is_correction_type=correction,
            is_correction_threshold=(low, 1.05),
        )
        batch.agree(preset, formula)


# TRL's own code.


@pytest.fixture(scope="module")
def grpo_trainer() -> Any:
    trl = pytest.importorskip("trl")
    if not trl.__version__.startswith("1.16."):
        pytest.skip(f"the presets name TRL 1.16; {trl.__version__} is installed")
    from trl import GRPOTrainer

    return GRPOTrainer


SOFT_DEFAULTS = {"sapo_temperature_pos": 1.0, "sapo_temperature_neg": 1.05}
SOFT_DEFAULTS |= {"vespo_k_pos": 2.0, "vespo_lambda_pos": 3.0, "vespo_k_neg": 3.0, "vespo_lambda_neg": 2.0}


def trl_loss(trainer_class: Any, batch: Batch, logp: Tensor, steps: int = 1, **settings: Any) -> Tensor:
    """GRPOTrainer._compute_loss on our log-probs: a trainer with the attributes that it reads, and nothing else."""
    trainer = trainer_class.__new__(trainer_class)
    args = SimpleNamespace(
        delta=settings.get("delta"),
        use_bias_correction_kl=settings.get("use_bias_correction_kl", False),
        steps_per_generation=steps,
        **{name: settings.get(name, default) for name, default in SOFT_DEFAULTS.items()},
    )
    epsilon = settings.get("epsilon", 0.2)
    mode = settings.get("vllm_importance_sampling_mode")
    vars(trainer).update(
        args=args,
        model=SimpleNamespace(training=True),
        aux_loss_enabled=False,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        importance_sampling_level=settings.get("importance_sampling_level", "token"),
        beta=settings.get("beta", 0.0),
        loss_type=settings["loss_type"],
        epsilon_low=epsilon,
        epsilon_high=settings.get("epsilon_high") or epsilon,
        use_vllm=mode is not None,
        vllm_importance_sampling_correction=mode is not None,
        current_gradient_accumulation_steps=steps,
        max_completion_length=settings.get("max_completion_length", 512),
        accelerator=SimpleNamespace(
            num_processes=1, gather=lambda x: x, gather_for_metrics=lambda x: x, reduce=lambda x, reduction: x
        ),
        _entropy_bonus_enabled=False,
        _metrics={"train": defaultdict(list)},
        _get_per_token_logps_and_entropies=lambda *a, **k: (logp, torch.zeros_like(logp), None),
    )
    inputs = {
        "prompt_ids": torch.zeros(B, 1, dtype=torch.int64),
        "prompt_mask": torch.ones(B, 1),
        "completion_ids": torch.zeros(B, L, dtype=torch.int64),
        "completion_mask": batch.mask,
        "advantages": batch.advantages,
        "old_per_token_logps": batch.old,
        "ref_per_token_logps": batch.ref,
        "num_items_in_batch": batch.mask.sum(),
    }
    if "importance" in settings:
        inputs["importance_sampling_ratio"] = settings["importance"]
    if mode not in (None, "ready"):
        # Made where the trainer generates, which needs a server; this much of it in our own words.
        gap = (batch.old - batch.rollout) * batch.mask
        c = (gap.sum(1, keepdim=True) if mode.startswith("sequence") else gap).exp()
        low, high = (settings.get(f"vllm_importance_sampling_clip_{end}") for end in ("min", "max"))
        low, high = 0.0 if low is None else low, math.inf if high is None else high
        inside = (c >= low) & (c <= high)
        inputs["importance_sampling_ratio"] = c.clamp(low, high) if mode.endswith("truncate") else c * inside
    torch.set_default_dtype(torch.float64)  # TRL chooses between two Python numbers in the default type
    try:
        return trainer._compute_loss(trainer.model, inputs)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dr_grpo", "dapo", "cispo"])
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("beta", [0.0, 0.04])
def test_trl_trainer(grpo_trainer: Any, loss_type: Any, level: Any, beta: float) -> None:
    for seed, (high, delta) in enumerate([(None, None), (2 * EPS, None), (EPS, 1.15)]):
        batch = Batch(seed, empty=seed == 1)
        settings = {"epsilon": EPS, "epsilon_high": high, "delta": delta, "importance_sampling_level": level}
        settings |= {"beta": beta, "loss_type": loss_type, "max_completion_length": 20}
        if loss_type == "cispo":
            settings["epsilon_high"] = 1.07
        batch.agree(trl_preset(**settings), lambda logp, b=batch, s=settings: trl_loss(grpo_trainer, b, logp, **s))


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize(
    "loss_type, soft",
    [
        ("sapo", {}),
        ("sapo", {"sapo_temperature_pos": 2.0, "sapo_temperature_neg": 0.7}),
        ("luspo", {}),
        ("vespo", {}),
        ("vespo", {"vespo_k_pos": 0.5, "vespo_lambda_pos": 0.8, "vespo_k_neg": 0.9, "vespo_lambda_neg": 0.3}),
    ],
)
def test_trl_trainer_with_its_newer_losses(grpo_trainer: Any, loss_type: Any, soft: Any, level: Any) -> None:
    for seed, beta in enumerate((0.0, 0.04)):
        batch = Batch(seed)
        settings = {"loss_type": loss_type, "epsilon": EPS, "importance_sampling_level": level, "beta": beta, **soft}
        batch.agree(trl_preset(**settings), lambda logp, b=batch, s=settings: trl_loss(grpo_trainer, b, logp, **s))


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "cispo", "sapo"])
def test_trl_trainer_with_bias_corrected_kl(grpo_trainer: Any, loss_type: Any, level: Any) -> None:
    if (loss_type, level) == ("cispo", "sequence"):
        with pytest.raises(ValueError, match="kl_importance with kl='k3', ratio='step', clip='cispo'"):
            trl_preset(
                "cispo", epsilon_high=1.07, beta=0.1, importance_sampling_level=level, use_bias_correction_kl=True
            )
        return
    batch = Batch(2)
    settings: dict[str, Any] = {"loss_type": loss_type, "epsilon": EPS, "importance_sampling_level": level, "beta": 0.3}
    settings |= {"epsilon_high": 1.07 if loss_type == "cispo" else EPS, "use_bias_correction_kl": True}
    batch.agree(trl_preset(**settings), lambda logp: trl_loss(grpo_trainer, batch, logp, **settings))


@pytest.mark.parametrize("per_token", [True, False])
@pytest.mark.parametrize("loss_type", ["vespo", "dapo"])
def test_trl_trainer_with_ready_importance_weights(grpo_trainer: Any, loss_type: Any, per_token: bool) -> None:
    """TRL holds them as [B, T], or [B, 1] at its sequence level; vespo takes them into the ratio, some of them 0."""
    batch = Batch(4)
    given = (batch.old - batch.rollout).exp() if per_token else (0.3 * torch.randn(B, 1, dtype=torch.float64)).exp()
    given = given * (given > 0.75)
    padded = torch.where(batch.mask != 0, given, 1.0) if per_token else given
    settings: dict[str, Any] = {"loss_type": loss_type, "epsilon": EPS}

    def theirs(logp: Tensor) -> Tensor:
        mode = None if loss_type == "vespo" else "ready"
        return trl_loss(grpo_trainer, batch, logp, importance=padded, vllm_importance_sampling_mode=mode, **settings)

    batch.agree(trl_preset(**settings), theirs, batch.packed(given) if per_token else given[:, 0])


@pytest.mark.parametrize("mode", ["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"])
@pytest.mark.parametrize("bounds", [(None, 1.05), (0.9, 1.2), (0.95, None)])
def test_trl_trainer_with_engine_correction(grpo_trainer: Any, mode: Any, bounds: Any) -> None:
    for loss_type, level in (("grpo", "sequence"), ("dapo", "token"), ("cispo", "token")):
        batch = Batch(3)
        settings: dict[str, Any] = {"loss_type": loss_type, "importance_sampling_level": level, "beta": 0.04}
        settings |= {"epsilon": EPS, "epsilon_high": 1.07 if loss_type == "cispo" else EPS}
        settings["vllm_importance_sampling_mode"] = mode
        settings["vllm_importance_sampling_clip_min"], settings["vllm_importance_sampling_clip_max"] = bounds
        batch.agree(trl_preset(**settings), lambda logp, b=batch, s=settings: trl_loss(grpo_trainer, b, logp, **s))


def test_trl_defaults_are_those_of_its_config(grpo_trainer: Any) -> None:
    from trl import GRPOConfig

    fields = GRPOConfig.__dataclass_fields__
    assert (fields["epsilon"].default, fields["beta"].default, fields["max_completion_length"].default) == (
        0.2,
        0.0,
        512,
    )
    assert fields["loss_type"].default == "dapo" and fields["importance_sampling_level"].default == "token"
    assert fields["epsilon_high"].default is None and fields["delta"].default is None
    assert fields["vllm_importance_sampling_clip_max"].default == 3.0
    assert fields["vllm_importance_sampling_clip_min"].default is None
    assert {name: fields[name].default for name in SOFT_DEFAULTS} == SOFT_DEFAULTS
