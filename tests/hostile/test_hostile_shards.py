"""Shards of a stranger: hashes that fit, and an index or a manifest that would run code or write elsewhere."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.mds_library import streaming
from support.stores import FINGERPRINT, make_samples

from swirl_fast.data import shards
from swirl_fast.data.shard_source import open_shards
from swirl_fast.data.shards import verify_shards, write_shards
from swirl_fast.data.stream import TrajectoryStream
from swirl_fast.files import hash_file

PLACES = ["folder", "remote"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(shards, "SHARD_BYTES", 20_000)
    write_shards(tmp_path / "shards", make_samples(13), fingerprint=FINGERPRINT)
    return tmp_path / "shards"


def edit(folder: Path, name: str, change: Callable[[dict[str, Any]], Any]) -> None:
    """Changes a JSON file of the folder, and seals the manifest again."""
    body = json.loads((folder / name).read_text(encoding="utf-8"))
    change(body)
    (folder / name).write_text(json.dumps(body), encoding="utf-8")
    seal(folder)


def seal(folder: Path) -> None:
    path = folder / "manifest.json"
    body = json.loads(path.read_text(encoding="utf-8"))
    body.pop("xxh64")
    for name, entry in body["files"].items() if isinstance(body["files"], dict) else ():
        if name in ("index.json", "shard.00000.mds") and "bytes" in entry and type(entry["bytes"]) is int:
            file = folder / name
            entry |= {"bytes": file.stat().st_size, "xxh64": hash_file(file)}
    path.write_text(json.dumps({**body, "xxh64": shards._hash_json(body)}), encoding="utf-8")


def read(folder: Path, place: str, cache: Path) -> None:
    location = str(folder) if place == "folder" else f"file://{folder}"
    stream = TrajectoryStream(open_shards(location, cache), global_batch=13, rank=0, world_size=1, seed=0)
    try:
        stream.next_batch()
    finally:
        stream.close()


class Payload:
    """Creates a file where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("place", PLACES)
def test_pickled_columns_run_nothing(tmp_path: Path, place: str) -> None:
    """A folder as the library writes it for columns of encoding pkl; a reader that believes its index runs them."""
    ran, forged = tmp_path / "ran", tmp_path / "shards"
    write_shards(forged, make_samples(1), fingerprint=FINGERPRINT)
    manifest = (forged / "manifest.json").read_bytes()
    shutil.rmtree(forged)
    columns = {"tokens": "ndarray:int32", "spans": "ndarray:int32", "logprobs": "ndarray:float32", "meta": "pkl"}
    with streaming().MDSWriter(columns=columns, out=str(forged)) as writer:
        zero = np.zeros((1,), np.int32)
        writer.write({"tokens": zero, "spans": zero, "logprobs": zero.astype(np.float32), "meta": Payload(ran)})
    (forged / "manifest.json").write_bytes(manifest)
    seal(forged)
    with pytest.raises(ValueError, match="index.json: column_encodings of shard.00000.mds is .*'pkl'.* instead of"):
        read(forged, place, tmp_path / "cache")
    assert not ran.exists()
    with pytest.raises(ValueError, match="column_encodings"):
        verify_shards(forged)
    streaming().LocalDataset(str(forged))[0]
    assert ran.exists(), "the forged folder does what it is said to do"


INDEX_CHANGES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "column_names": lambda shard: shard["column_names"].reverse(),
    "column_sizes": lambda shard: shard.update(column_sizes=[8, None, None, None]),
    "format": lambda shard: shard.update(format="csv"),
    "compression": lambda shard: shard.update(compression="zstd"),
    "hashes": lambda shard: shard.update(hashes=["sha1"]),
    "version": lambda shard: shard.update(version=2.0),
    "zip_data": lambda shard: shard.update(zip_data={"basename": "x.zstd", "bytes": 1, "hashes": {}}),
    "raw_data": lambda shard: shard["raw_data"].update(basename="../../settings.cfg"),
    "samples": lambda shard: shard.update(samples=True),
    "size_limit": lambda shard: shard.update(size_limit="64mb"),
    "is not described": lambda shard: shard.update(more=1),
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("key", INDEX_CHANGES)
def test_an_index_that_filter_would_not_write_is_refused(folder: Path, tmp_path: Path, key: str, place: str) -> None:
    read(folder, place, tmp_path / "cache")
    edit(folder, "index.json", lambda index: INDEX_CHANGES[key](index["shards"][0]))
    with pytest.raises(ValueError, match=f"index.json: (shard.00000.mds )?{key}"):
        read(folder, place, tmp_path / "cache")


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(
    "text", ["[]", "{}", '{"version": 2, "shards": 1}', "[" * 100_000, '{"version": 2, "shards": []}', "\0"]
)
def test_an_index_of_another_shape_is_refused(folder: Path, tmp_path: Path, text: str, place: str) -> None:
    (folder / "index.json").write_text(text, encoding="utf-8")
    seal(folder)
    with pytest.raises(ValueError, match=r"index.json (is not|has)"):
        read(folder, place, tmp_path / "cache")


NAMES = [
    "../../settings.cfg",
    "/tmp/x.mds",
    "..",
    "a/b.mds",
    "a\\b.mds",
    "a\n.mds",
    "",
    "shard.00000.mds ",
    "shard.00099.mds",
    "x.py",
]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", NAMES)
def test_names_of_other_files_are_refused_and_nothing_is_written(
    folder: Path, tmp_path: Path, name: str, place: str
) -> None:
    """The last shard under another name, in manifest and index: from a cache it would be written there."""
    cache, aim = tmp_path / "a" / "cache", tmp_path / "a" / "settings.cfg"
    cache.mkdir(parents=True)
    aim.write_text("ours", encoding="utf-8")
    (tmp_path / "settings.cfg").write_text("theirs", encoding="utf-8")
    deep = tmp_path / "deep" / "deeper" / "shards"
    shutil.copytree(folder, deep)
    (tmp_path / "deep" / "settings.cfg").write_bytes((folder / "shard.00001.mds").read_bytes())
    edit(deep, "index.json", lambda index: index["shards"][1]["raw_data"].update(basename=name))

    def rename(manifest: dict[str, Any]) -> None:
        manifest["files"][name] = manifest["files"].pop("shard.00001.mds")

    edit(deep, "manifest.json", rename)
    if place == "folder":
        (deep / "shard.00001.mds").unlink()
    with pytest.raises(ValueError, match="manifest.json names a file "):
        read(deep, place, cache)
    assert aim.read_text(encoding="utf-8") == "ours"
    assert list(cache.rglob("*")) == []


MANIFEST_CHANGES: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "huge": (lambda body: body["files"]["shard.00001.mds"].update(bytes=1 << 60), "bytes 1152921504606846976, not a whole number below"),
    "negative": (lambda body: body["files"]["shard.00001.mds"].update(bytes=-1), "bytes -1, not a whole"),
    "text": (lambda body: body["files"]["shard.00001.mds"].update(bytes="1"), "bytes '1', not a whole"),
    "bool": (lambda body: body["files"]["shard.00001.mds"].update(bytes=True), "bytes True, not a whole"),
    "hash": (lambda body: body["files"]["shard.00001.mds"].update(xxh64="../x"), "xxh64 '../x', not 16 hex digits"),
    "entry": (lambda body: body["files"].update({"shard.00001.mds": {"bytes": 1, "xxh64": "0" * 16, "mode": 1}}), "in the place of bytes"),
    "none": (lambda body: body.update(files={}), "names no shard"),
    "list": (lambda body: body.update(files=["index.json"]), "names no shard"),
    "more": (lambda body: body.update(command="rm"), "does not say what a manifest"),
    "count": (lambda body: body.update(trajectories=1.5), "does not say what a manifest"),
    "large count": (lambda body: body.update(tokens=1 << 70), "does not say what a manifest"),
    "stop ids": (lambda body: body.update(stop_ids=["x"]), "does not say what a manifest"),
    "longest": (lambda body: body.update(longest_state={"id": 1, "tokens": 1}), "does not say what a manifest"),
    "verdicts": (lambda body: body["verdicts"].update(OTHER=1), "does not say what a manifest"),
}  # fmt: skip


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("what", MANIFEST_CHANGES)
def test_a_manifest_that_filter_would_not_write_is_refused(folder: Path, tmp_path: Path, what: str, place: str) -> None:
    change, words = MANIFEST_CHANGES[what]
    edit(folder, "manifest.json", change)
    with pytest.raises(ValueError, match=f"manifest.json.*{words}"):
        read(folder, place, tmp_path / "cache")
