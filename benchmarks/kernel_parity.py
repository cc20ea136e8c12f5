"""Are the kernels right on this machine? Every operation against float64 on the same rounded inputs, case by case.

    python -m benchmarks.gpu_check            runs all cases in worker processes, prints and keeps what they found
    echo "NAME / DTYPE" | python -m benchmarks.kernel_parity --device cuda        is such a worker: a line in, a row of JSON out

A case is a function that takes a Run (device, dtype, backend) and measures errors there: of every value and every gradient, as
a relative norm and of the worst row, or how many elements differ where bits must agree. Memory arrives full of NaN wherever
torch.empty hands it out, so that what is read before it is written shows. On CUDA the Triton kernels run; on a CPU the torch
paths, or with SWIRL_KERNELS_BACKEND=triton TRITON_INTERPRET=1 the interpreted kernels at reduced sizes, without bf16.

Not checked: speed (benchmarks.kernels), several devices, autocast, what is refused (tests/kernels). The bits of tree_attention
under repacking are not promised and not compared: tiles are cut where a packing puts them.

Legend: N rows, V vocabulary, H hidden size, T packed tokens, D head dimension.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import math
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from swirl_kernels import (
    PolicyLossSpec,
    linear_logprob,
    naive_linear_logprob,
    naive_policy_loss,
    naive_segment_reduce,
    naive_selective_logprob,
    naive_tree_attention,
    policy_loss,
    segment_reduce,
    selective_logprob,
    tree_attention,
)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
ALL = tuple(DTYPES)
TWO = ("float32", "bfloat16")

# What has caught real bugs in kernels like these; every phrase is part of a case's name.
MANDATORY = (
    "no block divides V, logits far below zero",
    "a nearly certain target",
    "non-uniform upstream gradients",
    "ignored rows hold poison",
    "the entropy's gradient alone",
    "a branch at each of 128 offsets",
    "zero-length and one-token segments",
    "indices beyond 2^31",
    "a non-contiguous slice",
    "infinity and NaN at masked positions",
    "frozen weight",
    "frozen hidden",
    "backward from a second thread",
    "bits under permutation and repacking",
    "row sums of dZ are zero",
    "bits over repeats",
)


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
        "u = 2^-9. At most four roundings to bf16 lie one behind the other: a stored gradient of scores or logits (or p), the scaled "
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
    """torch.empty hands out NaN. warn_only: operations without a deterministic form are no error here."""
    was = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    filled = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(on, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = on
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(was[0], warn_only=was[1])
        torch.utils.deterministic.fill_uninitialized_memory = filled


# linear_logprob and selective_logprob


def upstream_of(run: Run, rows: int, which: str) -> dict[str, Tensor]:
    """Non-uniform: sizes over three decades, both signs, one in ten exactly zero."""
    size = 10.0 ** (3 * torch.rand(rows, generator=torch.Generator().manual_seed(13)) - 2)
    keep = ~run.share(rows, 0.1, 14)
    return {
        name: run.normal(rows, seed=11 + i, dtype=torch.float32) * size.to(run.device) * keep
        for i, name in enumerate(("logp", "entropy"))
        if name in which
    }


def logprob_call(function: Any, tensors: tuple[str, ...], **options: Any) -> Callable[[dict], dict[str, Tensor]]:
    """function(*tensors, **all other inputs) as a map from inputs to logp and, with entropy=True, entropy."""

    def call(inputs: dict[str, Any]) -> dict[str, Tensor]:
        rest = {name: x for name, x in inputs.items() if name not in tensors}
        out = function(*(inputs[name] for name in tensors), **rest, **options)
        return dict(zip(("logp", "entropy"), out, strict=True)) if options["entropy"] else {"logp": out}

    return call


def linear(run: Run, flags: str = "entropy", *, upstream: str = "logp entropy", **change: Any) -> Problem:
    """flags: words of bias, softcap, entropy. Several row blocks, splits, tiles and workspace chunks; padding behind the
    vocabulary, ignored rows, a temperature per row. change: rows, vocab, size, or inputs to replace."""
    rows, vocab, size = (change.pop(n, d) for n, d in zip(("rows", "vocab", "size"), sizes(run), strict=True))
    padding = change.pop("padding", 7)
    entropy = "entropy" in flags
    options: dict[str, Any] = {"entropy": entropy, "softcap": 1.5 if "softcap" in flags else None}
    options["valid_vocab"] = vocab
    targets = run.integers(vocab, rows, 5).masked_fill(run.share(rows, 0.2, 6), -100)
    targets[:2] = torch.tensor([vocab - 1, 0])
    inputs = {
        "hidden": run.normal(rows, size, seed=1).requires_grad_(),
        "weight": run.normal(vocab + padding, size, seed=2, scale=size**-0.5).requires_grad_(),
        "targets": targets,
        "temperature": (run.normal(rows, seed=4, dtype=torch.float32).abs() + 0.5),
    }
    if "bias" in flags:
        inputs["bias"] = run.normal(vocab + padding, seed=3).requires_grad_()
    inputs |= change
    tensors = ("hidden", "weight", "targets")
    chunk = rows * vocab * run.dtype.itemsize / 2**20 / 3  # MiB: some three chunks in the backward
    ours = logprob_call(linear_logprob, tensors, workspace_mb=chunk, **options)
    backwards = upstream_of(run, rows, upstream if entropy else "logp")
    return Problem(ours, logprob_call(naive_linear_logprob, tensors, **options), inputs, backwards)


def sizes(run: Run) -> tuple[int, int, int]:
    """N, V, H: more than two row blocks of 128 and splits of 4096, H no multiple of a block; on a CPU two."""
    return (150, 4300, 80) if run.small else (300, 9001, 208)


def selective(run: Run, flags: str = "entropy", *, upstream: str = "logp entropy", **change: Any) -> Problem:
    """flags: words of entropy, inplace."""
    rows, vocab, padding = (
        change.pop(n, d) for n, d in (("rows", sizes(run)[0]), ("vocab", sizes(run)[1]), ("padding", 9))
    )
    options: dict[str, Any] = {"entropy": "entropy" in flags, "valid_vocab": vocab}
    targets = run.integers(vocab, rows, 5).masked_fill(run.share(rows, 0.2, 6), -100)
    targets[:2] = torch.tensor([vocab - 1, 0])
    inputs = {
        "logits": run.normal(rows, vocab + padding, seed=1, scale=2.0).requires_grad_(),
        "targets": targets,
        "temperature": (run.normal(rows, seed=4, dtype=torch.float32).abs() + 0.5),
    } | change
    inner = logprob_call(selective_logprob, ("logits", "targets"), inplace_backward="inplace" in flags, **options)

    def ours(inputs: dict[str, Any]) -> dict[str, Tensor]:
        return inner(inputs | {"logits": inputs["logits"].clone()} if "inplace" in flags else inputs)

    naive = logprob_call(naive_selective_logprob, ("logits", "targets"), **options)
    return Problem(ours, naive, inputs, upstream_of(run, rows, upstream if options["entropy"] else "logp"))


LOGPROB = {"linear_logprob": linear, "selective_logprob": selective}
FIRST = {"linear_logprob": "hidden", "selective_logprob": "logits"}  # the input with a row per row


def logits_far_below_zero(run: Run, op: str) -> None:
    """A padded column that counted as logit 0 would take all the probability. V is a prime. Sums beside -200 round by
    200 u each: for H of them 200 sqrt(H) u, which is what p and logp are allowed on top."""
    if op == "selective_logprob":
        problem = selective(run, vocab=4297, padding=0)
        logits = (problem.inputs["logits"].detach() - 200).requires_grad_()
        parity(run, replace(problem, inputs=problem.inputs | {"logits": logits}), slack=2 * 200 * 2**-24)
        return
    bias = torch.full((4297,), -200.0, device=run.device, dtype=run.dtype).requires_grad_()
    parity(run, linear(run, vocab=4297, size=32, padding=0, bias=bias), slack=2 * 200 * 32**0.5 * 2**-24)


def nearly_certain_target(run: Run, op: str) -> None:
    """logp from 1e-3 to 1e-6: every one of them keeps its digits, which 1 - p computed in fp32 would lose."""
    rows, vocab = 20, 150
    own = torch.linspace(14, 20, rows)
    targets, ones = torch.full((rows,), 100, device=run.device), torch.ones(rows, device=run.device)
    if op == "selective_logprob":
        logits = 0.1 * torch.randn(rows, vocab, generator=torch.Generator().manual_seed(1))
        logits[:, 100] = own
        change = {"logits": logits.to(run.device, run.dtype).requires_grad_(), "padding": 0}
    else:
        hidden, weight = (0.1 * torch.randn(n, 16, generator=torch.Generator().manual_seed(n)) for n in (rows, vocab))
        hidden[:, 0], weight[:, 0], weight[100, 0] = own, 0.0, 1.0
        change = {n: x.to(run.device, run.dtype).requires_grad_() for n, x in (("hidden", hidden), ("weight", weight))}
    problem = LOGPROB[op](run, rows=rows, vocab=vocab, targets=targets, temperature=ones, **change)
    got, exact = parity(run, problem), evaluate(problem.exact())
    for name in ("logp", "entropy"):
        worst = ((got[name].double() - exact[name]) / exact[name]).abs().max()
        run.note(f"{name} digits", float(worst), run.allowed(name).row)


def upstream_over_decades(run: Run, op: str) -> None:
    """Every row's gradient against its own size, although the sizes differ a thousandfold."""
    problem = LOGPROB[op](run)
    name = f"d{FIRST[op]}"
    got, exact = evaluate(problem)[name].double(), evaluate(problem.exact())[name]
    size = exact.norm(dim=1)
    run.note("rows without gradient", float(got[size == 0].abs().sum()), 0.0)
    flows = size > 0
    wrong = (got - exact).norm(dim=1) - got.shape[1] ** 0.5 * run.half_step
    worst = (wrong.clamp(min=0)[flows] / size[flows]).max()
    run.note(f"{name} by its own size", float(worst), run.allowed(name).row)


def ignored_rows(run: Run, op: str) -> None:
    """Poison in ignored rows, their temperature and upstream: zeros there, and the same bits everywhere else."""
    problem = LOGPROB[op](run)
    clean, ignored = evaluate(problem), problem.inputs["targets"] == -100
    rows = problem.inputs[FIRST[op]].detach()
    for poison in (math.nan, math.inf):
        inputs = problem.inputs | {
            FIRST[op]: rows.masked_fill(ignored[:, None], poison).requires_grad_(),
            "temperature": problem.inputs["temperature"].masked_fill(ignored, poison),
        }
        upstream = {name: u.masked_fill(ignored, poison) for name, u in problem.upstream.items()}
        got = evaluate(replace(problem, inputs=inputs, upstream=upstream))
        for name, x in got.items():
            run.same(name, x, clean[name])
        run.note(
            "ignored rows", float(got[f"d{FIRST[op]}"][ignored].abs().sum() + got["logp"][ignored].abs().sum()), 0.0
        )


def entropy_gradient_alone(run: Run, op: str) -> None:
    parity(run, LOGPROB[op](run, upstream="entropy"))


def sliced_logprob(run: Run, op: str) -> None:
    """Rows inside wider ones, every second column, and a transposed weight; NaN between them."""
    problem = LOGPROB[op](run)
    first = FIRST[op]
    rows = problem.inputs[first].detach()
    wide = torch.full((len(rows), 2 * rows.shape[1] + 8), math.nan, dtype=run.dtype, device=run.device)
    for view in (wide[:, 5 : 5 + rows.shape[1]], wide[:, 2 : 2 + 2 * rows.shape[1] : 2]):
        wide.fill_(math.nan)
        view.copy_(rows)
        inputs = problem.inputs | {first: view.detach().requires_grad_()}
        if "weight" in inputs:
            inputs["weight"] = inputs["weight"].detach().t().contiguous().t().requires_grad_()
        parity(run, replace(problem, inputs=inputs))


def masked_logprob(run: Run, op: str) -> None:
    """A third of the tokens and a stretch wider than a tile are forbidden by -inf; the padding behind the vocabulary is NaN."""
    vocab = sizes(run)[1]
    column = torch.arange(vocab, device=run.device)
    forbidden = (column % 3 == 0) | ((column >= 1000) & (column < 1600))
    allowed = torch.nonzero(~forbidden)[:, 0]
    places = run.integers(len(allowed), sizes(run)[0], 7)
    problem = LOGPROB[op](run, "bias entropy" if op == "linear_logprob" else "entropy", targets=allowed[places])
    wide = "weight" if op == "linear_logprob" else "logits"
    table = problem.inputs[wide].detach().clone()
    columns = table if op == "linear_logprob" else table.t()
    columns[vocab:] = math.nan
    inputs = dict(problem.inputs)
    if "bias" in inputs:
        inputs["bias"] = inputs["bias"].detach().clone()
        inputs["bias"][:vocab][forbidden] = -math.inf
    else:
        columns[:vocab][forbidden] = -math.inf
    got = evaluate(replace(problem, inputs=inputs | {wide: table.requires_grad_()}))
    kept = {wide: table.detach()[allowed] if op == "linear_logprob" else table.detach()[:, allowed]}
    if "bias" in inputs:
        kept["bias"] = inputs["bias"][allowed]
    kept[wide].requires_grad_()
    few = replace(problem, inputs=problem.inputs | kept | {"targets": places})
    exact = evaluate(few.exact())
    gradient, wanted = (x.pop(f"d{wide}") if op == "linear_logprob" else x.pop(f"d{wide}").t() for x in (got, exact))
    run.compare(f"d{wide}", gradient[allowed], wanted)
    run.note(
        "gradient of what is masked", float(gradient[vocab:].abs().sum() + gradient[:vocab][forbidden].abs().sum()), 0.0
    )
    for name, x in exact.items():
        run.compare(name, got[name], x)


def permuted_logprob(run: Run, op: str) -> None:
    """The rows in another order, and a third of them alone. linear_logprob's gradients come out of cuBLAS, which promises no bits."""
    problem = LOGPROB[op](run, padding=0, **{"bias": None} if op == "linear_logprob" else {})
    whole, rows = evaluate(problem), len(problem.inputs["targets"])
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(3)).to(run.device)
    for chosen in (order, order[: rows // 3]):
        inputs = problem.inputs | {n: problem.inputs[n][chosen] for n in ("targets", "temperature")}
        inputs[FIRST[op]] = problem.inputs[FIRST[op]].detach()[chosen].requires_grad_()
        got = evaluate(replace(problem, inputs=inputs, upstream={n: u[chosen] for n, u in problem.upstream.items()}))
        for name in ("logp", "entropy", f"d{FIRST[op]}"):
            expected = whole[name][chosen]
            if name == "dhidden":
                run.compare(name, got[name], expected.double())
            else:
                run.agree(name, got[name], expected)


def zero_row_sums(run: Run, op: str) -> None:
    """Against |g| + |h|, the size of what is added up. linear_logprob: a column of ones in weight sums dZ into dhidden."""
    ones = torch.ones(sizes(run)[0], device=run.device)
    problem = LOGPROB[op](run, temperature=ones, padding=0)
    if op == "linear_logprob":
        problem.inputs["weight"].data[:, 0] = 1.0
        sums = evaluate(problem)["dhidden"][:, 0].double()
    else:
        sums = evaluate(problem)["dlogits"].double().sum(1)
    size = sum(u.abs() for u in problem.upstream.values())
    wrong = (sums.abs() - sizes(run)[1] * run.half_step).clamp(min=0)
    run.note("row sums", float((wrong / size.clamp(min=1e-30)).max()), run.allowed("d").row)


def beyond_2_31(run: Run, op: str) -> None:
    """N V > 2^31: the logits themselves, or the workspace of dZ in one piece. The reference goes through blocks of rows."""
    rows, vocab, size = 16_600, 131_001, 64
    if run.device != "cuda":
        raise NotRun("needs a GPU with 20 GiB of free memory")
    free = torch.cuda.mem_get_info()[0] / 2**30
    if free < 20:
        raise NotRun(f"needs 20 GiB of free GPU memory, {free:.0f} GiB are there")
    assert rows * vocab > 2**31, "too small to tell"
    targets, upstream = run.integers(vocab, rows, 5), upstream_of(run, rows, "logp")
    small = {"rows": 2, "vocab": vocab, "padding": 0, "targets": targets, "temperature": 1.0}
    if op == "linear_logprob":
        hidden = run.normal(rows, size, seed=1).requires_grad_()
        problem = linear(run, "", **small, size=size, hidden=hidden)
        tensors, options = ("hidden", "weight", "targets"), {"entropy": False, "valid_vocab": vocab}
        problem = replace(problem, ours=logprob_call(linear_logprob, tensors, workspace_mb=2**14, **options))
    else:
        generator = torch.Generator(run.device).manual_seed(1)
        logits = (
            torch.empty(rows, vocab, dtype=run.dtype, device=run.device).normal_(generator=generator).requires_grad_()
        )
        problem = selective(run, "", **small, logits=logits)
    problem = replace(problem, upstream=upstream)
    got, total = evaluate(problem), torch.zeros((), dtype=torch.float64, device=run.device)
    for chosen in torch.arange(rows, device=run.device).split(1024):
        part = {n: problem.inputs[n].detach()[chosen] for n in (FIRST[op], "targets")}
        part[FIRST[op]].requires_grad_()
        block = replace(problem, inputs=problem.inputs | part, upstream={"logp": upstream["logp"][chosen]})
        exact = evaluate(block.exact())
        for name in ("logp", f"d{FIRST[op]}"):
            run.compare(name, got[name][chosen], exact[name])
        total = total + exact.get("dweight", 0.0)
    if op == "linear_logprob":
        run.compare("dweight", got["dweight"], total)


# tree_attention

Tree = tuple  # (length, child, child, …)


def subtree_end(*forest: Tree) -> Tensor:
    end: list[int] = []

    def walk(tree: Tree) -> None:
        start = len(end)
        end.extend([0] * tree[0])
        for child in tree[1:]:
            walk(child)
        end[start : start + tree[0]] = [len(end)] * tree[0]

    for tree in forest:
        walk(tree)
    return torch.tensor(end, dtype=torch.int32)


def forest(run: Run) -> Tensor:
    """A comb of three states with teeth, a document, a token, a deep tree: several blocks of 128 each way; 100 tokens on a CPU."""
    n = 6 if run.small else 90
    comb = (2 * n, *[(n,)] * 3, (n + 7, *[(n - 1,)] * 3, (n, (n,), (n,))))
    return subtree_end(comb, (n,), (1,), (n // 2, (3,), (1, (n,), (n // 3, (5,), (2 * n,)))))


def tree(
    run: Run,
    flags: str = "",
    *,
    end: Tensor | None = None,
    dim: int = 64,
    heads: tuple[int, int] = (4, 2),
    **change: Any,
) -> Problem:
    """flags: words of softcap, window, query_index. Token-major memory seen head-major, as models make it."""
    end = (forest(run) if end is None else end).to(run.device)
    keys = len(end)
    options: dict[str, Any] = {"softcap": 2.0} if "softcap" in flags else {}
    if "window" in flags:
        options["window"] = 9 if run.small else 130
    if "query_index" in flags:
        options["query_index"] = run.integers(keys, keys // 3, 8)
    queries = len(options.get("query_index", end))
    inputs = {
        name: run.normal(n, h, dim, seed=i).transpose(0, 1).requires_grad_()
        for i, (name, n, h) in enumerate((("q", queries, heads[0]), ("k", keys, heads[1]), ("v", keys, heads[1])))
    } | change
    rows = torch.rand(heads[0], queries, 1, generator=torch.Generator().manual_seed(9)) + 0.05
    dout = run.normal(heads[0], queries, dim, seed=10) * rows.to(run.device, run.dtype)

    def call(function: Any) -> Callable[[dict], dict[str, Tensor]]:
        return lambda inputs: {"out": function(inputs["q"], inputs["k"], inputs["v"], end, **options)}

    return Problem(call(tree_attention), call(naive_tree_attention), inputs, {"out": dout})


def branch_at_every_offset(run: Run) -> None:
    """All 128 offsets of a tile; an interpreter takes every ninth and those around 60."""
    few = run.small and run.backend == "triton"
    for offset in sorted({*range(0, 128, 9), *range(57, 64, 3)}) if few else range(128):
        end = subtree_end((1 + offset, (3,), (1,), (140 - offset, (2,))))
        parity(run, tree(run, end=end, dim=16, heads=(1, 1)))


def small_segments(run: Run) -> None:
    shapes = [subtree_end(), subtree_end((1,)), subtree_end(*[(1,)] * 50), subtree_end((1, *[(1,)] * 45))]
    for end in [*shapes, subtree_end((40, *[(1,)] * 45, (30,)))]:
        parity(run, tree(run, end=end, dim=16, heads=(2, 1)))
    no_queries = tree(run, dim=16, heads=(2, 1), q=run.normal(2, 0, 16, seed=0).requires_grad_())
    end, none = forest(run).to(run.device), torch.zeros(0, dtype=torch.int64, device=run.device)
    call = lambda inputs: {"out": tree_attention(*inputs.values(), end, query_index=none)}  # noqa: E731
    got = evaluate(replace(no_queries, ours=call, upstream={"out": run.normal(2, 0, 16, seed=1)}))
    run.note("gradient without queries", float(got["dk"].abs().sum() + got["dv"].abs().sum()), 0.0)


def poisoned_branches(run: Run) -> None:
    """NaN or infinity in q, k, v of a tooth, a second tree and a token inside a tooth: who neither sees nor is seen by them keeps
    every bit. The torch path promises that for whole branches only."""
    end = subtree_end((8, (4,), (3,), (9,)), (6, (2,), (2,)), (25, (2,)))
    rows = torch.tensor([12, 13, 14, *([20] if run.backend == "triton" else []), *range(24, 34)])
    index = torch.arange(len(end))
    sees = (index[None, :] <= index[:, None]) & (index[:, None] < end[None, :])
    reached = sees[:, rows].any(1)
    seen = sees[reached].any(0)
    for flags in ("", "softcap", "window"):
        problem = tree(run, flags, end=end, dim=16, heads=(2, 1))
        clean = evaluate(problem)
        for value in (math.nan, math.inf):
            inputs = {name: x.detach().clone() for name, x in problem.inputs.items()}
            for x in inputs.values():
                x[:, rows.to(run.device), 3] = value
                x.requires_grad_()
            got = evaluate(replace(problem, inputs=inputs))
            for name, x in got.items():
                keep = (~(reached if name in ("out", "dq") else seen)).to(run.device)
                run.same(name, x[:, keep], clean[name][:, keep])


def strided_attention(run: Run) -> None:
    """Head-major memory and a last dimension that is not the contiguous one: the bits of token-major memory."""
    problem = tree(run, heads=(2, 2))
    clean = evaluate(problem)
    for layout in (lambda x: x.contiguous(), lambda x: torch.stack([x, x * math.nan], -1)[..., 0]):
        inputs = {name: layout(x.detach()).requires_grad_() for name, x in problem.inputs.items()}
        for name, x in evaluate(replace(problem, inputs=inputs)).items():
            run.agree(name, x, clean[name])


# policy_loss and segment_reduce

LENGTHS = (0, 1, 17, 0, 600, 3, 1, 130, 0)  # none, one token, less than a block of 256, several


def every_word() -> list[PolicyLossSpec]:
    """Each ratio with each clip; every KL estimate and every correction at every level among them, limits tight and away."""
    corrections = [("none", "token"), *itertools.product(("tis", "icepop", "mask"), ("token", "step", "step_mean"))]
    specs = []
    for i, (ratio, clip) in enumerate(
        itertools.product(("token", "step", "step_token"), ("none", "ppo", "dual", "cispo"))
    ):
        kl, (correction, level) = ("none", "k1", "k2", "k3")[(i + i // 4) % 4], corrections[i % len(corrections)]
        specs.append(
            PolicyLossSpec(
                ratio=ratio,  # type: ignore[arg-type]
                clip=clip,  # type: ignore[arg-type]
                clip_low=(0.1, math.inf, 0.05)[i % 3],
                clip_high=(0.15, 0.05, math.inf)[i % 3],
                dual_clip=(1.3, 1.02)[i % 2],
                kl=kl,  # type: ignore[arg-type]
                kl_coef=0.0 if kl == "none" else 0.3,
                kl_limit=(math.inf, 0.05)[i % 2],
                correction=correction,  # type: ignore[arg-type]
                correction_level=level,  # type: ignore[arg-type]
                correction_low=(0.8, 0.0)[i % 2],
                correction_high=(1.1, 1.3, math.inf)[i % 3],
            )
        )
    return specs


SPECS = every_word()
WEIGHTS = ("token", "segment", "scalar", "none")


def policy(run: Run, spec: PolicyLossSpec = SPECS[5], *, lengths: tuple[int, ...] = LENGTHS, kind: int = 0) -> Problem:
    """kind: which forms of advantage and weight. Three in ten tokens have weight 0, where it is by token."""
    offsets = torch.tensor([0, *itertools.accumulate(lengths)], device=run.device)
    tokens, segments = sum(lengths), len(lengths)
    logp = run.normal(tokens, seed=1, dtype=torch.float32) - 2
    old = logp + run.normal(tokens, seed=2, scale=0.2, dtype=torch.float32)
    weights = {"token": tokens, "segment": segments}
    inputs: dict[str, Any] = {
        "logp": logp.to(run.dtype, copy=True).requires_grad_(),
        "old_logp": old.to(run.dtype),
        "advantage": run.normal((segments, tokens)[kind % 2], seed=3),
        "offsets": offsets,
        "ref_logp": None if spec.kl == "none" else (logp + run.normal(tokens, seed=4, scale=0.3)).to(run.dtype),
        "behaviour_logp": None
        if spec.correction == "none"
        else (old + run.normal(tokens, seed=5, scale=0.1)).to(run.dtype),
    }
    form = WEIGHTS[kind % len(WEIGHTS)]
    if form in weights:
        drawn = run.normal(weights[form], seed=6).abs() + 0.1
        inputs["weight"] = drawn.masked_fill(run.share(weights[form], 0.3, 7), 0.0)
    elif form == "scalar":
        inputs["weight"] = torch.tensor(0.375, dtype=run.dtype, device=run.device)

    def call(function: Any) -> Callable[[dict], dict[str, Tensor]]:
        def outputs(inputs: dict[str, Any]) -> dict[str, Tensor]:
            loss, metrics = function(**inputs, spec=spec)
            return {"loss": loss, "sums": metrics.sums, "ratio_max": metrics.ratio_max}

        return outputs

    upstream = {"loss": torch.tensor(1.75, device=run.device)}
    return Problem(call(policy_loss), call(naive_policy_loss), inputs, upstream)


def policy_spec(run: Run, number: int) -> None:
    for kind in range(len(WEIGHTS)):
        parity(run, policy(run, SPECS[number], kind=kind))


def unused_tokens(run: Run) -> None:
    """NaN or infinity beside every weight of 0 changes no bit of anything."""
    for spec in SPECS[2::4]:
        problem = policy(run, spec)
        clean, dead = evaluate(problem), problem.inputs["weight"] == 0
        for poison in (math.nan, math.inf):
            inputs = dict(problem.inputs)
            for name in ("logp", "old_logp", "ref_logp", "behaviour_logp"):
                if inputs[name] is not None:
                    inputs[name] = inputs[name].detach().masked_fill(dead, poison)
            inputs["logp"].requires_grad_()
            got = evaluate(replace(problem, inputs=inputs))
            for name, x in got.items():
                run.same(name, x, clean[name])
            run.note("gradient of unused tokens", float(got["dlogp"][dead].abs().sum()), 0.0)


def reduce(run: Run, op: str = "sum", *, index: bool = False, lengths: tuple[int, ...] = ()) -> Problem:
    """index: positions name entries, most of them several times. Segments longer than a block of 512 among them."""
    lengths = lengths or ((0, 1, 300, 0, 1, 600, 0) if run.small else (0, 1, 700, 0, 40, 1, 2600, 512, 0))
    positions = sum(lengths)
    offsets = torch.tensor([0, *itertools.accumulate(lengths)], device=run.device)
    at = run.integers(max(1, positions // 4), positions, 2) if index else None
    inputs = {"x": run.normal(positions, seed=1).requires_grad_(), "offsets": offsets, "index": at}

    def call(function: Any) -> Callable[[dict], dict[str, Tensor]]:
        return lambda given: {"reduced": function(given["x"], given["offsets"], op, given["index"])}

    upstream = run.normal(len(lengths), seed=3, dtype=torch.float32)
    return Problem(call(segment_reduce), call(naive_segment_reduce), inputs, {"reduced": upstream})


def reduced(run: Run, op: str, index: bool) -> None:
    problem = reduce(run, op, index=index)
    if op == "count":
        run.same(
            "count", problem.ours(problem.inputs)["reduced"], problem.naive(problem.inputs)["reduced"].to(run.device)
        )
    elif op == "max":  # empty segments are -inf
        got, exact = evaluate(problem), evaluate(problem.exact())
        run.same("max", got["reduced"].double(), exact["reduced"])
        run.compare("dx", got["dx"], exact["dx"])
    else:
        parity(run, problem)


def poisoned_entries(run: Run) -> None:
    """NaN reaches the segments that hold it and no other; entries that no position names reach none."""
    for op in ("sum", "mean", "max"):
        problem = reduce(run, op, index=True)
        clean, used = evaluate(problem), torch.zeros(len(problem.inputs["x"]), dtype=torch.bool, device=run.device)
        used[problem.inputs["index"]] = True
        x = problem.inputs["x"].detach().masked_fill(~used, math.nan).requires_grad_()
        for name, y in evaluate(replace(problem, inputs=problem.inputs | {"x": x})).items():
            run.same(name, y, clean[name])
        problem = reduce(run, op)
        clean, x = evaluate(problem), problem.inputs["x"].detach().clone()
        x[300] = math.nan  # in the third segment
        got = evaluate(replace(problem, inputs=problem.inputs | {"x": x.requires_grad_()}))["reduced"]
        run.note("segments that lost their NaN", float(not got[2].isnan()), 0.0)
        others = torch.arange(len(got), device=run.device) != 2
        run.same("other segments", got[others], clean["reduced"][others])


def permuted_segments(run: Run, op: str) -> None:
    """The segments in another order: a segment's part of the result and of the gradient keeps its bits."""
    if op == "segment_reduce":
        problem, name, per_segment = reduce(run, "mean"), "x", "reduced"
    else:
        problem, name, per_segment = policy(run, SPECS[6]), "logp", None
    offsets = problem.inputs["offsets"].tolist()
    order = torch.randperm(len(offsets) - 1, generator=torch.Generator().manual_seed(3)).tolist()
    tokens = torch.cat([torch.arange(offsets[s], offsets[s + 1]) for s in order]).to(run.device)
    lengths, segments = [offsets[s + 1] - offsets[s] for s in order], torch.tensor(order, device=run.device)
    inputs = {}
    for key, x in problem.inputs.items():
        by = tokens if isinstance(x, Tensor) and len(x) == len(tokens) else segments
        inputs[key] = x if x is None else x.detach()[by] if key != "offsets" else None
    inputs["offsets"] = torch.tensor([0, *itertools.accumulate(lengths)], device=run.device)
    inputs[name].requires_grad_()
    upstream = {n: u[segments] if u.dim() else u for n, u in problem.upstream.items()}
    whole, got = evaluate(problem), evaluate(replace(problem, inputs=inputs, upstream=upstream))
    pairs = {f"d{name}": tokens} | ({per_segment: segments} if per_segment else {})
    for key, by in pairs.items():
        run.agree(key, got[key], whole[key][by])


# Every operation

STANDARD: dict[str, Callable[[Run], Problem]] = {
    "linear_logprob": linear,
    "selective_logprob": selective,
    "tree_attention": tree,
    "policy_loss": policy,
    "segment_reduce": reduce,
}


def repeated(run: Run, op: str) -> None:
    """Without torch's deterministic mode, as a caller has it."""
    problem = STANDARD[op](run)
    with poisoned_memory(False):
        first = evaluate(problem)
        for _ in range(3):
            for name, x in evaluate(problem).items():
                run.same(name, x, first[name])


def second_thread(run: Run, op: str) -> None:
    """Where autograd runs it, for a caller with threads of its own."""
    problem = STANDARD[op](run)
    here = gradients(problem, problem.ours(problem.inputs))
    outputs = problem.ours(problem.inputs)
    with ThreadPoolExecutor(1) as pool:
        there = pool.submit(gradients, problem, outputs).result()
    for name, x in there.items():
        run.same(name, x, here[name])


def frozen(run: Run, op: str, names: tuple[str, ...]) -> None:
    """The other gradients are still right, and the frozen inputs get none."""
    problem = STANDARD[op](run)
    inputs = problem.inputs | {name: problem.inputs[name].detach() for name in names}
    problem = replace(problem, inputs=inputs)
    got = parity(run, problem)
    assert not {f"d{name}" for name in names} & got.keys(), f"{names} got a gradient"


def variant(run: Run, op: str, *arguments: Any, **options: Any) -> None:
    parity(run, STANDARD[op](run, *arguments, **options))


def table() -> list[Case]:
    """Every operation in every variant that is compiled for itself, and the mandatory cases of each."""
    cases: list[Case] = []

    def add(
        op: str, name: str, measure: Callable[..., None], *arguments: Any, dtypes: tuple[str, ...] = ALL, **options: Any
    ) -> None:
        cases.append(Case(f"{op}: {name}", op, dtypes, partial(_measure, measure, arguments, options)))

    op = "tree_attention"
    for dim in (256, 128, 64):  # what takes longest to compile goes first
        for flags in ("", "softcap", "window", "softcap window", "query_index"):
            add(op, f"D={dim} {flags}".rstrip(), variant, op, flags, dim=dim)
    for dim in (16, 80):  # padded to a power of two, or below the smallest shipped
        add(op, f"D={dim}", variant, op, dim=dim, dtypes=TWO)
    add(op, "six query heads a key head", variant, op, heads=(12, 2), dtypes=TWO)
    add(op, "a branch at each of 128 offsets", branch_at_every_offset)
    add(op, "zero-length and one-token segments", small_segments, dtypes=TWO)
    add(op, "infinity and NaN at masked positions", poisoned_branches)
    add(op, "a non-contiguous slice", strided_attention, dtypes=TWO)
    for names in ("q", "k", "v", "kv"):
        add(op, f"frozen {names}", frozen, op, tuple(names), dtypes=TWO)

    op = "linear_logprob"
    for count in range(4):
        for words in itertools.combinations(("bias", "softcap", "entropy"), count):
            add(op, " ".join(words) or "plain", variant, op, " ".join(words))
    add(op, "many row blocks", variant, op, rows=2300, vocab=1000, dtypes=TWO)  # more than GROUP = 16 of 128
    add(op, "ragged hidden size", variant, op, size=77, dtypes=TWO)
    for name in ("weight", "hidden"):
        add(op, f"frozen {name}", frozen, op, (name,), dtypes=TWO)

    op = "selective_logprob"
    for flags in ("", "entropy", "inplace", "entropy inplace"):
        add(op, flags or "plain", variant, op, flags)

    for op in LOGPROB:
        add(op, "no block divides V, logits far below zero", logits_far_below_zero, op)
        add(op, "a nearly certain target", nearly_certain_target, op)
        add(op, "non-uniform upstream gradients", upstream_over_decades, op)
        add(op, "ignored rows hold poison", ignored_rows, op, dtypes=TWO)
        add(op, "the entropy's gradient alone", entropy_gradient_alone, op)
        add(op, "a non-contiguous slice", sliced_logprob, op, dtypes=TWO)
        add(op, "infinity and NaN at masked positions", masked_logprob, op)
        add(op, "row sums of dZ are zero", zero_row_sums, op)
        add(op, "bits under permutation and repacking", permuted_logprob, op)
        add(op, "indices beyond 2^31", beyond_2_31, op, dtypes=("bfloat16",))

    op = "policy_loss"
    for number, spec in enumerate(SPECS):
        words = (spec.ratio, spec.clip, spec.kl, spec.correction, spec.correction_level)
        add(op, " ".join(words[: 5 if spec.correction != "none" else 4]), policy_spec, number)
    for lengths in ((0, 0, 1), (1, 255, 256, 257, 512)):
        add(op, f"zero-length and one-token segments {lengths}", variant, op, lengths=lengths, dtypes=TWO)
    add(op, "infinity and NaN at masked positions", unused_tokens, dtypes=TWO)

    op = "segment_reduce"
    for word in ("sum", "mean", "max", "count"):
        for index in (False, True):
            add(op, f"{word}{' index' if index else ''}", reduced, word, index)
    add(op, "zero-length and one-token segments", variant, op, lengths=(0, 1, 0, 0, 1, 1, 0), dtypes=TWO)
    add(op, "infinity and NaN at masked positions", poisoned_entries, dtypes=TWO)

    for op in ("policy_loss", "segment_reduce"):
        add(op, "bits under permutation and repacking", permuted_segments, op, dtypes=TWO)
    for op in STANDARD:
        add(op, "backward from a second thread", second_thread, op, dtypes=TWO)
        add(op, "bits over repeats", repeated, op)
    return cases


def _measure(measure: Callable[..., None], arguments: tuple[Any, ...], options: dict[str, Any], run: Run) -> None:
    measure(run, *arguments, **options)


def run_case(case: Case, dtype: str, device: str) -> dict[str, Any]:
    """The case's row. Whatever it raises is its failure. restart: the process must not go on (a CUDA error stays)."""
    interpreted = device == "cpu" and os.environ.get("SWIRL_KERNELS_BACKEND") == "triton"
    run = Run(
        case.op, device, DTYPES[dtype], "triton" if device == "cuda" or interpreted else "torch", small=device == "cpu"
    )
    row: dict[str, Any] = {"name": case.name, "op": case.op, "dtype": dtype}
    failure, not_run, restart, started = "", "", False, time.perf_counter()
    try:
        if interpreted and dtype == "bfloat16":
            raise NotRun("Triton's interpreter multiplies bfloat16 wrongly")
        with poisoned_memory(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            case.measure(run)
        if device == "cuda":
            torch.cuda.synchronize()
    except NotRun as reason:
        not_run = str(reason)
    except Exception as error:  # it belongs to this case alone
        failure = f"{type(error).__name__}: {error}"[:2000]
    if device == "cuda":
        try:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
        except RuntimeError:
            restart = True
    over = [f"{n} {e:.2e} > {run.tolerance[n]:.2e}" for n, e in run.errors.items() if not e <= run.tolerance[n]]
    failure = "; ".join(filter(None, (failure, *over))) or ("" if run.errors or not_run else "nothing was measured")
    return row | {
        "errors": {name: e if math.isfinite(e) else None for name, e in run.errors.items()},
        "tolerance": run.tolerance,
        "passed": not failure and not not_run,
        "seconds": round(time.perf_counter() - started, 3),
        "failure": failure,
        "not_run": not_run,
        "restart": restart,
    }


def main() -> int:
    """A worker: reads `NAME / DTYPE` lines, answers each with one line of JSON; all else it prints goes to stderr."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernel_parity", description=main.__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), required=True)
    device = parser.parse_args().device
    if device == "cuda":
        os.environ["SWIRL_KERNELS_BACKEND"] = "triton"
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    cases = {case.name: case for case in table()}
    for line in sys.stdin:
        name, dtype = line.rstrip("\n").rsplit(" / ", 1)
        row = run_case(cases[name], dtype, device)
        print(json.dumps(row), file=answers, flush=True)
        if row["restart"]:
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
