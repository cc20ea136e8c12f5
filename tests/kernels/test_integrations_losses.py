"""Our losses under verl's and OpenRLHF's signatures, in float64 against their published formulas; and against their code where it is."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from swirl_kernels.integrations.openrlhf import PolicyLoss
from swirl_kernels.integrations.verl import MODES, policy_loss_fn

B, L = 5, 9
AGGREGATIONS = ("token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm")


@pytest.fixture(autouse=True)
def torch_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SWIRL_KERNELS_BACKEND", "torch")


def batch(seed: int = 0) -> dict[str, Tensor]:
    """Padded tensors with a mask that has gaps and an empty row; advantages by token."""
    torch.manual_seed(seed)
    real = torch.arange(L) < torch.tensor([L, 1, 4, 0, 6])[:, None]
    old = torch.randn(B, L, dtype=torch.float64) - 2
    return {
        "old_log_prob": old,
        "log_prob": (old + 0.3 * torch.randn(B, L, dtype=torch.float64)).requires_grad_(),
        "advantages": torch.randn(B, L, dtype=torch.float64),
        "response_mask": real & ((torch.rand(B, L) > 0.2) | (torch.arange(L) == 0)),
    }


def config(**settings: Any) -> SimpleNamespace:
    defaults = dict(clip_ratio=0.1, clip_ratio_low=0.1, clip_ratio_high=0.2, clip_ratio_c=1.3, tau_pos=1.4, tau_neg=2.0)
    return SimpleNamespace(**{**defaults, "global_batch_info": {}, **settings})


def verl_terms(mode: str, c: SimpleNamespace, x: dict[str, Tensor]) -> Tensor:
    """[B, T] as in the papers that compute_policy_loss_* names."""
    d, A, mask = x["log_prob"] - x["old_log_prob"], x["advantages"], x["response_mask"]
    r = d.exp()
    if mode == "sapo":
        tau = torch.where(A > 0, *A.new_tensor([c.tau_pos, c.tau_neg]))
        return -4 / tau / (1 + (-tau * (r - 1)).exp()) * A
    low = c.clip_ratio if c.clip_ratio_low is None else c.clip_ratio_low
    if mode == "cispo":
        return -(r.clamp(1 - low, 1 + c.clip_ratio_high).detach() * A * x["log_prob"])
    if mode == "gspo":
        mean = ((d * mask).sum(1) / mask.sum(1).clamp(min=1)).detach().exp()[:, None]
        r = mean * (x["log_prob"] - x["log_prob"].detach()).exp()
    loss = torch.maximum(-A * r, -A * r.clamp(1 - low, 1 + c.clip_ratio_high))
    return torch.where(A < 0, torch.minimum(loss, -A * c.clip_ratio_c), loss) if mode == "vanilla" else loss


def aggregated(loss: Tensor, mask: Tensor, how: str, dp: float, tokens: Any, sequences: Any, scale: Any) -> Tensor:
    n = mask.sum(1)
    tokens = mask.sum() if tokens is None else tokens
    sequences = (n > 0).sum() if sequences is None else sequences
    return (
        dp
        * {
            "token-mean": (loss * mask).sum() / tokens,
            "token-sum": (loss * mask).sum(),
            "seq-mean-token-sum": (loss * mask).sum() / sequences,
            "seq-mean-token-mean": ((loss * mask).sum(1) / n.clamp(min=1)).sum() / sequences,
            "seq-mean-token-sum-norm": (loss * mask).sum() / sequences / (L if scale is None else scale),
        }[how]
    )


GLOBALS: tuple[dict[str, Any], ...] = (
    {},
    {"dp_size": 1, "batch_num_tokens": None, "global_batch_size": None, "loss_scale_factor": None},
    {"dp_size": 4, "batch_num_tokens": torch.tensor(71), "global_batch_size": 17, "loss_scale_factor": 50},
)


@pytest.mark.parametrize("mode", MODES)
def test_verl_losses_equal_the_formulas(mode: str) -> None:
    for seed, (how, info) in enumerate(itertools.product(AGGREGATIONS, GLOBALS)):
        x, c = batch(seed), config(global_batch_info=info, clip_ratio_low=None if seed % 2 else 0.05)
        weights = (0.2 * torch.randn(B, L, dtype=torch.float64)).exp() if seed % 3 else None
        terms = verl_terms(mode, c, x) * (1 if weights is None else weights)
        numbers = [info.get(n) for n in ("batch_num_tokens", "global_batch_size", "loss_scale_factor")]
        by = "seq-mean-token-mean" if mode == "sapo" else how
        expected = aggregated(terms, x["response_mask"].double(), by, info.get("dp_size", 1), *numbers)
        (gradient,) = torch.autograd.grad(expected, x["log_prob"])
        loss, metrics = policy_loss_fn(mode)(**x, loss_agg_mode=how, config=c, rollout_is_weights=weights)
        torch.testing.assert_close(loss, expected, rtol=1e-7, atol=1e-8)  # verl adds 1e-8 to token counts
        torch.testing.assert_close(torch.autograd.grad(loss, x["log_prob"])[0], gradient, rtol=1e-7, atol=1e-8)
        assert set(metrics) == {"actor/pg_clipfrac", "actor/ppo_kl", "actor/pg_clipfrac_lower"}
        mask = x["response_mask"]
        assert metrics["actor/ppo_kl"] == pytest.approx(
            float((x["old_log_prob"] - x["log_prob"].detach())[mask].mean())
        )


def test_verl_refusals() -> None:
    x, compute = batch(), policy_loss_fn("vanilla")
    with pytest.raises(ValueError, match="config is None"):
        compute(**x)
    with pytest.raises(ValueError, match="mode is 'geo_mean'; use one of vanilla, gspo, cispo, sapo"):
        policy_loss_fn("geo_mean")
    with pytest.raises(ValueError, match="loss_agg_mode is 'mean'"):
        compute(**x, loss_agg_mode="mean", config=config())
    for how, name in (("token-mean", "batch_num_tokens"), ("seq-mean-token-sum", "global_batch_size")):
        with pytest.raises(ValueError, match=f"has no {name}, which loss_agg_mode='{how}' needs with dp_size=2"):
            compute(**x, loss_agg_mode=how, config=config(global_batch_info={"dp_size": 2}))


@pytest.mark.parametrize("mode", MODES)
def test_verl_registry_takes_the_losses_and_they_equal_its_own(mode: str) -> None:
    core = pytest.importorskip("verl.trainer.ppo.core_algos")
    from verl.workers.config import ActorConfig

    from swirl_kernels.integrations import verl_plugin

    assert f"swirl_{mode}" in verl_plugin.NAMES
    for seed, (how, info) in enumerate(itertools.product(AGGREGATIONS, GLOBALS)):
        x = batch(seed)
        actor = ActorConfig(
            strategy="fsdp",
            rollout_n=1,
            use_dynamic_bsz=True,
            clip_ratio_low=0.1,
            clip_ratio_c=1.3,
            tau_pos=1.4,
            global_batch_info=info,
        )
        weights = (0.2 * torch.randn(B, L, dtype=torch.float64)).exp() if seed % 3 else None
        found = []
        for name in (mode, f"swirl_{mode}"):
            loss, metrics = core.get_policy_loss_fn(name)(
                **x, loss_agg_mode=how, config=actor, rollout_is_weights=weights
            )
            found.append((loss.detach(), torch.autograd.grad(loss, x["log_prob"])[0], metrics))
        theirs, ours = found
        torch.testing.assert_close(ours[:2], theirs[:2], rtol=1e-7, atol=1e-8)
        assert ours[2] == pytest.approx(theirs[2], rel=1e-6, abs=1e-6)


CORRECTIONS: tuple[dict[str, Any], ...] = (
    {},
    {"is_correction_level": "token", "is_correction_mode": "clip", "is_correction_threshold": (0.8, 1.2)},
    {"is_correction_level": "token", "is_correction_threshold": (0.8, 1.2)},
    {"is_correction_level": "seq", "is_correction_threshold": (0.9, 1.05)},
    {"is_correction_level": "token", "is_correction_gating": "tv", "is_correction_threshold": (0.0, 0.01)},
    {"is_correction_level": "seq", "is_correction_gating": "binary_kl", "is_correction_threshold": (0.0, 0.002)},
)


def openrlhf_formula(settings: dict[str, Any], x: dict[str, Any], dual: float | None, kind: str) -> Tensor:
    """[B, T], a sequence at a time."""
    logp, old, rollout, A, mask = (
        x[n] for n in ("log_probs", "old_log_probs", "rollout_log_probs", "advantages", "action_mask")
    )
    level, gating = settings.get("is_correction_level", "off"), settings.get("is_correction_gating", "ratio")
    low, high = settings.get("is_correction_threshold", (0.5, 5.0))
    rows = []
    for b in range(B):
        used = mask[b].bool()
        r = (logp[b] - old[b]).exp()
        if kind == "gspo":
            before = rollout[b] if level != "off" else old[b]
            r = (logp[b] - before)[used].sum().div(max(1, int(used.sum()))).exp().expand(L)
        f = torch.min(r * A[b], r.clamp(0.9, 1.15) * A[b])
        if dual is not None:
            f = torch.where(A[b] < 0, torch.max(f, dual * A[b]), f)
        c = (old[b] - rollout[b]).exp()
        if level != "off" and kind == "ppo":
            p, q = rollout[b].exp(), old[b].exp()
            each = {"ratio": c.log(), "tv": (p - q).abs()}.get(
                gating, p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()
            )
            statistic = each[used].mean().expand(L) if level == "seq" else each
            statistic = statistic.exp() if gating == "ratio" else statistic
            inside = (statistic >= low) & (statistic <= high)
            f = f * (c.clamp(low, high) if settings.get("is_correction_mode") == "clip" else c * inside)
        rows.append(torch.where(used, -f, 0.0))
    return torch.stack(rows)


def openrlhf_batch(seed: int) -> dict[str, Tensor]:
    x = batch(seed)
    names = {
        "log_prob": "log_probs",
        "old_log_prob": "old_log_probs",
        "response_mask": "action_mask",
        "advantages": "advantages",
    }
    x = {names[n]: v for n, v in x.items()}
    x["action_mask"] = x["action_mask"].clone()
    x["action_mask"][3, 0] = True  # OpenRLHF's means over an empty sequence are NaN
    return x | {"rollout_log_probs": x["old_log_probs"] + 0.2 * torch.randn(B, L, dtype=torch.float64)}


@pytest.mark.parametrize("kind", ["ppo", "gspo"])
@pytest.mark.parametrize("settings", CORRECTIONS)
def test_openrlhf_policy_loss_equals_the_formula(settings: dict[str, Any], kind: str) -> None:
    held_back: list[float] = []
    for seed, (dual, token_level, totals) in enumerate(
        itertools.product((None, 1.2), (True, False), (None, (3, 70.0, 19.0)))
    ):
        x = openrlhf_batch(seed)
        loss_of = PolicyLoss(0.1, 0.15, dual, token_level, kind, **settings)
        dp, tokens, sequences = totals or (1, None, None)
        mask = x["action_mask"].double()
        by = "token-mean" if token_level and kind == "ppo" else "seq-mean-token-mean"
        terms = openrlhf_formula(settings, x, dual, kind)
        expected = aggregated(terms, mask, by, dp, tokens, sequences, None)
        (gradient,) = torch.autograd.grad(expected, x["log_probs"])
        loss, *found = loss_of(**x, dp_size=dp, batch_num_tokens=tokens, global_batch_size=sequences)
        torch.testing.assert_close(loss, expected, rtol=1e-7, atol=1e-8)
        torch.testing.assert_close(torch.autograd.grad(loss, x["log_probs"])[0], gradient, rtol=1e-7, atol=1e-8)
        corrected = bool(settings) and kind == "ppo"
        assert [value is not None for value in found] == [True, True, corrected, corrected]
        held_back += [float(found[3])] if corrected else []
    assert kind == "gspo" or not settings or 0 < sum(held_back) < len(held_back)
    without = {**x, "rollout_log_probs": None}
    if settings:
        with pytest.raises(ValueError, match="rollout_log_probs is None with is_correction_level"):
            loss_of(**without)
    else:
        assert torch.isfinite(loss_of(**{**without, "action_mask": None})[0])


def test_openrlhf_refusals() -> None:
    for settings, message in (
        ({"policy_loss_type": "grpo"}, "policy_loss_type is 'grpo'; use one of ppo, gspo"),
        ({"is_correction_level": "step"}, "is_correction_level is 'step'"),
        ({"is_correction_level": "seq", "is_correction_mode": "clip"}, "is_correction_mode='clip' needs"),
        ({"is_correction_level": "seq", "is_correction_gating": "tv"}, "takes an upper bound alone"),
        ({"dual_clip": 1.0}, "dual_clip is 1.0"),
    ):
        with pytest.raises(ValueError, match=message):
            PolicyLoss(**settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["ppo", "gspo"])
@pytest.mark.parametrize("settings", CORRECTIONS)
def test_openrlhf_policy_loss_equals_its_own(settings: dict[str, Any], kind: str) -> None:
    theirs = pytest.importorskip("openrlhf.models.loss").PolicyLoss
    for seed, (dual, token_level, dp) in enumerate(itertools.product((None, 1.2), (True, False), (1, 3))):
        x = openrlhf_batch(seed)
        options = dict(dp_size=dp) | (dict(batch_num_tokens=70.0, global_batch_size=19.0) if dp > 1 else {})
        results = []
        for kind_of in (theirs, PolicyLoss):
            loss, *found = kind_of(0.1, 0.15, dual, token_level, kind, **settings)(**x, **options)
            results.append([loss.detach(), torch.autograd.grad(loss, x["log_probs"])[0], *found])
        for a, b in zip(*results, strict=True):
            assert (a is None) == (b is None)
            if a is not None:
                torch.testing.assert_close(b.double(), a.detach().double(), rtol=1e-7, atol=1e-7)
