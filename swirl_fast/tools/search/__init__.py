"""The search tool: passages of a task, found by BM25 (bm25.py, the default) or by embeddings (dense.py).

Either index is built once, kept on disk and memory-mapped (index.py). The passages themselves stay the task's
list: it holds them anyway, and an index in the cache serves whoever has the same ones.
"""

from __future__ import annotations

from pathlib import Path

from swirl_fast.config import SearchConfig
from swirl_fast.tools.search.bm25 import BM25
from swirl_fast.tools.search.dense import Dense
from swirl_fast.tools.search.index import Index, Passages, open_cached

NOTHING_FOUND = "Nothing was found. Search with other words."


def load_search(config: SearchConfig, passages: Passages) -> Search:
    """The tool of a config. Raises ValueError as Search and Dense do."""
    index: Index = BM25()
    if config.kind == "dense":
        assert config.model, "refused by the check of the config"
        index = Dense(config.model, config.query_prefix, config.passage_prefix, config.index, config.batch)
    return Search(passages, config.top_k, config.passage_chars, config.cache, index)


class Search:
    """The tool.

    passages: (title, text); of two equal scores the earlier passage comes first. top_k: passages in a result.
    passage_chars: a longer text is cut at the last space before it and ends with ` …`. cache_folder: created when
    missing; a damaged or partial index in it is rebuilt with a warning. index: BM25 when none is given.

    Raises ValueError for no passages, passages without any word, top_k or passage_chars below 1, or a folder that
    cannot be written.
    """

    def __init__(
        self, passages: Passages, top_k: int, passage_chars: int, cache_folder: str | Path, index: Index | None = None
    ) -> None:
        if not passages:
            raise ValueError(
                "search needs passages and the task has none; set search.corpus, or use a task with paragraphs, e.g. tasks.kind=hotpotqa"
            )
        if top_k < 1 or passage_chars < 1:
            raise ValueError(f"search.top_k={top_k}, search.passage_chars={passage_chars}: both must be at least 1")
        self.passages = passages
        self.top_k = top_k
        self.passage_chars = passage_chars
        self._index = index or BM25()
        try:
            open_cached(self._index, passages, Path(cache_folder).expanduser())
        except OSError as error:
            raise ValueError(f"search.cache={cache_folder}: {error}; give a folder that can be written") from error

    def ranking(self, query: str, k: int) -> list[tuple[int, float]]:
        """(index into `passages`, score) of the best passages, best first; fewer than k when fewer match."""
        return self._index.ranking(query, k)

    def call(self, query: str) -> str:
        """`Title: text` of the best passages, one a line; a sentence when nothing matches. Never raises for a query."""
        found = self.ranking(query, self.top_k)
        return "\n".join(self._show(*self.passages[i]) for i, _ in found) or NOTHING_FOUND

    def _show(self, title: str, text: str) -> str:
        title, text = " ".join(title.split()), " ".join(text.split())
        if len(text) > self.passage_chars:
            cut = text[: self.passage_chars + 1]
            text = (cut[: cut.rfind(" ")] if " " in cut else cut[:-1]) + " …"
        return f"{title}: {text}" if title else text
