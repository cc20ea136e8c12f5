"""The benchmark of search: seeded passages, the same answers mapped and from memory, and what is measured is kept."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from bm25s.stopwords import STOPWORDS_EN
from support.small_models import sentence_model

from benchmarks.search import TOP_K, build, main, make_passages, make_queries, reopen, summarize, write_passages


def test_passages_are_seeded_and_look_like_text() -> None:
    passages = list(make_passages(300, 0))
    assert passages == list(make_passages(300, 0)) and passages != list(make_passages(300, 1))
    assert len(set(passages)) == 300
    words = [word for _, text in passages for word in text[:-1].split()]
    assert 0.25 < sum(word in STOPWORDS_EN for word in words) / len(words) < 0.45
    assert 0.2 < len(set(words)) / len(words) < 0.45
    for title, text in passages:
        assert text.startswith(title + " ") and 31 <= len(text.split()) <= 124 and 1 <= len(title.split()) <= 4
    by_title = dict(passages)
    for query in make_queries(passages, 50, 0):
        title = next(title for title in by_title if query.startswith(title + " "))
        assert set(query.split()) <= set(by_title[title][:-1].split())


def test_a_tiny_run_keeps_what_it_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "result.json"
    main(["--passages", "200", "--queries", "5", "--reopenings", "1", "--out", str(out)])
    result = json.loads(out.read_text())
    assert json.loads(capsys.readouterr().out) == result["summary"]
    assert result["summary"].pop("equal") is True
    assert all(value > 0 for value in result["summary"].values())
    assert result["settings"]["passages"] == result["build"]["passages"] == 200
    assert len(result["reopen"][0]["query_seconds"]) == 5 and result["environment"]["cores"] > 0


def test_dense_search_is_measured_too(tmp_path: Path) -> None:
    options = {"folder": str(tmp_path), "passages": 50, "queries": 3, "seed": 0}
    options |= {"model": str(sentence_model(tmp_path)), "index": "fp16"}
    write_passages(options)
    built, reopened = build(options), reopen(options)
    assert summarize(built, [reopened])["equal"] and len(built["answers"]) == 3 and len(built["answers"][0]) == TOP_K


def test_a_summary_is_of_all_reopenings_and_says_when_answers_differ() -> None:
    built = {"seconds": 9.0, "index_bytes": 5, "peak_memory_bytes": 2e9, "answers": [[[1, 2.0]]]}
    one = {
        "seconds": 1.0,
        "cpu_seconds": 0.5,
        "query_seconds": [0.004, 0.001],
        "peak_memory_bytes": 1e9,
        "answers": [[[1, 2.0]]],
    }
    other = one | {"seconds": 3.0, "query_seconds": [0.002, 0.003], "peak_memory_bytes": 3e9}
    found = summarize(built, [one, one | {"seconds": 2.0}, other])
    assert (
        found["reopen_seconds"] == 2.0
        and found["reopen_cpu_seconds"] == 0.5
        and found["equal"]
        and found["peak_memory_gb_reopen"] == 3
    )
    assert found["query_ms_median"] == pytest.approx(2.5) and found["first_query_ms"] == 4
    assert not summarize(built, [one, other | {"answers": [[[1, 2.5]]]}])["equal"]
