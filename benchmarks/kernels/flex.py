"""tree_attention by torch's FlexAttention (arXiv 2412.05496), to compare with in benchmarks; the package itself never calls it.

The same predicate: key j is visible to query i iff `j <= i < subtree_end[j]`, and with a window iff depth[i] - depth[j] < window.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from swirl_kernels.tree_attention.plan import count_ancestors

BLOCK = 128  # queries and keys of a block of the mask, FlexAttention's own default


def flex_tree_mask(subtree_end: Tensor, *, depth: Tensor | None = None, window: int | None = None) -> BlockMask:
    """The block mask of a packing, on subtree_end's device; make it once per packing and window.

    subtree_end: integer [T]. depth: integer [T], None: the number of ancestors. window: None for none.

    Every query block lists its key blocks: (T / 128)^2 integers. On a CPU the [T, T] mask exists meanwhile; on CUDA the
    function is compiled, so that it does not.
    """
    num = len(subtree_end)
    if window is not None and depth is None:
        depth = count_ancestors(subtree_end.long())

    def visible(batch: Tensor, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
        seen = (j <= i) & (i < subtree_end[j])
        if window is not None:
            assert depth is not None, "a window is measured in depth"
            seen = seen & (depth[i] - depth[j] < window)
        return seen

    create = _compiled(create_block_mask) if subtree_end.is_cuda else create_block_mask
    mask: BlockMask = create(visible, None, None, num, num, device=subtree_end.device, BLOCK_SIZE=BLOCK)
    return mask


def flex_tree_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    subtree_end: Tensor,
    *,
    depth: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    window: int | None = None,
    block_mask: BlockMask | None = None,
) -> Tensor:
    """What `tree_attention` computes for the same arguments: q [Hq, T, D], k and v [Hkv, T, D] -> [Hq, T, D].

    block_mask: `flex_tree_mask(subtree_end, depth=…, window=…)`, to be made once and passed to every layer; depth and
    window are then read from it.

    Compiled by Inductor on CUDA (the first call of every shape takes seconds); eager, with all scores in memory, elsewhere.
    torch has no backward on a CPU and raises NotImplementedError there when an input requires a gradient.
    """
    if block_mask is None:
        block_mask = flex_tree_mask(subtree_end, depth=depth, window=window)
    attend: Any = _compiled(flex_attention) if q.is_cuda else flex_attention
    out: Tensor = attend(
        q[None],
        k[None],
        v[None],
        score_mod=None if softcap is None else _capped(softcap),
        block_mask=block_mask,
        scale=scale,
        enable_gqa=q.shape[0] != k.shape[0],
    )[0]
    return out


@cache
def _capped(softcap: float) -> Callable[..., Tensor]:
    def capped(score: Tensor, batch: Tensor, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return softcap * torch.tanh(score / softcap)

    return capped


@cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, dynamic=False)
