"""selective_logprob in Triton: forward one program a row with an online softmax, backward one program a block of a row.

Legend: N rows, V valid columns, W all columns.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from swirl_kernels.linear_logprob.autograd import MIN_LOGP

FORWARD_BLOCK, BACKWARD_BLOCK = 4096, 2048  # columns at a time; 4096 spill in the backward on 8.0 (8 B)
WARPS = 8
LOWEST = tl.constexpr(-1.7e38)  # below every logit, and still finite when subtracted from one
LEAST = tl.constexpr(MIN_LOGP)


@triton.jit(do_not_specialize=["V"])
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
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    if tl.load(live + row) != 0:
        target = tl.load(targets + row).to(tl.int32)
        by = tl.load(inverse_temperature + row)
        base = logits + row.to(tl.int64) * stride
        top = by * 0.0 + LOWEST
        total = by * 0.0
        total_weighted = by * 0.0
        for start in range(0, V, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            z = tl.load(base + columns, mask=(columns < V) & (columns != target), other=float("-inf"))
            z = z.to(tl.float32) * by
            new_top = tl.maximum(top, tl.max(z))
            rescale = tl.exp(top - new_top)
            shifted = z - new_top
            p = tl.exp(shifted)
            if ENTROPY:
                moved = total_weighted + total * tl.maximum(top - new_top, LEAST)
                total_weighted = moved * rescale + tl.sum(p * tl.maximum(shifted, LEAST))
            total = total * rescale + tl.sum(p)
            top = new_top
        tl.store(tops + row, top)
        tl.store(others + row, total)
        if ENTROPY:
            tl.store(weighted + row, total_weighted)
        tl.store(target_logits + row, tl.load(base + target).to(tl.float32) * by)


@triton.jit(do_not_specialize=["V", "W", "blocks"])
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
    columns = (program - row * blocks) * BLOCK + tl.arange(0, BLOCK)
    grad = tl.zeros((BLOCK,), dtype=tl.float32)
    if tl.load(flows + row) != 0:
        by = tl.load(inverse_temperature + row)
        z = tl.load(logits + row.to(tl.int64) * stride + columns, mask=columns < V, other=float("-inf")).to(tl.float32)
        log_p = (z * by - tl.load(largest + row)) - tl.load(log_total + row)
        factor = tl.zeros((BLOCK,), dtype=tl.float32) + tl.load(g + row)
        if ENTROPY:
            factor += tl.load(h + row) * (tl.maximum(log_p, LEAST) + tl.load(entropy + row))
        grad = -tl.exp(log_p) * factor
        grad = tl.where(columns == tl.load(targets + row).to(tl.int32), tl.load(at_target + row), grad) * by
    tl.store(out + row.to(tl.int64) * out_stride + columns, grad.to(out.dtype.element_ty), mask=columns < W)


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
