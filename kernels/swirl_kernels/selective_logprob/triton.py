"""selective_logprob in Triton: forward one program a row with an online softmax, backward one program a block of a row.

Legend: N rows, V valid columns, W all columns.

A thread holds 16 adjacent bytes of a row at a time and, in the forward, the maximum and the sum of what it has seen alone: threads
meet once a row. Whole blocks know neither V nor, but in the one that holds it, the target; what V leaves over is a masked block of
its own. Exponents are in units of log 2.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from swirl_kernels.linear_logprob.autograd import MIN_LOGP

FORWARD_BLOCK, BACKWARD_BLOCK = 4096, 2048  # columns at a time; 4096 spill in the backward on 8.0 (8 B)
WARPS = 8
LOWEST = tl.constexpr(-1.7e38)  # below every logit, and still finite when subtracted from one
LEAST = tl.constexpr(MIN_LOGP)
LOG2_E = tl.constexpr(1 / math.log(2))
LN_2 = tl.constexpr(math.log(2))


@triton.jit
def _seen(z, columns, first, target, top, total, total_weighted, by, BLOCK: tl.constexpr, ENTROPY: tl.constexpr):
    """The statistics of each thread with one more block of raw logits, [BLOCK / WIDTH, WIDTH]. by: log2(e) / temperature."""
    if (target >= first) & (target < first + BLOCK):
        z = tl.where(columns == target, float("-inf"), z)
    new_top = tl.maximum(top, tl.max(z, axis=1))
    fallen = (top - new_top) * by
    rescale = tl.exp2(fallen)
    shifted = (z - new_top[:, None]) * by
    p = tl.exp2(shifted)
    if ENTROPY:
        moved = total_weighted + total * tl.maximum(fallen, LEAST)
        total_weighted = moved * rescale + tl.sum(p * tl.maximum(shifted, LEAST), axis=1)
    return new_top, total * rescale + tl.sum(p, axis=1), total_weighted


@triton.jit
def _statistics_kernel(
    logits,
    targets,
    live,
    inverse_temperature,
    tops,
    others,
    weighted,
    target_logits,
    V,
    stride,
    ENTROPY: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """WIDTH: adjacent columns that a thread keeps together, 16 bytes."""
    row = tl.program_id(0)
    if tl.load(live + row) != 0:
        target = tl.load(targets + row).to(tl.int32)
        inverse = tl.load(inverse_temperature + row)
        by = inverse * LOG2_E
        base = logits + row.to(tl.int64) * stride
        place = tl.arange(0, BLOCK // WIDTH)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
        top = tl.full((BLOCK // WIDTH,), LOWEST, dtype=tl.float32)
        total = tl.zeros((BLOCK // WIDTH,), dtype=tl.float32)
        total_weighted = tl.zeros((BLOCK // WIDTH,), dtype=tl.float32)
        whole = V // BLOCK * BLOCK
        for first in range(0, whole, BLOCK):
            columns = first + place
            z = tl.load(base + columns).to(tl.float32)
            top, total, total_weighted = _seen(
                z, columns, first, target, top, total, total_weighted, by, BLOCK, ENTROPY
            )
        if whole < V:
            columns = whole + place
            z = tl.load(base + columns, mask=columns < V, other=float("-inf")).to(tl.float32)
            top, total, total_weighted = _seen(
                z, columns, whole, target, top, total, total_weighted, by, BLOCK, ENTROPY
            )
        row_top = tl.max(top)
        fallen = (top - row_top) * by
        rescale = tl.exp2(fallen)
        tl.store(tops + row, tl.maximum(row_top * inverse, LOWEST))
        tl.store(others + row, tl.sum(total * rescale))
        if ENTROPY:
            moved = total_weighted + total * tl.maximum(fallen, LEAST)
            tl.store(weighted + row, tl.sum(moved * rescale) * LN_2)
        tl.store(target_logits + row, tl.load(base + target).to(tl.float32) * inverse)


@triton.jit
def _gradient(z, columns, first, row, targets, inverse_temperature, largest, log_total, entropy, at_target, g, h, ENTROPY: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """d loss / d logits of one block of a row, fp32."""
    by = tl.load(inverse_temperature + row)
    shift = tl.load(log_total + row)
    over_largest = z * by - tl.load(largest + row)
    p = tl.exp2(over_largest * LOG2_E - shift * LOG2_E)
    factor = tl.load(g + row)
    if ENTROPY:
        grad = p * (factor + tl.load(h + row) * (tl.maximum(over_largest - shift, LEAST) + tl.load(entropy + row))) * -by
    else:
        grad = p * (factor * -by)
    target = tl.load(targets + row).to(tl.int32)
    if (target >= first) & (target < first + BLOCK):
        grad = tl.where(columns == target, tl.load(at_target + row) * by, grad)
    return grad


@triton.jit(do_not_specialize=["blocks"])
def _dlogits_kernel(
    out,
    logits,
    targets,
    flows,
    inverse_temperature,
    largest,
    log_total,
    entropy,
    at_target,
    g,
    h,
    V,
    W,
    blocks,
    out_stride,
    stride,
    ENTROPY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0)
    row = program // blocks
    first = (program - row * blocks) * BLOCK
    columns = first + tl.arange(0, BLOCK)
    source = logits + row.to(tl.int64) * stride + columns
    drain = out + row.to(tl.int64) * out_stride + columns
    nothing = tl.zeros((BLOCK,), dtype=out.dtype.element_ty)
    if first + BLOCK <= V:
        if tl.load(flows + row) != 0:
            z = tl.load(source).to(tl.float32)
            grad = _gradient(z, columns, first, row, targets, inverse_temperature, largest, log_total, entropy, at_target, g, h, ENTROPY, BLOCK)  # fmt: skip
            tl.store(drain, grad.to(out.dtype.element_ty))
        else:
            tl.store(drain, nothing)
    else:
        if tl.load(flows + row) != 0:
            z = tl.load(source, mask=columns < V, other=float("-inf")).to(tl.float32)
            grad = _gradient(z, columns, first, row, targets, inverse_temperature, largest, log_total, entropy, at_target, g, h, ENTROPY, BLOCK)  # fmt: skip
            tl.store(drain, grad.to(out.dtype.element_ty), mask=columns < W)
        else:
            tl.store(drain, nothing, mask=columns < W)


def statistics_triton(
    logits: Tensor, targets: Tensor, live: Tensor, inverse_temperature: Tensor, valid: int, entropy: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What `statistics_torch` (eager.py) returns, fp32 [N] each."""
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    top, others, weighted, target = (torch.zeros_like(inverse_temperature) for _ in range(4))
    if len(logits):
        with torch.cuda.device_of(logits):
            _statistics_kernel[(len(logits),)](
                logits,
                targets.contiguous(),
                live.view(torch.uint8),
                inverse_temperature,
                top,
                others,
                weighted,
                target,
                valid,
                logits.stride(0),
                ENTROPY=entropy,
                WIDTH=16 // logits.element_size(),
                BLOCK=FORWARD_BLOCK,
                num_warps=WARPS,
            )
    return top, others, weighted, target


def dlogits_triton(
    out: Tensor,
    logits: Tensor,
    targets: Tensor,
    flows: Tensor,
    inverse_temperature: Tensor,
    largest: Tensor,
    log_total: Tensor,
    entropy: Tensor,
    at_target: Tensor,
    g: Tensor,
    h: Tensor | None,
    valid: int,
) -> None:
    """Writes the gradient of the logits into out, which may be the logits. All but those fp32 [N], flows bool."""
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    assert out.stride(1) == 1, f"the gradient's strides are {out.stride()}"
    blocks = triton.cdiv(out.shape[1], BACKWARD_BLOCK)
    if len(logits):
        with torch.cuda.device_of(logits):
            _dlogits_kernel[(len(logits) * blocks,)](
                out,
                logits,
                targets.contiguous(),
                flows.view(torch.uint8),
                inverse_temperature,
                largest,
                log_total,
                entropy,
                at_target,
                g.contiguous(),
                None if h is None else h.contiguous(),
                valid,
                out.shape[1],
                blocks,
                out.stride(0),
                logits.stride(0),
                ENTROPY=h is not None,
                BLOCK=BACKWARD_BLOCK,
                num_warps=WARPS,
            )
