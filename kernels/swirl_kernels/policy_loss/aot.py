"""What `python -m swirl_kernels.aot` compiles of policy_loss."""

from __future__ import annotations

from typing import Any

from swirl_kernels.aot.case import AotCase, Stream
from swirl_kernels.policy_loss import stretches
from swirl_kernels.policy_loss.spec import PolicyLossSpec
from swirl_kernels.policy_loss.terms import soft_numbers
from swirl_kernels.policy_loss.triton import BLOCK, SCALE_BLOCK, WARPS, _policy_loss_kernel, _scale_kernel
from swirl_kernels.segment_reduce.stretches import levels

SCALARS = ("scale", "low", "high", "dual_clip", "kl_coef", "kl_limit", "correction_low", "correction_high")
K3 = PolicyLossSpec(kl="k3", kl_coef=0.1)
# Instructions a token of a lane, by layout; with everything on.
LIMITS, HEAVY_LIMIT = {"segments": 100, "units": 115, "tokens": 90}, 140


def aot_cases() -> list[AotCase]:
    """Every word of the spec, in combinations that hold much in registers, and the smallest kernel."""
    specs = [
        (PolicyLossSpec(clip="none"), "none", False),
        (K3, "token", True),
        (PolicyLossSpec(clip="dual", kl="k3", kl_coef=0.1, correction="tis"), "token", True),
        (PolicyLossSpec(ratio="step", clip="dual", kl="k3", kl_coef=0.1, correction="icepop", correction_level="step"), "segment", True),
        (PolicyLossSpec(ratio="step_token", kl="k2", kl_coef=0.1, correction="mask", correction_level="step_mean"), "token", True),
        (PolicyLossSpec(ratio="step", clip="cispo", kl="k1", kl_coef=0.1), "scalar", True),
        (PolicyLossSpec(ratio="step"), "segment", True),
        (PolicyLossSpec(clip="cispo", kl="k3", kl_coef=0.1, correction="icepop"), "token", True),
    ]  # fmt: skip
    more = [
        (PolicyLossSpec(clip="sapo", kl="k3", kl_coef=0.1), "token", None),
        (PolicyLossSpec(ratio="step_sum", clip="vespo", kl="k3", kl_coef=0.1), "token", "token"),
        (PolicyLossSpec(ratio="step", kl="k3", kl_coef=0.1, kl_importance=True), "token", "segment"),
        (PolicyLossSpec(kl="k3", kl_coef=0.1, kl_importance=True), "segment", "segment"),
        (
            PolicyLossSpec(
                clip="dual", kl="k3", kl_coef=0.1, kl_importance=True, correction="icepop", correction_gate="step_mean"
            ),
            "token",
            None,
        ),
    ]
    cases = [_case(spec, weight, slope, dtype) for spec, weight, slope in specs for dtype in ("fp32", "bf16")]
    cases += [_case(spec, weight, True, "bf16", importance=importance) for spec, weight, importance in more]
    cases += [_case(K3, "token", True, "fp32", layout=layout) for layout in ("units", "tokens")]
    cases += [_case(K3, "token", True, "fp32", layout=layout, metrics=False) for layout in ("segments", "tokens")]
    signature = {"slope": "*fp32", "factor": "*fp32", "tokens": "i32", "BLOCK": "constexpr"}
    aligned = ("slope", "factor")
    scale = AotCase(
        "policy_loss scale", _scale_kernel, signature, {"BLOCK": SCALE_BLOCK}, WARPS, 3, aligned=aligned, stream=Stream(apart=True)
    )  # fmt: skip
    return [*cases, scale]


def _case(
    spec: PolicyLossSpec,
    weight: str,
    slope: bool,
    dtype: str,
    *,
    importance: str | None = None,
    layout: str = "segments",
    metrics: bool = True,
) -> AotCase:
    pointers = {"logp": f"*{dtype}", **dict.fromkeys(("old", "advantage", "ref", "behaviour", "given"), "*fp32")}
    pointers["weight"] = "*fp64"  # what loss_weights returns
    pointers |= {"offsets": "*i64", "slope": "*fp32", "partial": "*fp32"}
    present = {
        "weight": weight != "none",
        "ref": spec.kl != "none",
        "behaviour": spec.correction != "none",
        "given": importance is not None,
        "slope": slope,
        "offsets": layout != "tokens",
    }
    absent = [name for name, there in present.items() if not there]
    words = [dtype, spec.ratio, spec.clip, spec.kl, spec.correction, spec.correction_level]
    words += [layout] if layout != "segments" else []
    words += ["kl_importance"] if spec.kl_importance else []
    words += [f"gate={spec.gate}"] if spec.correction_gate else []
    words += [f"importance={importance}"] if importance else []
    words += [] if metrics else ["no metrics"]
    constants: dict[str, Any] = {
        "CLIP": spec.clip,
        "KL": spec.kl,
        "CORRECTION": spec.correction,
        "KL_IMPORTANCE": spec.kl_importance,
        "SOFT": soft_numbers(spec),
        "WEIGHT": weight,
        "IMPORTANCE": importance or "none",
        "HAS_SLOPE": slope,
    }
    sizes = ("tokens", "segments")
    if spec.by_token:
        kernel, warps, sizes = stretches.stretch_kernel, 1, (*sizes, "blocks")
        advantage = "segment" if layout == "segments" else "token"
        constants |= {"KL_ACTS": spec.kl_coef != 0, "KL_LIMITED": False, "ADVANTAGE": advantage, "METRICS": metrics, "LAYOUT": layout}
        block = stretches.BLOCK if layout == "segments" else stretches.DENSE_BLOCK
        constants |= {"LEVELS": levels(2**17), "BLOCK": block}
        plain = spec.clip in ("none", "ppo") and spec.correction == "none" and importance is None
        limit = LIMITS[layout] if plain else HEAVY_LIMIT
        stream = Stream("kernel", apart=True, elements=block // 32, limit=limit)
    else:
        kernel, warps = _policy_loss_kernel, WARPS
        constants |= {"RATIO": spec.ratio, "LEVEL": spec.correction_level, "GATE": spec.gate}
        constants |= {"ADVANTAGE_PER_TOKEN": spec.ratio == "step_token", "UNIT": False, "BLOCK": BLOCK}
        stream = Stream(apart=True)
    kinds = pointers | dict.fromkeys(sizes, "i32") | dict.fromkeys(SCALARS, "fp32")
    values = constants | dict.fromkeys(absent)
    signature = {name: "constexpr" if name in values else kinds[name] for name in kernel.arg_names}
    aligned = tuple(name for name in pointers if spec.by_token and name not in values)
    return AotCase(
        f"policy_loss {' '.join(words)}", kernel, signature, values, warps, 3, aligned=aligned, stream=stream
    )
