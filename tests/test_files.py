"""Files known by all of their bytes, without reading them again while they stay as they are."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from swirl_fast import files
from swirl_fast.config import ModelConfig
from swirl_fast.files import content_hash, hash_file
from swirl_fast.models.load import model_fingerprint, weights_hash
from swirl_fast.tools.search.dense import folder_hash

LONG_AGO = 1_000_000_000


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SWIRL_FAST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(files, "_hashes", {})
    return tmp_path / "cache" / "hashes"


def test_a_tensor_in_the_middle_makes_another_model(tmp_path: Path) -> None:
    """50 MB of weights; size and modification time stay as they were."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}", encoding="utf-8")
    weights = folder / "model.safetensors"
    tensors = {f"layer.{i}": torch.full((500_000,), float(i)) for i in range(25)}
    save_file(tensors, weights)
    os.utime(weights, (LONG_AGO, LONG_AGO))
    config = ModelConfig(path=str(folder))
    before = weights_hash(folder), model_fingerprint(config), folder_hash(folder)
    assert before == (weights_hash(folder), model_fingerprint(config), folder_hash(folder))
    with weights.open("r+b") as file:
        file.seek(25_000_000)
        byte = file.read(1)[0]
        file.seek(25_000_000)
        file.write(bytes([byte ^ 1]))
    os.utime(weights, (LONG_AGO, LONG_AGO))
    after = weights_hash(folder), model_fingerprint(config), folder_hash(folder)
    assert all(one != other for one, other in zip(before, after, strict=True))


@pytest.mark.parametrize("slow", [1, 1 << 30])
def test_a_file_is_read_again_only_when_it_may_have_changed(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, slow: int
) -> None:
    monkeypatch.setattr(files, "SLOW", slow)
    read: list[Path] = []
    monkeypatch.setattr(files, "hash_file", lambda path: read.append(path) or hash_file(path))
    path = tmp_path / "file"
    path.write_bytes(b"one")
    for _ in range(2):
        assert content_hash(path) == hash_file(path)
    assert len(read) == 2, "it was just written, and may be written again within the same tick"
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 60)
    for _ in range(3):
        assert content_hash(path) == hash_file(path)
    assert len(read) == 3
    files._hashes.clear()  # as in another process
    assert content_hash(path) == hash_file(path)
    assert len(read) == (3 if slow == 1 else 4)
    path.write_bytes(b"two")
    assert content_hash(path) == hash_file(path)
    other = tmp_path / "other"
    other.write_bytes(b"six")
    other.replace(path)
    assert content_hash(path) == hash_file(path)


def test_a_cache_that_cannot_be_read_or_written_costs_only_time(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "SLOW", 1)
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 60)
    path = tmp_path / "file"
    path.write_bytes(b"one")
    assert content_hash(path) == hash_file(path)
    (kept,) = cache.iterdir()
    for text in ("", "[]", "{", '{"known": 1}', '{"known": [1], "xxh64": "00"}'):
        files._hashes.clear()
        kept.write_text(text, encoding="utf-8")
        assert content_hash(path) == hash_file(path)
    files._hashes.clear()
    monkeypatch.setenv("SWIRL_FAST_CACHE", str(path))  # no folder
    assert content_hash(path) == hash_file(path)


def test_two_writers_of_a_file_do_not_meet(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file"

    def parts() -> Iterator[str]:
        yield "first "
        files.write_json(path, {"by": "another process"})
        assert files.read_json(path) == {"by": "another process"}, "whole, while this one is written"
        yield "second"

    files.write_parts(path, parts())
    assert path.read_text(encoding="utf-8") == "first second"
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("there", [True, False])
def test_a_write_that_fails_leaves_what_was_there(tmp_path: Path, there: bool) -> None:
    path = tmp_path / "file"
    if there:
        path.write_text("old", encoding="utf-8")
    for value, error in (("half of a pair \ud83d", UnicodeEncodeError), (["no text"], TypeError)):
        with pytest.raises(error):
            files.write_parts(path, ["begin", value])  # type: ignore[list-item]
    assert [one.name for one in tmp_path.iterdir()] == ["file"] * there
    assert not there or path.read_text(encoding="utf-8") == "old"


def test_a_file_is_on_disk_before_it_gets_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, seen = tmp_path / "file", list[tuple[int, bool]]()
    fsync = os.fsync
    monkeypatch.setattr(
        os, "fsync", lambda file: (seen.append((os.fstat(file).st_size, path.exists())), fsync(file))[1]
    )
    files.write_text(path, "text")
    assert seen == [(4, False)] and path.read_text(encoding="utf-8") == "text"
