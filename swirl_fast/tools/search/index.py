"""What a search index is, and its place on disk: built once, opened by every process, checked for damage.

An index lies in a folder of the cache named by the hash of the passages and of everything the index depends on. It is
built in a folder KEY.tmp that is renamed when complete; a manifest with the size and xxh3 of every file is checked on
opening, because flipped bytes would be read silently. Processes that want the same index wait for one another at a
lock file, which the system releases when its holder dies.

Opening reads every passage and every file once and parses nothing: 0.46 s of processor time for 1 million passages of
398 MB and their BM25 index of 423 MB in the page cache (benchmarks/search.py).
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import marshal
import os
import shutil
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import xxhash

Passages = Sequence[tuple[str, str]]  # (title, text)

_BLOCK = 1000  # passages hashed at a time: a quarter faster than 10,000, which leave the processor's cache


class Index(Protocol):
    settings: Any  # can be written as JSON: what a built index depends on beside the passages

    def build(self, passages: Passages, folder: Path) -> None:
        """Writes the index into `folder`, which it makes, or finds as a builder that was killed left it."""
        ...

    def open(self, folder: Path) -> None:
        """Memory-maps what `build` wrote."""
        ...

    def ranking(self, query: str, k: int) -> list[tuple[int, float]]:
        """(passage, score) of at most k passages, best first; of two equal scores the earlier passage comes first.
        Never raises for a query."""
        ...


def open_cached(index: Index, passages: Passages, cache: Path) -> None:
    """Opens the index of the passages, built first when it is missing, partial or damaged (then with a warning).
    Raises OSError for a cache that cannot be written."""
    cache.mkdir(parents=True, exist_ok=True)
    key = _key(index.settings, passages)
    folder, temporary = cache / key, cache / f"{key}.tmp"
    with open(cache / f"{key}.lock", "w", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if folder.exists() and (damage := _damage(folder)):
            warnings.warn(f"{folder}: {damage}; the search index is built again", stacklevel=3)
            shutil.rmtree(folder)
        if not folder.exists():
            index.build(passages, temporary)
            _seal(temporary)
            temporary.rename(folder)
        index.open(folder)


def _key(settings: Any, passages: Passages) -> str:
    digest = xxhash.xxh3_128(json.dumps(settings, sort_keys=True).encode())
    for start in range(0, len(passages), _BLOCK):
        # format 0 writes equal strings alike and knows no references between objects; three times as fast as encoding
        # string by string
        digest.update(marshal.dumps([*passages[start : start + _BLOCK]], 0))
    return digest.hexdigest()


def _seal(folder: Path) -> None:
    """Writes the manifest; everything is on the disk when it returns."""
    manifest = {}
    for file in sorted(folder.iterdir()):
        manifest[file.name] = [file.stat().st_size, _hash(file)]
        _to_disk(file)
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    _to_disk(folder / "manifest.json")


def _damage(folder: Path) -> str:
    """What is wrong with an index on disk, empty when nothing is."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        for name, (size, digest) in manifest.items():
            if (folder / name).stat().st_size != size or _hash(folder / name) != digest:
                return f"{name} is damaged"
    except (OSError, ValueError, TypeError, AttributeError) as error:
        return f"not a complete index ({error})"
    return ""


def _hash(file: Path) -> str:
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, xxhash.xxh3_64).hexdigest()


def _to_disk(file: Path) -> None:
    with open(file, "rb") as stream:
        os.fsync(stream.fileno())
