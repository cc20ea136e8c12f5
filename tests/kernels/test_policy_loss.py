"""The torch path, and the cases that the Triton kernel is held to as well (test_policy_loss_triton.py)."""

import dataclasses
import itertools
import math
import threading
from typing import Any

import pytest
import torch
from support.policy_loss_cases import (
    SOFT,
    SPECS,
    assert_close,
    case,
    check_overflow_without_a_say,
    exact,
    kinds,
    poisoned,
    results,
    unused,
)
from torch import Tensor

from swirl_kernels import PolicyLossSpec, naive_policy_loss, policy_loss
from swirl_kernels.policy_loss.spec import SUMS


@pytest.fixture(autouse=True)
def torch_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SWIRL_KERNELS_BACKEND", "torch")


@pytest.mark.parametrize("part", range(6))
def test_every_spec_equals_naive(part: int) -> None:
    for i, spec in list(enumerate(SPECS))[part::6]:
        arguments = case(spec, seed=i, **kinds(i))
        expected = results(naive_policy_loss, spec, arguments)
        assert_close(results(policy_loss, spec, poisoned(arguments)), expected, 1e-11, spec)


def test_soft_clips_importance_and_gates_equal_naive() -> None:
    for i, (spec, importance) in enumerate(SOFT):
        truncated = torch.zeros(2, dtype=torch.float64)
        for seed in range(4):
            arguments = case(spec, seed=seed, importance=importance, **kinds(i + seed))
            expected = results(naive_policy_loss, spec, arguments)
            truncated += expected["sums"][[SUMS.index("truncated"), 0]]
            assert_close(results(policy_loss, spec, poisoned(arguments)), expected, 1e-11, (spec, importance))
        assert spec.correction == "none" or 0 < truncated[0] < truncated[1], spec


def test_the_cases_reach_every_branch() -> None:
    """Else the comparisons above would compare zeros."""
    reached = dict.fromkeys(SUMS, False)
    for i, spec in enumerate(SPECS):
        sums = results(naive_policy_loss, spec, case(spec, seed=i, **kinds(i)))["sums"]
        for name, value in zip(SUMS, sums.tolist(), strict=True):
            reached[name] |= 0 < value < float(sums[0])
    assert all(reached[name] for name in SUMS if name not in ("tokens", "ratio")), reached


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float16, 1e-3), (torch.bfloat16, 1e-2)])
def test_other_dtypes_against_float64_of_the_same_numbers(dtype: torch.dtype, tolerance: float) -> None:
    """In 16 bits only the gradient is rounded; loss and metrics are those of fp32."""
    for i, spec in list(enumerate(SPECS))[::5]:
        arguments = case(spec, seed=i, dtype=dtype, **kinds(i))
        got = results(policy_loss, spec, arguments)
        assert got["loss"].dtype == torch.float32 and got["dlogp"].dtype == dtype
        expected = results(naive_policy_loss, spec, exact(arguments))
        assert_close(got, expected, tolerance, spec)
        assert_close(got | {"dlogp": expected["dlogp"]}, expected, 1e-5, spec)


def test_by_hand() -> None:
    """Two steps, of two tokens and of one, with ratios 1.5 and 0.5, and 2."""
    old = torch.tensor([-1.0, -2.0, -1.5], dtype=torch.float64)
    logp = (old + torch.tensor([1.5, 0.5, 2.0], dtype=torch.float64).log()).requires_grad_()
    advantage, offsets = torch.tensor([2.0, -1.0], dtype=torch.float64), torch.tensor([0, 2, 3])
    weight = torch.tensor([0.5, 0.25, 1.0], dtype=torch.float64)

    def both(**words: Any) -> tuple[float, list[float]]:
        spec = PolicyLossSpec(**words)
        loss, _ = policy_loss(logp, old, advantage, offsets, spec, weight=weight)
        return loss.item(), torch.autograd.grad(loss, logp)[0].tolist()

    def close(got: tuple[float, list[float]], loss: float, gradient: list[float]) -> None:
        assert got[0] == pytest.approx(loss, rel=1e-12) and got[1] == pytest.approx(gradient, rel=1e-12, abs=1e-15)

    # -(0.5 * 1.5 * 2 + 0.25 * 0.5 * 2 + 1 * 2 * -1)
    close(both(clip="none"), 0.25, [-1.5, -0.25, 2.0])
    # the first is clipped to 1.2, the last is not: a negative advantage has no upper bound
    close(both(clip="ppo"), -(0.5 * 1.2 * 2 + 0.25 - 2), [0.0, -0.25, 2.0])
    close(both(clip="dual", dual_clip=1.8), -(1.2 + 0.25 - 1.8), [0.0, -0.25, 0.0])
    now = logp.tolist()
    close(
        both(clip="cispo"),
        -(0.5 * 1.2 * 2 * now[0] + 0.25 * 0.8 * 2 * now[1] - 1.2 * now[2]),
        [-1.2, -0.4, 1.2],
    )
    root = math.sqrt(1.5 * 0.5)
    close(both(clip="none", ratio="step"), -(0.75 * root * 2 - 2), [-0.75 * root, -0.75 * root, 2.0])
    close(both(clip="none", ratio="step_token"), -(0.75 * root * 2 - 2), [-root, -0.5 * root, 2.0])


def test_an_overflow_without_a_say_changes_nothing() -> None:
    check_overflow_without_a_say("cpu")


def test_gradient_by_differences() -> None:
    """Against nothing that shares a formula with it; smooth specs only, since sg is no derivative of a value."""
    for ratio, kl, clip in itertools.product(("token", "step"), ("none", "k1", "k2", "k3"), ("ppo", "sapo")):
        spec = PolicyLossSpec(
            ratio=ratio,
            clip=clip,
            kl=kl,
            kl_coef=0.0 if kl == "none" else 0.5,
            kl_importance=kl == "k3",
            correction="tis",
        )
        arguments = case(spec, lengths=(3, 0, 1, 4), advantage="token")
        logp = arguments.pop("logp").requires_grad_()
        assert torch.autograd.gradcheck(lambda x, s=spec, a=arguments: policy_loss(x, spec=s, **a)[0], (logp,))


def test_on_policy_k2_pulls_along_the_reverse_kl_and_k3_along_the_forward_one() -> None:
    """Summed over a whole vocabulary with its probabilities as weights, as the docstring has it."""
    torch.manual_seed(0)
    logits, other = torch.randn(2, 9, dtype=torch.float64)
    logits.requires_grad_()
    p, q = logits.log_softmax(0), other.log_softmax(0)

    def pull(kl: str) -> Tensor:
        """Σ_v p_v ∇kl_v = Σ_v p_v kl'_v ∇logp_v"""
        spec = PolicyLossSpec(clip="none", kl=kl, kl_coef=1.0)  # type: ignore[arg-type]
        offsets, zero = torch.arange(10), torch.zeros(9, dtype=torch.float64)
        loss, _ = policy_loss(p, p.detach(), zero, offsets, spec, ref_logp=q, weight=p.detach().exp())
        return torch.autograd.grad(loss, logits, retain_graph=True)[0]

    (reverse,) = torch.autograd.grad((p.exp() * (p - q)).sum(), logits, retain_graph=True)
    (forward,) = torch.autograd.grad((q.exp() * (q - p)).sum(), logits, retain_graph=True)
    torch.testing.assert_close(pull("k1"), torch.zeros_like(reverse), rtol=0, atol=1e-14)
    torch.testing.assert_close(pull("k2"), reverse, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(pull("k3"), forward, rtol=1e-12, atol=1e-14)


def test_a_small_k3_keeps_its_digits() -> None:
    """exp(x) - 1 - x at 1e-4 is 5e-9: taken as a difference in fp32 it would be noise."""
    spec = PolicyLossSpec(clip="none", kl="k3", kl_coef=1.0)
    x = torch.tensor([1e-4, -2e-4, 1e-3, -0.03, 0.2, -0.49, 0.51, 3.0, -3.0])
    logp, offsets, zero = torch.zeros(9, requires_grad=True), torch.arange(10), torch.zeros(9)
    for i in range(9):
        one = torch.zeros(9)
        one[i] = 1.0
        loss, metrics = policy_loss(logp, zero, zero, offsets, spec, ref_logp=x, weight=one)
        exactly = math.expm1(x[i].item()) - x[i].item()
        assert loss.item() == pytest.approx(exactly, rel=1e-6) and metrics.kl.item() == pytest.approx(exactly, rel=1e-6)
        (slope,) = torch.autograd.grad(loss, logp)
        assert slope[i].item() == pytest.approx(-math.expm1(x[i].item()), rel=1e-6)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_tokens_of_weight_zero_contribute_exactly_nothing(value: float) -> None:
    for i, spec in list(enumerate(SPECS))[::7]:
        for weight in ("token", "segment", "zero"):
            arguments = case(spec, seed=i, advantage=("segment", "token")[i % 2], weight=weight, dtype=torch.float32)
            got = results(policy_loss, spec, poisoned(arguments, value))
            clean = results(policy_loss, spec, arguments)
            assert all(torch.equal(got[name], clean[name]) for name in got)
            assert (got["dlogp"][unused(arguments)] == 0).all()
            if weight == "zero":
                assert got["loss"] == 0 and (got["sums"] == 0).all() and got["ratio_max"] == 0


def test_loss_and_metrics_add_up_over_micro_batches_and_do_not_depend_on_packing() -> None:
    for i, spec in list(enumerate(SPECS))[::11]:
        arguments = case(spec, seed=i, advantage="segment", weight="token")
        whole = results(policy_loss, spec, arguments)
        lengths, offsets = arguments["offsets"].diff(), arguments["offsets"]
        for groups in ([[6, 2, 0], [8, 1, 4], [5, 7, 3]], [[4], [], [8, 7, 6, 5, 3, 2, 1, 0]]):
            parts = []
            for group in groups:
                chosen = torch.tensor(group, dtype=torch.int64)
                tokens = torch.cat([torch.arange(offsets[a], offsets[a + 1]) for a in group] or [chosen])
                part = {
                    n: x if x is None else x[chosen if n == "advantage" else tokens]
                    for n, x in arguments.items()
                    if n != "offsets"
                }
                ends = torch.cat([torch.zeros(1, dtype=torch.int64), lengths[chosen].cumsum(0)])
                got = results(policy_loss, spec, part | {"offsets": ends})
                # where the micro-batch's tokens stand in the whole
                got["dlogp"] = torch.zeros_like(whole["dlogp"]).index_copy(0, tokens, got["dlogp"])
                parts.append(got)
            total = {n: torch.stack([part[n] for part in parts]).sum(0) for n in ("loss", "dlogp", "sums")}
            total["ratio_max"] = torch.stack([part["ratio_max"] for part in parts]).amax()
            assert_close(total, whole, 1e-12, spec)


def test_metrics_combine_and_average() -> None:
    spec = PolicyLossSpec(
        clip="dual", clip_low=0.05, clip_high=0.05, dual_clip=1.1, correction="icepop", correction_high=1.1
    )
    metrics = [policy_loss(spec=spec, **case(spec, seed=s, advantage="token"))[1] for s in range(2)]
    both = sum(metrics)
    assert torch.equal(both.sums, metrics[0].sums + metrics[1].sums)
    assert both.ratio_max == max(m.ratio_max for m in metrics)
    means = both.means()
    for name in ("clipped_low", "clipped_high", "clipped_dual", "ratio", "truncated"):
        assert means[name].item() == pytest.approx((getattr(both, name) / both.tokens).item()) and means[name] > 0
    assert 0 < means["effective_samples"] < 1
    same = policy_loss(*3 * [torch.full((5,), -1.0)], torch.arange(6), PolicyLossSpec())[1].means()
    assert same["effective_samples"] == 1 and same["ratio"] == 1 and same["ratio_max"] == 1
    nothing = policy_loss(*3 * [torch.zeros(0)], torch.zeros(1, dtype=torch.int64), PolicyLossSpec())[1].means()
    assert all(value == 0 for value in nothing.values())
    with pytest.raises(AttributeError, match="its sums are tokens, clipped_low"):
        _ = both.entropy


def test_no_tokens_and_no_segments() -> None:
    for lengths in ((), (0, 0)):
        spec = PolicyLossSpec(kl="k3", kl_coef=0.1)
        got = results(policy_loss, spec, case(spec, lengths=lengths, weight="segment"))
        assert got["loss"] == 0 and got["dlogp"].shape == (0,) and (got["sums"] == 0).all() and got["ratio_max"] == 0


def test_int32_offsets_and_strided_inputs() -> None:
    for i, spec in list(enumerate(SPECS))[::17]:
        arguments = case(spec, seed=i, **kinds(i))
        expected = results(policy_loss, spec, arguments)
        spread = {
            n: torch.stack([x, torch.full_like(x, math.nan)], -1)[..., 0] if isinstance(x, Tensor) and x.dim() else x
            for n, x in arguments.items()
            if n != "offsets"
        }
        got = results(policy_loss, spec, spread | {"offsets": arguments["offsets"].int()})
        assert all(torch.equal(got[name], expected[name]) for name in got)


def test_upstream_gradients_repeats_threads_and_grad_mode() -> None:
    spec = PolicyLossSpec(ratio="step", kl="k3", kl_coef=0.1)
    arguments = case(spec, dtype=torch.float16)
    arguments["weight"] = arguments["weight"].float() * 1e-7
    expected = results(naive_policy_loss, spec, exact(arguments), 65536.0)
    # scaled before it is rounded: fp16 ends at 6e-8, and loss scaling keeps the digits of small gradients
    assert_close(results(policy_loss, spec, arguments, 65536.0), expected, 1e-3)
    first, again = (results(policy_loss, spec, arguments) for _ in range(2))
    assert all(torch.equal(again[n], x) for n, x in first.items())

    logp = arguments.pop("logp").requires_grad_()
    loss, metrics = policy_loss(logp, spec=spec, **arguments)
    (expected,) = torch.autograd.grad(loss, logp, retain_graph=True)
    got: list[Tensor] = []
    thread = threading.Thread(target=lambda: got.extend(torch.autograd.grad(loss, logp)))
    thread.start(), thread.join()
    assert torch.equal(got[0], expected)
    with torch.no_grad():
        quiet, same = policy_loss(logp, spec=spec, **arguments)
    assert not quiet.requires_grad and torch.equal(quiet, loss) and torch.equal(same.sums, metrics.sums)


def test_wrong_arguments_are_refused_with_numbers() -> None:
    spec = PolicyLossSpec()
    x, advantage, offsets = torch.zeros(5), torch.zeros(2), torch.tensor([0, 3, 5])

    def refused(message: str, *args: Any, spec: PolicyLossSpec = spec, **options: Any) -> None:
        with pytest.raises(ValueError, match=message):
            policy_loss(*args, spec, **options)

    refused(r"logp has shape \(1, 5\)", x[None], x, advantage, offsets)
    refused(r"old_logp has shape \(4,\) .* give floating \[5\]", x, x[:4], advantage, offsets)
    refused(r"advantage has shape \(3,\) .* give floating \[2\] or \[5\]", x, x, x[:3], offsets)
    refused(r"weight .* torch.bool; give floating \[5\] or \[2\] or \[\]", x, x, advantage, offsets, weight=x == 0)
    refused("offsets go from 0 to 4; logp has 5", x, x, advantage, torch.tensor([0, 3, 4]))
    refused("offsets go from 1 to 5", x, x, advantage, torch.tensor([1, 3, 5]))
    refused(r"offsets\[2\] is 2, below offsets\[1\] = 3", x, x, x[:3], torch.tensor([0, 3, 2, 5]))
    refused("give int32 or int64", x, x, advantage, offsets.float())
    refused("of which segment 1 has 0", x, x, x, torch.tensor([0, 1, 1, 3, 4, 5]))
    refused("ref_logp is missing with kl='k3'", x, x, advantage, offsets, spec=PolicyLossSpec(kl="k3"))
    refused("ref_logp is given with kl='none'", x, x, advantage, offsets, ref_logp=x)
    refused("rollout_logp is missing", x, x, advantage, offsets, spec=PolicyLossSpec(correction="tis"))
    refused("rollout_logp is given", x, x, advantage, offsets, rollout_logp=x)
    refused("offsets are None with ratio='step'", x, x, x, None, spec=PolicyLossSpec(ratio="step"))
    refused("correction_level='token', gate='step'", x, x, x, None, rollout_logp=x,
            spec=PolicyLossSpec(correction="mask", correction_gate="step"))  # fmt: skip
    refused(r"advantage has shape \(2,\) .* give floating \[5\]", x, x, advantage, None)
    refused("loss_scale is inf", x, x, advantage, offsets, loss_scale=math.inf)
    graded = x.clone().requires_grad_()
    refused(r"old_logp requires grad.* pass old_logp.detach\(\)", graded, graded, advantage, offsets)
    refused("advantage requires grad", x, x, graded, offsets)
    refused("weight requires grad", x, x, advantage, offsets, weight=graded)
    refused("rollout_logp requires grad", x, x, advantage, offsets, spec=PolicyLossSpec(correction="tis"),
            rollout_logp=graded)  # fmt: skip
    refused(r"importance has shape \(3,\) .* give floating \[5\] or \[2\]", x, x, advantage, offsets, importance=x[:3])
    refused("importance is given with correction='tis'", x, x, advantage, offsets, spec=PolicyLossSpec(correction="tis"),
            rollout_logp=x, importance=x)  # fmt: skip
    refused("importance requires grad", x, x, advantage, offsets, importance=graded)
    refused("ref_logp requires grad", x, x, advantage, offsets, spec=PolicyLossSpec(kl="k1"), ref_logp=graded)
    for settings, message in (
        ({"ratio": "sequence"}, "ratio is 'sequence'; use one of token, step, step_token"),
        ({"clip_low": -0.1}, "clip_low is -0.1"),
        ({"clip_high": math.nan}, "clip_high nan"),
        ({"dual_clip": 1.0}, "dual_clip is 1.0"),
        ({"kl_coef": 0.1}, "kl_coef is 0.1 with kl='none'"),
        ({"kl": "k1", "kl_coef": math.inf}, "kl_coef is inf"),
        ({"kl_limit": 0.0}, "kl_limit is 0.0"),
        ({"ratio": "step_sum"}, "ratio is 'step_sum' with clip='ppo'"),
        ({"clip": "vespo"}, "ratio is 'token' with clip='vespo'"),
        ({"clip": "vespo", "ratio": "step_sum", "correction": "tis"}, "pass them as importance="),
        ({"clip": "vespo", "ratio": "step_sum", "vespo": (1.0, -1.0, 1.0, 1.0)}, "vespo is "),
        ({"clip": "sapo", "sapo": (0.0, 1.0)}, "sapo is "),
        ({"kl_importance": True}, "kl_importance with kl='none'"),
        (
            {"kl_importance": True, "kl": "k3", "ratio": "step", "clip": "cispo"},
            "kl_importance with kl='k3', ratio='step'",
        ),
        ({"correction_gate": "step"}, "correction_gate is 'step' with correction='none'"),
        (
            {"correction_gate": "all", "correction": "mask"},
            "correction_gate is 'all'; use one of token, step, step_mean",
        ),
        ({"correction_low": 2.0}, "correction_low is 2.0 and correction_high 2.0"),
    ):
        with pytest.raises(ValueError, match=message):
            PolicyLossSpec(**settings)
    with pytest.raises(dataclasses.FrozenInstanceError):
        spec.clip_low = 0.1  # type: ignore[misc]
