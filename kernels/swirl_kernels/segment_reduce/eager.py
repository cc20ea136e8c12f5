"""segment_reduce in plain PyTorch. Legend: N entries of x, M positions, S segments."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def segment_reduce_torch(x: Tensor, offsets: Tensor, op: str, index: Tensor | None) -> tuple[Tensor, Tensor]:
    """out [S], and for "max" the int64 [S] entry of x that was chosen, -1 where there is none (else an empty tensor)."""
    taken = (x if index is None else x.index_select(0, index)).to(torch.promote_types(x.dtype, torch.float32))
    lengths = offsets.diff()
    if op != "max":
        total = segment_sums(taken, offsets)
        return total if op == "sum" else total / lengths.clamp(min=1), lengths.new_zeros(0)
    out = torch.segment_reduce(taken, "max", offsets=offsets, unsafe=True)
    top = torch.repeat_interleave(out, lengths, output_size=len(taken))
    place = torch.arange(len(taken), dtype=torch.float64, device=x.device)  # exact up to 2^53
    place = place.masked_fill(~((taken == top) | taken.isnan()), math.inf)
    first = torch.segment_reduce(place, "min", offsets=offsets, unsafe=True)
    chosen = torch.where(lengths > 0, first, -1.0).long()
    if index is not None and len(index):
        chosen = torch.where(chosen < 0, chosen, index.long()[chosen.clamp(min=0)])
    return out, chosen


def segment_sums(values: Tensor, offsets: Tensor) -> Tensor:
    """In float64: torch adds up one after the other, which in fp32 loses digits with every position."""
    return torch.segment_reduce(values.double(), "sum", offsets=offsets, unsafe=True).to(values.dtype)
