import contextlib
import itertools
import math
import threading
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.host_waits import HostWaits, Inside
from support.linear_logprob_cases import TARGETS, assert_close, inputs, results, rounded, upstream
from torch import Tensor

from swirl_kernels import linear_logprob, naive_linear_logprob, naive_selective_logprob, selective_logprob
from swirl_kernels.linear_logprob import eager as implementation

SMALL = 0.002  # MiB of workspace: a few dozen rows and columns a tile, nothing kept


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.integers(1, 60),
    vocab=st.integers(2, 90),
    size=st.integers(1, 9),
    padding=st.sampled_from([0, 0, 7]),
    with_bias=st.booleans(),
    temperature=st.sampled_from([1.0, 0.6, "per row"]),
    softcap=st.sampled_from([None, None, 1.5]),
    logit_scale=st.sampled_from([1.0, 0.0625, 3.0]),
    which=st.sampled_from(["logp", "entropy only", "both", "logp of both"]),
    ignored=st.sampled_from([0.0, 0.3]),
    zeros=st.sampled_from([0.0, 0.2, 0.7]),
    workspace_mb=st.sampled_from([SMALL, 0.02, 256]),
    tile=st.sampled_from([(7, 16), (1024, 4096)]),
    chosen=st.sampled_from(["live", "all"]),
)
def test_equals_naive(
    rows,
    vocab,
    size,
    padding,
    with_bias,
    temperature,
    softcap,
    logit_scale,
    which,
    ignored,
    zeros,
    workspace_mb,
    tile,
    chosen,
) -> None:
    hidden, weight, bias, targets = inputs(rows, vocab + padding, size, ignored=ignored, valid=vocab)
    targets[0] = vocab - 1
    if temperature == "per row":
        temperature = torch.rand(rows, dtype=torch.float64) + 0.5
    options = dict(
        bias=bias if with_bias else None,
        temperature=temperature,
        softcap=softcap,
        logit_scale=logit_scale,
        valid_vocab=vocab if padding else None,
        g=None if which == "entropy only" else upstream(rows, 1, zeros),
        h=None if which == "logp" else upstream(rows, 2, zeros),
    )
    if which == "logp of both":  # the entropy is asked for, but no gradient comes back through it
        options["h"] = torch.zeros(rows, dtype=torch.float64)
    with pytest.MonkeyPatch.context() as patch:  # small tiles, so that many are held, and not all of them
        patch.setattr(implementation, "TILE_ROWS", tile[0])
        patch.setattr(implementation, "TILE_VOCAB", tile[1])
        got = results(linear_logprob, hidden, weight, targets, workspace_mb=workspace_mb, rows=chosen, **options)
    expected = results(naive_linear_logprob, hidden, weight, targets, **options)
    floor = 1e-12 * (1 + sum(x.norm() for x in expected.values()))
    for name, x in expected.items():
        torch.testing.assert_close(got[name], x, rtol=1e-10, atol=float(floor), msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize(
    "softcap, temperature", itertools.product([None, 2.0], [1.0, torch.tensor([0.5, 1.0, 2.0, 1.5])])
)
def test_gradcheck(softcap: float | None, temperature: Any) -> None:
    hidden, weight, bias, targets = inputs(4, 7, 3)
    targets[2] = -100
    options = dict(softcap=softcap, temperature=temperature, logit_scale=0.3, entropy=True, workspace_mb=0.0005)
    assert torch.autograd.gradcheck(
        lambda x, w, b: linear_logprob(x, w, targets, bias=b, **options), (hidden, weight, bias)
    )


@pytest.mark.parametrize("workspace_mb", [1, 256])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 2e-6), (torch.bfloat16, 1e-2), (torch.float16, 2e-3)])
def test_other_dtypes_against_float64_of_the_same_numbers(dtype, tolerance, workspace_mb) -> None:
    hidden, weight, bias, targets = inputs(700, 3001, 48, ignored=0.1)
    options = dict(g=upstream(700, 1), h=upstream(700, 2), temperature=0.8, softcap=2.0, logit_scale=0.5)
    exact = rounded(dtype, hidden, weight, bias)
    expected = results(naive_linear_logprob, *exact[:2], targets, bias=exact[2], **options)
    cast = [x.detach().to(dtype).requires_grad_() for x in exact]
    got = results(linear_logprob, *cast[:2], targets, bias=cast[2], workspace_mb=workspace_mb, **options)
    assert got["logp"].dtype == got["entropy"].dtype == torch.float32
    assert all(got[n].dtype == dtype for n in TARGETS[2:])
    assert_close(got, expected, tolerance)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_multiplies_in_16_bits_and_returns_gradients_in_fp32(dtype: torch.dtype) -> None:
    hidden, weight, _, targets = inputs(300, 2500, 32)
    exact = rounded(dtype, hidden, weight)
    expected = results(naive_linear_logprob, *exact, targets, g=upstream(300, 1), h=upstream(300, 2))
    single = [x.detach().float().requires_grad_() for x in (hidden, weight)]
    for mixed in (single, [single[0].detach().to(dtype).requires_grad_(), single[1]]):
        with torch.autocast("cpu", dtype), Products() as products:
            out = linear_logprob(*mixed, targets, entropy=True)
        assert products.dtypes == {dtype}
        grads = []
        for context in (contextlib.nullcontext(), torch.autocast("cpu", dtype)):  # same bits either way
            with context, Products() as products:
                up = [upstream(300, seed).float() for seed in (1, 2)]
                grads.append(torch.autograd.grad(out, mixed, up, retain_graph=True))
            assert products.dtypes == {dtype}
        assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
        got = dict(zip(TARGETS, (*(x.detach() for x in out), *grads[0]), strict=False))
        assert got["dweight"].dtype == torch.float32 and got["dhidden"].dtype == mixed[0].dtype
        assert_close(got, expected, 1e-2)


def test_target_logit_of_bf16_inputs_is_not_rounded() -> None:
    """Logits near 40 are 0.25 apart in bf16. The target's own is exact, and with it a logp that hangs on nothing
    else."""
    torch.manual_seed(0)
    hidden = torch.zeros(64, 8)
    hidden[:, 0] = torch.linspace(6, 6.5, 64)
    weight = torch.zeros(1000, 8)
    weight[5, 0] = 6.3
    targets = torch.full((64,), 5)
    hidden, weight = hidden.bfloat16(), weight.bfloat16()
    z = hidden[:, 0].double() * weight[5, 0].double() / 5
    expected = z - torch.logaddexp(z, torch.full_like(z, math.log(999)))
    got = linear_logprob(hidden, weight, targets, temperature=5.0)
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5)


class Products(Inside):
    """Dtypes of the matrix products' factors, and the elements of the largest tensor made."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: set[torch.dtype] = set()
        self.largest = 0

    def seen(self, func: Any, args: tuple[Any, ...], out: Any) -> None:
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm_, torch.ops.aten.addmm):
            self.dtypes |= {x.dtype for x in args if isinstance(x, Tensor)}
        for x in out if isinstance(out, tuple | list) else (out,):
            if isinstance(x, Tensor):
                self.largest = max(self.largest, x.numel())


@pytest.mark.parametrize("tile", [(64, 512), (1024, 4096)])
@pytest.mark.parametrize("entropy, softcap, dtype", [(False, None, torch.float32), (True, 5.0, torch.bfloat16)])
def test_workspace_bounds_what_exists_of_the_logits(entropy, softcap, dtype, tile, monkeypatch) -> None:
    rows, vocab, size, workspace = 1500, 6000, 4, 2 * 2**20
    monkeypatch.setattr(implementation, "TILE_ROWS", tile[0])
    monkeypatch.setattr(implementation, "TILE_VOCAB", tile[1])
    hidden, weight, _, targets = (x.detach() for x in inputs(rows, vocab, size))
    hidden, weight = (x.to(dtype).requires_grad_() for x in (hidden, weight))
    saved: dict[int, int] = {}

    def note(x: Tensor) -> Tensor:
        saved[x.data_ptr()] = x.numel() * x.itemsize
        return x

    with Products() as products, torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        out = linear_logprob(hidden, weight, targets, entropy=entropy, softcap=softcap, workspace_mb=2)
        loss = out[0].sum() + out[1].sum() if entropy else out.sum()
        loss.backward()
    assert products.largest * 4 <= workspace < rows * vocab * 4
    held = sum(size for x, size in saved.items() if x not in (hidden.data_ptr(), weight.data_ptr()))
    per_row = 8 * 8 * rows  # targets and results
    assert held <= workspace + per_row
    if tile == (64, 512):  # small tiles leave room, and it is used
        assert held > workspace / 4


def test_logits_far_below_zero_and_a_vocabulary_no_tile_divides() -> None:
    """A padded column that counted as logit 0 would take all the probability."""
    hidden, weight, _, targets = inputs(33, 4099, 16)
    bias = torch.full((4099,), -1000.0, dtype=torch.float64, requires_grad=True)
    options = dict(g=upstream(33, 1), h=upstream(33, 2), bias=bias)
    expected = results(naive_linear_logprob, hidden, weight, targets, **options)
    for workspace_mb in (0.1, 256):
        got = results(linear_logprob, hidden, weight, targets, workspace_mb=workspace_mb, **options)
        assert_close(got, expected, 1e-10)
    single = [x.detach().float().requires_grad_() for x in (hidden, weight, bias)]
    got = results(linear_logprob, *single[:2], targets, **options | {"bias": single[2]})
    assert_close(got, expected, 2e-4)  # fp32 logits near -1000 are 6e-5 apart


def test_a_nearly_certain_target_keeps_its_digits() -> None:
    """logp and every gradient shrink to 1e-6 here; in fp32 they must still be right relative to themselves."""
    torch.manual_seed(0)
    vocab = 500
    hidden = torch.zeros(20, 8, dtype=torch.float64)
    hidden[:, 0] = torch.linspace(14, 20, 20)
    hidden[:, 1:] = 0.1 * torch.randn(20, 7)
    weight = torch.zeros(vocab, 8, dtype=torch.float64)
    weight[:, 1:] = 0.1 * torch.randn(vocab, 7)
    weight[3, 0] = 1.0
    targets = torch.full((20,), 3)
    single = [x.float().requires_grad_() for x in (hidden, weight)]
    exact = [x.detach().double().requires_grad_() for x in single]
    for workspace_mb in (0.05, 256):
        got = results(linear_logprob, *single, targets, g=upstream(20, 3), h=upstream(20, 4), workspace_mb=workspace_mb)
        expected = results(naive_linear_logprob, *exact, targets, g=upstream(20, 3), h=upstream(20, 4))
        assert expected["logp"].abs().max() < 5e-3 and expected["logp"].abs().min() < 2e-6
        assert_close(got, expected, 1e-5)
        for name in ("logp", "entropy"):
            relative = (got[name].double() - expected[name]).abs() / expected[name].abs()
            assert relative.max() < 1e-5


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("workspace_mb, chosen", [(SMALL, "live"), (256, "live"), (SMALL, "all"), (256, "all")])
def test_ignored_rows_contribute_exactly_zero(poison: float, workspace_mb: float, chosen: str) -> None:
    hidden, weight, bias, targets = inputs(40, 70, 6, ignored=0.4)
    live = targets != -100
    assert 0 < live.sum() < 40
    poisoned = hidden.detach().masked_fill(~live[:, None], poison).requires_grad_()
    temperature = (torch.rand(40, dtype=torch.float64) + 0.5).masked_fill(~live, poison)
    g, h = upstream(40, 1).masked_fill(~live, poison), upstream(40, 2).masked_fill(~live, poison)
    options = dict(bias=bias, workspace_mb=workspace_mb)
    got = results(linear_logprob, poisoned, weight, targets, g=g, h=h, temperature=temperature, rows=chosen, **options)
    alone = results(
        linear_logprob,
        hidden.detach()[live].requires_grad_(),
        weight,
        targets[live],
        g=g[live],
        h=h[live],
        temperature=temperature[live],
        **options,
    )
    for name, x in alone.items():
        per_row = name in ("logp", "entropy", "dhidden")
        ours = got[name][live] if per_row else got[name]
        if chosen == "live":
            assert torch.equal(ours, x), name
        else:  # the products are over other numbers of rows
            torch.testing.assert_close(ours, x, rtol=1e-11, atol=1e-13)
        assert not per_row or (got[name][~live] == 0).all(), name


@pytest.mark.parametrize("workspace_mb", [SMALL, 256])
@pytest.mark.parametrize("flowing", [1, 25, 39])
@pytest.mark.parametrize("chosen", ["live", "all"])
def test_rows_with_zero_upstream_are_skipped_exactly(workspace_mb: float, flowing: int, chosen: str) -> None:
    """Even a row whose hidden state is NaN passes nothing back when nothing comes in."""
    hidden, weight, bias, targets = inputs(40, 70, 6)
    quiet = torch.arange(40) >= flowing
    poisoned = hidden.detach().masked_fill(quiet[:, None], math.nan).requires_grad_()
    options = dict(bias=bias, g=upstream(40, 1).masked_fill(quiet, 0.0), h=None)
    got = results(linear_logprob, poisoned, weight, targets, workspace_mb=workspace_mb, rows=chosen, **options)
    expected = results(naive_linear_logprob, hidden, weight, targets, **options)
    assert (got["dhidden"][quiet] == 0).all()
    del got["logp"], expected["logp"]
    assert_close(got, expected, 1e-10)


def test_a_row_is_the_same_in_every_packing() -> None:
    hidden, weight, _, targets = inputs(900, 2000, 40)
    hidden, weight = (x.detach().float().requires_grad_() for x in (hidden, weight))
    g, h = upstream(900, 1), upstream(900, 2)
    whole = results(linear_logprob, hidden, weight, targets, g=g, h=h)
    order = torch.randperm(900, generator=torch.Generator().manual_seed(3))
    for workspace_mb in (0.5, 256):
        options = dict(workspace_mb=workspace_mb)
        permuted = hidden.detach()[order].requires_grad_()
        got = results(linear_logprob, permuted, weight, targets[order], g=g[order], h=h[order], **options)
        for name in ("logp", "entropy", "dhidden"):
            torch.testing.assert_close(got[name], whole[name][order], rtol=1e-6, atol=2e-6)
        for rows in (slice(0, 1), slice(3, 20), slice(100, 513)):
            part = hidden.detach()[rows].requires_grad_()
            got = results(linear_logprob, part, weight, targets[rows], g=g[rows], h=h[rows], **options)
            for name in ("logp", "entropy", "dhidden"):
                torch.testing.assert_close(got[name], whole[name][rows], rtol=1e-6, atol=2e-6)


def test_rows_of_dlogits_sum_to_zero() -> None:
    """With a constant feature of weight 1 that sum is its gradient, and over all rows the bias gradient's sum."""
    hidden, weight, bias, targets = inputs(50, 3000, 8)
    weight.data[:, 0] = 1.0
    hidden, weight, bias = (x.detach().float().requires_grad_() for x in (hidden, weight, bias))
    for h in (None, upstream(50, 2)):
        got = results(linear_logprob, hidden, weight, targets, g=upstream(50, 1), h=h, bias=bias)
        assert got["dhidden"][:, 0].abs().max() < 2e-6 * 10
        assert abs(got["dbias"].double().sum()) < 1e-5


@pytest.mark.parametrize("frozen", list(itertools.product([False, True], repeat=3)))
def test_frozen_inputs_get_no_gradient_and_cost_no_product(frozen: tuple[bool, bool, bool]) -> None:
    hidden, weight, bias, targets = inputs(30, 50, 4)
    tensors = [x.detach().requires_grad_(not f) for x, f in zip((hidden, weight, bias), frozen, strict=True)]
    out = linear_logprob(*tensors[:2], targets, bias=tensors[2])
    if all(frozen):
        assert not out.requires_grad
        return
    with Products() as products:
        out.backward(upstream(30, 1))
    expected = torch.autograd.grad(
        naive_linear_logprob(hidden, weight, targets, bias=bias), (hidden, weight, bias), upstream(30, 1)
    )
    for x, e, f in zip(tensors, expected, frozen, strict=True):
        assert (x.grad is None) if f else torch.allclose(x.grad, e, rtol=1e-10, atol=1e-12)  # type: ignore[arg-type]
    assert bool(products.dtypes) == (
        not (frozen[0] and frozen[1])
    )  # all tiles were kept: the bias alone needs no product


def test_strided_slices_as_inputs() -> None:
    hidden, weight, _, targets = inputs(24, 60, 5)
    expected = results(naive_linear_logprob, hidden, weight, targets, g=upstream(24, 1), h=None)
    wide = torch.full((24, 13), math.nan, dtype=torch.float64)
    wide[:, 2:12:2] = hidden.detach()
    tall = torch.full((120, 5), math.nan, dtype=torch.float64)
    tall[::2] = weight.detach()
    strided = wide[:, 2:12:2].requires_grad_(), tall[::2].requires_grad_()
    for workspace_mb in (SMALL, 256):
        got = results(linear_logprob, *strided, targets, g=upstream(24, 1), h=None, workspace_mb=workspace_mb)
        assert_close(got, expected, 1e-10)
    transposed = weight.detach().t().contiguous().t().requires_grad_()
    got = results(linear_logprob, hidden, transposed, targets, g=upstream(24, 1), h=None)
    assert_close(got, expected, 1e-10)


def test_a_bias_of_minus_infinity_forbids_tokens() -> None:
    hidden, weight, bias, targets = inputs(20, 40, 4)
    forbidden = torch.arange(40) % 3 == 0
    targets = targets - (targets % 3 == 0).long() + 2 * (targets == 0).long()
    bias = bias.detach().masked_fill(forbidden, -math.inf)
    options = dict(g=upstream(20, 1), h=upstream(20, 2))
    for workspace_mb in (SMALL, 256):
        got = results(linear_logprob, hidden, weight, targets, bias=bias, workspace_mb=workspace_mb, **options)
        allowed = weight.detach()[~forbidden].requires_grad_()
        position = (~forbidden).cumsum(0) - 1
        expected = results(naive_linear_logprob, hidden, allowed, position[targets], bias=bias[~forbidden], **options)
        assert (got["dweight"][forbidden] == 0).all()
        got["dweight"] = got["dweight"][~forbidden]
        assert_close(got, expected, 1e-10)


def test_backward_from_a_second_thread_and_twice() -> None:
    hidden, weight, _, targets = inputs(30, 50, 4)
    out = linear_logprob(hidden, weight, targets)
    expected = torch.autograd.grad(out, (hidden, weight), upstream(30, 1), retain_graph=True)
    got: list[Tensor] = []
    work = lambda: got.extend(torch.autograd.grad(out, (hidden, weight), upstream(30, 1), retain_graph=True))  # noqa: E731
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_backward_under_autocast_multiplies_as_its_forward_did() -> None:
    tensors = [x.detach().float().requires_grad_() for x in inputs(30, 50, 4)[:2]]
    out = linear_logprob(*tensors, torch.arange(30), workspace_mb=SMALL)
    expected = torch.autograd.grad(out, tensors, upstream(30, 1).float(), retain_graph=True)
    with torch.autocast("cpu", torch.bfloat16):
        got = torch.autograd.grad(out, tensors, upstream(30, 1).float())
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32])
@pytest.mark.parametrize(
    "operation", [linear_logprob, naive_linear_logprob, selective_logprob, naive_selective_logprob]
)
def test_targets_of_any_width_are_the_same_tokens(operation: Any, dtype: torch.dtype) -> None:
    """In 8 unsigned bits the token 156 looks like -100."""
    hidden, weight, _, targets = inputs(30, 200, 4)
    targets[:3] = torch.tensor([156, 199, 0])
    targets = targets.clamp(max=torch.iinfo(dtype).max)
    if dtype.is_signed:
        targets[5] = -100
    arguments = (hidden, weight) if "linear" in operation.__name__ else (hidden @ weight.T,)
    assert torch.equal(operation(*arguments, targets.to(dtype)), operation(*arguments, targets))


def test_no_rows_and_only_ignored_rows() -> None:
    for targets in (torch.zeros(0, dtype=torch.int64), torch.full((3,), -100)):
        hidden = torch.full((len(targets), 4), math.nan, requires_grad=True)
        weight = torch.randn(10, 4, requires_grad=True)
        logp, entropy = linear_logprob(hidden, weight, targets, entropy=True)
        (logp.sum() + entropy.sum()).backward()
        assert logp.shape == entropy.shape == targets.shape and (logp == 0).all() and (entropy == 0).all()
        assert hidden.grad is not None and hidden.grad.shape == hidden.shape and (hidden.grad == 0).all()
        assert weight.grad is not None and (weight.grad == 0).all()


def test_wrong_arguments_are_refused_with_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight, bias, targets = inputs(6, 10, 4)

    def refused(message: str, *args: Any, **options: Any) -> None:
        with pytest.raises(ValueError, match=message):
            linear_logprob(*args, **options)

    refused(
        r"targets\[4\] is 10, outside the vocabulary \[0, 10\)",
        hidden,
        weight,
        targets.index_fill(0, torch.tensor(4), 10),
    )
    refused(r"targets\[1\] is -1, .* ignore_index=-100", hidden, weight, targets.index_fill(0, torch.tensor(1), -1))
    refused(r"outside the vocabulary \[0, 3\)", hidden, weight, torch.full((6,), 3), valid_vocab=3)
    refused(r"\(6, 4\) and weight \(10, 3\)", hidden, weight[:, :3], targets)
    refused(r"shape \(1, 6, 4\)", hidden[None], weight, targets)
    refused(r"give integers \[6\]", hidden, weight, targets[:5])
    refused(r"torch.float64; give integers", hidden, weight, targets.double())
    refused(r"torch.bool; give integers \[6\]", hidden, weight, targets > 3)
    refused(r"bias has shape \(9,\)", hidden, weight, targets, bias=bias[:9])
    refused("hidden is torch.float64 and weight torch.float32", hidden, weight.float(), targets)
    refused("valid_vocab is 11", hidden, weight, targets, valid_vocab=11)
    refused("temperature is 0", hidden, weight, targets, temperature=0.0)
    refused(r"temperature\[2\] is -1", hidden, weight, targets, temperature=torch.tensor([1.0, 1, -1, 1, 1, 1]))
    refused("without gradient", hidden, weight, targets, temperature=torch.ones(6, requires_grad=True))
    for cap in (0.0, -1.0, math.inf, math.nan):
        refused(f"softcap is {cap}; use a positive finite number", hidden, weight, targets, softcap=cap)
    for scale in (0.0, -1.0, math.inf, math.nan, torch.tensor(2.0)):
        refused("logit_scale is .*; use a positive finite float", hidden, weight, targets, logit_scale=scale)
    for size in (0, -1.0, math.inf, math.nan):
        refused(f"workspace_mb is {size}; use a positive finite", hidden, weight, targets, workspace_mb=size)
    refused("rows is 'every'; use 'live', or 'all'", hidden, weight, targets, rows="every")
    refused("invariant=True is what the Triton kernels do", hidden, weight, targets, invariant=True)
    monkeypatch.setenv("SWIRL_KERNELS_BACKEND", "triton")
    refused("linear_logprob in torch.float64 has no Triton kernel", hidden, weight, targets)


def test_all_rows_without_a_look_at_their_values() -> None:
    """Nothing of forward and backward waits for a device; by default they look."""
    hidden, weight, bias, targets = inputs(30, 80, 6, ignored=0.3)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        cast = [x.detach().to(dtype).requires_grad_() for x in (hidden, weight, bias)]
        options = dict(bias=cast[2], temperature=torch.rand(30) + 0.5, g=upstream(30, 1, 0.3), h=upstream(30, 2))
        with HostWaits() as waits:
            results(linear_logprob, *cast[:2], targets, rows="all", **options)
        assert not waits.found
    with HostWaits() as waits:
        results(linear_logprob, *cast[:2], targets, **options)
    assert waits.found


def test_a_wrong_target_that_nobody_looked_at_gives_nan() -> None:
    hidden, weight, bias, targets = inputs(6, 10, 4)
    targets[:4] = torch.tensor([10, -1, 2**31 - 1, -100])
    for dtype in (torch.float64, torch.bfloat16):
        logp = linear_logprob(hidden.to(dtype), weight.to(dtype), targets, bias=bias.to(dtype), rows="all")
        assert logp.isnan().tolist() == [True] * 3 + [False] * 3 and logp[3] == 0
