"""Opening trajectories.db where it lies: SQLite's WAL needs memory that all processes share, which no network file system has.

There the journal is a file beside the database (journal_mode=DELETE): every commit is as safe, readers and the writer wait for each other.
"""

from __future__ import annotations

import os
import re
import sqlite3
import warnings
from pathlib import Path

NETWORK = frozenset(
    "nfs nfs4 cifs smb smb2 smb3 smbfs 9p lustre gpfs beegfs ceph afs orangefs pvfs2 ocfs2 gfs2 glusterfs wekafs panfs coda ncpfs acfs "
    "vboxsf virtiofs prl_fs vmhgfs drvfs".split()
)
TIMEOUT = 60.0  # seconds that one process waits for another's lock


def file_system(path: Path, mountinfo: str | None = None) -> str:
    """Type of the file system that a path lies on, which need not be there yet, as Linux names it, such as ext4, nfs4, fuse.sshfs; empty
    where that cannot be told. mountinfo: the text of /proc/self/mountinfo."""
    if mountinfo is None:
        try:
            mountinfo = Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="surrogateescape")
        except OSError:
            return ""
    place, found, depth = path.resolve(), "", -1
    for line in mountinfo.splitlines():
        before, _, after = line.partition(" - ")
        if len(fields := before.split(" ")) < 5 or not after:
            continue
        mounted = Path(re.sub(r"\\([0-7]{3})", lambda code: chr(int(code[1], 8)), fields[4]))
        if (
            place.is_relative_to(mounted) and len(mounted.parts) >= depth
        ):  # of two in one place, the later covers the earlier
            found, depth = after.split(" ")[0], len(mounted.parts)
    return found


def is_network(kind: str) -> bool:
    """FUSE counts as one, whatever is behind it; `fuseblk` is a local disk."""
    return kind in NETWORK or kind.startswith("fuse.") or kind == "fuse"


def connect(path: Path, writable: bool) -> sqlite3.Connection:
    """In autocommit mode. Raises ValueError, with the remedy, for a reader of a database that lies on a network file system together with a
    WAL: its last writer was on another kind of disk, and did not end."""
    log = path.with_name(path.name + "-wal")
    pending = log.is_file() and log.stat().st_size > 0
    kind = file_system(path)
    network = is_network(kind)
    if network and not writable and _says_wal(path):
        if pending:
            raise ValueError(
                f"{path} lies on a network file system ({kind}), where {log.name} beside it cannot be read: start the stage that wrote it "
                "once more, or copy the folder to a local disk"
            )
        return _by_uri(path, "immutable=1")  # nobody is writing: a writer would have begun with another journal
    if writable or (os.access(path, os.W_OK) and os.access(path.parent, os.W_OK)):
        # A reader too may write: it may be the first after a killed writer, and then recovers the log.
        db = sqlite3.connect(path, isolation_level=None, timeout=TIMEOUT)
        if network and writable:
            db.execute("PRAGMA locking_mode = EXCLUSIVE")  # a WAL that was left here is then read without shared memory
        return db
    # Of somebody else, or on a read-only disk. Beside a writer, whose files are there, SQLite reads on; a file that nobody writes is
    # read as it is, for which SQLite must be promised that it stays so.
    return _by_uri(path, "mode=ro" if pending or network else "immutable=1")


def set_journal(db: sqlite3.Connection, path: Path) -> None:
    """Of a writer's connection. Warns where WAL cannot be had. Raises ValueError where others have the file open in WAL mode."""
    kind = file_system(path)
    if not is_network(kind):
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA synchronous = FULL")
        return
    if db.execute("PRAGMA journal_mode = DELETE").fetchone()[0] != "delete":
        raise ValueError(
            f"{path} is being read by others, and lies on a network file system ({kind}): wait until they end"
        )
    db.execute("PRAGMA synchronous = EXTRA")  # the folder is flushed too, when the journal goes
    db.execute("PRAGMA locking_mode = NORMAL")
    db.execute("SELECT count(*) FROM sqlite_master").fetchone()  # lets the exclusive lock go
    warnings.warn(
        f"{path} lies on a network file system ({kind}), where SQLite's write-ahead log does not work: it is written without, so readers "
        "and the writer wait for each other. Faster: run.folder on a local disk",
        stacklevel=3,
    )


def _says_wal(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(20)[18:20] == b"\x02\x02"


def _by_uri(path: Path, how: str) -> sqlite3.Connection:
    return sqlite3.connect(f"{path.absolute().as_uri()}?{how}", uri=True, isolation_level=None, timeout=TIMEOUT)
