"""One kernel in one shipped configuration, to be compiled ahead of time by `python -m swirl_kernels.aot`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class AotCase:
    """kernel: the @triton.jit function (importing it with TRITON_INTERPRET unset). name: operation, direction, dtype, options.

    signature: Triton type of every argument in order ("*bf16", "*fp32", "*i32", "i32", "i64", "fp32"; "constexpr" for those in
    constants). constants: value of every constexpr argument (None for absent pointers). targets: compute capabilities that ship
    this configuration. tensor_cores: the kernel multiplies 16-bit matrices and must do it there. aligned: arguments that are
    multiples of 16 at run time (pointers and strides, as Triton specialises them). spill_bytes: local memory allowed,
    and why it is: `spill_reason` must not be empty then.
    """

    name: str
    kernel: Any
    signature: Mapping[str, str]
    constants: Mapping[str, Any]
    num_warps: int
    num_stages: int
    targets: tuple[int, ...] = (80, 90, 100)
    tensor_cores: bool = False
    aligned: tuple[str, ...] = ()
    spill_bytes: int = 0
    spill_reason: str = ""
