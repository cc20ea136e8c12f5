"""Does it work on your GPU, and how fast? Parity of every kernel with float64, then measurements, the most telling first, within ten
minutes and with one command.

    make gpu-check                                          or, what that runs:
    PYTHONPATH=.:kernels python3 -m benchmarks.gpu_check --out benchmarks/results

Needs torch with CUDA, triton, transformers and numpy, nothing else of this repository's dependencies. Cases run in worker processes:
so kernels compile side by side, and one that crashes or hangs loses its own result only. Writes into --out

    DATE-gpu-check-GPU.json         environment, a row for every case, what was not run and why, exit codes of the benchmarks
    DATE-decide-PART-GPU.json       by benchmarks.gpu_check.decisions: products, head, attention, step, layer; with what follows
    DATE-kernels-GPU.json           by benchmarks.kernels: ours beside others
    DATE-step-training-GPU.json     by benchmarks.step_training

after every stage, so that an interrupted run leaves what it found. Exit code 0: everything passed; 1: something did not; 2: there is
no CUDA device. Cases that this machine cannot run (too little memory) are listed and fail nothing.

Not checked: more than one GPU, and tests/kernels, which needs pytest and hypothesis.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TextIO

import torch

from benchmarks.environment import environment
from benchmarks.gpu_check.parity import MANDATORY, parity_cases
from benchmarks.gpu_check.parity.measure import TOLERANCES

ROOT = Path(__file__).resolve().parents[2]
CASE_SECONDS = 150.0  # compiling and running one case; the slowest compile in some 20 s
PARITY_SHARE = 0.4  # of the time, where measurements follow
Item = tuple[str, str, str]  # name, operation, dtype of a case


def main(arguments: Sequence[str] | None = None) -> int:
    options = options_of(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        print(
            f"gpu_check: torch {torch.__version__} sees no CUDA device; run it on a machine with one, with a torch built for its "
            "driver (nvidia-smi shows both). --device cpu checks the checker itself.",
            file=sys.stderr,
        )
        return 2
    started = time.monotonic()
    deadline = started + 60 * options.minutes
    items = [
        (c.name, c.op, d) for c in parity_cases() for d in c.dtypes if all(w in c.name for w in options.only.split())
    ]
    if not items:
        print(f"gpu_check: --only {options.only!r} names none of the {len(parity_cases())} cases", file=sys.stderr)
        return 1
    about = _environment()
    gpu = torch.cuda.get_device_name() if options.device == "cuda" else "cpu"
    prefix = f"{about['date']}-{{}}-{re.sub(r'[^a-z0-9]+', '-', gpu.lower().removeprefix('nvidia ')).strip('-')}.json"
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / prefix.format("gpu-check")
    result: dict[str, Any] = {
        "environment": about | {"device": gpu, "gpu_memory_gib": _memory(options.device)},
        "settings": {
            "only": options.only,
            "minutes": options.minutes,
            "device": options.device,
            "workers": options.workers,
        },
        "tolerances": {dtype: vars(tolerance) for dtype, tolerance in TOLERANCES.items()},
        "mandatory": MANDATORY,
        "parity": [],
        "benchmarks": [],
    }

    def keep(row: dict[str, Any]) -> None:
        result["parity"].append(row)
        print_row(row)

    print(f"{gpu}, torch {torch.__version__}: {len(items)} cases in {options.workers} processes")
    until = started + 60 * options.minutes * PARITY_SHARE if options.parts else deadline
    command = [sys.executable, "-m", "benchmarks.gpu_check.parity", "--device", options.device]
    try:
        run_cases(items, command, options.workers, until, keep)
        result["parity"].sort(key=lambda row: items.index((row["name"], row["op"], row["dtype"])))
        _write(path, result)
        for name in options.parts:
            seconds, arguments_of = BENCHMARKS[name]
            out = options.out / prefix.format(name)
            limit = min(seconds, deadline - time.monotonic())
            result["benchmarks"].append(
                run_benchmark(name, [*arguments_of, "--out", str(out)], out, limit, options.device)
            )
            _write(path, result)
    finally:
        result["seconds"] = round(time.monotonic() - started, 1)
        result["counts"] = counts(result)
        _write(path, result)
    print_summary(result)
    print(path)
    return 0 if result["counts"]["failed"] == 0 and all(b["exit_code"] == 0 for b in result["benchmarks"]) else 1


def options_of(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_check",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="folder; made if it is not there")
    parser.add_argument(
        "--only", default="", metavar="WORDS", help="cases whose name contains every one of these words"
    )
    parser.add_argument("--minutes", type=float, default=10.0, help="for everything; what does not fit is reported")
    parser.add_argument(
        "--parts",
        nargs="*",
        choices=BENCHMARKS,
        default=list(BENCHMARKS),
        help="what follows parity; none: parity alone",
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: a test of this program")
    parser.add_argument("--workers", type=int, help="processes, by default one a core up to 12; 1 on a CPU")
    options = parser.parse_args(arguments)
    options.out = options.out.absolute()
    if options.minutes <= 0 or (options.workers is not None and options.workers < 1):
        parser.error(f"--minutes {options.minutes} --workers {options.workers}: both must be positive")
    if options.workers is None:
        options.workers = min(12, len(os.sched_getaffinity(0))) if options.device == "cuda" else 1
    return options


def run_cases(
    items: Sequence[Item], command: Sequence[str], workers: int, until: float, keep: Callable[[dict[str, Any]], None]
) -> None:
    """A row for every item, by `workers` processes of `command`. until: on the clock of time.monotonic()."""
    waiting, lock = deque(items), threading.Lock()

    def serve() -> None:
        worker: Worker | None = None
        while True:
            with lock:
                if not waiting:
                    break
                item = waiting.popleft()
            left = until - time.monotonic()
            if left <= 0:
                row = failed_row(item, 0.0, "not started: the time for parity was up; raise --minutes")
            else:
                worker = worker or Worker(command)
                row = worker.answer(item, min(CASE_SECONDS, left))
                if row.pop("restart"):
                    worker.close()
                    worker = None
            with lock:
                keep(row)
        if worker is not None:
            worker.close()

    threads = [threading.Thread(target=serve, daemon=True) for _ in range(min(workers, len(items)))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


class Worker:
    """A process that answers `NAME / DTYPE` with a row; what it prints besides is kept for when it dies."""

    def __init__(self, command: Sequence[str]) -> None:
        self.log: TextIO = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # type: ignore[assignment]
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            cwd=ROOT,
            env=_variables(),
        )

    def answer(self, item: Item, limit: float) -> dict[str, Any]:
        assert self.process.stdin is not None and self.process.stdout is not None, "both are pipes"
        started, late = time.monotonic(), threading.Event()
        timer = threading.Timer(limit, lambda: (late.set(), self.process.kill()))
        timer.start()
        try:
            self.process.stdin.write(f"{item[0]} / {item[2]}\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        finally:
            timer.cancel()
        if line:
            row: dict[str, Any] = json.loads(line)
            return row
        code = self.process.wait()
        self.log.seek(0)
        last = " | ".join(self.log.read().strip().splitlines()[-8:])[-1500:]
        why = f"no answer within {limit:.0f} s, killed" if late.is_set() else f"the process died with exit code {code}"
        return failed_row(item, time.monotonic() - started, f"{why}: {last}")

    def close(self) -> None:
        assert self.process.stdin is not None, "it is a pipe"
        try:
            self.process.stdin.close()
            self.process.wait(30)
        except (BrokenPipeError, subprocess.TimeoutExpired):
            self.process.kill()
            self.process.wait()
        self.log.close()


def failed_row(item: Item, seconds: float, failure: str) -> dict[str, Any]:
    row = {"name": item[0], "op": item[1], "dtype": item[2], "errors": {}, "tolerance": {}, "passed": False}
    return row | {"seconds": round(seconds, 3), "failure": failure, "not_run": "", "restart": True}


# What follows parity, in this order, and the most seconds of each. K and G are those of the README's claim. 8192 tokens of the 1.5B keep
# some 30 GiB of activations beside 25 GiB of weights, gradients and moments in fp32; the comb of K = 5, G = 8 has 8041 and goes in one
# piece.
BENCHMARKS: dict[str, tuple[float, list[str]]] = {
    **{
        f"decide-{part}": (seconds, ["-m", "benchmarks.gpu_check.decisions", part])
        for part, seconds in (("products", 30), ("head", 60), ("attention", 120), ("step", 240), ("layer", 30))
    },
    "kernels": (120, ["-m", "benchmarks.kernels", "--quick"]),
    "step-training": (
        150,
        [
            *("-m", "benchmarks.step_training", "--model", "qwen2.5-1.5b", "--dtype", "bfloat16", "--steps", "1,2,3,5"),
            *("--samples", "8", "--ways", "padded,packed,comb", "--token-budget", "8192", "--repeats", "2"),
        ],
    ),
}


def run_benchmark(name: str, arguments: list[str], out: Path, limit: float, device: str) -> dict[str, Any]:
    """Its output goes on to ours as it comes. exit_code -9 and timed_out: it was killed at its limit."""
    row: dict[str, Any] = {"name": name, "path": str(out), "limit_seconds": round(max(limit, 0.0), 1)}
    if limit < 5:
        return row | {
            "exit_code": None,
            "timed_out": True,
            "seconds": 0.0,
            "last_lines": ["not started: the time was up"],
        }
    print(f"\n{name}: at most {limit:.0f} s")
    started, late = time.monotonic(), threading.Event()
    command = [sys.executable, *arguments, "--device", device]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        cwd=ROOT,
        env=_variables(),
    )
    assert process.stdout is not None, "it is a pipe"
    timer = threading.Timer(limit, lambda: (late.set(), process.kill()))
    timer.start()
    last: deque[str] = deque(maxlen=30)
    for line in process.stdout:
        last.append(line.rstrip())
        print(line, end="", flush=True)
    code = process.wait()
    timer.cancel()
    seconds = round(time.monotonic() - started, 1)
    return row | {"exit_code": code, "timed_out": late.is_set(), "seconds": seconds, "last_lines": list(last)}


def counts(result: dict[str, Any]) -> dict[str, int]:
    rows = result["parity"]
    not_run = sum(bool(row["not_run"]) for row in rows)
    passed = sum(row["passed"] for row in rows)
    return {"cases": len(rows), "passed": passed, "failed": len(rows) - passed - not_run, "not_run": not_run}


def print_row(row: dict[str, Any]) -> None:
    """The worst of its errors as a share of what is allowed."""
    verdict = "ok" if row["passed"] else "not run" if row["not_run"] else "FAILED"
    shares = {n: e / row["tolerance"][n] for n, e in row["errors"].items() if e is not None and row["tolerance"][n]}
    worst = max(shares, key=lambda name: shares[name], default="")
    found = f"{row['errors'][worst]:.1e} of {row['tolerance'][worst]:.1e} {worst}" if worst else ""
    print(f"{verdict:<8}{row['dtype']:<9} {row['name']:<66} {row['seconds']:>6.1f} s  {found}", flush=True)


def print_summary(result: dict[str, Any]) -> None:
    rows, totals = result["parity"], result["counts"]
    print(
        f"\nparity: {totals['passed']} of {totals['cases']} passed, {totals['failed']} failed, {totals['not_run']} not run"
    )
    for row in rows:
        if row["not_run"]:
            print(f"  not run: {row['name']} {row['dtype']}: {row['not_run']}")
    for benchmark in result["benchmarks"]:
        bad = benchmark["exit_code"] != 0
        why = f" ({'out of time' if benchmark['timed_out'] else benchmark['last_lines'][-1:]})" if bad else ""
        print(
            f"{benchmark['name']}: exit code {benchmark['exit_code']}, {benchmark['seconds']} s, {benchmark['path']}{why}"
        )
    for row in rows:
        if not row["passed"] and not row["not_run"]:
            print(f"FAILED {row['name']} {row['dtype']}: {row['failure']}")


def _variables() -> dict[str, str]:
    """For subprocesses: this repository's modules, whatever PYTHONPATH says; compiled kernels on CUDA."""
    paths = [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "PYTHONUNBUFFERED": "1"}


def _environment() -> dict[str, Any]:
    try:
        return environment()
    except FileNotFoundError:  # no git
        return {
            "date": time.strftime("%Y-%m-%d"),
            "commit": "unknown: no git here",
            "versions": {"torch": torch.__version__},
        }


def _memory(device: str) -> float | None:
    return round(torch.cuda.get_device_properties(0).total_memory / 2**30, 1) if device == "cuda" else None


def _write(path: Path, result: dict[str, Any]) -> None:
    """Whole or not at all."""
    partial = path.with_name(path.name + ".tmp")
    partial.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    os.replace(partial, path)
