"""Which implementation of an operation runs: decided per call from the tensor's device and SWIRL_KERNELS_BACKEND."""

from __future__ import annotations

import os
from typing import Literal

import torch

Backend = Literal["torch", "triton"]

# Operations that have a Triton implementation beside the torch one; a name enters with its kernel.
TRITON_OPERATIONS: frozenset[str] = frozenset()


def choose_backend(operation: str, tensor: torch.Tensor) -> Backend:
    """The backend for `operation` on `tensor`.

    SWIRL_KERNELS_BACKEND=torch|triton forces one; unset or empty, CUDA tensors take Triton where the operation has it
    and all else takes torch. Raises ValueError for another value, NotImplementedError when triton is forced and the
    operation has none.
    """
    forced = os.environ.get("SWIRL_KERNELS_BACKEND", "").strip().lower()
    if forced not in ("", "torch", "triton"):
        raise ValueError(
            f"SWIRL_KERNELS_BACKEND is {forced!r}; use 'torch' or 'triton', or unset it to choose by device"
        )
    if forced == "triton" and operation not in TRITON_OPERATIONS:
        raise NotImplementedError(
            f"SWIRL_KERNELS_BACKEND=triton, but {operation} has no Triton implementation in this version of "
            "swirl_kernels; unset the variable or set it to 'torch'"
        )
    if forced == "torch" or operation not in TRITON_OPERATIONS:
        return "torch"
    return "triton" if forced == "triton" or tensor.is_cuda else "torch"
