"""Which tiles the Triton kernels of tree_attention visit, made on the device from a TreePlan without waiting for it.

Legend: T packed tokens (keys), Q queries, M queries of a block, E queries of a masked tile of dK/dV, N keys of a tile.

Forward and dQ, a block of queries. Keys in front of the block that any of its queries sees are ancestors of the block's
first query: j < first <= i < end[j]. So the tiles are found by walking up the tree, from the last query to the root: behind
a tile that starts at `low`, the next key anyone sees is parent[low] or, while queries lie there, the last query before low.
The walk jumps over dead branches of any size and a tile starts where it lands, so that nothing is visited in vain:

    trunk 0-4, a tooth 5-7, the trunk goes on 8-11, a tooth 12-13, queries 14-17, tiles of 4:

        0 1 2 3 4 | 5 6 7 | 8 9 10 11 | 12 13 | 14 15 16 17
        └┘└─────┘           └───────┘           └─────────┘

Along the walk the ends of subtrees only grow and the depths only fall. So first come tiles that some queries see and some do
not (masked, the block's own tokens among them), then tiles that all queries see (full; only their length varies: they are cut
where a run of ancestors begins), then tiles that the window cuts (masked again). The walk is done once per packing to count
the three; the kernels' loops then have a known number of turns, which is what lets Triton prefetch.

dK/dV, a block of keys. Queries that see any of its keys are one stretch in preorder, from the block's first token to the
largest end in it, without gaps. Those from its last token to its smallest end see all of it. A window that cuts breaks this
order: then every tile is masked, and skipped after one load if its shallowest query is too deep.

Memory O(T). Cost of the lists: one sort of T integers and per query block as many steps of three loads as it has tiles.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from swirl_kernels.tree_attention.plan import TreePlan, count_ancestors, parents

FAR = tl.constexpr(2**31 - 1)  # beyond every preorder index and every depth


@dataclass(frozen=True)
class Tree:
    """A TreePlan as the kernels read it: int32, on the device, the same for every configuration."""

    end: Tensor  # [T]
    parent: Tensor  # [T] -1 for roots
    run: Tensor  # [T] first token of the longest stretch up to this one in which each is the parent of the next
    depth: Tensor | None  # [T], None when no window cuts
    position: Tensor | None  # [Q], None when every token is a query
    query_depth: Tensor | None  # [Q] from which the window counts: the query's own, or that of its chunk's start
    window: int


def tree_of(plan: TreePlan) -> Tree:
    if "tree" not in plan.derived:
        parent = parents(count_ancestors(plan.subtree_end))
        index = torch.arange(plan.num_keys, device=parent.device)
        starts = torch.where(parent == index - 1, 0, index)
        run = starts.cummax(0).values if plan.num_keys else starts
        sparse = plan.sparse
        plan.derived["tree"] = Tree(
            end=plan.subtree_end.int(),
            parent=parent.int(),
            run=run.int(),
            depth=plan.depth.int() if plan.window_cuts else None,
            position=plan.position.int() if sparse else None,
            query_depth=plan.origin[plan.position].int() if plan.window_cuts else None,
            window=plan.span if plan.span is not None and plan.window_cuts else 0,
        )
    tree: Tree = plan.derived["tree"]
    return tree


def query_blocks(plan: TreePlan, block_m: int, block_n: int) -> Tensor:
    """int32 [ceil(Q / M), 3]: masked, full and again masked tiles of N keys on the walk up from each block of M queries."""
    key = ("query blocks", block_m, block_n)
    if key not in plan.derived:
        tree = tree_of(plan)
        blocks = triton.cdiv(plan.num_queries, block_m)
        counts = torch.empty(blocks, 3, dtype=torch.int32, device=tree.end.device)
        count_tiles[(blocks,)](
            counts,
            tree.end,
            tree.parent,
            tree.run,
            tree.depth,
            tree.position,
            tree.query_depth,
            plan.num_queries,
            tree.window,
            BLOCK_M=block_m,
            BLOCK_N=block_n,
            num_warps=1,
        )
        plan.derived[key] = counts
    counts_: Tensor = plan.derived[key]
    return counts_


def key_blocks(plan: TreePlan, block_m: int, edge_m: int, block_n: int) -> tuple[Tensor, Tensor | None]:
    """The tiles of queries that each block of N keys meets, and each masked tile's smallest depth where a window cuts.

    int32 [ceil(T / N), 4]: first row of the first tile, masked tiles of E queries, full ones of M queries behind them,
    masked ones of E queries behind those. int32 [ceil(Q / E)] or None.
    """
    key = ("key blocks", block_m, edge_m, block_n)
    if key not in plan.derived:
        end, num_keys, num_queries = plan.subtree_end, plan.num_keys, plan.num_queries
        blocks = triton.cdiv(num_keys, block_n)
        beyond = blocks * block_n - num_keys
        largest = F.pad(end, (0, beyond), value=0).view(blocks, block_n).amax(1)
        smallest = F.pad(end, (0, beyond), value=FAR.value).view(blocks, block_n).amin(1)
        first_key = torch.arange(blocks, device=end.device) * block_n
        last_key = (first_key + block_n - 1).clamp(max=num_keys - 1)
        edges = torch.stack([first_key, last_key, smallest, largest])
        begin, full_begin, full_end, stop = torch.searchsorted(plan.position, edges) if plan.sparse else edges
        shallowest = None
        if plan.window_cuts:
            begin = begin // edge_m * edge_m  # the tiles whose depths are known
            near, full = -((begin - stop) // edge_m), torch.zeros_like(begin)
            depth = F.pad(plan.origin[plan.position], (0, -num_queries % edge_m), value=FAR.value)
            shallowest = depth.view(-1, edge_m).amin(1).int()
        else:
            near = -((begin - full_begin) // edge_m)
            full = (full_end - begin - near * edge_m).clamp(min=0) // block_m
        far = -((begin + near * edge_m + full * block_m - stop) // edge_m).clamp(max=0)
        plan.derived[key] = torch.stack([begin, near, full, far], 1).int(), shallowest
    ranges: tuple[Tensor, Tensor | None] = plan.derived[key]
    return ranges


@triton.jit
def block_positions(position, first_row, num_queries, BLOCK_M: tl.constexpr):
    """Preorder indices of a block's queries [M]; rows beyond the last query lie beyond every key."""
    rows = first_row + tl.arange(0, BLOCK_M)
    if position is not None:
        return tl.load(position + rows, mask=rows < num_queries, other=FAR)
    return rows


@triton.jit
def first_and_last(position, first_row, num_queries, BLOCK_M: tl.constexpr):
    """Preorder indices of a block's first and last query."""
    last_row = tl.minimum(first_row + BLOCK_M, num_queries) - 1
    if position is not None:
        return tl.load(position + first_row), tl.load(position + last_row)
    return first_row, last_row


@triton.jit
def next_key(low, parent, position, at_m, first):
    """The last key before `low` that a query of the block sees, -1 if there is none."""
    above = tl.load(parent + low)
    if position is not None:
        return tl.maximum(above, tl.max(tl.where(at_m < low, at_m, -1), 0))
    return tl.where(low > first, low - 1, above)


@triton.jit
def run_tile(high, run, BLOCK_N: tl.constexpr):
    """Where the tile begins that ends with `high` and holds nothing but ancestors of it."""
    return tl.maximum(high - BLOCK_N + 1, tl.load(run + tl.maximum(high, 0)))


@triton.jit(do_not_specialize=["num_queries", "window"])
def count_tiles(
    counts,
    end,
    parent,
    run,
    depth,
    position,
    query_depth,
    num_queries,
    window,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Walks up from one block of queries and counts its masked, full and again masked tiles."""
    block = tl.program_id(0)
    first_row = block * BLOCK_M
    at_m = block_positions(position, first_row, num_queries, BLOCK_M)
    first, high = first_and_last(position, first_row, num_queries, BLOCK_M)
    last = high
    # Deepest key that no query sees any more, deepest key that not all see.
    unseen = -1
    cut = -1
    if depth is not None:
        rows = first_row + tl.arange(0, BLOCK_M)
        unseen = tl.min(tl.load(query_depth + rows, mask=rows < num_queries, other=FAR), 0) - window
        cut = tl.max(tl.load(query_depth + rows, mask=rows < num_queries, other=-FAR), 0) - window
    near = 0
    full = 0
    far = 0
    walking = high >= 0
    while walking:
        near += 1
        high = next_key(tl.maximum(high - BLOCK_N + 1, 0), parent, position, at_m, first)
        here = tl.maximum(high, 0)
        walking = (high >= first) | ((high >= 0) & (tl.load(end + here) <= last))
        if depth is not None:
            walking = walking & ((high >= first) | (tl.load(depth + here) > unseen))
    low = run_tile(high, run, BLOCK_N)
    walking = high >= 0
    if depth is not None:
        walking = walking & (tl.load(depth + tl.maximum(low, 0)) > cut)
    while walking:
        full += 1
        high = tl.load(parent + low)
        low = run_tile(high, run, BLOCK_N)
        walking = high >= 0
        if depth is not None:
            walking = walking & (tl.load(depth + tl.maximum(low, 0)) > cut)
    if depth is not None:
        while (high >= 0) & (tl.load(depth + tl.maximum(high, 0)) > unseen):
            far += 1
            high = tl.load(parent + tl.maximum(high - BLOCK_N + 1, 0))
    tl.store(counts + 3 * block, near)
    tl.store(counts + 3 * block + 1, full)
    tl.store(counts + 3 * block + 2, far)
