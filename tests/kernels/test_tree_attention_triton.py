"""tree_attention in Triton against the dense mask in float64, on the same rounded inputs.

Without a GPU the kernels are interpreted, which is slow: most tests use tiles of 16 and 32, so that 60 to 150 tokens are many
blocks. The tests at every offset use the tiles that are shipped.
"""

import itertools
import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from support.trees import comb, pack, queries_keys_values
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from swirl_kernels import naive_tree_attention, tree_attention, tree_plan
from swirl_kernels.tree_attention import plan as planning

pytest.importorskip("triton")
from swirl_kernels.tree_attention import triton as implementation  # noqa: E402
from swirl_kernels.tree_attention.blocks import key_blocks, query_blocks  # noqa: E402
from swirl_kernels.tree_attention.triton import Tiles, configuration  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if DEVICE == "cuda" else [])


@pytest.fixture(autouse=True)
def triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SWIRL_KERNELS_BACKEND", "triton")


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    use_tiles(monkeypatch, (32, 16), (16, 32), (32, 16))


def use_tiles(monkeypatch: pytest.MonkeyPatch, *sizes: tuple[int, int], edge: int = 16) -> None:
    """Tiles of forward, dQ and dK/dV."""
    tiles = dict(zip(("forward", "backward_q", "backward_kv"), sizes, strict=True))
    tiles |= {"backward_kv_few": tiles["backward_kv"], "forward_narrow": tiles["forward"]}
    monkeypatch.setattr(implementation, "configuration", lambda kernel, *_: Tiles(*tiles[kernel], 4, 1))
    monkeypatch.setattr(implementation, "EDGE", edge)


def inputs(end: Tensor, *, dim: int = 16, dtype: torch.dtype = torch.float32, **sizes: Any) -> tuple[Tensor, ...]:
    return queries_keys_values(end, dim=dim, dtype=dtype, device=DEVICE, **sizes)


def random_forest(length: int, seed: int) -> Tensor:
    """After each token the next one climbs some of its ancestors before it hangs itself on."""
    generator = torch.Generator().manual_seed(seed)
    climbs = [0] * 14 + [1, 1, 2, 5, 99]
    path: list[int] = []
    end = [length] * length
    for j in range(length):
        for _ in range(min(climbs[int(torch.randint(len(climbs), (), generator=generator))], len(path))):
            end[path.pop()] = j
        path.append(j)
    return torch.tensor(end, dtype=torch.int32)


def upstream(out: Tensor) -> Tensor:
    """One fixed upstream gradient per shape; its rows differ in size."""
    generator = torch.Generator().manual_seed(1)
    rows = torch.rand(out.shape[:2], generator=generator)[..., None]
    return torch.randn(out.shape, generator=generator) * rows


def results(q: Tensor, k: Tensor, v: Tensor, end: Tensor | None, **options: Any) -> tuple[Tensor, ...]:
    """Output and the gradients of q, k, v, and of sinks where they have one."""
    options = on_device(options)
    out = tree_attention(q, k, v, end if end is None else end.to(DEVICE), **options)
    assert out.dtype == q.dtype
    return (out, *gradients(out, (q, k, v), options, upstream(out).to(out)))


def gradients(out: Tensor, of: tuple[Tensor, ...], options: dict[str, Any], gradient: Tensor) -> Iterator[Tensor]:
    learned = [x for x in (options.get("sinks"),) if isinstance(x, Tensor)]
    dq, dk, dv, *dsinks = torch.autograd.grad(out, (*of, *learned), gradient)
    yield from (dq, dk, dv, *(x[:, None, None] for x in dsinks))


def reference(q: Tensor, k: Tensor, v: Tensor, end: Tensor, **options: Any) -> tuple[Tensor, ...]:
    """The same with a dense mask, in float64 on the same rounded numbers."""
    exact = tuple(x.detach().double().requires_grad_() for x in (q, k, v))
    options = on_device(options)
    if isinstance(options.get("sinks"), Tensor):
        options["sinks"] = options["sinks"].detach().double().requires_grad_()
    out = naive_tree_attention(*exact, end.to(DEVICE), **options)
    return (out, *gradients(out, exact, options, upstream(out).to(q).double()))


def on_device(options: dict[str, Any]) -> dict[str, Any]:
    return {name: x.to(DEVICE) if isinstance(x, Tensor) else x for name, x in options.items()}


def assert_close(got: tuple[Tensor, ...], expected: tuple[Tensor, ...], tolerance: float) -> None:
    """As a relative norm, and per token row against the row's own size plus the mean one.

    A tenth of the output's size is the floor: gradients of tokens that see only themselves are zero up to rounding.
    """
    assert len(got) == len(expected)
    floor = 0.1 * expected[0].detach().norm(dim=-1)
    for name, a, b in zip(("out", "dq", "dk", "dv", "dsinks"), got, expected, strict=False):
        a, b = a.detach().double(), b.detach()
        assert a.shape == b.shape, name
        assert not a.isnan().any(), f"{name} holds NaN"
        error = (a - b).norm()
        assert error <= tolerance * (b.norm() + floor.norm()), f"{name}: error {error:.2e} of {b.norm():.2e}"
        rows, size = (a - b).norm(dim=-1), b.norm(dim=-1)
        bad = rows > tolerance * (size + size.mean() + floor.mean())
        assert not bad.any(), f"{name}: rows {bad.nonzero()[:5].tolist()} off by {rows[bad][:5].tolist()}"


def check(end: Tensor, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> None:
    assert_close(results(q, k, v, end, **options), reference(q, k, v, end, **options), TOLERANCE[q.dtype])


SIZES = [((16, 16), (16, 16), (16, 16)), ((32, 16), (16, 32), (32, 16)), ((16, 32), (32, 16), (16, 32))]
OPTIONS: list[dict[str, Any]] = [
    {},
    {"softcap": 2.0},
    {"window": 1},
    {"window": 5},
    {"window": 30},
    {"window": 24, "softcap": 5.0},
    {"window": 1000},
    {"scale": 0.4},
    {"chunk": 1},
    {"chunk": 7},
    {"chunk": 24, "softcap": 5.0},
]


FORESTS = [(options, seed) for i, options in enumerate(OPTIONS) for seed in range(i % 2, 6, 2)]  # each with all SIZES


@pytest.mark.parametrize(("options", "seed"), FORESTS, ids=str)
def test_random_forests(monkeypatch, options, seed) -> None:
    use_tiles(monkeypatch, *SIZES[seed % 3])
    end = random_forest((60, 97, 81, 64, 33, 75)[seed], seed)
    heads, key_heads = ((1, 1), (2, 1), (2, 2))[(seed + len(options)) % 3]
    dtype = DTYPES[(seed // 3 + len(options)) % len(DTYPES)]
    check(end, *inputs(end, heads=heads, key_heads=key_heads, dtype=dtype), **options)


@pytest.mark.parametrize("seed", range(8))
def test_some_tokens_are_queries(monkeypatch, seed) -> None:
    """In any order, some of them twice; a block of queries may be spread over several trees."""
    use_tiles(monkeypatch, *SIZES[seed % 3])
    end = random_forest(140, seed)
    generator = torch.Generator().manual_seed(seed)
    query_index = torch.randint(len(end), ((1, 5, 40, 70)[seed % 4],), generator=generator)
    q, k, v = inputs(end, queries=len(query_index), dtype=DTYPES[seed % len(DTYPES)])
    options = OPTIONS[(0, 1, 3, 4)[seed // 2]]
    check(end, q, k, v, query_index=query_index, **options)


def branches_every(gap: int, count: int, first: int) -> Tensor:
    """A trunk on which two teeth hang: at packed tokens first + 1, first + 1 + gap, … (`count` times)."""
    tree: Any = (20, (2,))
    for _ in range(count - 1):
        tree = (gap - 4, (3,), (1,), tree)
    return pack((1 + first, (3,), (1,), tree))


@pytest.mark.parametrize("options", [{}, {"window": 40, "softcap": 3.0}], ids=str)
@pytest.mark.parametrize("first", range(0, 32, 8))
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_branch_at_every_offset_of_the_shipped_tiles(monkeypatch, first, dtype, options) -> None:
    """Four offsets a tree: the 128 of a tile are o, o + 32, o + 64 and o + 96. With a window in the tiles for few programs."""
    if not options:
        monkeypatch.setattr(implementation, "_processors", lambda _: 0)
    tiles = [configuration(kernel, 16, dtype, (9, 0)) for kernel in ("forward", "backward_q", "backward_kv")]
    assert max(max(t.block_m, t.block_n) for t in tiles) == 128, "the offsets below no longer cover a tile"
    for offset in range(first, first + 8):
        end = branches_every(32, 4, offset)
        check(end, *inputs(end, heads=1, dtype=dtype), **options)


@pytest.mark.parametrize("options", [{}, {"window": 24, "softcap": 3.0}], ids=str)
def test_branch_at_every_offset_in_fp32(options) -> None:
    """Eight offsets a tree: 9 k modulo 32 takes every value."""
    assert configuration("backward_kv", 16, torch.float32, (9, 0)).block_n == 32
    for first in range(0, 32, 8):
        end = branches_every(9, 8, first)
        check(end, *inputs(end, heads=1), **options)


@pytest.mark.parametrize(
    "end",
    [
        pack((1,)),
        pack(*[(1,)] * 50),
        pack((50,)),
        pack((17,), (16,), (15,), (1,), (40,)),
        pack((1, *[(1,)] * 45)),
        pack((40, *[(1,)] * 45, (30,))),
        pack(comb(20, 3, 2, 9), comb(5, 2, 3, 1)),
        torch.tensor([70 - i for i in range(35)] + list(range(36, 71))[:35]),
    ],
    ids=["one token", "one-token trees", "causal", "documents", "star", "star on a trunk", "combs", "onion"],
)
@pytest.mark.parametrize("options", [{}, {"window": 7}], ids=str)
def test_shapes_of_trees(small, end, options) -> None:
    check(end, *inputs(end), **options)


def test_an_empty_packing_and_no_queries(small) -> None:
    empty = torch.zeros(0, dtype=torch.int32)
    q, k, v = inputs(empty)
    assert [x.shape for x in results(q, k, v, empty)] == [(2, 0, 16), (2, 0, 16), (1, 0, 16), (1, 0, 16)]
    end = pack((5, (3,), (4,)))
    q, k, v = inputs(end, queries=0)
    out, _, dk, dv = results(q, k, v, end, query_index=torch.zeros(0, dtype=torch.int64))
    assert out.shape == (2, 0, 16) and not dk.any() and not dv.any()


@pytest.mark.parametrize("heads, key_heads", [(1, 1), (3, 3), (3, 1), (4, 1), (6, 2)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_grouped_queries(small, heads, key_heads, dtype) -> None:
    end = pack(comb(20, 2, 2, 9))
    check(end, *inputs(end, heads=heads, key_heads=key_heads, dtype=dtype))


@pytest.mark.parametrize(("limit", "parts"), [(4, 4), (3, 2), (0, 1)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_memory_for_shares_of_query_heads_is_bounded(small, monkeypatch, limit, parts, dtype) -> None:
    """Where not all four query heads of a key head get a share of their own, several take turns; the same bits every time."""
    end = pack((9, (5,), (4, (6,))))
    q, k, v = inputs(end, heads=4, key_heads=1, dtype=dtype)
    share_bytes = 4 * len(end) * (16 + 16)
    monkeypatch.setattr(implementation, "SHARES_BYTES", limit * share_bytes)
    assert implementation.shares_of_a_key_head(4, share_bytes) == parts
    got = results(q, k, v, end)
    assert_close(got, reference(q, k, v, end), TOLERANCE[dtype])
    assert all(torch.equal(a, b) for a, b in zip(results(q, k, v, end), got, strict=True))


def test_few_programs_take_smaller_blocks_of_keys(monkeypatch) -> None:
    """Of 132 processors four programs each: 64 query heads over nine blocks of 128 keys are enough, over eight they are not."""
    asked: list[str] = []

    def tiles(kernel: str, *_: Any) -> Tiles:
        asked.append(kernel)
        return Tiles(32, 128, 4, 1)

    monkeypatch.setattr(implementation, "configuration", tiles)
    monkeypatch.setattr(implementation.kernels, "backward_kv", NoKernel())
    monkeypatch.setattr(implementation.kernels, "sum_parts", NoKernel())
    monkeypatch.setattr(implementation, "_processors", lambda _: 132)
    for length, few in ((1152, False), (1024, True)):
        asked.clear()
        k = torch.empty(1, length, 16, device=DEVICE)
        q, lse = k.expand(64, -1, -1), torch.empty(64, length, device=DEVICE)
        plan = tree_plan(torch.full((length,), length, device=DEVICE))
        implementation._run_backward_kv(q, q, k, k, lse, lse, k, k, plan, 1.0, None)
        assert ("backward_kv_few" in asked) == few


class NoKernel:
    """Launched, it does nothing."""

    def __getitem__(self, _: Any) -> Any:
        return lambda *_, **__: None


@pytest.mark.parametrize(
    "options", [{}, {"window": 9, "softcap": 2.0}, {"query_index": torch.tensor([41, 3, 20, 3])}], ids=str
)
def test_sinks(small, options) -> None:
    """From one that hardly matters to one that takes most of the attention."""
    end = pack((20, (9,), (9, (5,))))
    q, k, v = inputs(end, heads=4, key_heads=2, queries=4 if "query_index" in options else None)
    check(end, q, k, v, sinks=torch.linspace(-3, 3, 4, device=DEVICE).requires_grad_(), **options)


def test_sinks_repeat_and_may_be_absent(small) -> None:
    """The same bits every time; rows without upstream give a sink nothing; -inf changes no bit."""
    end = pack((20, (9,), (5,)))
    q, k, v = inputs(end)
    plain, absent = results(q, k, v, end), results(q, k, v, end, sinks=-math.inf)
    assert all(torch.equal(a, b) for a, b in zip(absent, plain, strict=True))
    sinks = torch.tensor([0.5, -1.0], device=DEVICE).requires_grad_()
    out = tree_attention(q, k, v, end.to(DEVICE), sinks=sinks)
    gradient = upstream(out).to(out).index_fill(1, torch.arange(3, len(end), device=DEVICE), 0)
    got, again = (torch.autograd.grad(out, sinks, gradient, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(got, again)
    exact = [x.detach().double().requires_grad_() for x in (q, k, v, sinks)]
    dense = naive_tree_attention(*exact[:3], end.to(DEVICE), sinks=exact[3])
    (wanted,) = torch.autograd.grad(dense, exact[3], gradient.double())
    torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(("dim", "values"), [(24, 16), (8, 40)])
@pytest.mark.parametrize("options", [{}, {"window": 9, "sinks": 0.5}], ids=str)
def test_values_of_another_width_than_keys(small, dim, values, options) -> None:
    end = pack((20, (9,), (9, (5,))))
    check(end, *inputs(end, dim=dim, values=values, heads=4, key_heads=2), **options)


@pytest.mark.parametrize("dim", [1, 8, 24, 80, 256])
def test_head_dimensions(small, dim) -> None:
    end = pack((20, (9,), (9, (5,))))
    check(end, *inputs(end, dim=dim))


def test_window_measures_the_given_depth(small) -> None:
    end = pack((30, (9,), (40,)), (25,))
    natural = torch.tensor([*range(30), *range(30, 39), *range(30, 70), *range(25)])
    q, k, v = inputs(end)
    expected = reference(q, k, v, end, window=20)
    assert_close(results(q, k, v, end, window=20, depth=natural + 100), expected, 1e-5)
    doubled = results(q, k, v, end, window=20, depth=2 * natural)
    assert_close(doubled, reference(q, k, v, end, window=20, depth=2 * natural), 1e-5)
    assert not torch.allclose(doubled[0].double(), expected[0])


def test_strides_of_inputs_and_upstream_do_not_matter(small) -> None:
    end = pack((20, (9,), (9, (5,))))
    q, k, v = inputs(end, heads=2, key_heads=2)
    expected = results(q, k, v, end)
    layouts = [
        lambda x: x.contiguous(),  # head-major
        lambda x: torch.stack([x, x], 1)[:, 0],  # rows of another tensor
        lambda x: torch.stack([x, x], -1)[..., 0],  # the last dimension is not the contiguous one
    ]
    for layout in layouts:
        other = [layout(x.detach()).requires_grad_() for x in (q, k, v)]
        for a, b in zip(results(*other, end), expected, strict=True):
            assert torch.equal(a, b)
    ones = torch.autograd.grad(tree_attention(q, k, v, end.to(DEVICE)).sum(), (q, k, v))  # an upstream of stride 0
    filled = tree_attention(q, k, v, end.to(DEVICE))
    for a, b in zip(ones, torch.autograd.grad(filled, (q, k, v), torch.ones_like(filled).contiguous()), strict=True):
        assert torch.equal(a, b)
    wide = k.detach()[:1].expand(2, -1, -1).requires_grad_()  # two heads over the same memory
    apart = k.detach()[:1].repeat(2, 1, 1).requires_grad_()
    for a, b in zip(results(q, wide, v, end), results(q, apart, v, end), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("wanted", ["q", "k", "v", "qv"])
def test_frozen_inputs(small, wanted) -> None:
    end = pack(comb(20, 2, 2, 9))
    q, k, v = inputs(end)
    everything = dict(zip("qkv", results(q, k, v, end)[1:], strict=True))
    given = {name: x.detach().requires_grad_(name in wanted) for name, x in zip("qkv", (q, k, v), strict=True)}
    out = tree_attention(*given.values(), end.to(DEVICE))
    got = torch.autograd.grad(out, [given[name] for name in wanted], upstream(out).to(out))
    for name, grad in zip(wanted, got, strict=True):
        assert torch.equal(grad, everything[name])


def ancestors_and_descendants(end: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """bool [T]: tokens seen by one of `rows`, tokens that see one of them."""
    index = torch.arange(len(end))
    sees = (index[None, :] <= index[:, None]) & (index[:, None] < end[None, :])
    return sees[rows].any(0), sees[:, rows].any(1)


@pytest.mark.parametrize("options", [{}, {"softcap": 2.0}, {"window": 9}], ids=str)
@pytest.mark.parametrize(
    ("value", "where"),
    [*((math.nan, x) for x in ("q", "k", "v", "qkv", "upstream")), *((math.inf, x) for x in ("qkv", "upstream"))],
)
def test_a_poisoned_branch_leaves_the_others_alone(small, options, where, value) -> None:
    """The second tooth, a token of the last one and a second tree are poisoned, all inside tiles that others share.

    Who neither sees nor is seen by them keeps output and gradients bit for bit; with NaN, who sees them gets NaN.
    """
    end = pack((8, (4,), (3,), (9,)), (6, (2,), (2,)), (25, (2,)))
    rows = torch.tensor([12, 13, 14, 20, *range(24, 34)])
    q, k, v = inputs(end, heads=2, key_heads=1)
    clean = results(q, k, v, end, **options)
    given = {name: x.detach().clone() for name, x in zip("qkv", (q, k, v), strict=True)}
    gradient = upstream(clean[0]).to(clean[0])
    for name in given:
        if name in where:
            given[name][:, rows, 3] = value
    if where == "upstream":
        gradient[:, rows, 3] = value
    poisoned = [x.requires_grad_() for x in given.values()]
    out = tree_attention(*poisoned, end.to(DEVICE), **options)
    got = (out, *torch.autograd.grad(out, poisoned, gradient))

    reached = torch.zeros(len(end), dtype=torch.bool).index_fill(0, rows, True)  # queries whose row is poisoned
    if where not in ("q", "upstream"):
        reached = ancestors_and_descendants(end, rows)[1]
    _out, dq, dk, dv = (torch.equal(a[:, ~reached], b[:, ~reached]) for a, b in zip(got, clean, strict=True))
    assert _out and dq
    seen, _ = ancestors_and_descendants(end, torch.nonzero(reached)[:, 0])
    for a, b in zip(got[2:], clean[2:], strict=True):
        assert torch.equal(a[:, ~seen], b[:, ~seen])
    assert (~seen).sum() >= 30 and (~reached).sum() >= 40
    if math.isnan(value) and "window" not in options:
        if where != "upstream":
            assert got[0][:, reached].isnan().any(-1).all()
        assert got[1][:, reached].isnan().any(-1).all()
        assert got[2][:, seen].isnan().any(-1).all() and got[3][:, seen].isnan().any(-1).all()


def test_decoding_reads_only_keys_that_are_written(small) -> None:
    """An engine reserves slots for tokens to come: three teeth of 30 slots, of which 20, 1 and 14 hold tokens."""
    end = pack((40, (30,), (30,), (30,)))
    written = torch.tensor([*range(60), 70, *range(100, 114)])
    query_index = torch.tensor([113, 59, 70])
    q, k, v = inputs(end, heads=4, key_heads=2, queries=3)
    expected = reference(q, k, v, end, query_index=query_index)
    empty = torch.ones(len(end), dtype=torch.bool).index_fill(0, written, False).to(DEVICE)
    k, v = (x.detach().masked_fill(empty[None, :, None], math.nan).requires_grad_() for x in (k, v))
    got = results(q, k, v, end, query_index=query_index)
    assert_close(got, expected, 1e-5)
    assert not got[2][:, empty].any() and not got[3][:, empty].any()


def test_bits_repeat_over_runs_threads_and_checkpoints(small) -> None:
    end = pack((20, (9,), (9, (5,))))
    q, k, v = inputs(end)
    expected = results(q, k, v, end)
    assert all(torch.equal(a, b) for a, b in zip(results(q, k, v, end), expected, strict=True))
    out = tree_attention(q, k, v, end.to(DEVICE))
    got: list[Tensor] = []
    thread = threading.Thread(target=lambda: got.extend(torch.autograd.grad(out, (q, k, v), upstream(out).to(out))))
    thread.start(), thread.join()
    assert len(got) == 3 and all(torch.equal(a, b) for a, b in zip(got, expected[1:], strict=True))
    out = checkpoint(tree_attention, q, k, v, end.to(DEVICE), use_reentrant=False)
    got = list(torch.autograd.grad(out, (q, k, v), upstream(out).to(out)))
    assert all(torch.equal(a, b) for a, b in zip(got, expected[1:], strict=True))


def test_gradients_are_differentiable_once(small) -> None:
    end = pack((5, (3,)))
    q, k, v = inputs(end)
    (dq,) = torch.autograd.grad(tree_attention(q, k, v, end.to(DEVICE)).square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        dq.sum().backward()


def test_autocast_casts_as_sdpa_does(small) -> None:
    end = pack((20, (9,), (9,)))
    q, k, v = inputs(end)
    with torch.autocast(DEVICE, torch.float16):
        out = tree_attention(q, k, v.half(), end.to(DEVICE))
        got = (out, *torch.autograd.grad(out, (q, k, v), upstream(out).to(out)))
    assert out.dtype == torch.float16 and got[1].dtype == torch.float32
    halves = [x.detach().half() for x in (q, k, v)]
    assert_close(got, reference(*halves, end), 2e-3)


@pytest.mark.parametrize("options", [{}, {"window": 9}], ids=str)
def test_one_plan_serves_every_layer_without_parts_and_without_waiting(small, monkeypatch, options) -> None:
    """What the torch path derives in Python is not made, and no layer asks the device for a number."""

    def refuse(*_: Any) -> None:
        raise AssertionError("the parts of the torch path were built")

    monkeypatch.setattr(planning._Builder, "parts", refuse)
    end = pack(comb(30, 2, 3, 9), (20,))
    q, k, v = inputs(end)
    plan = tree_plan(end.to(DEVICE), **options)
    gradient, found = upstream(q).to(q), planning.plan_of(plan.handle)

    def layer() -> tuple[Tensor, ...]:
        """What the operators call: a dispatch mode does not see into them."""
        out, lse = implementation.forward(q, k, v, None, found, 0.25, None)
        return (out, *implementation.backward(gradient, q, k, v, None, out, lse, found, 0.25, None)[:3])

    with waiting_refused(), torch.no_grad(), Calls() as calls:
        got = layer()
        first = len(calls.names)
        again = layer()
    with waiting_refused():
        whole = tree_attention(q, k, v, None, plan=plan, **options)
        whole = (whole, *torch.autograd.grad(whole, (q, k, v), gradient))
    assert all(torch.equal(a, b) for a, b in zip(got, whole, strict=True))
    assert not {"aten._local_scalar_dense", "aten.nonzero", "aten.equal"} & set(calls.names)
    assert "aten.sort" in calls.names[:first] and "aten.sort" not in calls.names[first:]
    assert_close(got, reference(q, k, v, end, **options), 1e-5)
    assert all(torch.equal(a, b) for a, b in zip(got, again, strict=True))
    assert calls.largest <= max(q.nbytes, 5 * 8 * len(end)) < 4 * len(end) ** 2, (
        "something of size queries times keys exists"
    )


@pytest.mark.parametrize("options", [{}, {"window": 9}, {"window": 200}, {"chunk": 9}], ids=str)
def test_a_trusted_plan_is_made_without_waiting(small, options) -> None:
    """The same plan, and out of order queries too; where nothing says how long the paths are, a window is taken to cut."""
    end = pack(comb(30, 2, 3, 9), (20,)).to(DEVICE)
    index = torch.randperm(len(end), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    for given in ({}, {"depth": tree_plan(end).depth}, {"query_index": index}):
        expected = tree_plan(end, **options, **given)
        with waiting_refused(), Calls() as calls:
            plan = tree_plan(end, **options, **given, trusted=True, longest_path=48)
            unknown = tree_plan(end, **options, **given, trusted=True)
        assert not {"aten._local_scalar_dense", "aten.nonzero", "aten.equal"} & set(calls.names)
        assert plan.window_cuts == expected.window_cuts and unknown.window_cuts == bool(options)
        for name in ("subtree_end", "depth", "origin", "position"):
            assert torch.equal(getattr(plan, name), getattr(expected, name)), name
    if unknown.window_cuts and not expected.window_cuts:  # the kernels take another way
        q, k, v = inputs(end)
        plan = tree_plan(end, **options, trusted=True)
        assert_close(results(q, k, v, end, plan=plan, **options), reference(q, k, v, end, **options), 1e-5)
    with pytest.raises(ValueError, match="depth has 3 entries"):
        tree_plan(end, depth=torch.arange(3), trusted=True)


@contextmanager
def waiting_refused() -> Iterator[None]:
    """Whatever would make the host wait for a device raises, also on CPU tensors, of which no operation tells."""

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a layer made the host wait for the device")

    with pytest.MonkeyPatch.context() as patch:
        for name in ("tolist", "cpu", "numpy", "item"):
            patch.setattr(Tensor, name, refuse)
        was = torch.cuda.get_sync_debug_mode() if DEVICE == "cuda" else None
        if was is not None:
            torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            if was is not None:
                torch.cuda.set_sync_debug_mode(was)


class Calls(TorchDispatchMode):
    """Names of the operations called, and the bytes of the largest tensor any of them returned."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        self.names.append(str(func.overloadpacket))
        for x in out if isinstance(out, tuple | list) else (out,):
            if isinstance(x, Tensor):
                self.largest = max(self.largest, x.nbytes)
        return out


def test_the_walk_jumps_over_branches_nobody_sees() -> None:
    """The tiles of the last block do not depend on the size of the dead teeth in front of it."""
    for tooth in (1, 100, 500, 50_000):
        end = pack((64, (tooth,), (tooth,), (32, (tooth,), (64,)))).to(DEVICE)
        last = torch.arange(len(end) - 16, len(end), device=DEVICE) if tooth > 500 else None  # all would take minutes
        near, full, far = query_blocks(tree_plan(end, query_index=last), 16, 32)[-1].tolist()
        # Its own 16 tokens and up to 16 before them; the rest of its branch; 32 of the trunk, then 64.
        assert near == 1 and far == 0 and 1 + 1 + 2 <= full <= 5
    causal = query_blocks(tree_plan(torch.full((128,), 128, device=DEVICE)), 16, 16)
    assert causal.tolist() == [[1, i, 0] for i in range(8)]
    windowed = query_blocks(tree_plan(torch.full((128,), 128, device=DEVICE), window=33), 16, 16)
    # A block of 16 queries sees 33 - 1 keys in front of its first: all see the nearest 16 + 1, all but one tile is cut.
    assert windowed[-1].tolist() == [1, 1, 1]


def test_key_blocks_meet_one_stretch_of_queries() -> None:
    end = pack((32, (20,), (28,)), (16,))  # 96 tokens
    ranges, shallowest = key_blocks(tree_plan(end.to(DEVICE)), 32, 16, 16)
    assert shallowest is None
    # First row, masked tiles of 16, full ones of 32, masked ones of 16: trunk, trunk, tooth, teeth, tooth, tree.
    assert ranges.tolist() == [[0, 1, 2, 0], [16, 1, 1, 1], [32, 1, 0, 1], [48, 1, 0, 1], [64, 1, 0, 0], [80, 1, 0, 0]]


def test_every_forest_of_six_tokens_is_told_from_what_is_none() -> None:
    """All 720 ways to end inside the packing, against the definition."""
    accepted = 0
    for ends in itertools.product(*(range(j + 1, 7) for j in range(6))):
        nested = all(ends[b] <= ends[a] for a in range(6) for b in range(a + 1, ends[a]))
        accepted += nested
        if nested:
            plan = tree_plan(torch.tensor(ends))
            above = [[a for a in range(j) if ends[a] > j] for j in range(6)]
            assert plan.depth.tolist() == [len(a) for a in above]
            assert planning.parents(plan.depth).tolist() == [max(a, default=-1) for a in above]
        else:
            with pytest.raises(ValueError, match="subtree_end is no preorder"):
                tree_plan(torch.tensor(ends))
    assert accepted == 132  # as many as there are ordered forests of six nodes, Catalan's sixth number


def test_a_depth_that_falls_along_a_path_is_refused() -> None:
    end = pack((3, (2,), (2,)))
    with pytest.raises(ValueError, match="depth falls from 2 at token 2 to 1 at its child 5"):
        tree_plan(end, depth=torch.tensor([0, 1, 2, 3, 4, 1, 2]), window=4)
    tree_plan(end, depth=torch.tensor([0, 1, 2, 3, 4, 1, 2]))  # nobody reads it


def test_what_the_kernels_cannot_compute_is_refused(monkeypatch) -> None:
    end = pack((3, (2,)))
    for sizes in ({"dim": 257}, {"dim": 16, "values": 257}):
        q, k, v = inputs(end, **sizes)
        with pytest.raises(ValueError, match="head dimension is 257, Triton's kernels take up to 256"):
            tree_attention(q, k, v, end.to(DEVICE))
    q, k, v = (x.double() for x in inputs(end))
    with pytest.raises(ValueError, match="tree_attention in torch.float64 has no Triton kernel"):
        tree_attention(q, k, v, end.to(DEVICE))
    q, k, v = inputs(end, heads=3, key_heads=2)
    with pytest.raises(ValueError, match="3 query heads over 2 key heads"):
        tree_attention(q, k, v, end.to(DEVICE))


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (9, 0), (10, 0), (12, 0)])
def test_there_is_a_configuration_for_everything(capability) -> None:
    for kernel in ("forward", "forward_narrow", "backward_q", "backward_kv", "backward_kv_few"):
        for block_d in (16, 32, 64, 128, 256):
            for dtype in (torch.float32, torch.float16, torch.bfloat16):
                tiles = configuration(kernel, block_d, dtype, capability)
                assert tiles.block_m >= 16 and tiles.block_n >= 16 and tiles.block_m % min(32, tiles.block_m) == 0
