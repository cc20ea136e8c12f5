"""BM25: the formula, ties, and the same results memory-mapped and in memory."""

import json
import math
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import Stemmer
from bm25s.stopwords import STOPWORDS_EN
from hypothesis import given, settings
from hypothesis import strategies as st
from support.paths import DATA

from swirl_fast.tools.search import Search
from swirl_fast.tools.search.bm25 import BM25, best, tokenize


def test_ties_go_to_the_earlier_passage(tmp_path: Path) -> None:
    passages = [(f"Title {i + 100}", "same words here" if i % 3 else "other text about nothing") for i in range(300)]
    passages[200] = ("Title 300", "same same same")
    ranking = Search(passages, 1, 100, tmp_path).ranking("same", 20)
    same = [i for i in range(300) if i % 3 and i != 200]
    assert [i for i, _ in ranking] == [200, *same[:19]]
    assert len({score for _, score in ranking[1:]}) == 1


def test_accents_and_spellings_of_unicode_are_no_difference(tmp_path: Path) -> None:
    passages = [
        ("Beyoncé", "A singer."),
        ("Zu\u0308rich", "A city."),
        ("Straßburg", "Another."),
        ("ＴＯＫＹＯ", "One more."),
    ]
    search = Search(passages, 1, 100, tmp_path)
    for at, queries in enumerate(
        [
            ("Beyonce", "beyoncé", "Beyonce\u0301", "BEYONCÉ"),
            ("Zürich", "Zurich", "Zu\u0308rich"),
            ("Strassburg", "STRASSBURG"),
            ("Tokyo", "ｔｏｋｙｏ"),
        ]
    ):
        for query in queries:
            assert [i for i, _ in search.ranking(query, 1)] == [at], query


def naive(passages: list[tuple[str, str]], query: str) -> list[tuple[int, float]]:
    """BM25 as Lucene has it, word by word and passage by passage."""
    stem = Stemmer.Stemmer("english").stemWord

    def words(text: str) -> list[str]:
        return [stem(word) for word in re.findall(r"\w+", text.lower()) if word not in STOPWORDS_EN]

    documents = [Counter(words(f"{title} {title} {text}")) for title, text in passages]
    mean = sum(sum(document.values()) for document in documents) / len(documents)
    scores = []
    for i, document in enumerate(documents):
        score = 0.0
        for word in words(query):
            having = sum(word in other for other in documents)
            if word in document:
                idf = math.log(1 + (len(documents) - having + 0.5) / (having + 0.5))
                tf = document[word]
                score += idf * tf / (tf + 1.5 * (1 - 0.75 + 0.75 * sum(document.values()) / mean))
        if score > 0:
            scores.append((i, score))
    return sorted(scores, key=lambda pair: (-pair[1], pair[0]))


def test_scores_equal_the_formula(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    vocabulary = (
        "lake lakes river city cities town founded founding romans italy hungary the of music band album".split()
    )
    passages = [
        (" ".join(generator.choice(vocabulary, 2)), " ".join(generator.choice(vocabulary, 12))) for _ in range(200)
    ]
    search = Search(passages, 1, 100, tmp_path)
    for _ in range(20):
        query = " ".join(generator.choice(vocabulary, generator.integers(1, 5)))
        found, expected = search.ranking(query, 200), naive(passages, query)
        assert {i for i, _ in found} == {i for i, _ in expected}
        assert [score for _, score in found] == pytest.approx([score for _, score in expected], rel=1e-5)
        assert search.ranking(query, 7) == found[:7]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.text(max_size=8), st.text("aäzß日 1_", max_size=30)), min_size=1, max_size=12), st.data())
def test_what_is_memory_mapped_equals_what_is_in_memory(
    tmp_path_factory: pytest.TempPathFactory, passages: list[tuple[str, str]], data: st.DataObject
) -> None:
    passages.append(("one", "word at least"))
    memory = BM25().in_memory(passages)
    index = BM25()
    folder = tmp_path_factory.mktemp("bm25") / "index"
    index.build(passages, folder)
    index.open(folder)
    assert isinstance(index._index.scores["data"], np.memmap) and isinstance(index._words, np.memmap)
    texts = st.sampled_from([text for passage in passages for text in passage])
    for query in data.draw(st.lists(texts | st.text(max_size=9), min_size=1, max_size=4)):
        known = [word for word in tokenize([query], return_ids=False)[0] if word in memory.vocab_dict]
        expected = best(memory.get_scores(known), 3) if known else []
        assert index.ranking(query, 3) == expected


def test_every_word_is_found_and_no_other(tmp_path: Path) -> None:
    index = BM25()
    words = [f"w{i}" for i in range(300)]
    index.build([("", word) for word in words], tmp_path / "index")
    index.open(tmp_path / "index")
    for i, word in enumerate(words):
        assert [found for found, _ in index.ranking(word, 5)] == [i]
    for word in ("a1", "w", "w1a", "w300", "zz", "ä"):
        assert index.ranking(word, 5) == []


def test_recall_on_hotpotqa(tmp_path: Path) -> None:
    path = DATA / "hotpotqa/dev.json"
    if not path.is_file():
        pytest.skip(f"{path} is not here")
    rows = json.loads(path.read_text())
    passages = list(dict.fromkeys((title, " ".join(text)) for row in rows for title, text in row["context"]))
    search = Search(passages, 1, 1200, tmp_path)
    recall = []
    for row in rows:
        gold = {title for title, _ in row["supporting_facts"]}
        found = {passages[i][0] for i, _ in search.ranking(row["question"], 10)}
        recall.append(len(gold & found) / len(gold))
    assert sum(recall) / len(recall) > 0.8  # .87 among 17,600 passages; here are fewer


def test_jax_is_kept_off_the_gpu(tmp_path: Path) -> None:
    """bm25s runs an operation on JAX, where that is installed, as soon as it is imported; a stand-in for JAX sees with which devices."""
    package = tmp_path / "jax"
    package.mkdir()
    (package / "__init__.py").write_text("import os\nplatforms = os.environ.get('JAX_PLATFORMS')\n")
    (package / "lax.py").write_text("def top_k(scores, k):\n    return scores[:k], scores[:k]\n")
    program = "import os, sys, swirl_fast.tools.search.bm25; print(sys.modules['jax'].platforms, os.environ.get('JAX_PLATFORMS'))"
    for chosen, expected in (({}, "cpu None"), ({"JAX_PLATFORMS": "tpu"}, "tpu tpu")):
        variables = {name: value for name, value in os.environ.items() if name != "JAX_PLATFORMS"}
        path = os.pathsep.join([str(tmp_path), *sys.path])
        done = subprocess.run(
            [sys.executable, "-c", program],
            env=variables | chosen | {"PYTHONPATH": path},
            capture_output=True,
            text=True,
        )
        assert done.stdout.split("\n")[0] == expected, done.stderr
