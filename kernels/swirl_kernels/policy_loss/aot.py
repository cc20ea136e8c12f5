"""What `python -m swirl_kernels.aot` compiles of policy_loss."""

from __future__ import annotations

from swirl_kernels.aot.case import AotCase, Stream
from swirl_kernels.policy_loss.spec import PolicyLossSpec
from swirl_kernels.policy_loss.triton import BLOCK, WARPS, _policy_loss_kernel, soft_numbers


def aot_cases() -> list[AotCase]:
    """Every word of the spec, in combinations that hold much in registers, and the smallest kernel."""
    specs = [
        (PolicyLossSpec(clip="none"), "none", False),
        (PolicyLossSpec(kl="k3", kl_coef=0.1), "token", True),
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
        (
            PolicyLossSpec(
                clip="dual", kl="k3", kl_coef=0.1, kl_importance=True, correction="icepop", correction_gate="step_mean"
            ),
            "token",
            None,
        ),
    ]
    cases = [_case(spec, weight, slope, dtype) for spec, weight, slope in specs for dtype in ("fp32", "bf16")]
    cases.append(_case(PolicyLossSpec(), "token", True, "fp32", unit=True))
    return cases + [_case(spec, weight, True, "bf16", importance=importance) for spec, weight, importance in more]


def _case(
    spec: PolicyLossSpec, weight: str, slope: bool, dtype: str, *, unit: bool = False, importance: str | None = None
) -> AotCase:
    constants = {
        "RATIO": spec.ratio,
        "CLIP": spec.clip,
        "KL": spec.kl,
        "CORRECTION": spec.correction,
        "LEVEL": spec.correction_level,
        "GATE": spec.gate,
        "KL_IMPORTANCE": spec.kl_importance,
        "SOFT": soft_numbers(spec),
        "WEIGHT": weight,
        "IMPORTANCE": importance or "none",
        "ADVANTAGE_PER_TOKEN": spec.ratio == "step_token",
        "UNIT": unit,
        "HAS_SLOPE": slope,
        "BLOCK": BLOCK,
    }
    pointers = {"logp": f"*{dtype}", **dict.fromkeys(("old", "advantage", "ref", "behaviour", "given"), "*fp32")}
    pointers["weight"] = "*fp64"  # what loss_weights returns
    pointers |= {"offsets": "*i64", "slope": "*fp32", "partial": "*fp32"}
    present = {
        "weight": weight != "none",
        "ref": spec.kl != "none",
        "behaviour": spec.correction != "none",
        "given": importance is not None,
        "slope": slope,
    }
    absent = [name for name, there in present.items() if not there]
    scalars = ("low", "high", "dual_clip", "kl_coef", "kl_limit", "correction_low", "correction_high")
    signature = pointers | dict.fromkeys(absent, "constexpr") | {"tokens": "i32", "segments": "i32"}
    signature |= dict.fromkeys(scalars, "fp32") | dict.fromkeys(constants, "constexpr")
    words = (
        dtype,
        spec.ratio,
        spec.clip,
        spec.kl,
        spec.correction,
        spec.correction_level,
        *(("unit",) if unit else ()),
        *(("kl_importance",) if spec.kl_importance else ()),
        *((f"gate={spec.gate}",) if spec.correction_gate else ()),
        *((f"importance={importance}",) if importance else ()),
    )
    name = f"policy_loss {' '.join(words)}"
    return AotCase(name, _policy_loss_kernel, signature, constants | dict.fromkeys(absent), WARPS, 3, stream=Stream(apart=True))
