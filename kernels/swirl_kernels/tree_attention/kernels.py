"""The Triton kernels of tree_attention: forward, dQ, dK/dV over the tiles that tree_blocks.py finds.

Legend: D head dimension of queries and keys, V of values (each padded to a power of two), M queries of a block, E queries of a
masked tile of dK/dV, N keys of a tile.

Forward: program (query block, query head) walks up the tree with an online softmax and saves the log-sum-exp of every row.
dQ: the same walk; p = exp(score - lse) again, dscore = p (dp - delta) with delta = sum(dout * out), which it saves.
dK/dV: program (key block, query head) sums over its query tiles; what the query heads of a key head give is added up afterwards.
(FlashAttention-2, arXiv 2307.08691, section 3.1.) An attention sink is part of the log-sum-exp, so that the backward kernels need
not know of it. Nothing is atomic: every output has one writer and a fixed order of summation.

disable_licm: the descriptors of a tile that stays in shared memory (K and V for dK/dV) are one per 16 columns, cheap to compute and
the same in every turn. Moved out of a loop they are kept in registers that the accumulators need, and spill: at D = 256 on sm_90
240 B with up to 31 loads and 13 stores in each masked tile of dK/dV, 184 B for dQ; left inside at most 16 B and none in a tile.

Products accumulate in fp32; fp32 operands are multiplied as fp32, never as TF32. Scores are kept in units of log 2, so that
exp is exp2.

NaN and infinity reach those who see them and nobody else. In a masked tile p is 0 where nothing is seen, but 0 * NaN is NaN:
there the second factor of a product over tokens must be finite. V (for out) and K (for dQ) enter with zeros for what is not,
dout and Q (for dK, dV) with zeros for rows that hold any. Who sees such a row still gets NaN: through its score; for V and
for Q and dout through a NaN added to p. (Where p underflows to 0, a NaN may stop.)
"""

from __future__ import annotations

import triton
import triton.language as tl

from swirl_kernels.tree_attention.blocks import FAR, block_positions, first_and_last, next_key, run_tile

LOWEST = tl.constexpr(-1.7e38)  # below every score, and still finite when subtracted from one
LOG2E = tl.constexpr(1.4426950408889634)
INF = tl.constexpr(float("inf"))


@triton.jit
def _rows(pointer, first, stride, inside, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows [first, first + ROWS) as [ROWS, BLOCK_D]; zeros in rows not inside (None: all are) and beyond HEAD_DIM."""
    at_d = tl.arange(0, BLOCK_D)
    pointers = pointer + (first + tl.arange(0, ROWS)).to(tl.int64)[:, None] * stride + at_d[None, :]
    if inside is not None:
        mask = inside[:, None]
        if HEAD_DIM < BLOCK_D:
            mask = mask & (at_d < HEAD_DIM)[None, :]
        x = tl.load(pointers, mask=mask, other=0.0)
    elif HEAD_DIM < BLOCK_D:
        x = tl.load(pointers, mask=(at_d < HEAD_DIM)[None, :], other=0.0)
    else:
        x = tl.load(pointers)
    return x


@triton.jit
def _put_rows(pointer, x, first, stride, inside, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    at_d = tl.arange(0, BLOCK_D)
    pointers = pointer + (first + tl.arange(0, ROWS)).to(tl.int64)[:, None] * stride + at_d[None, :]
    tl.store(pointers, x.to(pointer.dtype.element_ty), mask=inside[:, None] & (at_d < HEAD_DIM)[None, :])


@triton.jit
def _scores(a, b, scale, softcap):
    """Scores a b^T in units of log 2 and the slope of the soft-cap, fp32.

    tanh(x) = (1 - t) / (1 + t) with t = exp(-2 |x|), which loses less near zero than 1 - 2 / (exp(2 x) + 1).
    """
    s = tl.dot(a, tl.trans(b), input_precision="ieee")
    slope = 1.0
    if softcap is None:
        s = s * (scale * LOG2E)
    else:
        x = s * (scale / softcap)
        t = tl.exp2(tl.abs(x) * (-2.0 * LOG2E))
        tanh = (1.0 - t) / (1.0 + t)
        tanh = tl.where(x < 0, -tanh, tanh)
        s = tanh * (softcap * LOG2E)
        slope = 1.0 - tanh * tanh
    return s, slope


@triton.jit
def _finite(x):
    """x with zeros for NaN and infinity."""
    return tl.where(tl.abs(x) < INF, x, 0.0)


@triton.jit
def _poison(x):
    """NaN for every row that holds NaN or infinity, else 0; fp32."""
    return tl.sum((x - x).to(tl.float32), 1)


@triton.jit
def _visible(at_m, at_n, inside, depth_m, end, depth, window):
    """[M, N]: which keys each query sees. at_m: preorder indices of the queries."""
    end_n = tl.load(end + at_n, mask=inside, other=0)
    visible = (at_n[None, :] <= at_m[:, None]) & (at_m[:, None] < end_n[None, :])
    if depth is not None:
        depth_n = tl.load(depth + at_n, mask=inside, other=0)
        visible = visible & (depth_m[:, None] - depth_n[None, :] < window)
    return visible


@triton.jit(do_not_specialize=["num_queries", "group", "window"])
def forward(
    q,
    k,
    v,
    sinks,
    out,
    lse,
    counts,
    end,
    parent,
    run,
    depth,
    position,
    query_depth,
    q_head,
    q_row,
    k_head,
    k_row,
    v_head,
    v_row,
    out_head,
    out_row,
    num_queries,
    group,
    scale,
    softcap,
    window,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    VALUE_PADDED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    block = tl.num_programs(0) - 1 - tl.program_id(0)  # the last blocks have most to read: they go first
    head = tl.program_id(1).to(tl.int64)
    k += head // group * k_head
    v += head // group * v_head
    first_row = block * BLOCK_M
    at_m = block_positions(position, first_row, num_queries, BLOCK_M)
    real = first_row + tl.arange(0, BLOCK_M) < num_queries
    first, high = first_and_last(position, first_row, num_queries, BLOCK_M)
    depth_m = at_m
    if depth is not None:
        depth_m = tl.load(query_depth + first_row + tl.arange(0, BLOCK_M), mask=real, other=0)
    q_tile = _rows(q + head * q_head, first_row, q_row, real, BLOCK_M, HEAD_DIM, BLOCK_D)
    acc = tl.zeros((BLOCK_M, VALUE_PADDED), tl.float32)
    top = tl.full((BLOCK_M,), LOWEST, tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    for part in tl.static_range(1 if depth is None else 2):  # behind the full tiles a window has masked ones again
        for _ in tl.range(tl.load(counts + 3 * block + 2 * part), disable_licm=True):
            low = tl.maximum(high - BLOCK_N + 1, 0)
            at_n = low + tl.arange(0, BLOCK_N)
            inside = at_n <= high
            visible = _visible(at_m, at_n, inside, depth_m, end, depth, window)
            k_tile = _rows(k, low, k_row, inside, BLOCK_N, HEAD_DIM, BLOCK_D)
            v_tile = _rows(v, low, v_row, inside, BLOCK_N, VALUE_DIM, VALUE_PADDED)
            s, _slope = _scores(q_tile, k_tile, scale, softcap)
            s = tl.where(visible, s, -INF)
            new_top = tl.maximum(top, tl.max(s, 1))
            p = tl.exp2(s - new_top[:, None])
            rescale = tl.exp2(top - new_top)
            total = total * rescale + tl.sum(p, 1)
            top = new_top
            p = tl.where(visible, p + _poison(v_tile)[None, :], 0.0)
            acc = tl.dot(p.to(v_tile.dtype), _finite(v_tile), acc * rescale[:, None], input_precision="ieee")
            high = next_key(low, parent, position, at_m, first)
        if part == 0:
            low = run_tile(high, run, BLOCK_N)
            for _ in tl.range(tl.load(counts + 3 * block + 1)):
                inside = tl.arange(0, BLOCK_N) <= high - low
                k_tile = _rows(k, low, k_row, inside, BLOCK_N, HEAD_DIM, BLOCK_D)
                v_tile = _rows(v, low, v_row, inside, BLOCK_N, VALUE_DIM, VALUE_PADDED)
                high = tl.load(parent + low)
                low = run_tile(high, run, BLOCK_N)
                s, _slope = _scores(q_tile, k_tile, scale, softcap)
                s = tl.where(inside[None, :], s, -INF)
                new_top = tl.maximum(top, tl.max(s, 1))
                p = tl.exp2(s - new_top[:, None])
                rescale = tl.exp2(top - new_top)
                total = total * rescale + tl.sum(p, 1)
                top = new_top
                acc = tl.dot(p.to(v_tile.dtype), v_tile, acc * rescale[:, None], input_precision="ieee")
    if (
        sinks is not None
    ):  # one more key, with this score and a value of zeros; here, since the loops have no register left for it
        sink = tl.load(sinks + head) * LOG2E
        new_top = tl.maximum(top, sink)
        rescale = tl.exp2(top - new_top)
        total = total * rescale + tl.exp2(sink - new_top)
        acc *= rescale[:, None]
        top = new_top
    out += head * out_head
    _put_rows(out, acc / total[:, None], first_row, out_row, real, BLOCK_M, VALUE_DIM, VALUE_PADDED)
    rows = first_row + tl.arange(0, BLOCK_M)
    tl.store(lse + head * num_queries + rows, top + tl.log2(total), mask=real)


@triton.jit(do_not_specialize=["num_queries", "group", "window"])
def backward_q(
    dout,
    q,
    k,
    v,
    out,
    lse,
    delta,
    dq,
    counts,
    end,
    parent,
    run,
    depth,
    position,
    query_depth,
    dout_head,
    dout_row,
    q_head,
    q_row,
    k_head,
    k_row,
    v_head,
    v_row,
    out_head,
    out_row,
    dq_head,
    dq_row,
    num_queries,
    group,
    scale,
    softcap,
    window,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    VALUE_PADDED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    k += head // group * k_head
    v += head // group * v_head
    first_row = block * BLOCK_M
    rows = first_row + tl.arange(0, BLOCK_M)
    at_m = block_positions(position, first_row, num_queries, BLOCK_M)
    real = rows < num_queries
    first, high = first_and_last(position, first_row, num_queries, BLOCK_M)
    depth_m = at_m
    if depth is not None:
        depth_m = tl.load(query_depth + rows, mask=real, other=0)
    q_tile = _rows(q + head * q_head, first_row, q_row, real, BLOCK_M, HEAD_DIM, BLOCK_D)
    dout_tile = _rows(dout + head * dout_head, first_row, dout_row, real, BLOCK_M, VALUE_DIM, VALUE_PADDED)
    out_tile = _rows(out + head * out_head, first_row, out_row, real, BLOCK_M, VALUE_DIM, VALUE_PADDED)
    lse_m = tl.load(lse + head * num_queries + rows, mask=real, other=0.0)
    delta_m = tl.sum(out_tile.to(tl.float32) * dout_tile.to(tl.float32), 1)
    delta_m += _poison(q_tile) + _poison(dout_tile) + (lse_m - lse_m)
    tl.store(delta + head * num_queries + rows, delta_m, mask=real)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for part in tl.static_range(1 if depth is None else 2):  # behind the full tiles a window has masked ones again
        for _ in tl.range(tl.load(counts + 3 * block + 2 * part), disable_licm=True):
            low = tl.maximum(high - BLOCK_N + 1, 0)
            at_n = low + tl.arange(0, BLOCK_N)
            inside = at_n <= high
            visible = _visible(at_m, at_n, inside, depth_m, end, depth, window)
            k_tile = _rows(k, low, k_row, inside, BLOCK_N, HEAD_DIM, BLOCK_D)
            v_tile = _rows(v, low, v_row, inside, BLOCK_N, VALUE_DIM, VALUE_PADDED)
            s, slope = _scores(q_tile, k_tile, scale, softcap)
            dp = tl.dot(dout_tile, tl.trans(v_tile), input_precision="ieee")
            ds = tl.exp2(s - lse_m[:, None]) * (dp - delta_m[:, None]) * slope
            ds = tl.where(visible, ds, 0.0).to(k_tile.dtype)
            acc = tl.dot(ds, _finite(k_tile), acc, input_precision="ieee")
            high = next_key(low, parent, position, at_m, first)
        if part == 0:
            low = run_tile(high, run, BLOCK_N)
            for _ in tl.range(tl.load(counts + 3 * block + 1)):
                inside = tl.arange(0, BLOCK_N) <= high - low
                k_tile = _rows(k, low, k_row, inside, BLOCK_N, HEAD_DIM, BLOCK_D)
                v_tile = _rows(v, low, v_row, inside, BLOCK_N, VALUE_DIM, VALUE_PADDED)
                high = tl.load(parent + low)
                low = run_tile(high, run, BLOCK_N)
                s, slope = _scores(q_tile, k_tile, scale, softcap)
                dp = tl.dot(dout_tile, tl.trans(v_tile), input_precision="ieee")
                ds = tl.exp2(s - lse_m[:, None]) * (dp - delta_m[:, None]) * slope
                ds = tl.where(inside[None, :], ds, 0.0).to(k_tile.dtype)
                acc = tl.dot(ds, k_tile, acc, input_precision="ieee")
    _put_rows(dq + head * dq_head, acc * scale, first_row, dq_row, real, BLOCK_M, HEAD_DIM, BLOCK_D)


@triton.jit(do_not_specialize=["num_queries", "num_keys", "parts", "heads", "turn", "window"])
def backward_kv(
    dout,
    q,
    k,
    v,
    lse,
    delta,
    dk,
    dv,
    ranges,
    shallowest,
    end,
    depth,
    position,
    query_depth,
    dout_head,
    dout_row,
    q_head,
    q_row,
    k_head,
    k_row,
    v_head,
    v_row,
    dk_head,
    dk_row,
    dv_head,
    dv_row,
    num_queries,
    num_keys,
    parts,
    heads,
    turn,
    dk_factor,
    scale,
    softcap,
    window,
    ADDED: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    VALUE_PADDED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    EDGE_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One query head's share of dK and dV. The query heads of a key head are dealt to `parts` shares, `heads` to each; the one that
    has its `turn` is added to those before it, unless it is the first (ADDED). dk_factor: the scale, or 1 where it is still to come.

    Scores and their gradients are transposed here, [N, M]: both products sum over queries.
    """
    block = tl.program_id(0)  # the first blocks are read by most queries: they go first
    share = tl.program_id(1).to(tl.int64)
    k += share // parts * k_head
    v += share // parts * v_head
    head = share * heads + turn
    q += head * q_head
    dout += head * dout_head
    lse += head * num_queries
    delta += head * num_queries
    first_key = block * BLOCK_N
    at_n = first_key + tl.arange(0, BLOCK_N)
    real = at_n < num_keys
    k_tile = _rows(k, first_key, k_row, real, BLOCK_N, HEAD_DIM, BLOCK_D)
    v_tile = _rows(v, first_key, v_row, real, BLOCK_N, VALUE_DIM, VALUE_PADDED)
    begin = tl.load(ranges + 4 * block)
    near = tl.load(ranges + 4 * block + 1)
    full = tl.load(ranges + 4 * block + 2)
    far = tl.load(ranges + 4 * block + 3)
    deepest = 0
    if depth is not None:
        deepest = tl.max(tl.load(depth + at_n, mask=real, other=-FAR), 0)
    dk += share * dk_head
    dv += share * dv_head
    if ADDED:
        dk_acc = _rows(dk, first_key, dk_row, real, BLOCK_N, HEAD_DIM, BLOCK_D)
        dv_acc = _rows(dv, first_key, dv_row, real, BLOCK_N, VALUE_DIM, VALUE_PADDED)
    else:
        dk_acc = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
        dv_acc = tl.zeros((BLOCK_N, VALUE_PADDED), tl.float32)
    for t in tl.range(near + far, disable_licm=True):
        first_row = begin + t * EDGE_M + tl.where(t < near, 0, full * BLOCK_M)
        meets = True
        if depth is not None:
            meets = tl.load(shallowest + first_row // EDGE_M) - deepest < window
        if meets:
            rows = first_row + tl.arange(0, EDGE_M)
            inside = rows < num_queries
            at_m = block_positions(position, first_row, num_queries, EDGE_M)
            depth_m = at_m
            if depth is not None:
                depth_m = tl.load(query_depth + rows, mask=inside, other=0)
            visible = tl.trans(_visible(at_m, at_n, real, depth_m, end, depth, window))
            lse_m = tl.load(lse + rows, mask=inside, other=0.0)
            delta_m = tl.load(delta + rows, mask=inside, other=0.0)
            sound = inside & (tl.abs(delta_m) < INF)
            q_tile = _rows(q, first_row, q_row, sound, EDGE_M, HEAD_DIM, BLOCK_D)
            s, slope = _scores(k_tile, q_tile, scale, softcap)
            p = tl.where(visible, tl.exp2(s - lse_m[None, :]) + (delta_m - delta_m)[None, :], 0.0)
            weight = p * slope
            dout_tile = _rows(dout, first_row, dout_row, sound, EDGE_M, VALUE_DIM, VALUE_PADDED)
            dv_acc = tl.dot(p.to(q_tile.dtype), dout_tile, dv_acc, input_precision="ieee")
            dp = tl.dot(v_tile, tl.trans(dout_tile), input_precision="ieee")
            ds = tl.where(weight != 0.0, weight * (dp - delta_m[None, :]), 0.0)
            dk_acc = tl.dot(ds.to(q_tile.dtype), q_tile, dk_acc, input_precision="ieee")
    if (
        depth is None
    ):  # a window leaves no full tiles; their loop beside the tiles that it skips makes ptxas serialise all products
        first_row = begin + near * EDGE_M
        for _ in tl.range(full, disable_licm=(BLOCK_D + VALUE_PADDED) * k.dtype.element_ty.primitive_bitwidth > 4096):
            rows = first_row + tl.arange(0, BLOCK_M)
            q_tile = _rows(q, first_row, q_row, None, BLOCK_M, HEAD_DIM, BLOCK_D)
            lse_m = tl.load(lse + rows)
            s, slope = _scores(k_tile, q_tile, scale, softcap)
            p = tl.exp2(s - lse_m[None, :])
            weight = p * slope
            dout_tile = _rows(dout, first_row, dout_row, None, BLOCK_M, VALUE_DIM, VALUE_PADDED)
            dv_acc = tl.dot(p.to(q_tile.dtype), dout_tile, dv_acc, input_precision="ieee")
            dp = tl.dot(v_tile, tl.trans(dout_tile), input_precision="ieee")
            delta_m = tl.load(delta + rows)
            ds = weight * (dp - delta_m[None, :])
            dk_acc = tl.dot(ds.to(q_tile.dtype), q_tile, dk_acc, input_precision="ieee")
            first_row += BLOCK_M
    _put_rows(dk, dk_acc * dk_factor, first_key, dk_row, real, BLOCK_N, HEAD_DIM, BLOCK_D)
    _put_rows(dv, dv_acc, first_key, dv_row, real, BLOCK_N, VALUE_DIM, VALUE_PADDED)


@triton.jit(do_not_specialize=["parts", "num_rows"])
def sum_parts(
    shares,
    total,
    share_head,
    share_row,
    total_head,
    total_row,
    parts,
    num_rows,
    factor,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """total[h] = factor * sum of shares[h * parts + i] over i, in this order."""
    first_row = tl.program_id(0) * BLOCK_M
    key_head = tl.program_id(1).to(tl.int64)
    shares += key_head * parts * share_head
    real = first_row + tl.arange(0, BLOCK_M) < num_rows
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for _ in tl.range(parts):
        acc += _rows(shares, first_row, share_row, real, BLOCK_M, HEAD_DIM, BLOCK_D)
        shares += share_head
    _put_rows(total + key_head * total_head, acc * factor, first_row, total_row, real, BLOCK_M, HEAD_DIM, BLOCK_D)
