"""Cases of policy_loss and segment_reduce."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu_check.parity.measure import Problem, Run, evaluate, parity
from swirl_kernels import PolicyLossSpec, naive_policy_loss, naive_segment_reduce, policy_loss, segment_reduce

LENGTHS = (0, 1, 17, 0, 600, 3, 1, 130, 0)  # none, one token, less than a block of 256, several


def every_word() -> list[PolicyLossSpec]:
    """Each ratio with each hard clip, and the soft ones; every KL estimate and every correction at every level among them, limits tight
    and away."""
    corrections = [("none", "token"), *itertools.product(("tis", "icepop", "mask"), ("token", "step", "step_mean"))]
    specs = []
    for i, (ratio, clip) in enumerate(
        itertools.product(("token", "step", "step_token"), ("none", "ppo", "dual", "cispo"))
    ):
        kl, (correction, level) = ("none", "k1", "k2", "k3")[(i + i // 4) % 4], corrections[i % len(corrections)]
        specs.append(
            PolicyLossSpec(
                ratio=ratio,  # type: ignore[arg-type]
                clip=clip,  # type: ignore[arg-type]
                clip_low=(0.1, math.inf, 0.05)[i % 3],
                clip_high=(0.15, 0.05, math.inf)[i % 3],
                dual_clip=(1.3, 1.02)[i % 2],
                kl=kl,  # type: ignore[arg-type]
                kl_coef=0.0 if kl == "none" else 0.3,
                kl_limit=(math.inf, 0.05)[i % 2],
                correction=correction,  # type: ignore[arg-type]
                correction_level=level,  # type: ignore[arg-type]
                correction_low=(0.8, 0.0)[i % 2],
                correction_high=(1.1, 1.3, math.inf)[i % 3],
            )
        )
    gated = PolicyLossSpec(
        clip="sapo",
        kl="k3",
        kl_coef=0.3,
        kl_importance=True,
        correction="icepop",
        correction_low=0.9,
        correction_high=1.1,
        correction_gate="step_mean",
    )
    return [*specs, gated, PolicyLossSpec(ratio="step_sum", clip="vespo", kl="k2", kl_coef=0.3)]


SPECS = every_word()
WEIGHTS = ("token", "segment", "scalar", "none")


def policy(run: Run, spec: PolicyLossSpec = SPECS[5], *, lengths: tuple[int, ...] = LENGTHS, kind: int = 0) -> Problem:
    """kind: which forms of advantage and weight. Three in ten tokens have weight 0, where it is by token."""
    offsets = torch.tensor([0, *itertools.accumulate(lengths)], device=run.device)
    tokens, segments = sum(lengths), len(lengths)
    logp = run.normal(tokens, seed=1, dtype=torch.float32) - 2
    old = logp + run.normal(tokens, seed=2, scale=0.2, dtype=torch.float32)
    weights = {"token": tokens, "segment": segments}
    inputs: dict[str, Any] = {
        "logp": logp.to(run.dtype, copy=True).requires_grad_(),
        "old_logp": old.to(run.dtype),
        "advantage": run.normal((segments, tokens)[kind % 2], seed=3),
        "offsets": offsets,
        "ref_logp": None if spec.kl == "none" else (logp + run.normal(tokens, seed=4, scale=0.3)).to(run.dtype),
        "rollout_logp": None
        if spec.correction == "none"
        else (old + run.normal(tokens, seed=5, scale=0.1)).to(run.dtype),
        "importance": run.normal(tokens, seed=8).abs() if spec.clip == "vespo" else None,
    }
    form = WEIGHTS[kind % len(WEIGHTS)]
    if form in weights:
        drawn = run.normal(weights[form], seed=6).abs() + 0.1
        inputs["weight"] = drawn.masked_fill(run.share(weights[form], 0.3, 7), 0.0)
    elif form == "scalar":
        inputs["weight"] = torch.tensor(0.375, dtype=run.dtype, device=run.device)

    def call(function: Any) -> Callable[[dict], dict[str, Tensor]]:
        def outputs(inputs: dict[str, Any]) -> dict[str, Tensor]:
            loss, metrics = function(**inputs, spec=spec)
            return {"loss": loss, "sums": metrics.sums, "ratio_max": metrics.ratio_max}

        return outputs

    upstream = {"loss": torch.tensor(1.75, device=run.device)}
    return Problem(call(policy_loss), call(naive_policy_loss), inputs, upstream)


def policy_spec(run: Run, number: int) -> None:
    for kind in range(len(WEIGHTS)):
        parity(run, policy(run, SPECS[number], kind=kind))


def unused_tokens(run: Run) -> None:
    """NaN or infinity beside every weight of 0 changes no bit of anything."""
    for spec in SPECS[2::4]:
        problem = policy(run, spec)
        clean, dead = evaluate(problem), problem.inputs["weight"] == 0
        for poison in (math.nan, math.inf):
            inputs = dict(problem.inputs)
            for name in ("logp", "old_logp", "ref_logp", "rollout_logp"):
                if inputs[name] is not None:
                    inputs[name] = inputs[name].detach().masked_fill(dead, poison)
            inputs["logp"].requires_grad_()
            got = evaluate(replace(problem, inputs=inputs))
            for name, x in got.items():
                run.same(name, x, clean[name])
            run.note("gradient of unused tokens", float(got["dlogp"][dead].abs().sum()), 0.0)


def reduce(run: Run, op: str = "sum", *, index: bool = False, lengths: tuple[int, ...] = ()) -> Problem:
    """index: positions name entries, most of them several times. Segments longer than a block of 512 among them."""
    lengths = lengths or ((0, 1, 300, 0, 1, 600, 0) if run.small else (0, 1, 700, 0, 40, 1, 2600, 512, 0))
    positions = sum(lengths)
    offsets = torch.tensor([0, *itertools.accumulate(lengths)], device=run.device)
    at = run.integers(max(1, positions // 4), positions, 2) if index else None
    inputs = {"x": run.normal(positions, seed=1).requires_grad_(), "offsets": offsets, "index": at}

    def call(function: Any) -> Callable[[dict], dict[str, Tensor]]:
        return lambda given: {"reduced": function(given["x"], given["offsets"], op, given["index"])}

    upstream = run.normal(len(lengths), seed=3, dtype=torch.float32)
    return Problem(call(segment_reduce), call(naive_segment_reduce), inputs, {"reduced": upstream})


def reduced(run: Run, op: str, index: bool) -> None:
    problem = reduce(run, op, index=index)
    if op == "count":
        run.same(
            "count", problem.ours(problem.inputs)["reduced"], problem.naive(problem.inputs)["reduced"].to(run.device)
        )
    elif op == "max":  # empty segments are -inf
        got, exact = evaluate(problem), evaluate(problem.exact())
        run.same("max", got["reduced"].double(), exact["reduced"])
        run.compare("dx", got["dx"], exact["dx"])
    else:
        parity(run, problem)


def poisoned_entries(run: Run) -> None:
    """NaN reaches the segments that hold it and no other; entries that no position names reach none."""
    for op in ("sum", "mean", "max"):
        problem = reduce(run, op, index=True)
        clean, used = evaluate(problem), torch.zeros(len(problem.inputs["x"]), dtype=torch.bool, device=run.device)
        used[problem.inputs["index"]] = True
        x = problem.inputs["x"].detach().masked_fill(~used, math.nan).requires_grad_()
        for name, y in evaluate(replace(problem, inputs=problem.inputs | {"x": x})).items():
            run.same(name, y, clean[name])
        problem = reduce(run, op)
        clean, x = evaluate(problem), problem.inputs["x"].detach().clone()
        x[300] = math.nan  # in the third segment
        got = evaluate(replace(problem, inputs=problem.inputs | {"x": x.requires_grad_()}))["reduced"]
        run.note("segments that lost their NaN", float(not got[2].isnan()), 0.0)
        others = torch.arange(len(got), device=run.device) != 2
        run.same("other segments", got[others], clean["reduced"][others])


def permuted_segments(run: Run, op: str) -> None:
    """The segments in another order: a segment's part of the result and of the gradient keeps its bits."""
    if op == "segment_reduce":
        problem, name, per_segment = reduce(run, "mean"), "x", "reduced"
    else:
        problem, name, per_segment = policy(run, SPECS[6]), "logp", None
    offsets = problem.inputs["offsets"].tolist()
    order = torch.randperm(len(offsets) - 1, generator=torch.Generator().manual_seed(3)).tolist()
    tokens = torch.cat([torch.arange(offsets[s], offsets[s + 1]) for s in order]).to(run.device)
    lengths, segments = [offsets[s + 1] - offsets[s] for s in order], torch.tensor(order, device=run.device)
    inputs = {}
    for key, x in problem.inputs.items():
        by = tokens if isinstance(x, Tensor) and len(x) == len(tokens) else segments
        inputs[key] = x if x is None else x.detach()[by] if key != "offsets" else None
    inputs["offsets"] = torch.tensor([0, *itertools.accumulate(lengths)], device=run.device)
    inputs[name].requires_grad_()
    upstream = {n: u[segments] if u.dim() else u for n, u in problem.upstream.items()}
    whole, got = evaluate(problem), evaluate(replace(problem, inputs=inputs, upstream=upstream))
    pairs = {f"d{name}": tokens} | ({per_segment: segments} if per_segment else {})
    for key, by in pairs.items():
        run.agree(key, got[key], whole[key][by])
