"""linear_logprob as operators of torch.library: which rows take part, and what goes from the forward to the backward.

Legend: N rows, H hidden size, V vocabulary.

Only what torch.library can carry passes between the two: tensors whose sizes follow from those of the inputs, and plain numbers. So
torch.compile takes a call as one node of its graph, and another N needs no other graph.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from swirl_kernels.backend import choose_backend
from swirl_kernels.linear_logprob.autograd import Kept, Settings, Tiles, Upstream, tiles_of


class _Selected(NamedTuple):
    """rows: numbers of those that are computed, int64; None: all N. active: bool [N], those that count among them; None: all."""

    rows: Tensor | None
    active: Tensor | None

    def take(self, x: Tensor) -> Tensor:
        return x if self.rows is None else x.index_select(0, self.rows)


def _implementation(hidden: Tensor, settings: Settings) -> type[Tiles]:
    return tiles_of(choose_backend("linear_logprob", hidden, settings.compute_dtype), settings)


def _refuse_wrong(targets: Tensor, temperatures: Tensor | None, live: Tensor, settings: Settings) -> None:
    wrong = torch.nonzero(live & ((targets < 0) | (targets >= settings.valid_vocab)))
    if len(wrong):
        row = int(wrong[0])
        raise ValueError(
            f"targets[{row}] is {int(targets[row])}, outside the vocabulary [0, {settings.valid_vocab}); rows to leave out "
            f"carry ignore_index={settings.ignore_index}"
        )
    if temperatures is None:
        return
    wrong = torch.nonzero(live & ~((temperatures > 0) & temperatures.isfinite()))
    if len(wrong):
        row = int(wrong[0])
        raise ValueError(f"temperature[{row}] is {float(temperatures[row])}; it must be positive and finite")


def _tiles(
    selected: _Selected,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    temperatures: Tensor | None,
    settings: Settings,
) -> Tiles:
    rows, places = selected.take(hidden), selected.take(targets)
    temperature = None if temperatures is None else selected.take(temperatures)
    return _implementation(hidden, settings)(rows, weight, bias, places, temperature, settings)


@torch.library.custom_op("swirl_kernels::linear_logprob", mutates_args=())
def linear_logprob_forward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    temperatures: Tensor | None,
    compute_dtype: torch.dtype,
    temperature: float,
    softcap: float | None,
    valid_vocab: int,
    entropy: bool,
    ignore_index: int,
    workspace_mb: float,
    all_rows: bool,
    invariant: bool,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """logp, lse, entropy [N], and what Kept holds (nothing without `keep`), of the arguments that linear_logprob has looked at.

    temperatures: [N], in the place of temperature. all_rows: every row is computed and nothing is asked of the device; False: only those
    that count, after a look at targets and temperatures, which raises ValueError.
    """
    settings = Settings(
        compute_dtype, temperature, softcap, valid_vocab, entropy, ignore_index, workspace_mb, all_rows, invariant
    )
    live = targets != ignore_index
    if all_rows:
        selected = _Selected(None, live)
    else:
        _refuse_wrong(targets, temperatures, live, settings)
        rows = torch.nonzero(live)[:, 0]
        selected = _Selected(None if len(rows) == len(targets) else rows, None)
    results = [hidden.new_zeros(len(targets), dtype=settings.statistics) for _ in range(3)]
    kept = Kept(*(hidden.new_empty(size, dtype=dtype) for size, dtype in _kept_sizes(hidden, weight, settings, keep)))
    if len(targets) and (selected.rows is None or len(selected.rows)):
        with torch.autocast(hidden.device.type, enabled=False), torch.cuda.device_of(hidden):
            tiles = _tiles(selected, hidden, weight, bias, targets, temperatures, settings)
            for out, x in zip(results, tiles.forward(kept if keep and kept.logits.numel() else None), strict=True):
                if selected.rows is not None:
                    out.index_copy_(0, selected.rows, x)
                else:
                    out.copy_(x if selected.active is None else x.masked_fill(~selected.active, 0.0))
    return (*results, *kept)  # type: ignore[return-value]


def _kept_sizes(hidden: Tensor, weight: Tensor, settings: Settings, keep: bool) -> tuple[tuple[Any, torch.dtype], ...]:
    """Elements and types of Kept's tensors."""
    num_logits, dtype, num_tops = _implementation(hidden, settings).keepable(hidden.shape[0], weight, settings)
    return (num_logits if keep else 0, dtype), (num_tops if keep else 0, torch.float32)


@linear_logprob_forward.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    temperatures: Tensor | None,
    *options: Any,
) -> tuple[Tensor, ...]:
    *numbers, keep = options
    settings = Settings(*numbers)
    results = [hidden.new_empty(targets.shape[0], dtype=settings.statistics) for _ in range(3)]
    return (*results, *(hidden.new_empty(n, dtype=t) for n, t in _kept_sizes(hidden, weight, settings, keep)))


@torch.library.custom_op("swirl_kernels::linear_logprob_backward", mutates_args=())
def linear_logprob_backward(
    dlogp: Tensor | None,
    dentropy: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    temperatures: Tensor | None,
    logp: Tensor,
    lse: Tensor,
    entropies: Tensor,
    kept_logits: Tensor,
    kept_tops: Tensor,
    compute_dtype: torch.dtype,
    temperature: float,
    softcap: float | None,
    valid_vocab: int,
    entropy: bool,
    ignore_index: int,
    workspace_mb: float,
    all_rows: bool,
    invariant: bool,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden, weight and bias in their own types; one without elements where it is not needed."""
    settings = Settings(
        compute_dtype, temperature, softcap, valid_vocab, entropy, ignore_index, workspace_mb, all_rows, invariant
    )
    needs = need_hidden, need_weight, need_bias
    dlogp = torch.zeros_like(logp) if dlogp is None else dlogp
    live = targets != ignore_index
    flows = live & (dlogp != 0 if dentropy is None else (dlogp != 0) | (dentropy != 0))
    places, num_live = None, len(targets)
    if all_rows:
        selected = _Selected(None, flows)
    else:
        rows = torch.nonzero(flows)[:, 0]
        selected = _Selected(None if len(rows) == len(targets) else rows, None)
        if selected.rows is not None and kept_logits.numel():
            num_live = int(live.sum())
            places = None if len(rows) == num_live else (live.cumsum(0) - 1)[rows]
    if not len(targets) or (selected.rows is not None and not len(selected.rows)):
        inputs = zip((hidden, weight, bias), needs, strict=True)
        return tuple(hidden.new_empty(0) if x is None or not need else x.new_zeros(x.shape) for x, need in inputs)  # type: ignore[return-value]
    with torch.autocast(hidden.device.type, enabled=False), torch.cuda.device_of(hidden):
        tiles = _tiles(selected, hidden, weight, bias, targets, temperatures, settings)
        if kept_logits.numel():
            tiles.reuse(Kept(kept_logits, kept_tops), places, num_live)
        upstream = Upstream.of(
            selected.take(dlogp),
            None if dentropy is None else selected.take(dentropy),
            selected.take(logp),
            selected.take(lse),
            selected.take(entropies),
            tiles.inverse_temperature,
            selected.active,
        )
        dhidden, dweight, dbias = tiles.backward(upstream, *needs)
    if dhidden is not None:
        del tiles  # with its copy of the rows, which this one replaces
        dhidden = dhidden.to(hidden.dtype)
        if selected.rows is not None:
            dhidden = hidden.new_zeros(hidden.shape).index_copy_(0, selected.rows, dhidden)
    found = dhidden, dweight, dbias
    return tuple(hidden.new_empty(0) if x is None else x for x in found)  # type: ignore[return-value]


@linear_logprob_backward.register_fake
def _(
    dlogp: Tensor | None,
    dentropy: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, ...]:
    inputs = zip((hidden, weight, bias), rest[-3:], strict=True)
    return tuple(x.new_empty(x.shape) if need and x is not None else hidden.new_empty(0) for x, need in inputs)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, keep = inputs
    ctx.options = tensors[5:]
    entropy, logp, entropies = ctx.options[4], output[0], output[2]
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*(x for x in output if x is not logp and not (entropy and x is entropies)))
    ctx.save_for_backward(*tensors[:5], *output)


def _gradients(ctx: Any, dlogp: Tensor | None, *others: Tensor | None) -> tuple[Tensor | None, ...]:
    dentropy = others[1]
    needs = ctx.needs_input_grad[:3]
    found = linear_logprob_backward(dlogp, dentropy, *ctx.saved_tensors, *ctx.options, *needs)
    return (*(x if need else None for x, need in zip(found, needs, strict=True)), *[None] * 12)


linear_logprob_forward.register_autograd(_gradients, setup_context=_save)


# For torch's FlopCounterMode, which does not see inside an operator; of shapes, so rows that are left out count as well.
@register_flop_formula(torch.ops.swirl_kernels.linear_logprob)
def _(hidden: tuple[int, int], weight: tuple[int, int], *_: Any, **__: Any) -> int:
    return 2 * hidden[0] * hidden[1] * weight[0]


@register_flop_formula(torch.ops.swirl_kernels.linear_logprob_backward)
def _(_dlogp: Any, _dentropy: Any, hidden: tuple[int, int], weight: tuple[int, int], *rest: Any, **__: Any) -> int:
    """Of the gradients that are asked for, and the logits that are made again."""
    need_hidden, need_weight, _ = rest[-3:]
    (kept,) = rest[6]
    logits = hidden[0] * weight[0]
    return 2 * hidden[1] * (logits * (need_hidden + need_weight) + max(logits - kept, 0))
