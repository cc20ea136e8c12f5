"""What `python -m swirl_kernels.aot` compiles of segment_reduce."""

from __future__ import annotations

from swirl_kernels.aot.case import AotCase, Stream
from swirl_kernels.segment_reduce.triton import BLOCK, WARPS, _reduce_kernel, _spread_kernel


def aot_cases() -> list[AotCase]:
    cases = []
    for dtype in ("bf16", "fp32"):
        for op in ("sum", "mean", "max"):
            for has_index in (False, True):
                cases.append(_reduce_case(dtype, op, has_index, partial=False))
    cases.append(_reduce_case("fp32", "sum", has_index=True, partial=True))
    signature = {"values": "*fp32", "offsets": "*i64", "out": "*fp32", "positions": "i32", "segments": "i32"}
    signature["BLOCK"] = "constexpr"
    cases.append(AotCase("segment_reduce spread fp32", _spread_kernel, signature, {"BLOCK": BLOCK}, WARPS, 3, stream=Stream(apart=True)))
    return cases


def _reduce_case(dtype: str, op: str, has_index: bool, partial: bool) -> AotCase:
    constants = {"OP": op, "HAS_INDEX": has_index, "PARTIAL": partial, "BLOCK": BLOCK}
    signature = {
        "x": f"*{dtype}",
        "offsets": "*i64",
        "index": "*i64" if has_index else "constexpr",
        "out": "*fp32",
        "chosen": "*i64",
        "entries": "i32",
        "positions": "i32",
        "segments": "i32",
        **dict.fromkeys(constants, "constexpr"),
    }
    name = f"segment_reduce {op} {dtype}{' index' if has_index else ''}{' partial' if partial else ''}"
    return AotCase(name, _reduce_kernel, signature, constants | ({} if has_index else {"index": None}), WARPS, 3, stream=Stream(apart=True))
