"""Are the kernels right on this machine? Every operation against float64 on the same rounded inputs, case by case.

    python -m benchmarks.gpu_check            runs all cases in worker processes, prints and keeps what they found
    echo "NAME / DTYPE" | python -m benchmarks.gpu_check.parity --device cuda        is such a worker: a line in, a row of JSON out

A case is a function that takes a Run (device, dtype, backend) and measures errors there: of every value and every gradient, as
a relative norm and of the worst row, or how many elements differ where bits must agree. Memory arrives full of NaN wherever
torch.empty hands it out, so that what is read before it is written shows. On CUDA the Triton kernels run; on a CPU the torch
paths, or with SWIRL_KERNELS_BACKEND=triton TRITON_INTERPRET=1 the interpreted kernels at reduced sizes, without bf16.

Not checked: speed (benchmarks.kernels), several devices, autocast, what is refused (tests/kernels). The bits of tree_attention
under repacking are not promised and not compared: tiles are cut where a packing puts them.

The cases are in logprob.py, attention.py, loss.py and, for the policy that they make up, model.py; measure.py says what is measured
and allowed.
"""

from __future__ import annotations

import itertools
import math
import os
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from benchmarks.gpu_check.parity.attention import (
    branch_at_every_offset,
    poisoned_branches,
    small_segments,
    strided_attention,
    tree,
)
from benchmarks.gpu_check.parity.logprob import (
    LOGPROB,
    beyond_2_31,
    entropy_gradient_alone,
    ignored_rows,
    linear,
    logits_far_below_zero,
    masked_logprob,
    nearly_certain_target,
    permuted_logprob,
    selective,
    sliced_logprob,
    upstream_over_decades,
    zero_row_sums,
)
from benchmarks.gpu_check.parity.loss import (
    SPECS,
    permuted_segments,
    poisoned_entries,
    policy,
    policy_spec,
    reduce,
    reduced,
    unused_tokens,
)
from benchmarks.gpu_check.parity.measure import (
    DTYPES,
    Case,
    NotRun,
    Problem,
    Run,
    evaluate,
    gradients,
    parity,
    poisoned_memory,
)
from benchmarks.gpu_check.parity.model import FAMILIES, comb_of_a_model

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


def parity_cases() -> list[Case]:
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
    for flags in ("sinks", "sinks softcap window", "chunk"):
        add(op, f"D=64 {flags}", variant, op, flags)
    for keys, values in ((192, 128), (16, 24)):
        add(op, f"D={keys} and values of {values}", variant, op, dim=keys, values=values, dtypes=TWO)
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
    for flags in ("invariant", "invariant bias softcap entropy", "all bias entropy", "kept", "kept all softcap"):
        add(op, flags, variant, op, flags)
    add(
        op, "many row blocks", variant, op, "invariant", rows=2300, vocab=1000, dtypes=TWO
    )  # more than GROUP = 16 of 128
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
    for family in FAMILIES:
        add("policy", f"a comb of {family}", comb_of_a_model, family)
    add("policy", "a comb of qwen2 with liger-kernel", comb_of_a_model, "qwen2", liger=True)
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
    except Exception as error:  # it belongs only to this case
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
