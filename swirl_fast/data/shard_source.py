"""Where shards are read from: a folder in place, or an object store through a local cache.

    ShardFolder   a plain path
    ShardCache    a URL of any kind that object_store.py knows: s3://, gs://, hf://datasets/ORG/NAME, …; file:// copies from a
                  slow file system in the same way

The store's client downloads, and the rest is done here: a shard comes under a temporary name, is compared with the manifest, synced and
renamed, and only one process a machine does that (a lock file a shard, let go by the kernel when its holder dies). So a
file in the cache is whole, or was damaged later: each process hashes it once before it reads from it.

Nothing is kept in shared memory, as StreamingDataset would: a killed run leaves files in the cache, which are right, and
at most a folder NAME.tmp, which the next download of that shard removes.
"""

from __future__ import annotations

import os
import random
import re
import shutil
import tempfile
import time
import weakref
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from filelock import FileLock

from swirl_fast.data import object_store
from swirl_fast.data.object_store import check_client, is_url
from swirl_fast.data.shard_index import INDEX, check_index
from swirl_fast.data.shards import MANIFEST, REMEDY, Manifest, find_damage, parse_manifest, read_manifest
from swirl_fast.files import fsync, share

TRIES = 4  # downloads of one file before giving up
BACK_OFF = 1.0  # seconds before the second try; twice as long before each further one
PARALLEL = 4  # downloads at a time in one process


class ShardFolder:
    """A folder on this machine, or mounted on it, that `write_shards` wrote, and does not replace until this is closed.

    Raises ValueError when the manifest or the index is missing, damaged, or says what write_shards would not write, and while the folder is
    being replaced.
    """

    remedy = REMEDY
    in_place = True  # checking every shard before training copies nothing

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        held = share(self.folder) if self.folder.is_dir() else None
        self._release = weakref.finalize(self, os.close, held) if held is not None else lambda: None
        self._written = _written(self.folder)
        self.manifest = read_manifest(self.folder)
        if (problem := find_damage(self.folder, INDEX, self.manifest)) is not None:
            raise ValueError(f"{self.shown(INDEX)} {problem}: {self.remedy}")
        check_index(
            (self.folder / INDEX).read_bytes(), self.manifest.files, self.manifest.trajectories, self.shown(INDEX)
        )

    def shown(self, name: str = "") -> str:
        """What error messages call a file."""
        return str(self.folder / name)

    def fetch(self, name: str) -> str | None:
        """Brings a file to `folder`. Returns what is wrong with it, None when it can be read; here only by its size."""
        try:
            size = (self.folder / name).stat().st_size
        except FileNotFoundError:
            return "is missing"
        return None if size == self.manifest.files[name]["bytes"] else find_damage(self.folder, name, self.manifest)

    def fetch_all(self, names: Iterable[str]) -> Iterator[tuple[str, str | None]]:
        """(name, `fetch(name)`) in the order of the names, each as soon as it is known."""
        return ((name, self.fetch(name)) for name in names)

    def verify_all(self, names: Iterable[str]) -> Iterator[tuple[str, str | None]]:
        """As `fetch_all`, after comparing every byte."""
        return ((name, find_damage(self.folder, name, self.manifest)) for name in names)

    def check_unchanged(self) -> None:
        """Raises ValueError when the folder was replaced since it was opened: samples are read from it by name."""
        if _written(self.folder) != self._written:
            raise ValueError(f"{self.folder} was replaced while it was being read: start the training again")

    def close(self) -> None:
        self._release()


class ShardCache:
    """A remote folder; its files are copied to `cache`/CONTENT_HASH when they are needed. Many processes may share `cache`.

    limit: bytes of all shards in `cache`; before a download, those used least recently are removed until the new one fits.
    What is being downloaded by others comes on top. None: no limit.

    Raises ValueError when the manifest or the index is missing, damaged, or says what write_shards would not write, and for a
    limit below the largest shard, OSError when the store cannot be reached, ImportError naming the package that the kind of
    URL needs.
    """

    remedy = "upload the shards again"
    in_place = False

    def __init__(self, url: str, cache: str | Path, limit: int | None = None) -> None:
        self.url, self.limit = url.rstrip("/"), limit
        self.root = Path(cache).expanduser().absolute()
        self._pool = ThreadPoolExecutor(PARALLEL, thread_name_prefix="shards")
        self._verified: dict[str, tuple[int, int]] = {}  # name -> inode and size of the file that was hashed
        self.manifest = self._open()
        self.folder = self.root / self.manifest.content_hash
        self.folder.mkdir(parents=True, exist_ok=True)
        largest = max(entry["bytes"] for entry in self.manifest.files.values())
        if limit is not None and limit < largest:
            raise ValueError(
                f"training.shards_cache_limit is {limit} bytes and the largest shard of {self.url} has {largest}: raise it"
            )
        if (problem := self.fetch(INDEX)) is not None:
            raise ValueError(f"{self.shown(INDEX)} {problem}: {self.remedy}")
        check_index(
            (self.folder / INDEX).read_bytes(), self.manifest.files, self.manifest.trajectories, self.shown(INDEX)
        )

    def shown(self, name: str = "") -> str:
        return f"{self.url}/{name}".rstrip("/")

    def fetch(self, name: str) -> str | None:
        """As ShardFolder's. A file that was whole can be gone the next moment where the cache has a limit: fetch it again.

        Raises OSError when the store cannot be reached.
        """
        if self._whole(name):
            return None
        with FileLock(self.folder / f".{name}.lock"):
            if self._whole(name):  # another process has just brought it
                return None
            self._make_room(self.manifest.files[name]["bytes"])
            temporary = self.folder / f"{name}.tmp"
            try:
                problem = self._download(name, temporary, self.manifest)
                if problem is None:
                    fsync(temporary / name)
                    self._verified[name] = _identity(temporary / name)
                    os.replace(temporary / name, self.folder / name)
                    fsync(self.folder)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
        return problem

    def fetch_all(self, names: Iterable[str]) -> Iterator[tuple[str, str | None]]:
        names = list(names)
        return zip(names, self._pool.map(self.fetch, names), strict=True)

    def verify_all(self, names: Iterable[str]) -> Iterator[tuple[str, str | None]]:
        return self.fetch_all(names)

    def check_unchanged(self) -> None:
        """Files of other contents never get into the folder."""

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _open(self) -> Manifest:
        with tempfile.TemporaryDirectory() as folder:
            problem = self._download(MANIFEST, Path(folder) / "download", None)
            if problem is not None:
                raise ValueError(f"{self.shown(MANIFEST)} {problem}: {self.url} is not a complete shard folder")
            return parse_manifest((Path(folder) / "download" / MANIFEST).read_bytes(), self.shown(MANIFEST))

    def _whole(self, name: str) -> bool:
        path = self.folder / name
        try:
            identity = _identity(path)
            if self._verified.get(name) != identity:
                if find_damage(self.folder, name, self.manifest) is not None:
                    return False
                self._verified[name] = identity
            os.utime(path)  # used now, for _make_room
        except FileNotFoundError:
            return False
        return True

    def _make_room(self, needed: int) -> None:
        if self.limit is None:
            return
        with FileLock(self.root / ".room.lock"):
            shards = []
            for path in self.root.glob("*/*.mds"):
                try:
                    status = path.stat()
                except FileNotFoundError:
                    continue
                shards.append((status.st_mtime_ns, status.st_size, path))
            total = needed + sum(size for _, size, _ in shards)
            for _, size, path in sorted(shards):
                if total <= self.limit:
                    break
                path.unlink(missing_ok=True)
                total -= size

    def _download(self, name: str, into: Path, manifest: Manifest | None) -> str | None:
        """Writes `into`/name and compares it with the manifest. Returns what is wrong with the remote file, None if nothing.

        Raises OSError when no try brought a file, ImportError for a missing client."""
        for number in range(TRIES):
            if number:
                time.sleep(
                    BACK_OFF * (2 ** (number - 1) + random.random() / 2)
                )  # processes that failed together come apart
            shutil.rmtree(into, ignore_errors=True)
            into.mkdir(parents=True)
            problem, failed = None, None
            try:
                object_store.download(f"{self.url}/{name}", into / name)
            except ImportError:
                raise
            except Exception as error:  # each store's client raises a kind of its own
                if _not_found(error):
                    return "is missing"
                failed = error
                continue
            if manifest is None or (problem := find_damage(into, name, manifest)) is None:
                return None
        if failed is None:
            return problem
        raise OSError(
            f"{self.shown(name)} cannot be downloaded ({type(failed).__name__}: {failed}); {TRIES} tries. "
            "Check the address, the credentials and the network, then start again"
        ) from failed


def open_shards(location: str | Path, cache: str | Path, limit: str = "") -> ShardFolder | ShardCache:
    """location: a path or URL. limit: such as 10gb (2^30 bytes each); empty for none. cache and limit are for URLs."""
    if not is_url(str(location)):
        return ShardFolder(location)
    return ShardCache(str(location), cache, _bytes(limit) if limit else None)


def _bytes(size: str) -> int:
    """Of a number with a unit, such as 1.5gb."""
    return int(float(size[:-2]) * 1024 ** (1 + ("kb", "mb", "gb", "tb").index(size[-2:].lower())))


def upload_shards(folder: Path, target: str) -> bool:
    """Copies a shard folder to a URL or another folder, the manifest last; shards that a folder held beyond it are removed. Returns False
    when it is there already.

    A reader that opens `target` during the upload of other contents over it finds a shard of another hash, and stops.

    Raises OSError when `target` cannot be written, ImportError naming the package that the kind of URL needs.
    """
    manifest = read_manifest(folder)
    target = target.removeprefix("file://").rstrip("/")
    with tempfile.TemporaryDirectory() as temporary:
        try:
            there = ShardCache(f"file://{target}" if not is_url(target) else target, temporary)
        except (ValueError, OSError):
            pass  # nothing there, or nothing whole
        else:
            there.close()
            if there.manifest == manifest:
                _remove_surplus(target, manifest)  # left by an upload that was killed before it did so
                return False
    address = target if is_url(target) else f"file://{target}"
    try:
        for name in (*sorted(manifest.files), MANIFEST):
            object_store.upload(folder / name, f"{address}/{name}")
    except ImportError:
        raise
    except Exception as error:  # each store's client raises a kind of its own
        raise OSError(
            f"{target} cannot be written ({type(error).__name__}: {error}): check the address, the credentials and the "
            f"network, then start again; the shards lie in {folder}"
        ) from error
    _remove_surplus(target, manifest)
    return True


def _remove_surplus(target: str, manifest: Manifest) -> None:
    """Of a folder, shards of earlier contents that were more: a folder that is read in place must hold no others than its manifest says."""
    for path in Path(target).glob("shard.*.mds") if not is_url(target) else ():
        if path.name not in manifest.files and re.fullmatch(r"shard\.\d{5,}\.mds", path.name):
            path.unlink()


def check_clients(*locations: str) -> None:
    """Raises ImportError, with the line to install it, where the client of one of the URLs among the locations is missing: before work is
    done whose result could not be written."""
    for location in filter(is_url, locations):
        check_client(location)


def _not_found(error: Exception) -> bool:
    """Whether a store said that there is no such file; that it cannot be reached is something else."""
    if isinstance(error, OSError) and type(error).__module__ == "builtins":
        return isinstance(error, FileNotFoundError)
    response = getattr(error, "response", None)
    codes = [getattr(source, name, None) for source in (error, response) for name in ("code", "status", "status_code")]
    if isinstance(response, dict):  # botocore
        codes.append(response.get("Error", {}).get("Code"))
    return any(str(code) in ("404", "NoSuchKey") for code in codes)


def _identity(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_ino, status.st_size


def _written(folder: Path) -> tuple[int, int] | None:
    """Tells one writing of a folder from another; None where there is no manifest."""
    try:
        status = (folder / MANIFEST).stat()
    except FileNotFoundError:
        return None
    return status.st_ino, status.st_mtime_ns
