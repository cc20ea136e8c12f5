"""The check for GPU machines: what it covers, that it finds what is broken, and that nothing it meets stops it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import triton
import triton.language as tl
from support.paths import ROOT
from torch import Tensor

import swirl_kernels
from benchmarks import gpu_check
from benchmarks.gpu_check import decisions, parity
from benchmarks.gpu_check.parity import ALL, MANDATORY, logprob, loss, parity_cases, run_case
from benchmarks.gpu_check.parity.loss import SPECS
from benchmarks.gpu_check.parity.measure import DTYPES, TOLERANCES, Case, NotRun, Run
from swirl_kernels.linear_logprob import streams
from swirl_kernels.linear_logprob.chunks import ChunkTiles
from swirl_kernels.policy_loss import spec as policy_loss_spec
from swirl_kernels.segment_reduce import Operation
from swirl_kernels.tree_attention import kernels as tree_attention_kernels
from swirl_kernels.tree_attention import triton as tree_attention_triton
from swirl_kernels.tree_attention.aot import OPTIONS

OPERATIONS = ("linear_logprob", "policy_loss", "segment_reduce", "selective_logprob", "tree_attention")
interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is on only where there is no GPU")


@pytest.fixture(autouse=True)
def torch_paths(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SWIRL_KERNELS_BACKEND", raising=False)


@pytest.fixture
def triton_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SWIRL_KERNELS_BACKEND", "triton")
    monkeypatch.setattr(streams, "ROWS", 32)  # an interpreter's time goes by programs


def row_of(name: str, dtype: str = "float32") -> dict[str, Any]:
    return run_case(next(case for case in parity_cases() if case.name == name), dtype, "cpu")


def stand_in(measure: Callable[[Run], None]) -> dict[str, Any]:
    return run_case(Case("stand-in", "segment_reduce", ALL, measure), "float32", "cpu")


def test_the_table_covers_every_operation_and_every_word() -> None:
    cases = parity_cases()
    names = [case.name for case in cases]
    assert len(set(names)) == len(names)
    naive = {name.removeprefix("naive_") for name in swirl_kernels.__all__ if name.startswith("naive_")}
    assert naive == set(OPERATIONS) and {case.op for case in cases} == {*naive, "policy"}
    for field, words in (
        ("ratio", policy_loss_spec.Ratio),
        ("clip", policy_loss_spec.Clip),
        ("kl", policy_loss_spec.Kl),
        ("correction", policy_loss_spec.Correction),
        ("correction_level", policy_loss_spec.Level),
    ):
        assert {getattr(spec, field) for spec in SPECS} == set(get_args(words)), field
    levels = {(spec.correction, spec.correction_level) for spec in SPECS if spec.correction != "none"}
    assert len(levels) == 9, "every correction at every level"
    assert (
        sum(case.op == "policy_loss" and any(f" {spec.clip} " in case.name for spec in SPECS) for case in cases) == 14
    )
    for word in get_args(Operation):
        assert {f"segment_reduce: {word}", f"segment_reduce: {word} index"} <= set(names)
    for dim in (64, 128, 256):
        assert {f"tree_attention: D={dim} {option}".rstrip() for option in OPTIONS} <= set(names)
    flags = {frozenset(name.split(": ")[1].split()) for name in names if name.startswith("linear_logprob: ")}
    for number in range(8):
        words = [word for bit, word in enumerate(("bias", "softcap", "entropy")) if number >> bit & 1]
        assert frozenset(words or ["plain"]) in flags
    variants = [case for case in cases if case.measure.args[0] in (parity.variant, parity.policy_spec)]  # type: ignore[attr-defined]
    assert {case.op for case in variants if case.dtypes == ALL} >= {"tree_attention", "linear_logprob", "policy_loss"}


def test_every_mandatory_case_is_named() -> None:
    names = [case.name for case in parity_cases()]
    logprobs = ("linear_logprob", "selective_logprob")
    only = {phrase: ("linear_logprob",) for phrase in ("frozen weight", "frozen hidden")}
    only |= {phrase: logprobs for phrase in MANDATORY if phrase not in only}
    only["a branch at each of 128 offsets"] = ("tree_attention",)
    only["zero-length and one-token segments"] = ("tree_attention", "policy_loss", "segment_reduce")
    only |= {phrase: OPERATIONS for phrase in ("backward from a second thread", "bits over repeats")}
    only["infinity and NaN at masked positions"] = OPERATIONS
    assert only.keys() == set(MANDATORY) and len(MANDATORY) == 16
    for phrase, operations in only.items():
        for op in operations:
            assert any(name.startswith(f"{op}: ") and phrase in name for name in names), (op, phrase)


def test_all_fp32_cases_pass_on_a_cpu() -> None:
    rows = [run_case(case, "float32", "cpu") for case in parity_cases() if "float32" in case.dtypes]
    assert len(rows) > 90
    assert [row["not_run"] for row in rows if "liger" in row["name"]] == ["needs a GPU"]
    for row in (row for row in rows if "liger" not in row["name"]):
        assert row["passed"] and row["errors"].keys() == row["tolerance"].keys() != set(), row


@interpreted
@pytest.mark.usefixtures("triton_kernels")
@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("tree_attention: D=64 softcap window", "float16"),
        ("tree_attention: infinity and NaN at masked positions", "float16"),
        ("linear_logprob: bias softcap entropy", "float16"),
        ("linear_logprob: kept all softcap", "float32"),
        ("selective_logprob: entropy", "float32"),
        ("policy_loss: step dual k3 icepop step_mean", "float16"),
        ("segment_reduce: mean index", "float32"),
    ],
)
def test_interpreted_kernels_pass(name: str, dtype: str) -> None:
    row = row_of(name, dtype)
    assert row["passed"], row["failure"]
    assert row_of(name, "bfloat16")["not_run"] == "Triton's interpreter multiplies bfloat16 wrongly"


@interpreted
@pytest.mark.usefixtures("triton_kernels")
def test_a_dropped_vocabulary_column_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last one, in the forward alone: the gradient is that of a softmax that misses it."""
    whole = ChunkTiles._stats

    def dropped(self: ChunkTiles, z: Tensor, *rest: Any) -> None:
        whole(self, z[:, :-1], *rest)

    monkeypatch.setattr(ChunkTiles, "_stats", dropped)
    row = row_of("linear_logprob: plain")
    assert not row["passed"] and "logp" in row["failure"] and "dhidden" in row["failure"], row


@triton.jit
def _scores_without_slope(a, b, scale, softcap):  # type: ignore[no-untyped-def]
    s = tl.dot(a, tl.trans(b), input_precision="ieee") * (scale * tree_attention_kernels.LOG2E)
    if softcap is not None:
        t = tl.exp2(tl.abs(s) * (-2.0 / softcap))
        s = tl.where(s < 0, -1.0, 1.0) * (1.0 - t) / (1.0 + t) * (softcap * tree_attention_kernels.LOG2E)
    return s, 1.0


@interpreted
@pytest.mark.usefixtures("triton_kernels")
def test_a_forgotten_slope_of_the_softcap_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tree_attention_kernels, "_scores", _scores_without_slope)
    for dtype in ("float16", "float32"):
        row = row_of("tree_attention: D=64 softcap", dtype)
        assert not row["passed"] and "dq" in row["failure"] and "dk" in row["failure"], row
        assert "out" not in row["failure"] and "dv" not in row["failure"], "the forward is right"


@interpreted
@pytest.mark.usefixtures("triton_kernels")
def test_a_wrong_dk_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """As an overflow elsewhere had it: of branches at offsets 57 to 63 nothing came back. And by 2 % everywhere, in 16 bits."""
    whole = tree_attention_triton._run_backward

    def lost(*arguments: Any) -> tuple[Tensor, ...]:
        dq, dk, dv, delta = whole(*arguments)
        dk[:, 58:61] = 0
        return dq, dk, dv, delta

    monkeypatch.setattr(tree_attention_triton, "_run_backward", lost)
    row = row_of("tree_attention: a branch at each of 128 offsets", "float16")
    assert not row["passed"] and "dk row" in row["failure"] and "dq" not in row["failure"], row

    def scaled(*arguments: Any) -> tuple[Tensor, ...]:
        dq, dk, dv, delta = whole(*arguments)
        return dq, dk * 1.02, dv, delta

    monkeypatch.setattr(tree_attention_triton, "_run_backward", scaled)
    row = row_of("tree_attention: D=64", "float16")
    assert not row["passed"] and "dk norm" in row["failure"], row


def test_other_breakages_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each in the case that is there for it."""
    real = {op: getattr(swirl_kernels, op) for op in OPERATIONS}

    def leaking(logits: Tensor, targets: Tensor, **options: Any) -> Any:  # an ignored row counts
        return real["selective_logprob"](logits, targets.clamp(min=0), **options)

    monkeypatch.setattr(logprob, "selective_logprob", leaking)
    assert not row_of("selective_logprob: ignored rows hold poison")["passed"]

    def restless(*arguments: Any, **options: Any) -> Tensor:  # other bits every time
        return real["segment_reduce"](*arguments, **options) * (1 + 1e-6 * torch.rand(()))

    monkeypatch.setattr(loss, "segment_reduce", restless)
    assert not row_of("segment_reduce: bits over repeats")["passed"]
    assert row_of("segment_reduce: sum")["passed"], "1e-6 is rounding"

    def unread(x: Tensor, *arguments: Any) -> Tensor:  # memory that nobody wrote
        return real["segment_reduce"](x, *arguments) + torch.empty(())

    monkeypatch.setattr(loss, "segment_reduce", unread)
    row = row_of("segment_reduce: sum")
    assert not row["passed"] and None in row["errors"].values(), "NaN is no JSON"

    def uniform(*arguments: Any, **options: Any) -> Any:  # every row's gradient is that of the first
        logp, entropy = real["linear_logprob"](*arguments, **options)
        logp.register_hook(lambda g: g[2].expand_as(g))
        return logp, entropy

    monkeypatch.setattr(logprob, "linear_logprob", uniform)
    assert not row_of("linear_logprob: non-uniform upstream gradients")["passed"]


def test_an_exception_is_the_failure_of_its_case() -> None:
    def broken(run: Run) -> None:
        run.note("found before", 0.5, 1.0)
        raise RuntimeError("no kernel image is available")

    row = stand_in(broken)
    assert row["failure"] == "RuntimeError: no kernel image is available" and not row["passed"] and not row["restart"]
    assert row["errors"] == {"found before": 0.5} and row["seconds"] >= 0
    assert not stand_in(lambda run: None)["passed"], "a case that measures nothing"

    def unable(run: Run) -> None:
        raise NotRun("too small")

    row = stand_in(unable)
    assert row["not_run"] == "too small" and not row["passed"] and not row["failure"]


WORKER = """
import json, sys, time
for line in sys.stdin:
    name = line.split(" / ")[0]
    if name == "dies":
        sys.exit("Segmentation fault, as it were")
    if name == "hangs":
        time.sleep(600)
    row = {"name": name, "op": "x", "dtype": "float32", "errors": {}, "tolerance": {}, "passed": True, "seconds": 0.0}
    print(json.dumps(row | {"failure": "", "not_run": "", "restart": name == "spoils"}), flush=True)
    if name == "spoils":
        sys.exit(1)
"""


def test_processes_that_die_or_hang_lose_their_own_case(monkeypatch: pytest.MonkeyPatch) -> None:
    answer = gpu_check.Worker.answer

    def answer_in_time(worker: gpu_check.Worker, item: gpu_check.Item, limit: float) -> dict[str, Any]:
        return answer(worker, item, 1.0 if item[0] == "hangs" else limit)

    monkeypatch.setattr(gpu_check.Worker, "answer", answer_in_time)
    items = [(name, "x", "float32") for name in ("first", "dies", "second", "spoils", "third", "hangs", "fourth")]
    rows: list[dict[str, Any]] = []
    gpu_check.run_cases(items, [sys.executable, "-c", WORKER], 1, time.monotonic() + 600, rows.append)
    failures = {row["name"]: row["failure"] for row in rows if not row["passed"]}
    assert [row["name"] for row in rows] == [name for name, _, _ in items] and failures.keys() == {"dies", "hangs"}
    assert failures["dies"] == "the process died with exit code 1: Segmentation fault, as it were"
    assert failures["hangs"].startswith("no answer within 1 s, killed")
    rows.clear()
    gpu_check.run_cases(items, [sys.executable, "-c", WORKER], 3, time.monotonic() - 1, rows.append)
    assert len(rows) == 7 and all("the time for parity was up" in row["failure"] for row in rows)


def test_a_run_from_end_to_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With real workers, a benchmark that fails after half of its work, and one that succeeds."""
    half = "import json, sys; json.dump([1], open(sys.argv[2], 'w')); print('half'); sys.exit('no more')"
    parts = {"kernels": (600.0, ["-c", half]), "step-training": (600.0, ["-c", "print('whole')"])}
    monkeypatch.setattr(gpu_check, "BENCHMARKS", parts)
    arguments = [
        "--device",
        "cpu",
        "--only",
        "segment_reduce: mean",
        "--out",
        str(tmp_path / "results"),
        "--minutes",
        "60",
    ]
    assert gpu_check.main(arguments) == 1
    found = {path.name.split("-", 3)[3]: json.loads(path.read_text()) for path in (tmp_path / "results").iterdir()}
    assert found.keys() == {"gpu-check-cpu.json", "kernels-cpu.json"} and found["kernels-cpu.json"] == [1]
    result = found["gpu-check-cpu.json"]
    assert result["counts"] == {"cases": 6, "passed": 6, "failed": 0, "not_run": 0}
    fields = {"name", "op", "dtype", "errors", "tolerance", "passed", "seconds", "failure", "not_run"}
    assert all(row.keys() == fields for row in result["parity"])
    assert {row["dtype"] for row in result["parity"]} == set(DTYPES) == result["tolerances"].keys() == TOLERANCES.keys()
    assert result["environment"]["versions"]["torch"] and result["environment"]["device"] == "cpu"
    kernels, training = result["benchmarks"]
    assert kernels["exit_code"] == 1 and kernels["last_lines"] == ["half", "no more"] and not kernels["timed_out"]
    assert training["exit_code"] == 0 and training["last_lines"] == ["whole"]
    printed = capsys.readouterr().out
    assert "6 of 6 passed" in printed and "kernels: exit code 1" in printed and "no more" in printed

    assert gpu_check.main([*arguments, "--parts"]) == 0
    assert gpu_check.main(["--device", "cpu", "--only", "no such case", "--out", str(tmp_path)]) == 1


@pytest.mark.parametrize("part", ["products", "head", "attention", "step", "layer"])
def test_a_part_measures_and_decides(part: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "found.json"
    decisions.main([part, "--device", "cpu", "--out", str(out)])
    found = json.loads(out.read_text(encoding="utf-8"))
    assert found["part"] == part and found["decision"] in capsys.readouterr().out
    assert found["rows"] or part == "layer"  # which needs CUDA graphs
    if part == "head":
        assert max(row["error"] for row in found["rows"] if "kept" in row["way"]) < 0.1


def test_a_benchmark_is_killed_at_its_limit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    slow = ["-c", "import time; time.sleep(600)"]
    row = gpu_check.run_benchmark("slow", slow, tmp_path / "slow.json", 5.0, "cpu")
    assert row["timed_out"] and row["exit_code"] == -signal.SIGKILL
    row = gpu_check.run_benchmark("slow", slow, tmp_path / "slow.json", 1.0, "cpu")
    assert row["timed_out"] and row["exit_code"] is None and row["last_lines"] == ["not started: the time was up"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_cuda_it_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_check.main(["--out", str(tmp_path / "results")]) == 2
    assert "sees no CUDA device" in capsys.readouterr().err and not list(tmp_path.iterdir())


WITHOUT = """
import importlib, importlib.machinery, sys
MISSING = {"omegaconf", "streaming", "hypothesis", "matplotlib", "trl", "xxhash"}
class Installed(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, name, *rest):
        return None if name.split(".")[0] in MISSING else super().find_spec(name, *rest)
sys.meta_path[:] = [f for f in sys.meta_path if f is not importlib.machinery.PathFinder] + [Installed]
for module in sys.argv[1:]:
    importlib.import_module(module)
"""


def test_it_imports_and_runs_with_torch_triton_transformers_and_numpy_alone() -> None:
    """A case too: what it imports when it runs is not seen by importing its module."""
    run = """
from benchmarks.gpu_check.parity import parity_cases, run_case
row = run_case(next(case for case in parity_cases() if case.name == "policy: a comb of llama"), "float32", "cpu")
assert row["passed"], row
"""
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"}
    modules = [f"benchmarks.{name}" for name in ("gpu_check", "gpu_check.parity", "step_training", "kernels")]
    command = [sys.executable, "-c", WITHOUT + run, *modules]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr[-1500:]
