"""The benchmark of the quickstart needs a finished run, and says so."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.quickstart import main


@pytest.mark.parametrize(
    ("there", "missing"), [([], "summary.json"), (["summary.json", "filter.json"], "metrics.jsonl")]
)
def test_a_run_that_is_not_finished_is_named(
    there: list[str], missing: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in there:
        (tmp_path / name).write_text("{}", encoding="utf-8")
    with pytest.raises(SystemExit) as stopped:
        main(["--run", str(tmp_path), "--out", str(tmp_path / "out.json")])
    assert stopped.value.code == 2
    assert f"--run {tmp_path}: there is no {missing}; give the folder of a finished run" in capsys.readouterr().err
    assert not (tmp_path / "out.json").exists()
