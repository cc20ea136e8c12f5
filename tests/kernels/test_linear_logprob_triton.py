"""The Triton kernels of linear_logprob: interpreted on a CPU, compiled where a CUDA device is there."""

import itertools
import math
import sys
import threading
from typing import Any

import pytest
import torch
from support.host_waits import HostWaits
from support.linear_logprob_cases import assert_close, inputs, results, rounded, upstream
from torch import Tensor

pytest.importorskip("triton")

from swirl_kernels import linear_logprob, naive_linear_logprob
from swirl_kernels.linear_logprob import chunks, ops, streams
from swirl_kernels.linear_logprob import triton as implementation
from swirl_kernels.linear_logprob.autograd import Settings, Upstream

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}
DTYPES = [dtype for dtype in TOLERANCE if dtype != torch.bfloat16 or DEVICE == "cuda"]
SMALL = 0.02  # MiB of workspace: many chunks of the vocabulary in the backward


@pytest.fixture(autouse=True)
def triton_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SWIRL_KERNELS_BACKEND", "triton")


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several tiles a split, several splits, several segments and row blocks at sizes that an interpreter can do."""
    monkeypatch.setattr(streams, "ROWS", 32)
    monkeypatch.setattr(streams, "SEGMENT", 32)
    tiles = {"BLOCK_N": 16, "BLOCK_V": 32, "BLOCK_H": 16, "num_warps": 4, "num_stages": 2}
    monkeypatch.setattr(implementation, "configuration", lambda *_, **__: dict(tiles))
    monkeypatch.setattr(implementation, "SPLIT", 64)
    monkeypatch.setattr(implementation, "GROUP", 2)


def place(*tensors: Tensor | None, dtype: torch.dtype = torch.float32) -> list[Any]:
    return [None if x is None else x.detach().to(DEVICE, dtype).requires_grad_(x.requires_grad) for x in tensors]


def check(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    *,
    g: Tensor | None,
    h: Tensor | None,
    dtype: torch.dtype = torch.float32,
    tolerance: float | None = None,
    workspace_mb: float = 256,
    rows: str = "live",
    invariant: bool = False,
    **options: Any,
) -> dict[str, Tensor]:
    """Values and gradients against float64 on the same rounded inputs; returns the computed ones."""
    exact = [None if x is None else rounded(dtype, x)[0] for x in (hidden, weight, bias)]
    expected = results(naive_linear_logprob, *exact[:2], targets, bias=exact[2], g=g, h=h, **options)
    ours = place(hidden, weight, bias, dtype=dtype)
    moved = {name: x.to(DEVICE) if isinstance(x, Tensor) else x for name, x in options.items()}
    g, h = (None if x is None else x.to(DEVICE) for x in (g, h))
    moved |= {"rows": rows, "invariant": invariant, "workspace_mb": workspace_mb}
    got = results(linear_logprob, *ours[:2], targets.to(DEVICE), bias=ours[2], g=g, h=h, **moved)
    got = {name: x.cpu() for name, x in got.items()}
    assert_close(got, expected, TOLERANCE[dtype] if tolerance is None else tolerance)
    return got


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "softcap, temperature, logit_scale", [(None, 1.0, 1.0), (1.5, "per row", 0.25), (None, 0.7, 3.0)]
)
@pytest.mark.parametrize(
    "which, chosen, invariant",
    [("logp", "live", False), ("entropy only", "live", True), ("both", "live", False), ("both", "all", True)],
)
@pytest.mark.usefixtures("small_tiles")
def test_equals_float64(
    dtype: torch.dtype,
    softcap: float | None,
    temperature: Any,
    logit_scale: float,
    which: str,
    chosen: str,
    invariant: bool,
) -> None:
    """Non-uniform upstream gradients, some of them zero; padding behind the vocabulary; ignored rows; chunks and splits."""
    rows, vocab, padding, size = 45, 203, 7, 24
    hidden, weight, bias, targets = inputs(rows, vocab + padding, size, ignored=0.2, valid=vocab)
    targets[:3] = torch.tensor([vocab - 1, 0, 64])
    if temperature == "per row":
        temperature = torch.rand(rows, dtype=torch.float64) + 0.5
        temperature = temperature.to(dtype).double()
    got = check(
        hidden,
        weight,
        bias if softcap is None else None,
        targets,
        g=None if which == "entropy only" else upstream(rows, 1, 0.2),
        h=None if which == "logp" else upstream(rows, 2, 0.2),
        dtype=dtype,
        tolerance=2e-5 if logit_scale > 1 and dtype == torch.float32 else None,  # logits near 60 are 4e-6 apart
        temperature=temperature,
        softcap=softcap,
        logit_scale=logit_scale,
        valid_vocab=vocab,
        workspace_mb=SMALL,
        rows=chosen,
        invariant=invariant,
    )
    assert (got["dweight"][vocab:] == 0).all()


@pytest.mark.parametrize("dtype, invariant", [*((dtype, True) for dtype in DTYPES), (torch.float32, False)])
def test_shipped_tiles_equal_float64(dtype: torch.dtype, invariant: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, vocab = (150, 4500) if invariant else (5, 2500)  # of one row a program, of three segments
    if invariant:
        monkeypatch.setattr(streams, "ROWS", 64)
    hidden, weight, bias, targets = inputs(rows, vocab, 80)
    check(hidden, weight, bias, targets, g=upstream(rows, 1), h=upstream(rows, 2), dtype=dtype, invariant=invariant)


KEPT_CASES = [
    (torch.float32, None, "live"),
    (torch.float32, 1.5, "all"),
    (torch.bfloat16, None, "all"),
]


@pytest.mark.parametrize("dtype, softcap, chosen", KEPT_CASES)
@pytest.mark.usefixtures("small_tiles")
def test_kept_tiles_change_nothing(
    dtype: torch.dtype, softcap: float | None, chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """None of eight segments kept, a quarter, a half, all; the last ends where the vocabulary does. In the backward some rows are gone."""
    rows, vocab, segments = 40, 250, 8
    # The interpreter has no bf16 products, but these kernels have no products.
    for module in (ops, sys.modules[linear_logprob.__module__]):
        monkeypatch.setattr(module, "choose_backend", lambda *_: "triton")
    monkeypatch.setattr(chunks, "WORKING", rows * 2 * streams.SEGMENT)
    per_logit = 4 + (2 if dtype == torch.bfloat16 else 0)
    hidden, weight, _, targets = inputs(rows, vocab, 24, ignored=0.1)
    exact = rounded(dtype, hidden, weight)
    g = upstream(rows, 1, 0.3)
    expected = results(naive_linear_logprob, *exact, targets, g=g, h=None, softcap=softcap)
    made = []
    for share in (0.0, 0.25, 0.5, 1.0):
        logits = share * rows * segments * streams.SEGMENT
        workspace = chunks.WORKING * per_logit + logits * dtype.itemsize
        ours = place(*exact, dtype=dtype)
        options: Any = dict(softcap=softcap, workspace_mb=workspace / 2**20, rows=chosen)
        settings = Settings(dtype, 1.0, softcap, vocab, False, -100, workspace / 2**20)
        assert chunks.ChunkTiles.keepable(rows, ours[1], settings)[0] == logits
        made.append(results(linear_logprob, *ours, targets.to(DEVICE), g=g.to(DEVICE), h=None, **options))
        # The interpreter cuts bf16 off where the machine rounds.
        assert_close({n: x.cpu() for n, x in made[-1].items()}, expected, TOLERANCE[dtype])
    for other in made[1:]:
        for name, x in made[0].items():
            torch.testing.assert_close(other[name], x, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-6)


@pytest.mark.parametrize("num_rows, most, vocab", [(8192, 17_000, 152_064), (4800, 20_000, 49_152), (100, 5000, 3072)])
def test_chunks_fill_whole_waves(num_rows: int, most: int, vocab: int) -> None:
    columns = chunks.whole_waves(num_rows, most // 1024 * 1024, vocab, 1024, 132)
    tiles = -(-num_rows // 128) * -(-columns // 256)
    assert columns % 1024 == 0 and min(most // 2, vocab) <= columns <= min(most, vocab)
    assert columns == vocab or tiles / (-(-tiles // 132) * 132) > 0.96


@pytest.mark.usefixtures("small_tiles")
def test_logits_far_below_zero_and_a_vocabulary_no_tile_divides() -> None:
    """A padded column that counted as logit 0 would take all the probability."""
    hidden, weight, _, targets = inputs(21, 131, 16)
    bias = torch.full((131,), -1000.0, dtype=torch.float64, requires_grad=True)
    options = dict(g=upstream(21, 1), h=upstream(21, 2), workspace_mb=SMALL)
    check(hidden, weight, bias, targets, tolerance=2e-4, **options)  # fp32 logits near -1000 are 6e-5 apart


@pytest.mark.usefixtures("small_tiles")
def test_a_nearly_certain_target_keeps_its_digits() -> None:
    torch.manual_seed(0)
    hidden, weight = torch.zeros(20, 8, dtype=torch.float64), torch.zeros(150, 8, dtype=torch.float64)
    hidden[:, 0], hidden[:, 1:] = torch.linspace(14, 20, 20), 0.1 * torch.randn(20, 7)
    weight[:, 1:], weight[100, 0] = 0.1 * torch.randn(150, 7), 1.0
    targets = torch.full((20,), 100)
    options = dict(g=upstream(20, 3), h=upstream(20, 4), workspace_mb=SMALL)
    got = check(hidden.requires_grad_(), weight.requires_grad_(), None, targets, **options)
    expected = results(
        naive_linear_logprob, *rounded(torch.float32, hidden, weight), targets, g=None, h=upstream(20, 4)
    )
    assert expected["logp"].abs().max() < 2e-3 and expected["logp"].abs().min() < 1e-6
    for name in ("logp", "entropy"):
        assert ((got[name] - expected[name]) / expected[name]).abs().max() < 1e-5
    # and the other way: a target that has almost no probability
    check(hidden, weight, None, torch.full((20,), 7), g=upstream(20, 3), h=None, workspace_mb=SMALL)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_ignored_rows_contribute_exactly_zero(poison: float) -> None:
    hidden, weight, bias, targets = inputs(40, 70, 6, ignored=0.4)
    live = targets != -100
    poisoned, weight, bias = place(hidden.detach().masked_fill(~live[:, None], poison).requires_grad_(), weight, bias)
    temperature = (torch.rand(40) + 0.5).masked_fill(~live, poison).to(DEVICE)
    g, h = (upstream(40, seed).masked_fill(~live, poison).to(DEVICE) for seed in (1, 2))
    targets, live = targets.to(DEVICE), live.to(DEVICE)
    got = results(linear_logprob, poisoned, weight, targets, bias=bias, g=g, h=h, temperature=temperature)
    few = poisoned.detach()[live].requires_grad_()
    alone = results(
        linear_logprob, few, weight, targets[live], bias=bias, g=g[live], h=h[live], temperature=temperature[live]
    )
    for name, x in alone.items():
        per_row = name in ("logp", "entropy", "dhidden")
        assert torch.equal(got[name][live] if per_row else got[name], x), name
        assert not per_row or (got[name][~live] == 0).all(), name


@pytest.mark.usefixtures("small_tiles")
def test_rows_with_zero_upstream_are_skipped_exactly() -> None:
    hidden, weight, _, targets = inputs(40, 70, 6)
    quiet = torch.arange(40) >= 25
    g = upstream(40, 1).masked_fill(quiet, 0.0)
    expected = results(naive_linear_logprob, hidden, weight, targets, g=g, h=None)
    poisoned, weight = place(hidden.detach().masked_fill(quiet[:, None], math.nan).requires_grad_(), weight)
    got = results(linear_logprob, poisoned, weight, targets.to(DEVICE), g=g.to(DEVICE), h=None)
    assert (got["dhidden"][quiet.to(DEVICE)] == 0).all()
    del got["logp"], expected["logp"]
    assert_close({name: x.cpu() for name, x in got.items()}, expected, 1e-5)
    nothing = results(linear_logprob, poisoned, weight, targets.to(DEVICE), g=torch.zeros(40, device=DEVICE), h=None)
    assert (nothing["dhidden"] == 0).all() and (nothing["dweight"] == 0).all()


@pytest.mark.usefixtures("small_tiles")
def test_the_bits_of_a_row_do_not_depend_on_its_packing() -> None:
    hidden, weight, _, targets = inputs(75, 300, 40)
    hidden, weight = (x.detach() for x in place(hidden, weight))
    targets = targets.to(DEVICE)
    logp, entropy = linear_logprob(hidden, weight, targets, entropy=True, invariant=True)
    for rows in (
        torch.randperm(75, generator=torch.Generator().manual_seed(3)),
        torch.arange(3, 20),
        torch.tensor([50]),
    ):
        rows = rows.to(DEVICE)
        again = linear_logprob(hidden[rows], weight, targets[rows], entropy=True, invariant=True)
        if DEVICE == "cuda":
            assert torch.equal(again[0], logp[rows]) and torch.equal(again[1], entropy[rows])
        else:  # the interpreter's products are numpy's, whose last bits depend on a row's place in a tile on some CPUs
            torch.testing.assert_close(again, (logp[rows], entropy[rows]), rtol=1e-6, atol=1e-6)


@pytest.mark.usefixtures("small_tiles")
def test_repeats_and_a_second_thread_give_the_same_bits() -> None:
    hidden, weight, bias, targets = inputs(40, 150, 20)
    hidden, weight, bias = place(hidden, weight, bias)
    targets, g = targets.to(DEVICE), upstream(40, 1).float().to(DEVICE)

    def gradients() -> list[Tensor]:
        logp = linear_logprob(hidden, weight, targets, bias=bias, workspace_mb=SMALL)
        return [logp.detach(), *torch.autograd.grad(logp, (hidden, weight, bias), g)]

    first, again = gradients(), gradients()
    logp = linear_logprob(hidden, weight, targets, bias=bias, workspace_mb=SMALL)
    other: list[Tensor] = [logp.detach()]
    thread = threading.Thread(target=lambda: other.extend(torch.autograd.grad(logp, (hidden, weight, bias), g)))
    thread.start()
    thread.join()
    for a, b, c in zip(first, again, other, strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)


@pytest.mark.usefixtures("small_tiles")
def test_rows_of_dlogits_sum_to_zero() -> None:
    """With a constant feature of weight 1 that sum is its gradient."""
    hidden, weight, bias, targets = inputs(50, 300, 8)
    weight.data[:, 0] = 1.0
    hidden, weight, bias = place(hidden, weight, bias)
    for h in (None, upstream(50, 2).to(DEVICE)):
        got = results(linear_logprob, hidden, weight, targets.to(DEVICE), g=upstream(50, 1).to(DEVICE), h=h, bias=bias)
        assert got["dhidden"][:, 0].abs().max() < 2e-6 * 10
        assert abs(got["dbias"].double().sum()) < 1e-5


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("frozen", list(itertools.product([False, True], repeat=3))[:-1])
def test_frozen_inputs(frozen: tuple[bool, bool, bool]) -> None:
    hidden, weight, bias, targets = inputs(30, 80, 20)
    tensors = [x.detach().requires_grad_(not f) for x, f in zip((hidden, weight, bias), frozen, strict=True)]
    options = dict(g=upstream(30, 1), h=None)
    expected = results(naive_linear_logprob, *tensors[:2], targets, bias=tensors[2], **options)
    ours = place(*tensors)
    got = results(linear_logprob, *ours[:2], targets.to(DEVICE), bias=ours[2], g=options["g"].to(DEVICE), h=None)
    assert_close({name: x.cpu() for name, x in got.items()}, expected, 1e-5)


@pytest.mark.usefixtures("small_tiles")
def test_slices_as_inputs() -> None:
    hidden, weight, bias, targets = inputs(24, 60, 16)
    expected = results(naive_linear_logprob, hidden, weight, targets, g=upstream(24, 1), h=None, bias=bias)
    wide = torch.full((24, 40), math.nan)
    wide[:, 5:21] = hidden.detach()
    every_second = torch.full((24, 40), math.nan)
    every_second[:, 2:34:2] = hidden.detach()
    tall = torch.full((120, 16), math.nan)
    tall[::2] = weight.detach()
    transposed = weight.detach().float().t().contiguous().to(DEVICE).t()
    for x, w in (
        (wide.to(DEVICE)[:, 5:21], tall.to(DEVICE)[::2]),
        (every_second.to(DEVICE)[:, 2:34:2], transposed),
    ):
        spread = torch.stack([bias.detach().float(), torch.full((60,), math.nan)], 1).to(DEVICE)[:, 0]
        got = results(
            linear_logprob,
            x.requires_grad_(),
            w.requires_grad_(),
            targets.to(DEVICE),
            g=upstream(24, 1).to(DEVICE),
            h=None,
            bias=spread.requires_grad_(),
            workspace_mb=SMALL,
        )
        assert_close({name: y.cpu() for name, y in got.items()}, expected, 1e-5)


@pytest.mark.usefixtures("small_tiles")
def test_a_bias_of_minus_infinity_forbids_tokens() -> None:
    hidden, weight, bias, targets = inputs(20, 100, 16)
    forbidden = (torch.arange(100) % 3 == 0) | ((torch.arange(100) >= 32) & (torch.arange(100) < 64))  # a whole tile
    allowed = torch.nonzero(~forbidden)[:, 0]
    places = torch.randint(0, len(allowed), (20,), generator=torch.Generator().manual_seed(5))
    g, h = upstream(20, 1), upstream(20, 2)
    expected = results(
        naive_linear_logprob,
        hidden,
        weight.detach()[allowed].requires_grad_(),
        places,
        bias=bias.detach()[allowed],
        g=g,
        h=h,
    )
    ours = place(hidden, weight, bias.detach().masked_fill(forbidden, -math.inf))
    got = results(linear_logprob, *ours[:2], allowed[places].to(DEVICE), bias=ours[2], g=g.to(DEVICE), h=h.to(DEVICE))
    got = {name: x.cpu() for name, x in got.items()}
    assert (got["dweight"][forbidden] == 0).all()
    got["dweight"] = got["dweight"][allowed]
    assert_close(got, expected, 1e-5)


@pytest.mark.parametrize("dtype", [dtype for dtype in DTYPES if dtype != torch.float32])
@pytest.mark.usefixtures("small_tiles")
def test_small_upstream_gradients_survive_16_bits(dtype: torch.dtype) -> None:
    """A token mean over 10^6 tokens passes 10^-6 back to each row; fp16 ends at 6e-8."""
    hidden, weight, _, targets = inputs(40, 203, 24)
    g, h = (1e-6 * upstream(40, seed) for seed in (1, 2))
    exact = rounded(dtype, hidden, weight)
    ours = place(hidden, weight, dtype=dtype)
    for entropy in (None, h):
        expected = results(naive_linear_logprob, *exact, targets, g=g, h=entropy)["dweight"]
        out = linear_logprob(*ours, targets.to(DEVICE), entropy=entropy is not None, workspace_mb=SMALL)
        loss = (
            (out[0] * g.to(DEVICE)).sum() + (out[1] * h.to(DEVICE)).sum()
            if entropy is not None
            else (out * g.to(DEVICE)).sum()
        )
        dweight = torch.autograd.grad(loss * 2.0**14, ours[1])[0].cpu().double() / 2.0**14  # as a gradient scaler does
        assert (dweight - expected).norm() < TOLERANCE[dtype] * expected.norm()


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("invariant", [False, True])
def test_autocast_casts_the_weights_chunk_by_chunk(invariant: bool) -> None:
    hidden, weight, _, targets = inputs(30, 300, 24)
    single = place(hidden, weight)
    targets, g = targets.to(DEVICE), upstream(30, 1).float().to(DEVICE)
    half = [x.detach().half().requires_grad_() for x in single]
    expected = linear_logprob(*half, targets)
    expected_grads = torch.autograd.grad(expected, half, g)
    with torch.autocast(DEVICE, torch.float16):
        got = linear_logprob(*single, targets, workspace_mb=0.01, invariant=invariant)
    grads = torch.autograd.grad(got, single, g)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)
    for a, b in zip(grads, expected_grads, strict=True):
        assert a.dtype == torch.float32
        assert (a - b).norm() < 2e-3 * b.norm()


def test_offsets_beyond_two_to_the_31(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of weight, hidden, z and dz that lie 2^27 elements apart; the memory between them is never touched."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    tiles = {"BLOCK_N": 32, "BLOCK_V": 32, "BLOCK_H": 16, "num_warps": 4, "num_stages": 2}
    monkeypatch.setattr(implementation, "configuration", lambda *_, **__: dict(tiles))
    monkeypatch.setattr(streams, "ROWS", 32)
    monkeypatch.setattr(streams, "SEGMENT", 32)
    far, rows = 2**27, 18

    def spread(x: Tensor, dtype: torch.dtype) -> Tensor:
        memory = torch.empty((rows - 1) * far + 32, dtype=dtype, device=DEVICE)
        return memory.as_strided((rows, x.shape[1]), (far, 1)).copy_(x.detach())

    hidden, weight, _, targets = inputs(rows, rows, 16)
    near = [x.detach().to(DEVICE, torch.float16) for x in (hidden, weight)]
    pair = [spread(x, torch.float16) for x in near]
    targets = targets.to(DEVICE)
    expected, got = (linear_logprob(*x, targets, entropy=True, invariant=True) for x in (near, pair))
    assert torch.equal(expected[0], got[0]) and torch.equal(expected[1], got[1])
    tiled = chunks.ChunkTiles(*near, None, targets, None, Settings(torch.float16, 1.0, None, rows, False, -100, 1.0))
    logits = near[0].float() @ near[1].float().t()
    z, dz = spread(logits, torch.float32), spread(torch.zeros_like(logits), torch.float16)
    stats, target = tiled._statistics(1), torch.empty_like(tiled.inverse_temperature)
    tiled._stats(z, 0, stats, target, None)
    logp, lse, entropy = tiled._merged(stats, target)
    torch.testing.assert_close(logp, expected[0], rtol=1e-5, atol=1e-5)
    upstream_of = Upstream.of(torch.ones_like(logp), None, logp, lse, entropy, 1.0)
    tiled._dz(upstream_of, z, dz, 0, (lse / math.log(2), torch.ones_like(lse), upstream_of.at_target))
    p = logits.double().softmax(-1)
    p[torch.arange(rows), targets] -= 1
    assert (dz.double() - p).abs().max() < 1e-3


@pytest.mark.usefixtures("small_tiles")
def test_no_rows_and_only_ignored_rows() -> None:
    hidden, weight = place(*inputs(5, 30, 16)[:2])
    targets = torch.full((5,), -100, device=DEVICE)
    for n in (0, 5):
        x = hidden.detach()[:n].requires_grad_()
        logp, entropy = linear_logprob(x, weight, targets[:n], entropy=True)
        dx, dw = torch.autograd.grad(logp.sum() + entropy.sum(), (x, weight))
        assert logp.shape == (n,) and not logp.any() and not entropy.any() and not dx.any() and not dw.any()


def test_what_the_backend_cannot_do_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight, _, targets = (x.detach() for x in inputs(4, 10, 4))
    with pytest.raises(ValueError, match="float64 has no Triton kernel; unset SWIRL_KERNELS_BACKEND or cast"):
        linear_logprob(hidden, weight, targets)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(ValueError, match="interpreter multiplies bfloat16 wrongly"):
        linear_logprob(hidden.bfloat16(), weight.bfloat16(), targets)
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(ValueError, match="tensors on cpu; move them to a CUDA device, or set TRITON_INTERPRET=1"):
        linear_logprob(hidden.float(), weight.float(), targets)


@pytest.mark.usefixtures("small_tiles")
def test_nothing_of_all_rows_waits_for_the_device() -> None:
    hidden, weight, bias, targets = inputs(30, 80, 16, ignored=0.3)
    for dtype in DTYPES:
        ours = place(hidden, weight, bias, dtype=dtype)
        g, h = (upstream(30, seed, 0.3).to(DEVICE) for seed in (1, 2))
        with HostWaits() as waits:
            results(linear_logprob, *ours[:2], targets.to(DEVICE), bias=ours[2], g=g, h=h, rows="all")
        # Interpreting reads arguments of kernels; what is asked of tensors' values shows all the same.
        assert not [call for call in waits.found if call.startswith("aten")], waits.found


@pytest.mark.usefixtures("small_tiles")
def test_torch_finds_nothing_wrong_with_the_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight, _, targets = inputs(6, 70, 8)
    monkeypatch.setattr(chunks, "WORKING", 6 * 32)
    tensors = (*place(hidden, weight), None, targets.to(DEVICE), None)
    torch.library.opcheck(
        ops.linear_logprob_forward,
        (*tensors, torch.float32, 1.0, None, 70, False, -100, 3 * 6 * 32 * 4 / 2**20, True, False, True),
        test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
    )
