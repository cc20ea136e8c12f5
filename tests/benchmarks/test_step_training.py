"""The benchmark of a training step: its three ways are the same step, its counts are right, and it keeps what it measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from naive.rows import separate_rows

from benchmarks.step_training import growth_exponent, main
from benchmarks.step_training import measure as step_training_measure
from benchmarks.step_training.measure import PeakMemory, Settings, forward_backward
from benchmarks.step_training.ways import SHAPES, WAYS, Shape, build, make_case
from swirl_fast.comb.tree import pack
from swirl_fast.data.shards import StepSample, write_shards
from swirl_fast.formats.format import Action
from swirl_fast.trajectory import Finish, Step, Trajectory
from swirl_fast.verdict import Verdict

PROMPT, ACTION, RESULT = 200, 80, 32  # the math shape
SUMMARY = {
    "token_ratio",
    "comb_vs_padded",
    "comb_vs_packed",
    "exponent_comb",
    "exponent_padded",
    "max_relative_gradient_difference",
    "loss_difference",
}


def padded_tokens(lengths: list[int], budget: int, most: int) -> int:
    """Rows in order, `most` to a micro-batch or fewer, each as wide as the longest of them."""
    total, at = 0, 0
    while at < len(lengths):
        n = max(n for n in range(1, most + 1) if n * max(lengths[at : at + n]) <= budget)
        part = lengths[at : at + n]
        total += len(part) * max(part)
        at += n
    return total


def run(folder: Path, *arguments: str) -> dict[str, Any]:
    out = folder / "result.json"
    main(["--model", "tiny", "--shape", "math", "--device", "cpu", "--repeats", "1", "--out", str(out), *arguments])
    return json.loads(out.read_text(encoding="utf-8"))


@pytest.fixture(autouse=True)
def one_repeat(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_training_measure, "MOST_REPEATS", 1)


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Three rows to a padded micro-batch, so that rows of two states meet in one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step_training_measure, "MOST_REPEATS", 1)
        folder = tmp_path_factory.mktemp("benchmark")
        return run(folder, "--steps", "1,3,2", "--samples", "1,4", "--token-budget", "2000", "--rows", "3")


def test_every_cell_is_there_with_the_counted_tokens(result: dict[str, Any]) -> None:
    assert [(row["steps"], row["samples"], row["way"]) for row in result["results"]] == [
        (k, g, way) for k in (1, 2, 3) for g in (1, 4) for way in ("padded", "packed", "comb")
    ]
    for row in result["results"]:
        k, g = row["steps"], row["samples"]
        states = [PROMPT + i * (ACTION + RESULT) for i in range(k)]
        effective = g * sum(state + ACTION for state in states)
        computed = {
            "padded": padded_tokens([state + ACTION for state in states for _ in range(g)], 2000, 3),
            "packed": effective,
            "comb": states[-1] + k * g * (ACTION - 1),  # the last token of an action predicts nothing
        }
        assert row["tokens_effective"] == effective
        assert row["tokens_computed"] == computed[row["way"]]
        phases = [row[f"seconds_{phase}"] for phase in ("pack", "forward", "backward", "optimizer")]
        assert min(phases) > 0 and row["seconds"] == pytest.approx(sum(phases))
        assert row["seconds_of_each_repeat"] == [row["seconds"]]
        assert row["gradient_norm"] > 0


def test_the_ways_agree(result: dict[str, Any]) -> None:
    for row in result["results"]:
        assert row["loss_difference"] < 1e-5
        assert row["max_relative_gradient_difference"] < 1e-4
    ours = [row for row in result["results"] if row["way"] != "padded"]
    assert any(row["max_relative_gradient_difference"] > 0 for row in ours), "nothing was compared"


def test_summary_is_of_the_largest_cell(result: dict[str, Any]) -> None:
    summary = result["summary"]
    assert summary.keys() >= SUMMARY
    assert {"date", "commit", "cpu", "threads", "versions"} <= result["environment"].keys()
    assert result["settings"]["model"] == "tiny" and result["settings"]["lengths"] == vars(SHAPES["math"])
    padded, packed, comb = result["results"][-3:]
    assert (summary["steps"], summary["samples"]) == (3, 4)
    assert summary["token_ratio"] == comb["tokens_effective"] / comb["tokens_computed"]
    assert summary["comb_vs_padded"] == padded["seconds"] / comb["seconds"]
    assert summary["comb_vs_packed"] == packed["seconds"] / comb["seconds"]
    assert summary["pack_share"] == comb["seconds_pack"] / comb["seconds"]
    assert summary["exponent_fitted_to_steps"] == [2, 3]
    lengths = [PROMPT + i * (ACTION + RESULT) + ACTION for i in range(3) for _ in range(4)]
    two, three = padded_tokens(lengths[:8], 2000, 3), padded_tokens(lengths, 2000, 3)
    assert summary["token_exponent_padded"] == pytest.approx(np.log(three / two) / np.log(3 / 2))


@pytest.mark.parametrize("way", WAYS)
def test_each_way_equals_one_row_at_a_time(way: str) -> None:
    model, _ = build("tiny", None, "cpu")
    with torch.no_grad():
        for p in model.parameters():  # attention far from uniform
            if p.dim() > 1:
                p.normal_(std=0.3)
    case = make_case(Shape(prompt=9, action=5, result=7), 3, 4, 256)
    model.set_attn_implementation("naive")
    found = separate_rows(model, list(case.branches))
    loss = -sum(case.weight_A[index] * logp.sum() for index, logp in found.items())
    loss.backward()
    wanted = {name: p.grad.clone() for name, p in model.named_parameters()}
    step = forward_backward(model, way, case, Settings("cpu", None, token_budget=60, rows=3))
    assert step.micro_batches > 1
    assert step.loss == pytest.approx(float(loss.detach()), rel=1e-5)
    for name, p in model.named_parameters():
        assert (p.grad - wanted[name]).norm() <= 2e-5 * wanted[name].norm(), name


def test_actions_of_a_state_share_nothing() -> None:
    shape = SHAPES["search_qa"]
    case = make_case(shape, 5, 8, 49152)
    for state in case.branches[0].states:
        recorded = case.branches[0].tokens[state.length : state.length + 1].tolist()
        first = [int(action[0]) for action in state.actions] + recorded
        assert len(set(first)) == len(first)
    comb = pack([case.branches[0]])
    assert comb.effective_tokens == case.effective_tokens == 78_400
    assert comb.computed_tokens == 400 + 4 * 720 + 40 * 119


def test_math_shape_has_the_token_ratio_it_was_chosen_for() -> None:
    comb = pack([make_case(SHAPES["math"], 5, 8, 49152).branches[0]])
    assert comb.effective_tokens / comb.computed_tokens == pytest.approx(5.3, abs=0.05)


def test_autocast_is_compared_in_float32(tmp_path: Path) -> None:
    result = run(tmp_path, "--steps", "1,2", "--samples", "2", "--dtype", "bfloat16", "--ways", "comb,padded")
    assert (result["equality"]["steps"], result["equality"]["dtype"]) == (2, "float32")
    assert 0 < result["summary"]["max_relative_gradient_difference"] < 1e-4
    padded, comb = result["results"][-2:]
    assert comb["loss"] == pytest.approx(padded["loss"], rel=2e-2) and comb["loss"] != padded["loss"]
    assert result["summary"]["comb_vs_packed"] is None and result["summary"]["exponent_packed"] is None


def test_growth_exponent() -> None:
    steps = [2, 3, 5, 8]
    assert growth_exponent(steps, [0.7 * k**1.9 for k in steps]) == pytest.approx(1.9)
    assert growth_exponent([1, *steps], [100.0, *(0.7 * k**1.9 for k in steps)]) == pytest.approx(1.9), (
        "K = 1 is left out"
    )
    assert growth_exponent([1, 4], [3.0, 12.0]) == pytest.approx(1.0), "unless there is nothing else"
    assert growth_exponent([5], [1.0]) is None and growth_exponent([], []) is None


def test_peak_memory_sees_what_came_and_went() -> None:
    memory = PeakMemory("cpu")
    if memory.mib() is None:
        pytest.skip("this system does not let a process reset its high-water mark")
    block = torch.ones(64 * 2**20, dtype=torch.uint8)
    del block
    assert 60 < memory.mib() < 80
    assert PeakMemory("cpu").mib() < 16, "an earlier peak is forgotten"


def test_the_overlap_of_sampling_and_learning_by_hand() -> None:
    """Sampling takes 4 s, learning 3, handing over the weights 1; two batches on policy, then two that lag."""
    from benchmarks.overlap import measure

    sampled = {"seconds_data": 0.0, "seconds_rollout": 4.0, "seconds_judge": 0.0, "seconds_weight_sync": 1.0}
    rows = [
        {"seconds": 8.0, "seconds_wait_for_rollout": 0.0, "seconds_hidden": 0.0, "reward": 0.1},
        {"seconds": 9.0, "seconds_wait_for_rollout": 1.0, "seconds_hidden": 3.0, "reward": 0.2},
        {"seconds": 5.0, "seconds_wait_for_rollout": 1.0, "seconds_hidden": 3.0, "reward": 0.2},
        {"seconds": 4.0, "seconds_wait_for_rollout": 0.0, "seconds_hidden": 0.0, "reward": 0.3},
    ]
    found = measure([{**row, **sampled, "step": i, "engine_gap_mean": 0.0} for i, row in enumerate(rows)], 1, 1)
    assert found["hidden_share"] == pytest.approx(1.0) and found["hidden_share_of_run"] == pytest.approx(6 / 9)
    assert found["reward_of_policies"] == pytest.approx(0.2), "the batch that the second policy drew again is left out"


def test_recorded_trajectories_are_trained_on(tmp_path: Path) -> None:
    trajectories = [
        Trajectory(f"q{n}/0", f"q{n}", "t", "?", 0, 20, list(range(1, 200)), [
            Step(at, at + 9, "", Action("answer", argument="1"), [0.0] * 9, 0) for at in (20, 100, 180)
        ], Finish.ANSWER)
        for n in range(3)
    ]  # fmt: skip
    write_shards(tmp_path / "shards", [StepSample(one, [Verdict.GOOD] * 3) for one in trajectories], fingerprint={})
    options = [
        "--model",
        "tiny",
        "--shards",
        str(tmp_path / "shards"),
        "--trajectories",
        "2",
        "--samples",
        "2",
        "--token-budget",
        "170",
    ]
    main([*options, "--repeats", "1", "--out", str(tmp_path / "out.json")])
    found = json.loads((tmp_path / "out.json").read_text())
    assert {(row["steps"], row["tokens_effective"]) for row in found["results"]} == {(4, 2 * 2 * (29 + 109))}, (
        "189 tokens do not fit"
    )
    assert found["summary"]["max_relative_gradient_difference"] < 1e-4
