"""linear_logprob in plain torch: tiles of logits in one reused workspace, an online softmax, and a backward that recomputes them.

Legend: N live rows, H hidden size, V vocabulary, R rows and C vocabulary entries of one tile.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Tile: wide enough for full matrix-product speed, small enough that the passes over it stay near the cache.
TILE_VOCAB = 4096
TILE_ROWS = 1024
# exp of it is exactly zero in float64 too. Where p log p is needed, a logit of -inf (a bias that forbids a token) is raised to it,
# so that 0 * inf does not come out of the sum.
MIN_LOGP = -1e4


@dataclass(frozen=True)
class Settings:
    """The checked arguments of linear_logprob that are no tensors. compute_dtype: of the matrix products."""

    compute_dtype: torch.dtype
    temperature: float
    softcap: float | None
    valid_vocab: int
    entropy: bool
    ignore_index: int
    workspace_mb: float


def linear_logprob_torch(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, temperature: Tensor | None, settings: Settings
) -> tuple[Tensor, Tensor]:
    """logp [N] and entropy [N] (zeros unless settings.entropy); temperature [N] overrides settings.temperature."""
    logp, entropy = _LinearLogprob.apply(hidden, weight, bias, targets, temperature, settings)
    return logp, entropy


class _LinearLogprob(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, temperature, settings):  # type: ignore[no-untyped-def]
        statistics = torch.promote_types(settings.compute_dtype, torch.float32)
        live = torch.nonzero(targets != settings.ignore_index)[:, 0]
        logp, lse, entropy = (hidden.new_zeros(len(targets), dtype=statistics) for _ in range(3))
        with torch.autocast(hidden.device.type, enabled=False):
            tiles = _Tiles(hidden, weight, bias, targets, temperature, live, settings)
            logp[live], lse[live], entropy[live] = tiles.forward()
        ctx.settings = settings
        ctx.set_materialize_grads(False)
        if not settings.entropy:
            ctx.mark_non_differentiable(entropy)
        ctx.save_for_backward(hidden, weight, bias, targets, temperature, logp, lse, entropy)
        return logp, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx, dlogp, dentropy):  # type: ignore[no-untyped-def]
        hidden, weight, bias, targets, temperature, logp, lse, entropy = ctx.saved_tensors
        dlogp = torch.zeros_like(logp) if dlogp is None else dlogp
        live = dlogp != 0 if dentropy is None else (dlogp != 0) | (dentropy != 0)
        rows = torch.nonzero(live & (targets != ctx.settings.ignore_index))[:, 0]
        with torch.autocast(hidden.device.type, enabled=False):
            tiles = _Tiles(hidden, weight, bias, targets, temperature, rows, ctx.settings)
            upstream = _Upstream(
                dlogp=dlogp[rows],
                dentropy=None if dentropy is None else dentropy[rows],
                logp=logp[rows],
                lse=lse[rows],
                entropy=entropy[rows],
            )
            dhidden, dweight, dbias = tiles.backward(upstream, *ctx.needs_input_grad[:3])
        if dhidden is not None:
            dhidden = torch.zeros_like(hidden).index_copy_(0, rows, dhidden.to(hidden.dtype))
        return dhidden, dweight, dbias, None, None, None


@dataclass(frozen=True)
class _Upstream:
    """What the backward knows of its rows, each [N]: two gradients and three results of the forward."""

    dlogp: Tensor
    dentropy: Tensor | None
    logp: Tensor
    lse: Tensor
    entropy: Tensor


class _Tiles:
    """The selected rows against the vocabulary, tile by tile."""

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: Tensor | None,
        rows: Tensor,
        settings: Settings,
    ) -> None:
        everything = len(rows) == len(targets)
        self.hidden = (hidden if everything else hidden.index_select(0, rows)).to(settings.compute_dtype)  # [N, H]
        self.targets = targets.index_select(0, rows).long()  # [N]
        self.weight, self.bias, self.settings = weight, bias, settings
        self.dtype = settings.compute_dtype
        self.statistics = torch.promote_types(self.dtype, torch.float32)
        self.rounded = self.dtype != self.statistics  # the matrix products return fewer digits than the sums over them keep
        self.inverse_temperature: float | Tensor = 1.0 / settings.temperature
        if temperature is not None:
            self.inverse_temperature = temperature.index_select(0, rows).to(self.statistics).reciprocal()  # [N]
        # One buffer for the logits and one each for what the soft-cap's and the entropy's gradients remember of them.
        buffers = 1 + (settings.softcap is not None) + settings.entropy
        budget = int(settings.workspace_mb * 2**20) // (
            buffers * self.statistics.itemsize + (self.dtype.itemsize if self.rounded else 0)
        )
        self.tile_vocab = max(1, min(TILE_VOCAB, settings.valid_vocab, budget // 64))
        self.tile_rows = max(1, min(TILE_ROWS, budget // self.tile_vocab))
        entries = min(self.tile_rows, len(rows)) * self.tile_vocab
        self.buffers = [hidden.new_empty(entries, dtype=self.statistics) for _ in range(buffers)]
        self.product = hidden.new_empty(entries, dtype=self.dtype) if self.rounded else self.buffers[0]

    def forward(self) -> tuple[Tensor, Tensor, Tensor]:
        """logp, lse and entropy of the selected rows, [N] each; the entropy means something only when settings ask for it."""
        n = len(self.targets)
        top = self.buffers[0].new_full((n,), torch.finfo(self.statistics).min / 2)
        total, weighted, target = torch.zeros_like(top), torch.zeros_like(top), torch.zeros_like(top)
        exact = self._target_logits() if self.rounded else None
        for columns, weight in self._vocabulary():
            for rows in self._rows():
                z = self._logits(rows, columns, weight, exact)
                inside, column = self._targets_in(rows, columns)
                target[rows][inside] = z[inside, column]
                self._online_softmax(z, top[rows], total[rows], weighted[rows])
        # target - top loses nothing when the target is nearly certain; target - lse would lose all digits of a small logp.
        return target - top - total.log(), top + total.log(), total.log() - weighted / total

    def _online_softmax(self, z: Tensor, top: Tensor, total: Tensor, weighted: Tensor) -> None:
        """Folds a tile into the running maximum, sum of exp(z - top) and sum of (z - top) exp(z - top), in place."""
        new_top = torch.maximum(top, z.amax(1))
        shift = top - new_top
        rescale = shift.exp()
        z.sub_(new_top[:, None])
        if self.settings.entropy:
            z.clamp_(min=MIN_LOGP)
            p = torch.exp(z, out=self._buffer(-1, z))
            weighted.add_(total * shift).mul_(rescale).add_(z.mul_(p).sum(1))
        else:
            p = z.exp_()
        total.mul_(rescale).add_(p.sum(1))
        top.copy_(new_top)

    def backward(
        self, upstream: _Upstream, need_hidden: bool, need_weight: bool, need_bias: bool
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Gradients: of the selected rows' hidden states in the statistics' dtype, of weight and of bias in their own."""
        # A factor of a whole row of dz, here -dlogp / temperature, is applied to H numbers of the row instead of V.
        scale = -self.inverse_temperature * (upstream.dlogp if upstream.dentropy is None else torch.ones_like(upstream.dlogp))
        dhidden = self.hidden.new_zeros(self.hidden.shape, dtype=self.statistics) if need_hidden else None
        dweight = torch.empty_like(self.weight) if need_weight else None
        dbias = torch.zeros_like(self.bias, dtype=self.statistics) if need_bias and self.bias is not None else None
        scaled = (self.hidden.to(self.statistics) * scale[:, None]).to(self.dtype)
        if dweight is not None:
            dweight[0 if len(scale) == 0 else self.settings.valid_vocab :] = 0
        for columns, weight in self._vocabulary() if len(scale) else ():
            dweight_rows = None
            if dweight is not None:
                dweight_rows = dweight[columns] if dweight.dtype == self.statistics else weight.new_empty(weight.shape, dtype=self.statistics)
            for rows in self._rows():
                dz = self._dlogits(rows, columns, weight, upstream)
                if dbias is not None:
                    dbias[columns] += torch.mv(dz.t(), scale[rows])
                if self.rounded:
                    dz = self._buffer(None, dz).copy_(dz)
                if dhidden is not None:
                    self._add_product(dhidden[rows], dz, weight, first=columns.start == 0)
                if dweight_rows is not None:
                    self._add_product(dweight_rows, dz.t(), scaled[rows], first=rows.start == 0)
            if dweight is not None and dweight_rows is not None and dweight.dtype != self.statistics:
                dweight[columns] = dweight_rows
        if dhidden is not None:
            dhidden.mul_(scale[:, None])
        return dhidden, dweight, None if dbias is None or self.bias is None else dbias.to(self.bias.dtype)

    def _dlogits(self, rows: slice, columns: slice, weight: Tensor, upstream: _Upstream) -> Tensor:
        """Gradient at hidden @ weight.T + bias, divided by the `scale` of `backward`: [R, C] in the statistics' dtype."""
        z = self._logits(rows, columns, weight)
        softcap = self.settings.softcap
        slope = None
        if softcap is not None:  # d(c tanh(x / c)) = 1 - tanh^2, and tanh = z temperature / c
            slope = torch.div(z, self._per_row(self.inverse_temperature, rows), out=self._buffer(1, z))
            slope.div_(softcap).square_().neg_().add_(1)
        z.sub_(upstream.lse[rows, None])
        inside, column = self._targets_in(rows, columns)
        logp = upstream.logp[rows][inside]
        # p - 1 of a target that is nearly certain keeps its digits only as expm1(logp).
        at_target = torch.expm1(logp)
        if upstream.dentropy is None:
            dz = z.exp_()
        else:
            dlogp, dentropy, entropy = (x[rows] for x in (upstream.dlogp, upstream.dentropy, upstream.entropy))
            z.clamp_(min=MIN_LOGP)
            p = torch.exp(z, out=self._buffer(-1, z))
            dz = z.add_(entropy[:, None]).mul_(dentropy[:, None]).add_(dlogp[:, None]).mul_(p)
            at_target = at_target * dlogp[inside] + logp.exp() * dentropy[inside] * (logp + entropy[inside])
        dz[inside, column] = at_target
        return dz if slope is None else dz.mul_(slope)

    def _logits(self, rows: slice, columns: slice, weight: Tensor, exact: Tensor | None = None) -> Tensor:
        """One tile [R, C] in the statistics' dtype. exact: [N] what to put in the places of the targets, before bias."""
        hidden = self.hidden[rows]
        z = self.buffers[0][: len(hidden) * len(weight)].view(len(hidden), len(weight))
        torch.mm(hidden, weight.t(), out=self._buffer(None, z))
        if self.rounded:
            z.copy_(self._buffer(None, z))
        if exact is not None:
            inside, column = self._targets_in(rows, columns)
            z[inside, column] = exact[rows][inside]
        if self.bias is not None:
            z.add_(self.bias[columns])
        if self.settings.softcap is not None:
            z.div_(self.settings.softcap).tanh_().mul_(self.settings.softcap)
        if not (isinstance(self.inverse_temperature, float) and self.inverse_temperature == 1.0):
            z.mul_(self._per_row(self.inverse_temperature, rows))
        return z

    def _target_logits(self) -> Tensor:
        """hidden . weight[target] of every row in the statistics' dtype, from inputs rounded as the products' inputs are."""
        logits = [
            (self.hidden[rows].to(self.statistics) * self.weight[self.targets[rows]].to(self.dtype).to(self.statistics)).sum(1)
            for rows in self._rows()
        ]
        return torch.cat(logits) if logits else self.buffers[0].new_zeros(0)

    def _targets_in(self, rows: slice, columns: slice) -> tuple[Tensor, Tensor]:
        """Rows of the tile whose target lies in its columns, and those columns, counted within the tile."""
        column = self.targets[rows] - columns.start
        inside = torch.nonzero((column >= 0) & (column < columns.stop - columns.start))[:, 0]
        return inside, column[inside]

    def _vocabulary(self) -> Iterator[tuple[slice, Tensor]]:
        for start in range(0, self.settings.valid_vocab, self.tile_vocab):
            columns = slice(start, min(start + self.tile_vocab, self.settings.valid_vocab))
            yield columns, self.weight[columns].to(self.dtype)

    def _rows(self) -> Iterator[slice]:
        for start in range(0, len(self.targets), self.tile_rows):
            yield slice(start, min(start + self.tile_rows, len(self.targets)))

    def _buffer(self, which: int | None, like: Tensor) -> Tensor:
        """A workspace in the shape of a tile; None: the one in the dtype of the products."""
        buffer = self.product if which is None else self.buffers[which]
        return buffer[: like.numel()].view_as(like)

    def _per_row(self, value: float | Tensor, rows: slice) -> float | Tensor:
        return value[rows, None] if isinstance(value, Tensor) else value

    def _add_product(self, total: Tensor, a: Tensor, b: Tensor, *, first: bool) -> None:
        """total += a @ b, or total = a @ b the first time."""
        if not self.rounded:
            total.addmm_(a, b, beta=0 if first else 1)
        elif first:
            total.copy_(torch.mm(a, b))
        else:
            total.add_(torch.mm(a, b))
