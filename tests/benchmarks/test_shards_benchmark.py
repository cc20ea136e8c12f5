"""The benchmark of the data stream: its ways hand out the same trajectories, resume where they say, and what is measured is kept."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
from support.stores import read_samples

from benchmarks.shards import WAYS, SeededSampler, main, make_samples, summarize, write_data
from swirl_fast.data.shards import StepSample

COUNT, BATCH = 12, 4


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_data(folder, COUNT, 2)
    return folder


def drawn(way: str, data: Path, position: int, count: int) -> list[StepSample]:
    batches = WAYS[way](data, BATCH, position)
    found = [sample for batch in itertools.islice(batches, count) for sample in batch]
    batches.close()  # type: ignore[attr-defined]
    return found


@pytest.mark.parametrize("way", WAYS)
def test_every_way_hands_out_the_same_trajectories_and_resumes(data: Path, way: str) -> None:
    samples = {sample.trajectory.id: sample for sample in make_samples(COUNT, 2)}
    found = drawn(way, data, 0, 6)
    assert all(sample == samples[sample.trajectory.id] for sample in found)
    ids = [sample.trajectory.id for sample in found]
    assert sorted(ids[:COUNT]) == sorted(ids[COUNT:]) == sorted(samples)
    assert ids[:COUNT] != ids[COUNT:] and ids[:COUNT] != list(samples)
    assert [sample.trajectory.id for sample in drawn(way, data, 2 * BATCH, 4)] == ids[2 * BATCH :]


def test_the_data_is_what_it_says(data: Path) -> None:
    samples = list(read_samples(data / "shards"))
    assert samples == list(make_samples(COUNT, 2))
    for sample in samples:
        sample.trajectory.check()
        assert len(sample.trajectory.tokens) == 400 + 2 * 120 + 600
        assert [step.end - step.start for step in sample.trajectory.steps] == [120, 120]
    assert list(itertools.islice(SeededSampler(COUNT, 5), 30)) == list(itertools.islice(SeededSampler(COUNT, 0), 5, 35))


def test_a_tiny_run_keeps_what_it_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "result.json"
    tiny = [
        "--trajectories",
        "12",
        "--steps",
        "2",
        "--batch",
        "4",
        "--repeats",
        "1",
        "--waits",
        "2",
        "--step-seconds",
        "0.01",
    ]
    main([*tiny, "--quick", "--ways", "stream_remote,stream,pickle", "--out", str(out)])
    result, shown = json.loads(out.read_text()), capsys.readouterr().out
    assert list(result["results"]) == ["stream", "stream_remote", "pickle"]
    for way, row in result["results"].items():
        assert all(value > 0 for value in row.values())
        assert row["tokens_per_second"] == pytest.approx(row["trajectories_per_second"] * 1240)
        assert result["summary"][way] == {key: row[key] for key in result["summary"][way]}
        assert f"{way:>14}" in shown
    assert result["summary"].keys() == {*result["results"], "share_of_quickstart_step"}
    assert result["settings"]["trajectories"] == 12 and result["environment"]["cores"] > 0


def test_the_share_of_a_quickstart_step_is_of_both() -> None:
    row = dict.fromkeys(("trajectories_per_second", "first_batch_seconds", "resume_seconds", "share_of_step"), 1.0)
    rows = {"stream": {**row, "wait_seconds_mean": 1.0}}
    found = summarize(rows, {"steps": [{"seconds": 3.0}, {"seconds": 15.0}]})
    assert found["share_of_quickstart_step"] == {"mean": 0.1, "quickest": 0.25}
    assert "share_of_quickstart_step" not in summarize(rows, None)
