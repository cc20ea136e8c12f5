"""Inputs of policy_loss and the comparison that the tests of both paths share."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from swirl_kernels import PolicyLossMetrics, PolicyLossSpec, policy_loss
from swirl_kernels.policy_loss.spec import SUMS

# Of one segment each: none, one token, less than a block, several blocks that do not divide it.
LENGTHS = (0, 1, 17, 0, 600, 3, 1, 130, 0)


def case(
    spec: PolicyLossSpec,
    *,
    seed: int = 0,
    lengths: tuple[int, ...] = LENGTHS,
    advantage: str = "segment",
    weight: str = "token",
    importance: str = "none",
    dtype: torch.dtype = torch.float64,
    device: str = "cpu",
) -> dict[str, Any]:
    """Arguments of policy_loss; non-uniform weights, three in ten of them 0 where they are by token."""
    generator = torch.Generator().manual_seed(seed)

    def normal(n: int) -> Tensor:
        return torch.randn(n, generator=generator, dtype=torch.float64)

    offsets = torch.tensor([0, *itertools.accumulate(lengths)])
    tokens, segments = int(offsets[-1]), len(lengths)
    logp = normal(tokens) - 2
    old = logp + 0.2 * normal(tokens)
    weights = {
        "token": (torch.rand(tokens, generator=generator, dtype=torch.float64) + 0.1)
        * (torch.rand(tokens, generator=generator) > 0.3),
        "segment": torch.rand(segments, generator=generator, dtype=torch.float64)
        * (torch.rand(segments, generator=generator) > 0.3),
        "scalar": torch.tensor(0.37, dtype=torch.float64),
        "zero": torch.tensor(0.0, dtype=torch.float64),
        "none": None,
    }
    arguments = {
        "logp": logp,
        "old_logp": old,
        "advantage": normal(tokens if advantage == "token" else segments),
        "offsets": offsets,
        "ref_logp": None if spec.kl == "none" else logp + 0.3 * normal(tokens),
        "rollout_logp": None if spec.correction == "none" else old + 0.1 * normal(tokens),
        "weight": weights[weight],
    }
    if importance != "none":
        arguments["importance"] = (0.3 * normal(tokens if importance == "token" else segments)).exp()
    floating = {n: x if x is None else x.to(device, dtype) for n, x in arguments.items() if n != "offsets"}
    return floating | {"offsets": offsets.to(device)}


def exact(arguments: dict[str, Any]) -> dict[str, Any]:
    """The same numbers in float64."""
    return {n: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for n, x in arguments.items()}


def assert_close(got: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float, what: Any = "") -> None:
    """The gradient as a relative norm and per token, the sums one by one, the loss against the size of its terms."""
    gradient = expected["dlogp"].double()
    error = got["dlogp"].double() - gradient
    assert not error.isnan().any(), f"{what}: NaN in the gradient"
    assert error.norm() <= tolerance * gradient.norm(), f"{what}: {error.norm():.2e} of {gradient.norm():.2e}"
    rows = error.abs() > 4 * tolerance * (gradient.abs() + gradient.abs().mean())
    assert not rows.any(), f"{what}: tokens {rows.nonzero()[:5].tolist()}"
    terms = expected["loss"].abs() + gradient.abs().sum()
    assert (got["loss"].double() - expected["loss"]).abs() <= tolerance * terms, f"{what}: loss"
    for name, a, b in zip(SUMS, got["sums"].tolist(), expected["sums"].tolist(), strict=True):
        slack = abs(expected["sums"][SUMS.index("tokens")].item()) if name == "kl" else 0.0  # k1 cancels
        assert abs(a - b) <= tolerance * (abs(b) + slack), f"{what}: {name} is {a}, not {b}"
    assert abs(got["ratio_max"] - expected["ratio_max"]) <= tolerance * expected["ratio_max"], f"{what}: ratio_max"


def check_overflow_without_a_say(device: str) -> None:
    """The second token has a ratio of 1 and advantage -1; the first one's ratio overflows fp32, but nothing depends on it."""
    for spec, first in (
        (PolicyLossSpec(correction="mask", correction_low=0.5), {"old_logp": -95.0}),  # ω = 0
        (PolicyLossSpec(), {"old_logp": -99.0, "advantage": 0.0}),
        (PolicyLossSpec(clip="none"), {"old_logp": -99.0, "advantage": 0.0}),
        (PolicyLossSpec(kl="k3", kl_coef=0.0), {"ref_logp": 101.0}),  # the KL is a metric alone
    ):
        values = {"logp": [-1.0, -1.0], "old_logp": [-1.0, -1.0], "advantage": [-1.0, -1.0]}
        values |= {"ref_logp": [-1.0, -1.0]} if spec.kl != "none" else {}
        values |= {"rollout_logp": [-1.0, -1.0]} if spec.correction != "none" else {}
        for name, value in first.items():
            values[name][0] = value
        arguments = {name: torch.tensor(value, device=device) for name, value in values.items()}
        got = results(policy_loss, spec, arguments | {"offsets": torch.tensor([0, 1, 2], device=device)}, upstream=1.0)
        alone = spec.kl == "k3"  # there the first token has its say through the ratio
        assert got["loss"] == (2.0 if alone else 1.0), spec
        assert got["dlogp"].tolist() == [1.0 if alone else 0.0, 1.0], spec
        assert not got["sums"].isnan().any(), spec


def every_spec() -> Iterator[PolicyLossSpec]:
    """Each combination of words, with bounds that some tokens pass. Twice the limits: tight and away."""
    words = itertools.product(
        ("token", "step", "step_token"),
        ("none", "ppo", "dual", "cispo"),
        ("none", "k1", "k2", "k3"),
        (("none", "token"), *itertools.product(("tis", "icepop", "mask"), ("token", "step", "step_mean"))),
    )
    for i, (ratio, clip, kl, (correction, level)) in enumerate(words):
        yield PolicyLossSpec(
            ratio=ratio,
            clip=clip,
            clip_low=(0.1, math.inf, 0.05)[i % 3],
            clip_high=(0.15, 0.05, math.inf)[i % 3],
            dual_clip=(1.3, 1.02)[i % 2],
            kl=kl,
            kl_coef=0.0 if kl == "none" else 0.3,
            kl_limit=(math.inf, 0.05)[i % 2],
            correction=correction,
            correction_level=level,
            correction_low=(0.8, 0.0)[i % 2],
            correction_high=(1.1, 1.3, math.inf)[i % 3],
        )


SPECS = list(every_spec())
# What the words above do not hold, with the form of the importance.
SOFT = [
    (PolicyLossSpec(ratio=ratio, clip="sapo", sapo=(1.3, 2.1), kl=kl, kl_coef=coef, kl_importance=on), importance)
    for ratio, kl, coef, on, importance in (
        ("token", "none", 0.0, False, "none"),
        ("step", "k3", 0.3, True, "segment"),
        ("step_token", "k2", 0.3, False, "token"),
    )
]
SOFT += [
    (PolicyLossSpec(ratio="step_sum", clip="vespo", vespo=(1.2, 0.7, 0.6, 0.4), kl=kl, kl_coef=coef), importance)
    for kl, coef, importance in (("none", 0.0, "none"), ("k3", 0.3, "token"), ("k1", 0.3, "segment"))
]
SOFT += [
    (PolicyLossSpec(ratio=ratio, clip=clip, kl=kl, kl_coef=0.3, kl_limit=limit, kl_importance=True), importance)
    for ratio, clip, kl, limit, importance in (
        ("token", "ppo", "k3", math.inf, "none"),
        ("step", "dual", "k3", 0.05, "token"),
        ("step_token", "ppo", "k1", math.inf, "segment"),
        ("token", "cispo", "k2", math.inf, "token"),
    )
]
SOFT += [
    (
        PolicyLossSpec(
            correction=word, correction_level=level, correction_gate=gate, correction_low=0.97, correction_high=1.05
        ),
        "none",
    )
    for word, level, gate in (
        ("icepop", "token", "step_mean"),
        ("icepop", "step", "token"),
        ("icepop", "token", "step"),
        ("mask", "token", "step_mean"),
        ("icepop", "step_mean", "step"),
    )
]


def results(
    function: Callable[..., tuple[Tensor, PolicyLossMetrics]],
    spec: PolicyLossSpec,
    arguments: dict[str, Any],
    upstream: float = 1.7,
) -> dict[str, Tensor]:
    arguments = dict(arguments)
    logp = arguments.pop("logp").clone().requires_grad_()
    loss, metrics = function(logp, spec=spec, **arguments)
    (dlogp,) = torch.autograd.grad(loss, logp, torch.full((), upstream, dtype=loss.dtype, device=loss.device))
    assert not metrics.sums.requires_grad and not metrics.ratio_max.requires_grad
    return {"loss": loss.detach(), "dlogp": dlogp, "sums": metrics.sums, "ratio_max": metrics.ratio_max}


def unused(arguments: dict[str, Any]) -> Tensor:
    """[N] tokens of weight 0."""
    lengths, weight = arguments["offsets"].diff(), arguments["weight"]
    tokens = len(arguments["logp"])
    if weight is None or not weight.dim():
        return torch.full((tokens,), weight is not None and float(weight) == 0, device=lengths.device)
    return (weight if len(weight) == tokens else weight.repeat_interleave(lengths)) == 0


def poisoned(arguments: dict[str, Any], value: float = math.nan) -> dict[str, Any]:
    """With `value` beside every weight of 0."""
    out, tokens = dict(arguments), len(arguments["logp"])
    dead = unused(arguments)
    alive = torch.zeros(len(arguments["offsets"]) - 1, dtype=torch.int64, device=dead.device)
    segments = torch.arange(len(alive), device=dead.device).repeat_interleave(arguments["offsets"].diff())
    alive = alive.index_add(0, segments, (~dead).long())
    for name in ("logp", "old_logp", "advantage", "ref_logp", "rollout_logp", "importance"):
        if out.get(name) is not None:
            out[name] = out[name].masked_fill(dead if len(out[name]) == tokens else alive == 0, value)
    return out


def kinds(i: int) -> dict[str, str]:
    """Forms of advantage and weight, so that neighbouring specs meet different ones."""
    return {
        "advantage": ("segment", "token")[i % 2],
        "weight": ("token", "segment", "token", "scalar", "none")[i % 5],
    }
