"""The gate that compiles kernels ahead of time: what it accepts, what it must find, and that its table is fresh.

tests/conftest.py sets TRITON_INTERPRET=1, under which nothing can be compiled: everything here runs in processes without it, which
import this file for the bad kernels below (`--modules test_aot`). Compiling all cases takes minutes: a subset is compiled here.
"""

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

from swirl_kernels.aot.case import AotCase, Stream  # noqa: E402
from swirl_kernels.aot.compiled import Compiled, stack_accesses, violations  # noqa: E402
from swirl_kernels.aot.machine import MachineCode, accesses  # noqa: E402

HERE = Path(__file__).parent
TABLE = HERE.parents[1] / "kernels" / "aot.md"
SUBSET = (
    "linear_logprob forward bf16 entropy",
    "linear_logprob statistics keeping bf16 bias",
    "policy_loss bf16 token ppo k3",
    "tree_attention forward D=128 bfloat16",
    "tree_attention backward_kv D=128 bfloat16",
)


@triton.jit
def _product(a, b, out, SIZE: tl.constexpr, PRECISION: tl.constexpr):
    """Without a precision it is written so that no tensor core can do it."""
    at = tl.arange(0, SIZE)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    x, y = tl.load(a + at), tl.load(b + at)
    if PRECISION is None:
        z = tl.sum((x[:, :, None] * y[None, :, :]).to(tl.float32), 1)
    else:
        z = tl.dot(x, y, input_precision=PRECISION)
    tl.store(out + at, z)


@triton.jit
def _spilling(x, out):
    """A warp holds 128 x 128 numbers, 512 a thread, from before their sum to after it."""
    at = tl.arange(0, 128)[:, None] * 128 + tl.arange(0, 128)[None, :]
    tile = tl.load(x + at)
    tl.store(out + at, tile / tl.sum(tl.sum(tile, 1), 0))


@triton.jit(do_not_specialize=["blocks", "hidden"])
def _streaming(x, out, blocks, hidden, APART: tl.constexpr, MASKED: tl.constexpr):
    """2,048 numbers a pass of four warps, 16 a thread; its threads meet in every pass, or once."""
    place = tl.arange(0, 256)[:, None] * 8 + tl.arange(0, 8)[None, :]
    total = tl.zeros((256,), dtype=tl.float32)
    for block in range(blocks):
        at = block * 2048 + place
        numbers = tl.load(x + at, mask=at < hidden, other=0.0) if MASKED else tl.load(x + at)
        rows = tl.sum(numbers.to(tl.float32), axis=1)
        total += rows if APART else tl.sum(rows, axis=0)
    tl.store(out + tl.arange(0, 256), total)


@triton.jit
def _cannot_stream(x):
    tl.store(x, 1.0)


@triton.jit
def _cannot_compile(x):
    tl.static_assert(False, "this kernel is wrong")


def aot_cases() -> list[AotCase]:
    def product(name: str, dtype: str, size: int, precision: str | None) -> AotCase:
        signature = dict.fromkeys(("a", "b"), dtype) | {"out": "*fp32", "SIZE": "constexpr", "PRECISION": "constexpr"}
        constants = {"SIZE": size, "PRECISION": precision}
        return AotCase(
            name, _product, signature, constants, 4, 3, tensor_cores=dtype == "*bf16", aligned=("a", "b", "out")
        )

    def spilling(name: str, allowed: int, reason: str) -> AotCase:
        signature = {"x": "*fp32", "out": "*fp32"}
        return AotCase(
            name, _spilling, signature, {}, 1, 1, aligned=("x", "out"), spill_bytes=allowed, spill_reason=reason
        )

    def streaming(name: str, stream: Stream, aligned: tuple[str, ...] = ("x", "out"), **flags: bool) -> AotCase:
        constants = {"APART": True, "MASKED": False} | flags
        signature = {
            "x": "*bf16",
            "out": "*fp32",
            "blocks": "i32",
            "hidden": "i32",
            **dict.fromkeys(constants, "constexpr"),
        }
        return AotCase(name, _streaming, signature, constants, 4, 1, aligned=aligned, stream=stream)

    wide = Stream(bits=128, apart=True, elements=16, limit=8)
    return [
        streaming("good stream", wide),
        streaming("bad width", Stream(bits=128), MASKED=True),
        streaming("bad exchange", wide, APART=False),
        streaming("bad length", Stream(elements=16, limit=1)),
        streaming("bad alignment", wide, aligned=("x", "out", "hidden")),
        AotCase("bad loop", _cannot_stream, {"x": "*fp32"}, {}, 4, 3, stream=wide),
        product("good bf16", "*bf16", 64, "ieee"),
        product("good fp32", "*fp32", 16, "ieee"),
        spilling("good spill", 100_000, "written down"),
        product("bad tf32", "*fp32", 64, "tf32"),
        product("bad product", "*bf16", 16, None),
        spilling("bad spill", 0, ""),
        spilling("bad allowance", 8, "too small"),
        spilling("bad reason", 100_000, ""),
        AotCase("bad code", _cannot_compile, {"x": "*fp32"}, {}, 4, 3),
    ]


def compiling(arguments: list[str], cache: Path) -> subprocess.CompletedProcess[str]:
    """Python with these arguments, able to compile, from an empty cache."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": os.pathsep.join([str(HERE), *sys.path]), "TRITON_CACHE_DIR": str(cache)}
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=environment, timeout=600)


def gate(arguments: list[str], cache: Path) -> subprocess.CompletedProcess[str]:
    return compiling(["-m", "swirl_kernels.aot", *arguments], cache)


def rows(table: str) -> dict[tuple[str, str], dict[str, str]]:
    """By kernel and target."""
    lines = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines() if line.startswith("|")
    ]
    found = [dict(zip(lines[0], cells, strict=True)) for cells in lines[2:]]
    by_key = {(row["kernel"], row["target"]): row for row in found}
    assert len(by_key) == len(found), "two rows have one kernel and target"
    return by_key


def test_a_subset_compiles_for_every_target(tmp_path) -> None:
    done = gate(["--only", *SUBSET, "--out", str(tmp_path / "table.md")], tmp_path / "cache")
    assert done.returncode == 0, done.stderr
    found = rows((tmp_path / "table.md").read_text())
    assert (tmp_path / "table.md").read_text() in done.stdout
    for words in SUBSET:
        assert {target for name, target in found if words in name} == {"sm_80", "sm_90", "sm_100"}, words
    for key, row in found.items():
        assert row["verdict"].startswith("ok"), key
        assert int(row["registers"]) > 0
        assert int(row["TF32"]) == 0
        if not row["kernel"].startswith(("policy_loss", "linear_logprob statistics")):
            assert int(row["MMA"]) > 0, key


@pytest.fixture(scope="module")
def bad(tmp_path_factory) -> tuple[subprocess.CompletedProcess[str], dict[tuple[str, str], dict[str, str]]]:
    folder = tmp_path_factory.mktemp("aot")
    done = gate(["--modules", "test_aot", "--out", str(folder / "table.md")], folder / "cache")
    return done, rows((folder / "table.md").read_text())


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100"])
def test_violations_are_found(bad, target) -> None:
    verdicts = {name: row["verdict"] for (name, at), row in bad[1].items() if at == target}
    assert verdicts["good bf16"] == verdicts["good fp32"] == "ok"
    assert verdicts["good spill"] == "ok (written down)"
    assert re.fullmatch(r"[1-9]\d* TF32 instructions", verdicts["bad tf32"])
    assert verdicts["bad product"] == "no tensor-core instruction"
    assert re.fullmatch(
        r"\d{3,} B of stack, \d{3,} local loads and stores where elements stream \(0 B allowed\)", verdicts["bad spill"]
    )
    assert re.fullmatch(
        r"\d{3,} B of stack, \d{3,} local loads and stores where elements stream \(8 B allowed\)",
        verdicts["bad allowance"],
    )
    assert verdicts["bad reason"] == "spills are allowed without a reason"
    assert re.fullmatch(r"does not compile; \w+: at .+ this kernel is wrong", verdicts["bad code"])
    assert verdicts["good stream"] == "ok"
    assert re.search(
        r"the widest load has 16 bits, not 128; 16 loads, 0 stores of 8 or 16 bits \(0 allowed\)", verdicts["bad width"]
    )
    assert re.match(r"\d+ SHFL, BAR or REDUX inside the loop", verdicts["bad exchange"])
    assert re.fullmatch(r"\d+ instructions a pass, \d+\.\d an element \(limit 1\)", verdicts["bad length"])
    assert verdicts["bad alignment"] == "the launcher hides that hidden is aligned"
    assert verdicts["bad loop"] == "no loop reaches global memory"


def test_a_violation_exits_with_1_and_a_line_each(bad) -> None:
    done, table = bad
    assert done.returncode == 1
    reported = {tuple(line.split(":")[0].split(", ")) for line in done.stderr.splitlines() if line.startswith("bad ")}
    assert reported == {key for key in table if key[0].startswith("bad ")}
    assert not any(line.startswith("good ") for line in done.stderr.splitlines())


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--only", "tree_attention forward", "no such kernel"], "--only 'no such kernel' matches none of: linear_logprob forward bf16, "),
        (["--also", "/no/triton"], "--also /no/triton: no triton lies there; pip install --no-deps --target /no/triton"),
    ],
)  # fmt: skip
def test_words_and_folders_that_are_not_there_are_refused(tmp_path, arguments, message) -> None:
    done = gate(arguments, tmp_path)
    assert done.returncode == 2 and message in done.stderr


@pytest.mark.parametrize("waits, serial, reason, found", [
    (2, (), "", ""),
    (8, (), "", "products wait for each other: 8 waits, 8 HGMMA"),
    (2, ("C7515",), "", "products wait for each other: 2 waits, 8 HGMMA, ptxas: C7515"),
    (8, ("C7515",), "written down", ""),
])  # fmt: skip
def test_products_that_wait_for_each_other(waits, serial, reason, found) -> None:
    case = AotCase("product", _product, {}, {}, 4, 3, tensor_cores=True, serial_reason=reason)
    result = Compiled("product", 90, "", tensor=8, products=8, waits=waits, serial=serial)
    with_name = type("Kernel", (), {"params": ()})  # interpreted kernels have none
    assert "; ".join(violations(dataclasses.replace(case, kernel=with_name), result, MachineCode(""))) == found


@pytest.mark.parametrize("at, stack, found", [
    ("before", 144, ""),
    ("before", 168, "168 B of stack, 0 local loads and stores where elements stream (160 B allowed)"),
    ("inside", 8, "8 B of stack, 1 local loads and stores where elements stream (0 B allowed)"),
    ("no loop", 8, "8 B of stack, 1 local loads and stores where elements stream (0 B allowed)"),
])  # fmt: skip
def test_a_stack_that_only_code_around_the_loops_uses_is_allowed(at, stack, found) -> None:
    lines = ["STL [R1], R9 ;", "LDG.E.128 R8, desc[UR4][R6.64] ;", "@P1 BRA 0x10 ;", "EXIT ;"]
    if at == "inside":
        lines[:2] = ["MOV R4, RZ ;", "STL [R1], R9 ;", lines[1]]
    if at == "no loop":
        lines.pop(2)
    code = MachineCode("".join(f"        /*{16 * i:04x}*/ {line}\n" for i, line in enumerate(lines)))
    case = AotCase("spill", type("Kernel", (), {"params": ()}), {}, {}, 4, 3)
    result = Compiled("spill", 90, "", stack=stack, local=stack_accesses(code))
    assert "; ".join(violations(case, result, code)) == found


def test_loops_and_widths_of_machine_code() -> None:
    """A loop whose rare case is left out, with another one inside; a branch far below that comes back is no loop."""
    lines = """
        /*0000*/ LDG.E.U16 R2, desc[UR4][R2.64] ;
        /*0010*/ MOV R4, RZ ;
        /*0020*/ @!P0 BRA 0x50 ;
        /*0030*/ FADD R1, R1, R2 ;
        /*0040*/ FADD R1, R1, R2 ;
        /*0050*/ LDG.E.128.CONSTANT R8, desc[UR4][R6.64+0x10] ;
        /*0060*/ SHFL.BFLY PT, R2, R3, 0x10, 0x1f ;
        /*0070*/ @P1 BRA 0x50 ;
        /*0080*/ STG.E.64 desc[UR4][R6.64], R8 ;
        /*0090*/ BRA P2, 0x10 ;
        /*00a0*/ @P3 BRA 0xd0 ;
        /*00b0*/ EXIT ;
        /*00c0*/ BRA 0xc0;
        /*00d0*/ FADD R1, R1, R2 ;
        /*00e0*/ BRA 0xb0 ;
    """
    code = MachineCode(lines)
    outer, inner = code.loops
    assert (outer.head, inner.head) == (0x10, 0x50) and code.streaming_loops == [inner]
    assert len(code.within(outer)) == 9 and code.shortest_pass(outer) == 4 and code.shortest_pass(inner) == 3
    loads, stores = accesses(code.instructions)
    assert loads == {16: 1, 128: 1} and stores == {64: 1}
    assert [i.address for i in code.instructions if i.exchanges] == [0x60] and code.count("LDG") == 2


def test_an_interpreted_kernel_cannot_be_compiled(monkeypatch) -> None:
    from swirl_kernels.aot import all_cases

    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(RuntimeError, match="unset it to compile"):
        all_cases()


def test_the_committed_table_is_fresh_and_clean(tmp_path) -> None:
    """With every triton it was written with: a row for every case and target, with today's tiles, warps and stages. (It cannot see an
    edited kernel: write it again.)"""
    program = (
        "import json; from swirl_kernels.aot import all_cases, blocks; print(json.dumps("
        "[(c.name, f'sm_{t}', blocks(c), str(c.num_warps), str(c.num_stages)) for c in all_cases() for t in c.targets]))"
    )
    done = compiling(["-c", program], tmp_path)
    assert done.returncode == 0, done.stderr
    expected = {tuple(case) for case in json.loads(done.stdout)}
    sections = re.split(r"(?m)^(?=Written by )", TABLE.read_text(encoding="utf-8"))[1:]
    assert sections
    for section in sections:
        table = rows(section)
        assert {
            tuple(r[x] for x in ("kernel", "target", "blocks", "warps", "stages")) for r in table.values()
        } == expected, "write it again: python -m swirl_kernels.aot --out kernels/aot.md"
        assert not [key for key, row in table.items() if not re.fullmatch(r"ok( \(.+\))?", row["verdict"])]
