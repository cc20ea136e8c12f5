"""A store that several ranks fill together, on one machine or many that share no disk.

    trajectories.db, on rank 0's disk       trajectories.parts/, on the disk of every rank's machine
        questions that lack something  ──deal──>   NAME-HASH-rank-R.db    a store of its own, which rank R fills
        merged by content             <─gather──   all parts that lie on any disk, of whatever number of ranks

A part that was merged is removed; one that a killed command left is merged when the stage is started next, with any number of ranks, also
without torchrun. HASH is of what the rows were made with, so that parts of other settings are neither merged nor lost. Files
travel over torch.distributed, a piece at a time, where the other rank does not see them on its disk.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import Any

from swirl_fast.config import ConfigError
from swirl_fast.data.merge import merge
from swirl_fast.data.store import Store, trajectory_ids
from swirl_fast.files import canonical_json
from swirl_fast.ranks import Ranks
from swirl_fast.tasks.task import Question
from swirl_fast.trajectory import Trajectory

PIECE = 16 * 2**20  # bytes of a file that are sent at a time
ELSEWHERE = "elsewhere"  # key in a part: the ids that its rank leaves alone
BESIDE = ("", "-wal", "-shm", "-journal", ".lock")  # what SQLite and the lock put beside NAME.db
# A node may keep its runs elsewhere, and have servers of its own.
OF_A_NODE = ("run.folder", "engine.launch.", "judge.model.url")


def agree(ranks: Ranks, settings: Mapping[str, Any]) -> None:
    """Raises ConfigError on all ranks where one was started with other settings, or found other files behind them. Collective."""
    said = ranks.gather((socket.gethostname(), dict(_leaves(settings))))
    first = said[0][1]
    for rank, (host, other) in enumerate(said):
        keys = [
            key
            for key in sorted({*first, *other})
            if first.get(key) != other.get(key) and not key.startswith(OF_A_NODE)
        ]
        if keys:
            differ = "; ".join(
                f"{key} is {first.get(key)!r} on rank 0 and {other.get(key)!r} on rank {rank}" for key in keys
            )
            raise ConfigError(
                f"rank {rank}, on {host}, does not do what rank 0 does: {differ}. Give all nodes the same command and files"
            )


def _leaves(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping) and value:
        for name, inner in value.items():
            yield from _leaves(inner, f"{key}.{name}".lstrip("."))
    else:
        yield key, value


@contextlib.contextmanager
def main_store(ranks: Ranks, path: Path) -> Iterator[Store | None]:
    """Open for writing on rank 0, None on the others."""
    with contextlib.ExitStack() as stack:
        yield stack.enter_context(Store(path)) if ranks.main else None


class Parts:
    """The parts of the store at `path`. name: of what is done to it. made_with: a JSON value, the same on all ranks."""

    def __init__(self, ranks: Ranks, path: Path, name: str, made_with: Any) -> None:
        self._ranks, self._folder = ranks, path.with_suffix(".parts")
        hashed = hashlib.sha256(canonical_json(made_with).encode("utf-8", "surrogatepass")).hexdigest()[:12]
        self._name = f"{name}-{hashed}"
        # one process of a machine speaks for its disk
        self._speaks = not ranks.distributed or os.environ.get("LOCAL_RANK", "0") == "0"

    @property
    def _own(self) -> Path:
        """This rank's part."""
        return self._part(self._ranks.rank)

    def gather(self, store: Store | None, order: Sequence[str]) -> None:
        """Merges all parts there are into rank 0's store, its trajectories in this order. Collective. Raises ValueError for a part that is
        damaged or that another process writes; then all parts stay where they are."""
        ranks = self._ranks
        if not ranks.distributed:
            assert store is not None
            return self._merge(store, order)
        sees = self._sees_the_disk_of_rank_0()
        if self._speaks and (ranks.main or not sees):
            for path in (*self._folder.glob("out-*"), *self._folder.glob("*.tmp")):  # of a command that was killed
                path.unlink()
        theirs = self._found() if self._speaks and not sees else []
        for source, count in enumerate(ranks.gather(len(theirs))):
            for i in range(count):
                if ranks.main:
                    receive_file(ranks, source, self._folder / f"{self._name}-from-{source}-{i}.db")
                elif ranks.rank == source:
                    Store(theirs[i]).close()  # what a killed command left in the log goes into the file
                    send_file(ranks, 0, theirs[i])
        if store is not None:
            self._merge(store, order)
        ranks.barrier()  # they are in the store
        for path in theirs:
            _remove(path)
        if self._speaks and (ranks.main or not sees):
            self._leave_folder()
        ranks.barrier()  # whoever needs the folder next makes it again

    def fill(
        self,
        store: Store | None,
        questions: Sequence[Question],
        count: int,
        lacks: Callable[[Trajectory], bool],
        work: Callable[[Store, Sequence[Question], AbstractSet[str]], object],
        *,
        absent: bool = True,
    ) -> None:
        """What rank 0's store lacks, done by all ranks: of one process in the store itself, of several in parts that are merged into it.
        Collective.

        count: of trajectories a question. lacks: whether one that is in the store must be worked on; absent: whether one that is not must.
        work: called with a store, its questions, and the ids of their trajectories that it must leave alone.
        """
        ranks = self._ranks
        if store is not None:
            store.add_questions(questions)  # in their own order
        if not ranks.distributed:
            assert store is not None
            work(store, questions, frozenset())
            return
        if not self._deal(store, questions, count, lacks, absent):
            return
        with Store(self._own) as part:
            mine = {question.id for question in part.questions()}
            work(part, [question for question in questions if question.id in mine], set(part.meta()[ELSEWHERE]))
        ranks.meet()
        self.gather(store, trajectory_ids(questions, count))

    def _deal(
        self,
        store: Store | None,
        questions: Sequence[Question],
        count: int,
        lacks: Callable[[Trajectory], bool],
        absent: bool,
    ) -> bool:
        """Gives every rank a part with its share of the questions that lack something, and what there is of these: the first such
        question to the first rank, the second to the second, and round. Returns whether there is one. Collective."""
        ranks = self._ranks
        sees = ranks.gather(self._sees_the_disk_of_rank_0())
        any_left = False
        if store is not None:
            any_left = self._write_shares(store, questions, count, lacks, absent)
        any_left = ranks.gather(any_left)[0]
        for rank in range(ranks.size if any_left else 0):
            if ranks.main and sees[rank]:
                self._share(rank).rename(self._part(rank))
            elif ranks.main:
                send_file(ranks, rank, self._share(rank))
                _remove(self._share(rank))
            elif ranks.rank == rank and not sees[rank]:
                receive_file(ranks, 0, self._own)
        ranks.barrier()
        return any_left

    def _write_shares(
        self,
        store: Store,
        questions: Sequence[Question],
        count: int,
        lacks: Callable[[Trajectory], bool],
        absent: bool,
    ) -> bool:
        there, needed = set(store.ids()), set()
        for batch in store.batches([id_ for id_ in trajectory_ids(questions, count) if id_ in there]):
            needed.update(one.id for one in batch if lacks(one))
        wanted = [(question, trajectory_ids([question], count)) for question in questions]
        left = [
            (question, ids)
            for question, ids in wanted
            if any(id_ in needed or (absent and id_ not in there) for id_ in ids)
        ]
        for rank in range(self._ranks.size if left else 0):
            mine = left[rank :: self._ranks.size]
            ids = [id_ for _, of_question in mine for id_ in of_question if id_ in there]
            with Store(self._share(rank)) as share:
                share.add_questions(question for question, _ in mine)
                share.set_meta(ELSEWHERE, [id_ for id_ in ids if id_ not in needed])
                for batch in store.batches([id_ for id_ in ids if id_ in needed]):
                    share.record(batch)
            _remove_beside(self._share(rank))
        return bool(left)

    def _merge(self, store: Store, order: Sequence[str]) -> None:
        paths = self._found()
        if not paths:
            return
        with contextlib.ExitStack() as stack:
            dropped = merge(store, [stack.enter_context(Store(path)) for path in paths], order)
        if dropped:
            print(f"{self._folder}: {dropped} trajectories of its parts were drawn once more since, and are left out")
        for path in paths:
            _remove(path)
        self._leave_folder()

    def _leave_folder(self) -> None:
        with contextlib.suppress(OSError):  # parts of other settings are in it
            self._folder.rmdir()

    def _found(self) -> list[Path]:
        return sorted(self._folder.glob(f"{self._name}-*.db"))

    def _part(self, rank: int) -> Path:
        return self._folder / f"{self._name}-rank-{rank}.db"

    def _share(self, rank: int) -> Path:
        return self._folder / f"out-{self._name}-rank-{rank}"

    def _sees_the_disk_of_rank_0(self) -> bool:
        ranks, file = self._ranks, self._folder / "seen"
        token = ""
        if ranks.main:
            self._folder.mkdir(parents=True, exist_ok=True)
            token = secrets.token_hex(16)
            file.write_text(token, encoding="utf-8")
        token = ranks.gather(token)[0]
        try:
            sees = file.read_text(encoding="utf-8") == token
        except OSError:
            sees = False
        ranks.barrier()
        if ranks.main:
            file.unlink()
        return sees


def send_file(ranks: Ranks, to: int, path: Path) -> None:
    """To a rank that is in `receive_file`."""
    with path.open("rb") as file:
        while piece := file.read(PIECE):
            ranks.send(piece, to)
    ranks.send(b"", to)


def receive_file(ranks: Ranks, source: int, path: Path) -> None:
    """Under its name when it is whole and on disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    with temporary.open("wb") as file:
        while piece := ranks.receive(source):
            file.write(piece)
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(path)


def _remove(path: Path) -> None:
    for ending in BESIDE:
        path.with_name(path.name + ending).unlink(missing_ok=True)


def _remove_beside(path: Path) -> None:
    for ending in BESIDE[1:]:
        path.with_name(path.name + ending).unlink(missing_ok=True)
