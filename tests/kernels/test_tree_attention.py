import math
import threading
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.trees import comb, pack
from support.trees import queries_keys_values as inputs
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from swirl_kernels import naive_tree_attention, tree_attention, tree_plan
from swirl_kernels.tree_attention import eager as implementation
from swirl_kernels.tree_attention import plan as planning


def results(function: Any, q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
    """Output and the gradients of q, k, v, and of sinks where they have one, for one fixed upstream gradient.

    A third of its rows are zero, as those of tokens that no loss looks at.
    """
    out = function(q, k, v, *args, **kwargs)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    upstream[:, ::3] = 0
    learned = [x for x in (kwargs.get("sinks"),) if isinstance(x, Tensor)]
    dq, dk, dv, *dsinks = torch.autograd.grad(out, (q, k, v, *learned), upstream.to(out.dtype))
    return (out, dq, dk, dv, *(x[:, None, None] for x in dsinks))


def sinks_of(q: Tensor) -> Tensor:
    """One a query head, from one that hardly matters to one that takes most of the attention."""
    return torch.linspace(-3, 3, q.shape[0], dtype=q.dtype).requires_grad_()


def assert_close(got: tuple[Tensor, ...], expected: tuple[Tensor, ...], tolerance: float) -> None:
    """As a relative norm, and per token row against the row's own size plus the mean one.

    A thousandth of the output's size is the floor: gradients of tokens that see only themselves are zero up to
    rounding.
    """
    assert len(got) == len(expected)
    floor = 1e-3 * expected[0].detach().double().norm(dim=-1)
    for name, a, b in zip(("out", "dq", "dk", "dv", "dsinks"), got, expected, strict=False):
        a, b = a.detach().double(), b.detach().double()
        assert a.shape == b.shape, name
        assert not a.isnan().any(), f"{name} holds NaN"
        error = (a - b).norm()
        assert error <= tolerance * (b.norm() + floor.norm()), f"{name}: error {error:.2e} of {b.norm():.2e}"
        rows, size = (a - b).norm(dim=-1), b.norm(dim=-1)
        bad = rows > 4 * tolerance * (size + size.mean() + floor.mean())
        assert not bad.any(), f"{name}: rows {bad.nonzero()[:5].tolist()} off by {rows[bad][:5].tolist()}"


@st.composite
def forests(draw: st.DrawFn) -> Tensor:
    """Random forests in preorder: after each token, how many of its ancestors the next one climbs before it hangs
    itself on."""
    climbs = draw(st.lists(st.sampled_from([0, 0, 0, 0, 0, 1, 1, 2, 5, 99]), min_size=1, max_size=70))
    path: list[int] = []
    end = [0] * len(climbs)
    for j, climb in enumerate(climbs):
        for _ in range(min(climb, len(path))):
            end[path.pop()] = j
        path.append(j)
    for j in path:
        end[j] = len(climbs)
    return torch.tensor(end, dtype=torch.int32)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    end=forests(),
    heads=st.sampled_from([(1, 1), (3, 3), (4, 2), (6, 1)]),
    softcap=st.sampled_from([None, None, 2.0]),
    window=st.sampled_from([None, None, 1, 2, 7, 1000]),
    chunk=st.sampled_from([None, None, 1, 3, 8, 1000]),
    sinks=st.sampled_from([None, -1.0, sinks_of]),
    values=st.sampled_from([None, 3, 13]),
    scale=st.sampled_from([None, 0.7]),
    subset=st.one_of(st.none(), st.lists(st.integers(0, 10_000), max_size=40)),
    piece=st.sampled_from([3, 1024]),
)
def test_equals_naive_on_random_forests(
    end, heads, softcap, window, chunk, sinks, values, scale, subset, piece
) -> None:
    query_index = None if subset is None else torch.tensor(subset, dtype=torch.int64) % len(end)
    queries = None if subset is None else len(subset)
    q, k, v = inputs(end, heads=heads[0], key_heads=heads[1], queries=queries, values=values)
    options = dict(softcap=softcap, scale=scale, query_index=query_index)
    options |= dict(window=window if chunk is None else None, chunk=chunk, sinks=sinks(q) if callable(sinks) else sinks)
    with pytest.MonkeyPatch.context() as patch:  # small limits, so that pieces, splits and chunks occur at this size
        patch.setattr(planning, "PIECE", piece)
        patch.setattr(planning, "MASK_ELEMENTS", 300)
        patch.setattr(implementation, "SPLIT_QUERIES", 2)
        patch.setattr(implementation, "SCORE_ELEMENTS", 200)
        patch.setattr(torch, "get_num_threads", lambda: 4)
        got = results(tree_attention, q, k, v, end, **options)
    expected = results(naive_tree_attention, q, k, v, end, **options)
    assert_close(got, expected, 1e-10)


@pytest.mark.parametrize("options", [{}, {"softcap": 3.0}, {"window": 40}, {"softcap": 3.0, "window": 40}], ids=str)
def test_branch_at_every_offset(options: dict[str, Any]) -> None:
    for offset in range(128):
        end = pack((1 + offset, (3,), (1,), (140 - offset, (2,))))
        q, k, v = inputs(end, dim=4)
        got = results(tree_attention, q, k, v, end, **options)
        assert_close(got, results(naive_tree_attention, q, k, v, end, **options), 1e-10)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 2e-6), (torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
@pytest.mark.parametrize("options", [{}, {"softcap": 5.0}, {"window": 60}, {"sinks": 2.0}], ids=str)
def test_other_dtypes_against_float64_of_the_same_numbers(dtype, tolerance, options) -> None:
    end = pack(comb(90, 3, 4, 25), (40, (7,), (7,), (1,)), (1,))
    q, k, v = inputs(end, heads=4, key_heads=2, dim=16, dtype=dtype)
    got = results(tree_attention, q, k, v, end, **options)
    assert all(x.dtype == dtype for x in got)
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    assert_close(got, results(naive_tree_attention, *exact, end, **options), tolerance)


def test_a_comb_equals_its_rows_one_by_one() -> None:
    """Every path from the root, alone and causal, gives the same outputs; gradients add up over the paths a token lies
    on."""
    end = pack(comb(20, 3, 2, 6))
    q, k, v = inputs(end, heads=2, key_heads=2)
    out = tree_attention(q, k, v, end)
    index = torch.arange(len(end))
    leaves = index[end == index + 1]
    assert len(leaves) == 6 and len(end) == 20 + 2 * 6 + 6 * 6  # the trunk ends in a state with teeth
    for leaf in leaves:
        path = index[(index <= leaf) & (leaf < end)]
        row = F.scaled_dot_product_attention(*(x[None, :, path] for x in (q, k, v)), is_causal=True)[0]
        torch.testing.assert_close(out[:, path], row, rtol=1e-12, atol=1e-12)


def test_plain_causal_and_packed_documents_are_trees_without_branches() -> None:
    end = torch.tensor([50] * 50 + [80] * 30 + [81])
    q, k, v = inputs(end, heads=3, key_heads=3)
    documents = [
        F.scaled_dot_product_attention(*(x[None, :, a:b] for x in (q, k, v)), is_causal=True)[0]
        for a, b in ((0, 50), (50, 80), (80, 81))
    ]
    torch.testing.assert_close(tree_attention(q, k, v, end), torch.cat(documents, 1), rtol=1e-12, atol=1e-12)


def test_one_plan_serves_every_layer_and_is_checked() -> None:
    end = pack(comb(10, 2, 3, 4))
    plan = tree_plan(end)
    q, k, v = inputs(end)
    expected = results(naive_tree_attention, q, k, v, end)
    assert_close(results(tree_attention, q, k, v, end, plan=plan), expected, 1e-10)
    assert_close(results(tree_attention, q, k, v, None, plan=plan), expected, 1e-10)
    with pytest.raises(ValueError, match="another subtree_end"):
        tree_attention(q, k, v, torch.full_like(end, len(end)), plan=plan)
    with pytest.raises(ValueError, match="window is 5, but the plan was made for None"):
        tree_attention(q, k, v, end, plan=plan, window=5)
    with pytest.raises(ValueError, match="belong to tree_plan"):
        tree_attention(q, k, v, end, plan=plan, depth=torch.arange(len(end)))
    with pytest.raises(ValueError, match="no plan"):
        tree_attention(q, k, v, None)


def test_decoding_reads_only_keys_that_are_written() -> None:
    """An engine reserves slots for tokens to come: three teeth of 6 slots, of which 2, 1 and 4 hold tokens."""
    end = pack((9, (6,), (6,), (6,)))
    written = torch.cat([torch.arange(9), torch.tensor([9, 10, 15, 21, 22, 23, 24])])
    query_index = torch.tensor([24, 10, 15])
    q, k, v = inputs(end, heads=4, key_heads=2, queries=3)
    expected = naive_tree_attention(q, k, v, end, query_index=query_index)
    empty = torch.ones(len(end), dtype=torch.bool).index_fill(0, written, False)
    k, v = (x.detach().masked_fill(empty[None, :, None], math.nan) for x in (k, v))
    torch.testing.assert_close(tree_attention(q, k, v, end, query_index=query_index), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("options", [{}, {"softcap": 2.0}, {"window": 5}], ids=["flash", "softcap", "window"])
def test_a_poisoned_branch_leaves_the_others_alone(options: dict[str, Any]) -> None:
    """NaN in the second tooth and in a second tree: the rest of the first tree keeps its bits, and a third tree its
    gradients."""
    end = pack((8, (4,), (3,), (4,)), (6, (2,), (2,)), (5, (2,)))
    q, k, v = inputs(end, heads=2, key_heads=2)
    clean = results(tree_attention, q, k, v, end, **options)
    poisoned_rows = torch.tensor([*range(12, 15), *range(19, 29)])
    poisoned = [x.detach().index_fill(1, poisoned_rows, math.nan).requires_grad_() for x in (q, k, v)]
    got = results(tree_attention, *poisoned, end, **options)
    alone = torch.ones(len(end), dtype=torch.bool).index_fill(0, poisoned_rows, False)
    assert torch.equal(got[0][:, alone], clean[0][:, alone])
    for a, b in zip(got[1:], clean[1:], strict=True):
        assert torch.equal(a[:, 29:], b[:, 29:])


def test_window_measures_the_given_depth() -> None:
    end = pack((6, (3,), (3,)), (5,))
    natural = torch.tensor([*range(6), 6, 7, 8, 6, 7, 8, *range(5)])
    q, k, v = inputs(end)
    expected = results(naive_tree_attention, q, k, v, end, window=4)
    assert_close(results(tree_attention, q, k, v, end, window=4, depth=natural + 100), expected, 1e-10)
    doubled = results(tree_attention, q, k, v, end, window=4, depth=2 * natural)
    assert_close(doubled, results(naive_tree_attention, q, k, v, end, window=4, depth=2 * natural), 1e-10)
    assert not torch.allclose(doubled[0], expected[0])


def test_strides_of_inputs_and_upstream_do_not_matter() -> None:
    end = pack(comb(7, 2, 2, 3))
    q, k, v = inputs(end, heads=2, key_heads=2)
    expected = torch.autograd.grad(naive_tree_attention(q, k, v, end).sum(), (q, k, v))
    big = torch.stack([x.detach() for x in (q, k, v)], -1)  # the last dimension is not the contiguous one
    odd = [big[..., i].requires_grad_() for i in range(3)]
    got = torch.autograd.grad(tree_attention(*odd, end).sum(), odd)  # the upstream gradient has stride 0
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


def test_gradcheck() -> None:
    end = pack((3, (2,), (1, (2,), (1,))), (2,))
    q, k, v = inputs(end, heads=2, key_heads=1, dim=3)
    for options in ({}, {"softcap": 1.5}):
        assert torch.autograd.gradcheck(lambda q, k, v, o=options: tree_attention(q, k, v, end, **o), (q, k, v))
    of = (q, k, v, sinks_of(q))
    assert torch.autograd.gradcheck(lambda q, k, v, sinks: tree_attention(q, k, v, end, window=3, sinks=sinks), of)


def test_backward_from_a_second_thread_and_under_autocast() -> None:
    end = pack(comb(12, 2, 3, 5))
    q, k, v = inputs(end, dtype=torch.float32)
    out = tree_attention(q, k, v, end)
    expected = torch.autograd.grad(out.square().sum(), (q, k, v), retain_graph=True)
    got: list[Tensor] = []
    thread = threading.Thread(
        target=lambda: got.extend(torch.autograd.grad(out.square().sum(), (q, k, v), retain_graph=True))
    )
    thread.start(), thread.join()
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    out = tree_attention(q, k, v, end, softcap=4.0)
    loss = out.square().sum()
    expected = torch.autograd.grad(loss, (q, k, v), retain_graph=True)
    with torch.autocast("cpu", torch.bfloat16):
        got = list(torch.autograd.grad(loss, (q, k, v)))
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_autocast_casts_as_sdpa_does() -> None:
    end = pack(comb(12, 2, 3, 5))
    q, k, v = inputs(end, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        got = results(tree_attention, q, k, v.bfloat16(), end)
    assert got[0].dtype == torch.bfloat16 and got[1].dtype == torch.float32
    exact = [x.detach().bfloat16().double().requires_grad_() for x in (q, k, v)]
    assert_close(got, results(naive_tree_attention, *exact, end), 2e-2)


class LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor any operation returned."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else (out,):
            if isinstance(x, Tensor):
                self.largest = max(self.largest, x.numel())
        return out


def test_nothing_of_size_queries_times_keys_exists() -> None:
    end = pack(comb(300, 3, 6, 40))
    q, k, v = inputs(end, heads=2, key_heads=2, dtype=torch.float32)
    plan = planning.plan_of(tree_plan(end).handle)
    with LargestTensor() as mode, torch.no_grad():  # what the operators call: a dispatch mode does not see into them
        out, lse = implementation.forward(q, k, v, None, plan, 0.25, None)
        implementation.backward(out, q, k, v, None, out, lse, plan, 0.25, None)
    assert mode.largest == q.numel()


def test_empty_packing_and_single_token() -> None:
    for end in (torch.zeros(0, dtype=torch.int32), torch.ones(1, dtype=torch.int32)):
        q, k, v = inputs(end)
        assert_close(results(tree_attention, q, k, v, end), results(naive_tree_attention, q, k, v, end), 1e-10)


@pytest.mark.parametrize(
    "end, message",
    [
        ([1, 1, 3], r"subtree_end\[1\] is 1, outside \[2, 3\]"),
        ([4, 2, 3], r"subtree_end\[0\] is 4, outside \[1, 3\]"),
        ([2, 3, 3], r"token 1 ends at 3, but lies in the subtree of token 0, which ends at 2"),
        ([4, 3, 4, 4], r"token 2 ends at 4, but lies in the subtree of token 1"),
    ],
)
def test_a_packing_that_is_no_preorder_is_refused(end: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tree_plan(torch.tensor(end))


def test_wrong_arguments_are_refused_with_numbers() -> None:
    end = pack(comb(4, 1, 2, 2))
    q, k, v = inputs(end, heads=2, key_heads=1)
    with pytest.raises(ValueError, match=r"give \[Hq, Q, D\]"):
        tree_attention(q[None], k[None], v[None], end)
    with pytest.raises(ValueError, match="3 query heads over 2 key heads"):
        tree_attention(q[:1].expand(3, -1, -1), k.expand(2, -1, -1), v.expand(2, -1, -1), end)
    with pytest.raises(ValueError, match="q has 7 tokens and k 8"):
        tree_attention(q[:, :7], k, v, end)
    with pytest.raises(ValueError, match="float64, torch.float32"):
        tree_attention(q, k.float(), v, end)
    with pytest.raises(ValueError, match=r"query_index\[1\] is 8, outside \[0, 8\)"):
        tree_attention(q[:, :2], k, v, end, query_index=torch.tensor([0, 8]))
    no_sizes: tuple[Any, ...] = (0, 2.5, 2.0, math.inf, math.nan)
    for size in no_sizes:
        with pytest.raises(ValueError, match=f"window is {size}; use an integer of at least 1"):
            tree_attention(q, k, v, end, window=size)
        with pytest.raises(ValueError, match=f"chunk is {size} and window None.*an integer"):
            tree_attention(q, k, v, end, chunk=size)
    with pytest.raises(ValueError, match="chunk is 4 and window 4.*not both"):
        tree_plan(end, chunk=4, window=4)
    with pytest.raises(ValueError, match="chunk is None, but the plan was made for 4"):
        tree_attention(q, k, v, end, plan=tree_plan(end, chunk=4))
    with pytest.raises(ValueError, match=r"sinks have shape \(1,\).*one floating number a query head, \[2\]"):
        tree_attention(q, k, v, end, sinks=torch.zeros(1))
    with pytest.raises(ValueError, match="sinks have shape .* and dtype torch.int64"):
        tree_attention(q, k, v, end, sinks=torch.zeros(2, dtype=torch.int64))
    for cap in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match=f"softcap is {cap}; use a positive finite number"):
            tree_attention(q, k, v, end, softcap=cap)
    for sink in (math.nan, math.inf):
        with pytest.raises(ValueError, match=f"sinks is {sink}; use a finite number"):
            tree_attention(q, k, v, end, sinks=sink)
    for scale in (0.0, -0.5, math.nan, math.inf):
        with pytest.raises(ValueError, match=f"scale is {scale}; use a positive finite number"):
            tree_attention(q, k, v, end, scale=scale)
    with pytest.raises(ValueError, match=r"q has shape \(2, 8, 0\): a head dimension of 0"):
        tree_attention(q[..., :0], k[..., :0], v[..., :0], end)
    with pytest.raises(ValueError, match="depth stays from 0 at token 0 to 0 at its child 1; a window or chunk needs"):
        tree_attention(q, k, v, end, window=3, depth=torch.zeros_like(end))
    with pytest.raises(ValueError, match="one-dimensional integer"):
        tree_plan(end.float())
    with pytest.raises(ValueError, match="depth has 3 entries, subtree_end 8"):
        tree_plan(end, depth=torch.arange(3))


def test_what_a_sink_is() -> None:
    """One of -inf changes no bit, one of 0 is one more key of score 0, and its gradient comes alone too."""
    end = pack(comb(12, 2, 3, 5))
    q, k, v = inputs(end)
    plain = results(tree_attention, q, k, v, end)
    assert all(
        torch.equal(a, b) for a, b in zip(results(tree_attention, q, k, v, end, sinks=-math.inf), plain, strict=True)
    )
    scores = (q @ k.transpose(1, 2) / 8**0.5).masked_fill(
        (torch.arange(len(end)) > torch.arange(len(end))[:, None]) | (torch.arange(len(end))[:, None] >= end), -math.inf
    )
    expected = scores.exp() @ v / (1 + scores.exp().sum(-1, keepdim=True))
    torch.testing.assert_close(tree_attention(q, k, v, end, sinks=0.0), expected, rtol=1e-12, atol=1e-12)
    sinks = sinks_of(q)
    wanted = results(tree_attention, q, k, v, end, sinks=sinks)[4][:, 0, 0]
    frozen = [x.detach() for x in (q, k, v)]
    out = tree_attention(*frozen, end, sinks=sinks)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    upstream[:, ::3] = 0
    assert torch.equal(torch.autograd.grad(out, sinks, upstream)[0], wanted)


def test_chunks_are_counted_in_the_given_depth() -> None:
    """From depth 1 on instead of 0 the chunks of 4 end elsewhere: a tooth at depth 6 then sees depths 4 and 5."""
    end = pack((6, (3,), (3,)), (5,))
    natural = torch.tensor([*range(6), 6, 7, 8, 6, 7, 8, *range(5)])
    q, k, v = inputs(end)
    expected = results(naive_tree_attention, q, k, v, end, chunk=4)
    plan = tree_plan(end, chunk=4, depth=natural + 8)
    assert_close(results(tree_attention, q, k, v, end, plan=plan, chunk=4), expected, 1e-10)
    shifted = dict(chunk=4, depth=natural + 1)
    moved = results(tree_attention, q, k, v, end, **shifted)
    assert_close(moved, results(naive_tree_attention, q, k, v, end, **shifted), 1e-10)
    assert not torch.allclose(moved[0], expected[0])


def test_backend_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    end = pack(comb(4, 1, 2, 2))
    q, k, v = inputs(end)
    expected = tree_attention(q, k, v, end)
    monkeypatch.setenv("SWIRL_KERNELS_BACKEND", "torch")
    assert torch.equal(tree_attention(q, k, v, end), expected)
    monkeypatch.setenv("SWIRL_KERNELS_BACKEND", "triton")
    with pytest.raises(ValueError, match="tree_attention in torch.float64 has no Triton kernel"):
        tree_attention(q, k, v, end)
    monkeypatch.setenv("SWIRL_KERNELS_BACKEND", "cuda")
    with pytest.raises(ValueError, match="'cuda'; use 'torch' or 'triton'"):
        tree_attention(q, k, v, end)
