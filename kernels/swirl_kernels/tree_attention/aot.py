"""What `python -m swirl_kernels.aot` compiles of tree_attention."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from triton import next_power_of_2

from swirl_kernels.aot.case import AotCase, Stream
from swirl_kernels.tree_attention.blocks import count_tiles
from swirl_kernels.tree_attention.kernels import backward_kv, backward_q, forward, sum_parts
from swirl_kernels.tree_attention.triton import EDGE, SUMMED, Tiles, configuration

OPTIONS = ("", "softcap", "window", "softcap window", "query_index")  # what a kernel is compiled for separately
_FP32_DQ = "q and dout lie in registers; a full tile on sm_90: 37 loads, 25 stores of 1259 instructions; other tiles spill more"
_FEW = "at most 8 of a tile's 1,300 instructions, on sm_90"
_SPILLS = {  # (kernel, option, D, fp32): bytes on the worst target of a stack that loops use, and how much of them that is
    ("forward", "softcap", 256, False): (16, _FEW),
    ("forward", "window", 256, False): (32, _FEW),
    ("forward", "softcap window", 256, False): (16, _FEW),
    ("backward_q", "", 256, True): (264, _FP32_DQ),
    ("backward_kv few", "softcap", 128, False): (40, "11 of a tile's 925 instructions, on sm_90"),
}


def aot_cases() -> list[AotCase]:
    """Every kernel in every shipped configuration."""
    cases = [_case(count_tiles, None, 0, Tiles(128, 64, 1, 1), option) for option in ("", "window", "query_index")]
    for kernel in (forward, backward_q, backward_kv):
        for dim in (64, 128, 256):
            for dtype in (torch.bfloat16, torch.float16, torch.float32):
                options = OPTIONS if dtype == torch.bfloat16 else OPTIONS[:1]
                if dtype != torch.float16 or dim == 64:  # fp16 compiles like bf16
                    cases += [case for option in options for case in _cases(kernel, dtype, dim, option)]
        cases += _cases(kernel, torch.bfloat16, 192, "", values=128)
    cases += [case for dim in (64, 128) for case in _cases(forward, torch.bfloat16, dim, "window sinks")]
    for dim in (64, 128, 256):
        for variant in ("added", "direct"):
            cases += _cases(backward_kv, torch.bfloat16, dim, "", variant=variant)
        cases.append(_case(sum_parts, torch.bfloat16, dim, Tiles(SUMMED, 1, 4, 3), ""))
    cases += [
        case
        for dim in (64, 128)
        for o in OPTIONS
        for case in _cases(backward_kv, torch.bfloat16, dim, o, variant="few")
    ]
    return cases


def _cases(
    kernel: Any, dtype: torch.dtype, dim: int, option: str, values: int | None = None, variant: str = ""
) -> Iterator[AotCase]:
    """One for all targets that share a configuration. values: their head dimension, where it is not dim. variant, of backward_kv: ""
    writes fp32 shares, "few" in smaller blocks of keys, "added" adds to them, "direct" writes dK and dV themselves."""
    targets: dict[Tiles, list[int]] = {}
    for target in (80, 90, 100):
        of = (next_power_of_2(dim), dtype, divmod(target, 10))
        narrow = kernel is forward and values is not None
        tiles = configuration("forward_narrow" if narrow else kernel.fn.__name__, *of)
        if variant == "few":
            few = configuration("backward_kv_few", *of)
            if few == tiles:
                continue
            tiles = few
        targets.setdefault(tiles, []).append(target)
    for tiles, shared_by in targets.items():
        yield _case(kernel, dtype, dim, tiles, option, tuple(shared_by), values, variant)


def _case(
    kernel: Any,
    dtype: torch.dtype | None,
    dim: int,
    tiles: Tiles,
    option: str,
    targets: tuple[int, ...] = (80, 90, 100),
    values: int | None = None,
    variant: str = "",
) -> AotCase:
    tensors = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32", None: ""}[dtype]
    kinds = dict.fromkeys(("dout", "q", "k", "v", "out", "dq", "dk", "dv"), tensors)
    kinds |= {"lse": "*fp32", "delta": "*fp32", "sinks": "*fp32", "scale": "fp32", "softcap": "fp32"}
    kinds |= {"dk_factor": "fp32", "factor": "fp32"}
    kinds |= {"shares": "*fp32", "total": tensors}
    if variant != "direct":
        kinds |= {"dk": "*fp32", "dv": "*fp32"}
    lists = ("counts", "ranges", "end", "parent", "run", "depth", "position", "query_depth", "shallowest")
    kinds |= dict.fromkeys(lists, "*i32")
    present = {"softcap": {"softcap"}, "window": {"depth", "query_depth", "shallowest"}, "query_index": {"position"}}
    present |= {"sinks": {"sinks"}}
    optional: set[str] = set().union(*present.values())
    sizes = {
        "ADDED": variant == "added",
        "HEAD_DIM": dim,
        "BLOCK_D": next_power_of_2(dim),
        "VALUE_DIM": dim if values is None else values,
        "VALUE_PADDED": next_power_of_2(dim if values is None else values),
        "BLOCK_M": tiles.block_m,
        "EDGE_M": min(EDGE, tiles.block_m),
        "BLOCK_N": tiles.block_n,
    }
    names = list(kernel.arg_names)
    constants = dict.fromkeys(optional.difference(*(present[word] for word in option.split()))) | sizes
    operation = kernel.fn.__name__
    words = ["tree_attention", operation, variant, option, *([f"D={dim}", str(dtype)[6:]] if dtype else [])]
    if values is not None:
        words.append(f"V={values}")
    spill_bytes, spill_reason = _SPILLS.get(
        (f"{operation} {variant}".strip(), option, dim, dtype == torch.float32), (0, "")
    )
    return AotCase(
        name=" ".join(filter(None, words)),
        kernel=kernel,
        signature={name: "constexpr" if name in constants else kinds.get(name, "i32") for name in names},
        constants={name: value for name, value in constants.items() if name in names},
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
        targets=targets,
        tensor_cores=dtype in (torch.bfloat16, torch.float16) and kernel is not sum_parts,
        aligned=tuple(
            name
            for name in names
            if name not in constants and (name.endswith(("_head", "_row")) or kinds.get(name, "").startswith("*"))
        ),
        spill_bytes=spill_bytes,
        spill_reason=spill_reason,
        stream=None if dtype is None else Stream("loops", bits=128),
    )
