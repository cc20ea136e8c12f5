"""Both implementations against float64; Triton compiled on a GPU, interpreted without one."""

import itertools
import math
import threading
from typing import Any

import pytest
import torch
from torch import Tensor

from swirl_kernels import naive_segment_reduce, segment_reduce

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BLOCK = 128  # positions that a Triton kernel takes of a segment at a time
LENGTHS = (0, 3, 1, 0, BLOCK + 200, BLOCK, 17, 1, 0)
OPS = ("sum", "mean", "max")


@pytest.fixture(params=["torch", "triton"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "triton":
        pytest.importorskip("triton")
        from swirl_kernels.segment_reduce.triton import SHORT_BLOCK

        assert SHORT_BLOCK == BLOCK
    monkeypatch.setenv("SWIRL_KERNELS_BACKEND", request.param)
    return request.param


def offsets_of(lengths: tuple[int, ...]) -> Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)], device=DEVICE)


def inputs(
    indexed: bool, entries: int = 50, lengths: tuple[int, ...] = LENGTHS
) -> tuple[Tensor, Tensor, Tensor | None]:
    """x in float64, offsets, index. Entries repeat within and across segments, and some are in none."""
    torch.manual_seed(0)
    offsets = offsets_of(lengths)
    positions = int(offsets[-1])
    index = torch.randint(0, entries - 5, (positions,)).to(DEVICE) if indexed else None
    x = torch.randn(entries if indexed else positions, dtype=torch.float64) + 1  # sums that do not cancel
    return x.to(DEVICE), offsets, index


def results(function: Any, x: Tensor, offsets: Tensor, op: str, index: Tensor | None) -> tuple[Tensor, Tensor]:
    """Value and gradient for another upstream gradient at every segment."""
    x = x.clone().requires_grad_()
    out = function(x, offsets, op, index)
    upstream = torch.randn(len(out), generator=torch.Generator().manual_seed(1), dtype=torch.float64) + 1.5
    (dx,) = torch.autograd.grad(out, x, upstream.to(out))
    return out.detach(), dx


def assert_close(got: tuple[Tensor, ...], expected: tuple[Tensor, ...], tolerance: float, what: Any = "") -> None:
    for name, a, b in zip(("out", "dx"), got, expected, strict=True):
        a, b = a.double(), b.double()
        assert a.shape == b.shape, (what, name)
        finite = b.isfinite()
        assert torch.equal(a[~finite], b[~finite]), (what, name)
        a, b = a[finite], b[finite]
        assert not a.isnan().any() and (a - b).norm() <= tolerance * b.norm(), (what, name)
        assert not ((a - b).abs() > 4 * tolerance * (b.abs() + b.abs().mean())).any(), (what, name)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("indexed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_against_float64(backend: str, op: Any, indexed: bool, dtype: torch.dtype) -> None:
    if backend == "triton" and (dtype == torch.float64 or (dtype == torch.bfloat16 and DEVICE == "cpu")):
        pytest.skip("no kernel for it")
    x, offsets, index = inputs(indexed)
    x = x.to(dtype)
    expected = results(naive_segment_reduce, x.double(), offsets, op, index)
    value, gradient = results(segment_reduce, x, offsets, op, index)
    assert value.dtype == torch.promote_types(dtype, torch.float32) and gradient.dtype == dtype
    tolerance = 1e-13 if dtype == torch.float64 else 1e-6
    # of the 16-bit types the gradient alone is rounded, and once
    assert_close((value, expected[1]), expected, tolerance, (op, indexed))
    assert_close((expected[0], gradient), expected, {2: 4e-3, 4: 1e-6, 8: 1e-13}[dtype.itemsize], (op, indexed))


@pytest.mark.parametrize("op", OPS)
def test_every_length_around_a_block(backend: str, op: Any) -> None:
    for length in (1, 2, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK, 2 * BLOCK + 1):
        for indexed in (False, True):
            x, offsets, index = inputs(indexed, lengths=(length, 2))
            expected = results(naive_segment_reduce, x.float().double(), offsets, op, index)
            assert_close(results(segment_reduce, x.float(), offsets, op, index), expected, 2e-6, (length, indexed))


def test_long_segments_and_many_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """A program a segment above SHORT positions; stretches that begin and end inside of segments, in the gradient."""
    pytest.importorskip("triton")
    from swirl_kernels.segment_reduce import triton as kernels

    monkeypatch.setenv("SWIRL_KERNELS_BACKEND", "triton")
    monkeypatch.setattr(kernels, "SHORT", 4)
    monkeypatch.setattr(kernels, "SPREAD_PROGRAMS", 3)
    for lengths in ((0, 2 * kernels.BLOCK + 5, 0, 3), (1,) * 20 + (0, 0, 300)):
        x, offsets, _ = inputs(False, lengths=lengths)
        for op in OPS:
            expected = results(naive_segment_reduce, x.float().double(), offsets, op, None)
            assert_close(results(segment_reduce, x.float(), offsets, op, None), expected, 2e-6, (lengths, op))


def test_count_looks_at_offsets_alone(backend: str) -> None:
    x, offsets, index = inputs(True)
    out = segment_reduce(x.float() * math.nan, offsets, "count", index)
    assert out.dtype == torch.int64 and out.tolist() == list(LENGTHS)


@pytest.mark.parametrize("indexed", [False, True])
def test_empty_segments(backend: str, indexed: bool) -> None:
    for lengths in ((0,), (), (0, 0, 2, 0)):
        x, offsets, index = inputs(indexed, lengths=lengths)
        for op, empty in (("sum", 0.0), ("mean", 0.0), ("max", -math.inf)):
            out, dx = results(segment_reduce, x.float(), offsets, op, index)
            assert out.shape == (len(lengths),) and dx.shape == x.shape and dx.isfinite().all()
            assert all(out[s] == empty for s, n in enumerate(lengths) if not n)


def test_a_maximum_goes_to_its_first_position(backend: str) -> None:
    inf, nan = math.inf, math.nan
    x = torch.tensor([1.0, 3.0, 3.0, -inf, -inf, 2.0, nan, 9.0, nan, inf, inf], device=DEVICE)
    offsets = offsets_of((3, 2, 4, 2))
    out, dx = results(segment_reduce, x, offsets, "max", None)
    torch.testing.assert_close(out.cpu(), torch.tensor([3.0, -inf, nan, inf]), equal_nan=True)
    assert dx.nonzero()[:, 0].tolist() == [1, 3, 6, 9]
    # through an index, and with one entry chosen by two segments: their gradients add up
    index = torch.tensor([2, 1, 0, 1, 5], device=DEVICE)
    x = torch.tensor([1.0, 7.0, 7.0, 9.0, 9.0, 0.0], device=DEVICE)
    for offsets, chosen in ((offsets_of((2, 2, 1)), [2, 1, 5]), (offsets_of((3, 0, 2)), [2, 1])):
        x.requires_grad_()
        out = segment_reduce(x, offsets, "max", index)
        (dx,) = torch.autograd.grad(out, x, torch.full_like(out, 2.0))
        assert dx.tolist() == [2.0 * chosen.count(n) for n in range(6)]
    twice = segment_reduce(x, offsets_of((1, 1)), "max", torch.tensor([3, 3], device=DEVICE))
    (dx,) = torch.autograd.grad(twice, x, torch.tensor([2.0, 0.5], device=DEVICE))
    assert dx.tolist() == [0, 0, 0, 2.5, 0, 0]


def test_nan_and_infinity_stay_in_their_segment(backend: str) -> None:
    x = torch.tensor([1.0, math.nan, 2.0, 3.0, math.inf, 4.0], device=DEVICE)
    for op, rest in (("sum", 5.0), ("mean", 2.5)):
        out, dx = results(segment_reduce, x, offsets_of((2, 2, 2)), op, None)
        assert out[0].isnan() and out[1] == rest and out[2] == math.inf and dx.isfinite().all()


def test_shared_entries_collect_their_gradient_the_same_way_each_time(backend: str) -> None:
    x, offsets, _ = inputs(True, entries=6)
    index = torch.zeros(int(offsets[-1]), dtype=torch.int64, device=DEVICE)
    for op in OPS:
        first, again = (results(segment_reduce, x.float(), offsets, op, index) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
        assert_close(first, results(naive_segment_reduce, x.float().double(), offsets, op, index), 1e-6, op)
    narrow = results(segment_reduce, x.float(), offsets, "sum", index.int())
    assert torch.equal(narrow[1], results(segment_reduce, x.float(), offsets.int(), "sum", index)[1])


def test_strides_threads_and_frozen_inputs(backend: str) -> None:
    x, offsets, index = inputs(True)
    wide = torch.full((len(x), 2), math.nan, device=DEVICE)
    wide[:, 0] = x.float()
    strided = wide[:, 0].requires_grad_()
    twice = torch.stack([index, index], -1)[:, 0]
    for op in OPS:
        out = segment_reduce(strided, offsets, op, twice)
        assert torch.equal(out, segment_reduce(x.float(), offsets, op, index))
        upstream = torch.ones((), device=DEVICE).expand(len(out))  # stride 0
        (expected,) = torch.autograd.grad(out, strided, upstream, retain_graph=True)
        got: list[Tensor] = []
        work = lambda o=out, u=upstream, g=got: g.extend(torch.autograd.grad(o, strided, u))  # noqa: E731
        thread = threading.Thread(target=work)
        thread.start(), thread.join()
        assert torch.equal(got[0], expected)
    assert not segment_reduce(x.float(), offsets, "sum", index).requires_grad


@pytest.mark.parametrize("op", OPS)
def test_a_segment_keeps_its_bits_wherever_it_is_packed(backend: str, op: Any) -> None:
    x, offsets, _ = inputs(False)
    order = [4, 0, 6, 2, 8, 1, 5, 3, 7]
    lengths = [LENGTHS[s] for s in order]
    out = segment_reduce(x.float(), offsets, op)
    moved = torch.cat([x.float().split(LENGTHS)[s] for s in order])
    again = segment_reduce(moved, offsets_of(tuple(lengths)), op)
    assert torch.equal(out[order].nan_to_num(), again.nan_to_num()) and torch.equal(out[order].isnan(), again.isnan())


def test_gradcheck(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SWIRL_KERNELS_BACKEND", "torch")
    for op, indexed in itertools.product(OPS, (False, True)):
        x, offsets, index = inputs(indexed, entries=7, lengths=(0, 3, 1, 4))
        assert torch.autograd.gradcheck(
            lambda x, o=op, f=offsets, i=index: segment_reduce(x, f, o, i)[1:], (x.requires_grad_(),)
        )


def test_what_a_gpu_does_not_read_back_comes_out_as_nan() -> None:
    """Called below the checks, which on a CPU refuse these by value. Nothing outside the tensors is touched."""
    pytest.importorskip("triton")
    from swirl_kernels.segment_reduce.triton import segment_reduce_triton, segment_spread_triton

    x = torch.ones(6, device=DEVICE)
    for bad in ([0, 3, 4], [1, 3, 6], [0, 5, 3, 6], [0, 9, 6], [-1, 6]):
        offsets = torch.tensor(bad, device=DEVICE)
        for op in OPS:
            assert segment_reduce_triton(x, offsets, op, None)[0].isnan().any(), (bad, op)
        spread = segment_spread_triton(torch.ones(len(bad) - 1, device=DEVICE), offsets, 6)
        assert ((spread == 1) | spread.isnan()).all()
    for op in OPS:
        index = torch.tensor([0, 6, 1, -1, 2, 3], device=DEVICE)
        out, _ = segment_reduce_triton(x, offsets_of((1, 2, 1, 2)), op, index)
        assert out.isnan().tolist() == [False, True, True, False]


def test_wrong_arguments_are_refused_with_numbers(backend: str) -> None:
    x, offsets = torch.zeros(5, device=DEVICE), torch.tensor([0, 3, 5], device=DEVICE)

    def refused(message: str, *args: Any) -> None:
        with pytest.raises(ValueError, match=message):
            segment_reduce(*args)

    refused("op is 'prod'; use one of sum, mean, max, count", x, offsets, "prod")
    refused(r"x has shape \(1, 5\)", x[None], offsets, "sum")
    refused("torch.int64; give a floating vector", x.long(), offsets, "sum")
    refused(r"offsets have shape \(\)", x, offsets[0], "sum")
    refused("give int32 or int64", x, offsets.float(), "sum")
    refused("index has shape .* torch.float32", x, offsets, "sum", x)
    if backend == "torch" or DEVICE == "cpu":
        refused("offsets go from 0 to 4; x has 5 entries", x, offsets_of((3, 1)), "sum")
        refused("offsets go from 0 to 5; index has 4 entries", x, offsets, "sum", offsets.new_zeros(4))
        refused(r"offsets\[2\] is 1, below offsets\[1\] = 3", x, torch.tensor([0, 3, 1, 5], device=DEVICE), "sum")
        refused(r"index\[1\] is 5, outside \[0, 5\)", x, offsets_of((2,)), "sum", torch.tensor([0, 5], device=DEVICE))
        refused(r"index\[0\] is -1", x, offsets_of((2,)), "max", torch.tensor([-1, 0], device=DEVICE))
