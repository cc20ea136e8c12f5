"""The search tool: what a query gives back, and what is refused. Its two indexes have tests of their own."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swirl_fast.tools.search import NOTHING_FOUND, Search

PASSAGES = [
    ("Lake Garda", "Lake Garda is the largest lake in Italy with a surface of 370 square kilometers."),
    ("Lake Balaton", "Lake Balaton is a freshwater lake in Hungary with a surface of 592 square kilometers."),
    ("Aquileia", "Aquileia is a town in Italy, founded by the Romans in 181 BC."),
    ("Verona", "Verona is a city on the Adige river.\nIt has   two hundred thousand inhabitants."),
    ("", "A passage without a title about zeppelins."),
]


@pytest.fixture
def search(tmp_path: Path) -> Search:
    return Search(PASSAGES, 1, 1200, tmp_path)


def test_results(search: Search, tmp_path: Path) -> None:
    assert search.call("Aquileia founding") == "Aquileia: " + PASSAGES[2][1]
    assert search.call("how many INHABITANT live in verona?").endswith(
        "on the Adige river. It has two hundred thousand inhabitants."
    )
    assert search.call("zeppelin") == PASSAGES[4][1]
    assert search.call("zeppelin 8 b").startswith("A passage")
    assert "Apollo 8" in Search([("Apollo 7", "A flight."), ("Apollo 8", "A flight.")], 1, 99, tmp_path).call(
        "Apollo 8"
    )
    two = Search(PASSAGES, 2, 1200, tmp_path)
    assert two.call("lake surface").split("\n") == [f"{title}: {text}" for title, text in PASSAGES[:2]]
    assert len(Search(PASSAGES, 50, 1200, tmp_path).call("Italy").split("\n")) == 2  # fewer match than are wanted


@pytest.mark.parametrize("query", ["", "   ", "the of and", "xylophone", "?!", "\ud800", "\x00", "q", "a" * 10**6])
def test_nothing_found(search: Search, query: str) -> None:
    assert search.call(query) == NOTHING_FOUND


@settings(max_examples=100)
@given(st.text(max_size=80))
def test_no_query_raises(tmp_path_factory: pytest.TempPathFactory, query: str) -> None:
    search = Search(PASSAGES, 1, 1200, tmp_path_factory.getbasetemp() / "any_query")
    assert search.call(query)


def test_long_passages_are_cut_between_words(tmp_path: Path) -> None:
    passages = [("T", "alpha beta gamma"), ("U", "delta" * 100)]
    assert Search(passages, 1, 10, tmp_path).call("alpha") == "T: alpha beta …"
    assert Search(passages, 1, 11, tmp_path).call("alpha") == "T: alpha beta …"
    assert Search(passages, 1, 9, tmp_path).call("alpha") == "T: alpha …"
    assert Search(passages, 1, 16, tmp_path).call("alpha") == "T: alpha beta gamma"
    assert Search(passages, 1, 7, tmp_path).call("U " + "delta" * 100) == "U: deltade …"


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the task has none"):
        Search([], 1, 1200, tmp_path)
    with pytest.raises(ValueError, match="none of the 2 passages contains a word"):
        Search([("", ""), ("the", "?")], 1, 1200, tmp_path)
    with pytest.raises(ValueError, match="search.top_k=0"):
        Search(PASSAGES, 0, 1200, tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="search.cache=.*file.*can be written"):
        Search(PASSAGES, 1, 1200, tmp_path / "file")
