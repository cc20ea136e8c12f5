"""Both implementations against float64; Triton compiled on a GPU, interpreted without one."""

import itertools
import math
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from swirl_kernels import naive_selective_logprob, selective_logprob
from swirl_kernels.selective_logprob import eager

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(params=["torch", "triton"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """torch with blocks of few rows, triton with blocks that cut the vocabularies used here."""
    if request.param == "triton":
        pytest.importorskip("triton")
        from swirl_kernels.selective_logprob import triton as kernels

        monkeypatch.setattr(kernels, "FORWARD_BLOCK", 512)
        monkeypatch.setattr(kernels, "BACKWARD_BLOCK", 256)
    monkeypatch.setattr(eager, "BLOCK_ELEMENTS", 7000)
    monkeypatch.setenv("SWIRL_KERNELS_BACKEND", request.param)
    return request.param


def dtypes_of(backend: str) -> list[torch.dtype]:
    if backend == "torch":
        return [torch.float64, torch.float32, torch.float16, torch.bfloat16]
    return [torch.float32, torch.float16] + ([torch.bfloat16] if DEVICE == "cuda" else [])


def inputs(
    rows: int, vocab: int, *, ignored: float = 0.0, valid: int | None = None, scale: float = 3.0
) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    logits = scale * torch.randn(rows, vocab, dtype=torch.float64)
    targets = torch.randint(0, valid or vocab, (rows,))
    targets[torch.rand(rows) < ignored] = -100
    return logits.to(DEVICE), targets.to(DEVICE)


def upstream(rows: int, seed: int, zeros: float = 0.0) -> Tensor:
    """Another gradient for every row, some of them exactly zero."""
    generator = torch.Generator().manual_seed(seed)
    g = torch.randn(rows, generator=generator, dtype=torch.float64)
    return g.masked_fill(torch.rand(rows, generator=generator) < zeros, 0.0).to(DEVICE)


def results(
    function: Any, logits: Tensor, targets: Tensor, g: Tensor | None, h: Tensor | None, **options: Any
) -> dict[str, Tensor]:
    """Values and the gradient for the upstream gradients g of logp and h of the entropy."""
    leaf = logits.detach().clone().requires_grad_()
    # what comes in place must not be the leaf itself
    out = function(leaf * 1 if options.get("inplace_backward") else leaf, targets, entropy=h is not None, **options)
    logp, entropy = out if h is not None else (out, None)
    pairs = [(x, u.to(x.dtype)) for x, u in ((logp, g), (entropy, h)) if x is not None and u is not None]
    (dlogits,) = torch.autograd.grad([x for x, _ in pairs], leaf, [u for _, u in pairs])
    found = {"logp": logp.detach(), "dlogits": dlogits}
    return found | ({} if entropy is None else {"entropy": entropy.detach()})


def assert_close(got: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float, what: Any = "") -> None:
    """As a relative norm, and per row against the row's own size plus a hundredth of the mean one (entropy, which is a difference
    where another token is nearly certain: plus the mean one)."""
    assert got.keys() == expected.keys()
    for name, b in expected.items():
        a, b = got[name].double(), b.double()
        assert a.shape == b.shape and not a.isnan().any(), (what, name)
        assert (a - b).norm() <= tolerance * b.norm(), (what, name, (a - b).norm() / b.norm())
        rows, size = ((a - b).abs(), b.abs()) if a.dim() == 1 else ((a - b).norm(dim=1), b.norm(dim=1))
        bad = rows > 4 * tolerance * (size + (1.0 if name == "entropy" else 0.01) * size.mean())
        assert not bad.any(), (what, name, bad.nonzero()[:5].tolist())


TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6}


@pytest.mark.parametrize("which", ["logp", "entropy only", "both"])
@pytest.mark.parametrize("inplace", [False, True])
def test_against_float64(backend: str, which: str, inplace: bool) -> None:
    """Vocabularies below, at and beyond the blocks; padding; one temperature or one a row; ignored and unused rows."""
    for i, (vocab, dtype) in enumerate(itertools.product((1, 2, 255, 512, 513, 1300), dtypes_of(backend))):
        padding, rows = (0, 9)[i % 2], 9
        logits, targets = inputs(rows, vocab + padding, ignored=0.3, valid=vocab)
        logits = logits.to(dtype)
        logits[:, vocab:] = math.nan
        temperature = (0.7, torch.rand(rows, dtype=torch.float64).to(DEVICE) + 0.5, 1.0)[i % 3]
        options = dict(
            g=None if which == "entropy only" else upstream(rows, 1, 0.3),
            h=None if which == "logp" else upstream(rows, 2, 0.3),
            temperature=temperature,
            valid_vocab=vocab if padding else None,
        )
        expected = results(naive_selective_logprob, logits.double(), targets, **options)
        expected["dlogits"][:, vocab:] = 0.0  # the naive one multiplies NaN by zero there
        got = results(selective_logprob, logits, targets, inplace_backward=inplace, **options)
        assert got["dlogits"].dtype == dtype and got["logp"].dtype == torch.promote_types(dtype, torch.float32)
        tolerance = TOLERANCE.get(dtype, 2e-6)
        if vocab == 1:  # certain: all is zero, and must be so up to rounding
            assert all(x.abs().max() < 1e-6 for x in got.values())
            continue
        assert_close(got | {"dlogits": expected["dlogits"]}, expected, tolerance, (vocab, dtype))
        # of the 16-bit types the gradient is rounded once, and in fp16 its smallest entries to multiples of 6e-8
        limit = {torch.float16: 1e-3, torch.bfloat16: 4e-3}.get(dtype, tolerance)
        assert_close({"dlogits": got["dlogits"]}, {"dlogits": expected["dlogits"]}, limit, (vocab, dtype))


def test_logits_far_below_zero_and_a_vocabulary_no_block_divides(backend: str) -> None:
    """A padded column that counted as logit 0 would take all the probability."""
    logits, targets = inputs(6, 1037)
    logits = (logits - 30000.0).float()
    g, h = upstream(6, 1), upstream(6, 2)
    expected = results(naive_selective_logprob, logits.double(), targets, g, h)
    assert_close(results(selective_logprob, logits, targets, g, h), expected, 2e-6)


def test_a_nearly_certain_target_keeps_its_digits(backend: str) -> None:
    """logp, entropy and gradient shrink to 1e-6; in fp32 each row must still be right relative to itself."""
    logits, _ = inputs(20, 700, scale=0.1)
    targets = torch.full((20,), 600, device=DEVICE)
    logits[:, 600] = torch.linspace(14, 20, 20, dtype=torch.float64)
    logits = logits.float()
    g, h = upstream(20, 1), upstream(20, 2)
    got = results(selective_logprob, logits, targets, g, None)
    expected = results(naive_selective_logprob, logits.double(), targets, g, None)
    assert expected["logp"].abs().max() < 1e-3 and expected["logp"].abs().min() < 2e-6
    both = results(selective_logprob, logits, targets, g, h)
    both_expected = results(naive_selective_logprob, logits.double(), targets, g, h)
    for a, b in ((got, expected), (both, both_expected)):
        for name in a:
            rows = (a[name].double() - b[name]).reshape(20, -1).norm(dim=1) / b[name].reshape(20, -1).norm(dim=1)
            assert rows.max() < 1e-5, (name, rows.max())


def test_forbidden_tokens(backend: str) -> None:
    """Logits of -inf have no probability, no gradient and no entropy; as a target, logp is -inf."""
    for dtype in dtypes_of(backend):
        logits, targets = inputs(9, 600)
        forbidden = torch.arange(600, device=DEVICE) % 3 == 0
        targets = targets - (targets % 3 == 0).long() + 2 * (targets == 0).long()
        logits = logits.masked_fill(forbidden, -math.inf).to(dtype)
        options = dict(g=upstream(9, 1), h=upstream(9, 2))
        got = results(selective_logprob, logits, targets, **options)
        position = (~forbidden).cumsum(0) - 1
        expected = results(naive_selective_logprob, logits[:, ~forbidden].double(), position[targets], **options)
        assert (got["dlogits"][:, forbidden] == 0).all()
        got["dlogits"] = got["dlogits"][:, ~forbidden]
        assert_close(got, expected, {2: 4e-3, 4: 2e-6, 8: 1e-12}[dtype.itemsize], dtype)
    logits, targets = inputs(1, 600)
    logits[0, 7] = -math.inf
    got = results(selective_logprob, logits.float(), torch.full_like(targets, 7), upstream(1, 1), upstream(1, 2))
    assert got["logp"] == -math.inf and got["dlogits"].isfinite().all() and got["entropy"].isfinite().all()
    alone = torch.full((1, 600), -math.inf, device=DEVICE)
    alone[0, 3] = 2.0
    got = results(selective_logprob, alone, torch.full_like(targets, 3), upstream(1, 1), upstream(1, 2))
    assert all((x == 0).all() for x in got.values())


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("inplace", [False, True])
def test_ignored_rows_contribute_exactly_zero(backend: str, poison: float, inplace: bool) -> None:
    logits, targets = inputs(12, 300, ignored=0.4)
    live = targets != -100
    assert 0 < live.sum() < 12
    logits = logits.float()
    temperature = torch.rand(12, device=DEVICE) + 0.5
    g, h = upstream(12, 1), upstream(12, 2)
    expected = results(naive_selective_logprob, logits.double(), targets, g, h, temperature=temperature.double())
    got = results(
        selective_logprob,
        logits.masked_fill(~live[:, None], poison),
        targets,
        g.masked_fill(~live, poison),
        h.masked_fill(~live, poison),
        temperature=temperature.masked_fill(~live, poison),
        inplace_backward=inplace,
    )
    assert (got["dlogits"][~live] == 0).all() and (got["logp"][~live] == 0).all() and (got["entropy"][~live] == 0).all()
    assert_close(got, expected, 2e-6)


def test_rows_without_upstream_gradient_get_exactly_zero(backend: str) -> None:
    logits, targets = inputs(8, 300)
    logits = logits.float()
    logits[::2] = math.nan
    got = results(
        selective_logprob, logits, targets, upstream(8, 1).index_fill(0, torch.arange(0, 8, 2).to(DEVICE), 0), None
    )
    assert (got["dlogits"][::2] == 0).all() and (got["dlogits"][1::2] != 0).any(1).all()
    assert got["logp"][::2].isnan().all()


def test_rows_of_the_gradient_sum_to_zero(backend: str) -> None:
    logits, targets = inputs(10, 900)
    for h in (None, upstream(10, 2)):
        got = results(selective_logprob, logits.float(), targets, upstream(10, 1), h)
        assert (got["dlogits"].double().sum(1).abs() < 1e-6).all()


def test_a_row_has_the_same_bits_in_every_packing(backend: str) -> None:
    logits, targets = inputs(20, 700)
    logits, g, h = logits.float(), upstream(20, 1), upstream(20, 2)
    whole = results(selective_logprob, logits, targets, g, h)
    for rows in (torch.randperm(20), torch.tensor([3]), torch.arange(4, 17)):
        rows = rows.to(DEVICE)
        part = results(selective_logprob, logits[rows], targets[rows], g[rows], h[rows])
        assert all(torch.equal(part[name], whole[name][rows]) for name in whole)


def test_inplace_backward_writes_over_the_logits_and_tells_autograd(backend: str) -> None:
    logits, targets = inputs(6, 300)
    leaf = logits.float().requires_grad_()
    full = leaf * 1.0
    view = full[1:, :280]  # a view of the model's output
    logp = selective_logprob(view, targets[1:] % 280, inplace_backward=True)
    before = full.detach()[0].clone()
    (dview,) = torch.autograd.grad(logp.sum(), view, retain_graph=True)
    assert dview.data_ptr() == view.data_ptr() and torch.equal(full.detach()[0], before)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(logp.sum(), leaf)
    # an operation that kept the same logits for its own backward is refused, not computed wrongly
    kept = leaf * 1.0
    loss = selective_logprob(kept, targets, inplace_backward=True).sum()
    other = kept.square().sum()
    torch.autograd.grad(loss, leaf)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(other, leaf)


def test_backward_from_a_second_thread_and_strides(backend: str) -> None:
    logits, targets = inputs(6, 300)
    leaf = logits.float().requires_grad_()
    out = selective_logprob(leaf, targets)
    up = torch.ones((), device=DEVICE).expand(6)  # stride 0
    (expected,) = torch.autograd.grad(out, leaf, up, retain_graph=True)
    got: list[Tensor] = []
    thread = threading.Thread(target=lambda: got.extend(torch.autograd.grad(out, leaf, up)))
    thread.start(), thread.join()
    assert torch.equal(got[0], expected)
    wide = torch.full((12, 620), math.nan, device=DEVICE)
    wide[::2, 10:310] = logits.float()
    rows = wide[::2, 10:310].requires_grad_()
    columns = logits.float().t().contiguous().t().requires_grad_()
    for strided in (rows, columns):
        out = selective_logprob(strided, targets.int())
        assert torch.equal(torch.autograd.grad(out, strided, up)[0], expected)


def test_more_than_two_to_the_31_elements_between_rows(backend: str, tmp_path: Path) -> None:
    """A sparse file: only the pages that are read exist."""
    stride, vocab = 2**30 + 4096, 300
    file = torch.from_file(str(tmp_path / "logits"), shared=True, size=3 * stride, dtype=torch.float16)
    far = file.as_strided((3, vocab), (stride, 1))
    if DEVICE == "cuda":
        far = torch.empty(3 * stride, dtype=torch.float16, device=DEVICE).as_strided((3, vocab), (stride, 1))
    logits, targets = inputs(3, vocab)
    far.copy_(logits)
    leaf = far.requires_grad_()
    out, entropy = selective_logprob(leaf, targets, entropy=True)
    g, h = upstream(3, 1), upstream(3, 2)
    (got,) = torch.autograd.grad((out, entropy), leaf, (g.float(), h.float()))
    expected = results(naive_selective_logprob, far.detach().contiguous().double(), targets, g, h)
    found = {"logp": out.detach(), "entropy": entropy.detach(), "dlogits": got}
    assert_close(found | {"dlogits": expected["dlogits"]}, expected, 2e-6)
    assert_close({"dlogits": got}, {"dlogits": expected["dlogits"]}, 1e-3)
    again = far.detach().requires_grad_().view_as(far)
    out, entropy = selective_logprob(again, targets, entropy=True, inplace_backward=True)
    (got,) = torch.autograd.grad((out, entropy), again, (g.float(), h.float()))
    assert got.data_ptr() == far.data_ptr() and got.stride() == (stride, 1)
    assert_close({"dlogits": got}, {"dlogits": expected["dlogits"]}, 1e-3)


def test_the_shipped_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once without smaller ones."""
    for choice in ("torch", "triton"):
        if choice == "triton":
            pytest.importorskip("triton")
        monkeypatch.setenv("SWIRL_KERNELS_BACKEND", choice)
        logits, targets = inputs(3, 9001)
        options = dict(g=upstream(3, 1), h=upstream(3, 2), valid_vocab=8999)
        targets = targets % 8999
        expected = results(naive_selective_logprob, logits.float().double(), targets, **options)
        assert_close(results(selective_logprob, logits.float(), targets, **options), expected, 2e-6)


def test_no_rows_and_only_ignored_rows(backend: str) -> None:
    for targets in (torch.zeros(0, dtype=torch.int64), torch.full((3,), -100)):
        leaf = torch.full((len(targets), 10), math.nan, device=DEVICE, requires_grad=True)
        logp, entropy = selective_logprob(leaf, targets.to(DEVICE), entropy=True)
        (dlogits,) = torch.autograd.grad(logp.sum() + entropy.sum(), leaf)
        assert logp.shape == targets.shape and (logp == 0).all() and (entropy == 0).all() and (dlogits == 0).all()


def test_gradcheck(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SWIRL_KERNELS_BACKEND", "torch")
    logits, targets = inputs(4, 7, ignored=0.3)
    for temperature in (0.7, torch.tensor([0.5, 1.0, 2.0, 1.5], device=DEVICE)):
        options = dict(temperature=temperature, entropy=True, valid_vocab=6)
        assert torch.autograd.gradcheck(
            lambda x, o=options: selective_logprob(x, targets.clamp(max=5), **o), (logits.requires_grad_(),)
        )


def test_memory_of_the_torch_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside the gradient nothing of the logits' size exists."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        sizes: list[tuple[int, int]] = []  # elements and storage

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            out = func(*args, **(kwargs or {}))
            for x in out if isinstance(out, tuple | list) else (out,):
                if isinstance(x, Tensor) and not x._is_view():
                    self.sizes.append((x.numel(), x.untyped_storage().data_ptr()))
            return out

    monkeypatch.setenv("SWIRL_KERNELS_BACKEND", "torch")
    monkeypatch.setattr(eager, "BLOCK_ELEMENTS", 4000)
    logits, targets = (x.cpu() for x in inputs(64, 1000))
    leaf = logits.float().requires_grad_()
    scaled = leaf * 1.0
    with Largest() as mode:
        logp, entropy = selective_logprob(scaled, targets, entropy=True, inplace_backward=True)
        torch.autograd.grad(logp.sum() + entropy.sum(), scaled)
    own = scaled.untyped_storage().data_ptr()  # also the gradient's
    assert (64 * 1000, own) in mode.sizes
    assert max(size for size, storage in mode.sizes if storage != own) <= 4000


def test_wrong_arguments_are_refused_with_numbers(backend: str) -> None:
    logits, targets = inputs(6, 10)
    logits = logits.float()

    def refused(message: str, *args: Any, **options: Any) -> None:
        with pytest.raises(ValueError, match=message):
            selective_logprob(*args, **options)

    last = torch.tensor(4, device=DEVICE)
    refused(r"targets\[4\] is 10, outside the vocabulary \[0, 10\)", logits, targets.index_fill(0, last, 10))
    refused(r"targets\[4\] is -1, .* ignore_index=-100", logits, targets.index_fill(0, last, -1))
    refused(r"outside the vocabulary \[0, 3\)", logits, torch.full_like(targets, 3), valid_vocab=3)
    refused(r"shape \(1, 6, 10\)", logits[None], targets)
    refused(r"shape \(6, 0\)", logits[:, :0], targets)
    refused(r"torch.int64; give floating", targets[:, None], targets)
    refused(r"give integers \[6\]", logits, targets[:5])
    refused(r"give integers \[6\]", logits, targets.float())
    refused("valid_vocab is 11", logits, targets, valid_vocab=11)
    refused("temperature is 0", logits, targets, temperature=0.0)
    wrong = torch.tensor([1.0, 1, -1, 1, 1, 1], device=DEVICE)
    refused(r"temperature\[2\] is -1", logits, targets, temperature=wrong)
    refused("without gradient", logits, targets, temperature=torch.ones(6, device=DEVICE, requires_grad=True))
    leaf = logits.clone().requires_grad_()
    refused("are a leaf: their .grad would overwrite them", leaf, targets, inplace_backward=True)
    for strided in ((leaf * 1).t().contiguous().t(), (leaf * 1)[:1].expand(6, 10)):
        refused("must not overlap", strided, targets, inplace_backward=True)
    assert selective_logprob(logits, targets, inplace_backward=True).isfinite().all()  # nothing to differentiate
