"""The benchmark of the stages: its trajectories are judged as they are meant to be, and it measures every stage."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path

import pytest

from benchmarks.stages import STAGES, STEPS, TOKENS, WAYS, main, write_run
from swirl_fast import stages
from swirl_fast.data.store import Store
from swirl_fast.judges.cached import judged_trajectories
from swirl_fast.verdict import Verdict


def test_the_six_ways_are_judged_differently(tmp_path: Path) -> None:
    config = write_run(tmp_path, 12)
    stages.judge(config)
    first_bad: dict[str, set[int | None]] = defaultdict(set)
    with Store(config.store, writable=False) as store:
        ids = store.ids()
        for trajectory, judgements in judged_trajectories(store, store.main_judge(), ids):
            assert len(trajectory.tokens) == TOKENS and trajectory.num_steps == STEPS
            way = WAYS[trajectory.seed % len(WAYS)]
            bad = [i for i, judgement in enumerate(judgements) if judgement.verdict is Verdict.BAD]
            first_bad[way].add(bad[0] if bad else None)
    assert len(ids) == 12
    assert first_bad == {
        "right": {None},
        "wrong answer": {4},
        "number from nowhere": {1},
        "repeated call": {2},
        "malformed call": {1},
        "no answer": {4},
    }


def test_every_stage_is_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "stages.json"
    main(["--trajectories", "20", "--out", str(out)])
    (row,) = json.loads(out.read_text())["results"].values()
    for stage in STAGES:
        assert row[stage]["seconds"] > 0 and row[stage]["mib"] > 0 and row[stage]["mib_imports"] > 50
    assert row["kept"] == 4, "every sixth is right"
    assert str(out) in capsys.readouterr().out
