"""The cache of search indexes: built once, complete or not there, damage noticed."""

import multiprocessing
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from support.paths import ROOT

from swirl_fast.tools.search import Search
from swirl_fast.tools.search.bm25 import BM25
from swirl_fast.tools.search.index import _key

PASSAGES = [
    ("Lake Garda", "Lake Garda is the largest lake in Italy with a surface of 370 square kilometers."),
    ("Lake Balaton", "Lake Balaton is a freshwater lake in Hungary with a surface of 592 square kilometers."),
    ("Aquileia", "Aquileia is a town in Italy, founded by the Romans in 181 BC."),
    ("", "A passage without a title about zeppelins."),
]


def folders(cache: Path) -> list[Path]:
    return [path for path in cache.iterdir() if path.is_dir()]


@pytest.fixture
def builds(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Counts how often an index is really built."""
    counted: list[int] = []
    build = BM25.build
    monkeypatch.setattr(BM25, "build", lambda *arguments: (counted.append(1), build(*arguments)))
    return counted


def test_an_index_is_built_once_and_memory_mapped(tmp_path: Path, builds: list[int]) -> None:
    first = Search(PASSAGES, 1, 1200, tmp_path / "new" / "cache")
    again = Search(list(PASSAGES), 3, 20, tmp_path / "new" / "cache")  # how results are shown is not part of it
    assert len(builds) == 1
    assert isinstance(again._index._index.scores["data"], np.memmap)
    assert first.ranking("lake in Italy", 5) == again.ranking("lake in Italy", 5)


def test_other_passages_get_another_index(tmp_path: Path, builds: list[int]) -> None:
    Search(PASSAGES, 1, 1200, tmp_path)
    for other in ([*PASSAGES, ("x", "y word")], PASSAGES[::-1], [("Lake", "Garda" + PASSAGES[0][1]), *PASSAGES[1:]]):
        Search(other, 1, 1200, tmp_path)
    assert len(builds) == len(folders(tmp_path)) == 4


def test_a_key_depends_on_the_strings_and_nothing_else() -> None:
    title = "".join(["Lake", " ", "Garda"])  # another object than the constant, and not interned
    keys = [_key([1], PASSAGES), _key([1], [(title, PASSAGES[0][1]), *PASSAGES[1:]]), _key([1], tuple(PASSAGES))]
    assert len(set(keys)) == 1
    same = [(title, title), ("Lake Garda", "Lake " + "Garda")]
    assert _key([1], same) == _key([1], [("".join(title), "".join(text)) for title, text in same])
    many = [("", str(i)) for i in range(2500)]
    others = [
        *(_key([2], PASSAGES), _key([1], [("Lake", " Garda" + PASSAGES[0][1]), *PASSAGES[1:]])),
        *(
            _key([1], [("a", "bc")]),
            _key([1], [("ab", "c")]),
            _key([1], [("a", "b"), ("", "c")]),
            _key([1], [("", "\ud800")]),
        ),
        *(_key([1], many), _key([1], many[:2000]), _key([1], [*many[:2499], ("", "x")]), _key([1], many[::-1])),
    ]
    assert len({keys[0], *others}) == 1 + len(others)


def test_every_kind_of_damage_is_repaired_with_a_warning(tmp_path: Path, builds: list[int]) -> None:
    expected = Search(PASSAGES, 1, 1200, tmp_path).ranking("lake in Italy", 5)
    (folder,) = folders(tmp_path)
    pristine = tmp_path / "pristine"
    shutil.copytree(folder, pristine)
    names = sorted(file.name for file in pristine.iterdir())
    assert len(names) == 9

    def flip(file: Path) -> None:
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)

    def truncate(file: Path) -> None:
        file.write_bytes(file.read_bytes()[:-1])

    damages = [(damage, name) for damage in (flip, truncate, Path.unlink) for name in names]
    for damage, name in damages:
        built = len(builds)
        damage(folder / name)
        with pytest.warns(UserWarning, match="built again"):
            search = Search(PASSAGES, 1, 1200, tmp_path)
        assert len(builds) == built + 1
        assert search.ranking("lake in Italy", 5) == expected
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Search(PASSAGES, 1, 1200, tmp_path)


def test_a_builder_that_was_killed_leaves_nothing_that_is_used(tmp_path: Path, builds: list[int]) -> None:
    code = f"""
import os, sys
sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path
from swirl_fast.tools.search import Search
Path.rename = lambda *_: os.kill(os.getpid(), 9)
Search({PASSAGES!r}, 1, 1200, {str(tmp_path)!r})
"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == -9
    assert [folder.suffix for folder in folders(tmp_path)] == [".tmp"]
    assert Search(PASSAGES, 1, 1200, tmp_path).call("zeppelin") == PASSAGES[-1][1]
    assert len(builds) == 1
    assert [folder.suffix for folder in folders(tmp_path)] == [""]


def _build_and_ask(cache: str, results: "multiprocessing.Queue[str]") -> None:
    results.put(Search(PASSAGES, 1, 1200, cache).call("zeppelin"))


def test_processes_share_one_index(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    processes = [context.Process(target=_build_and_ask, args=(str(tmp_path), results)) for _ in range(4)]
    for process in processes:
        process.start()
    assert [results.get(timeout=30) for _ in processes] == [PASSAGES[-1][1]] * 4
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert len(folders(tmp_path)) == 1
