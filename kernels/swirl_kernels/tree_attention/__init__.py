"""Causal attention over a forest packed in preorder.

Legend: T packed tokens (keys), Q queries (T unless query_index says otherwise), D head dimension of queries and keys, V of
values, Hq query heads, Hkv key heads.

Key j is visible to query i iff `j <= i < subtree_end[j]`. A prompt of two tokens, two teeth (3 4 and 5 6) that hang at
its second state and the trunk's own continuation (7 8):

                                        keys   0 1 2 3 4 5 6 7 8
    0 1 2 ─┬─ 3 4      subtree_end[keys] ->    9 9 9 5 5 7 7 9 9
           ├─ 5 6                    query 0   x
           └─ 7 8                          1   x x
                                           2   x x x
                                           3   x x x x
                                           4   x x x x x
                                           5   x x x . . x
                                           6   x x x . . x x
                                           7   x x x . . . . x
                                           8   x x x . . . . x x

Plain causal attention is `subtree_end = T`; packed documents have the end of their document; both are trees without
branches.

Left out: dropout, double backward, gradients through vmap.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from swirl_kernels.backend import choose_backend
from swirl_kernels.tree_attention.operator import attend
from swirl_kernels.tree_attention.plan import TreePlan, tree_plan

__all__ = ["TreePlan", "naive_tree_attention", "tree_attention", "tree_plan"]


def tree_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    subtree_end: Tensor | None,
    *,
    depth: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    window: int | None = None,
    chunk: int | None = None,
    sinks: Tensor | float | None = None,
    query_index: Tensor | None = None,
    plan: TreePlan | None = None,
) -> Tensor:
    """softmax(mask(cap(scale q k^T))) v with the mask of a forest in preorder, at the cost of only the visible pairs.

    q: [Hq, Q, D]; k: [Hkv, T, D]; v: [Hkv, T, V], Hq a multiple of Hkv (query head h reads key head h // (Hq / Hkv)); one
    floating dtype, any strides. Under autocast all three are cast to the autocast dtype, as scaled_dot_product_attention
    does. V need not be D (DeepSeek V3: 128 and 192).
    subtree_end: integer [T], first preorder index after each token's subtree. None is allowed when plan is given.
    depth: integer [T], position on the path from the root; only window and chunk read it. None: the number of ancestors.
    scale: positive factor on the scores, default D ** -0.5.
    softcap: scores become softcap * tanh(scores / softcap) before the mask (Gemma 2: 50).
    window: key j is visible only when depth[i] - depth[j] < window; None: no window.
    chunk: key j is visible only when depth[i] // chunk == depth[j] // chunk (Llama 4: 8192); None: no chunks. Not with a window.
    sinks: floating [Hq] or one number for all heads: a logit that joins the sum of the softmax and no output, as a key with
    a value of zeros would (gpt-oss). It is neither scaled nor capped. None: no sinks. -inf: as without.
    query_index: integer [Q], preorder index of each query, when only some tokens are queries (an engine whose other
    tokens lie in its cache). None: Q = T.
    plan: `tree_plan(subtree_end, depth=…, window=…, chunk=…, query_index=…)`, to be made once and passed to every layer; depth
    and query_index are then read from it.

    Returns [Hq, Q, V] in q's dtype, with gradients for q, k, v and sinks. Statistics are fp32 (float64 for float64 inputs).
    Memory is O(T); nothing of size Q x T exists. Branches do not touch each other: a NaN in one leaves its siblings and
    other trees alone.

    Raises ValueError for wrong shapes, dtypes or devices, for a subtree_end that is no preorder, and for a plan of
    another packing, window or chunk.

    How: PyTorch's backend makes one call for every segment of the tree against its own keys (causal) and one for
    everything below it (no mask), and merges the parts of a query by their log-sum-exp. Triton's is one loop with an
    online softmax for every block of queries, from its own tokens up to the root and past branches that none of them
    sees: few masked tiles, then whole ones without a mask; dK and dV take for every block of keys the one stretch of
    queries that sees some of it. Both run backward from the lse and out of all keys: `p = exp(score - lse)`,
    `delta = sum(dout * out)` (FlashAttention-2, arXiv 2307.08691, section 3.1).
    """
    q, k, v = _one_dtype(q, k, v)
    plan = _checked_plan(q, k, v, subtree_end, depth, window, chunk, query_index, plan)
    if softcap is not None and not 0 < softcap < math.inf:
        raise ValueError(f"softcap is {softcap}; use a positive finite number, or None for no cap")
    if not q.shape[-1]:
        raise ValueError(f"q has shape {tuple(q.shape)}: a head dimension of 0 has no scores; use at least 1")
    if scale is not None and not 0 < scale < math.inf:
        raise ValueError(f"scale is {scale}; use a positive finite number, or None for {q.shape[-1]} ** -0.5")
    scale = 1.0 / math.sqrt(q.shape[-1]) if scale is None else float(scale)
    sinks = _checked_sinks(sinks, q)
    softcap = None if softcap is None else float(softcap)  # an int would be a compilation of its own
    options = (plan.handle, scale, softcap, choose_backend("tree_attention", q))
    if plan.order is None:
        return attend(q, k, v, sinks, *options)[0]
    out = attend(q.index_select(1, plan.order), k, v, sinks, *options)[0]
    return torch.empty_like(out).index_copy(1, plan.order, out)


def naive_tree_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    subtree_end: Tensor,
    *,
    depth: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    window: int | None = None,
    chunk: int | None = None,
    sinks: Tensor | float | None = None,
    query_index: Tensor | None = None,
) -> Tensor:
    """The same with a dense [Q, T] mask and a plain softmax in the inputs' dtype; the reference to check by eye."""
    num_heads, num_keys = q.shape[0], k.shape[1]
    j = torch.arange(num_keys, device=q.device)
    i = j if query_index is None else query_index.long()
    end = subtree_end.long()
    visible = (j[None, :] <= i[:, None]) & (i[:, None] < end[None, :])
    if depth is None:
        depth = ((j[None, :] < j[:, None]) & (j[:, None] < end[None, :])).sum(1)
    if window is not None:
        visible &= depth[i][:, None] - depth[None, :] < window
    if chunk is not None:
        visible &= depth[i][:, None] // chunk == depth[None, :] // chunk
    group = num_heads // k.shape[0]
    k, v = k.repeat_interleave(group, 0), v.repeat_interleave(group, 0)
    scores = q @ k.transpose(1, 2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~visible, -math.inf)
    if sinks is not None:
        column = torch.as_tensor(sinks, dtype=q.dtype, device=q.device).expand(num_heads)
        scores = torch.cat([scores, column[:, None, None].expand(-1, len(i), 1)], -1)
    return scores.softmax(-1)[..., :num_keys] @ v


def _checked_sinks(sinks: Tensor | float | None, q: Tensor) -> Tensor | None:
    """[Hq] on q's device."""
    if sinks is None:
        return None
    if not isinstance(sinks, Tensor):
        if not sinks < math.inf:
            raise ValueError(f"sinks is {sinks}; use a finite number, or None for no sinks")
        return torch.full(q.shape[:1], float(sinks), device=q.device)
    if sinks.shape != q.shape[:1] or not sinks.is_floating_point() or sinks.device != q.device:
        raise ValueError(
            f"sinks have shape {tuple(sinks.shape)} and dtype {sinks.dtype} on {sinks.device}; give one floating number a query "
            f"head, [{q.shape[0]}], on {q.device}"
        )
    return sinks


def _one_dtype(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    device = q.device.type
    if torch.is_autocast_enabled(device) and q.is_floating_point() and q.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
        return q.to(dtype), k.to(dtype), v.to(dtype)
    if not q.is_floating_point() or q.dtype != k.dtype or q.dtype != v.dtype:
        raise ValueError(f"q, k, v have dtypes {q.dtype}, {k.dtype}, {v.dtype}; cast them to one floating dtype")
    return q, k, v


def _checked_plan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    subtree_end: Tensor | None,
    depth: Tensor | None,
    window: int | None,
    chunk: int | None,
    query_index: Tensor | None,
    plan: TreePlan | None,
) -> TreePlan:
    if q.dim() != 3 or k.dim() != 3 or k.shape[:2] != v.shape[:2] or v.dim() != 3 or q.shape[2] != k.shape[2]:
        raise ValueError(
            f"q, k, v have shapes {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}; give [Hq, Q, D], [Hkv, T, D], "
            "[Hkv, T, V] (no batch dimension: pack the batch into one row)"
        )
    if q.shape[0] == 0 or k.shape[0] == 0 or q.shape[0] % k.shape[0]:
        raise ValueError(
            f"{q.shape[0]} query heads over {k.shape[0]} key heads; the first must be a multiple of the second"
        )
    if plan is None:
        if subtree_end is None:
            raise ValueError(
                "subtree_end is None and no plan is given; one of the two must say what the tree looks like"
            )
        plan = tree_plan(subtree_end, depth=depth, window=window, chunk=chunk, query_index=query_index)
    else:
        if depth is not None or query_index is not None:
            raise ValueError("depth and query_index belong to tree_plan(…) when plan= is given; leave them out here")
        if plan.window != window:
            raise ValueError(f"window is {window}, but the plan was made for {plan.window}; make one plan per window")
        if plan.chunk != chunk:
            raise ValueError(f"chunk is {chunk}, but the plan was made for {plan.chunk}; make one plan per chunk")
        if subtree_end is not None and (
            subtree_end.shape != plan.subtree_end.shape
            # Comparing the values on a GPU would make every layer wait for the device.
            or (
                subtree_end.device.type == "cpu"
                and not torch.compiler.is_compiling()
                and not torch.equal(subtree_end.long(), plan.subtree_end.long())
            )
        ):
            raise ValueError("the plan was made for another subtree_end; call tree_plan once per packing")
    return plan
