"""TRL's own trainer beside the comb: one step of both has the same loss and gradients."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("trl")

from benchmarks.against_trl import main  # noqa: E402
from benchmarks.step_training.ways import SHAPES  # noqa: E402


def test_one_step_of_both_is_the_same(tmp_path: Path) -> None:
    out = tmp_path / "result.json"
    main(["--quick", "--device", "cpu", "--ways", "trl", "comb", "--out", str(out)])
    found = json.loads(out.read_text(encoding="utf-8"))
    trl, comb = found["results"]
    shape = SHAPES["math"]
    rows, longest = 2 * 4, shape.state(2) + shape.action
    assert trl["tokens_computed"] == rows * longest  # its rows are as wide as the longest of the batch
    assert comb["tokens_computed"] == shape.state(2) + rows * (shape.action - 1)  # nothing follows the last
    assert trl["tokens_effective"] == comb["tokens_effective"] == 4 * (shape.state(1) + longest + shape.action)
    assert abs(trl["loss"]) > 1e-4
    summary = found["summary"]
    assert set(summary) == {"trl_over_comb_seconds", "trl_over_comb_memory", "gradient_difference", "loss_difference"}
    assert 0 < summary["gradient_difference"]["2"] < 1e-4 and summary["loss_difference"]["2"] < 1e-3
    assert summary["trl_over_comb_seconds"]["2"] == pytest.approx(trl["seconds"] / comb["seconds"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "11"], "--steps 11: give 1 to 10"),
        (["--samples", "1"], "--samples 1: give 2 to 16"),
        (["--token-budget", "100"], "--token-budget 100: give 3400"),
    ],
)
def test_bad_settings(arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([*arguments, "--out", str(tmp_path / "result.json")])
    assert message in capsys.readouterr().err
