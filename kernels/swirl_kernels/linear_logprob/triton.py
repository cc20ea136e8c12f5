"""linear_logprob with invariant=True: a matrix product of our own, whose epilogue is an online softmax.

Legend: N rows, H hidden size, V vocabulary, S splits of the vocabulary.

Program (row block, split) walks the vocabulary tiles of its split and keeps, for every row, a bound on x = log2(e) z, the sum of
2^(x - bound) over all but the target, and for the entropy the sum of (x - bound) 2^(x - bound); splits are merged in order
(streams.py). A split has a fixed width, SPLIT (38 of them at V = 152k), and a row's numbers never meet those of another row, so
its bits depend neither on N, nor on its place, nor on its neighbours. From compute capability 9.0 on, operands are read by tensor
descriptors (TMA): the masks of pointers would be half of the product's loop. The backward is that of chunks.py."""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from swirl_kernels.linear_logprob.autograd import Kept, Settings
from swirl_kernels.linear_logprob.chunks import SPLIT, ChunkTiles
from swirl_kernels.linear_logprob.streams import LEAST, LOG2E, LOWEST, capped

GROUP = 16  # row blocks that walk the vocabulary together, so that both operands of their tiles stay in L2


@triton.jit
def _place(num_rows, num_columns, GROUP: tl.constexpr):
    """(row block, column block) of this program: GROUP row blocks go through all columns before the next GROUP."""
    pid = tl.program_id(0)
    group = pid // (GROUP * num_columns)
    first = group * GROUP
    size = tl.minimum(num_rows - first, GROUP)
    within = pid - group * GROUP * num_columns
    return first + within % size, within // size


@triton.jit(do_not_specialize=["N", "V", "offset"])
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
    offset,
    softcap,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    ENTROPY: tl.constexpr,
    TMA: tl.constexpr,
    SPLIT: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """hidden [N, H], weight [V, H]: tensor descriptors of such tiles. offset: vocabulary entries before the weight's first."""
    row_block, split = _place(tl.cdiv(N, BLOCK_N), tl.cdiv(V, SPLIT), GROUP)
    rows = row_block * BLOCK_N + tl.arange(0, BLOCK_N)
    in_rows = rows < N
    target = tl.load(targets + rows, mask=in_rows, other=-1) - offset
    inverse = tl.load(inverse_temperature + rows, mask=in_rows, other=1.0)
    scale = inverse * LOG2E
    top = tl.full((BLOCK_N,), LOWEST, dtype=tl.float32)
    total = tl.zeros((BLOCK_N,), dtype=tl.float32)
    total_weighted = tl.zeros((BLOCK_N,), dtype=tl.float32)
    target_logit = tl.zeros((BLOCK_N,), dtype=tl.float32)
    first = split * SPLIT
    last = tl.minimum(first + SPLIT, V)
    at_v, columns_H = tl.arange(0, BLOCK_V), tl.arange(0, BLOCK_H)
    for start in range(first, last, BLOCK_V):
        y = tl.zeros((BLOCK_N, BLOCK_V), dtype=tl.float32)
        if HAS_BIAS:  # before the product: beside its result the bias would cost registers
            y += tl.load(bias + start + at_v).to(tl.float32)[None, :]
        if TMA:
            for at_h in range(0, H, BLOCK_H):
                a = hidden.load([row_block * BLOCK_N, at_h])
                b = weight.load([start, at_h])
                y = tl.dot(a, b.T, y, input_precision="ieee")
        else:
            columns = start + at_v
            a_pointers = hidden + rows.to(tl.int64)[:, None] * hidden_stride + columns_H[None, :]
            b_pointers = weight + columns.to(tl.int64)[None, :] * weight_stride + columns_H[:, None]
            for at_h in range(0, H, BLOCK_H):
                inside = columns_H < H - at_h
                a = tl.load(a_pointers, mask=in_rows[:, None] & inside[None, :], other=0.0)
                b = tl.load(b_pointers, mask=(columns < V)[None, :] & inside[:, None], other=0.0)
                y = tl.dot(a, b, y, input_precision="ieee")
                a_pointers += BLOCK_H
                b_pointers += BLOCK_H
        y, _ = capped(y, softcap, HAS_SOFTCAP)
        here = target - start
        if tl.max(((here >= 0) & (here < BLOCK_V)).to(tl.int32), axis=0) > 0:  # a fifth of the tiles at V = 152k
            at_target = at_v[None, :] == here[:, None]
            target_logit += tl.sum(tl.where(at_target, y, 0.0), axis=1)
            y = tl.where(at_target, float("-inf"), y)
        if start + BLOCK_V > V:
            y = tl.where((start + at_v < V)[None, :], y, float("-inf"))
        new_top = tl.maximum(top, tl.max(y, axis=1) * scale)
        rescale = tl.exp2(top - new_top)
        shifted = y * scale[:, None] - new_top[:, None]
        p = tl.exp2(shifted)
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
    tl.store(target_logits + rows, target_logit * inverse, mask=in_rows & (target >= first) & (target < last))


def configuration(dtype: torch.dtype, capability: tuple[int, int], *, softcap: bool) -> dict[str, int]:
    """Tile sizes and launch options by compute dtype, CUDA compute capability and what the epilogue does.

    The accumulator of a 128 x 256 tile takes half of a thread's registers: under a soft-cap, and on 10.0 with the running statistics, the
    rest spills (120 to 500 B), so those take 128 x 128.
    """
    if dtype == torch.float32:  # FMA units: small tiles keep the accumulator in registers
        return {"BLOCK_N": 64, "BLOCK_V": 64, "BLOCK_H": 16, "num_warps": 8, "num_stages": 3}
    columns = 256 if capability[0] == 9 and not softcap else 128
    return {"BLOCK_N": 128, "BLOCK_V": columns, "BLOCK_H": 64, "num_warps": 8, "num_stages": 4 if columns == 256 else 3}


class InvariantTiles(ChunkTiles):
    """Rows against the vocabulary, the forward by the kernel above; it keeps nothing."""

    @staticmethod
    def keepable(num_rows: int, weight: Tensor, settings: Settings) -> tuple[int, torch.dtype, int]:
        return 0, settings.compute_dtype, 0

    def forward(self, kept: Kept | None) -> tuple[Tensor, Tensor, Tensor]:
        stats = self._statistics(triton.cdiv(self.settings.valid_vocab, SPLIT))
        target = torch.full_like(self.inverse_temperature, torch.nan)
        chunk = self._cast_chunk()
        for first in range(0, self.settings.valid_vocab, chunk):
            weight = self._weight(first, min(first + chunk, self.settings.valid_vocab))
            self._forward(first, weight, [None if x is None else x[first // SPLIT :] for x in stats], target)
        return self._merged(stats, target)

    def _cast_chunk(self) -> int:
        """Vocabulary entries that one launch takes: all, unless the weights must be cast."""
        if self.weight.dtype == self.dtype:
            return self.settings.valid_vocab
        per_entry = self.weight.shape[1] * self.dtype.itemsize
        return max(1, self.settings.workspace // per_entry // SPLIT) * SPLIT

    def _forward(self, first: int, weight: Tensor, stats: list[Tensor | None], target: Tensor) -> None:
        capability = torch.cuda.get_device_capability(weight.device) if weight.is_cuda else (9, 0)
        options = configuration(self.dtype, capability, softcap=self.settings.softcap is not None)
        num_rows, width, tma = len(self.targets), len(weight), capability >= (9, 0)
        operands = [_whole_rows(x) for x in (self.hidden, weight)]
        blocks = [[options[rows], options["BLOCK_H"]] for rows in ("BLOCK_N", "BLOCK_V")]
        _forward_kernel[(triton.cdiv(num_rows, options["BLOCK_N"]) * triton.cdiv(width, SPLIT),)](
            *(TensorDescriptor.from_tensor(x, b) if tma else x for x, b in zip(operands, blocks, strict=True)),
            None if self.bias is None else self.bias[first:],
            self.targets,
            self.inverse_temperature,
            *stats,
            target,
            num_rows,
            width,
            operands[0].shape[1],
            *(x.stride(0) for x in operands),
            first,
            self.settings.softcap or 1.0,
            **self._flags,
            ENTROPY=self.settings.entropy,
            TMA=tma,
            SPLIT=SPLIT,
            GROUP=GROUP,
            **options,
        )


def _whole_rows(x: Tensor) -> Tensor:
    """As TMA reads a matrix: rows of whole 16 bytes that lie multiples of 16 bytes apart. One that is not so is copied, with zeros
    behind its rows."""
    whole = 16 // x.itemsize
    if x.stride(1) != 1 or x.stride(0) % whole or x.shape[1] % whole or x.data_ptr() % 16:
        x = F.pad(x, (0, -x.shape[1] % whole)).contiguous()
    return x
