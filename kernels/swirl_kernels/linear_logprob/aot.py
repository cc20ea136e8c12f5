"""What `python -m swirl_kernels.aot` compiles of linear_logprob."""

from __future__ import annotations

from typing import Any

import torch

from swirl_kernels.aot.case import AotCase, Stream
from swirl_kernels.linear_logprob.triton import (
    GROUP,
    SPLIT,
    _dlogits_kernel,
    _forward_kernel,
    _merge_kernel,
    configuration,
)


LIMIT = 14  # instructions a logit of the forward's epilogue


def aot_cases() -> list[AotCase]:
    """Plain, entropy and soft-cap in bf16; fp16 and fp32 with everything on."""
    cases = []
    for dtype, name, options in (
        (torch.bfloat16, "bf16", {}),
        (torch.bfloat16, "bf16", {"ENTROPY": True}),
        (torch.bfloat16, "bf16", {"HAS_SOFTCAP": True}),
        (torch.bfloat16, "bf16", {"ENTROPY": True, "HAS_SOFTCAP": True, "HAS_BIAS": True}),
        (torch.float16, "fp16", {"ENTROPY": True, "HAS_SOFTCAP": True, "HAS_BIAS": True}),
        (torch.float32, "fp32", {"ENTROPY": True, "HAS_SOFTCAP": True, "HAS_BIAS": True}),
    ):
        for targets, capability in (((80,), (8, 0)), ((90,), (9, 0)), ((100,), (10, 0))):
            cases += _cases(dtype, name, options, targets, capability)
    signature = {"tops": "*fp32", "others": "*fp32", "weighted": "*fp32", "N": "i32", "S": "i32"}
    signature |= {"ENTROPY": "constexpr", "BLOCK_N": "constexpr"}
    cases.append(
        AotCase("linear_logprob merge", _merge_kernel, signature, {"ENTROPY": True, "BLOCK_N": 128}, 4, 3, aligned=())
    )
    return cases


def _cases(
    dtype: torch.dtype, name: str, options: dict[str, bool], targets: tuple[int, ...], capability: tuple[int, int]
) -> list[AotCase]:
    flags = {"HAS_BIAS": False, "HAS_SOFTCAP": False, "ENTROPY": False} | options
    label = " ".join([name, *(flag.removeprefix("HAS_").lower() for flag, on in flags.items() if on)])
    entropy = f"*{'fp32'}" if flags["ENTROPY"] else "constexpr"
    operands = {"hidden": f"*{name}", "weight": f"*{name}", "bias": f"*{name}" if flags["HAS_BIAS"] else "constexpr"}
    common = operands | {"targets": "*i64", "inverse_temperature": "*fp32"}
    shape = {"N": "i32", "V": "i32", "H": "i32", "hidden_stride": "i64", "weight_stride": "i64"}
    constants = flags | {"GROUP": GROUP}
    forward = common | {"tops": "*fp32", "others": "*fp32", "weighted": entropy, "target_logits": "*fp32"}
    forward |= shape | {"softcap": "fp32"}
    per_row = {"lse": "*fp32", "at_target": "*fp32", "dlogp": entropy, "dentropy": entropy, "entropy": "*fp32"}
    backward = common | per_row | {"dz": f"*{name}"} | shape | {"dz_stride": "i64", "softcap": "fp32", "stored": "fp32"}
    cases = []
    for direction, kernel, signature, more in (
        ("forward", _forward_kernel, forward, {"SPLIT": SPLIT}),
        ("dlogits", _dlogits_kernel, backward, {}),
    ):
        absent = {argument: None for argument, kind in signature.items() if kind == "constexpr"}
        sizes = configuration(dtype, capability, forward=direction == "forward", softcap=flags["HAS_SOFTCAP"])
        warps, stages = sizes.pop("num_warps"), sizes.pop("num_stages")
        values = sizes | constants | more | absent
        cases.append(
            AotCase(
                name=f"linear_logprob {direction} {label}",
                kernel=kernel,
                signature={n: signature.get(n, "constexpr") for n in kernel.arg_names},
                constants=values,
                num_warps=warps,
                num_stages=stages,
                targets=targets,
                tensor_cores=dtype != torch.float32,
                spill_bytes=32 if direction == "forward" else 0,
                spill_reason="around the vocabulary loop, none inside the product's" if direction == "forward" else "",
                aligned=(
                    *operands,
                    "V",
                    "H",
                    "hidden_stride",
                    "weight_stride",
                    *(() if direction == "forward" else ("dz", "dz_stride")),
                ),
                stream=_stream(direction, values, warps, plain=label == name),
            )
        )
    return cases


def _stream(direction: str, sizes: dict[str, Any], warps: int, *, plain: bool) -> Stream:
    """Operands and dz move 16 bytes at a time; without entropy, soft-cap and bias a logit costs at most LIMIT instructions."""
    if direction == "dlogits":
        return Stream("kernel", bits=128)
    logits = sizes["BLOCK_N"] * sizes["BLOCK_V"] // (32 * warps)
    return Stream("loops", bits=128, elements=logits, limit=LIMIT if plain else None)
