"""The benchmark of rollouts: its three ways ask for the same rows, its counts add up, and it refuses ways that disagree."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.rollouts import WAYS, calls_of, compare, main, options_of, rows_of
from benchmarks.rollouts.workload import make_task
from swirl_fast.engines.engine import Completion
from swirl_fast.engines.local.engine import LocalEngine

K, G, NEW, TRAJECTORIES = 3, 4, 5, 2
SMALL = f"--trajectories {TRAJECTORIES} --states {K} --samples {G} --new-tokens {NEW} --action 12 --result 40 --max-sequences 5"


@pytest.fixture(scope="module")
def model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with room for long prompts."""
    folder = tmp_path_factory.mktemp("rollouts") / "model"
    shutil.copytree(tiny_model, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 4096}))
    return folder


def run(folder: Path, model: Path, *arguments: str) -> dict[str, Any]:
    out = folder / "result.json"
    chosen = ["--quick", "--model", str(model), "--layers", "2", "--device", "cpu", *SMALL.split(), *arguments]
    main([*chosen, "--out", str(out)])
    return json.loads(out.read_text())


@pytest.fixture(scope="module")
def result(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run(tmp_path_factory.mktemp("result"), model, "--repeats", "2")


def test_counts_add_up(result: dict[str, Any]) -> None:
    lengths = result["settings"]["tokens_of_each_state"]
    assert len(lengths) == TRAJECTORIES
    for trajectory in lengths:
        assert len(trajectory) == K
        for shorter, longer in itertools.pairwise(trajectory):
            assert 30 < longer - shorter < 12 + 40 + 30, "an action, a result and the marks of their turns"
    ways = result["results"]["local"]
    assert list(ways) == list(WAYS)
    possible = result["settings"]["possible_cached_tokens"]
    for row in ways.values():
        assert row["prompt_tokens"] == G * sum(map(sum, lengths))
        assert row["cached_prompt_tokens"] + row["computed_prompt_tokens"] == row["prompt_tokens"]
        assert row["cached_share"] == row["cached_prompt_tokens"] / row["prompt_tokens"]
        assert row["hit_rate_of_possible"] == row["cached_prompt_tokens"] / possible
        assert row["generated_tokens"] == TRAJECTORIES * K * G * NEW
        assert len(row["seconds_of_each_repeat"]) == 2
        assert min(row["seconds_of_each_repeat"]) <= row["seconds"] <= max(row["seconds_of_each_repeat"])
        assert row["generated_tokens_per_second"] == pytest.approx(row["generated_tokens"] / row["seconds"])
        assert 0 < row["seconds_prefill"] < row["seconds"] and 0 < row["seconds_decode"] < row["seconds"]
    # The last state of a trajectory holds all others. Trajectories share some of their prompt, never all of it.
    longest = [trajectory[-1] - 1 for trajectory in lengths]
    distinct = TRAJECTORIES * K * G * -1 + G * sum(map(sum, lengths)) - possible
    assert sum(longest) - min(trajectory[0] for trajectory in lengths) < distinct < sum(longest)


def test_the_ways_differ_in_what_they_compute_and_agree_in_what_they_say(result: dict[str, Any]) -> None:
    cached, naive, uncached = (result["results"]["local"][way] for way in WAYS)
    for row in (cached, naive):  # all fits into the cache; rows that wait find a few sampled tokens too
        assert 1 <= row["hit_rate_of_possible"] < 1.01
    assert uncached["computed_prompt_tokens"] == uncached["prompt_tokens"]
    assert (cached["calls"], cached["requests"]) == (1, TRAJECTORIES * K)
    assert (naive["calls"], naive["requests"]) == (-(-TRAJECTORIES * K * G // 5), TRAJECTORIES * K * G)
    assert (uncached["calls"], uncached["requests"]) == (1, TRAJECTORIES * K * G)
    assert 0 < result["largest_logprob_difference"] < 1e-3
    # per repeat: the first sample of every state in all three ways, every sample in two of them
    rows, firsts = TRAJECTORIES * K * G, TRAJECTORIES * K
    assert result["compared_tokens"] >= 2 * NEW * (rows + 2 * firsts) * 0.9


def test_every_way_has_every_row_once_and_the_first_of_a_state_has_one_seed() -> None:
    options = options_of(["--samples", "3", "--new-tokens", "4", "--out", "x.json"])
    states = [[1, 2], [1, 2, 3], [1, 2, 3, 4]]
    first = {}
    for way in WAYS:
        rows = rows_of(way, len(states), options)
        assert sorted(rows) == list(itertools.product(range(3), range(3)))
        calls = calls_of(way, states, options, burst=2)
        requests = [request for call in calls for request in call]
        assert [r.tokens for r in requests for _ in range(r.n)] == [states[s] for s, _ in rows]
        assert {(r.sampling.max_new_tokens, r.stop_ids) for r in requests} == {(4, ())}
        assert len({r.seed for r in requests}) == len(requests), "rows of one seed would be equal"
        first[way] = {
            tuple(r.tokens): r.seed for r, (_, g) in zip(requests, rows[:: requests[0].n], strict=True) if not g
        }
        assert len(calls) == {"cached": 1, "naive_order": 5, "uncached": 1}[way]
    assert first["cached"] == first["naive_order"] == first["uncached"] and len(first["cached"]) == 3
    assert rows_of("naive_order", 3, options) != rows_of("uncached", 3, options)


def test_log_probs_are_compared_up_to_the_first_other_token() -> None:
    a = Completion(np.array([5, 6, 7], np.int32), [-1.0, -2.0, -3.0], "length", 0)
    b = Completion(np.array([5, 6, 8], np.int32), [-1.0, -2.5, -9.0], "length", 0)
    assert compare({"one": {(0, 0): a}, "other": {(0, 0): b}}) == (0.5, 2)
    assert compare({"one": {(0, 0): a}}) == (0.0, 0)


def test_ways_that_disagree_are_not_written(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One engine's cache gives back other keys than were put in."""
    build = LocalEngine.__init__

    def built(self: LocalEngine, *arguments: Any, **options: Any) -> None:
        build(self, *arguments, **options)
        if options["prefix_cache"]:
            read = self._cache.read
            monkeypatch.setattr(self._cache, "read", lambda *a: tuple(1.2 * x for x in read(*a)))

    monkeypatch.setattr(LocalEngine, "__init__", built)
    with pytest.raises(SystemExit, match="the ways differ by .*nothing was written"):
        run(tmp_path, model)
    assert not list(tmp_path.iterdir())


def test_the_kind_of_a_file_of_questions_is_recognised(tmp_path: Path) -> None:
    context = [["Lake", ["A lake. " * 9]]]
    rows = [
        {"_id": str(i), "question": f"Where is lake {i}?", "answer": f"land {i}", "context": context} for i in range(6)
    ]
    (tmp_path / "hotpot.json").write_text(json.dumps(rows), encoding="utf-8")
    lines = (json.dumps({"question": f"{i} + 1?", "answer": f"#### {i + 1}"}) for i in range(6))
    (tmp_path / "gsm.jsonl").write_text("\n".join(lines), encoding="utf-8")
    for name, kind in (("hotpot.json", "hotpotqa"), ("gsm.jsonl", "gsm8k")):
        assert make_task(tmp_path / name, 2, 1).name == kind


def test_engines_of_others_serve_the_same_rows_and_those_that_are_not_here_are_named(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """transformers' own continuous batching; llama.cpp has no GGUF file of the tiny model."""
    small = ["--trajectories", "1", "--samples", "2"]
    result = run(tmp_path, model, "--engine", "local,transformers,llamacpp", *small)
    assert list(result["results"]) == list(result["summary"]) == ["local", "transformers"]
    assert "give one of the same weights as --gguf FILE" in result["absent"]["llamacpp"]
    peer = result["engines"]["transformers"]
    assert peer["version"] and any("not counted" in lack for lack in peer["lacks"])
    beside = peer["beside_the_first"]
    assert beside["rows"] == K * 2 and beside["compared_tokens"] >= 0.5 * K * 2 * NEW
    assert 0 < beside["largest_logprob_difference"] < 1e-3, "the same model, cut alike, at the same prompts"
    for ways in result["results"].values():
        assert [way["prompt_tokens"] for way in ways.values()] == [
            2 * sum(*result["settings"]["tokens_of_each_state"])
        ] * 3
    assert result["results"]["transformers"]["cached"]["cached_share"] is None
    assert " ? of the prompt tokens cached" in capsys.readouterr().out


def test_unknown_engines_are_refused_and_none_at_all_is_an_error(model: Path, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="llamacpp: --model .* has no GGUF file here"):
        run(tmp_path, model, "--engine", "llamacpp")
    for names in ("vllm", "local,local", ""):
        with pytest.raises(SystemExit):
            run(tmp_path, model, "--engine", names)
    assert not list(tmp_path.iterdir())
