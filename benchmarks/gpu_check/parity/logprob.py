"""Cases of linear_logprob and selective_logprob. N rows, V vocabulary, H hidden size."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu_check.parity.measure import NotRun, Problem, Run, evaluate, parity
from swirl_kernels import linear_logprob, naive_linear_logprob, naive_selective_logprob, selective_logprob


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
    """flags: words of bias, softcap, entropy, invariant, all (rows), kept (in a workspace that holds all tiles). Several row
    blocks, splits, tiles and workspace chunks; padding after the vocabulary, ignored rows, a temperature per row. change:
    rows, vocab, size, or inputs to replace."""
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
    own: dict[str, Any] = {
        "workspace_mb": 1024 if "kept" in flags else chunk,
        "rows": "all" if "all" in flags else "live",
    }
    own["invariant"] = "invariant" in flags and run.backend == "triton"
    ours = logprob_call(linear_logprob, tensors, **own, **options)
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
    """A third of the tokens and a stretch wider than a tile are forbidden by -inf; the padding after the vocabulary is NaN."""
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
    """The rows in another order, and a third of them without the others.

    linear_logprob's gradients come from cuBLAS, which promises no bits, and its values too where invariant=True does not ask for them.
    """
    problem = (
        linear(run, "entropy invariant", padding=0, bias=None) if op == "linear_logprob" else selective(run, padding=0)
    )
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
