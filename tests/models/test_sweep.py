"""The table of docs/models.md: what a sweep finds, its rows in the page, and models that end the process."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from support.paths import ROOT

from swirl_fast.models.__main__ import main
from swirl_fast.models.sweep import BEGIN, END, Row, model_types, read_table, sweep, try_model, write_table

PAGE = ROOT / "docs" / "models.md"


@pytest.mark.parametrize(
    "model_type",
    [
        "llama",
        "qwen2_moe",
        "phimoe",
        "lfm2",
        "cohere2",
        "granitemoe",
        "gemma3_text",
        "hrm_text",
        "gpt2",
        "mamba",
        "musicgen",
    ],
)
def test_a_sample_of_the_table_is_found_again(model_type: str) -> None:
    found, written = try_model(model_type), read_table(PAGE.read_text(encoding="utf-8"))[model_type]
    assert (found.result, found.why) == (written.result, written.why)
    if found.result == "exact":
        assert float(found.logprob) < 1e-5 and float(found.gradient) < 1e-4


def test_the_table_has_every_model_type_and_none_is_wrong() -> None:
    rows = read_table(PAGE.read_text(encoding="utf-8"))
    assert list(rows) == model_types()
    results = [row.result for row in rows.values()]
    assert set(results) == {"exact", "refused", "not tried"} and results.count("not tried") <= 5
    assert all(row.why for row in rows.values() if row.result != "exact"), "a refusal has its reason"


def test_rows_take_the_place_of_those_of_their_types(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"before\n{BEGIN}\n{END}\nafter\n", encoding="utf-8")
    write_table(page, [Row("b", "exact", "1e-07", "2e-07"), Row("a", "refused", why="it has layers of kind conv")])
    write_table(page, [Row("b", "WRONG", "1e+00", "2e+00", "most at x")])
    text = page.read_text(encoding="utf-8")
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "2 model types, 0 exact, 1 refused" in text
    assert list(read_table(text)) == ["a", "b"] and read_table(text)["b"].result == "WRONG"
    with pytest.raises(ValueError, match="no lines"):
        read_table("a page")


def ends(model_type: str) -> Row:
    if model_type == "crash":
        os._exit(3)
    return Row(model_type, "exact")


def test_a_model_that_ends_the_process_does_not_end_the_sweep() -> None:
    rows = list(sweep(["llama", "crash", "gemma"], ends, start="fork"))
    assert [row.result for row in rows] == ["exact", "not tried", "exact"]
    assert rows[1].why == "ended its process with code 3"


def test_an_unknown_model_type_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--sweep", "--only", "llama,nothing"])
    assert "no causal model types of this transformers: nothing" in capsys.readouterr().err
