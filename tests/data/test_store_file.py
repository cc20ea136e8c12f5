"""A store on a network file system, which a text in place of the kernel's list of mounts says this disk is."""

from __future__ import annotations

import errno
import fcntl
import shutil
import sqlite3
from pathlib import Path

import pytest
from support.stores import make_question, make_trajectory

from swirl_fast.data import store_file
from swirl_fast.data.store import Store
from swirl_fast.data.store_file import file_system, is_network
from swirl_fast.trajectory import Finish, Trajectory

MOUNTS = """\
22 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw
30 22 0:40 / /home rw,relatime shared:5 master:2 - nfs4 server:/home rw,vers=4.2
31 30 254:1 / /home/scratch rw - xfs /dev/vdb rw
32 22 0:41 / /mnt/my\\040share rw - cifs //server/share rw
33 22 0:42 / /data rw - ext4 /dev/vdc rw
34 33 0:43 / /data rw - fuse.sshfs me@host: rw
35 22 0:44 / /windows rw - fuseblk /dev/sda1 rw
no mount at all
"""


@pytest.mark.parametrize(
    ("path", "kind", "network"),
    [
        ("/work/runs/r", "ext4", False),
        ("/home", "nfs4", True),
        ("/home/me/runs/r/trajectories.db", "nfs4", True),
        ("/homes/me", "ext4", False),
        ("/home/scratch/runs", "xfs", False),
        ("/mnt/my share/runs", "cifs", True),
        ("/data/runs", "fuse.sshfs", True),
        ("/windows/runs", "fuseblk", False),
    ],
)
def test_the_longest_mount_point_and_of_two_the_later_says_what_a_path_lies_on(
    path: str, kind: str, network: bool
) -> None:
    assert file_system(Path(path), MOUNTS) == kind
    assert is_network(kind) is network


def test_what_is_known_of_no_mount() -> None:
    assert file_system(Path("/x"), "") == "" and not is_network("")
    assert all(is_network(kind) for kind in ("nfs", "smb3", "9p", "lustre", "gpfs", "beegfs", "ceph", "fuse.rclone"))
    assert not any(is_network(kind) for kind in ("btrfs", "zfs", "tmpfs", "overlay", "f2fs", "apfs"))


@pytest.fixture
def trajectories() -> list[Trajectory]:
    return [make_trajectory(make_question(0), k, 2, Finish.ANSWER) for k in range(3)]


def write(path: Path, trajectories: list[Trajectory]) -> Store:
    store = Store(path)
    store.add_questions([make_question(0)])
    store.record(trajectories)
    return store


def read(path: Path) -> list[Trajectory]:
    with Store(path, writable=False) as store:
        return list(store.trajectories())


def test_it_is_written_without_a_log_and_read_meanwhile(
    trajectories: list[Trajectory], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_file, "file_system", lambda path: "nfs4")
    path = tmp_path / "t.db"
    with pytest.warns(UserWarning, match=r"t\.db lies on a network file system \(nfs4\).*run.folder on a local disk"):
        store = write(path, trajectories[:2])
    assert read(path) == trajectories[:2], "the writer holds no lock between two transactions"
    store.record(trajectories[2:])
    assert read(path) == trajectories and not list(tmp_path.glob("*-wal"))
    with pytest.raises(ValueError, match="is being written by process"):
        Store(path)
    store.close()
    assert sqlite3.connect(path).execute("PRAGMA journal_mode").fetchone() == ("delete",)


def test_one_that_was_copied_there_is_read_and_written_on(
    trajectories: list[Trajectory], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """First a whole one, then one with the log of a writer that was killed."""
    store = write(tmp_path / "t.db", trajectories[:2])
    for name in ("t.db", "t.db-wal"):
        (tmp_path / "killed").mkdir(exist_ok=True)
        shutil.copy(tmp_path / name, tmp_path / "killed" / name)
    store.close()
    monkeypatch.setattr(store_file, "file_system", lambda path: "cifs")
    assert read(tmp_path / "t.db") == trajectories[:2]
    killed = tmp_path / "killed" / "t.db"
    with pytest.raises(ValueError, match=r"\(cifs\), where t\.db-wal .* start the stage that wrote it once more"):
        read(killed)
    for path in (tmp_path / "t.db", killed):
        with pytest.warns(UserWarning, match="network file system"), Store(path) as store:
            store.record(trajectories[2:])
        assert read(path) == trajectories and not list(path.parent.glob("*-wal"))
    monkeypatch.undo()
    with Store(killed) as store:
        assert list(store.trajectories()) == trajectories, "and back on a local disk"


def test_without_locks_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(*call: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with pytest.raises(ValueError, match="t.db cannot be locked .*No locks available.*run.folder on a local disk"):
        Store(tmp_path / "t.db")
    assert not (tmp_path / "t.db").exists()
