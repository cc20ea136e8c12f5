"""training.logprob_workspace_mb=0: how much memory the log-probs of a micro-batch may work in and hold for their backward."""

from __future__ import annotations

import torch

LEAST_MB = 256.0


def logprob_workspace(free: int) -> float:
    """MiB, a tenth of `free` bytes, cut to a power of two, at least 256: where the vocabulary is cut follows from it, and with
    that the last bits of log-probs, which must not change with every MiB that is free."""
    size = LEAST_MB
    while 2 * size * 2**20 * 10 <= free:
        size *= 2
    return size


def free_memory(device: torch.device) -> int:
    """Bytes of a CUDA device that torch could still allocate."""
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + unused
