"""What a training step asked of its device: the peak that MFU is measured against, and the peak of memory.

Model FLOPs utilization (Chowdhery et al., 2022, PaLM, appendix B) is the work of the model over what the device could have done in that
time. The work is `comb.flops`: the matrix products of forward and backward over the tokens that were computed, attention by the pairs of
query and key that see each other; what activation checkpointing computes again is not work, neither are the forwards of the reference.
"""

from __future__ import annotations

import re
import resource
import sys
from pathlib import Path

import torch

GIB = 2**30

# By the name that torch.cuda.get_device_name gives: 1e12 dense operations a second in bfloat16 on tensor cores (data sheets print
# twice as many, those of 2:4 sparse matrices) and in float32 outside of them, which is what torch does unless TF32 is allowed. From
# NVIDIA's data sheets of each; None: not looked up.
_PEAKS: dict[str, tuple[float, float | None]] = {
    r"NVIDIA A100[- ].*": (312.0, 19.5),
    r"NVIDIA H100 \d+GB HBM3": (989.4, 67.0),  # SXM
    r"NVIDIA H100 PCIe": (756.0, 51.0),
    r"NVIDIA H(100|200) NVL": (835.5, 60.0),
    r"NVIDIA H200": (989.4, 67.0),  # SXM
    r"NVIDIA GH200 \d+GB": (989.4, 67.0),
    r"NVIDIA B200": (2250.0, None),
    r"NVIDIA L4": (121.0, 30.3),
    r"NVIDIA L40": (181.0, 90.5),
    r"NVIDIA L40S": (362.0, 91.6),
}


def table_peak(name: str, dtype: torch.dtype) -> float | None:
    """FLOP/s of a whole GPU of this name, None where the table has none: also for a part of one (MIG)."""
    for pattern, (bfloat16, float32) in _PEAKS.items():
        if re.fullmatch(pattern, name) and "MIG" not in name:
            if dtype == torch.bfloat16:
                return bfloat16 * 1e12
            if dtype == torch.float32 and float32 and torch.get_float32_matmul_precision() == "highest":
                return float32 * 1e12
    return None


def peak_flops(peak_tflops: float, device: torch.device, dtype: torch.dtype) -> float | None:
    """FLOP/s that one rank could reach in matrix products of `dtype`; None where that is not known: it is never guessed.

    peak_tflops: the setting training.peak_tflops; 0: from the table.
    """
    if peak_tflops:
        return peak_tflops * 1e12
    return table_peak(torch.cuda.get_device_name(device), dtype) if device.type == "cuda" else None


def utilization(work: float, busy: float, seconds: float, peak: float | None, ranks: int) -> dict[str, float]:
    """The metrics `mfu`, of forward and backward, and `mfu_step`, of the whole step; none where the peak is not known.

    work: FLOP of all ranks in the step. busy: seconds of forward and backward; seconds: of the step. peak: FLOP/s of one rank.
    """
    if peak is None:
        return {}
    return {"mfu": work / busy / peak / ranks if busy else 0.0, "mfu_step": work / seconds / peak / ranks}


def peak_memory(device: torch.device) -> float:
    """GiB since the process started: the most that tensors held on a GPU (torch's allocator), else the most that this process had in
    memory, its libraries too."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / GIB
    status = Path("/proc/self/status")
    if status.is_file():  # getrusage would count what the process was forked from
        line = next(line for line in status.read_text(encoding="utf-8").splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024 / GIB
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024) / GIB
