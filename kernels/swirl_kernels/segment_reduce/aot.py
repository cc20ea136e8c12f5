"""What `python -m swirl_kernels.aot` compiles of segment_reduce."""

from __future__ import annotations

from swirl_kernels.aot.case import AotCase, Stream
from swirl_kernels.segment_reduce.stretches import levels
from swirl_kernels.segment_reduce.triton import SPREAD_BLOCK, _reduce_kernel, _spread_kernel, tiles

APART = Stream(apart=True)
LENGTHS = {"": 128, "long": 4096}  # of a mean segment


def aot_cases() -> list[AotCase]:
    cases = []
    for dtype in ("bf16", "fp32"):
        for op in ("sum", "mean", "max"):
            for has_index in (False, True):
                cases.append(_reduce_case(dtype, op, has_index))
    cases.append(_reduce_case("fp32", "sum", has_index=True, partial=True))
    cases += [_reduce_case("fp32", op, has_index=False, length="long") for op in ("sum", "max")]
    signature = {"values": "*fp32", "offsets": "*i64", "out": "*fp32"}
    signature |= dict.fromkeys(("positions", "segments", "blocks"), "i32")
    signature |= dict.fromkeys(("LEVELS", "BLOCK"), "constexpr")
    constants = {"LEVELS": levels(2**17), "BLOCK": SPREAD_BLOCK}
    cases.append(AotCase("segment_reduce spread fp32", _spread_kernel, signature, constants, 1, 3, stream=Stream("kernel", apart=True)))
    return cases


def _reduce_case(dtype: str, op: str, has_index: bool, *, partial: bool = False, length: str = "") -> AotCase:
    sizes = tiles(LENGTHS[length], 1)
    warps = sizes.pop("num_warps")
    constants = {"OP": op, "HAS_INDEX": has_index, "PARTIAL": partial, **sizes}
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
    words = [op, dtype, *(["index"] if has_index else []), *(["partial"] if partial else []), *filter(None, [length])]
    values = constants | ({} if has_index else {"index": None})
    return AotCase(f"segment_reduce {' '.join(words)}", _reduce_kernel, signature, values, warps, 3, stream=APART)
