"""What do the kernels of swirl_kernels cost, in time and memory, beside plain torch and other implementations?

    python -m benchmarks.kernels --out benchmarks/results/DATE-kernels.json           # a few minutes on a GPU
    python -m benchmarks.kernels --quick --out FILE --only linear_logprob,policy_loss  # about a minute in all on two CPU cores

Sizes, inputs and what is counted: kernel_shapes.py; the other implementations: kernel_rivals.py. Two directions: `forward` is the value
without gradients (scoring under an old or a reference policy), `forward_backward` the value and the gradient of every input that has one.
Every backend is first compared with the first one that runs (plain torch where its memory suffices), values and gradients; one that
differs is a row with a failure and is not timed. The rest are timed in turns (A B A B), so that a machine that slows down slows all.
A pass of its own measures memory: the most in use above the inputs, outputs and gradients included. On a CPU that is the resident set,
good to some ten MiB.

Not measured: hidden states or weights split over devices, entropy, temperature, autocast, ignored rows, several layers. Times on CUDA
begin with an L2 cache that holds none of the inputs and include the launches where the device waits for them. cublas_tflops (on a CPU:
its matrix product) and copy_gbytes_per_s are of the same run; the shares in the summary are of them. With H cut, as on a CPU, the passes
over the logits weigh more than they do in the real head, and so does whatever leaves them out.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.environment import environment
from benchmarks.kernels.rivals import TOLERANCE, Call, largest_error, load, run, same_bits
from benchmarks.kernels.shapes import COPY_MIB, DIRECTIONS, MATMUL_SIDE, OPS, SHAPES, Case, make_case

OURS, PLAIN = "swirl_kernels", "torch"
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in TOLERANCE}
MOST_ROUNDS = 50
FLUSH_BYTES = 2**28  # written before every call on CUDA; an H100 has 50 MB of L2 cache


def seconds_of(action: Callable[[], Any], device: str) -> float:
    """Of one call. CUDA: between events, after a write that turns out the L2 cache."""
    if device == "cpu":
        from benchmarks.step_training.measure import timed  # needs more packages than a GPU machine must have

        seconds: dict[str, float] = defaultdict(float)
        with timed(seconds, "call", device):
            action()
        return seconds["call"]
    torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=device).zero_()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    action()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1000


def with_peak_bytes(action: Callable[[], Any], device: str) -> tuple[Any, int | None]:
    """What action returns, and the most memory in use meanwhile above what was in use before; None where the system does not tell."""
    if device == "cpu":
        from benchmarks.step_training.measure import PeakMemory  # see above

        memory = PeakMemory(device)
        found = action()
        mib = memory.mib()
        return found, None if mib is None else round(mib * 2**20)
    _release(device)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    found = action()
    torch.cuda.synchronize()
    return found, torch.cuda.max_memory_allocated() - before


def _release(device: str) -> None:
    if device == "cuda":
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


def measure(
    case: Case, calls: dict[str, Call], direction: str, device: str, repeats: int, seconds: float
) -> list[dict[str, Any]]:
    """One row a backend. Each is called at least `repeats` times, and until all together took `seconds` for each of them."""
    rows: dict[str, dict[str, Any]] = {}
    wanted: tuple[Tensor, ...] | None = None
    reference = ""
    for name, call in calls.items():
        row = rows[name] = {
            "op": case.op,
            "shape": {"name": case.shape.name, **case.shape.sizes},
            "backend": name,
            "dtype": str(case.dtype).removeprefix("torch."),
            "direction": direction,
            "ms": None,
            "ms_of_each_repeat": [],
            **dict.fromkeys(("peak_bytes", "tflops", "gbytes_per_s", "max_relative_error")),
        }
        try:
            if device == "cuda":
                run(call, case, direction)  # compiles
            found, row["peak_bytes"] = with_peak_bytes(lambda call=call: run(call, case, direction), device)
            if wanted is None:
                wanted, reference = found, name
            error, part = largest_error(case, found, wanted)
            row["max_relative_error"] = error if error < float("inf") else None
            if reference == name and error > 0:  # it differs from itself
                row["failure"] = f"its {part} is not finite"
                wanted = None
            elif error > (allowed := TOLERANCE[case.dtype]):
                row["failure"] = f"its {part} differs from {reference}'s by {error:.2g} of the norm, above {allowed:g}"
        except Exception as raised:  # a backend that fails, for want of memory or otherwise, is a result
            row["failure"] = _first_line(raised)
        found = None
        _release(device)
    wanted = None
    timed_ones = [name for name, row in rows.items() if "failure" not in row]
    first = 1 if device == "cuda" else 0  # the round before it fills the allocator's cache
    rounds, spent = 0, 0.0
    while timed_ones and (rounds < first + repeats or (spent < seconds * len(timed_ones) and rounds < MOST_ROUNDS)):
        for name in list(timed_ones):
            try:
                took = seconds_of(lambda call=calls[name]: run(call, case, direction), device)
            except Exception as raised:
                rows[name]["failure"] = _first_line(raised)
                timed_ones.remove(name)
                continue
            if rounds >= first:
                rows[name]["ms_of_each_repeat"].append(1000 * took)
                spent += took
        rounds += 1
    for name in timed_ones:
        row = rows[name]
        row["ms"] = statistics.median(row["ms_of_each_repeat"])
        rate, scale = ("tflops", 1e12) if case.unit == "flop" else ("gbytes_per_s", 1e9)
        row[rate] = case.work[direction] / (row["ms"] / 1000) / scale
    return list(rows.values())


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]


def matmul_tflops(device: str, dtype: torch.dtype, repeats: int) -> float:
    """The best that a product of square matrices reaches here."""
    side = MATMUL_SIDE[device]
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    taken = [seconds_of(lambda: a @ b, device) for _ in range(repeats + 2)][2:]
    return 2.0 * side**3 / statistics.median(taken) / 1e12


def copy_gbytes_per_s(device: str, repeats: int) -> float:
    """Bytes read and written by a copy within the device's memory."""
    source = torch.ones(COPY_MIB[device] * 2**20, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    taken = [seconds_of(lambda: target.copy_(source), device) for _ in range(repeats + 2)][2:]
    return 2.0 * len(source) / statistics.median(taken) / 1e9


def summarize(
    rows: list[dict[str, Any]], tflops: float, gbytes_per_s: float, deterministic: bool | None
) -> dict[str, Any]:
    """None where something was not measured. Ratios above 1: ours takes less. Shares: counted work, whatever is computed again."""

    def cells(op: str) -> list[dict[str, dict[str, Any]]]:
        """By backend, the rows of forward_backward that were timed; one dict a shape, in the order measured."""
        by_shape: dict[str, dict[str, dict[str, Any]]] = defaultdict(dict)
        for row in rows:
            if row["op"] == op and row["direction"] == "forward_backward" and row["ms"] is not None:
                by_shape[json.dumps(row["shape"])][row["backend"]] = row
        return [cell for cell in by_shape.values() if OURS in cell]

    def share(op: str) -> float | None:
        largest = max(
            cells(op), key=lambda cell: cell[OURS]["shape"]["N"] * cell[OURS]["shape"].get("V", 1), default=None
        )
        return largest[OURS]["gbytes_per_s"] / gbytes_per_s if largest else None

    linear = max(cells("linear_logprob"), key=lambda cell: (PLAIN in cell, cell[OURS]["shape"]["V"]), default={})
    ours, plain = linear.get(OURS), linear.get(PLAIN)
    comparison = None
    if ours and plain:
        both = ours["peak_bytes"] and plain["peak_bytes"]
        comparison = {
            "shape": ours["shape"],
            "time_ratio": plain["ms"] / ours["ms"],
            "memory_ratio": plain["peak_bytes"] / ours["peak_bytes"] if both else None,
        }
    return {
        "linear_logprob_vs_torch": comparison,
        "cublas_tflops": tflops,
        "copy_gbytes_per_s": gbytes_per_s,
        "linear_logprob_share_of_matmul": ours["tflops"] / tflops if ours else None,
        "policy_loss_share_of_copy": share("policy_loss"),
        "selective_logprob_share_of_copy": share("selective_logprob"),
        "deterministic": deterministic,
    }


def options_of(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.kernels",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help="fewer and smaller sizes, fewer repeats")
    parser.add_argument("--only", default=",".join(OPS), metavar="OP,...", help="operations, default: all")
    parser.add_argument("--dtype", choices=DTYPES, help="default: bfloat16 on cuda, float32 on cpu")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, required=True, help="JSON, rewritten after every measurement")
    options = parser.parse_args(arguments)
    chosen = options.only.split(",")
    if strange := set(chosen) - set(OPS):
        parser.error(f"--only {options.only}: {', '.join(sorted(strange)) or 'nothing'} is none of {', '.join(OPS)}")
    options.only = [op for op in OPS if op in chosen]
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA device here; use --device cpu")
    if not options.out.absolute().parent.is_dir():
        parser.error(f"{options.out}: the folder {options.out.absolute().parent} does not exist; make it first")
    if options.dtype is None:
        options.dtype = "bfloat16" if options.device == "cuda" else "float32"
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    options = options_of(arguments)
    device, dtype = options.device, DTYPES[options.dtype]
    repeats, seconds = (3 if options.quick else 5), (1.0 if device == "cpu" and not options.quick else 0.5)
    rows: list[dict[str, Any]] = []
    result: dict[str, Any] = {
        "environment": environment(),
        "settings": {
            **{key: value for key, value in vars(options).items() if key != "out"},
            "repeats_at_least": repeats,
            "seconds_at_least": seconds,
            "tolerance": {name: TOLERANCE[one] for name, one in DTYPES.items()},
        },
        "summary": {},
        "results": rows,
        "absent": [],
    }
    tflops = matmul_tflops(device, dtype, repeats)
    gbytes_per_s = copy_gbytes_per_s(device, repeats)
    deterministic: bool | None = None
    print(f"{options.dtype}, {device}: matrix product {tflops:.3g} TFLOP/s, copy {gbytes_per_s:.3g} GB/s")
    print(f"{'':<65}{'ms':>10}{'MiB':>10}{'TFLOP/s':>9}{'GB/s':>8}{'error':>9}")
    shapes = SHAPES[device + (" quick" if options.quick else "")]
    for op in options.only:
        for shape in shapes[op]:
            case = make_case(op, shape, device, dtype)
            calls, absent = load(case)
            result["absent"] += absent
            for one in absent:
                print(f"{op} {shape.name} {one['backend']}: absent, {one['reason']}")
            for direction in DIRECTIONS:
                found = measure(case, calls, direction, device, repeats, seconds)
                rows += found
                ran = any(row["backend"] == OURS and row["ms"] is not None for row in found)
                if device == "cuda" and op == "linear_logprob" and direction == "forward_backward" and ran:
                    deterministic = same_bits(calls[OURS], case) and deterministic is not False
                result["summary"] = summarize(rows, tflops, gbytes_per_s, deterministic)
                _write(options.out, result)
                for row in found:
                    print(_line(row), flush=True)
            del case, calls
            _release(device)
    for key, value in result["summary"].items():
        print(f"{key:>34} {f'{value:.4g}' if isinstance(value, float) else value}")
    print(options.out)


def _line(row: dict[str, Any]) -> str:
    direction = "fwd" if row["direction"] == "forward" else "f+b"
    start = f"{row['op']:<18}{row['shape']['name'][:19]:<20}{row['backend']:<24}{direction}"
    if "failure" in row:
        return f"{start}   {row['failure']}"
    memory = "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**20:,.0f}"
    rates = ("" if row[key] is None else f"{row[key]:.3g}" for key in ("tflops", "gbytes_per_s"))
    return f"{start:<65}{row['ms']:>10.3f}{memory:>10}{next(rates):>9}{next(rates):>8}{row['max_relative_error']:>9.1e}"


def _write(path: Path, result: dict[str, Any]) -> None:
    """Whole or not at all, so that an interrupted run leaves what it measured."""
    partial = path.with_name(path.name + ".tmp")
    partial.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    os.replace(partial, path)
