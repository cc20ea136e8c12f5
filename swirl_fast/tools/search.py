"""The search tool: BM25 over all passages of a task, memory-mapped, built once and kept on disk.

BM25 in Lucene's form (k1 = 1.5, b = 0.75) over title and text, English stop words dropped, words stemmed by Snowball
(bm25s, PyStemmer). The words of a title count twice: recall at 5 rises from .78 to .81 on 200 questions of HotPotQA and
from .67 to .69 on 500 of 2WikiMultihopQA, among 5,097 passages. Words of one letter or digit count ("Apollo 8"). A
query costs one pass over the postings of its words and one over the scores: 0.5 ms with 20 thousand passages, 6 ms
with 500 thousand.

The cache is a folder named by the hash of the passages and of everything the index depends on. It is written under a
temporary name and renamed when complete; a manifest with the size and xxh64 of every file is checked on opening,
because flipped bytes would be read silently. Processes that want the same index wait for one another at a lock file,
which the system releases when its holder dies.

Left out: dense retrieval; several languages.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import sys
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import bm25s
import numpy as np
import Stemmer
import xxhash

NOTHING_FOUND = "Nothing was found. Search with other words."
_SETTINGS = {"k1": 1.5, "b": 0.75, "method": "lucene", "dtype": "float32", "int_dtype": "int32"}
_WORD = r"\w+"
_FORMAT = 1  # raise it when an index of an older version of this file must not be used any more
_LARGE = 50_000  # passages from which on building takes seconds and shows a progress bar


class Search:
    """The tool.

    passages: (title, text); of two equal scores the earlier passage comes first. top_k: passages in a result.
    passage_chars: a longer text is cut at the last space before it and ends with ` …`. cache_folder: created when
    missing; a damaged or partial index in it is rebuilt with a warning.

    Raises ValueError for no passages, passages without any word, top_k or passage_chars below 1, or a folder that
    cannot be written.
    """

    name = "search"
    description = "a search engine: write a few words about one fact; it gives back the passage that fits them best"

    def __init__(
        self, passages: Sequence[tuple[str, str]], top_k: int, passage_chars: int, cache_folder: str | Path
    ) -> None:
        if not passages:
            raise ValueError(
                "search needs passages and the task has none; use a task with paragraphs, e.g. tasks.kind=hotpotqa"
            )
        if top_k < 1 or passage_chars < 1:
            raise ValueError(f"search.top_k={top_k}, search.passage_chars={passage_chars}: both must be at least 1")
        self.passages = passages
        self.top_k = top_k
        self.passage_chars = passage_chars
        folder = Path(cache_folder).expanduser()
        try:
            self._index = _open(passages, folder)
        except OSError as error:
            raise ValueError(f"search.cache={cache_folder}: {error}; give a folder that can be written") from error

    def ranking(self, query: str, k: int) -> list[tuple[int, float]]:
        """(index into `passages`, BM25 score > 0) of the best passages, best first; fewer than k when fewer match."""
        index = self._index
        words = _tokenize([query], return_ids=False)[0]
        known = [word for word in words if word in index.vocab_dict]
        if not known:
            return []
        scores = index.get_scores(known)
        matching = np.flatnonzero(scores > 0)  # ascending, so that a stable sort breaks ties by passage
        if len(matching) > k:
            threshold = np.partition(scores[matching], len(matching) - k)[len(matching) - k]
            matching = matching[scores[matching] >= threshold]
        best = matching[np.argsort(-scores[matching], kind="stable")][:k]
        return [(int(i), float(scores[i])) for i in best]

    def call(self, argument: str) -> str:
        """`Title: text` of the best passages, one a line; a sentence when nothing matches. Never raises for a query."""
        found = self.ranking(argument, self.top_k)
        return "\n".join(self._show(*self.passages[i]) for i, _ in found) or NOTHING_FOUND

    def _show(self, title: str, text: str) -> str:
        title, text = " ".join(title.split()), " ".join(text.split())
        if len(text) > self.passage_chars:
            cut = text[: self.passage_chars + 1]
            text = (cut[: cut.rfind(" ")] if " " in cut else cut[:-1]) + " …"
        return f"{title}: {text}" if title else text


def _tokenize(texts: list[str], return_ids: bool, progress: bool = False) -> Any:
    # PyStemmer's stemmers are not thread-safe, and one costs microseconds
    stemmer = Stemmer.Stemmer("english")
    return bm25s.tokenize(
        texts, token_pattern=_WORD, stopwords="en", stemmer=stemmer, return_ids=return_ids, show_progress=progress
    )


def _open(passages: Sequence[tuple[str, str]], cache: Path) -> bm25s.BM25:
    cache.mkdir(parents=True, exist_ok=True)
    key = _key(passages)
    folder = cache / key
    with open(cache / f"{key}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for leftover in cache.glob(f"{key}.tmp-*"):  # of a builder that was killed: nobody else holds the lock
            shutil.rmtree(leftover, ignore_errors=True)
        if folder.exists():
            damage = _damage(folder)
            if not damage:
                return bm25s.BM25.load(folder, mmap=True, show_progress=False)
            warnings.warn(f"{folder}: {damage}; the search index is built again", stacklevel=3)
            shutil.rmtree(folder)
        _build(passages, folder)
        return bm25s.BM25.load(folder, mmap=True, show_progress=False)


def _key(passages: Sequence[tuple[str, str]]) -> str:
    settings = [_FORMAT, _SETTINGS, bm25s.__version__, Stemmer.version(), np.__version__.split(".")[0]]
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for passage in passages:
        digest.update(json.dumps(passage).encode() + b"\n")
    return digest.hexdigest()[:32]


def _build(passages: Sequence[tuple[str, str]], folder: Path) -> None:
    progress = len(passages) >= _LARGE and sys.stderr.isatty()
    documents = _tokenize([f"{title}\n{title}\n{text}" for title, text in passages], return_ids=True, progress=progress)
    if not any(documents.ids):
        raise ValueError(f"none of the {len(passages)} passages contains a word that can be searched")
    index = bm25s.BM25(**_SETTINGS)
    index.index(documents, show_progress=progress)
    temporary = Path(tempfile.mkdtemp(prefix=f"{folder.name}.tmp-", dir=folder.parent))
    index.save(temporary, show_progress=progress)
    manifest = {}
    for file in sorted(temporary.iterdir()):
        manifest[file.name] = [file.stat().st_size, _hash(file)]
        _to_disk(file)
    (temporary / "manifest.json").write_text(json.dumps(manifest, indent=1))
    _to_disk(temporary / "manifest.json")
    temporary.rename(folder)


def _damage(folder: Path) -> str:
    """What is wrong with an index on disk, empty when nothing is."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        for name, (size, digest) in manifest.items():
            if (folder / name).stat().st_size != size or _hash(folder / name) != digest:
                return f"{name} is damaged"
    except (OSError, ValueError, TypeError, AttributeError) as error:
        return f"not a complete index ({error})"
    return ""


def _hash(file: Path) -> str:
    digest = xxhash.xxh64()
    with open(file, "rb") as stream:
        while chunk := stream.read(2**22):
            digest.update(chunk)
    return digest.hexdigest()


def _to_disk(file: Path) -> None:
    with open(file, "rb") as stream:
        os.fsync(stream.fileno())
