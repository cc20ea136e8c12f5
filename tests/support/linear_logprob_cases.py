"""Inputs, upstream gradients and the comparison that the tests of every linear_logprob implementation share."""

from typing import Any

import torch
from torch import Tensor

TARGETS = ("logp", "entropy", "dhidden", "dweight", "dbias")


def inputs(rows: int, vocab: int, size: int, *, ignored: float = 0.0, valid: int | None = None) -> tuple[Tensor, ...]:
    """hidden, weight, bias with gradients and targets, float64, of which a share is ignored."""
    torch.manual_seed(0)
    hidden, weight, bias = torch.randn(rows, size), torch.randn(vocab, size) / size**0.5, torch.randn(vocab)
    targets = torch.randint(0, valid or vocab, (rows,))
    targets[torch.rand(rows) < ignored] = -100
    return *(x.double().requires_grad_() for x in (hidden, weight, bias)), targets


def upstream(rows: int, seed: int, zeros: float = 0.0) -> Tensor:
    """Another gradient for every row, some of them exactly zero."""
    generator = torch.Generator().manual_seed(seed)
    g = torch.randn(rows, generator=generator, dtype=torch.float64)
    return g.masked_fill(torch.rand(rows, generator=generator) < zeros, 0.0)


def results(
    function: Any,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    g: Tensor | None,
    h: Tensor | None,
    **options: Any,
) -> dict[str, Tensor]:
    """Values and gradients for the upstream gradients g of logp and h of the entropy."""
    out = function(hidden, weight, targets, entropy=h is not None, **options)
    logp, entropy = out if h is not None else (out, None)
    values = {"logp": logp} | ({"entropy": entropy} if entropy is not None else {})
    given = [(x, u.to(x.dtype)) for x, u in ((logp, g), (entropy, h)) if x is not None and u is not None]
    wanted = [x for x in (hidden, weight, options.get("bias")) if x is not None and x.requires_grad]
    grads = torch.autograd.grad([x for x, _ in given], wanted, [u for _, u in given])
    names = [
        n
        for n, x in zip(TARGETS[2:], (hidden, weight, options.get("bias")), strict=True)
        if x is not None and x.requires_grad
    ]
    return {n: x.detach() for n, x in (values | dict(zip(names, grads, strict=True))).items()}


def assert_close(got: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    """As a relative norm, and per row against the row's own size plus the mean one."""
    assert got.keys() == expected.keys()
    for name, b in expected.items():
        a, b = got[name].double(), b.double()
        assert a.shape == b.shape, name
        assert not a.isnan().any(), f"{name} holds NaN"
        assert (a - b).norm() <= tolerance * b.norm(), f"{name}: error {(a - b).norm():.2e} of {b.norm():.2e}"
        rows, size = ((a - b).abs(), b.abs()) if a.dim() == 1 else ((a - b).norm(dim=1), b.norm(dim=1))
        bad = rows > 4 * tolerance * (size + size.mean())
        assert not bad.any(), f"{name}: rows {bad.nonzero()[:5].tolist()} off by {rows[bad][:5].tolist()}"


def rounded(dtype: torch.dtype, *tensors: Tensor) -> list[Tensor]:
    """The same numbers as dtype can hold them, in float64, with gradients."""
    return [x.detach().to(dtype).double().requires_grad_() for x in tensors]
