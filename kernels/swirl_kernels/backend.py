"""Which implementation of an operation runs: decided per call from the tensor and SWIRL_KERNELS_BACKEND."""

from __future__ import annotations

import os
from typing import Literal

import torch

Backend = Literal["torch", "triton"]

TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def choose_backend(operation: str, tensor: torch.Tensor, dtype: torch.dtype | None = None) -> Backend:
    """The backend for `operation` on `tensor`; dtype: what it computes in, the tensor's own by default.

    SWIRL_KERNELS_BACKEND=torch|triton forces one. Unset or empty: Triton for CUDA tensors in fp32, bf16 and fp16, torch for all
    else (float64 among it). Triton on CPU tensors works only under its interpreter (TRITON_INTERPRET=1, for tests).

    Raises ValueError for another value of the variable and for tensors that the forced backend cannot compute.
    """
    forced = os.environ.get("SWIRL_KERNELS_BACKEND", "").strip().lower()
    if forced not in ("", "torch", "triton"):
        raise ValueError(
            f"SWIRL_KERNELS_BACKEND is {forced!r}; use 'torch' or 'triton', or unset it to choose by device"
        )
    dtype = dtype or tensor.dtype
    if forced != "triton":
        return "triton" if not forced and tensor.is_cuda and dtype in TRITON_DTYPES else "torch"
    if dtype not in TRITON_DTYPES:
        raise ValueError(f"{operation} in {dtype} has no Triton kernel; unset SWIRL_KERNELS_BACKEND or cast to float32")
    if not tensor.is_cuda:
        if os.environ.get("TRITON_INTERPRET") != "1":
            raise ValueError(
                f"SWIRL_KERNELS_BACKEND=triton, but {operation} got tensors on {tensor.device}; move them to a CUDA device, "
                "or set TRITON_INTERPRET=1 before importing triton to interpret the kernels on a CPU (slow; for tests)"
            )
        if dtype == torch.bfloat16:
            raise ValueError(f"{operation}: Triton's interpreter multiplies bfloat16 wrongly; use float32 or float16")
    return "triton"
