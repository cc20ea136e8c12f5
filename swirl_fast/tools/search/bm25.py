"""BM25 in Lucene's form (k1 = 1.5, b = 0.75) over title and text, English stop words dropped, words stemmed by Snowball
(bm25s, PyStemmer). Accents, case and compatibility forms are no difference: `Beyonce` finds `Beyoncé`.

The words of a title count twice: recall at 5 rises from .78 to .81 on 200 questions of HotPotQA and from .67 to .69 on
500 of 2WikiMultihopQA, among 5,097 passages. Words of one letter or digit count ("Apollo 8"). A query costs one pass
over the postings of its words and one over the scores: 0.5 ms with 20 thousand passages, 6 ms with 500 thousand for
whole questions, 1.6 ms with 1 million generated ones for a few words (benchmarks/search.py).

On disk lie the arrays of bm25s and, in place of its JSON dictionary (0.5 s to parse at 420 thousand words), the sorted
words as one memory-mapped text in which a query's words are found by bisection.

Left out: several languages.
"""

from __future__ import annotations

import bisect
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import Stemmer

from swirl_fast.tools.characters import without_accents
from swirl_fast.tools.search.index import Passages

# bm25s tries JAX where that is installed, and JAX takes three quarters of a GPU's memory when it starts: on the CPU then.
_chosen = "JAX_PLATFORMS" in os.environ
os.environ.setdefault("JAX_PLATFORMS", "cpu")
import bm25s  # noqa: E402

if not _chosen:
    del os.environ["JAX_PLATFORMS"]

_SETTINGS = {"k1": 1.5, "b": 0.75, "method": "lucene", "dtype": "float32", "int_dtype": "int32"}
_WORD = r"\w+"
_FORMAT = 3  # raise it when an index of an older version of this file must not be used any more
_LARGE = 50_000  # passages from which on building takes seconds and shows a progress bar


class BM25:
    """An Index. build raises ValueError for passages without any word."""

    settings = ["bm25", _FORMAT, _SETTINGS, bm25s.__version__, Stemmer.version(), np.__version__.split(".")[0]]

    def build(self, passages: Passages, folder: Path) -> None:
        index = self.in_memory(passages)
        words = sorted(word.encode() for word in index.vocab_dict)
        ids = np.array([index.vocab_dict[word.decode()] for word in words], np.int32)
        index.vocab_dict = {}
        index.save(folder, show_progress=False)
        (folder / "words.bin").write_bytes(b"".join(words))
        np.save(folder / "word_ends.npy", np.cumsum([len(word) for word in words], dtype=np.int64))
        np.save(folder / "word_ids.npy", ids)

    def in_memory(self, passages: Passages) -> bm25s.BM25:
        progress = len(passages) >= _LARGE and sys.stderr.isatty()
        texts = [f"{title}\n{title}\n{text}" for title, text in passages]
        documents = tokenize(texts, return_ids=True, progress=progress)
        if not any(documents.ids):
            raise ValueError(f"none of the {len(passages)} passages contains a word that can be searched")
        index = bm25s.BM25(**_SETTINGS)
        index.index(documents, show_progress=progress)
        return index

    def open(self, folder: Path) -> None:
        self._index = bm25s.BM25.load(folder, mmap=True, load_vocab=False, show_progress=False)
        self._words = np.memmap(folder / "words.bin", np.uint8, "r")
        self._ends = np.load(folder / "word_ends.npy", mmap_mode="r")
        self._ids = np.load(folder / "word_ids.npy", mmap_mode="r")

    def ranking(self, query: str, k: int) -> list[tuple[int, float]]:
        """Scores are above 0; fewer than k when fewer match."""
        words = tokenize([query], return_ids=False)[0]
        known = [id_ for word in words if (id_ := self._id(word)) is not None]
        return best(self._index.get_scores(known), k) if known else []

    def _id(self, word: str) -> int | None:
        target = word.encode()
        i = bisect.bisect_left(range(len(self._ids)), target, key=self._word)
        return int(self._ids[i]) if i < len(self._ids) and self._word(i) == target else None

    def _word(self, i: int) -> bytes:
        return self._words[self._ends[i - 1] if i else 0 : self._ends[i]].tobytes()


def best(scores: np.ndarray, k: int) -> list[tuple[int, float]]:
    """(index, score) of the k highest scores above 0, highest first, ties by index."""
    matching = np.flatnonzero(scores > 0)  # ascending, so that a stable sort breaks ties by index
    if len(matching) > k:
        threshold = np.partition(scores[matching], len(matching) - k)[len(matching) - k]
        matching = matching[scores[matching] >= threshold]
    order = matching[np.argsort(-scores[matching], kind="stable")][:k]
    return [(int(i), float(scores[i])) for i in order]


def tokenize(texts: list[str], return_ids: bool, progress: bool = False) -> Any:
    # PyStemmer's stemmers are not thread-safe, and one costs microseconds
    stemmer = Stemmer.Stemmer("english")
    texts = [without_accents(text) for text in texts]
    return bm25s.tokenize(
        texts,
        token_pattern=_WORD,
        stopwords="en",
        stemmer=stemmer,
        return_ids=return_ids,
        show_progress=progress,
    )
