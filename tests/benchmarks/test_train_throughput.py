"""The benchmark of the trainer: its two ways are the same step with and without sharing, and its counts are right."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support import forks
from support.runs import environment, free_port

from benchmarks.step_training.ways import SHAPES, Shape
from benchmarks.train_throughput import main, summarize
from benchmarks.train_throughput.setup import MODELS, llama, make_batch, make_trainer
from swirl_fast.comb.tree import pack
from swirl_fast.config import load
from swirl_fast.ranks import Ranks
from swirl_fast.training.batch import to_trunks

K, G = 3, 4
MATH = SHAPES["math"]
TINY = ["--shape", "tiny", "--trajectory", "math", "--states", str(K), "--samples", str(G), "--steps", "2"]


def tokens(way: str) -> int:
    """Computed of one trajectory: an action's last token predicts nothing."""
    states = [MATH.state(k + 1) for k in range(K)]
    if way == "comb":
        return states[-1] + K * G * (MATH.action - 1)
    return G * sum(state + MATH.action - 1 for state in states)


EFFECTIVE = G * sum(MATH.state(k + 1) + MATH.action for k in range(K))


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("throughput") / "result.json"
    main([*TINY, "--reference", "--peak-tflops", "0.5", "--token-budget", "1000", "--out", str(out)])
    return out, json.loads(out.read_text(encoding="utf-8"))


def test_both_ways_are_counted(found: tuple[Path, dict[str, Any]]) -> None:
    result = found[1]
    rows = {row["way"]: row for row in result["results"]}
    assert list(rows) == ["comb", "rows"]
    repeated = rows["comb"]["tokens_computed"] - tokens("comb")  # what two micro-batches share
    assert 0 < repeated < tokens("comb") and rows["rows"]["tokens_computed"] == tokens("rows")
    for row in rows.values():
        assert row["ranks"] == 1 and row["tokens_effective"] == EFFECTIVE
        assert row["parameters"] == 256 * 32 + 2 * (32 * 32 * 2 + 16 * 32 * 2 + 3 * 64 * 32 + 2 * 32) + 32
        assert len(row["seconds_of_each_step"]) == 2, "the warm-up does not count"
        phases = row["seconds_by_phase"]
        assert {"gather", "pack", "old_logprobs", "forward_backward", "optimizer"} <= phases.keys()
        assert not {"hidden", "rollout", "judge"} & phases.keys() and sum(phases.values()) <= 1.01 * row["seconds"]
        assert phases["old_logprobs"] > 0
        for kind in ("computed", "effective"):
            rate = row[f"tokens_{kind}_per_second"]
            seconds = [row[f"tokens_{kind}"] / one for one in row["seconds_of_each_step"]]
            assert min(seconds) <= rate <= max(seconds) and row[f"tokens_{kind}_per_second_per_rank"] == rate
        assert row["mfu"] == pytest.approx(row["tflops"] / 0.5, rel=1e-6) and 0 < row["mfu_step"] < row["mfu"]
        assert row["memory_gib"] is None or 0.1 < row["memory_gib"] < 32
        assert row["grad_norm"] > 0 and row["seconds_cpu"] > 0


def test_summary(found: tuple[Path, dict[str, Any]]) -> None:
    result = found[1]
    comb, rows = result["results"]
    summary = result["summary"]
    assert summary == summarize(result["results"]) and summary["way"] == "comb" and summary["ranks"] == 1
    assert summary["tokens_per_second_per_rank"] == comb["tokens_computed_per_second"]
    assert summary["effective_tokens_per_second_per_rank"] == comb["tokens_effective_per_second"]
    assert (summary["mfu"], summary["memory_gib"]) == (comb["mfu"], comb["memory_gib"])
    assert summary["comb_vs_rows"] == rows["seconds"] / comb["seconds"]
    assert summary["comb_vs_rows_cpu"] == rows["seconds_cpu"] / comb["seconds_cpu"]
    assert summary["token_ratio"] == rows["tokens_computed"] / comb["tokens_computed"] > 2
    assert {"date", "commit", "cpu", "threads", "versions"} <= result["environment"].keys()
    settings = result["settings"]
    assert settings["model"]["layers"] == 2 and settings["lengths"] == vars(MATH) and settings["peak_tflops"] == 0.5
    two = [{**row, "ranks": 2, "tokens_computed_per_second_per_rank": 7.0, "seconds": 1.0} for row in (comb, rows)]
    both = summarize([comb, rows, *two])
    assert both["ranks"] == 2 and both["comb_vs_rows"] == 1 and both["tflops_per_rank"] == comb["tflops"] / 2
    assert both["tokens_per_second_per_rank_by_ranks"] == {"1": comb["tokens_computed_per_second"], "2": 7.0}
    assert summarize([rows])["comb_vs_rows"] is None and summarize([rows])["way"] == "rows"


@pytest.fixture
def one_thread() -> Iterator[None]:
    """As every rank of torchrun has: results on other numbers of threads are not compared."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("one_thread")
def test_two_ranks_are_added_to_one(tmp_path: Path) -> None:
    """Each brings a trajectory of its own; --peak-tflops is left out, and a CPU has no peak that is known."""
    out = tmp_path / "result.json"
    arguments = [*TINY, "--steps", "1", "--append", "--out", str(out)]
    main(arguments)
    ranks = forks.ranks_of(2, environment(), free_port())
    done = forks.run_all(["-m", "benchmarks.train_throughput", *arguments], ranks, timeout=200)
    assert done.returncode == 0, done.stderr
    result = json.loads(out.read_text(encoding="utf-8"))
    assert [(row["ranks"], row["way"]) for row in result["results"]] == [
        *((1, "comb"), (1, "rows"), (2, "comb"), (2, "rows")),
    ]
    for row in result["results"]:
        assert row["tokens_computed"] == row["ranks"] * tokens(row["way"])
        assert row["tokens_effective"] == row["ranks"] * EFFECTIVE
        assert row["tokens_computed_per_second_per_rank"] == row["tokens_computed_per_second"] / row["ranks"]
        assert row["mfu"] is row["mfu_step"] is None
    assert list(result["summary"]["tokens_per_second_per_rank_by_ranks"]) == ["1", "2"]
    assert result["summary"]["ranks"] == 2 and result["summary"]["mfu"] is None
    with pytest.raises(ValueError, match=r"other settings \(samples\)"):
        main([*arguments, "--samples", "2"])
    assert json.loads(out.read_text(encoding="utf-8")) == result


def test_the_ways_differ_in_nothing_but_sharing() -> None:
    shape, ranks, vocab = Shape(9, 5, 7), Ranks(1, 2, torch.device("cpu")), 200
    comb, rows = (make_batch(shape, K, G, 2, vocab, ranks, 3, rows=rows) for rows in (False, True))
    assert len(comb.trajectories) == 2 and len(rows.trajectories) == 2 * K * G
    firsts = set()
    for one, other in zip(comb.sampled, rows.sampled, strict=True):
        assert one.completion == other.completion and one.state == other.state
        k = len(one.view.history)
        state, alone = comb.trajectories[one.trajectory].state(k), rows.trajectories[other.trajectory].state(0)
        assert np.array_equal(state[1:], alone[1:]) and len(state) == shape.state(k + 1)
        firsts.add(alone[0])
    assert len(firsts) == 2 * K * G
    assert comb.judgements == rows.judgements and len({j.verdict for j in comb.judgements[:G]}) == 2
    for batch, wanted in ((comb, 2 * (shape.state(K) + K * G * 4)), (rows, comb_effective(shape) - 2 * K * G)):
        keep = [True] * len(batch.sampled)
        packed = pack(to_trunks(batch.trajectories, batch.sampled, keep))
        assert packed.computed_tokens == wanted and packed.effective_tokens == comb_effective(shape)
    other_rank = make_batch(shape, K, G, 2, vocab, Ranks(0, 2, torch.device("cpu")), 3, rows=True)
    assert not firsts & {t.tokens[0] for t in other_rank.trajectories}
    again = make_batch(shape, K, G, 2, vocab, ranks, 4, rows=True)
    assert not np.array_equal(again.sampled[0].completion.tokens, rows.sampled[0].completion.tokens)


def comb_effective(shape: Shape) -> int:
    return 2 * G * sum(shape.state(k + 1) + shape.action for k in range(K))


def test_the_trainer_learns_the_same_from_both() -> None:
    """By a model to which all tokens that begin a row are the same one, for they are all that differs."""
    found, gradients = [], []
    ranks = Ranks(0, 1, torch.device("cpu"))
    for rows in (False, True):
        batch = make_batch(Shape(9, 5, 7), K, G, 2, 256, ranks, 0, rows=rows)
        config = load(None, ["algorithm.kl_coef=0", "training.max_engine_gap=0", "training.clip_grad_norm=1e9"])
        trainer, _ = make_trainer(config, ranks, llama(MODELS["tiny"], 64), [batch])
        with torch.no_grad():
            for parameter in trainer.policy.parameters():
                if parameter.dim() > 1:
                    parameter.mul_(10)  # attention far from uniform
            table = trainer.policy.model.get_input_embeddings().weight
            table[2 : 2 + 2 * K * G] = table[1]
        named = [(name, p) for name, p in trainer.policy.named_parameters() if p is not table]
        trainer.optimizer.step = lambda named=named: gradients.append({name: p.grad.clone() for name, p in named})
        found.append(trainer.train_step())
    for key in ("loss", "engine_gap_mean", "engine_gap_max", "states", "actions", "tokens_effective"):
        assert found[1][key] == pytest.approx(found[0][key], rel=1e-5, abs=1e-6), key
    assert found[1]["tokens_computed"] > 2 * found[0]["tokens_computed"]
    for name, gradient in gradients[0].items():
        assert (gradients[1][name] - gradient).norm() <= 1e-4 * gradient.norm() > 0, name
