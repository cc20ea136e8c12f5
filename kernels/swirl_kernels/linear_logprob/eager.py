"""linear_logprob in plain torch: tiles of logits in one bounded workspace, an online softmax, and a backward over the
same tiles.

Legend: N rows, H hidden size, V vocabulary, R rows and C vocabulary entries of one tile.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from swirl_kernels.linear_logprob.autograd import MIN_LOGP, Kept, Settings, Upstream, merge_statistics

# A tile is large enough for full matrix-product speed and small enough that the passes over it stay near the cache: at
# V = 49152 and H = 576 on two cores 94 % of the time is matrix products, and halving or doubling either number changes
# nothing.
TILE_VOCAB = 4096
TILE_ROWS = 1024
# What a matrix library was seen to take for itself besides (MiB, resident, V = 152k, N = 1000, H = 256 on two threads): 17 in fp32
# from the first product on, 30 in bf16, where it copies operands. Kept tiles leave room for it.
LIBRARY_MIB = 32


@dataclass(frozen=True)
class _Sizes:
    """How a workspace is shared out, whatever the number of rows. per_entry: bytes of working tiles per logit. left: what remains
    beside dweight's sums, in bytes."""

    tile_vocab: int
    tile_rows: int
    buffers: int
    per_entry: int
    left: int

    @classmethod
    def of(cls, weight: Tensor, settings: Settings) -> _Sizes:
        statistics, dtype = settings.statistics, settings.compute_dtype
        # One buffer for a tile, one for the slope of the soft-cap, one for the probabilities beside their logarithms.
        buffers = 1 + (settings.softcap is not None) + settings.entropy
        per_entry = buffers * statistics.itemsize + (dtype.itemsize if dtype != statistics else 0)
        workspace = settings.workspace
        tile_vocab = max(1, min(TILE_VOCAB, settings.valid_vocab, workspace // per_entry // 64))
        if weight.dtype != statistics:
            # the backward sums a tile's rows of dweight in higher precision, and one product
            per_row = weight.shape[1] * (statistics.itemsize + dtype.itemsize)
            tile_vocab = max(1, min(tile_vocab, workspace // 2 // per_row))
            workspace -= tile_vocab * per_row
        tile_rows = max(1, min(TILE_ROWS, workspace // per_entry // tile_vocab))
        return cls(tile_vocab, tile_rows, buffers, per_entry, workspace)


class TorchTiles:
    """Rows against the vocabulary; a tile is named by its block of rows and its first column."""

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: Tensor | None,
        settings: Settings,
    ) -> None:
        num_rows = len(targets)
        self.hidden = hidden.to(settings.compute_dtype)  # [N, H]
        self.targets = targets.long()  # [N]
        self.weight, self.bias, self.settings = weight, bias, settings
        self.dtype = settings.compute_dtype
        self.statistics = settings.statistics
        # True: the matrix products return fewer digits than the sums over them keep.
        self.rounded = self.dtype != self.statistics
        self.inverse_temperature: float | Tensor = 1.0 / settings.temperature
        if temperature is not None:
            self.inverse_temperature = temperature.to(self.statistics).reciprocal()  # [N]
        self.sizes = _Sizes.of(weight, settings)
        entries = min(self.sizes.tile_rows, num_rows) * self.sizes.tile_vocab
        self.buffers = [hidden.new_empty(entries, dtype=self.statistics) for _ in range(self.sizes.buffers)]
        self.product = hidden.new_empty(entries, dtype=self.dtype) if self.rounded else self.buffers[0]
        self.kept: dict[tuple[int, int], Tensor] = {}
        self.blocks = self._row_blocks(num_rows)
        # Of each block, the rows of its kept tiles that are still wanted; None: all.
        self.kept_rows: list[Tensor] | None = None

    @staticmethod
    def keepable(num_rows: int, weight: Tensor, settings: Settings) -> tuple[int, torch.dtype, int]:
        """What the buffers leave of the workspace holds whole tiles from the forward to the backward."""
        sizes = _Sizes.of(weight, settings)
        entries = torch.sym_min(sizes.tile_rows, num_rows) * sizes.tile_vocab
        reserve = min(LIBRARY_MIB << 20, sizes.left // 2)
        left = (sizes.left - reserve - entries * sizes.per_entry) // settings.statistics.itemsize
        return torch.sym_max(0, torch.sym_min(left, num_rows * settings.valid_vocab)), settings.statistics, 0

    def _row_blocks(self, num_rows: int) -> list[slice]:
        size = self.sizes.tile_rows
        return [slice(start, min(start + size, num_rows)) for start in range(0, num_rows, size)]

    def _tiles_in(self, memory: Tensor, num_rows: int) -> dict[tuple[int, int], Tensor]:
        """The tiles that find room in it, in the forward's order, [R, C] each."""
        found, used, vocab = {}, 0, self.settings.valid_vocab
        for start in range(0, vocab, self.sizes.tile_vocab):
            width = min(self.sizes.tile_vocab, vocab - start)
            for block, rows in enumerate(self._row_blocks(num_rows)):
                size = (rows.stop - rows.start) * width
                if used + size <= len(memory):
                    found[block, start] = memory[used : used + size].view(-1, width)
                    used += size
        return found

    def reuse(self, kept: Kept, places: Tensor | None, num_live: int) -> None:
        """Takes the tiles of a forward over num_live rows, unless so few of those are left that the forward's blocks, to which
        the tiles bind them, would be nearly empty."""
        if 2 * len(self.targets) < num_live:
            return
        self.kept = self._tiles_in(kept.logits, num_live)
        if places is None or not self.kept:
            return
        starts = range(0, num_live, self.sizes.tile_rows)
        edges = torch.searchsorted(places, torch.tensor([*starts, num_live], device=places.device)).tolist()
        self.blocks = [slice(a, b) for a, b in zip(edges, edges[1:], strict=False)]
        self.kept_rows = [places[block] - start for block, start in zip(self.blocks, starts, strict=True)]

    def forward(self, kept: Kept | None) -> tuple[Tensor, Tensor, Tensor]:
        top = self.buffers[0].new_full((len(self.targets),), torch.finfo(self.statistics).min / 2)
        others, weighted, target = torch.zeros_like(top), torch.zeros_like(top), torch.full_like(top, torch.nan)
        exact = self._target_logits() if self.rounded else None
        tiles = {} if kept is None else self._tiles_in(kept.logits, len(self.targets))
        for columns, weight in self._vocabulary():
            for block, rows in enumerate(self.blocks):
                z = self._logits(rows, columns, weight, exact, tiles.get((block, columns.start)))
                inside, column = self._targets_in(rows, columns)
                target[rows] = torch.where(inside, z.gather(1, column)[:, 0], target[rows])
                self._online_softmax(z, (inside, column), top[rows], others[rows], weighted[rows])
        return merge_statistics(top, others, weighted, target)

    def _online_softmax(
        self, z: Tensor, at_target: tuple[Tensor, Tensor], top: Tensor, others: Tensor, weighted: Tensor
    ) -> None:
        """Folds a tile into the running maximum and, without the targets, sum of exp(z - top) and of (z - top) exp(z -
        top)."""
        new_top = torch.maximum(top, z.amax(1))
        shift = top - new_top
        rescale = shift.exp()
        shifted = torch.sub(z, new_top[:, None], out=self._buffer(0, z))
        if self.settings.entropy:
            p = torch.exp(shifted.clamp_(min=MIN_LOGP), out=self._buffer(-1, z))
            _put(p, at_target, 0.0)
            weighted.add_(others * shift).mul_(rescale).add_(shifted.mul_(p).sum(1))
        else:
            p = shifted.exp_()
            _put(p, at_target, 0.0)
        others.mul_(rescale).add_(p.sum(1))
        top.copy_(new_top)

    def backward(
        self, upstream: Upstream, need_hidden: bool, need_weight: bool, need_bias: bool
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Gradients: of the selected rows' hidden states in the statistics' dtype, of weight and bias in their own."""
        # fp16 would lose small upstream gradients: what is multiplied keeps to the size of the largest.
        factor, stored = upstream.factor, self.settings.dlogits_scale
        size: float | Tensor = 1.0
        if self.dtype == torch.float16:
            size = factor.abs().amax().clamp(min=torch.finfo(self.statistics).tiny)
            factor = factor / size
        dhidden = self.hidden.new_zeros(self.hidden.shape, dtype=self.statistics) if need_hidden else None
        dweight = torch.zeros_like(self.weight) if need_weight else None
        once = self.weight.dtype == self.statistics  # dweight itself can hold the running sums
        dbias = torch.zeros_like(self.bias, dtype=self.statistics) if need_bias and self.bias is not None else None
        for columns, weight in self._vocabulary():
            dweight_rows = None  # summed over all tiles in the statistics' dtype and rounded once
            if dweight is not None:
                dweight_rows = dweight[columns] if once else dweight[columns].to(self.statistics)
            for block, rows in enumerate(self.blocks):
                dz = self._dlogits(block, rows, columns, weight, upstream)
                if dbias is not None:
                    dbias[columns] += torch.mv(dz.t(), upstream.factor[rows])
                if self.rounded:
                    dz = self._buffer(None, dz).copy_(dz.mul_(stored) if stored != 1.0 else dz)
                if dhidden is not None:
                    self._add_product(dhidden[rows], dz, weight)
                if dweight_rows is not None:
                    scaled = (self.hidden[rows].to(self.statistics) * factor[rows, None]).to(self.dtype)
                    if upstream.flows is not None:
                        scaled.masked_fill_(~upstream.flows[rows, None], 0.0)
                    self._add_product(dweight_rows, dz.t(), scaled)
            if dweight is not None and dweight_rows is not None:
                if self.dtype == torch.float16:
                    dweight_rows.mul_(size / stored)
                if not once:
                    dweight[columns] = dweight_rows
        if dhidden is not None:
            dhidden.mul_((upstream.factor / stored)[:, None])
        return dhidden, dweight, dbias.to(self.bias.dtype) if dbias is not None and self.bias is not None else None

    def _dlogits(self, block: int, rows: slice, columns: slice, weight: Tensor, upstream: Upstream) -> Tensor:
        """Gradient at hidden @ weight.T + bias, divided by upstream.factor; statistics' dtype, [R, C]."""
        z = self.kept.get((block, columns.start))
        if z is None:
            z = self._logits(rows, columns, weight)
        elif self.kept_rows is not None:
            wanted = self.kept_rows[block]
            out = self.buffers[0][: len(wanted) * z.shape[1]].view(len(wanted), z.shape[1])
            z = torch.index_select(z, 0, wanted, out=out)
        softcap, slope = self.settings.softcap, None
        if softcap is not None:  # d(c tanh(x / c)) = 1 - tanh^2, and tanh = z temperature / c
            slope = torch.div(z, self._per_row(self.inverse_temperature, rows), out=self._buffer(1, z))
            slope.div_(softcap).square_().neg_().add_(1)
        shifted = torch.sub(z, upstream.lse[rows, None], out=self._buffer(0, z))
        inside, column = self._targets_in(rows, columns)
        if upstream.dlogp is None or upstream.dentropy is None:
            dz = shifted.exp_()
        else:
            dlogp, dentropy, entropy = (x[rows, None] for x in (upstream.dlogp, upstream.dentropy, upstream.entropy))
            p = torch.exp(shifted.clamp_(min=MIN_LOGP), out=self._buffer(-1, z))
            dz = shifted.add_(entropy).mul_(dentropy).add_(dlogp).mul_(p)
        _put(dz, (inside, column), upstream.at_target[rows])
        dz = dz if slope is None else dz.mul_(slope)
        return dz if upstream.flows is None else dz.masked_fill_(~upstream.flows[rows, None], 0.0)

    def _logits(
        self, rows: slice, columns: slice, weight: Tensor, exact: Tensor | None = None, out: Tensor | None = None
    ) -> Tensor:
        """One tile [R, C] in the statistics' dtype, into `out` or the first buffer.

        exact: [N] better values of hidden . weight[target], put into the targets' places.
        """
        hidden = self.hidden[rows]
        z = self.buffers[0][: len(hidden) * len(weight)].view(len(hidden), len(weight)) if out is None else out
        if self.rounded:
            z.copy_(torch.mm(hidden, weight.t(), out=self._buffer(None, z)))
        else:
            torch.mm(hidden, weight.t(), out=z)
        if exact is not None:
            _put(z, self._targets_in(rows, columns), exact[rows])
        if self.bias is not None:
            z.add_(self.bias[columns])
        if self.settings.softcap is not None:
            z.div_(self.settings.softcap).tanh_().mul_(self.settings.softcap)
        if isinstance(self.inverse_temperature, Tensor) or self.inverse_temperature != 1.0:
            z.mul_(self._per_row(self.inverse_temperature, rows))
        return z

    def _target_logits(self) -> Tensor:
        """hidden . weight[target], [N], in the statistics' dtype, from inputs rounded as those of the products are."""
        logits = self.buffers[0].new_empty(len(self.targets))
        for rows in self.blocks:
            weight = self.weight[self.targets[rows].clamp(0, len(self.weight) - 1)].to(self.dtype).to(self.statistics)
            logits[rows] = (self.hidden[rows].to(self.statistics) * weight).sum(1)
        return logits

    def _targets_in(self, rows: slice, columns: slice) -> tuple[Tensor, Tensor]:
        """Of a tile's rows, [R]: whether their target lies in its columns; [R, 1]: where, counted within the tile, or anywhere."""
        column = self.targets[rows] - columns.start
        width = columns.stop - columns.start
        return (column >= 0) & (column < width), column.clamp(0, width - 1)[:, None]

    def _vocabulary(self) -> Iterator[tuple[slice, Tensor]]:
        for start in range(0, self.settings.valid_vocab, self.sizes.tile_vocab):
            columns = slice(start, min(start + self.sizes.tile_vocab, self.settings.valid_vocab))
            yield columns, self.weight[columns].to(self.dtype)

    def _buffer(self, which: int | None, like: Tensor) -> Tensor:
        """A workspace in the shape of a tile; None: the one in the dtype of the products."""
        buffer = self.product if which is None else self.buffers[which]
        return buffer[: like.numel()].view_as(like)

    def _per_row(self, value: float | Tensor, rows: slice) -> float | Tensor:
        return value[rows, None] if isinstance(value, Tensor) else value

    def _add_product(self, total: Tensor, a: Tensor, b: Tensor) -> None:
        if self.rounded:
            total.add_(torch.mm(a, b))
        else:
            total.addmm_(a, b)


def _put(tile: Tensor, at: tuple[Tensor, Tensor], values: Tensor | float) -> None:
    """values: [R] or a number, into the tile where `at` has it, as _targets_in says it."""
    inside, column = at
    there = tile.gather(1, column)[:, 0]
    tile.scatter_(1, column, torch.where(inside, values, there)[:, None])
