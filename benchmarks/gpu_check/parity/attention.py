"""Cases of tree_attention. T packed tokens, D head dimension."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu_check.parity.measure import Problem, Run, evaluate, parity
from swirl_kernels import naive_tree_attention, tree_attention

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
    values: int | None = None,
    **change: Any,
) -> Problem:
    """flags: words of softcap, window, chunk, sinks, query_index. values: their width, None for `dim`. Token-major memory seen
    head-major, as models make it."""
    end = (forest(run) if end is None else end).to(run.device)
    keys = len(end)
    options: dict[str, Any] = {"softcap": 2.0} if "softcap" in flags else {}
    if "window" in flags:
        options["window"] = 9 if run.small else 130
    if "chunk" in flags:
        options["chunk"] = 9 if run.small else 130
    if "query_index" in flags:
        options["query_index"] = run.integers(keys, keys // 3, 8)
    queries = len(options.get("query_index", end))
    values = values or dim
    shapes = {"q": (queries, heads[0], dim), "k": (keys, heads[1], dim), "v": (keys, heads[1], values)}
    inputs = {
        name: run.normal(*shape, seed=i).transpose(0, 1).requires_grad_()
        for i, (name, shape) in enumerate(shapes.items())
    } | change
    if "sinks" in flags:
        inputs["sinks"] = run.normal(heads[0], seed=3, dtype=torch.float32).requires_grad_()
    rows = torch.rand(heads[0], queries, 1, generator=torch.Generator().manual_seed(9)) + 0.05
    dout = run.normal(heads[0], queries, values, seed=10) * rows.to(run.device, run.dtype)

    def call(function: Any) -> Callable[[dict], dict[str, Tensor]]:
        return lambda inputs: {
            "out": function(inputs["q"], inputs["k"], inputs["v"], end, sinks=inputs.get("sinks"), **options)
        }

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
