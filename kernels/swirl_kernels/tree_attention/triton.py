"""tree_attention in Triton: which tiles, the calls, autograd.

Legend: T packed tokens (keys), Q queries, D head dimension (V of values), Hq query heads, Hkv key heads, M queries by N keys a tile.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from swirl_kernels.tree_attention.blocks import key_blocks, query_blocks, tree_of
from swirl_kernels.tree_attention.kernels import backward_kv, backward_q, forward
from swirl_kernels.tree_attention.plan import TreePlan

EDGE = 32  # queries of a masked tile of dK/dV: 64 spill inside it (D = 256 on sm_90: 168 B, 37 loads, 28 stores)


@dataclass(frozen=True)
class Tiles:
    """M queries by N keys, and how the kernel over them is compiled."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


def configuration(kernel: str, block_d: int, dtype: torch.dtype, capability: tuple[int, int]) -> Tiles:
    """Tiles of `kernel` ("forward", "backward_q", "backward_kv") for head dimensions padded to at most block_d.

    A plain function of these, so that the bits of a result do not depend on a timing. Chosen for what compiles without
    spills (`python -m swirl_kernels.aot`) within 227 KB of shared memory on compute capability 9.0 and 10.0 and within
    99 KB on all others. 64 keys in the walk rather than 128: runs of ancestors are short, and a tile is cut where one
    begins.
    """
    size = 64 if block_d <= 64 else block_d
    if dtype == torch.float32:
        return _FP32[kernel, size]
    if capability not in ((9, 0), (10, 0)):
        return _SMALL[kernel, size]
    return _BLACKWELL.get((kernel, size), _LARGE[kernel, size]) if capability == (10, 0) else _LARGE[kernel, size]


_LARGE = {
    ("forward", 64): Tiles(128, 64, 8, 3),
    ("forward", 128): Tiles(128, 64, 8, 3),
    ("forward", 256): Tiles(128, 32, 8, 2),
    ("backward_q", 64): Tiles(128, 64, 8, 3),
    ("backward_q", 128): Tiles(128, 64, 8, 2),
    ("backward_q", 256): Tiles(128, 32, 8, 2),
    ("backward_kv", 64): Tiles(64, 128, 8, 2),
    ("backward_kv", 128): Tiles(64, 128, 8, 2),
    ("backward_kv", 256): Tiles(64, 64, 8, 2),
}
_BLACKWELL = {("backward_kv", 128): Tiles(64, 64, 8, 2), ("backward_kv", 256): Tiles(64, 64, 8, 1)}
_SMALL = {
    ("forward", 64): Tiles(128, 64, 8, 3),
    ("forward", 128): Tiles(64, 64, 4, 2),
    ("forward", 256): Tiles(64, 32, 8, 2),
    ("backward_q", 64): Tiles(64, 32, 4, 3),
    ("backward_q", 128): Tiles(64, 32, 4, 2),
    ("backward_q", 256): Tiles(64, 16, 8, 2),
    ("backward_kv", 64): Tiles(32, 128, 8, 2),
    ("backward_kv", 128): Tiles(32, 64, 4, 2),
    ("backward_kv", 256): Tiles(32, 32, 8, 2),
}
_FP32 = {  # products on CUDA cores: operands go through registers
    ("forward", 64): Tiles(32, 32, 4, 1),
    ("forward", 128): Tiles(16, 32, 8, 1),
    ("forward", 256): Tiles(16, 16, 8, 1),
    ("backward_q", 64): Tiles(32, 32, 8, 1),
    ("backward_q", 128): Tiles(16, 16, 8, 1),
    ("backward_q", 256): Tiles(16, 16, 8, 1),
    ("backward_kv", 64): Tiles(32, 32, 8, 1),
    ("backward_kv", 128): Tiles(32, 32, 8, 1),
    ("backward_kv", 256): Tiles(16, 16, 8, 1),
}


def tree_attention_triton(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, plan: TreePlan, scale: float, softcap: float | None
) -> Tensor:
    """q [Hq, Q, D] in ascending preorder, k [Hkv, T, D], v [Hkv, T, V], sinks [Hq] or None; everything checked by the caller.
    Returns [Hq, Q, V].

    Raises ValueError for D or V > 256.
    """
    if (dim := max(q.shape[2], v.shape[2])) > 256:
        raise ValueError(
            f"the head dimension is {dim}, Triton's kernels take up to 256; set SWIRL_KERNELS_BACKEND=torch"
        )
    cap = None if softcap is None else float(softcap)  # an int would be a compilation of its own
    out: Tensor = _TreeAttention.apply(q, k, v, sinks, plan, scale, cap)
    return out


class _TreeAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, sinks, plan, scale, softcap):  # type: ignore[no-untyped-def]
        q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
        ctx.plan, ctx.scale, ctx.softcap = plan, scale, softcap
        with torch.cuda.device_of(q):
            out, lse = _run_forward(q, k, v, sinks, plan, scale, softcap)
        ctx.save_for_backward(q, k, v, sinks, out, lse)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):  # type: ignore[no-untyped-def]
        q, k, v, sinks, out, lse = ctx.saved_tensors
        dout = dout if dout.stride(-1) == 1 else dout.contiguous()
        with torch.cuda.device_of(q):
            dq, dk, dv, delta = _run_backward(dout, q, k, v, out, lse, ctx.plan, ctx.scale, ctx.softcap)
        dsinks = _sink_gradient(sinks, lse, delta) if ctx.needs_input_grad[3] else None
        return dq, dk, dv, dsinks, None, None, None


def _sink_gradient(sinks: Tensor, lse: Tensor, delta: Tensor) -> Tensor:
    """[Hq]: -sum(p delta) over the queries, p = exp(sink - lse)."""
    p = torch.exp2(sinks.float()[:, None] * math.log2(math.e) - lse)
    return -(p * delta).sum(1).to(sinks.dtype)


def _run_forward(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, plan: TreePlan, scale: float, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """out [Hq, Q, V] in q's dtype and (where V = D) layout, lse [Hq, Q] in units of log 2."""
    heads, num_queries, _ = q.shape
    same = q.shape[2] == v.shape[2]
    out = torch.empty_like(q) if same else q.new_empty(num_queries, heads, v.shape[2]).transpose(0, 1)
    lse = torch.empty(heads, num_queries, dtype=torch.float32, device=q.device)
    if num_queries == 0:
        return out, lse
    tree, (tiles, dims) = tree_of(plan), _tiles("forward", q, v)
    counts = query_blocks(plan, tiles.block_m, tiles.block_n)
    logits = None if sinks is None else sinks.float().contiguous()
    forward[(len(counts), heads)](
        q, k, v, logits, out, lse, counts, tree.end, tree.parent, tree.run, tree.depth, tree.position, tree.query_depth,
        *_strides(q, k, v, out), num_queries, heads // k.shape[0], scale, softcap, tree.window,
        *dims, tiles.block_m, tiles.block_n, num_warps=tiles.num_warps, num_stages=tiles.num_stages,
    )  # fmt: skip
    return out, lse


def _run_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    plan: TreePlan,
    scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dq, dk, dv in the dtypes and layouts of q, k, v; delta [Hq, Q]."""
    (heads, num_queries, _), (key_heads, num_keys, _) = q.shape, k.shape
    dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
    delta = torch.empty_like(lse)
    if num_queries == 0:
        return dq, dk.zero_(), dv.zero_(), delta
    group = heads // key_heads
    tree, (tiles, dims) = tree_of(plan), _tiles("backward_q", q, v)
    counts = query_blocks(plan, tiles.block_m, tiles.block_n)
    backward_q[(len(counts), heads)](
        dout, q, k, v, out, lse, delta, dq,
        counts, tree.end, tree.parent, tree.run, tree.depth, tree.position, tree.query_depth,
        *_strides(dout, q, k, v, out, dq), num_queries, group, scale, softcap, tree.window,
        *dims, tiles.block_m, tiles.block_n, num_warps=tiles.num_warps, num_stages=tiles.num_stages,
    )  # fmt: skip
    tiles, dims = _tiles("backward_kv", q, v)
    edge_m = min(EDGE, tiles.block_m)
    ranges, shallowest = key_blocks(plan, tiles.block_m, edge_m, tiles.block_n)
    backward_kv[(len(ranges), key_heads)](
        dout, q, k, v, lse, delta, dk, dv,
        ranges, shallowest, tree.end, tree.depth, tree.position, tree.query_depth,
        *_strides(dout, q, k, v, dk, dv), num_queries, num_keys, group, scale, softcap, tree.window,
        *dims, tiles.block_m, edge_m, tiles.block_n, num_warps=tiles.num_warps, num_stages=tiles.num_stages,
    )  # fmt: skip
    return dq, dk, dv, delta


def _strides(*tensors: Tensor) -> list[int]:
    """Of heads and rows, one tensor after the other."""
    return [x.stride(i) for x in tensors for i in (0, 1)]


def _tiles(kernel: str, q: Tensor, v: Tensor) -> tuple[Tiles, tuple[int, int, int, int]]:
    """And D, V, each followed by what it is padded to."""
    dims = [n for x in (q, v) for n in (x.shape[2], max(16, triton.next_power_of_2(x.shape[2])))]
    # The interpreter takes the tiles of an H100.
    capability = torch.cuda.get_device_capability(q.device) if q.is_cuda else (9, 0)
    return configuration(kernel, max(dims), q.dtype, capability), (dims[0], dims[1], dims[2], dims[3])
