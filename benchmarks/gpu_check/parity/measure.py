"""What a case of parity measures with: a machine, an operation beside its reference in float64, and what error is allowed."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Tolerance:
    """Allowed relative error. norm: of a whole tensor. row: of its worst row, against that row's norm or, where that is smaller,
    the mean one. reason: the roundings it adds up."""

    norm: float
    row: float
    reason: str


TOLERANCES = {
    "float32": Tolerance(
        2**-17,
        2**-15,
        "u = 2^-24. A sum of 2^10 terms rounds at random by 2^5 u; the argument of an exponential of size up to 2^5 does so by "
        "2^5 u, which is the relative error of the result. Together 2^6 u, doubled. The worst of thousands of rows: 4 times that. "
        "Log-probabilities, entropies, losses and sums are fp32 whatever the inputs: this holds for them in every dtype",
    ),
    "bfloat16": Tolerance(
        2**-7,
        2**-6,
        "u = 2^-9. At most four roundings to bf16 follow one another: a stored gradient of scores or logits (or p), the scaled "
        "hidden states or attention's out inside delta, the result, and one for their spread. 4 u; the worst row twice that",
    ),
    "float16": Tolerance(2**-9, 2**-8, "u = 2^-11; the roundings of bfloat16"),
}
FP32_RESULTS = ("logp", "entropy", "loss", "sums", "ratio_max", "reduced")


class NotRun(Exception):
    """The machine cannot run this case; the message says why."""


@dataclass
class Run:
    """Where a case runs, and what it has measured so far. small: sizes for a CPU or the interpreter."""

    op: str
    device: str
    dtype: torch.dtype
    backend: str
    small: bool
    errors: dict[str, float] = field(default_factory=dict)
    tolerance: dict[str, float] = field(default_factory=dict)

    @property
    def half_step(self) -> float:
        """What storing a tiny number is off by whatever its size: half the smallest subnormal, 3e-8 in float16, where gradients of 50,000
        logits are as small themselves."""
        return torch.finfo(self.dtype).smallest_normal * torch.finfo(self.dtype).eps / 2

    def normal(self, *shape: int, seed: int, scale: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        drawn = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale
        return drawn.to(self.device, dtype or self.dtype)

    def share(self, size: int, share: float, seed: int) -> Tensor:
        """bool [size], true for about that share."""
        return (torch.rand(size, generator=torch.Generator().manual_seed(seed)) < share).to(self.device)

    def integers(self, high: int, size: int, seed: int) -> Tensor:
        return torch.randint(high, (size,), generator=torch.Generator().manual_seed(seed)).to(self.device)

    def allowed(self, name: str) -> Tolerance:
        if self.backend == "torch" and self.op == "linear_logprob" and self.dtype != torch.float32:
            # Its product rounds the logits themselves to 16 bits: z / T up to 16 is off by 16 u, and p with it.
            rounded = TOLERANCES[str(self.dtype).removeprefix("torch.")]
            return replace(rounded, norm=4 * rounded.norm, row=8 * rounded.row)
        return TOLERANCES["float32" if name in FP32_RESULTS else str(self.dtype).removeprefix("torch.")]

    def note(self, name: str, error: float, tolerance: float) -> None:
        """The worst of what is noted under one name counts; NaN is infinitely wrong."""
        error = math.inf if math.isnan(error) else error
        self.errors[name] = max(error, self.errors.get(name, 0.0))
        self.tolerance[name] = tolerance

    def compare(
        self, name: str, got: Tensor, exact: Tensor, *, floor: Tensor | float = 0.0, slack: float = 0.0
    ) -> None:
        """floor: what a row's error is at least relative to, one number or one a row. slack: added to what is allowed."""
        assert got.shape == exact.shape, f"{name} has shape {tuple(got.shape)}, not {tuple(exact.shape)}"
        if not exact.numel():
            return
        wrong, right = (x.reshape(len(x), -1) if x.dim() < 2 else x for x in (got.double() - exact, exact))
        rows, size = wrong.norm(dim=-1), right.norm(dim=-1)
        least = torch.as_tensor(floor, dtype=torch.float64, device=size.device).clamp(min=1e-300).expand_as(size)
        allowed = self.allowed(name)
        whole = torch.maximum(size.norm(), least.norm())
        self.note(f"{name} norm", float(rows.norm() / whole), allowed.norm + slack)
        worst = rows / torch.maximum(size.clamp(min=float(size.mean())), least)
        self.note(f"{name} row", math.nan if worst.isnan().any() else float(worst.max()), allowed.row + 4 * slack)

    def same(self, name: str, got: Tensor, expected: Tensor) -> None:
        """Counts the elements whose values differ (NaN equals NaN); none may."""
        assert got.shape == expected.shape and got.dtype == expected.dtype, f"{name}: {got.shape}, {got.dtype}"
        differs = (got != expected) & ~(got.isnan() & expected.isnan())
        self.note(f"{name} differing", float(differs.sum()), 0.0)

    def agree(self, name: str, got: Tensor, expected: Tensor) -> None:
        """Bit by bit where Triton computes; libraries on a CPU may add up in another order for another place or stride."""
        if self.backend == "triton":
            self.same(name, got, expected)
        else:
            self.compare(name, got, expected.double())


@dataclass(frozen=True)
class Case:
    name: str
    op: str
    dtypes: tuple[str, ...]
    measure: Callable[[Run], None]


@dataclass(frozen=True)
class Problem:
    """One call of an operation, its reference, and what comes back to it. Both map inputs to named outputs."""

    ours: Callable[[dict[str, Any]], dict[str, Tensor]]
    naive: Callable[[dict[str, Any]], dict[str, Tensor]]
    inputs: dict[str, Any]
    upstream: dict[str, Tensor]

    def exact(self) -> Problem:
        """The reference on the same numbers in float64."""
        inputs = {name: _exact(x) for name, x in self.inputs.items()}
        return Problem(self.naive, self.naive, inputs, {name: u.double() for name, u in self.upstream.items()})


def _exact(x: Any) -> Any:
    if not isinstance(x, Tensor) or not x.is_floating_point():
        return x
    return x.detach().double().requires_grad_(x.requires_grad)


def gradients(problem: Problem, outputs: dict[str, Tensor]) -> dict[str, Tensor]:
    wanted = {name: x for name, x in problem.inputs.items() if isinstance(x, Tensor) and x.requires_grad}
    pairs = [(outputs[name], u.to(outputs[name].dtype)) for name, u in problem.upstream.items()]
    found = torch.autograd.grad([x for x, _ in pairs], list(wanted.values()), [u for _, u in pairs])
    return dict(zip((f"d{name}" for name in wanted), found, strict=True))


def evaluate(problem: Problem) -> dict[str, Tensor]:
    """Outputs and the gradient of every input that requires one."""
    outputs = problem.ours(problem.inputs)
    return {name: x.detach() for name, x in outputs.items()} | gradients(problem, outputs)


def parity(run: Run, problem: Problem, *, slack: float = 0.0) -> dict[str, Tensor]:
    """Measures all values and gradients against float64; returns the measured ones."""
    got, exact = evaluate(problem), evaluate(problem.exact())
    assert got.keys() == exact.keys(), f"{sorted(got)} came back, not {sorted(exact)}"
    if "loss" in got:
        _compare_loss(run, got, exact)
        return got
    floors: dict[str, Any] = {}
    if "out" in exact:
        # dscore = p (dp - delta): a difference of numbers of the size |dout| |out| / sqrt(D), both rounded as such, which
        # cancel where a token sees few keys. What they are rounded by is relative to them.
        size = exact["out"].norm(dim=-1) * problem.upstream["out"].double().norm(dim=-1)
        floors["dq"] = size / exact["out"].shape[-1] ** 0.5
        floors["dk"] = float(floors["dq"].mean()) if size.numel() else 0.0
    if "dbias" in exact:
        floors["dbias"] = _bias_terms(problem.exact())
    for name, x in got.items():
        assert not name.startswith("d") or x.dtype == problem.inputs[name[1:]].dtype, f"{name} is {x.dtype}"
        run.compare(name, x, exact[name], floor=floors.get(name, 0.0), slack=slack)
    return got


def _bias_terms(exact: Problem) -> Tensor:
    """[V] root of the sum of squares of what is added up, over rows, to each element of dbias: the terms may cancel, but every one
    is rounded by itself. They come back through one more feature a row, a one beside weights of zero."""
    hidden, weight = (exact.inputs[name].detach() for name in ("hidden", "weight"))
    rows = torch.eye(len(hidden), dtype=hidden.dtype, device=hidden.device)
    wider = torch.cat([weight, weight.new_zeros(len(weight), len(hidden))], 1).requires_grad_()
    inputs = exact.inputs | {"hidden": torch.cat([hidden, rows], 1), "weight": wider}
    return evaluate(replace(exact, inputs=inputs))["dweight"][:, -len(hidden) :].norm(dim=1)


def _compare_loss(run: Run, got: dict[str, Tensor], exact: dict[str, Tensor]) -> None:
    """The loss against the size of its terms, which cancel; sums against the number of tokens, where larger."""
    run.compare("dlogp", got["dlogp"], exact["dlogp"])
    limit = TOLERANCES["float32"]
    terms = exact["loss"].abs() + exact["dlogp"].abs().sum()
    run.note("loss", float((got["loss"].double() - exact["loss"]).abs() / terms.clamp(min=1e-300)), limit.norm)
    sums = exact["sums"].abs().clamp(min=max(float(exact["sums"][0]), 1.0))
    run.note("sums", float(((got["sums"] - exact["sums"]).abs() / sums).max()), limit.norm)
    largest = exact["ratio_max"].clamp(min=1e-300)
    run.note("ratio_max", float((got["ratio_max"] - exact["ratio_max"]).abs() / largest), limit.norm)


@contextlib.contextmanager
def poisoned_memory(on: bool = True) -> Iterator[None]:
    """torch.empty hands out NaN. warn_only: operations without a deterministic form are not an error here."""
    was = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    filled = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(on, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = on
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(was[0], warn_only=was[1])
        torch.utils.deterministic.fill_uninitialized_memory = filled
