"""linear_logprob by chunks of the vocabulary: a matrix library multiplies into fp32, kernels stream over the result.

Legend: N rows, H hidden size, V vocabulary, C columns of a chunk.

Forward: per chunk z = hidden weight[c]^T in fp32, then statistics of every row and segment (streams.py), merged at the end. Backward: the
same product again, its softmax's gradient p in the compute dtype, then p^T hidden into the chunk's rows of dweight (each written once) and
p weight[c] added to dhidden in fp32.

Where the workspace has room the forward keeps 2^(x - k) of the first columns, rounded to the compute dtype, with a whole number k for each
row and segment. The backward multiplies it by 2^(k - K), K = ceil(log2 sum 2^x), which rounds nothing, and leaves the rest of the
way to p, 2^(K - log2 sum 2^x) in [1, 2), to the factor of a row: p is rounded once, kept or computed again. Where an entropy is
differentiated, or in fp16, which has no room for such exponents, everything is computed again.

The rows of a chunk lie in one matrix, so the library may choose another kernel for another N, and the last bits of a row may
change with its neighbours (triton.py: not there). Nothing is atomic: a call repeated gives the same bits.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from swirl_kernels.linear_logprob import streams
from swirl_kernels.linear_logprob.autograd import Kept, Settings, Upstream, merge_statistics

SPLIT = 4096  # a multiple of every segment, and of every tile of triton.py
# What cuBLAS cuts a product's result into on Hopper; a product is at its best where the number of its tiles is a multiple of that of
# multiprocessors, or just below one.
TILE_N, TILE_V = 128, 256
PROCESSORS = 132  # of an H100 or H200
# Logits in work at a time where tiles may be kept: 16 waves of tiles. Twice as many would save half of dhidden's traffic, about
# 0.5 ms at N = 8192, H = 3584, where the memory keeps tiles that save four times that (both by arithmetic, not measured).
WORKING = 16 * PROCESSORS * TILE_N * TILE_V
LOG2E, LN2 = math.log2(math.e), math.log(2)


class ChunkTiles:
    """Rows against the vocabulary on one device; takes fp32, bf16 and fp16."""

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: Tensor | None,
        settings: Settings,
    ) -> None:
        self.settings, self.dtype = settings, settings.compute_dtype
        self.hidden, self.weight = hidden.to(self.dtype), weight
        self.targets = targets.to(torch.int32)
        if temperature is None:
            self.inverse_temperature = hidden.new_full((len(targets),), 1.0 / settings.temperature, dtype=torch.float32)
        else:
            self.inverse_temperature = temperature.float().reciprocal()
        self.kept = Kept(hidden.new_empty(0, dtype=self.dtype), hidden.new_empty(0, dtype=torch.float32))
        self.places: Tensor | None = None
        self.num_kept_rows = len(targets)
        self.segment, self.chunk = self._cut(len(targets))
        # with as many entries as the last segment, or the last split, has columns
        self.bias = None if bias is None else F.pad(bias, (0, -(-settings.valid_vocab // SPLIT) * SPLIT - len(bias)))

    @staticmethod
    def keepable(num_rows: int, weight: Tensor, settings: Settings) -> tuple[int, torch.dtype, int]:
        dtype = settings.compute_dtype
        left = max(0, settings.workspace - _working(settings)) // dtype.itemsize if _keeps(dtype) else 0
        segments = -(-settings.valid_vocab // streams.SEGMENT)
        column = num_rows * streams.SEGMENT
        return (
            torch.sym_min(left // torch.sym_max(1, column), segments) * column,
            dtype,
            num_rows * segments if left else 0,
        )

    def reuse(self, kept: Kept, places: Tensor | None, num_live: int) -> None:
        self.kept, self.num_kept_rows = kept, num_live
        self.places = None if places is None else places.to(torch.int32)

    def forward(self, kept: Kept | None) -> tuple[Tensor, Tensor, Tensor]:
        self.kept = self.kept if kept is None else kept
        num_rows, width = len(self.targets), min(self.chunk, self._padded(self.settings.valid_vocab))
        segments = self._padded(self.settings.valid_vocab) // self.segment
        held = self._kept_tiles()
        stats = self._statistics(segments)
        if held is not None:
            stats[0] = self._kept_tops()
        target = torch.full_like(self.inverse_temperature, torch.nan)
        buffer = self.inverse_temperature.new_empty(num_rows * width)
        for first, last in self._chunks():
            z = self._logits(buffer, first, last)
            self._stats(z, first, [None if x is None else x[first // self.segment :] for x in stats], target, held)
        return self._merged(stats, target)

    def backward(
        self, upstream: Upstream, need_hidden: bool, need_weight: bool, need_bias: bool
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        dtype, stored = self.dtype, self.settings.dlogits_scale
        num_rows, vocab = len(self.targets), self.settings.valid_vocab
        log2_total = upstream.lse * LOG2E
        exponent = log2_total.ceil()
        stretch = torch.exp2(exponent - log2_total)  # dz holds p / stretch times `stored`
        factor = upstream.factor * stretch
        at_target = upstream.at_target * (stored / stretch)
        size: Tensor | None = None
        if (
            dtype == torch.float16
        ):  # would lose small upstream gradients: what is multiplied keeps to the size of the largest
            size = factor.abs().amax().clamp(min=torch.finfo(torch.float32).tiny)
        scaled = self._scaled(factor if size is None else factor / size, upstream.flows) if need_weight else None
        dhidden = self.hidden.new_zeros(self.hidden.shape, dtype=torch.float32) if need_hidden else None
        # Every row of the vocabulary is written once; padding behind valid_vocab has no gradient.
        dweight = self.weight.new_empty(self.weight.shape) if need_weight else None
        if dweight is not None:
            dweight[vocab:] = 0
        dbias = self.bias.new_zeros(len(self.weight)) if need_bias and self.bias is not None else None
        held = self._kept_tiles() if upstream.dentropy is None else None
        width = min(self.chunk, self._padded(vocab))
        again = held is None or held.shape[1] < vocab or (dbias is not None and dtype != torch.float32)
        buffer = self.inverse_temperature.new_empty(num_rows * width if again or dtype == torch.float32 else 0)
        dz_buffer = buffer if dtype == torch.float32 else self.hidden.new_empty(num_rows * width)
        lifted = exponent - math.log2(stored)
        for first, last in self._chunks():
            dz = self._matrix(dz_buffer, last - first)
            if held is not None and first < held.shape[1]:
                self._kept_dz(upstream, dz, held[:, first:last], first, (lifted, factor, at_target))
            else:
                z = self._logits(buffer, first, last)
                self._dz(upstream, z, dz, first, (lifted, factor, at_target))
            weight = self._weight(first, last)
            if dhidden is not None:
                _add_product(dhidden, dz, weight)
            if dweight is not None and scaled is not None:
                _product(dweight[first:last], dz.t(), scaled, None if size is None else size / stored)
            if dbias is not None:
                sums = dz if dz.dtype == torch.float32 else self._matrix(buffer, last - first).copy_(dz)
                dbias[first:last] = torch.mv(sums.t(), factor / stored)
        if dhidden is not None:
            dhidden.mul_((factor / stored)[:, None])
        return dhidden, dweight, dbias

    def _cut(self, num_rows: int) -> tuple[int, int]:
        """Columns of a segment and of a chunk."""
        itemsize, other = self.dtype.itemsize, self.weight.dtype != self.dtype
        per_entry = num_rows * _bytes_per_logit(self.dtype)
        if other:  # a copy of the chunk's weights in the compute dtype
            per_entry += self.weight.shape[1] * itemsize
        if other or self.dtype == torch.float16 or (self.dtype != torch.float32 and not self.weight.is_cuda):
            per_entry += self.weight.shape[1] * 4  # dweight's rows before they are rounded
        working = _working(self.settings)
        fit = max(1, working // max(per_entry, 1))
        segment = min(streams.SEGMENT, max(8, 1 << (fit.bit_length() - 1)))
        processors = PROCESSORS
        if self.weight.is_cuda:
            processors = torch.cuda.get_device_properties(self.weight.device).multi_processor_count
        vocab = -(-self.settings.valid_vocab // segment) * segment
        return segment, whole_waves(num_rows, max(1, fit // segment) * segment, vocab, segment, processors)

    def _padded(self, width: int) -> int:
        return -(-width // self.segment) * self.segment

    def _matrix(self, buffer: Tensor, width: int) -> Tensor:
        """[N, width], rows a multiple of the segment apart."""
        stride, num_rows = self._padded(width), len(self.targets)
        return buffer[: num_rows * stride].view(num_rows, stride)[:, :width]

    def _kept_tiles(self) -> Tensor | None:
        """[rows of the forward, columns kept], where the forward's segments are those that `keepable` counts with."""
        if not self.kept.logits.numel() or self._cut(self.num_kept_rows)[0] != streams.SEGMENT:
            return None
        segments = -(-self.settings.valid_vocab // streams.SEGMENT)
        width = min(segments, self.kept.logits.numel() // self.num_kept_rows // streams.SEGMENT) * streams.SEGMENT
        return self.kept.logits[: self.num_kept_rows * width].view(self.num_kept_rows, width) if width else None

    def _kept_tops(self) -> Tensor:
        """[segments, rows of the forward]"""
        segments = -(-self.settings.valid_vocab // streams.SEGMENT)
        return self.kept.tops[: segments * self.num_kept_rows].view(segments, self.num_kept_rows)

    def _chunks(self) -> Iterator[tuple[int, int]]:
        """(first, last) column of each; a chunk is kept or not."""
        held, vocab = self._kept_tiles(), self.settings.valid_vocab
        edge = 0 if held is None else min(held.shape[1], vocab)
        for start, stop in ((0, edge), (edge, vocab)):
            for first in range(start, stop, self.chunk):
                yield first, min(first + self.chunk, stop)

    def _weight(self, first: int, last: int) -> Tensor:
        return self.weight[first:last].to(self.dtype)

    def _logits(self, buffer: Tensor, first: int, last: int) -> Tensor:
        z = self._matrix(buffer, last - first)
        _product(z, self.hidden, self._weight(first, last).t())
        return z

    def _scaled(self, factor: Tensor, flows: Tensor | None) -> Tensor:
        scaled = (self.hidden * factor[:, None]).to(self.dtype)
        return scaled if flows is None else scaled.masked_fill_(~flows[:, None], 0.0)

    def _statistics(self, segments: int) -> list[Tensor | None]:
        """Memory for bounds, sums and, with an entropy, weighted sums, [segments, N] each."""
        shape = segments, len(self.targets)
        top, others = (self.inverse_temperature.new_empty(shape) for _ in range(2))
        return [top, others, torch.empty_like(top) if self.settings.entropy else None]

    def _merged(self, stats: list[Tensor | None], target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """logp, lse, entropy from statistics [segments, N] each."""
        top, others, weighted = torch.zeros_like(target), torch.zeros_like(target), torch.zeros_like(target)
        assert stats[0] is not None
        segments, num_rows = stats[0].shape
        streams.merge_segments[(triton.cdiv(num_rows, 128),)](
            *stats,
            top,
            others,
            weighted,
            num_rows,
            segments,
            ENTROPY=self.settings.entropy,
            BLOCK_S=16,
            BLOCK_N=128,
            num_warps=4,
        )
        return merge_statistics(top, others, weighted, target)

    @property
    def _flags(self) -> dict[str, bool]:
        return {"HAS_BIAS": self.bias is not None, "HAS_SOFTCAP": self.settings.softcap is not None}

    def _stats(self, z: Tensor, first: int, stats: list[Tensor | None], target: Tensor, held: Tensor | None) -> None:
        num_rows, segments = len(z), self._padded(z.shape[1]) // self.segment
        keep = held is not None and first < held.shape[1]
        streams.chunk_stats[(triton.cdiv(num_rows, streams.ROWS) * segments,)](
            z,
            None if self.bias is None else self.bias[first:],
            self.targets,
            self.inverse_temperature,
            *stats,
            target,
            held[:, first:] if keep and held is not None else None,
            num_rows,
            z.shape[1],
            segments,
            first,
            z.stride(0),
            held.stride(0) if keep and held is not None else 0,
            self.settings.softcap or 1.0,
            **self._flags,
            ENTROPY=self.settings.entropy,
            KEEP=keep,
            ROWS=streams.ROWS,
            SEGMENT=self.segment,
            num_warps=1,
        )

    def _dz(
        self, upstream: Upstream, z: Tensor, dz: Tensor, first: int, per_row: tuple[Tensor, Tensor, Tensor]
    ) -> None:
        """per_row: exponent, factor and at_target."""
        segments = self._padded(z.shape[1]) // self.segment
        streams.chunk_dz[(triton.cdiv(len(z), streams.ROWS) * segments,)](
            z,
            None if self.bias is None else self.bias[first:],
            self.targets,
            self.inverse_temperature,
            *per_row,
            upstream.lse,
            upstream.dlogp,
            upstream.dentropy,
            upstream.entropy,
            dz,
            len(z),
            segments,
            first,
            z.stride(0),
            self.settings.softcap or 1.0,
            **self._flags,
            ENTROPY=upstream.dentropy is not None,
            ROWS=streams.ROWS,
            SEGMENT=self.segment,
            num_warps=1,
        )

    def _kept_dz(
        self, upstream: Upstream, dz: Tensor, held: Tensor, first: int, per_row: tuple[Tensor, Tensor, Tensor]
    ) -> None:
        exponent, factor, at_target = per_row
        softcap = self.settings.softcap
        if softcap is not None:  # what is kept holds the slope already, so the target's must too
            tanh = (upstream.logp + upstream.lse) / (self.inverse_temperature * softcap)
            at_target = at_target * (1 - tanh.square())
        segments = self._padded(dz.shape[1]) // self.segment
        streams.kept_dz[(triton.cdiv(len(dz), streams.ROWS) * segments,)](
            held,
            self._kept_tops()[first // streams.SEGMENT :],
            self.places,
            self.targets,
            exponent,
            factor,
            at_target,
            dz,
            len(dz),
            self.num_kept_rows,
            segments,
            first,
            held.stride(0),
            dz.stride(0),
            HAS_PLACES=self.places is not None,
            ROWS=streams.ROWS,
            SEGMENT=self.segment,
            num_warps=1,
        )


def _keeps(dtype: torch.dtype) -> bool:
    return dtype != torch.float16


def _bytes_per_logit(dtype: torch.dtype) -> int:
    """z in fp32, and dz, which takes z's place in fp32."""
    return 4 + (0 if dtype == torch.float32 else dtype.itemsize)


def _working(settings: Settings) -> int:
    """Bytes of the workspace for chunks in work."""
    if not _keeps(settings.compute_dtype):
        return settings.workspace
    return min(settings.workspace, WORKING * _bytes_per_logit(settings.compute_dtype))


@functools.lru_cache(maxsize=1024)
def whole_waves(num_rows: int, most: int, vocab: int, segment: int, processors: int) -> int:
    """Columns of a chunk: a multiple of segment from half of `most` to all of it, whose product fills the multiprocessors best, among
    equals the widest; the whole vocabulary (a multiple of segment) where it fits."""
    if vocab <= most:
        return vocab

    def filled(columns: int) -> float:
        tiles = -(-num_rows // TILE_N) * -(-columns // TILE_V)
        return round(tiles / (-(-tiles // processors) * processors), 2)

    return max(range(most, most // 2, -segment), key=filled)


@contextmanager
def _full_sums() -> Iterator[None]:
    """Sums of 16-bit products stay in fp32 where cuBLAS splits them, which by default it may add up in 16 bits."""
    flags, names = (
        torch.backends.cuda.matmul,
        [f"allow_{dtype}_reduced_precision_reduction" for dtype in ("bf16", "fp16")],
    )
    was = [getattr(flags, name) for name in names]
    splits = [getattr(flags, f"{name}_split_k", True) for name in names]  # set to True by setting the other to False
    for name, allowed in zip(names, was, strict=True):
        if allowed:
            setattr(flags, name, False)
    try:
        yield
    finally:
        for name, allowed, split in zip(names, was, splits, strict=True):
            if allowed:
                setattr(flags, name, True if split else (True, False))


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a b, total in fp32."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    elif a.is_cuda:
        with _full_sums():
            torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:  # a CPU multiplies 16-bit matrices into 16-bit results only
        total.addmm_(a.to(total.dtype), b.to(total.dtype))


def _product(out: Tensor, a: Tensor, b: Tensor, factor: Tensor | None = None) -> None:
    """out = factor a b, rounded once to out's dtype."""
    with _full_sums():
        if factor is None and (a.dtype == out.dtype and (a.is_cuda or a.dtype == torch.float32)):
            torch.mm(a, b, out=out)
        elif factor is None and a.is_cuda and out.dtype == torch.float32:
            torch.mm(a, b, out_dtype=out.dtype, out=out)
        else:  # fp16, whose factor may not be applied to rounded numbers; outputs that cuBLAS has not; CPUs
            wide = (
                torch.mm(a, b, out_dtype=torch.float32)
                if a.is_cuda and a.dtype != torch.float32
                else torch.mm(a.float(), b.float())
            )
            out.copy_(wide if factor is None else wide.mul_(factor))
