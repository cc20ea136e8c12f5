"""Compiles every kernel in every shipped configuration for GPUs that need not be there, and checks the machine code.

    python -m swirl_kernels.aot [--out kernels/aot.md] [--only WORDS ...] [--modules MODULE ...]

For each target it must hold that the kernel compiles; that a product of 16-bit matrices runs on tensor cores; that nothing is
rounded to TF32; that no register spills to local memory, beyond what the case itself allows with its reason; that shared
memory fits. Exit code 1 and a line each on violations. Registers and shared memory are what occupancy follows from; speed is
not measured here.
"""

from __future__ import annotations

import argparse
import importlib
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from swirl_kernels.aot.case import AotCase

MODULES = (  # each has aot_cases()
    "swirl_kernels.linear_logprob.aot",
    "swirl_kernels.policy_loss.aot",
    "swirl_kernels.segment_reduce.aot",
    "swirl_kernels.selective_logprob.aot",
    "swirl_kernels.tree_attention.aot",
)
# Bytes of shared memory that one program may have. A configuration for 8.0 also serves 8.6, 8.9 and 12.0, which have less.
SHARED_LIMIT = {80: 101_376, 90: 232_448, 100: 232_448}
# HMMA: Ampere; HGMMA: Hopper; UTCHMMA: Blackwell's tensor memory.
TENSOR_CORE = re.compile(r"\b(HMMA|HGMMA|UTCHMMA)\b")


@dataclass(frozen=True)
class Compiled:
    """One kernel on one target. Sizes in bytes; tensor, tf32 and local count instructions. failure: why there is no code."""

    name: str
    target: int
    blocks: str
    warps: int = 0
    stages: int = 0
    registers: int = 0
    stack: int = 0
    shared: int = 0
    tensor: int = 0
    tf32: int = 0
    local: int = 0
    failure: str = ""
    violations: tuple[str, ...] = ()
    remark: str = ""


def all_cases(modules: Sequence[str] = MODULES) -> list[AotCase]:
    """Raises RuntimeError under TRITON_INTERPRET=1, where kernels are Python and cannot be compiled."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise RuntimeError("TRITON_INTERPRET=1 turns kernels into Python functions; unset it to compile them")
    return [case for name in modules for case in importlib.import_module(name).aot_cases()]


def blocks(case: AotCase) -> str:
    """Its tile sizes, "M=128 N=64"."""
    sizes = {
        name.replace("BLOCK_", ""): size for name, size in case.constants.items() if "BLOCK" in name or name == "EDGE_M"
    }
    return " ".join(f"{name}={size}" for name, size in sizes.items())


def compile_case(case: AotCase, target: int) -> Compiled:
    """Compiles and reads the machine code with the cuobjdump that comes with triton."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = list(case.signature)
    source = ASTSource(
        fn=case.kernel,
        signature=dict(case.signature),
        constexprs={name: case.constants[name] for name, kind in case.signature.items() if kind == "constexpr"},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in case.aligned},
    )
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages}
    try:
        built = triton.compile(source, target=GPUTarget("cuda", target, 32), options=options)
    except Exception as error:  # whatever the compiler raises is the finding
        lines = str(error).strip().splitlines() or [""]
        failure = f"{type(error).__name__}: {' … '.join(dict.fromkeys((lines[0], lines[-1])))}"[:200].replace("|", "/")
        return Compiled(
            case.name,
            target,
            blocks(case),
            case.num_warps,
            case.num_stages,
            failure=failure,
            violations=("does not compile",),
        )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.asm["cubin"])
        file.flush()
        usage, code = _cuobjdump("-res-usage", file.name), _cuobjdump("-sass", file.name)
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found is not None, f"cuobjdump -res-usage of {case.name} printed: {usage}"
    result = Compiled(
        name=case.name,
        target=target,
        blocks=blocks(case),
        warps=case.num_warps,
        stages=case.num_stages,
        registers=int(found[1]),
        stack=int(found[2]),
        shared=built.metadata.shared,
        tensor=len(TENSOR_CORE.findall(code)),
        # On 10.0 the machine code does not say what UTCHMMA multiplies, PTX does: tcgen05.mma….kind::tf32.
        tf32=code.count("TF32") or built.asm["ptx"].count("tf32"),
        local=len(re.findall(r"\b(?:LDL|STL)\b", code)),
    )
    return Compiled(
        **{**vars(result), "violations": _violations(case, result), "remark": case.spill_reason if result.stack else ""}
    )


def _violations(case: AotCase, result: Compiled) -> tuple[str, ...]:
    found = []
    if case.tensor_cores and not result.tensor:
        found.append("no tensor-core instruction")
    if result.tf32:
        found.append(f"{result.tf32} TF32 instructions")
    if result.stack > case.spill_bytes or (result.local and not case.spill_bytes):
        found.append(f"{result.stack} B of stack, {result.local} local loads and stores ({case.spill_bytes} B allowed)")
    if case.spill_bytes and not case.spill_reason:
        found.append("spills are allowed without a reason")
    if result.shared > SHARED_LIMIT[result.target]:
        found.append(f"{result.shared} B of shared memory, {SHARED_LIMIT[result.target]} B are there")
    return tuple(found)


def _cuobjdump(option: str, path: str) -> str:
    import triton.backends.nvidia

    program = Path(triton.backends.nvidia.__file__).parent / "bin" / "cuobjdump"
    done = subprocess.run([str(program), option, path], capture_output=True, text=True, check=True)
    return done.stdout


def _compile_numbered(job: tuple[tuple[str, ...], int, int]) -> Compiled:
    modules, number, target = job
    return compile_case(all_cases(modules)[number], target)


def case_table(results: list[Compiled]) -> str:
    """Markdown, one row a kernel and target."""
    import triton

    lines = [
        f"Written by `python -m swirl_kernels.aot --out kernels/aot.md` with triton {triton.__version__}, without a GPU. One row a "
        "kernel, configuration and target. Stack: bytes of local memory a thread, which are registers that spill; shared: bytes a "
        "program; MMA, TF32: tensor-core and TF32 instructions.",
        "",
        "| kernel | target | blocks | warps | stages | registers | stack | shared | MMA | TF32 | verdict |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in results:
        verdict = "; ".join(filter(None, (*r.violations, r.failure))) or (f"ok ({r.remark})" if r.remark else "ok")
        lines.append(
            f"| {r.name} | sm_{r.target} | {r.blocks} | {r.warps} | {r.stages} | {r.registers} | {r.stack} | {r.shared} "
            f"| {r.tensor} | {r.tf32} | {verdict} |"
        )
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m swirl_kernels.aot", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="also write the table to this file")
    parser.add_argument(
        "--only", nargs="+", default=[""], metavar="WORDS", help="cases whose name contains one of these"
    )
    parser.add_argument(
        "--modules", nargs="+", default=MODULES, metavar="MODULE", help="whose aot_cases() are compiled"
    )
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args(arguments)
    modules, cases = tuple(options.modules), all_cases(options.modules)
    for words in options.only:
        if not any(words in case.name for case in cases):
            parser.error(f"--only {words!r} matches none of: {', '.join(case.name for case in cases)}")
    jobs = [
        (modules, i, target)
        for i, case in enumerate(cases)
        if any(words in case.name for words in options.only)
        for target in case.targets
    ]
    with ProcessPoolExecutor(options.processes) as pool:
        results = []
        for result in pool.map(_compile_numbered, jobs):
            results.append(result)
            if sys.stderr.isatty():
                print(f"\r{len(results)}/{len(jobs)} {result.name[:60]:60}", end="", file=sys.stderr)
    text = case_table(results)
    print(text)
    if options.out is not None:
        options.out.write_text(text, encoding="utf-8")
    bad = [r for r in results if r.violations]
    for r in bad:
        print(f"{r.name}, sm_{r.target}: {'; '.join(filter(None, (*r.violations, r.failure)))}", file=sys.stderr)
    return 1 if bad else 0
