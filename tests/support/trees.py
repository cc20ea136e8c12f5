"""Packed prefix trees, and queries, keys and values for them, as the tests of tree attention need them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def pack(*forest: Any) -> Tensor:
    """subtree_end of trees written as (length, child, child, …)."""
    end: list[int] = []

    def walk(tree: Any) -> None:
        length, *children = tree
        start = len(end)
        end.extend([0] * length)
        for child in children:
            walk(child)
        end[start : start + length] = [len(end)] * length

    for tree in forest:
        walk(tree)
    return torch.tensor(end, dtype=torch.int32)


def comb(prompt: int, steps: int, teeth: int, tooth: int) -> Any:
    """A tree whose trunk has `steps` states, each with its teeth."""
    tree: Any = None
    for i in reversed(range(steps)):
        tree = (prompt if i == 0 else tooth, *[(tooth,)] * teeth, *([tree] if tree else []))
    return tree


def queries_keys_values(
    end: Tensor,
    *,
    heads: int = 2,
    key_heads: int = 1,
    dim: int = 8,
    values: int | None = None,
    queries: int | None = None,
    dtype: torch.dtype = torch.float64,
    device: str = "cpu",
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v as a model makes them: token-major in memory, seen head-major. values: their head dimension, where it is not dim."""
    generator = torch.Generator().manual_seed(0)
    rows = len(end) if queries is None else queries
    sizes = ((rows, heads, dim), (len(end), key_heads, dim), (len(end), key_heads, dim if values is None else values))
    drawn = [torch.randn(*size, generator=generator, dtype=torch.float64) for size in sizes]
    q, k, v = (x.to(device, dtype).transpose(0, 1).requires_grad_() for x in drawn)
    return q, k, v
