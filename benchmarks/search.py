"""How soon is an index of a million passages there, how fast does it answer, and does it answer as if it lay in memory?

    python -m benchmarks.search --quick --out FILE                                20 thousand passages, seconds
    python -m benchmarks.search --out benchmarks/results/DATE-search.json         a million, BM25: 10 minutes, 4 GB of memory
    python -m benchmarks.search --passages 20000 --model FOLDER --out FILE        dense search with a sentence-transformers model

Passages are generated: 30 to 120 words after a law of Zipf over 600 thousand words, the 33 most frequent of them English stop words, and a
title of 1 to 4 rarer words that the text begins with. A query is a title with 1 to 3 words of its text.

build       in a process that has the passages; its peak memory holds passages, texts with titles and the arrays
reopen      Search(passages, …) in a new process that has the passages, as a task would: hashing them, checking every file for damage,
            mapping the index. The page cache is warm: files that were written before are in memory. Processor seconds are given too:
            other work on the machine matters less to them
query       Search.call in that process, top 1, one query after the other
equal       passages and scores of the top 10 are those of the index that was built, from memory
"""

from __future__ import annotations

import argparse
import json
import marshal
import multiprocessing
import re
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from bm25s.stopwords import STOPWORDS_EN
from tqdm import tqdm

from swirl_fast.tools.search import Search
from swirl_fast.tools.search.bm25 import BM25, best, tokenize
from swirl_fast.tools.search.dense import INDEXES, Dense
from swirl_fast.tools.search.index import Index

WORDS = 600_000
TOP_K = 10
Ranking = list[tuple[int, float]]


def make_passages(count: int, seed: int) -> Iterator[tuple[str, str]]:
    """(title, text), the same for the same seed."""
    generator = np.random.default_rng(seed)
    words = np.array(_words(), dtype=object)
    weights = (np.arange(WORDS) + 2.7) ** -1.1  # Zipf's law as Mandelbrot has it
    cumulative = np.cumsum(weights / weights.sum())
    for start in range(0, count, 10_000):
        number = min(10_000, count - start)
        lengths, title_lengths = generator.integers(30, 121, number), generator.integers(1, 5, number)
        texts = words[np.searchsorted(cumulative[:-1], generator.random(lengths.sum()))].tolist()
        titles = words[generator.integers(1000, WORDS, title_lengths.sum())].tolist()
        ends, title_ends = np.cumsum(lengths).tolist(), np.cumsum(title_lengths).tolist()
        for i in range(number):
            title = " ".join(titles[title_ends[i - 1] if i else 0 : title_ends[i]])
            yield title, f"{title} {' '.join(texts[ends[i - 1] if i else 0 : ends[i]])}."


def _words() -> list[str]:
    """By frequency: English stop words, then made-up ones, short ones first; all different."""
    syllables = [c + v + d for d in ("", "n", "r", "s", "l") for c in "bcdfghklmnprstvz" for v in "aeiou"]
    words = list(STOPWORDS_EN)
    for i in range(WORDS - len(words)):
        word, rest = "", i
        while rest >= 0:
            rest, digit = divmod(rest, len(syllables))
            word, rest = word + syllables[digit], rest - 1
        words.append(word)
    return words


def make_queries(passages: Sequence[tuple[str, str]], count: int, seed: int) -> list[str]:
    generator = np.random.default_rng([seed, 1])
    queries = []
    for i in generator.integers(0, len(passages), count):
        title, text = passages[i]
        queries.append(f"{title} {' '.join(generator.choice(text[:-1].split(), generator.integers(1, 4)))}")
    return queries


# What follows runs in processes of its own: `options` is a dict that can be sent there.


def write_passages(options: dict[str, Any]) -> int:
    passages = make_passages(options["passages"], options["seed"])
    bar = tqdm(passages, "passages", options["passages"], disable=None, leave=False)
    Path(options["folder"], "passages").write_bytes(marshal.dumps(list(bar)))
    return Path(options["folder"], "passages").stat().st_size


def build(options: dict[str, Any]) -> dict[str, Any]:
    """What building costs, and what the built index answers from memory."""
    passages, queries, _ = _load(options)
    start = time.perf_counter()
    if options["model"]:
        dense = Dense(options["model"], index=options["index"])
        search = Search(passages, 1, 1200, _cache(options), dense)
        seconds = time.perf_counter() - start
        (file,) = _cache(options).glob("*/index.faiss")
        dense._index = dense._faiss.read_index(str(file))
        answers = [dense.ranking(query, TOP_K) for query in queries]
    else:
        bm25 = _Remembering()
        search = Search(passages, 1, 1200, _cache(options), bm25)
        seconds = time.perf_counter() - start
        answers = [bm25.from_memory(query) for query in queries]
    files = [path.stat().st_size for path in _cache(options).glob("*/*")]
    return {
        "passages": len(search.passages),
        "seconds": seconds,
        "index_bytes": sum(files),
        "peak_memory_bytes": _peak_memory(),
        "answers": answers,
    }


class _Remembering(BM25):
    def in_memory(self, passages: Any) -> Any:
        self._memory = super().in_memory(passages)
        self._vocabulary = dict(self._memory.vocab_dict)
        return self._memory

    def from_memory(self, query: str) -> Ranking:
        known = [self._vocabulary[w] for w in tokenize([query], return_ids=False)[0] if w in self._vocabulary]
        return best(self._memory.get_scores(known), TOP_K) if known else []


def reopen(options: dict[str, Any]) -> dict[str, Any]:
    passages, queries, seconds_passages = _load(options)
    index: Index = Dense(options["model"], index=options["index"]) if options["model"] else BM25()
    before = _peak_memory()
    start, cpu_start = time.perf_counter(), time.process_time()
    search = Search(passages, 1, 1200, _cache(options), index)
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
    times = []
    for query in queries:
        start = time.perf_counter()
        search.call(query)
        times.append(time.perf_counter() - start)
    return {
        "seconds_passages": seconds_passages,
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "query_seconds": times,
        "peak_memory_before_bytes": before,
        "peak_memory_bytes": _peak_memory(),
        "answers": [search.ranking(query, TOP_K) for query in queries],
    }


def _load(options: dict[str, Any]) -> tuple[list[tuple[str, str]], list[str], float]:
    start = time.perf_counter()
    passages = marshal.loads(Path(options["folder"], "passages").read_bytes())
    return passages, make_queries(passages, options["queries"], options["seed"]), time.perf_counter() - start


def _cache(options: dict[str, Any]) -> Path:
    return Path(options["folder"], "cache")


def _peak_memory() -> int:
    found = re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text(encoding="utf-8"))
    assert found, "/proc of Linux"
    return int(found[1]) * 1024


def _in_new_process(function: Callable[[dict[str, Any]], Any], options: dict[str, Any]) -> Any:
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, options).result()


def summarize(built: dict[str, Any], reopened: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Medians over the reopenings and over all their queries."""
    times = np.array([seconds for one in reopened for seconds in one["query_seconds"]])
    return {
        "build_seconds": built["seconds"],
        "index_bytes": built["index_bytes"],
        "reopen_seconds": statistics.median(one["seconds"] for one in reopened),
        "reopen_cpu_seconds": statistics.median(one["cpu_seconds"] for one in reopened),
        "query_ms_median": float(np.median(times)) * 1e3,
        "query_ms_p95": float(np.percentile(times, 95)) * 1e3,
        "first_query_ms": statistics.median(one["query_seconds"][0] for one in reopened) * 1e3,
        "peak_memory_gb_build": built["peak_memory_bytes"] / 1e9,
        "peak_memory_gb_reopen": max(one["peak_memory_bytes"] for one in reopened) / 1e9,
        "equal": all(one["answers"] == built["answers"] for one in reopened),
    }


def options_of(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--quick", action="store_true", help="20 thousand passages")
    parser.add_argument("--passages", type=int, help="default: a million")
    parser.add_argument("--queries", type=int, default=200)
    parser.add_argument("--reopenings", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", default="", help="a sentence-transformers folder: dense search; default: BM25")
    parser.add_argument("--index", choices=INDEXES, default="flat", help="of dense search")
    options = parser.parse_args(arguments)
    if options.passages is None:
        options.passages = 20_000 if options.quick else 1_000_000
    for name in ("passages", "queries", "reopenings"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} {getattr(options, name)}: must be above 0")
    if not options.out.absolute().parent.is_dir():
        parser.error(f"{options.out}: the folder {options.out.absolute().parent} does not exist; make it first")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    from benchmarks.environment import environment  # torch, which the processes started here need not load

    parsed = options_of(arguments)
    settings = {key: value for key, value in vars(parsed).items() if key != "out"}
    with tempfile.TemporaryDirectory() as folder:
        options = settings | {"folder": folder}
        size = _in_new_process(write_passages, options)
        built = _in_new_process(build, options)
        reopened = [_in_new_process(reopen, options) for _ in range(parsed.reopenings)]
    summary = summarize(built, reopened)
    result = {
        "environment": environment(),
        "settings": settings,
        "passages_bytes": size,
        "summary": summary,
        "build": {key: value for key, value in built.items() if key != "answers"},
        "reopen": [{key: value for key, value in one.items() if key != "answers"} for one in reopened],
    }
    parsed.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(summary, indent=1))
    if not summary["equal"]:
        raise SystemExit("the memory-mapped index answers otherwise than the one in memory")


if __name__ == "__main__":
    main()
