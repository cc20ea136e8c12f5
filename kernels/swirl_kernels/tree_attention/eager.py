"""tree_attention in plain torch: the parts of a TreePlan, one call each, merged by their log-sum-exp.

Legend: B batched calls (blocks x query heads per key head), H key heads, n queries and m keys of one call, D head
dimension, V that of values.

On a CPU a call is torch's own flash kernel, taken at the aten level because only there it hands out the log-sum-exp and
takes a merged one back. With a soft-cap, and on other devices, a call is explicit math over chunks of queries.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from swirl_kernels.tree_attention.plan import Part, Rows, TreePlan, token_major

SCORE_ELEMENTS = 1 << 24  # scores held at once where they are computed explicitly (64 MB in fp32)
SPLIT_QUERIES = 256  # a query block is split over threads only into pieces at least this long


def forward(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, plan: TreePlan, scale: float, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """q [Hq, Q, D] in ascending preorder, k [Hkv, T, D], v [Hkv, T, V], sinks [Hq] or None; everything checked by the caller.
    Returns [Hq, Q, V] and the log-sum-exp [Hq, Q].

    Where D and V differ, the narrower is filled up with zeros, which changes no score and no output: the flash kernel wants
    them alike.
    """
    width = max(q.shape[2], v.shape[2])
    q_, k_, v_ = (_wide(x, width) for x in (q, k, v))
    with torch.autocast(q.device.type, enabled=False):
        out, lse = _Calls(plan, scale, softcap, q, k).forward(q_, k_, v_, sinks)
    return _narrow(out, v.shape[2]), lse


def backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    out: Tensor,
    lse: Tensor,
    plan: TreePlan,
    scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and sinks, that of absent sinks [0]."""
    width = max(q.shape[2], v.shape[2])
    dout_, q_, k_, v_, out_ = (_wide(x, width) for x in (dout, q, k, v, out))
    with torch.autocast(q.device.type, enabled=False):
        grads = _Calls(plan, scale, softcap, q, k).backward(dout_, q_, k_, v_, out_, lse)
        dsinks = q.new_empty(0) if sinks is None else _sink_gradient(sinks, dout, out, lse)
    dq, dk, dv = (_narrow(grad, x.shape[2]) for grad, x in zip(grads, (q, k, v), strict=True))
    return dq, dk, dv, dsinks


def _wide(x: Tensor, width: int) -> Tensor:
    """Its last dimension contiguous and filled up to `width` with zeros."""
    if x.shape[2] != width:
        return F.pad(x, (0, width - x.shape[2]))
    return x if x.stride(-1) == 1 else x.contiguous()


def _narrow(x: Tensor, width: int) -> Tensor:
    return x if x.shape[2] == width else token_major(x, width).copy_(x[..., :width])


class _Calls:
    """Lays heads and blocks of each part out as one batch, calls the kernel, merges what comes back."""

    def __init__(self, plan: TreePlan, scale: float, softcap: float | None, q: Tensor, k: Tensor) -> None:
        self.plan, self.scale, self.softcap = plan, scale, softcap
        self.key_heads = k.shape[0]
        self.group = q.shape[0] // k.shape[0]
        # The flash kernel of the CPU takes neither a soft-cap nor CUDA tensors.
        self.flash = softcap is None and q.device.type == "cpu"
        self.accumulator = torch.promote_types(q.dtype, torch.float32)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None) -> tuple[Tensor, Tensor]:
        """out [Hq, Q, D] in q's dtype, lse [Hq, Q], of the sinks too: with it the backward is right as it is."""
        out = token_major(q, q.shape[2], self.accumulator)
        lse = torch.empty(q.shape[:2], dtype=self.accumulator, device=q.device)
        for part in self.plan.own:  # together they hold every query once
            o, s = self._forward_part(part, q, k, v)
            _put(out, part.queries.index, o)
            _put(lse, part.queries.index, s)
        for part in self._below():
            o, s = self._forward_part(part, q, k, v)
            rows = part.queries.index
            so_far = lse[:, rows]
            _put(out, rows, torch.lerp(out[:, rows], o, torch.sigmoid(s - so_far)[..., None]))
            _put(lse, rows, torch.logaddexp(so_far, s))
        if sinks is not None:
            keys, lse = lse, torch.logaddexp(lse, sinks.to(lse.dtype)[:, None])
            out *= (keys - lse).exp_()[..., None]
        return out.to(q.dtype), lse

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        dq, dk, dv = (token_major(x, x.shape[2], self.accumulator) for x in (q, k, v))
        dk.zero_(), dv.zero_()
        for part in self.plan.own:
            dq_part = self._backward_part(part, dout, q, k, v, out, lse, dk, dv)
            _put(dq, part.queries.index, dq_part)
        for part in self._below():
            dq_part = self._backward_part(part, dout, q, k, v, out, lse, dk, dv)
            _add(dq, part.queries.index, dq_part)
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)

    def _below(self) -> Iterator[Part]:
        """The parts without a triangle. The flash backward runs one thread per head and block, so a part is split until
        that keeps the threads evenly busy (9 heads of 64 on 2 threads: 150 -> 129 ms for 4800 x 720)."""
        heads, threads = self.key_heads * self.group, torch.get_num_threads()
        for part in self.plan.below:
            rows, n = part.queries.index, part.queries.length
            splits = 1
            while self.flash and heads * splits % threads and heads * splits < 8 * threads:
                splits += 1
            length = n // splits
            if splits == 1 or part.masked or length < SPLIT_QUERIES or not isinstance(rows, slice):
                yield part
                continue
            middle = rows.start + splits * length
            yield Part(Rows(slice(rows.start, middle), splits, length), part.keys)
            if middle < rows.stop:
                yield Part(Rows(slice(middle, rows.stop), 1, rows.stop - middle), part.keys)

    def _forward_part(self, part: Part, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """out and log-sum-exp of the part's real queries over its keys: [Hq, rows, D], [Hq, rows]."""
        q_, k_, v_ = self._queries(part, q), self._keys(part, k), self._keys(part, v)
        visible = self._visible(part)
        if self.flash:
            o, s = _flash_forward(q_, k_, v_, part.causal, visible, self.scale)
        else:
            o, s = _math_forward(q_, k_, v_, part.causal, visible, self.scale, self.softcap)
        return self._rows(part, o.to(self.accumulator)), self._rows(part, s)

    def _backward_part(
        self,
        part: Part,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        dk: Tensor,
        dv: Tensor,
    ) -> Tensor:
        """Adds to dk and dv, returns dq of the part's real queries [Hq, rows, D]."""
        dout_, q_, out_ = (self._queries(part, x) for x in (dout, q, out))
        lse_ = self._queries(part, lse[..., None])[..., 0]
        k_, v_, visible = self._keys(part, k), self._keys(part, v), self._visible(part)
        if self.flash:
            grads = _flash_backward(dout_, q_, k_, v_, out_, lse_, part.causal, visible, self.scale)
        else:
            grads = _math_backward(dout_, q_, k_, v_, out_, lse_, part.causal, visible, self.scale, self.softcap)
        dq_, dk_, dv_ = grads
        for total, share in ((dk, dk_), (dv, dv_)):
            share = share.unflatten(0, (part.queries.blocks, -1)).sum(1, dtype=self.accumulator)  # [blocks, H, m, D]
            if part.keys.blocks == 1:
                share = share.sum(0, keepdim=True)
            _add(total, part.keys.index, part.keys.drop_padding(share.transpose(0, 1)))
        return self._rows(part, dq_.to(self.accumulator))

    # The query heads of one key head become further blocks over the same keys, except under a mask: there they become
    # further queries (the mask says who sees what), which spares copying the keys of many short blocks for each of them.

    def _queries(self, part: Part, x: Tensor) -> Tensor:
        """[Hq, Q, D] -> [blocks * group, H, n, D], or masked [blocks, H, group * n, D]."""
        grid = part.queries.take(x).unflatten(0, (self.key_heads, self.group))
        return grid.permute(2, 0, 1, 3, 4).flatten(2, 3) if part.masked else grid.permute(2, 1, 0, 3, 4).flatten(0, 1)

    def _rows(self, part: Part, x: Tensor) -> Tensor:
        """The inverse: [blocks * group, H, n, …] or [blocks, H, group * n, …] -> [Hq, real rows, …]."""
        if part.masked:
            grid = x.unflatten(2, (self.group, -1)).movedim(0, 2).flatten(0, 1)
        else:
            grid = x.unflatten(0, (-1, self.group)).transpose(0, 2).flatten(0, 1)
        return part.queries.drop_padding(grid)

    def _keys(self, part: Part, x: Tensor) -> Tensor:
        """[Hkv, T, D] -> [blocks * group or blocks, H, m, D]; repeated, not copied, where all blocks read the same."""
        grid = part.keys.take(x).transpose(0, 1)[:, None]
        return grid.expand(part.queries.blocks, 1 if part.masked else self.group, *grid.shape[2:]).flatten(0, 1)

    def _visible(self, part: Part) -> Tensor | None:
        """[blocks, 1, group * n, m], True = visible; None where no mask is needed."""
        return self.plan.visible(part).repeat(1, self.group, 1)[:, None] if part.masked else None


def _sink_gradient(sinks: Tensor, dout: Tensor, out: Tensor, lse: Tensor) -> Tensor:
    """[Hq]: -sum(p dout . out) over the queries, p = exp(sink - lse): a sink is a key whose value is zero."""
    delta = (dout.to(lse.dtype) * out).sum(-1)
    return -((sinks.to(lse.dtype)[:, None] - lse).exp_() * delta).sum(1).to(sinks.dtype)


def _put(total: Tensor, rows: slice | Tensor, values: Tensor) -> None:
    if isinstance(rows, slice):
        total[:, rows] = values
    else:
        total.index_copy_(1, rows, values)


def _add(total: Tensor, rows: slice | Tensor, values: Tensor) -> None:
    if isinstance(rows, slice):
        total[:, rows] += values
    else:
        total.index_add_(1, rows, values)


def _bias(visible: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """The flash kernel adds its mask; a row that sees nothing (padding) comes back as zeros there."""
    if visible is None:
        return None
    return torch.zeros(visible.shape, dtype=dtype).masked_fill_(~visible, -math.inf)


def _flash_forward(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, visible: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, v, 0.0, causal, attn_mask=_bias(visible, q.dtype), scale=scale
    )
    return out, lse


def _flash_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    causal: bool,
    visible: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        dout, q, k, v, out, lse, 0.0, causal, attn_mask=_bias(visible, q.dtype), scale=scale
    )
    return dq, dk, dv


def _scores(
    q: Tensor, k: Tensor, rows: slice, causal: bool, visible: Tensor | None, scale: float, softcap: float | None
) -> Tensor:
    scores = torch.matmul(q, k.transpose(-2, -1)).mul_(scale)
    if softcap is not None:
        scores.div_(softcap).tanh_().mul_(softcap)
    if visible is not None:
        scores.masked_fill_(~visible[:, :, rows], -math.inf)
    if causal:
        index = torch.arange(k.shape[-2], device=k.device)
        scores.masked_fill_(index[None, :] > index[rows, None], -math.inf)
    return scores


def _chunks(q: Tensor, k: Tensor) -> Iterator[slice]:
    n, per_row = q.shape[-2], q.shape[0] * q.shape[1] * k.shape[-2]
    step = max(1, SCORE_ELEMENTS // max(1, per_row))
    for i in range(0, n, step):
        yield slice(i, min(i + step, n))


def _math_forward(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, visible: Tensor | None, scale: float, softcap: float | None
) -> tuple[Tensor, Tensor]:
    accumulator = torch.promote_types(q.dtype, torch.float32)
    q, k, v = q.to(accumulator), k.to(accumulator), v.to(accumulator)
    out, lse = torch.empty_like(q), q.new_empty(q.shape[:-1])
    for rows in _chunks(q, k):
        scores = _scores(q[:, :, rows], k, rows, causal, visible, scale, softcap)
        # A padded row sees nothing: its maximum must stay finite, else inf - inf makes it NaN.
        top = scores.amax(-1, keepdim=True).clamp(min=torch.finfo(accumulator).min)
        weights = scores.sub_(top).exp_()
        total = weights.sum(-1, keepdim=True)
        out[:, :, rows] = torch.matmul(weights, v) / total
        lse[:, :, rows] = (total.log() + top)[..., 0]
    return out, lse


def _math_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    causal: bool,
    visible: Tensor | None,
    scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    accumulator = torch.promote_types(q.dtype, torch.float32)
    dout, q, k, v, out = (x.to(accumulator) for x in (dout, q, k, v, out))
    delta = (dout * out).sum(-1, keepdim=True)
    dq, dk, dv = torch.empty_like(q), q.new_zeros(k.shape), q.new_zeros(v.shape)
    for rows in _chunks(q, k):
        dout_, q_ = dout[:, :, rows], q[:, :, rows]
        scores = _scores(q_, k, rows, causal, visible, scale, softcap)
        weights = (scores - lse[:, :, rows, None]).exp_()
        dv += torch.matmul(weights.transpose(-2, -1), dout_)
        dscores = torch.matmul(dout_, v.transpose(-2, -1)).sub_(delta[:, :, rows]).mul_(weights)
        if softcap is not None:
            # d tanh = 1 - tanh^2; where the mask put -inf the weight is zero already, and inf * 0 must not come out of
            # it.
            dscores.mul_(1 - scores.div_(softcap).clamp_(-1, 1).square_())
        dscores.mul_(scale)
        dq[:, :, rows] = torch.matmul(dscores, k)
        dk += torch.matmul(dscores.transpose(-2, -1), q_)
    return dq, dk, dv
