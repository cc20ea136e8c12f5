"""The benchmark of the kernels: its arithmetic, that a wrong rival is reported instead of timed, and that it keeps what it measured."""

from __future__ import annotations

import gc
import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import swirl_kernels
from benchmarks import kernels
from benchmarks.kernels import main, summarize
from benchmarks.kernels import rivals as kernel_rivals
from benchmarks.kernels import shapes as kernel_shapes
from benchmarks.kernels.rivals import BACKENDS, Absent, relative_error, run, same_bits, torch_linear_logprob
from benchmarks.kernels.shapes import OPS, POLICY_LOSS, comb, head, make_case, rows, segments
from benchmarks.step_training.ways import SHAPES as TRAJECTORIES
from benchmarks.step_training.ways import make_case as make_trajectory
from swirl_fast.comb.tree import pack

TINY = {
    "linear_logprob": (
        head("small", 600, 16, 90),
        head("large", 70, 16, 300),
        head("capped", 40, 16, 120, softcap=30.0),
    ),
    "selective_logprob": (rows("rows", 30, 90),),
    "policy_loss": (segments("tokens", 900, 20),),
    "segment_reduce": (segments("tokens", 900, 20),),
    "tree_attention": (comb("comb", Hq=4, Hkv=2, D=8, K=1, G=1),),
}
RAN = {
    "linear_logprob": {"torch", "swirl_kernels", "trl", "verl_style"},
    "selective_logprob": {"torch", "swirl_kernels", "trl"},
    "policy_loss": {"torch", "swirl_kernels"},
    "segment_reduce": {"torch", "swirl_kernels", "torch_index_add"},
    "tree_attention": {"sdpa_dense_mask", "swirl_kernels"},
}


def shrink(patch: pytest.MonkeyPatch) -> None:
    patch.setitem(kernel_shapes.SHAPES, "cpu quick", TINY)
    patch.setitem(kernel_shapes.MATMUL_SIDE, "cpu", 64)
    patch.setitem(kernel_shapes.COPY_MIB, "cpu", 1)
    patch.setattr(kernels, "MOST_ROUNDS", 3)


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    shrink(monkeypatch)


@pytest.fixture(scope="module", autouse=True)
def quick_collections() -> Iterator[None]:
    """Every measurement of memory collects garbage first, which takes long among the objects of all packages loaded by now."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def measured(folder: Path, *arguments: str) -> dict[str, Any]:
    out = folder / "result.json"
    main(["--quick", "--device", "cpu", "--out", str(out), *arguments])
    return json.loads(out.read_text())


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as patch:
        shrink(patch)
        return measured(tmp_path_factory.mktemp("kernels"))


def test_every_backend_is_measured_or_absent_with_its_reason(result: dict[str, Any]) -> None:
    pytest.importorskip("trl")
    for op in OPS:
        for shape in TINY[op]:
            found = [row for row in result["results"] if (row["op"], row["shape"]["name"]) == (op, shape.name)]
            for direction in ("forward", "forward_backward"):
                ran = {row["backend"] for row in found if row["direction"] == direction}
                assert ran == RAN[op] - ({"verl_style"} if shape.name == "capped" else set())
            absent = {one["backend"] for one in result["absent"] if (one["op"], one["shape"]) == (op, shape.name)}
            assert ran | absent == set(BACKENDS[op]) and not ran & absent
    reasons = {(one["backend"], one["shape"]): one["reason"] for one in result["absent"]}
    assert reasons["liger", "small"] == "its kernels need CUDA"
    assert "no backward on a CPU" in reasons["flex", "comb"]
    assert "soft-cap" in reasons["verl_style", "capped"]


def test_rates_follow_from_times_and_counts(result: dict[str, Any]) -> None:
    for row in result["results"]:
        assert "failure" not in row, row["failure"]
        assert row["ms"] == sorted(row["ms_of_each_repeat"])[1] and len(row["ms_of_each_repeat"]) == 3
        assert row["peak_bytes"] is None or row["peak_bytes"] >= 0
        assert row["max_relative_error"] < 1e-4 and row["dtype"] == "float32"
        seconds, size = row["ms"] / 1000, row["shape"]
        forward = row["direction"] == "forward"
        if row["op"] == "linear_logprob":
            flop = (2 if forward else 8) * size["N"] * size["H"] * size["V"]
        elif row["op"] == "tree_attention":
            assert size["T"] == 400 + 119 and size["pairs"] == 519 * 520 // 2, "one tooth is plain causal attention"
            flop = (4 if forward else 14) * size["pairs"] * size["Hq"] * size["D"]
        else:
            elements, times = {
                "selective_logprob": (size["N"] * size.get("V", 0), 1 if forward else 3),
                "policy_loss": (size["N"], 3 if forward else 4),
                "segment_reduce": (size["N"], 1 if forward else 2),
            }[row["op"]]
            assert row["gbytes_per_s"] == pytest.approx(4 * elements * times / seconds / 1e9)
            assert row["tflops"] is None
            continue
        assert row["tflops"] == pytest.approx(flop / seconds / 1e12) and row["gbytes_per_s"] is None
    assert any(0 < row["max_relative_error"] for row in result["results"]), "nothing was compared"


def test_summary_is_of_the_rows(result: dict[str, Any]) -> None:
    summary = result["summary"]

    def row(op: str, shape: str, backend: str) -> dict[str, Any]:
        return next(
            row
            for row in result["results"]
            if (row["op"], row["shape"]["name"], row["backend"], row["direction"])
            == (op, shape, backend, "forward_backward")
        )

    ours, plain = (row("linear_logprob", "large", backend) for backend in ("swirl_kernels", "torch"))
    assert summary["linear_logprob_vs_torch"]["shape"] == ours["shape"]
    assert summary["linear_logprob_vs_torch"]["time_ratio"] == plain["ms"] / ours["ms"]
    assert summary["linear_logprob_share_of_matmul"] == ours["tflops"] / summary["cublas_tflops"]
    for op, shape in (("policy_loss", "tokens"), ("selective_logprob", "rows")):
        rate = row(op, shape, "swirl_kernels")["gbytes_per_s"]
        assert summary[f"{op}_share_of_copy"] == rate / summary["copy_gbytes_per_s"]
    assert summary["deterministic"] is None, "asked on CUDA alone"


def made_row(
    V: int, backend: str, ms: float | None, peak: int | None = 100, direction: str = "forward_backward"
) -> dict[str, Any]:
    shape = {"name": str(V), "N": 1, "H": 1, "V": V}
    return {
        **{"op": "linear_logprob", "shape": shape, "backend": backend, "direction": direction},
        **{"ms": ms, "peak_bytes": peak, "tflops": None if ms is None else 1 / ms},
    }


def test_summary_takes_the_largest_vocabulary_that_both_can_do() -> None:
    found = [
        *(made_row(10, "torch", 6.0, 900), made_row(10, "swirl_kernels", 2.0, 300)),
        *(made_row(20, "torch", None), made_row(20, "swirl_kernels", 4.0)),  # plain torch ran out of memory
        made_row(30, "torch", 1.0, direction="forward"),
    ]
    summary = summarize(found, 2.0, 1.0, True)
    assert summary["linear_logprob_vs_torch"]["shape"]["V"] == 10
    assert (
        summary["linear_logprob_vs_torch"]["time_ratio"] == 3
        and summary["linear_logprob_vs_torch"]["memory_ratio"] == 3
    )
    assert summary["linear_logprob_share_of_matmul"] == 0.25 and summary["deterministic"] is True
    unknown = summarize([made_row(10, "torch", 6.0, None), made_row(10, "swirl_kernels", 2.0, 300)], 2.0, 1.0, None)
    assert unknown["linear_logprob_vs_torch"]["memory_ratio"] is None
    alone = summarize([made_row(10, "swirl_kernels", 2.0)], 2.0, 1.0, None)
    assert alone["linear_logprob_vs_torch"] is None and alone["linear_logprob_share_of_matmul"] == 0.25
    assert summarize([], 2.0, 1.0, None)["linear_logprob_share_of_matmul"] is None


def wrong_value(**inputs: Any) -> Tensor:
    return torch_linear_logprob(**inputs) + 0.003


def wrong_gradient(**inputs: Any) -> Tensor:
    value = torch_linear_logprob(**{**inputs, "hidden": inputs["hidden"].detach()})
    return value + 0 * inputs["hidden"].sum()


def no_memory(**inputs: Any) -> Tensor:
    raise torch.OutOfMemoryError("tried to allocate 20 GiB\nand a long table")


def not_finite(**inputs: Any) -> Tensor:
    return torch_linear_logprob(**inputs) * float("nan")


def only_first_shape(patch: pytest.MonkeyPatch, **rivals: Callable[..., Tensor]) -> None:
    patch.setitem(kernel_shapes.SHAPES, "cpu quick", {"linear_logprob": TINY["linear_logprob"][:1]})
    patch.setitem(BACKENDS, "linear_logprob", {name: (lambda case, call=call: call) for name, call in rivals.items()})


def test_a_wrong_rival_is_a_failure_and_not_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    only_first_shape(
        monkeypatch,
        torch=torch_linear_logprob,
        value=wrong_value,
        gradient=wrong_gradient,
        nan=not_finite,
        memory=no_memory,
        swirl_kernels=swirl_kernels.linear_logprob,
    )
    found = measured(tmp_path, "--only", "linear_logprob")
    both = {(row["backend"], row["direction"]): row for row in found["results"]}
    for direction in ("forward", "forward_backward"):
        for name in ("torch", "swirl_kernels"):
            assert both[name, direction]["ms"] > 0 and "failure" not in both[name, direction]
        for name, words in (
            ("value", "value differs from torch's"),
            ("nan", "differs"),
            ("memory", "OutOfMemoryError"),
        ):
            row = both[name, direction]
            assert words in row["failure"] and row["ms"] is None and row["ms_of_each_repeat"] == []
            assert "\n" not in row["failure"] and row["tflops"] is None
        assert both["nan", direction]["max_relative_error"] is None, "JSON knows no infinity"
    assert both["gradient", "forward"]["ms"] > 0, "its value is right"
    wrong = both["gradient", "forward_backward"]
    assert "gradient of hidden differs" in wrong["failure"] and wrong["max_relative_error"] == pytest.approx(1)


@pytest.mark.parametrize("broken", [no_memory, not_finite])
def test_the_next_is_the_reference_where_plain_torch_fails(
    broken: Callable[..., Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    only_first_shape(
        monkeypatch,
        torch=broken,
        swirl_kernels=swirl_kernels.linear_logprob,
        plain=torch_linear_logprob,
        value=wrong_value,
    )
    found = measured(tmp_path, "--only", "linear_logprob")
    for row in found["results"]:
        assert ("failure" in row) == (row["backend"] in ("torch", "value"))
        if row["backend"] == "value":
            assert "differs from swirl_kernels's" in row["failure"]
    assert found["summary"]["linear_logprob_vs_torch"] is None
    assert found["summary"]["linear_logprob_share_of_matmul"] > 0


def test_rivals_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[str] = []

    def recorded(name: str) -> Callable[..., Tensor]:
        def call(**inputs: Any) -> Tensor:
            called.append(name)
            return torch_linear_logprob(**inputs)

        return call

    case = make_case("linear_logprob", TINY["linear_logprob"][1], "cpu", torch.float32)
    kernels.measure(case, {"a": recorded("a"), "b": recorded("b")}, "forward", "cpu", repeats=3, seconds=0.0)
    assert "".join(called) == "ab" + "ab" * 3, "a pass for memory and comparison, then the rounds"


def test_a_package_that_does_not_load_is_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    def demanding(case: Any) -> Any:
        raise Absent("it wants a moon\nand a star")

    monkeypatch.setitem(BACKENDS["selective_logprob"], "moon", demanding)
    monkeypatch.setitem(sys.modules, "trl.trainer.utils", None)
    case = make_case("selective_logprob", TINY["selective_logprob"][0], "cpu", torch.float32)
    calls, absent = kernel_rivals.load(case)
    assert list(calls) == ["torch", "swirl_kernels"]
    named = {one["backend"]: one for one in absent}
    assert named["moon"] == {"op": "selective_logprob", "shape": "rows", "backend": "moon", "reason": "it wants a moon"}
    assert re.search("trl", named["trl"]["reason"])


def naive(op: str) -> Callable[..., Tensor]:
    return {
        "linear_logprob": swirl_kernels.naive_linear_logprob,
        "selective_logprob": swirl_kernels.naive_selective_logprob,
        "policy_loss": lambda **x: swirl_kernels.naive_policy_loss(spec=POLICY_LOSS, **x)[0],
        "segment_reduce": lambda **x: swirl_kernels.naive_segment_reduce(**x, op="sum"),
        "tree_attention": swirl_kernels.naive_tree_attention,
    }[op]


@pytest.mark.parametrize(("op", "place"), [(op, place) for op in OPS for place in range(len(TINY[op]))])
def test_every_backend_equals_the_naive_function(op: str, place: int) -> None:
    case = make_case(op, TINY[op][place], "cpu", torch.float32)
    wanted = run(naive(op), case, "forward_backward")
    for name, call in kernel_rivals.load(case)[0].items():
        found = run(call, case, "forward_backward")
        assert len(found) == len(wanted) == 1 + len(case.leaves)
        for a, b in zip(found, wanted, strict=True):
            assert relative_error(a, b) < 2e-5, name
    assert case.upstream.shape == wanted[0].shape and all(float(g.abs().max()) > 0 for g in wanted)


def test_inputs_are_the_same_on_every_call_and_like_a_language_models() -> None:
    one, two = (make_case("linear_logprob", head("x", 256, 64, 4096), "cpu", torch.float32) for _ in range(2))
    assert all(torch.equal(one.inputs[name], two.inputs[name]) for name in ("hidden", "weight", "targets"))
    logp = (one.inputs["hidden"] @ one.inputs["weight"].T).log_softmax(-1)
    entropy = -(logp.exp() * logp).sum(-1)
    assert 0.1 < float(entropy.mean()) < 5 and float(logp.min()) > -80, "no probability is subnormal"


def test_the_combs_layout_is_the_trainers() -> None:
    packed = pack([*make_trajectory(TRAJECTORIES["search_qa"], 3, 4, 49152).branches])
    case = make_case("tree_attention", comb("comb", Hq=1, Hkv=1, D=8, K=3, G=4), "cpu", torch.float32)
    assert case.inputs["subtree_end"].tolist() == packed.subtree_end_T.tolist()
    assert case.shape.sizes["pairs"] == packed.visible_pairs() and case.shape.sizes["T"] == packed.computed_tokens


def test_relative_error() -> None:
    wanted = torch.tensor([3.0, 4.0])
    assert relative_error(wanted, wanted) == 0
    assert relative_error(torch.tensor([3.0, 4.5]), wanted) == pytest.approx(0.1)
    assert relative_error(torch.tensor([3.0, float("nan")]), wanted) == float("inf")
    assert relative_error(torch.zeros(3), wanted) == float("inf")
    assert relative_error(torch.zeros(2), torch.zeros(2)) == 0


def test_same_bits() -> None:
    case = make_case("linear_logprob", TINY["linear_logprob"][1], "cpu", torch.float32)
    assert same_bits(torch_linear_logprob, case)
    noise = iter([1.0, 1.0, 1.0, 1.0 + 2**-20, 1.0])
    assert not same_bits(lambda **inputs: torch_linear_logprob(**inputs) * next(noise), case)


def test_interrupted_run_keeps_what_it_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = kernels.measure

    def interrupted(case: Any, calls: Any, direction: str, *rest: Any) -> list[dict[str, Any]]:
        if (case.shape.name, direction) == ("large", "forward_backward"):
            raise KeyboardInterrupt
        return whole(case, calls, direction, *rest)

    monkeypatch.setattr(kernels, "measure", interrupted)
    with pytest.raises(KeyboardInterrupt):
        measured(tmp_path, "--only", "linear_logprob")
    kept = json.loads((tmp_path / "result.json").read_text())
    assert {(row["shape"]["name"], row["direction"]) for row in kept["results"]} == {
        ("small", "forward"),
        ("small", "forward_backward"),
        ("large", "forward"),
    }
    assert kept["summary"]["linear_logprob_vs_torch"]["shape"]["name"] == "small"
    assert [path.name for path in tmp_path.iterdir()] == ["result.json"]


def test_half_precision_is_measured_where_it_is_asked_for(tmp_path: Path) -> None:
    found = measured(tmp_path, "--only", "policy_loss,selective_logprob", "--dtype", "bfloat16")
    assert [row["op"] for row in found["results"]][:1] == ["selective_logprob"], "in the order of the table"
    for row in found["results"]:
        assert row["dtype"] == ("float32" if row["op"] == "policy_loss" else "bfloat16")
        assert row["backend"] == "trl" or row["ms"] > 0, "TRL's rounds its log-probs to bfloat16 on a CPU"


def test_tables_name_every_operation() -> None:
    for device in ("cpu", "cuda", "cuda quick"):
        assert tuple(kernel_shapes.SHAPES[device]) == OPS and all(kernel_shapes.SHAPES[device].values())
    assert kernel_shapes.SHAPES["cpu quick"] is TINY
    assert tuple(BACKENDS) == OPS and all("swirl_kernels" in backends for backends in BACKENDS.values())
