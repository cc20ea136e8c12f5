"""Token numbers as the operations take them."""

from __future__ import annotations

import torch
from torch import Tensor


def wide_targets(targets: Tensor) -> Tensor:
    """int32 and int64 as they are, other integers as int64: compared in 8 bits, -100 would be the token 156.

    Raises ValueError for what is no integer (float, complex, bool).
    """
    if targets.dtype in (torch.int32, torch.int64):
        return targets
    if targets.is_floating_point() or targets.is_complex() or targets.dtype == torch.bool:
        raise ValueError(
            f"targets have shape {tuple(targets.shape)} and dtype {targets.dtype}; give integers {list(targets.shape)}"
        )
    return targets.long()
