"""tree_attention as operators of PyTorch: what torch.library checks of them, and compiled functions that call them."""

import gc
import weakref
from typing import Any

import pytest
import torch
from support.trees import comb, pack, queries_keys_values
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from swirl_kernels import tree_attention, tree_plan
from swirl_kernels.tree_attention.operator import attend, attend_backward

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
END = pack(comb(9, 2, 2, 5), (3,))


def inputs(end: Tensor, **sizes: Any) -> tuple[Tensor, ...]:
    return queries_keys_values(end, heads=4, key_heads=2, dtype=torch.float32, device=DEVICE, **sizes)


@pytest.mark.parametrize(
    ("backend", "sinks", "softcap", "values"),
    [("torch", True, None, 5), ("torch", False, 2.0, None), ("triton", True, 2.0, 13)],
)
def test_opcheck(backend, sinks, softcap, values) -> None:
    """Schema, fake tensors (shapes, dtypes, strides), autograd and tracing with unknown sizes."""
    if backend == "triton":
        pytest.importorskip("triton")
    q, k, v = inputs(END, values=values)
    q = q.detach().contiguous().requires_grad_()  # head-major, unlike the others
    sink = torch.linspace(-1, 1, 4, device=DEVICE).requires_grad_() if sinks else None
    plan = tree_plan(END.to(DEVICE))
    options = (plan.handle, 0.3, softcap, backend)
    torch.library.opcheck(attend, (q, k, v, sink, *options))
    q, k, v = (x.detach() for x in (q, k, v))
    sink = sink if sink is None else sink.detach()
    out, lse = attend(q, k, v, sink, *options)
    torch.library.opcheck(attend_backward, (torch.ones_like(out), q, k, v, sink, out, lse, *options))


def test_a_compiled_function_is_one_graph_for_all_lengths_and_gives_the_same_bits() -> None:
    """Queries out of order and an offloaded backward too. The compiled function holds no plan: the next one may be another tree."""

    def layer(q: Tensor, k: Tensor, v: Tensor, plan: Any) -> Tensor:
        return tree_attention(2 * q, k, v, None, plan=plan, window=7, sinks=0.5) + 1

    counter = CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    compiled = torch.compile(layer, backend=counter, dynamic=True, fullgraph=True)
    for tooth in (4, 7, 11, 20):
        end = pack(comb(9, 2, 2, tooth)).to(DEVICE)
        order = torch.randperm(len(end), generator=torch.Generator().manual_seed(0)).to(DEVICE)
        q, k, v = inputs(end)
        plan = tree_plan(end, window=7, query_index=order)
        expected = layer(q, k, v, plan)
        gradient = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1)).to(DEVICE)
        with torch.autograd.graph.save_on_cpu():
            got = compiled(q, k, v, plan)
        held = weakref.ref(plan)
        del plan
        grads = torch.autograd.grad(got, (q, k, v), gradient)
        wanted = torch.autograd.grad(expected, (q, k, v), gradient)
        assert all(torch.equal(a, b) for a, b in zip((got, *grads), (expected, *wanted), strict=True))
        assert counter.frame_count == 1
        assert held() is None


def test_a_backward_keeps_its_plan_and_nothing_else_does() -> None:
    """Also behind hooks that copy what is saved."""
    end = END.to(DEVICE)
    q, k, v = inputs(end)
    with torch.autograd.graph.save_on_cpu():
        out = tree_attention(q, k, v, end)
    gc.collect()
    expected = torch.autograd.grad(tree_attention(q, k, v, end, plan=tree_plan(end)).sum(), (q, k, v))
    assert all(torch.equal(a, b) for a, b in zip(torch.autograd.grad(out.sum(), (q, k, v)), expected, strict=True))
    gc.disable()
    try:
        plan = tree_plan(end)
        depth = weakref.ref(plan.depth)
        handle = plan.handle.clone()
        del plan
        assert depth() is None, "freed at once, not by the garbage collector"
    finally:
        gc.enable()
    with pytest.raises(ValueError, match="plan of this attention is gone; keep what tree_plan returned"):
        attend(q, k, v, None, handle, 0.3, None, "torch")
