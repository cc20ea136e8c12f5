"""linear_logprob in plain torch: tiles of logits in one bounded workspace, an online softmax, and a backward over the
same tiles.

Legend: N selected rows, H hidden size, V vocabulary, R rows and C vocabulary entries of one tile.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# A tile is large enough for full matrix-product speed and small enough that the passes over it stay near the cache: at
# V = 49152 and H = 576 on two cores 94 % of the time is matrix products, and halving or doubling either number changes
# nothing.
TILE_VOCAB = 4096
TILE_ROWS = 1024
# exp of it is exactly zero in float64 too. Where p log p is needed, a logit of -inf (a bias that forbids a token) is
# raised to it, so that 0 * inf does not come out of the sum.
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
    """logp [N] and entropy [N] (meaningful only with settings.entropy); temperature [N] overrides
    settings.temperature."""
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
            logp[live], lse[live], entropy[live] = tiles.forward(keep=any(ctx.needs_input_grad[:3]))
        ctx.settings, ctx.kept = settings, list(tiles.kept)
        ctx.set_materialize_grads(False)
        if not settings.entropy:
            ctx.mark_non_differentiable(entropy)
        # The kept tiles are saved as tensors: so they go with the graph, not with the last reference to a result.
        results = logp, lse, entropy
        ctx.save_for_backward(hidden, weight, bias, targets, temperature, *results, live, *tiles.kept.values())
        return logp, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx, dlogp, dentropy):  # type: ignore[no-untyped-def]
        hidden, weight, bias, targets, temperature, logp, lse, entropy, live, *kept = ctx.saved_tensors
        dlogp = torch.zeros_like(logp) if dlogp is None else dlogp
        flows = dlogp != 0 if dentropy is None else (dlogp != 0) | (dentropy != 0)
        chosen = torch.nonzero(flows[live])[:, 0]
        rows = live[chosen]
        upstream = _Upstream(
            dlogp=dlogp[rows],
            dentropy=None if dentropy is None else dentropy[rows],
            logp=logp[rows],
            lse=lse[rows],
            entropy=entropy[rows],
        )
        with torch.autocast(hidden.device.type, enabled=False):
            tiles = _Tiles(hidden, weight, bias, targets, temperature, rows, ctx.settings)
            # Kept tiles bind the rows to the forward's blocks, which few rows would leave nearly empty.
            if kept and 2 * len(chosen) >= len(live):
                tiles.reuse(dict(zip(ctx.kept, kept, strict=True)), chosen, len(live))
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
    """The selected rows against the vocabulary; a tile is named by its block of rows and its first column."""

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
        num_rows, everything = len(selected), len(selected) == len(targets)
        self.hidden = (hidden if everything else hidden.index_select(0, selected)).to(settings.compute_dtype)  # [N, H]
        self.targets = targets.index_select(0, selected).long()  # [N]
        self.weight, self.bias, self.settings = weight, bias, settings
        self.dtype = settings.compute_dtype
        self.statistics = torch.promote_types(self.dtype, torch.float32)
        # True: the matrix products return fewer digits than the sums over them keep.
        self.rounded = self.dtype != self.statistics
        self.inverse_temperature: float | Tensor = 1.0 / settings.temperature
        if temperature is not None:
            self.inverse_temperature = temperature.index_select(0, selected).to(self.statistics).reciprocal()  # [N]
        # One buffer for a tile, one for the slope of the soft-cap, one for the probabilities beside their logarithms.
        buffers = 1 + (settings.softcap is not None) + settings.entropy
        per_entry = buffers * self.statistics.itemsize + (self.dtype.itemsize if self.rounded else 0)
        workspace = int(settings.workspace_mb * 2**20)
        self.tile_vocab = max(1, min(TILE_VOCAB, settings.valid_vocab, workspace // per_entry // 64))
        self.tile_rows = max(1, min(TILE_ROWS, workspace // per_entry // self.tile_vocab))
        entries = min(self.tile_rows, num_rows) * self.tile_vocab
        self.buffers = [hidden.new_empty(entries, dtype=self.statistics) for _ in range(buffers)]
        self.product = hidden.new_empty(entries, dtype=self.dtype) if self.rounded else self.buffers[0]
        # What the buffers leave of the workspace holds whole tiles from the forward to the backward.
        self.keepable = (workspace - entries * per_entry) // self.statistics.itemsize
        self.kept: dict[tuple[int, int], Tensor] = {}
        starts = range(0, num_rows, self.tile_rows)
        self.blocks = [slice(start, min(start + self.tile_rows, num_rows)) for start in starts]
        # Of each block, the rows of its kept tiles that are still wanted; None: all.
        self.kept_rows: list[Tensor] | None = None

    def reuse(self, kept: dict[tuple[int, int], Tensor], chosen: Tensor, num_live: int) -> None:
        """Takes the tiles of a forward over num_live rows. chosen: [N], which of them are the rows selected here."""
        self.kept = kept
        if len(chosen) == num_live:
            return
        starts = range(0, num_live, self.tile_rows)
        edges = torch.searchsorted(chosen, torch.tensor([*starts, num_live], device=chosen.device)).tolist()
        self.blocks = [slice(a, b) for a, b in zip(edges, edges[1:], strict=False)]
        self.kept_rows = [chosen[block] - start for block, start in zip(self.blocks, starts, strict=True)]

    def forward(self, *, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
        """logp, lse and entropy of the selected rows, [N] each; the entropy means something only when settings ask for
        it.

        keep: a backward may follow; hold on to the tiles that fit.
        """
        top = self.buffers[0].new_full((len(self.targets),), torch.finfo(self.statistics).min / 2)
        others, weighted, target = torch.zeros_like(top), torch.zeros_like(top), torch.zeros_like(top)
        exact = self._target_logits() if self.rounded else None
        for columns, weight in self._vocabulary():
            for block, rows in enumerate(self.blocks):
                entries = (rows.stop - rows.start) * len(weight)
                out = None
                if keep and entries <= self.keepable:
                    self.keepable -= entries
                    out = self.kept[block, columns.start] = self.buffers[0].new_empty(
                        rows.stop - rows.start, len(weight)
                    )
                z = self._logits(rows, columns, weight, exact, out)
                inside, column = self._targets_in(rows, columns)
                target[rows][inside] = z[inside, column]
                self._online_softmax(z, (inside, column), top[rows], others[rows], weighted[rows])
        # The target stays out of the sum over the others: beside its 1 the digits of a small sum, and of the logp,
        # would be lost.
        t = target - top
        total = others + t.exp()
        logp = torch.where(t > -1, -torch.log1p(others * torch.exp(-t.clamp(min=-1))), t - total.log())
        log_total = torch.where(t > -1, t - logp, total.log())
        return logp, top + log_total, log_total - (weighted + t.exp() * t.clamp(min=MIN_LOGP)) / total

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
            p[at_target] = 0
            weighted.add_(others * shift).mul_(rescale).add_(shifted.mul_(p).sum(1))
        else:
            p = shifted.exp_()
            p[at_target] = 0
        others.mul_(rescale).add_(p.sum(1))
        top.copy_(new_top)

    def backward(
        self, upstream: _Upstream, need_hidden: bool, need_weight: bool, need_bias: bool
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Gradients: of the selected rows' hidden states in the statistics' dtype, of weight and bias in their own."""
        # A factor of a whole row of dz, here -dlogp / temperature, is applied to the H numbers of the row instead of to
        # V.
        scale = -self.inverse_temperature * (
            torch.ones_like(upstream.lse) if upstream.dentropy is not None else upstream.dlogp
        )
        scaled = (self.hidden.to(self.statistics) * scale[:, None]).to(self.dtype)
        dhidden = self.hidden.new_zeros(self.hidden.shape, dtype=self.statistics) if need_hidden else None
        dweight = torch.zeros_like(self.weight) if need_weight else None
        once = self.weight.dtype == self.statistics  # dweight itself can hold the running sums
        dbias = torch.zeros_like(self.bias, dtype=self.statistics) if need_bias and self.bias is not None else None
        for columns, weight in self._vocabulary() if len(scale) else ():
            dweight_rows = None  # summed over all tiles in the statistics' dtype and rounded once
            if dweight is not None:
                dweight_rows = dweight[columns] if once else dweight[columns].to(self.statistics)
            for block, rows in enumerate(self.blocks):
                dz = self._dlogits(block, rows, columns, weight, upstream)
                if dbias is not None:
                    dbias[columns] += torch.mv(dz.t(), scale[rows])
                if self.rounded:
                    dz = self._buffer(None, dz).copy_(dz)
                if dhidden is not None:
                    self._add_product(dhidden[rows], dz, weight)
                if dweight_rows is not None:
                    self._add_product(dweight_rows, dz.t(), scaled[rows])
            if dweight is not None and dweight_rows is not None and not once:
                dweight[columns] = dweight_rows
        if dhidden is not None:
            dhidden.mul_(scale[:, None])
        return dhidden, dweight, dbias.to(self.bias.dtype) if dbias is not None and self.bias is not None else None

    def _dlogits(self, block: int, rows: slice, columns: slice, weight: Tensor, upstream: _Upstream) -> Tensor:
        """Gradient at hidden @ weight.T + bias, divided by the `scale` of `backward`; statistics' dtype, [R, C]."""
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
        logp = upstream.logp[rows][inside]
        at_target = torch.expm1(logp)  # p - 1 keeps its digits for a target that is nearly certain
        if upstream.dentropy is None:
            dz = shifted.exp_()
        else:
            dlogp, dentropy, entropy = (x[rows] for x in (upstream.dlogp, upstream.dentropy, upstream.entropy))
            p = torch.exp(shifted.clamp_(min=MIN_LOGP), out=self._buffer(-1, z))
            dz = shifted.add_(entropy[:, None]).mul_(dentropy[:, None]).add_(dlogp[:, None]).mul_(p)
            bounded = logp.clamp(min=MIN_LOGP)
            at_target = at_target * dlogp[inside] + logp.exp() * dentropy[inside] * (bounded + entropy[inside])
        dz[inside, column] = at_target
        return dz if slope is None else dz.mul_(slope)

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
            inside, column = self._targets_in(rows, columns)
            z[inside, column] = exact[rows][inside]
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
            weight = self.weight[self.targets[rows]].to(self.dtype).to(self.statistics)
            logits[rows] = (self.hidden[rows].to(self.statistics) * weight).sum(1)
        return logits

    def _targets_in(self, rows: slice, columns: slice) -> tuple[Tensor, Tensor]:
        """Rows of a tile whose target lies in its columns, and those columns, counted within the tile."""
        column = self.targets[rows] - columns.start
        inside = torch.nonzero((column >= 0) & (column < columns.stop - columns.start))[:, 0]
        return inside, column[inside]

    def _vocabulary(self) -> Iterator[tuple[slice, Tensor]]:
        for start in range(0, self.settings.valid_vocab, self.tile_vocab):
            columns = slice(start, min(start + self.tile_vocab, self.settings.valid_vocab))
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
