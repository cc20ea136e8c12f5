"""What `python -m swirl_kernels.aot` compiles of linear_logprob."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from swirl_kernels.aot.case import AotCase, Stream
from swirl_kernels.linear_logprob import streams
from swirl_kernels.linear_logprob.triton import GROUP, SPLIT, _forward_kernel, configuration

LIMIT = 14  # instructions a logit of the invariant forward's epilogue
FLAGS = ("HAS_BIAS", "HAS_SOFTCAP", "ENTROPY")
EVERYTHING = dict.fromkeys(FLAGS, True)
PER_ROW = ("targets", "inverse_temperature", "exponent", "factor", "at_target", "lse", "dlogp", "dentropy", "entropy")


def aot_cases() -> list[AotCase]:
    """Plain, entropy and soft-cap in bf16; fp16 and fp32 with everything on."""
    cases = []
    for dtype, name, options in (
        (torch.bfloat16, "bf16", {}),
        (torch.bfloat16, "bf16", {"ENTROPY": True}),
        (torch.bfloat16, "bf16", {"HAS_SOFTCAP": True}),
        (torch.bfloat16, "bf16", EVERYTHING),
        (torch.float16, "fp16", EVERYTHING),
        (torch.float32, "fp32", EVERYTHING),
    ):
        for target, capability in ((80, (8, 0)), (90, (9, 0)), (100, (10, 0))):
            cases.append(_invariant(dtype, name, options, target, capability))
    for name, options in (("bf16", {}), ("bf16", EVERYTHING), ("fp16", EVERYTHING), ("fp32", EVERYTHING)):
        cases += [_statistics(name, options, keep=keep) for keep in (False, True) if not keep or name != "fp16"]
        cases.append(_dz(name, options))
    cases += [_kept_dz("bf16", {}), _kept_dz("fp32", {"HAS_PLACES": True})]
    signature = dict.fromkeys(("tops", "others", "weighted", "top_N", "others_N", "weighted_N"), "*fp32")
    constants = {"ENTROPY": True, "BLOCK_S": 16, "BLOCK_N": 128}
    cases.append(_case("merge", streams.merge_segments, signature | {"N": "i32", "S": "i32"}, constants, num_warps=4))
    return cases


def _case(
    name: str, kernel: Any, signature: dict[str, str], constants: dict[str, Any], *, num_warps: int = 1, **rest: Any
) -> AotCase:
    """signature: of what is not constant; what is in neither is absent."""
    types = {argument: signature.get(argument, "constexpr") for argument in kernel.arg_names}
    values = {argument: constants.get(argument) for argument, kind in types.items() if kind == "constexpr"}
    rest = {"num_stages": 3} | rest
    return AotCase(f"linear_logprob {name}", kernel, types, values, num_warps, **rest)


def _label(name: str, options: dict[str, bool]) -> str:
    return " ".join([name, *(flag.removeprefix("HAS_").lower() for flag in options if options[flag])])


def _invariant(
    dtype: torch.dtype, name: str, options: dict[str, bool], target: int, capability: tuple[int, int]
) -> AotCase:
    sizes = configuration(dtype, capability, softcap=options.get("HAS_SOFTCAP", False))
    warps, stages = sizes.pop("num_warps"), sizes.pop("num_stages")
    tma = capability >= (9, 0)
    signature = {"targets": "*i32", "softcap": "fp32"}
    signature |= dict.fromkeys(("inverse_temperature", "tops", "others", "target_logits"), "*fp32")
    signature |= dict.fromkeys(("N", "V", "H", "offset"), "i32") | dict.fromkeys(
        ("hidden_stride", "weight_stride"), "i64"
    )
    for operand, rows in (("hidden", "BLOCK_N"), ("weight", "BLOCK_V")):
        signature[operand] = f"tensordesc<{name}[{sizes[rows]}, {sizes['BLOCK_H']}]>" if tma else f"*{name}"
    signature |= _optional(name, options)
    logits = sizes["BLOCK_N"] * sizes["BLOCK_V"] // (32 * warps)
    signature = {x: kind for x, kind in signature.items() if x in _forward_kernel.arg_names}
    aligned = ["H", "hidden_stride", "weight_stride", *(x for x in signature if signature[x].startswith("*"))]
    return _case(
        f"forward {_label(name, options)}",
        _forward_kernel,
        signature,
        dict.fromkeys(FLAGS, False) | options | sizes | {"TMA": tma, "SPLIT": SPLIT, "GROUP": GROUP},
        num_warps=warps,
        num_stages=stages,
        targets=(target,),
        tensor_cores=dtype != torch.float32,
        spill_bytes=32,
        spill_reason="around the vocabulary loop, none inside the product's",
        aligned=tuple(aligned),
        stream=Stream(  # TMA brings the operands: the loops themselves load nothing
            "kernel" if tma else "loops", bits=0 if tma else 128, elements=logits, limit=None if options else LIMIT
        ),
    )


def _optional(name: str, options: dict[str, bool]) -> dict[str, str]:
    """Arguments that are there with some options alone."""
    found = {"bias": f"*{name}"} if options.get("HAS_BIAS") else {}
    return found | (dict.fromkeys(("weighted", "dlogp", "dentropy"), "*fp32") if options.get("ENTROPY") else {})


def _stream(
    name: str, kernel: Any, dtype: str, arguments: dict[str, str], options: dict[str, bool], also: dict[str, Any]
) -> AotCase:
    """A kernel of streams.py: everything that lies in rows of a chunk moves 16 bytes at a time."""
    sizes = dict.fromkeys(("N", "num_kept", "width", "segments", "first", "stride", "kept_stride"), "i32")
    per_row = dict.fromkeys((*PER_ROW, "tops", "others", "target_logits"), "*fp32") | {"targets": "*i32"}
    every = sizes | per_row | {"softcap": "fp32", "z": "*fp32"} | arguments
    absent = {"weighted", "dlogp", "dentropy"} - set(_optional(dtype, options))
    taken = (every | _optional(dtype, options)).items()
    signature = {x: kind for x, kind in taken if x in kernel.arg_names and x not in absent}
    constants = dict.fromkeys(FLAGS, False) | options | also | {"ROWS": streams.ROWS, "SEGMENT": streams.SEGMENT}
    rows = ("z", "kept", "dz", "bias", "stride", "kept_stride")
    return _case(
        f"{name} {_label(dtype, options)}",
        kernel,
        signature,
        constants,
        aligned=tuple(x for x in rows if x in signature),
        stream=Stream("kernel", bits=128),
    )


def _statistics(dtype: str, options: dict[str, bool], *, keep: bool) -> AotCase:
    kept = {"kept": f"*{dtype}"} if keep else {}
    case = _stream(f"statistics{' keeping' if keep else ''}", streams.chunk_stats, dtype, kept, options, {"KEEP": keep})
    # without kept tiles a value a row is all that is stored
    return case if keep else replace(case, stream=None)


def _dz(dtype: str, options: dict[str, bool]) -> AotCase:
    return _stream("dz", streams.chunk_dz, dtype, {"dz": f"*{dtype}"}, options, {})


def _kept_dz(dtype: str, options: dict[str, bool]) -> AotCase:
    arguments = {"kept": f"*{dtype}", "dz": f"*{dtype}"} | ({"places": "*i32"} if options else {})
    return _stream("kept dz", streams.kept_dz, dtype, arguments, options, {"HAS_PLACES": bool(options)})
