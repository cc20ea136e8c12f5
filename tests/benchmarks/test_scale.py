"""The benchmark of many ranks: the trainer's own sharing out, in one process."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.scale import main


def test_a_small_world(tmp_path: Path) -> None:
    out = tmp_path / "scale.json"
    main(["--ranks", "2", "6", "--trajectories", "3", "--samples", "2", "--out", str(out)])
    found = json.loads(out.read_text(encoding="utf-8"))
    two, six = found["results"]
    assert (two["ranks"], six["ranks"]) == (2, 6)
    assert 0 < six["moved_share"] < 1 and six["bytes_mean"] > 2 * 4 * 6
    assert -0.05 < six["repeated_by_moves"] < 0.5 and 0 <= six["shared_lost"] < 0.5
    assert six["imbalance"] < six["imbalance_before"]
    assert found["summary"]["bytes"] == six["bytes_mean"] / two["bytes_mean"]
