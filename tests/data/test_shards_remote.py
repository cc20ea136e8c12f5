"""Shards from elsewhere: copied once and checked, the same order as in place, and every kind of damage with its outcome."""

from __future__ import annotations

import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from filelock import FileLock
from fsspec.implementations.memory import MemoryFileSystem
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from support import forks
from support.paths import ROOT
from support.runs import environment, free_port
from support.stores import FINGERPRINT, ids, make_samples, open_stream, read_samples

from swirl_fast.data import object_store, shards
from swirl_fast.data import shard_source as shard_store
from swirl_fast.data.shard_source import ShardCache, open_shards, upload_shards
from swirl_fast.data.shards import verify_shards, write_shards
from swirl_fast.data.stream import TrajectoryStream

COUNT = 40


@pytest.fixture(scope="module")
def remote(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 samples in at least six shards."""
    folder = tmp_path_factory.mktemp("store") / "shards"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "SHARD_BYTES", 24_000)
        write_shards(folder, make_samples(COUNT), fingerprint=FINGERPRINT)
    assert len(shard_names(folder)) >= 6
    return folder


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_store, "BACK_OFF", 0.001)


@pytest.fixture
def own(remote: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(remote, tmp_path / "own"))


@pytest.fixture
def copied(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that were downloaded, in order."""
    names: list[str] = []
    real = object_store.download

    def counted(url: str, target: Path) -> None:
        names.append(os.path.basename(url))
        real(url, target)

    monkeypatch.setattr(object_store, "download", counted)
    return names


def shard_names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*.mds"))


def in_shard(folder: Path, name: str) -> set[str]:
    """Ids of the trajectories in a shard of a whole folder."""
    index = json.loads((folder / "index.json").read_text())
    everything = ids(list(read_samples(folder)))
    begin = 0
    for shard in index["shards"]:
        end = begin + shard["samples"]
        if shard["raw_data"]["basename"] == name:
            return set(everything[begin:end])
        begin = end
    raise AssertionError(name)


def flip(path: Path, at: int | None = None) -> None:
    """The byte is flipped in a new file, as a copy that went wrong would be; the old one may be a link to elsewhere."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2 if at is None else at] ^= 1
    path.unlink()
    path.write_bytes(bytes(data))


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "flipped": (flip, r"is damaged \(xxh64 \w+ instead of \w+\)"),
    "truncated": (truncate, r"has \d+ bytes instead of \d+"),
    "missing": (Path.unlink, "is missing"),
}


def cached(folder: Path, cache: Path, batch: int = 4, limit: int | None = None, **more) -> TrajectoryStream:
    return open_stream(ShardCache(f"file://{folder}", cache, limit), batch, **more)


def batches(stream: TrajectoryStream, count: int) -> list[list[str]]:
    try:
        return [ids(stream.next_batch()) for _ in range(count)]
    finally:
        stream.close()


# ---- the order


@settings(
    max_examples=12, deadline=None, phases=(Phase.explicit, Phase.reuse, Phase.generate)
)  # shrinking takes minutes
@given(
    batch=st.integers(1, 50),
    world=st.integers(1, 3),
    prefetch=st.integers(0, 3),
    shuffle_shards=st.integers(0, 4),
    shards_in_cache=st.sampled_from([None, 1, 3]),
    at=st.integers(0, 3),
)
def test_cache_prefetch_and_world_change_nothing_about_the_order(
    remote: Path,
    tmp_path_factory: pytest.TempPathFactory,
    batch: int,
    world: int,
    prefetch: int,
    shuffle_shards: int,
    shards_in_cache: int | None,
    at: int,
) -> None:
    """Read in place without prefetching on one rank; and from a cache, ahead, on some ranks, resumed after `at` batches."""
    batch = max(batch, world)
    alone = batches(open_stream(remote, batch, shuffle_shards=shuffle_shards), 4)
    cache = tmp_path_factory.mktemp("cache")
    limit = shards_in_cache and shards_in_cache * max(path.stat().st_size for path in remote.glob("*.mds"))
    more = {"world": world, "prefetch": prefetch, "shuffle_shards": shuffle_shards, "limit": limit}
    streams = [cached(remote, cache, batch, rank=rank, **more) for rank in range(world)]
    found = []
    for number in range(4):
        if number == at:  # resumed by streams that have read ahead in another place
            state = json.loads(json.dumps(streams[0].state_dict()))
            for stream in streams:
                stream.close()
            streams = [cached(remote, cache, batch, rank=rank, **more) for rank in range(world)]
            for stream in streams:
                stream.next_batch()
                stream.load_state_dict(state)
        whole: list[str] = [""] * batch
        for rank, stream in enumerate(streams):
            whole[rank::world] = ids(stream.next_batch())
        assert len({json.dumps(stream.state_dict()) for stream in streams}) == 1
        found.append(whole)
    for stream in streams:
        stream.close()
    assert found == alone


def test_shuffling_within_groups_of_shards_reads_each_group_once(
    remote: Path, tmp_path: Path, copied: list[str]
) -> None:
    """An epoch in groups of two shards needs a cache of two; over all shards it would need them all."""
    names = shard_names(remote)
    of_sample = {id_: name for name in names for id_ in in_shard(remote, name)}
    largest = max(path.stat().st_size for path in remote.glob("*.mds"))
    copied.clear()
    stream = cached(remote, tmp_path / "cache", 1, limit=2 * largest, shuffle_shards=2)
    orders = [[one for batch in [ids(stream.next_batch()) for _ in range(COUNT)] for one in batch] for _ in range(2)]
    assert sorted(copied[2 : 2 + len(names)]) == names, "every shard once an epoch, behind manifest and index"
    for order in orders:
        assert len(set(order)) == COUNT
        visited = list(dict.fromkeys(of_sample[id_] for id_ in order))
        at = 0
        for group in (set(visited[i : i + 2]) for i in range(0, len(visited), 2)):
            size = sum(of_sample[id_] in group for id_ in order)
            assert {of_sample[id_] for id_ in order[at : at + size]} == group
            at += size
    groups = [frozenset(of_sample[id_] for id_ in order[:3]) for order in orders]
    assert orders[0] != orders[1] and groups[0] != groups[1]
    stream.close()


def test_what_is_read_ahead_is_not_handed_out_twice_nor_lost_by_an_error(own: Path, tmp_path: Path) -> None:
    """A shard that comes back after an error: the same batch is tried again, and the order is unbroken."""
    expected = batches(open_stream(own, 7), 12)
    name = shard_names(own)[2]
    (own / name).rename(tmp_path / name)
    stream, found, errors = cached(own, tmp_path / "cache", 7, prefetch=2), [], 0
    while len(found) < 12:
        try:
            found.append(ids(stream.next_batch()))
        except ValueError as error:
            assert name in str(error)
            errors += 1
            if not (own / name).exists():
                (tmp_path / name).rename(own / name)
    stream.close()
    assert errors
    assert found == expected


def test_batches_are_read_while_the_caller_works(remote: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = cached(remote, tmp_path / "cache", 4, prefetch=2)
    read: list[int] = []
    third = threading.Event()
    real = stream._read_next

    def noted():
        result = real()
        read.append(result[1])
        if len(read) == 3:
            third.set()
        return result

    monkeypatch.setattr(stream, "_read_next", noted)
    stream.next_batch()
    assert third.wait(20), "two batches behind the one handed out"
    time.sleep(0.05)
    assert read == [4, 8, 12], "and no more than two"
    assert stream.position == 4
    stream.close()


# ---- the cache


def test_shards_come_when_they_are_needed_and_once(remote: Path, tmp_path: Path, copied: list[str]) -> None:
    stream = cached(remote, tmp_path / "cache", 1)
    assert copied == ["manifest.json", "index.json"]
    stream.next_batch()
    assert len(copied) == 3 and copied[2].endswith(".mds")
    for _ in range(2 * COUNT):
        stream.next_batch()
    assert sorted(copied[2:]) == shard_names(remote)
    folder = stream.store.folder
    assert folder.parent == tmp_path / "cache"
    for name in shard_names(remote):
        assert (folder / name).read_bytes() == (remote / name).read_bytes()
    copied.clear()
    batches(cached(remote, tmp_path / "cache", 1), COUNT)
    assert copied == ["manifest.json"], "a second run finds the shards there"


def test_a_plain_folder_is_read_in_place(remote: Path, tmp_path: Path, copied: list[str]) -> None:
    batches(open_stream(open_shards(str(remote), tmp_path / "cache"), 4), 3)
    assert copied == [] and not (tmp_path / "cache").exists()


def test_what_was_damaged_in_the_cache_is_copied_anew(remote: Path, tmp_path: Path, copied: list[str]) -> None:
    """Bytes flipped, cut off, removed, and a killed download's leftovers."""
    expected = batches(cached(remote, tmp_path / "cache"), 10)
    folder = next(path for path in (tmp_path / "cache").iterdir() if path.is_dir())
    names = shard_names(folder)
    flip(folder / names[0])
    truncate(folder / names[1])
    (folder / names[2]).unlink()
    flip(folder / "index.json")
    (folder / f"{names[2]}.tmp").mkdir()
    (folder / f"{names[2]}.tmp" / names[2]).write_bytes(b"cut of")
    copied.clear()
    assert batches(cached(remote, tmp_path / "cache"), 10) == expected
    assert sorted(copied) == ["index.json", "manifest.json", *names[:3]]
    assert not list(folder.glob("*.tmp"))


def test_what_is_cut_off_or_removed_in_the_cache_while_it_is_read_is_copied_anew(remote: Path, tmp_path: Path) -> None:
    expected = batches(open_stream(remote, COUNT), 3)
    stream = cached(remote, tmp_path / "cache", COUNT)
    found = [ids(stream.next_batch())]
    names = shard_names(stream.store.folder)
    truncate(stream.store.folder / names[0])
    (stream.store.folder / names[1]).unlink()
    assert found + batches(stream, 2) == expected


def test_the_shards_used_least_recently_leave(remote: Path, tmp_path: Path) -> None:
    names = shard_names(remote)
    sizes = [(remote / name).stat().st_size for name in names]
    store = ShardCache(f"file://{remote}", tmp_path / "cache", sum(sizes[:3]) + max(sizes) // 2)
    for i in (0, 1, 2, 0):
        assert store.fetch(names[i]) is None
    store.fetch(names[3])
    assert shard_names(store.folder) == [names[0], names[2], names[3]]
    # shards of other data in the same cache leave in the same way
    other = tmp_path / "cache" / "other" / "shard.00000.mds"
    other.parent.mkdir()
    other.write_bytes(b"x" * sum(sizes[:2]))
    os.utime(other, ns=(1, 1))
    store.fetch(names[4])
    assert not other.exists()
    with pytest.raises(
        ValueError, match=r"training.shards_cache_limit is 100 bytes and the largest shard of .* has \d+: raise it"
    ):
        ShardCache(f"file://{remote}", tmp_path / "cache", 100)


def test_one_of_many_copies_and_the_others_wait(
    remote: Path, tmp_path: Path, copied: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    stores = [ShardCache(f"file://{remote}", tmp_path / "cache") for _ in range(4)]
    copied.clear()
    real = object_store.download

    def slow(url: str, target: Path) -> None:
        time.sleep(0.1)
        real(url, target)

    monkeypatch.setattr(object_store, "download", slow)
    threads = [threading.Thread(target=store.fetch, args=("shard.00000.mds",)) for store in stores]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert copied == ["shard.00000.mds"]


READER = """
import json, sys
sys.path[:0] = {paths!r}
from swirl_fast.data.shard_source import ShardCache
from swirl_fast.data.stream import TrajectoryStream
from swirl_fast.data import object_store
real, copied = object_store.download, []
object_store.download = lambda url, target: (copied.append(url), real(url, target))
rank = int(sys.argv[1])
stream = TrajectoryStream(
    ShardCache({url!r}, {cache!r}, {limit!r}), global_batch=8, rank=rank, world_size=2, seed=5, prefetch=2
)
batches = [[s.trajectory.id for s in stream.next_batch()] for _ in range(15)]
print(json.dumps([batches, [name.rsplit("/", 1)[1] for name in copied]]))
stream.close()
"""


@pytest.mark.parametrize("shards_in_cache", [None, 2])
def test_processes_share_a_cache(remote: Path, tmp_path: Path, shards_in_cache: int | None) -> None:
    """Two at once: each shard is copied by one of them, or, where the limit removes what the other needs, again and again; the
    batches are the same."""
    limit = shards_in_cache and shards_in_cache * max(path.stat().st_size for path in remote.glob("*.mds"))
    code = READER.format(paths=[str(ROOT)], url=f"file://{remote}", cache=str(tmp_path / "cache"), limit=limit)
    readers = [forks.Fork(["-c", code, rank], environment()) for rank in "01"]
    assert [reader.wait(timeout=120) for reader in readers] == [0, 0]
    outputs = [reader.printed()[0] for reader in readers]
    (first, copied_first), (second, copied_second) = (json.loads(output.splitlines()[-1]) for output in outputs)
    alone = batches(open_stream(remote, 8), 15)
    assert (first, second) == ([batch[0::2] for batch in alone], [batch[1::2] for batch in alone])
    if limit is None:
        copied = [name for name in copied_first + copied_second if name.endswith(".mds")]
        assert sorted(copied) == shard_names(remote)


def test_a_download_that_fails_is_tried_again(remote: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three times cut off or refused, then whole; and a store that never answers is no damage, also where bad shards are skipped."""
    real, tries = object_store.download, []

    def failing(url: str, target: Path) -> None:
        tries.append(url)
        if url.endswith(".mds") and len(tries) % 4 == 1:
            raise ConnectionError("reset by peer")
        real(url, target)
        if url.endswith(".mds") and len(tries) % 4 in (2, 3):
            truncate(target)

    store = ShardCache(f"file://{remote}", tmp_path / "cache")
    monkeypatch.setattr(object_store, "download", failing)
    assert store.fetch("shard.00000.mds") is None
    assert len(tries) == 4

    def dead(*_: object) -> None:
        raise ConnectionError("reset by peer")

    monkeypatch.setattr(object_store, "download", dead)
    with pytest.raises(OSError, match="shard.00001.mds cannot be downloaded .ConnectionError: reset by peer.*4 tries"):
        store.fetch("shard.00001.mds")
    with pytest.raises(OSError, match="shard.00001.mds cannot be downloaded"):
        open_stream(store, 4, skip_bad=True)


def test_what_the_stores_say_about_a_file_that_is_not_there() -> None:
    """As botocore, google-cloud-storage, azure and huggingface_hub say it; other refusals are no missing file."""

    class Refused(Exception):
        pass

    def error(**values: object) -> Refused:
        one = Refused()
        vars(one).update(values)
        return one

    class Offline(FileNotFoundError):
        """As huggingface_hub's LocalEntryNotFoundError: no network."""

    response = type("Response", (), {"status_code": 404})()
    for missing in (
        FileNotFoundError("x"),
        error(response={"Error": {"Code": "404"}}),
        error(response={"Error": {"Code": "NoSuchKey"}}),
        error(code=404),
        error(status_code=404),
        error(response=response),
    ):
        assert shard_store._not_found(missing)
    for other in (
        ConnectionResetError("x"),
        PermissionError("x"),
        Offline("x"),
        error(),
        error(code=503),
        error(response={"Error": {"Code": "403"}}),
        error(response=None),
    ):
        assert not shard_store._not_found(other)


@pytest.mark.parametrize(
    ("url", "package"), [("s3://bucket/x", "s3fs"), ("gs://b/x", "gcsfs"), ("sftp://h/x", "paramiko")]
)
def test_a_missing_client_is_an_error_with_the_line_that_installs_it(
    url: str, package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=f"{url}/manifest.json needs a package .*pip install {package}"):
        ShardCache(url, tmp_path / "cache")


class Hub(BaseHTTPRequestHandler):
    """As much of the Hugging Face hub as one download needs."""

    folder: Path

    def do_HEAD(self) -> None:
        self.answer(False)

    def do_GET(self) -> None:
        self.answer(True)

    def answer(self, body: bool) -> None:
        found = re.fullmatch(r"/datasets/org/name/resolve/main/runs/1/([\w.]+)", self.path)
        path = self.folder / found.group(1) if found else self.folder / "none"
        if not path.is_file():
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        data = path.read_bytes()
        self.send_response(200)
        self.send_header("X-Repo-Commit", "0" * 40)
        self.send_header("ETag", f'"{path.name}"')
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if body:
            self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


def test_over_http_as_from_the_hugging_face_hub(own: Path, tmp_path: Path) -> None:
    """The hub's own client against a server here: a whole epoch with a shard that is not there, skipped and then an error."""
    name = shard_names(own)[3]
    lost = in_shard(own, name)
    (own / name).unlink()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Here", (Hub,), {"folder": own}))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    code = (
        f"import sys, json; sys.path[:0] = {[str(ROOT)]!r}\n"
        "from swirl_fast.data.shard_source import ShardCache\n"
        "from swirl_fast.data.stream import TrajectoryStream\n"
        f"store = ShardCache('hf://datasets/org/name/runs/1', {str(tmp_path / 'cache')!r})\n"
        "def stream(skip):\n"
        "    return TrajectoryStream(store, global_batch=1, rank=0, world_size=1, seed=5, skip_bad=skip)\n"
        "one = stream(True)\n"
        f"ids = [one.next_batch()[0].trajectory.id for _ in range({COUNT - len(lost)})]\n"
        "print(json.dumps([ids, one.skipped_samples]))\n"
        "one = stream(False)\n"
        f"for _ in range({COUNT}): one.next_batch()\n"
    )
    env = {**os.environ, "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HUB_OFFLINE": "0"}
    env |= {"HF_HUB_DISABLE_XET": "1", "HF_HOME": str(tmp_path / "home"), "NO_PROXY": "127.0.0.1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, timeout=120)
    server.shutdown()
    server.server_close()
    assert done.stdout, done.stderr[-3000:]
    found, skipped = json.loads(done.stdout.splitlines()[-1])
    assert skipped == len(lost)
    assert sorted(found) == sorted(set(ids(make_samples(COUNT))) - lost)
    assert f"ValueError: hf://datasets/org/name/runs/1/{name} is missing: upload the shards again" in done.stderr


# ---- bad shards


@pytest.mark.parametrize("kind", DAMAGE)
@pytest.mark.parametrize("prefetch", [0, 2])
def test_a_bad_remote_shard_stops_the_batch_that_needs_it(own: Path, tmp_path: Path, kind: str, prefetch: int) -> None:
    expected = batches(open_stream(own, 4), 12)
    name = shard_names(own)[1]
    lost = in_shard(own, name)
    harm, words = DAMAGE[kind]
    harm(own / name)
    stream = cached(own, tmp_path / "cache", prefetch=prefetch)
    whole = next(number for number, batch in enumerate(expected) if lost & set(batch))
    for batch in expected[:whole]:
        assert ids(stream.next_batch()) == batch
    message = rf"file://.*/{name} {words}: upload the shards again, or set training.bad_shards=skip to go on without its {len(lost)} traj"
    for _ in range(2):
        with pytest.raises(ValueError, match=message):
            stream.next_batch()
    assert stream.position == 4 * whole
    stream.close()
    assert not (stream.store.folder / name).exists(), "what is bad gets no final name"


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_bad_local_shard_stops_before_training(own: Path, kind: str) -> None:
    name = shard_names(own)[1]
    count = len(in_shard(own, name))
    harm, words = DAMAGE[kind]
    harm(own / name)
    message = rf"{own}/{name} {words}: run filter again, or copy the folder again, or set training.bad_shards=skip .* its {count} traj"
    with pytest.raises(ValueError, match=message):
        open_stream(own, 4)


@pytest.mark.parametrize("kind", ["truncated", "missing"])
@pytest.mark.parametrize("skip", [False, True])
def test_a_local_shard_that_goes_bad_while_it_is_read_is_named(own: Path, kind: str, skip: bool) -> None:
    stream = open_stream(own, COUNT, skip_bad=skip)
    stream.next_batch()
    name = shard_names(own)[1]
    harm, words = DAMAGE[kind]
    harm(own / name)
    remedy = "start again to go on without it" if skip else "set training.bad_shards=skip"
    with pytest.raises(ValueError, match=rf"{name} {words}: .*{remedy}"):
        stream.next_batch()


@pytest.mark.parametrize("kind", DAMAGE)
@pytest.mark.parametrize("place", ["local", "remote"])
def test_bad_shards_are_skipped_and_counted(own: Path, tmp_path: Path, kind: str, place: str) -> None:
    """Two of them: the others' trajectories come in the order they had, each once an epoch, on one rank and on three."""
    names = [shard_names(own)[i] for i in (0, 4)]
    lost = set().union(*(in_shard(own, name) for name in names))
    expected = [id_ for batch in batches(open_stream(own, COUNT), 3) for id_ in batch if id_ not in lost]
    harm, words = DAMAGE[kind]
    for name in names:
        harm(own / name)

    def opened(rank: int, world: int) -> TrajectoryStream:
        if place == "local":
            return open_stream(own, 4, rank, world, skip_bad=True)
        return cached(own, tmp_path / "cache", rank=rank, world=world, skip_bad=True)

    stream = opened(0, 1)
    assert list(stream.problems) == list(stream.skipped) == names
    assert all(re.fullmatch(words, problem) for problem in stream.problems.values())
    assert stream.skipped_samples == len(lost) > 2
    count = len(expected) // 4
    alone = batches(stream, count)
    assert [id_ for batch in alone for id_ in batch] == expected[: 4 * count]
    streams = [opened(rank, 3) for rank in range(3)]
    for batch in alone:
        shares = [ids(stream.next_batch()) for stream in streams]
        assert shares == [batch[rank::3] for rank in range(3)]
        assert streams[0].state_dict() == streams[1].state_dict() == streams[2].state_dict()


def test_ranks_skip_what_any_of_them_found(own: Path, tmp_path: Path) -> None:
    """Two machines with a copy each, one of them damaged: the first rank learns it from the second."""
    other = Path(shutil.copytree(own, tmp_path / "other"))
    name = shard_names(own)[2]
    lost = in_shard(own, name)
    flip(other / name)
    streams = [open_stream(folder, 4, rank, 2, skip_bad=True, prefetch=2) for rank, folder in enumerate((own, other))]
    streams[0].next_batch()
    for coming in streams[0]._coming:  # read ahead, which must be forgotten
        coming.result()
    streams[0].load_state_dict({**streams[0].state_dict(), "position": 0})
    assert [list(stream.problems) for stream in streams] == [[], [name]]
    for stream in streams:
        stream.skip({**streams[0].problems, **streams[1].problems})
    seen: list[str] = []
    while len(seen) < COUNT - len(lost):
        shares = [ids(stream.next_batch()) for stream in streams]
        seen += [id_ for pair in zip(*shares, strict=True) for id_ in pair]
        assert streams[0].state_dict() == streams[1].state_dict()
    assert set(seen[: COUNT - len(lost)]) == set(ids(make_samples(COUNT))) - lost
    for stream in streams:
        stream.close()


TRAINER_RANK = """
import json, os, sys
sys.path[:0] = {paths!r}
from swirl_fast.config import load
from swirl_fast.ranks import start, stop
from swirl_fast.training import build
ranks = start()
folder = {folders!r}[ranks.rank]
config = load(None, ["training.trajectories_per_step=4", "training.bad_shards=skip", "run.seed=5", "training.shards=" + folder])
try:
    stream = build.open_stream(config, ranks)
    stream.next_batch()
    print(json.dumps([stream.skipped_samples, stream.state_dict()]))
    stream.close()
except ValueError as error:
    print(error)
stop()
"""


def trainer_ranks(folders: list[Path]) -> list[list[str]]:
    """Lines that each of two ranks prints when it opens the stream as `train` does, on the folder of its machine."""
    code = TRAINER_RANK.format(paths=[str(ROOT), str(ROOT / "kernels")], folders=[str(folder) for folder in folders])
    ranks = [forks.Fork(["-c", code], env) for env in forks.ranks_of(2, environment(), free_port())]
    assert [rank.wait(timeout=120) for rank in ranks] == [0, 0]
    outputs = [rank.printed()[0] for rank in ranks]
    return [output.splitlines() for output in outputs]


def test_the_trainer_makes_all_ranks_skip_alike(own: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(own, tmp_path / "other"))
    names = shard_names(own)
    first, second = (len(in_shard(own, name)) for name in names[:2])
    flip(other / names[0])
    (own / names[1]).unlink()
    (*printed, one), (*silent, two) = trainer_ranks([own, other])
    assert one == two
    skipped, state = json.loads(one)
    assert skipped == first + second and sorted(state["skipped"]) == names[:2]
    assert silent == []
    assert printed == [
        f"train: {own / names[0]} {state['skipped'][names[0]]}; its {first} trajectories are skipped (training.bad_shards=skip)",
        f"train: {own / names[1]} is missing; its {second} trajectories are skipped (training.bad_shards=skip)",
    ]


def test_the_trainer_refuses_ranks_with_other_shards(own: Path, tmp_path: Path) -> None:
    write_shards(tmp_path / "other", make_samples(COUNT, seed=1), fingerprint=FINGERPRINT)
    for lines in trainer_ranks([own, tmp_path / "other"]):
        assert "is not the same on all ranks" in lines[-1]


def test_a_shard_that_breaks_between_two_starts_leaves_the_rest_of_the_order(own: Path) -> None:
    """What was handed out of it stays handed out, the rest of it is left out; resumed again after it was repaired, it stays out."""
    order = [id_ for batch in batches(open_stream(own, 4), 30) for id_ in batch]
    stream = open_stream(own, 4)
    handed = [id_ for _ in range(5) for id_ in ids(stream.next_batch())]
    state = json.loads(json.dumps(stream.state_dict()))
    name = shard_names(own)[3]
    lost = in_shard(own, name)
    whole = (own / name).read_bytes()
    flip(own / name)
    stream = open_stream(own, 4, skip_bad=True)
    stream.load_state_dict(state)
    handed += [id_ for _ in range(5) for id_ in ids(stream.next_batch())]
    state = json.loads(json.dumps(stream.state_dict()))
    (own / name).write_bytes(whole)
    for skip_bad in (True, False):
        stream = open_stream(own, 4, skip_bad=skip_bad)
        assert not stream.problems
        stream.load_state_dict(state)
        assert stream.skipped_samples == len(lost)
        rest = [id_ for _ in range(10) for id_ in ids(stream.next_batch())]
        expected = order[:20] + [id_ for id_ in order[20:] if id_ not in lost]
        assert handed + rest == expected[:80]


def test_skipping_stops_when_nothing_is_left_or_the_index_is_bad(own: Path, tmp_path: Path) -> None:
    for name in shard_names(own):
        flip(own / name)
    with pytest.raises(ValueError, match="no shard of .* can be used: shard.00000.mds is damaged"):
        open_stream(own, 4, skip_bad=True)
    with pytest.raises(ValueError, match="no shard of file:.* can be used: shard.00000.mds is damaged"):
        cached(own, tmp_path / "cache", skip_bad=True)
    flip(own / "index.json")
    for opened in (lambda: open_stream(own, 4, skip_bad=True), lambda: cached(own, tmp_path / "new", skip_bad=True)):
        with pytest.raises(ValueError, match="index.json is damaged"):
            opened()
    flip(own / "manifest.json", at=20)
    with pytest.raises(ValueError, match="file://.*/manifest.json is damaged"):
        cached(own, tmp_path / "cache")
    (own / "manifest.json").unlink()
    with pytest.raises(ValueError, match="file://.*/manifest.json is missing: .* is not a complete shard folder"):
        cached(own, tmp_path / "cache")


# ---- uploading


def test_uploaded_shards_are_whole_and_the_manifest_comes_last(
    remote: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, sent = object_store.upload, []

    def noted(source: Path, url: str) -> None:
        sent.append(source.name)
        real(source, url)

    monkeypatch.setattr(object_store, "upload", noted)
    target = tmp_path / "a" / "store"
    assert upload_shards(remote, f"file://{target}")
    assert sorted(sent) == sorted(path.name for path in remote.iterdir()) and sent[-1] == "manifest.json"
    verify_shards(target)
    assert (remote / "index.json").exists(), "a copy was sent"
    assert not upload_shards(remote, str(target)), "there already"
    assert len(sent) == len(list(remote.iterdir()))
    other = tmp_path / "other"
    write_shards(other, make_samples(3), fingerprint=FINGERPRINT)
    assert upload_shards(other, str(target))
    assert batches(cached(target, tmp_path / "cache", 3), 1) == batches(open_stream(other, 3), 1)


@pytest.mark.parametrize("scheme", ["", "file://"])
def test_an_upload_of_fewer_shards_leaves_a_folder_that_can_be_read(remote: Path, tmp_path: Path, scheme: str) -> None:
    other, target = tmp_path / "other", tmp_path / "store"
    write_shards(other, make_samples(3), fingerprint=FINGERPRINT)
    assert upload_shards(remote, f"{scheme}{target}") and len(shard_names(target)) > len(shard_names(other))
    (target / "shard.mine.mds").write_bytes(b"")  # another name than ours is not touched
    assert upload_shards(other, f"{scheme}{target}")
    assert shard_names(target) == [*shard_names(other), "shard.mine.mds"]
    (target / "shard.mine.mds").unlink()
    assert batches(open_stream(target, 3), 1) == batches(open_stream(other, 3), 1)
    shutil.copy(other / shard_names(other)[0], target / "shard.00009.mds")  # killed between the two
    assert not upload_shards(other, f"{scheme}{target}"), "there already"
    verify_shards(target)


def test_a_target_that_cannot_be_written_is_named(
    remote: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Refused(Exception):
        """As botocore's, a kind of its own."""

    def refused(*_: object) -> None:
        raise Refused("no such bucket")

    monkeypatch.setattr(object_store, "upload", refused)
    with pytest.raises(
        OSError, match=rf"{tmp_path}/x cannot be written .Refused: no such bucket.*the shards lie in {remote}"
    ):
        upload_shards(remote, str(tmp_path / "x"))
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(ImportError, match="s3://bucket/x/manifest.json needs a package .*pip install s3fs"):
        upload_shards(remote, "s3://bucket/x")


def test_a_lock_of_a_dead_process_holds_nobody_up(remote: Path, tmp_path: Path) -> None:
    """A reader killed while it downloads: its lock goes with it, its half file is removed."""
    store = ShardCache(f"file://{remote}", tmp_path / "cache")
    name = shard_names(remote)[0]
    code = (
        "import sys, time, pathlib\nfrom filelock import FileLock\n"
        f"folder = pathlib.Path({str(store.folder)!r})\n"
        f"lock = FileLock(folder / '.{name}.lock')\nlock.acquire()\n"
        f"(folder / '{name}.tmp').mkdir(); (folder / '{name}.tmp' / '{name}').write_bytes(b'half')\n"
        "print('held', flush=True); time.sleep(600)\n"
    )
    holder = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    with pytest.raises(TimeoutError):
        FileLock(store.folder / f".{name}.lock", timeout=0.1).acquire()
    holder.kill()
    holder.wait()
    holder.stdout.close()
    assert store.fetch(name) is None
    assert (store.folder / name).read_bytes() == (remote / name).read_bytes()
    assert not list(store.folder.glob("*.tmp"))


def test_other_stores_are_reached_through_fsspec(remote: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own store in memory, which needs no server, in the place of s3://: uploaded, read back, and a file that is not there."""
    registry = importlib.import_module("fsspec.registry")
    in_memory = type("InMemory", (MemoryFileSystem,), {"protocol": "s3", "store": {}})
    monkeypatch.setitem(registry._registry, "s3", in_memory)
    assert upload_shards(remote, "s3://bucket/shards")
    assert not upload_shards(remote, "s3://bucket/shards"), "there already"
    stream = open_stream(ShardCache("s3://bucket/shards", tmp_path / "cache"), 7)
    assert batches(stream, 3) == batches(open_stream(remote, 7), 3)
    with pytest.raises(
        ValueError, match="s3://bucket/none/manifest.json is missing: .* is not a complete shard folder"
    ):
        ShardCache("s3://bucket/none", tmp_path / "cache")


def test_sizes_with_a_unit(tmp_path: Path) -> None:
    assert [shard_store._bytes(size) for size in ("1kb", "1.5MB", "2gb", "0.5tb")] == [1024, 3 << 19, 2 << 30, 1 << 39]
