"""Compiles every kernel in every shipped configuration for GPUs that need not be there, and checks the machine code.

    python -m swirl_kernels.aot [--out kernels/aot.md] [--only WORDS ...] [--modules MODULE ...] [--targets 80 90 100] [--also FOLDER ...]

For each target it must hold that the kernel compiles; that a product of 16-bit matrices runs on tensor cores, and on 9.0 without
waiting for each part of it; that nothing is rounded to TF32; that no register spills to local memory, beyond what the case
itself allows with its reason; that shared memory fits; that loads and stores are as wide, loops as short and lanes as
independent as the case says (Stream), and that the launcher hides nothing of the alignment that it counts on. Exit code 1 and
a line each on violations. What all this is in milliseconds is not measured here.

--also: the same with the triton that `pip install --no-deps --target FOLDER triton==3.6.0` put there; its rows follow those of the
installed one.
"""

from __future__ import annotations

import argparse
import importlib
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from swirl_kernels.aot.case import AotCase
from swirl_kernels.aot.compiled import Compiled, blocks, compile_case

__all__ = ["Compiled", "all_cases", "blocks", "case_table", "compile_case", "main"]

MODULES = (  # each has aot_cases()
    "swirl_kernels.linear_logprob.aot",
    "swirl_kernels.policy_loss.aot",
    "swirl_kernels.segment_reduce.aot",
    "swirl_kernels.selective_logprob.aot",
    "swirl_kernels.tree_attention.aot",
)
TARGETS = (80, 90, 100)
COLUMNS = (
    "kernel", "target", "blocks", "warps", "stages", "registers", "stack", "shared", "MMA", "TF32", "waits", "loads", "stores",
    "exchanges", "instructions", "verdict",
)  # fmt: skip


def all_cases(modules: Sequence[str] = MODULES) -> list[AotCase]:
    """Raises RuntimeError under TRITON_INTERPRET=1, where kernels are Python and cannot be compiled."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise RuntimeError("TRITON_INTERPRET=1 turns kernels into Python functions; unset it to compile them")
    return [case for name in modules for case in importlib.import_module(name).aot_cases()]


def _compile_numbered(job: tuple[tuple[str, ...], int, int]) -> Compiled:
    modules, number, target = job
    return compile_case(all_cases(modules)[number], target)


def case_table(results: list[Compiled]) -> str:
    """Markdown, one row a kernel and target."""
    import triton

    lines = [
        f"Written by `python -m swirl_kernels.aot --out kernels/aot.md` with triton {triton.__version__}, without a GPU. One row a "
        "kernel, configuration and target. Stack: bytes of local memory a thread, which are registers that spill; shared: bytes a "
        "program; MMA, TF32: tensor-core and TF32 instructions; waits: WARPGROUP.DEPBAR/HGMMA, and what ptxas says of products "
        "that wait for each other. Loads, stores: bits of a thread's global accesses x how many there are, in the loops through which "
        "elements stream or, where they do not stream in loops, in all of the kernel; exchanges: SHFL, BAR and REDUX in "
        "loops; instructions: of the cheapest pass through the loop with the most code of its own (and an element's share).",
        "",
        f"| {' | '.join(COLUMNS)} |",
        "|---" * len(COLUMNS) + "|",
    ]
    return "\n".join([*lines, *(f"| {' | '.join(_cells(result))} |" for result in results)]) + "\n"


def _cells(r: Compiled) -> list[str]:
    verdict = "; ".join(filter(None, (*r.violations, r.failure))) or (f"ok ({r.remark})" if r.remark else "ok")
    numbers = (r.warps, r.stages, r.registers, r.stack, r.shared, r.tensor, r.tf32)
    waits = " ".join([f"{r.waits}/{r.products}", *r.serial]) if r.products else ""
    each = f" ({r.instructions / r.elements:.1f})" if r.elements else ""
    pass_ = f"{r.instructions}{each}" if r.instructions else ""
    streams = (_widths(r.loads), _widths(r.stores), str(r.exchanges), pass_)
    return [r.name, f"sm_{r.target}", r.blocks, *map(str, numbers), waits, *streams, verdict]


def _widths(counted: Counter[int]) -> str:
    return ", ".join(f"{bits} x {number}" for bits, number in sorted(counted.items(), reverse=True))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m swirl_kernels.aot", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--out", type=Path, help="also write the table to this file; what stands above its first table stays"
    )
    parser.add_argument(
        "--only", nargs="+", default=[""], metavar="WORDS", help="cases whose name contains one of these"
    )
    parser.add_argument(
        "--modules", nargs="+", default=MODULES, metavar="MODULE", help="whose aot_cases() are compiled"
    )
    parser.add_argument("--targets", nargs="+", type=int, default=TARGETS, choices=TARGETS, help="compute capabilities")
    parser.add_argument(
        "--also",
        nargs="+",
        default=[],
        type=Path,
        metavar="FOLDER",
        help="where another triton lies, to be used after this one",
    )
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args(arguments)
    modules, cases = tuple(options.modules), all_cases(options.modules)
    for words in options.only:
        if not any(words in case.name for case in cases):
            parser.error(f"--only {words!r} matches none of: {', '.join(case.name for case in cases)}")
    for folder in options.also:
        if not (folder / "triton" / "__init__.py").is_file():
            parser.error(
                f"--also {folder}: no triton lies there; pip install --no-deps --target {folder} triton==3.6.0"
            )
    results = _compile(options, modules, cases)
    text = case_table(results)
    print(text)
    bad = [r for r in results if r.violations]
    for r in bad:
        print(f"{r.name}, sm_{r.target}: {'; '.join(filter(None, (*r.violations, r.failure)))}", file=sys.stderr)
    failed = bool(bad)
    for folder in options.also:
        more, wrong = _with_other_triton(folder, options)
        text, failed = f"{text}\n{more}", failed or wrong
    if options.out is not None:
        old = options.out.read_text(encoding="utf-8") if options.out.is_file() else ""
        options.out.write_text(old.partition("Written by ")[0] + text, encoding="utf-8")
    return 1 if failed else 0


def _compile(options: argparse.Namespace, modules: tuple[str, ...], cases: list[AotCase]) -> list[Compiled]:
    jobs = [
        (modules, i, target)
        for i, case in enumerate(cases)
        if any(words in case.name for words in options.only)
        for target in case.targets
        if target in options.targets
    ]
    results = []
    with ProcessPoolExecutor(options.processes) as pool:
        for result in pool.map(_compile_numbered, jobs):
            results.append(result)
            if sys.stderr.isatty():
                print(f"\r{len(results)}/{len(jobs)} {result.name[:60]:60}", end="", file=sys.stderr)
    return results


def _with_other_triton(folder: Path, options: argparse.Namespace) -> tuple[str, bool]:
    """The table of a process that finds the triton of this folder first, and whether anything is wrong in it."""
    paths = [str(folder.resolve()), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    with tempfile.TemporaryDirectory() as place:
        table = Path(place) / "table.md"
        command = [sys.executable, "-m", "swirl_kernels.aot", "--out", str(table), "--only", *options.only]
        command += ["--modules", *options.modules, "--targets", *map(str, options.targets)]
        done = subprocess.run([*command, "--processes", str(options.processes)], env=environment)
        if not table.is_file():
            return f"The run with the triton of {folder} ended with code {done.returncode}.\n", True
        return table.read_text(encoding="utf-8"), done.returncode != 0
