"""Files of a run: written by one process at a time, hashed, and on disk before they get their name."""

from __future__ import annotations

import bz2
import fcntl
import gzip
import hashlib
import json
import lzma
import os
import re
import secrets
import socket
import time
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

SETTLED = (
    2.0  # seconds; a file younger than that may change once more without a change of its times, whose ticks are coarse
)
SLOW = 1 << 30  # bytes; hashes of larger files are kept on disk too
# ending, first bytes, how it is read
_PACKED: tuple[tuple[str, bytes, Callable[..., Any]], ...] = (
    (".gz", b"\x1f\x8b", gzip.open),
    (".bz2", b"BZh", bz2.open),
    (".xz", b"\xfd7zXZ\0", lzma.open),
)
UNPACKING_ERRORS = (OSError, EOFError, zlib.error, lzma.LZMAError)
_hashes: dict[str, tuple[list[int], str, bool]] = {}  # path -> identity, hash, whether this process read the file


def cache_folder() -> Path:
    """Where what is expensive to make is kept between processes: $SWIRL_FAST_CACHE, else ~/.cache/swirl_fast."""
    return Path(os.environ.get("SWIRL_FAST_CACHE", "~/.cache/swirl_fast")).expanduser()


def content_hash(path: Path, read: bool = False) -> str:
    """`hash_file`, remembered for as long as inode, size and both times of the file stay: by this process, and from SLOW bytes on in
    `cache_folder`, where that can be written. read: only by this process, which notices what a disk has lost since."""
    import xxhash

    status = path.stat()
    name = str(path.resolve())
    known = [status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns]
    kept = cache_folder() / "hashes" / f"{xxhash.xxh64(name.encode('utf-8', 'surrogateescape')).hexdigest()}.json"
    if name not in _hashes and status.st_size >= SLOW:
        try:
            stored = json.loads(kept.read_text(encoding="utf-8"))
            _hashes[name] = stored["known"], str(stored["xxh64"]), False
        except (OSError, ValueError, LookupError, TypeError):
            pass
    if name in _hashes and _hashes[name][0] == known and (_hashes[name][2] or not read):
        return _hashes[name][1]
    settled = time.time() - max(status.st_mtime, status.st_ctime) > SETTLED
    found = hash_file(path)
    if settled:
        _hashes[name] = known, found, True
        if status.st_size >= SLOW:
            temporary = kept.with_name(f"{kept.name}.{os.getpid()}")
            try:
                kept.parent.mkdir(parents=True, exist_ok=True)
                temporary.write_text(json.dumps({"known": known, "xxh64": found}), encoding="utf-8")
                temporary.rename(kept)
            except OSError:  # it is hashed again next time
                pass
    return found


def unpacker(path: Path) -> Callable[..., Any] | None:
    """What opens a packed file, by its ending or its first bytes; None for any other. Reading may raise UNPACKING_ERRORS."""
    with path.open("rb") as file:
        begin = file.read(8)
    return next(
        (how for ending, magic, how in _PACKED if path.name.lower().endswith(ending) or begin.startswith(magic)), None
    )


def is_file(path: str | Path) -> bool:
    """Whether there is such a file; `~` is the home folder. False for what can be no path, such as a long text; Path.is_file raises."""
    return os.path.isfile(os.path.expanduser(path))


def is_folder(path: str | Path) -> bool:
    """As `is_file`."""
    return os.path.isdir(os.path.expanduser(path))


def hash_file(path: Path) -> str:
    """xxh64 of a file, in hex."""
    import xxhash  # here, so that the GPU check runs where the package is missing

    state = xxhash.xxh64()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            state.update(block)
    return state.hexdigest()


def hash_tree(place: Path, endings: tuple[str, ...]) -> str:
    """Hex digest of a file; or of the files in a folder and in those below it, by their names, that end so."""
    if not place.is_dir():
        return content_hash(place)
    files = sorted(file for file in place.rglob("*") if file.suffix.lower() in endings and file.is_file())
    named = [f"{file.relative_to(place).as_posix()} {content_hash(file)}" for file in files]
    return hashlib.sha256("\n".join(named).encode("utf-8", "surrogateescape")).hexdigest()[:16]


def fsync(path: Path) -> None:
    """Flushes a file or a folder to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def lock(path: Path) -> int:
    """File descriptor that holds the lock on writing to `path` until it is closed, or the process ends. The file PATH.lock stays:
    removing it would race. Raises ValueError when another process holds it, and where the file system has no locks."""
    descriptor = os.open(path.with_name(path.name + ".lock"), os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.read(descriptor, 200).decode(errors="replace").strip() or "another process"
        os.close(descriptor)
        raise ValueError(f"{path} is being written by {holder}: wait until it ends, or use another run.name") from None
    except OSError as error:
        os.close(descriptor)
        raise ValueError(
            f"{path} cannot be locked ({error}), and two processes that write to it would destroy it: use a run.folder on a local disk"
        ) from None
    os.ftruncate(descriptor, 0)
    os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
    return descriptor


def share(folder: Path) -> int | None:
    """File descriptor that keeps `own` from succeeding until it is closed, or the process ends. Writes nothing. None where the file system
    has no such locks. Raises ValueError while another process owns the folder, OSError where it is not there."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        replaced = not folder.is_dir() or not os.path.samestat(os.fstat(descriptor), os.stat(folder))
    except BlockingIOError:
        replaced = True
    except OSError:
        os.close(descriptor)
        return None
    if replaced:
        os.close(descriptor)
        raise ValueError(f"{folder} is just being replaced by another process: start again when it has ended")
    return descriptor


def own(folder: Path) -> int | None:
    """As `share`, for the one process that may take the folder away. Raises ValueError, naming them, while others share it."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        number = os.fstat(descriptor).st_ino
        os.close(descriptor)
        who = ", ".join(f"process {process}" for process in _holders(number)) or "another process"
        raise ValueError(f"{folder} is being read by {who}: wait until it ends, or use another run.name") from None
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def _holders(inode: int) -> list[str]:
    try:
        locks = Path("/proc/locks").read_text(encoding="utf-8")
    except OSError:
        return []
    return sorted(set(re.findall(rf"FLOCK +ADVISORY +READ +(\d+) [^ ]*:{inode} 0 EOF$", locks, re.MULTILINE)), key=int)


def holder(path: Path) -> str | None:
    """Who holds `lock(path)` now, as `process N on HOST`; None where nobody on this machine does. Takes no lock, so that no writer is kept
    from starting. Processes on other machines that share the folder are not seen."""
    file = path.with_name(path.name + ".lock")
    try:
        text = file.read_text(encoding="utf-8", errors="replace").strip()
        number = file.stat().st_ino
    except OSError:
        return None
    match = re.fullmatch(r"process (\d+) on (.+)", text)
    if match is None or match[2] != socket.gethostname():
        return None
    try:  # the kernel's own list: the number of an ended process may belong to another one by now
        locks = Path("/proc/locks").read_text(encoding="utf-8")
    except OSError:
        return text if _alive(int(match[1])) else None
    return text if re.search(rf"FLOCK .*:{number} 0 EOF$", locks, re.MULTILINE) else None


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def write_text(path: Path, text: str) -> None:
    """Replaces a file in one go: a reader, or a kill, meets the old text or the new one. Folders are made as needed."""
    write_parts(path, [text])


def write_parts(path: Path, parts: Iterable[str]) -> None:
    """As `write_text`, of a text that is taken piece by piece. Of two processes that write at a time one wins."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.writelines(parts)
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2) + "\n")


def read_json(path: Path) -> Any:
    """None where there is no such file."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def canonical_json(value: Any) -> str:
    """One text for equal values, whatever the order of their keys."""
    return json.dumps(value, sort_keys=True)


def describe_changes(old: Any, new: Any, key: str = "") -> str:
    """The leaves in which two JSON values differ, by their dotted keys: `training.steps was 4, is 8 now; …`."""
    if isinstance(old, dict) and isinstance(new, dict):
        names = [name for name in sorted({*old, *new}) if old.get(name) != new.get(name)]
        return "; ".join(describe_changes(old.get(name), new.get(name), f"{key}.{name}".lstrip(".")) for name in names)
    return f"{key or 'it'} was {old!r}, is {new!r} now"
