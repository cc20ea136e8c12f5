"""tree_attention in Triton: which tiles, the calls, autograd.

Legend: T packed tokens (keys), Q queries, D head dimension (V of values), Hq query heads, Hkv key heads, M queries by N keys a tile.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from swirl_kernels.tree_attention import kernels
from swirl_kernels.tree_attention.blocks import key_blocks, query_blocks, tree_of
from swirl_kernels.tree_attention.plan import TreePlan, token_major

EDGE = 32  # queries of a masked tile of dK/dV: 64 spill inside it (D = 256 on sm_90: 168 B, 37 loads, 28 stores)

SHARES_BYTES = 256 << 20  # of what the query heads of a key head give dK and dV, before they are added up
SUMMED = 16  # tokens a program of sum_parts


@dataclass(frozen=True)
class Tiles:
    """M queries by N keys, and how the kernel over them is compiled."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


def configuration(kernel: str, block_d: int, dtype: torch.dtype, capability: tuple[int, int]) -> Tiles:
    """Tiles of `kernel` ("forward", "backward_q", "backward_kv") for head dimensions padded to at most block_d.

    backward_kv_few: where wider blocks of keys would be too few programs. forward_narrow: values padded to less than keys.
    A plain function of these, so that the bits of a result do not depend on a timing. Chosen for what compiles without spills, on 9.0
    without products that wait for each other (`python -m swirl_kernels.aot`), within 227 KB of shared memory on compute capability 9.0
    and 10.0 and within 99 KB on all others. 64 keys in the walk rather than 128: runs of ancestors are short, and a tile is cut where
    one begins.
    """
    size, plain = 64 if block_d <= 64 else block_d, kernel.removesuffix("_few").removesuffix("_narrow")
    if dtype == torch.float32:
        return _FP32[plain, size]
    if capability not in ((9, 0), (10, 0)):
        return _SMALL[plain, size]
    special = _HOPPER if capability == (9, 0) else _BLACKWELL
    return special.get((kernel, size)) or special.get((plain, size)) or _LARGE[plain, size]


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
_HOPPER = {
    ("forward", 128): Tiles(64, 64, 4, 2),  # two programs a processor, as for dQ
    ("forward", 256): Tiles(64, 32, 4, 2),
    ("forward_narrow", 256): Tiles(128, 64, 8, 1),  # with two stages 3.6.0 serialises all products
    ("backward_q", 128): Tiles(64, 64, 4, 2),
    ("backward_q", 256): Tiles(64, 32, 4, 2),
    ("backward_kv_few", 64): Tiles(64, 64, 4, 2),
    ("backward_kv_few", 128): Tiles(64, 64, 4, 2),
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
    ("backward_kv", 128): Tiles(16, 32, 8, 1),
    ("backward_kv", 256): Tiles(16, 16, 8, 1),
}


def forward(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, plan: TreePlan, scale: float, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """q [Hq, Q, D] in ascending preorder, k [Hkv, T, D], v [Hkv, T, V], sinks [Hq] or None; everything checked by the caller.
    Returns [Hq, Q, V] and the log-sum-exp [Hq, Q] in units of log 2.

    Raises ValueError for D or V > 256.
    """
    if (dim := max(q.shape[2], v.shape[2])) > 256:
        raise ValueError(
            f"the head dimension is {dim}, Triton's kernels take up to 256; set SWIRL_KERNELS_BACKEND=torch"
        )
    q, k, v = (_rows_contiguous(x) for x in (q, k, v))
    with torch.cuda.device_of(q):
        return _run_forward(q, k, v, sinks, plan, scale, softcap)


def backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    out: Tensor,
    lse: Tensor,
    plan: TreePlan,
    scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and sinks, that of absent sinks [0]."""
    dout, q, k, v = (_rows_contiguous(x) for x in (dout, q, k, v))
    with torch.cuda.device_of(q):
        dq, dk, dv, delta = _run_backward(dout, q, k, v, out, lse, plan, scale, softcap)
        dsinks = q.new_empty(0) if sinks is None else _sink_gradient(sinks, lse, delta)
    return dq, dk, dv, dsinks


def _rows_contiguous(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _sink_gradient(sinks: Tensor, lse: Tensor, delta: Tensor) -> Tensor:
    """[Hq]: -sum(p delta) over the queries, p = exp(sink - lse)."""
    p = torch.exp2(sinks.float()[:, None] * math.log2(math.e) - lse)
    return -(p * delta).sum(1).to(sinks.dtype)


def _run_forward(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, plan: TreePlan, scale: float, softcap: float | None
) -> tuple[Tensor, Tensor]:
    heads, num_queries, _ = q.shape
    out = token_major(q, v.shape[2])
    lse = torch.empty(heads, num_queries, dtype=torch.float32, device=q.device)
    if num_queries == 0:
        return out, lse
    tree, (tiles, dims) = tree_of(plan), _tiles("forward", q, v)
    if dims[3] < dims[1]:
        tiles, _ = _tiles("forward_narrow", q, v)
    counts = query_blocks(plan, tiles.block_m, tiles.block_n)
    logits = None if sinks is None else sinks.float().contiguous()
    kernels.forward[(len(counts), heads)](
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
    """dq, dk, dv in the dtypes of q, k, v; delta [Hq, Q]."""
    (heads, num_queries, _), key_heads = q.shape, k.shape[0]
    dq, dk, dv = (token_major(x, x.shape[2]) for x in (q, k, v))
    delta = torch.empty_like(lse)
    if num_queries == 0:
        return dq, dk.zero_(), dv.zero_(), delta
    tree, (tiles, dims) = tree_of(plan), _tiles("backward_q", q, v)
    counts = query_blocks(plan, tiles.block_m, tiles.block_n)
    kernels.backward_q[(len(counts), heads)](
        dout, q, k, v, out, lse, delta, dq,
        counts, tree.end, tree.parent, tree.run, tree.depth, tree.position, tree.query_depth,
        *_strides(dout, q, k, v, out, dq), num_queries, heads // key_heads, scale, softcap, tree.window,
        *dims, tiles.block_m, tiles.block_n, num_warps=tiles.num_warps, num_stages=tiles.num_stages,
    )  # fmt: skip
    _run_backward_kv(dout, q, k, v, lse, delta, dk, dv, plan, scale, softcap)
    return dq, dk, dv, delta


def _run_backward_kv(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    delta: Tensor,
    dk: Tensor,
    dv: Tensor,
    plan: TreePlan,
    scale: float,
    softcap: float | None,
) -> None:
    """Fills dk and dv, by way of fp32 shares where a key head has several query heads."""
    (key_heads, num_keys, _), group = k.shape, q.shape[0] // k.shape[0]
    parts = shares_of_a_key_head(group, key_heads * num_keys * (k.shape[2] + v.shape[2]) * 4)
    tiles, dims = _tiles("backward_kv", q, v)
    if triton.cdiv(num_keys, tiles.block_n) * key_heads * parts < 4 * _processors(q):
        tiles, dims = _tiles("backward_kv_few", q, v)
    edge_m = min(EDGE, tiles.block_m)
    ranges, shallowest = key_blocks(plan, tiles.block_m, edge_m, tiles.block_n)
    tree, shares = tree_of(plan), [dk, dv]
    if group > 1:
        shares = [x.new_empty(key_heads * parts, num_keys, x.shape[2], dtype=torch.float32) for x in (dk, dv)]
    for turn in range(group // parts):
        kernels.backward_kv[(len(ranges), key_heads * parts)](
            dout, q, k, v, lse, delta, *shares,
            ranges, shallowest, tree.end, tree.depth, tree.position, tree.query_depth,
            *_strides(dout, q, k, v, *shares), plan.num_queries, num_keys, parts, group // parts, turn,
            1.0 if group > 1 else scale, scale, softcap, tree.window, turn > 0, *dims, tiles.block_m, edge_m, tiles.block_n,
            num_warps=tiles.num_warps, num_stages=tiles.num_stages,
        )  # fmt: skip
    for share, total, factor in zip(shares, (dk, dv), (scale, 1.0), strict=True) if group > 1 else ():
        width = total.shape[2]
        kernels.sum_parts[(triton.cdiv(num_keys, SUMMED), key_heads)](
            share, total, *_strides(share, total), parts, num_keys, factor, width, triton.next_power_of_2(width), SUMMED
        )


def shares_of_a_key_head(group: int, share_bytes: int) -> int:
    """Among how many shares of dK and dV the `group` query heads of a key head are dealt, a divisor of their number. share_bytes: of one
    share of every key head.

    One a query head, where they fit into SHARES_BYTES. A program per key head would be too few, the longest of which are several times
    the mean: a comb of 8,040 tokens and 2 key heads has 126 on an H200's 132 processors, 3.5 times.
    """
    return max(n for n in range(1, group + 1) if group % n == 0 and (n == 1 or n * share_bytes <= SHARES_BYTES))


def _processors(x: Tensor) -> int:
    """Streaming multiprocessors; those of an H100 for the interpreter."""
    return torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 132


def _strides(*tensors: Tensor) -> list[int]:
    """Of heads and rows, one tensor after the other."""
    return [x.stride(i) for x in tensors for i in (0, 1)]


def _tiles(kernel: str, q: Tensor, v: Tensor) -> tuple[Tiles, tuple[int, int, int, int]]:
    """And D, V, each followed by what it is padded to."""
    dims = [n for x in (q, v) for n in (x.shape[2], max(16, triton.next_power_of_2(x.shape[2])))]
    # The interpreter takes the tiles of an H100.
    capability = torch.cuda.get_device_capability(q.device) if q.is_cuda else (9, 0)
    return configuration(kernel, max(dims), q.dtype, capability), (dims[0], dims[1], dims[2], dims[3])
