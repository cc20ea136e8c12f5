"""The benchmark of PivotRL on generated logs runs; its logs are right where they should be."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.pivotrl import logs, main


def test_logs_are_right_and_mistakes_are_mistakes() -> None:
    for row in logs(30, 0, 0.0):
        many = int(row["messages"][0]["content"].split()[2])
        price = int(row["messages"][2]["content"])
        call = json.loads(row["messages"][3]["tool_calls"][0]["function"]["arguments"])
        assert call == {"a": many, "b": price}
        assert row["messages"][4]["content"] == row["messages"][5]["content"] == str(many * price)
    right, wrong = ([row["messages"] for row in logs(30, 0, share)] for share in (0.0, 0.5))
    assert right != wrong


def test_it_runs(tmp_path: Path) -> None:
    main(["--quick", "--out", str(tmp_path / "out.json")])
    found = json.loads((tmp_path / "out.json").read_text())
    assert [row["way"] for row in found["results"]] == ["all", "refill"]
    assert all(len(row["rewards"]) == len(row["seconds"]) == 2 for row in found["results"])
    assert all([point["steps"] for point in row["held_out"]] == [0, 1, 2] for row in found["results"])
