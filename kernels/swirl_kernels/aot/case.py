"""One kernel in one shipped configuration, to be compiled ahead of time by `python -m swirl_kernels.aot`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class Stream:
    """What must hold where a kernel's elements stream through it.

    where: "loops", the innermost loops that reach global memory, of which there must be one; "kernel", all of its code, for
    kernels whose loads or stores lie outside of loops.
    bits: how wide a thread's widest load must be there, and its widest store where there are stores. narrow: how many loads and
    stores of 8 or 16 bits may be there (masked tails, one value a row). 0 bits: widths are not looked at.
    apart: no SHFL, BAR or REDUX in those loops: lanes and warps do not wait for each other.
    limit: instructions an element at most, `elements` being what a thread handles in one pass of the loop with the most code
    of its own: the cheapest pass, loops inside left out (so an epilogue is counted without the product). None: no limit.
    """

    where: Literal["loops", "kernel"] = "loops"
    bits: int = 0
    narrow: int = 0
    apart: bool = False
    elements: int = 0
    limit: float | None = None

    def __post_init__(self) -> None:
        if self.limit is not None and not self.elements:
            raise ValueError(f"a limit of {self.limit} instructions an element needs the elements of one pass")


@dataclass(frozen=True)
class AotCase:
    """kernel: the @triton.jit function (importing it with TRITON_INTERPRET unset). name: operation, direction, dtype, options.

    signature: Triton type of every argument in order ("*bf16", "*fp32", "*i32", "i32", "i64", "fp32"; "constexpr" for those in
    constants). constants: value of every constexpr argument (None for absent pointers). targets: compute capabilities that ship
    this configuration. tensor_cores: the kernel multiplies 16-bit matrices and must do it there, and on 9.0 its products must
    not wait for each other, but for `serial_reason`. aligned: arguments that are multiples of 16 at run time (pointers, strides
    and sizes); the launcher must specialise them so. spill_bytes: local memory allowed
    where elements stream, and why it is: `spill_reason` must not be empty then; around the loops OUTSIDE bytes are always
    allowed. stream: what must hold where elements stream; None: nothing.
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
    serial_reason: str = ""
    stream: Stream | None = None

    @property
    def not_specialised(self) -> list[str]:
        """What it calls aligned though the launcher hides it from the compiler (do_not_specialize…)."""
        hidden = {p.name for p in self.kernel.params if p.do_not_specialize or p.do_not_specialize_on_alignment}
        return [name for name in self.aligned if name in hidden]
