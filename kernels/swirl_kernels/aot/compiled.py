"""Compiles one case for one target and reads its machine code."""

from __future__ import annotations

import contextlib
import io
import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from swirl_kernels.aot.case import AotCase
from swirl_kernels.aot.machine import MachineCode, accesses

# Bytes of shared memory that one program may have. A configuration for 8.0 also serves 8.6, 8.9 and 12.0, which have less.
SHARED_LIMIT = {80: 101_376, 90: 232_448, 100: 232_448}
# Bytes of a stack that only code around the loops touches, once a program.
OUTSIDE = 160
TENSOR_CORE = ("HMMA", "HGMMA", "UTCHMMA")  # Ampere; Hopper; Blackwell's tensor memory


@dataclass(frozen=True)
class Compiled:
    """One kernel on one target. Sizes in bytes; tensor, tf32, local count instructions, the last those where elements stream. failure: why
    there is no code.

    products, waits: HGMMA and WARPGROUP.DEPBAR; serial: what ptxas says of products that wait for each other ("C7515").
    loads, stores: how many of each width in bits where the elements stream; exchanges: SHFL, BAR and REDUX in loops that reach
    global memory. instructions: of the cheapest pass through the loop with the most code of its own, 0 without a loop; elements:
    what a thread handles in it, 0 where the case does not say.
    """

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
    products: int = 0
    waits: int = 0
    serial: tuple[str, ...] = ()
    loads: Counter[int] = field(default_factory=Counter)
    stores: Counter[int] = field(default_factory=Counter)
    exchanges: int = 0
    instructions: int = 0
    elements: int = 0
    failure: str = ""
    violations: tuple[str, ...] = ()
    remark: str = ""


def blocks(case: AotCase) -> str:
    """Its tile sizes, "M=128 N=64"."""
    sizes = {
        name.replace("BLOCK_", ""): size for name, size in case.constants.items() if "BLOCK" in name or name == "EDGE_M"
    }
    return " ".join(f"{name}={size}" for name, size in sizes.items())


def compile_case(case: AotCase, target: int) -> Compiled:
    """Compiles as the launcher would and reads the machine code with the cuobjdump that comes with triton."""
    result = Compiled(case.name, target, blocks(case), case.num_warps, case.num_stages)
    try:
        built, log = _build(case, target)
    except Exception as error:  # whatever the compiler raises is the finding
        lines = str(error).strip().splitlines() or [""]
        failure = f"{type(error).__name__}: {' … '.join(dict.fromkeys((lines[0], lines[-1])))}"[:200].replace("|", "/")
        return replace(result, failure=failure, violations=("does not compile",))
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.asm["cubin"])
        file.flush()
        usage, sass = _cuobjdump("-res-usage", file.name), _cuobjdump("-sass", file.name)
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found is not None, f"cuobjdump -res-usage of {case.name} printed: {usage}"
    code = MachineCode(sass)
    result = replace(
        result,
        registers=int(found[1]),
        stack=int(found[2]),
        shared=built.metadata.shared,
        tensor=sum(map(code.count, TENSOR_CORE)),
        # On 10.0 the machine code does not say what UTCHMMA multiplies, PTX does: tcgen05.mma….kind::tf32.
        tf32=sass.count("TF32") or built.asm["ptx"].count("tf32"),
        local=stack_accesses(code),
        products=code.count("HGMMA"),
        waits=code.count("WARPGROUP.DEPBAR"),
        serial=tuple(dict.fromkeys(re.findall(r"\((C751[0-5])\)", log))),
        **_streams(case, code),
    )
    spilled = "" if not result.stack else case.spill_reason if result.local else "no spill where elements stream"
    reasons = (spilled, case.serial_reason if _serialised(result) else "")
    return replace(result, violations=violations(case, result, code), remark="; ".join(filter(None, reasons)))


def violations(case: AotCase, result: Compiled, code: MachineCode) -> tuple[str, ...]:
    found = []
    if case.tensor_cores and not result.tensor:
        found.append("no tensor-core instruction")
    if result.tf32:
        found.append(f"{result.tf32} TF32 instructions")
    allowed = case.spill_bytes if result.local else max(case.spill_bytes, OUTSIDE)
    if result.stack > allowed or (result.local and not allowed):
        found.append(
            f"{result.stack} B of stack, {result.local} local loads and stores where elements stream ({allowed} B allowed)"
        )
    if case.spill_bytes and not case.spill_reason:
        found.append("spills are allowed without a reason")
    if result.shared > SHARED_LIMIT[result.target]:
        found.append(f"{result.shared} B of shared memory, {SHARED_LIMIT[result.target]} B are there")
    if _serialised(result) and not case.serial_reason:
        said = f", ptxas: {' '.join(result.serial)}" if result.serial else ""
        found.append(f"products wait for each other: {result.waits} waits, {result.products} HGMMA{said}")
    if case.not_specialised:
        found.append(f"the launcher hides that {', '.join(case.not_specialised)} is aligned")
    return (*found, *_stream_violations(case, result, code))


def stack_accesses(code: MachineCode) -> int:
    """Loads from and stores to a thread's stack in the loops through which elements stream, or in all of a kernel without any."""
    loops = [code.within(loop) for loop in code.streaming_loops] or [code.instructions]
    return len({i for loop in loops for i in loop if i.opcode.split(".")[0] in ("LDL", "STL")})


def _stream_violations(case: AotCase, result: Compiled, code: MachineCode) -> list[str]:
    stream, found = case.stream, []
    if stream is None:
        return []
    if stream.where == "loops" and not code.streaming_loops:
        return ["no loop reaches global memory"]
    if stream.bits:
        for name, widths in (("load", result.loads), ("store", result.stores)):
            if widths and max(widths) < stream.bits:
                found.append(f"the widest {name} has {max(widths)} bits, not {stream.bits}")
        narrow = {name: sum(n for bits, n in w.items() if bits < 32) for name, w in _both(result).items()}
        if sum(narrow.values()) > stream.narrow:
            found.append(
                f"{narrow['loads']} loads, {narrow['stores']} stores of 8 or 16 bits ({stream.narrow} allowed)"
            )
    if stream.apart and result.exchanges:
        found.append(f"{result.exchanges} SHFL, BAR or REDUX inside the loop")
    if stream.limit is not None and result.instructions > stream.limit * stream.elements:
        each = result.instructions / stream.elements
        found.append(f"{result.instructions} instructions a pass, {each:.1f} an element (limit {stream.limit:g})")
    return found


def _serialised(result: Compiled) -> bool:
    return bool(result.serial) or 0 < result.products <= result.waits


def _both(result: Compiled) -> dict[str, Counter[int]]:
    return {"loads": result.loads, "stores": result.stores}


def _streams(case: AotCase, code: MachineCode) -> dict[str, Any]:
    """The fields of Compiled that say how it streams."""
    whole = case.stream is None or case.stream.where == "kernel"
    inside = {i for loop in code.streaming_loops for i in code.within(loop)}
    loads, stores = accesses(code.instructions if whole else [i for i in code.instructions if i in inside])
    reaching = {i for loop in code.loops for i in code.within(loop) if any(x.access_bits for x in code.within(loop))}
    heaviest = max(code.loops, key=lambda x: sum(len(code.blocks[b]) for b in code.own_blocks(x)), default=None)
    return {
        "loads": loads,
        "stores": stores,
        "exchanges": sum(i.exchanges for i in reaching),
        "instructions": 0 if heaviest is None else code.shortest_pass(heaviest),
        "elements": 0 if case.stream is None else case.stream.elements,
    }


def _build(case: AotCase, target: int) -> tuple[Any, str]:
    """The compiled kernel and what ptxas said of it, for which it must run: triton's cache keeps no messages."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = list(case.signature)
    hidden = case.not_specialised
    source = ASTSource(
        fn=case.kernel,
        signature=dict(case.signature),
        constexprs={name: case.constants[name] for name, kind in case.signature.items() if kind == "constexpr"},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in case.aligned if name not in hidden},
    )
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages}
    log = io.StringIO()
    with triton.knobs.compilation.scope(), triton.knobs.nvidia.scope(), contextlib.redirect_stdout(log):
        triton.knobs.compilation.always_compile = True
        triton.knobs.nvidia.dump_ptxas_log = True
        built = triton.compile(source, target=GPUTarget("cuda", target, 32), options=options)
    return built, log.getvalue()


def _cuobjdump(option: str, path: str) -> str:
    import triton.backends.nvidia

    program = Path(triton.backends.nvidia.__file__).parent / "bin" / "cuobjdump"
    done = subprocess.run([str(program), option, path], capture_output=True, text=True, check=True)
    return done.stdout
