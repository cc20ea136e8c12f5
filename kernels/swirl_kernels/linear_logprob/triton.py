"""linear_logprob in Triton: a matrix product whose epilogue is an online softmax, and one whose epilogue is its gradient.

Legend: N selected rows, H hidden size, V vocabulary, S splits of the vocabulary.

Forward: program (row block, split) walks the vocabulary tiles of its split and keeps, for every row, the maximum logit, the sum
of exp(z - max) over all but the target, and for the entropy the sum of (z - max) exp(z - max); a second kernel merges the splits
in order. Splits have a fixed width and a row's numbers never meet those of another row, so its bits do not depend on N, on its
place, or on its neighbours.

Backward: for one chunk of the vocabulary at a time the same product again, turned into dz in its epilogue and stored in the
compute dtype; then two cuBLAS products, dz^T hidden into the chunk's rows of dweight (each written once) and dz weight added
to dhidden in fp32. Nothing of ours is atomic.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from swirl_kernels.linear_logprob.autograd import MIN_LOGP, Settings, Upstream, merge_statistics

SPLIT = 4096  # vocabulary entries of one forward program, a multiple of every tile: 38 splits at V = 152k
GROUP = 16  # row blocks that walk the vocabulary together, so that both operands of their tiles stay in L2
LOWEST = tl.constexpr(-1.7e38)  # below every logit, and still finite when subtracted from one
LEAST = tl.constexpr(MIN_LOGP)


@triton.jit
def _place(num_rows, num_columns, GROUP: tl.constexpr):
    """(row block, column block) of this program: GROUP row blocks go through all columns before the next GROUP."""
    pid = tl.program_id(0)
    group = pid // (GROUP * num_columns)
    first = group * GROUP
    size = tl.minimum(num_rows - first, GROUP)
    within = pid - group * GROUP * num_columns
    return first + within % size, within // size


@triton.jit
def _logits(
    hidden,
    weight,
    bias,
    inverse_temperature_n,
    rows,
    columns,
    N,
    V,
    H,
    hidden_stride,
    weight_stride,
    softcap,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """One tile of logits and of the slope of the soft-cap (1 without one), fp32 [BLOCK_N, BLOCK_V]."""
    at_h = tl.arange(0, BLOCK_H)
    row_pointers = hidden + rows.to(tl.int64)[:, None] * hidden_stride + at_h[None, :]
    column_pointers = weight + columns.to(tl.int64)[None, :] * weight_stride + at_h[:, None]
    z = tl.zeros((rows.shape[0], columns.shape[0]), dtype=tl.float32)
    if HAS_BIAS:  # before the product: beside its result the bias would cost registers
        z += tl.load(bias + columns, mask=columns < V, other=0.0).to(tl.float32)[None, :]
    for start in range(0, H, BLOCK_H):
        inside = at_h < H - start
        a = tl.load(row_pointers, mask=(rows < N)[:, None] & inside[None, :], other=0.0)
        b = tl.load(column_pointers, mask=(columns < V)[None, :] & inside[:, None], other=0.0)
        z = tl.dot(a, b, z, input_precision="ieee")
        row_pointers += BLOCK_H
        column_pointers += BLOCK_H
    slope = 1.0
    if HAS_SOFTCAP:
        tanh = 1.0 - 2.0 / (tl.exp(2.0 * (z / softcap)) + 1.0)
        slope = 1.0 - tanh * tanh
        z = softcap * tanh
    return z * inverse_temperature_n[:, None], slope


@triton.jit(do_not_specialize=["N", "V"])
def _forward_kernel(
    hidden,
    weight,
    bias,
    targets,
    inverse_temperature,
    tops,
    others,
    weighted,
    target_logits,
    N,
    V,
    H,
    hidden_stride,
    weight_stride,
    softcap,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    ENTROPY: tl.constexpr,
    SPLIT: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    row_block, split = _place(tl.cdiv(N, BLOCK_N), tl.cdiv(V, SPLIT), GROUP)
    rows = row_block * BLOCK_N + tl.arange(0, BLOCK_N)
    in_rows = rows < N
    target = tl.load(targets + rows, mask=in_rows, other=-1)
    inverse_temperature_n = tl.load(inverse_temperature + rows, mask=in_rows, other=1.0)
    top = tl.full((BLOCK_N,), LOWEST, dtype=tl.float32)
    total = tl.zeros((BLOCK_N,), dtype=tl.float32)
    total_weighted = tl.zeros((BLOCK_N,), dtype=tl.float32)
    target_logit = tl.zeros((BLOCK_N,), dtype=tl.float32)
    first = split * SPLIT
    last = tl.minimum(first + SPLIT, V)
    for start in range(first, last, BLOCK_V):
        columns = start + tl.arange(0, BLOCK_V)
        z, _ = _logits(
            hidden,
            weight,
            bias,
            inverse_temperature_n,
            rows,
            columns,
            N,
            V,
            H,
            hidden_stride,
            weight_stride,
            softcap,
            HAS_BIAS,
            HAS_SOFTCAP,
            BLOCK_H,
        )
        at_target = columns[None, :] == target[:, None]
        target_logit += tl.sum(tl.where(at_target, z, 0.0), axis=1)
        z = tl.where(at_target | (columns >= V)[None, :], float("-inf"), z)
        new_top = tl.maximum(top, tl.max(z, axis=1))
        rescale = tl.exp(top - new_top)
        shifted = z - new_top[:, None]
        p = tl.exp(shifted)
        if ENTROPY:
            moved = total_weighted + total * tl.maximum(top - new_top, LEAST)
            total_weighted = moved * rescale + tl.sum(p * tl.maximum(shifted, LEAST), axis=1)
        total = total * rescale + tl.sum(p, axis=1)
        top = new_top
    place = split.to(tl.int64) * N + rows
    tl.store(tops + place, top, mask=in_rows)
    tl.store(others + place, total, mask=in_rows)
    if ENTROPY:
        tl.store(weighted + place, total_weighted, mask=in_rows)
    tl.store(target_logits + rows, target_logit, mask=in_rows & (target >= first) & (target < last))


@triton.jit(do_not_specialize=["N", "S"])
def _merge_kernel(tops, others, weighted, N, S, ENTROPY: tl.constexpr, BLOCK_N: tl.constexpr):
    """Folds splits 1..S-1 of [S, N] into split 0, in order."""
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_rows = rows < N
    top = tl.load(tops + rows, mask=in_rows, other=0.0)
    total = tl.load(others + rows, mask=in_rows, other=0.0)
    total_weighted = tl.zeros((BLOCK_N,), dtype=tl.float32)
    if ENTROPY:
        total_weighted = tl.load(weighted + rows, mask=in_rows, other=0.0)
    for split in range(1, S):
        place = tl.cast(split, tl.int64) * N + rows
        here = tl.load(tops + place, mask=in_rows, other=0.0)
        new_top = tl.maximum(top, here)
        mine, theirs = tl.exp(top - new_top), tl.exp(here - new_top)
        more = tl.load(others + place, mask=in_rows, other=0.0)
        if ENTROPY:
            more_weighted = tl.load(weighted + place, mask=in_rows, other=0.0)
            total_weighted = (total_weighted + total * tl.maximum(top - new_top, LEAST)) * mine
            total_weighted += (more_weighted + more * tl.maximum(here - new_top, LEAST)) * theirs
        total = total * mine + more * theirs
        top = new_top
    tl.store(tops + rows, top, mask=in_rows)
    tl.store(others + rows, total, mask=in_rows)
    if ENTROPY:
        tl.store(weighted + rows, total_weighted, mask=in_rows)


@triton.jit(do_not_specialize=["N", "V"])
def _dlogits_kernel(
    hidden,
    weight,
    bias,
    targets,
    inverse_temperature,
    lse,
    at_target,
    dlogp,
    dentropy,
    entropy,
    dz,
    N,
    V,
    H,
    hidden_stride,
    weight_stride,
    dz_stride,
    softcap,
    stored,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    ENTROPY: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """dz [N, V], divided by Upstream.factor and times `stored`."""
    row_block, column_block = _place(tl.cdiv(N, BLOCK_N), tl.cdiv(V, BLOCK_V), GROUP)
    rows = row_block * BLOCK_N + tl.arange(0, BLOCK_N)
    columns = column_block * BLOCK_V + tl.arange(0, BLOCK_V)
    in_rows = rows < N
    z, slope = _logits(
        hidden,
        weight,
        bias,
        tl.load(inverse_temperature + rows, mask=in_rows, other=1.0),
        rows,
        columns,
        N,
        V,
        H,
        hidden_stride,
        weight_stride,
        softcap,
        HAS_BIAS,
        HAS_SOFTCAP,
        BLOCK_H,
    )
    log_p = z - tl.load(lse + rows, mask=in_rows, other=0.0)[:, None]
    grad = tl.exp(log_p)
    if ENTROPY:
        g = tl.load(dlogp + rows, mask=in_rows, other=0.0)
        h = tl.load(dentropy + rows, mask=in_rows, other=0.0)
        own = tl.load(entropy + rows, mask=in_rows, other=0.0)
        grad *= g[:, None] + h[:, None] * (tl.maximum(log_p, LEAST) + own[:, None])
    target = tl.load(targets + rows, mask=in_rows, other=-1)
    grad = tl.where(
        columns[None, :] == target[:, None], tl.load(at_target + rows, mask=in_rows, other=0.0)[:, None], grad
    )
    grad = grad * slope * stored
    pointers = dz + rows.to(tl.int64)[:, None] * dz_stride + columns[None, :]
    tl.store(pointers, grad.to(dz.dtype.element_ty), mask=in_rows[:, None] & (columns < V)[None, :])


def configuration(dtype: torch.dtype, capability: tuple[int, int], *, forward: bool, softcap: bool) -> dict[str, int]:
    """Tile sizes and launch options by compute dtype, CUDA compute capability and what the epilogue does.

    The accumulator of a 128 x 256 tile takes half of a thread's registers: with the soft-cap's slope beside it, and on 10.0 with
    the running statistics, the rest spills (120 to 500 B), so those take 128 x 128.
    """
    if dtype == torch.float32:  # FMA units: small tiles keep the accumulator in registers
        return {"BLOCK_N": 64, "BLOCK_V": 64, "BLOCK_H": 16, "num_warps": 8, "num_stages": 3}
    wide = capability[0] == 9 or (capability[0] == 10 and not forward)
    columns = 256 if wide and not softcap else 128  # 144 KB or 96 KB of shared memory
    return {"BLOCK_N": 128, "BLOCK_V": columns, "BLOCK_H": 64, "num_warps": 8, "num_stages": 3}


class TritonTiles:
    """The selected rows against the vocabulary on one device; takes fp32, bf16 and fp16."""

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: Tensor | None,
        selected: Tensor,
        settings: Settings,
    ) -> None:
        dtype = settings.compute_dtype
        rows = hidden if len(selected) == len(targets) else hidden.index_select(0, selected)
        self.hidden, self.weight = (x if x.stride(1) == 1 else x.contiguous() for x in (rows.to(dtype), weight))
        self.targets = targets.index_select(0, selected).long()
        self.bias, self.settings = None if bias is None else bias.contiguous(), settings
        if temperature is None:
            self.inverse_temperature = hidden.new_full(
                (len(selected),), 1.0 / settings.temperature, dtype=settings.statistics
            )
        else:
            self.inverse_temperature = temperature.index_select(0, selected).to(settings.statistics).reciprocal()
        self.capability = torch.cuda.get_device_capability(hidden.device) if hidden.is_cuda else (9, 0)
        self.kept: dict[tuple[int, int], Tensor] = {}

    def reuse(self, kept: dict[tuple[int, int], Tensor], chosen: Tensor, num_live: int) -> None:
        raise AssertionError("the Triton forward keeps no tiles")

    def forward(self, *, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
        """logp, lse and entropy of the selected rows, fp32 [N] each."""
        num_rows, vocab = len(self.targets), self.settings.valid_vocab
        splits = triton.cdiv(vocab, SPLIT)
        tops, others = (self.inverse_temperature.new_empty(splits, num_rows) for _ in range(2))
        weighted = torch.empty_like(tops) if self.settings.entropy else None
        target = torch.empty_like(self.inverse_temperature)
        for first, weight in self._vocabulary(self._cast_chunk()):
            at = first // SPLIT
            self._forward(first, weight, tops[at:], others[at:], None if weighted is None else weighted[at:], target)
        _merge_kernel[(triton.cdiv(num_rows, 128),)](
            tops, others, weighted, num_rows, splits, ENTROPY=self.settings.entropy, BLOCK_N=128, num_warps=4
        )
        return merge_statistics(
            tops[0], others[0], torch.zeros_like(target) if weighted is None else weighted[0], target
        )

    def backward(
        self, upstream: Upstream, need_hidden: bool, need_weight: bool, need_bias: bool
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Gradients: of the selected rows' hidden states in fp32, of weight and bias in their own dtype."""
        dtype, statistics, stored = self.settings.compute_dtype, self.settings.statistics, self.settings.dlogits_scale
        num_rows, vocab = len(self.targets), self.settings.valid_vocab
        # fp16 would lose small upstream gradients: what is multiplied keeps to the size of the largest.
        size = float(upstream.factor.abs().max()) if dtype == torch.float16 else 1.0
        scaled = (self.hidden * (upstream.factor / size)[:, None]).to(dtype) if need_weight else None
        dhidden = self.hidden.new_zeros(self.hidden.shape, dtype=statistics) if need_hidden else None
        # Every row of the vocabulary is written once; padding behind valid_vocab has no gradient.
        dweight = torch.empty_like(self.weight) if need_weight else None
        if dweight is not None:
            dweight[vocab:] = 0
        dbias = None if self.bias is None or not need_bias else torch.zeros_like(self.bias)
        chunk = self._chunk(num_rows, self.hidden.shape[1], need_bias=dbias is not None)
        buffer = self.hidden.new_empty(num_rows * min(chunk, vocab))
        for first, weight in self._vocabulary(chunk):
            last = first + len(weight)
            dz = buffer[: num_rows * (last - first)].view(num_rows, last - first)
            self._dlogits(upstream, dz, weight, first, stored)
            if dhidden is not None:
                _add_product(dhidden, dz, weight)
            if dweight is not None and scaled is not None:
                _product(dweight[first:last], dz.t(), scaled, size / stored)
            if dbias is not None:
                dbias[first:last] = torch.mv(dz.to(statistics).t(), upstream.factor / stored)
        if dhidden is not None:
            dhidden.mul_((upstream.factor / stored)[:, None])
        return dhidden, dweight, dbias

    def _chunk(self, num_rows: int, size: int, *, need_bias: bool) -> int:
        """Vocabulary entries whose dz fits into the workspace (with a copy of their weights under autocast, and of dz in
        fp32 where a bias is summed), a multiple of 256 where there are as many."""
        itemsize = self.settings.compute_dtype.itemsize
        per_entry = num_rows * (itemsize + (4 if need_bias else 0))
        if self.weight.dtype != self.settings.compute_dtype:
            per_entry += size * (itemsize + 4)
        chunk = max(1, int(self.settings.workspace_mb * 2**20) // per_entry)
        return chunk if chunk < 256 else chunk // 256 * 256

    def _configuration(self, *, forward: bool) -> dict[str, int]:
        softcap = self.settings.softcap is not None
        return configuration(self.settings.compute_dtype, self.capability, forward=forward, softcap=softcap)

    def _cast_chunk(self) -> int:
        """Vocabulary entries that one launch of the forward takes: all, unless the weights must be cast."""
        if self.weight.dtype == self.settings.compute_dtype:
            return self.settings.valid_vocab
        per_entry = self.weight.shape[1] * self.settings.compute_dtype.itemsize
        return max(1, int(self.settings.workspace_mb * 2**20) // per_entry // SPLIT) * SPLIT

    def _vocabulary(self, chunk: int) -> Iterator[tuple[int, Tensor]]:
        for first in range(0, self.settings.valid_vocab, chunk):
            last = min(first + chunk, self.settings.valid_vocab)
            yield first, self.weight[first:last].to(self.settings.compute_dtype)

    def _forward(
        self, first: int, weight: Tensor, tops: Tensor, others: Tensor, weighted: Tensor | None, target: Tensor
    ) -> None:
        num_rows, width = len(self.targets), len(weight)
        options = self._configuration(forward=True)
        _forward_kernel[(triton.cdiv(num_rows, options["BLOCK_N"]) * triton.cdiv(width, SPLIT),)](
            self.hidden,
            weight,
            None if self.bias is None else self.bias[first:],
            self.targets - first,
            self.inverse_temperature,
            tops,
            others,
            weighted,
            target,
            num_rows,
            width,
            self.hidden.shape[1],
            self.hidden.stride(0),
            weight.stride(0),
            self.settings.softcap or 1.0,
            HAS_BIAS=self.bias is not None,
            HAS_SOFTCAP=self.settings.softcap is not None,
            ENTROPY=self.settings.entropy,
            SPLIT=SPLIT,
            GROUP=GROUP,
            **options,
        )

    def _dlogits(self, upstream: Upstream, dz: Tensor, weight: Tensor, first: int, stored: float) -> None:
        num_rows, width = dz.shape
        options = self._configuration(forward=False)
        blocks = triton.cdiv(num_rows, options["BLOCK_N"]) * triton.cdiv(width, options["BLOCK_V"])
        _dlogits_kernel[(blocks,)](
            self.hidden,
            weight,
            None if self.bias is None else self.bias[first:],
            self.targets - first,
            self.inverse_temperature,
            upstream.lse,
            upstream.at_target,
            upstream.dlogp,
            upstream.dentropy,
            upstream.entropy,
            dz,
            num_rows,
            width,
            self.hidden.shape[1],
            self.hidden.stride(0),
            weight.stride(0),
            dz.stride(0),
            self.settings.softcap or 1.0,
            stored,
            HAS_BIAS=self.bias is not None,
            HAS_SOFTCAP=self.settings.softcap is not None,
            ENTROPY=upstream.dentropy is not None,
            GROUP=GROUP,
            **options,
        )


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a b, total in fp32."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    elif a.is_cuda:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:  # a CPU multiplies 16-bit matrices into 16-bit results only
        total.addmm_(a.to(total.dtype), b.to(total.dtype))


def _product(out: Tensor, a: Tensor, b: Tensor, factor: float) -> None:
    """out = factor a b, rounded once to out's dtype."""
    if a.is_cuda and out.dtype == torch.float32 != a.dtype:
        torch.mm(a, b, out_dtype=out.dtype, out=out).mul_(factor)
    elif a.is_cuda and a.dtype != out.dtype:  # fp16 autocast over bf16 weights, say: cuBLAS knows no such output
        out.copy_(torch.mm(a, b, out_dtype=torch.float32).mul_(factor))
    elif a.is_cuda or a.dtype == out.dtype == torch.float32:
        torch.addmm(out, a, b, beta=0, alpha=factor, out=out)
    else:
        out.copy_((a.float() @ b.float()).mul_(factor))
