"""The Triton kernel: compiled on a GPU, interpreted without one."""

import functools
import itertools
import math
import threading
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from support.policy_loss_cases import (
    LENGTHS,
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

from swirl_kernels import PolicyLossSpec, naive_policy_loss, policy_loss
from swirl_kernels.policy_loss.triton import BLOCK, policy_loss_triton

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [(torch.float32, 1e-5), (torch.float16, 1e-3)]
DTYPES += [(torch.bfloat16, 1e-2)] if DEVICE == "cuda" else []


@pytest.fixture(autouse=True)
def triton_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SWIRL_KERNELS_BACKEND", "triton")


def in_the_chosen_third(spec: PolicyLossSpec) -> bool:
    """True for a third of all specs, in which any three words of ratio, clip, kl and correction still meet in every combination."""
    ratio, clip, kl = (
        words.index(word)
        for words, word in (
            (("token", "step", "step_token"), spec.ratio),
            (("none", "ppo", "dual", "cispo"), spec.clip),
            (("none", "k1", "k2", "k3"), spec.kl),
        )
    )
    corrections = [("none", "token"), *itertools.product(("tis", "icepop", "mask"), ("token", "step", "step_mean"))]
    return ratio == (clip + kl + corrections.index((spec.correction, spec.correction_level))) % 3


CHOSEN = [(i, spec) for i, spec in enumerate(SPECS) if DEVICE == "cuda" or in_the_chosen_third(spec)]


@pytest.mark.parametrize("part", range(4))
def test_every_spec_against_float64(part: int) -> None:
    """Interpreted, a third of them: the torch path takes every one in test_policy_loss.py."""
    for i, spec in CHOSEN[part::4]:
        arguments = case(spec, seed=i, lengths=(0, BLOCK + 45, 1), dtype=torch.float32, device=DEVICE, **kinds(i))
        expected = results(naive_policy_loss, spec, exact(arguments))
        assert_close(results(policy_loss, spec, poisoned(arguments)), expected, 1e-5, spec)


def test_soft_clips_importance_and_gates_against_float64() -> None:
    for i, (spec, importance) in enumerate(SOFT):
        lengths = (0, BLOCK + 45, 1)
        arguments = case(
            spec, seed=i, lengths=lengths, importance=importance, dtype=torch.float32, device=DEVICE, **kinds(i)
        )
        expected = results(naive_policy_loss, spec, exact(arguments))
        assert_close(results(policy_loss, spec, poisoned(arguments)), expected, 2e-5, (spec, importance))


@pytest.mark.parametrize("dtype, tolerance", DTYPES)
def test_segments_of_every_kind_in_every_dtype(dtype: torch.dtype, tolerance: float) -> None:
    """Empty, of one token, shorter and longer than a block; loss and metrics as good as in fp32."""
    assert BLOCK < max(LENGTHS) and max(LENGTHS) % BLOCK and 0 in LENGTHS and 1 in LENGTHS
    for i, spec in list(enumerate(SPECS))[::37]:
        arguments = case(spec, seed=i, dtype=dtype, device=DEVICE, **kinds(i))
        expected = results(naive_policy_loss, spec, exact(arguments))
        got = results(policy_loss, spec, poisoned(arguments))
        assert got["loss"].dtype == torch.float32 and got["dlogp"].dtype == dtype
        assert_close(got, expected, tolerance, spec)
        assert_close(got | {"dlogp": expected["dlogp"]}, expected, 1e-5, spec)


def test_a_segment_of_every_length_around_a_block() -> None:
    for length in (1, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK):
        for spec in (SPECS[0], PolicyLossSpec(ratio="step", kl="k2", kl_coef=0.2)):
            arguments = case(spec, lengths=(length,), dtype=torch.float32, device=DEVICE)
            assert_close(
                results(policy_loss, spec, arguments), results(naive_policy_loss, spec, exact(arguments)), 1e-5
            )


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_tokens_of_weight_zero_contribute_exactly_nothing(value: float) -> None:
    for i, spec in list(enumerate(SPECS))[::83]:
        for weight in ("token", "segment", "zero"):
            arguments = case(
                spec,
                seed=i,
                lengths=(0, 9, 1, 6),
                advantage=("segment", "token")[i % 2],
                weight=weight,
                dtype=torch.float32,
                device=DEVICE,
            )
            got = results(policy_loss, spec, poisoned(arguments, value))
            clean = results(policy_loss, spec, arguments)
            assert all(torch.equal(got[name], clean[name]) for name in got)
            assert (got["dlogp"][unused(arguments)] == 0).all()
            if weight == "zero":
                assert got["loss"] == 0 and (got["sums"] == 0).all() and got["ratio_max"] == 0


def test_a_nan_among_the_used_tokens_shows() -> None:
    """A bound must not hide it."""
    for spec in (PolicyLossSpec(clip="cispo"), PolicyLossSpec(ratio="step"), PolicyLossSpec(kl="k3", kl_limit=10.0)):
        for name in ("logp", "old_logp", "ref_logp"):
            arguments = case(spec, lengths=(4, 3), weight="none", dtype=torch.float32, device=DEVICE)
            if arguments[name] is not None:
                arguments[name][5] = math.nan
                spec_on = PolicyLossSpec(**(vars(spec) | ({"kl_coef": 0.1} if spec.kl != "none" else {})))
                loss, _ = policy_loss(spec=spec_on, **arguments)
                assert loss.isnan(), (spec, name)


@pytest.mark.parametrize("ratio", ["step", "token"])
def test_the_same_bits_again_and_from_a_second_thread(ratio: Any) -> None:
    spec = PolicyLossSpec(ratio=ratio, clip="dual", kl="k3", kl_coef=0.1, correction="icepop")
    arguments = case(spec, dtype=torch.float32, device=DEVICE)
    first, again = (results(policy_loss, spec, arguments) for _ in range(2))
    assert all(torch.equal(again[n], x) for n, x in first.items())
    logp = arguments.pop("logp").requires_grad_()
    loss, _ = policy_loss(logp, spec=spec, **arguments)
    (expected,) = torch.autograd.grad(loss, logp, retain_graph=True)
    twice = torch.full((), 2.0, device=DEVICE)
    assert torch.equal(torch.autograd.grad(loss, logp, twice, retain_graph=True)[0], 2 * expected)
    got: list[Tensor] = []
    thread = threading.Thread(target=lambda: got.extend(torch.autograd.grad(loss, logp)))
    thread.start(), thread.join()
    assert torch.equal(got[0], expected)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_tokens_that_know_no_segments(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """offsets=None, a factor on the loss, and no metrics: the same loss and gradient."""
    monkeypatch.setenv("SWIRL_KERNELS_BACKEND", backend)
    for spec, weight, importance in (
        (PolicyLossSpec(kl="k3", kl_coef=0.3, clip="dual"), "token", "none"),
        (PolicyLossSpec(clip="cispo", correction="icepop", correction_high=1.1), "scalar", "none"),
        (PolicyLossSpec(clip="none", kl="k1", kl_limit=0.1), "none", "token"),
    ):
        arguments = case(
            spec, lengths=(301,), advantage="token", weight=weight, importance=importance, dtype=torch.float32, device=DEVICE
        )  # fmt: skip
        arguments["offsets"] = None
        scaled = functools.partial(naive_policy_loss, loss_scale=0.3)
        got = results(functools.partial(policy_loss, loss_scale=0.3), spec, arguments)
        assert_close(got, results(scaled, spec, exact(arguments)), 1e-5, spec)
        logp = arguments.pop("logp").requires_grad_()
        loss, nothing = policy_loss(logp, spec=spec, loss_scale=0.3, metrics=False, **arguments)
        assert nothing is None and torch.equal(loss, got["loss"])
        (unscaled,) = torch.autograd.grad(loss, logp)
        torch.testing.assert_close(unscaled * 1.7, got["dlogp"], rtol=1e-6, atol=0)


def test_few_tokens_among_thousands_of_segments() -> None:
    """Most of them empty: the first one of a stretch is found in several rounds, and ends are met in any order."""
    spec = PolicyLossSpec(kl="k3", kl_coef=0.3)
    lengths = (0,) * 4200 + (3, 0, 0, 150, 1) + (0,) * 70 + (2,)
    arguments = case(spec, lengths=lengths, weight="segment", dtype=torch.float32, device=DEVICE)
    assert_close(results(policy_loss, spec, arguments), results(naive_policy_loss, spec, exact(arguments)), 1e-5)


def test_no_gradient_is_made_for_a_frozen_logp() -> None:
    spec = PolicyLossSpec(ratio="step")
    arguments = case(spec, lengths=(5, 2), dtype=torch.float32, device=DEVICE)
    frozen, _ = policy_loss(spec=spec, **arguments)
    logp = arguments.pop("logp").requires_grad_()
    loss, _ = policy_loss(logp, spec=spec, **arguments)
    assert not frozen.requires_grad and torch.equal(frozen, loss)


@pytest.mark.parametrize("lengths", [(), (0, 0), (0,)])
def test_no_tokens(lengths: tuple[int, ...]) -> None:
    spec = PolicyLossSpec(kl="k3", kl_coef=0.1)
    got = results(policy_loss, spec, case(spec, lengths=lengths, weight="segment", dtype=torch.float32, device=DEVICE))
    assert got["loss"] == 0 and got["dlogp"].shape == (0,) and (got["sums"] == 0).all() and got["ratio_max"] == 0


@pytest.mark.parametrize(
    "offsets", [[0], [0, 3, 4], [1, 3, 6], [0, 5, 3, 6], [0, 9, 6], [-2, 3, 6], [0, 2, 2, 3, 4, 5, 6]]
)
def test_offsets_that_cannot_be_read_back_make_the_loss_nan_when_wrong(offsets: list[int]) -> None:
    """And nothing outside the tensors is touched. On a CPU the public function refuses them by value."""
    x = torch.zeros(6, device=DEVICE)
    advantage = torch.ones(len(offsets) - 1, device=DEVICE)
    bounds = torch.tensor(offsets, device=DEVICE)
    loss, slope, sums, _ = policy_loss_triton(x, x, advantage, bounds, None, None, None, None, PolicyLossSpec(), True)
    assert loss.isnan() and sums.isfinite().all()
    left_out = set(range(6)).difference(
        *(range(a, b) for a, b in zip(offsets, offsets[1:], strict=False) if a <= b <= 6)
    )
    if len(offsets) == 7:  # as many segments as tokens: each must be one token
        left_out = {0, 1}
    assert slope is not None and slope.shape == (6,) and slope[sorted(left_out)].isnan().all()


def test_int32_offsets_and_strided_inputs() -> None:
    spec = PolicyLossSpec(kl="k3", kl_coef=0.1, correction="tis", correction_level="step")
    arguments = case(spec, lengths=(3, 0, 5), dtype=torch.float32, device=DEVICE)
    expected = results(policy_loss, spec, arguments)
    spread = {
        n: torch.stack([x, torch.full_like(x, math.nan)], -1)[..., 0]
        for n, x in arguments.items()
        if n != "offsets" and x is not None
    }
    got = results(policy_loss, spec, spread | {"offsets": arguments["offsets"].int()})
    assert all(torch.equal(got[name], expected[name]) for name in got)


@pytest.mark.skipif(DEVICE == "cpu", reason="only a GPU runs behind the host")
def test_nothing_waits_for_the_device() -> None:
    spec = PolicyLossSpec(ratio="step", kl="k3", kl_coef=0.1)
    arguments = case(spec, dtype=torch.float32, device=DEVICE)
    results(policy_loss, spec, arguments)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        results(policy_loss, spec, arguments)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_an_overflow_without_a_say_changes_nothing() -> None:
    check_overflow_without_a_say(DEVICE)


def test_a_segment_keeps_its_bits_wherever_it_is_packed() -> None:
    spec = PolicyLossSpec(ratio="step", clip="dual", kl="k3", kl_coef=0.1, correction="icepop", correction_level="step")
    lengths = (7, BLOCK + 45, 1, 0, 30)
    arguments = case(spec, lengths=lengths, dtype=torch.float32, device=DEVICE)
    gradient = results(policy_loss, spec, arguments)["dlogp"].split(lengths)
    order = [3, 1, 4, 2, 0]
    moved = {
        n: x if x is None or n == "advantage" else torch.cat([x.split(lengths)[a] for a in order])
        for n, x in arguments.items()
        if n != "offsets"
    }
    moved["advantage"] = arguments["advantage"][order]
    moved["offsets"] = torch.tensor([0, *itertools.accumulate(lengths[a] for a in order)], device=DEVICE)
    again = results(policy_loss, spec, moved)["dlogp"].split([lengths[a] for a in order])
    assert all(torch.equal(gradient[a], x) for a, x in zip(order, again, strict=True))
