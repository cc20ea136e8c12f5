"""tree_attention as operators of PyTorch, so that a compiled layer stays one graph, with what a compiler must know of them.

Legend: T packed tokens (keys), Q queries, D head dimension of queries and keys, V of values, Hq query heads, Hkv key heads.

A plan is Python, which no operator takes. Handed over is its `handle`, an int64 [1] on the CPU that says under which number the plan is
found. All outputs are token-major in memory and seen head-major, as models make and take them, whatever the inputs' layout.
"""

from typing import Any

import torch
from torch import Tensor

from swirl_kernels.tree_attention import eager
from swirl_kernels.tree_attention.plan import TreePlan, plan_of, token_major


@torch.library.custom_op("swirl_kernels::tree_attention", mutates_args=())
def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    handle: Tensor,
    scale: float,
    softcap: float | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """q [Hq, Q, D] in ascending preorder, k [Hkv, T, D], v [Hkv, T, V], sinks [Hq] or None; what does not depend on the plan is checked by
    the caller. Returns [Hq, Q, V] and, without a gradient, the log-sum-exp [Hq, Q] in the unit of the backend.

    Raises ValueError for a plan of another packing or device.
    """
    plan = _fitting(handle, q, k, v)
    return _backend(backend).forward(q, k, v, sinks, plan, scale, softcap)  # type: ignore[no-any-return]


@attend.register_fake
def _(q, k, v, sinks, handle, scale, softcap, backend):  # type: ignore[no-untyped-def]
    return token_major(q, v.shape[2]), q.new_empty(q.shape[:2], dtype=torch.promote_types(q.dtype, torch.float32))


@torch.library.custom_op("swirl_kernels::tree_attention_backward", mutates_args=())
def attend_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    out: Tensor,
    lse: Tensor,
    handle: Tensor,
    scale: float,
    softcap: float | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and sinks, that of absent sinks [0]."""
    plan = plan_of(handle)
    return _backend(backend).backward(dout, q, k, v, sinks, out, lse, plan, scale, softcap)  # type: ignore[no-any-return]


@attend_backward.register_fake
def _(dout, q, k, v, sinks, out, lse, handle, scale, softcap, backend):  # type: ignore[no-untyped-def]
    dsinks = q.new_empty(0) if sinks is None else torch.empty_like(sinks)
    return (*(token_major(x, x.shape[2]) for x in (q, k, v)), dsinks)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, sinks, handle, *options = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(q, k, v, sinks, out, lse)
    ctx.handle = (
        handle  # not saved with the others: hooks that copy those (offloading) would lose the plan that it keeps alive
    )
    ctx.options = options


def _backward(ctx: Any, dout: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    q, k, v, sinks, out, lse = ctx.saved_tensors
    dq, dk, dv, dsinks = attend_backward(dout, q, k, v, sinks, out, lse, ctx.handle, *ctx.options)
    return dq, dk, dv, None if sinks is None else dsinks, None, None, None, None


def _no_second(*_: Any) -> None:
    raise RuntimeError("tree_attention is differentiable once; take its gradient without create_graph=True")


attend.register_autograd(_backward, setup_context=_save)
attend_backward.register_autograd(_no_second)


def _backend(name: str) -> Any:
    if name == "torch":
        return eager
    from swirl_kernels.tree_attention import triton  # needs triton, which a CPU does without

    return triton


def _fitting(handle: Tensor, q: Tensor, k: Tensor, v: Tensor) -> TreePlan:
    plan = plan_of(handle)
    if k.shape[1] != plan.num_keys or q.shape[1] != plan.num_queries:
        raise ValueError(
            f"q has {q.shape[1]} tokens and k {k.shape[1]}, but the tree has {plan.num_queries} queries and "
            f"{plan.num_keys} keys; pass query_index when only some of the packed tokens are queries"
        )
    if not q.device == k.device == v.device == plan.depth.device:
        raise ValueError(
            f"q, k, v and subtree_end lie on {q.device}, {k.device}, {v.device}, {plan.depth.device}; use one device"
        )
    return plan
