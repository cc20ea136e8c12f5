"""Shards in a reproducible order, over epochs without end, every rank its share of each batch.

Why an order of our own, and not that of mosaicml-streaming's StreamingDataset: its iterator fills the tail of an epoch with
duplicates, and its batches end with the epoch. Here the order is a function of the seed, the epoch and
`shuffle_shards` only, and rank r takes every world_size-th trajectory of a global batch, so nothing is lost or doubled in
an epoch, and resuming on any number of ranks continues the same sequence of global batches. Where the shards come from,
what of them is cached and how far ahead they are read changes nothing about it.

StreamingDataset's shared memory, lock files and collectives are not used: there is nothing that a killed job could leave
in shared memory, nothing to clean, and no other job to disturb by cleaning.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import xxhash

from swirl_fast.data.mds import Reader
from swirl_fast.data.shard_source import ShardCache, ShardFolder
from swirl_fast.data.shards import StepSample, decode_sample

READS = 10  # tries to read a sample whose shard other processes keep removing from a cache that is too small


class TrajectoryStream:
    """Global batches of trajectories.

    shards: a folder, or what `open_shards` returns.
    global_batch: trajectories in a batch, over all ranks; at least world_size. It need not divide anything: a batch
    runs over the border of an epoch, and shares differ by at most one.
    shuffle_shards: the order is new every epoch; trajectories are shuffled within groups of so many shards, and the groups come one after
    the other, so that a cache need not hold more; which shards form a group is drawn again every epoch. 0: all shards are one group.
    skip_bad: leave out the trajectories of shards that are missing or damaged. All shards are read once to know them
    (remote ones are downloaded); `problems` names those that this rank found. Ranks on several machines must exchange
    them and hand the union to `skip`. Otherwise the first such shard is an error: at once when the shards lie in a folder,
    when a batch needs it when they are remote.
    prefetch: batches that a thread downloads and decodes ahead of the one handed out.

    No process group is needed or used; ranks on several machines should compare `manifest.content_hash` before their
    first collective.

    Raises ValueError for impossible numbers and for bad shards, naming the file.
    """

    def __init__(
        self,
        shards: str | Path | ShardFolder | ShardCache,
        *,
        global_batch: int,
        rank: int,
        world_size: int,
        seed: int,
        shuffle_shards: int = 0,
        skip_bad: bool = False,
        prefetch: int = 0,
    ) -> None:
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} is not in a world of {world_size}")
        if global_batch < world_size:
            raise ValueError(
                f"a batch of {global_batch} trajectories leaves some of {world_size} ranks without one: "
                f"set training.trajectories_per_step to {world_size} or more"
            )
        self.store = ShardFolder(shards) if isinstance(shards, str | Path) else shards
        self.manifest = self.store.manifest
        self.global_batch, self.rank, self.world_size = global_batch, rank, world_size
        self.seed, self.shuffle_shards, self.skip_bad = seed, shuffle_shards, skip_bad
        self.position = 0  # places of the endless order handed out or skipped so far, over all ranks and epochs
        self._reader = Reader(self.store.folder)
        self._epoch, self._order = -1, list[int]()
        if len(self._reader) != self.manifest.trajectories:
            raise ValueError(
                f"{self.store.shown()}: {len(self._reader)} samples, the manifest says {self.manifest.trajectories}"
            )
        self._names = self._reader.names
        self.problems: dict[str, str] = {}  # shard -> what is wrong with it, as this rank found before the first batch
        self.skipped: dict[str, str] = {}  # shard -> why its trajectories are left out, equal on all ranks
        self.prefetch = prefetch
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="stream") if prefetch else None
        self._coming: deque[Future[tuple[list[StepSample], int]]] = deque()
        self._ahead = 0  # position after the last batch read; only the worker changes it while batches are coming
        for name, problem in self.store.verify_all(self._names) if skip_bad or self.store.in_place else ():
            if problem is not None:
                if not skip_bad:
                    raise self._error(name, problem)
                self.problems[name] = problem
        self.skip(self.problems)

    @property
    def skipped_samples(self) -> int:
        """Trajectories that are left out of every epoch."""
        return sum(map(self.samples, self.skipped))

    def samples(self, name: str) -> int:
        """Trajectories in a shard."""
        return self._reader.samples[self._names.index(name)]

    def skip(self, problems: Mapping[str, str]) -> None:
        """Leaves out the trajectories of these shards from the next batch on. Raises ValueError when none would be left."""
        self.skipped = {name: problems.get(name) or self.skipped[name] for name in sorted({*problems, *self.skipped})}
        if self.skipped.keys() >= set(self._names):
            name, problem = next(iter(self.skipped.items()))
            raise ValueError(f"no shard of {self.store.shown()} can be used: {name} {problem}, …: {self.store.remedy}")
        self._restart()

    def next_batch(self) -> list[StepSample]:
        """This rank's share of the next global batch: its trajectories rank, rank + world_size, …

        Raises ValueError naming a shard that is missing or damaged and for a folder that was replaced since it was opened,
        OSError when a shard cannot be downloaded. Called again, it tries the same batch again.
        """
        self.store.check_unchanged()
        if self._worker is None:
            share, self.position = self._read_next()
            return share
        while len(self._coming) <= self.prefetch:
            self._coming.append(self._worker.submit(self._read_next))
        share, self.position = self._coming.popleft().result()
        return share

    def further(self, start: int, count: int) -> tuple[list[StepSample], int]:
        """This rank's next `count` trajectories from a position on, its share of the next count * world_size, and the position after
        these. Hands nothing out: `position` stays. Raises as `next_batch`."""
        self.store.check_unchanged()
        size = count * self.world_size
        if self._worker is None:
            return self._read_share(start, size)
        return self._worker.submit(self._read_share, start, size).result()  # what is cached is the worker's alone

    def pass_over(self, count: int) -> None:
        """Goes on behind the next `count` trajectories of every rank: what `further` read counts as handed out. The same on all ranks."""
        if count:
            self._restart()  # the worker is idle from here on
            self.position = self._ahead = self._plan(self.position, count * self.world_size)[1]

    def close(self) -> None:
        """Ends the reading ahead. Idempotent."""
        if self._worker is not None:
            self._worker.shutdown(wait=False, cancel_futures=True)
        self.store.close()

    def _restart(self) -> None:
        """Forgets the batches read ahead."""
        for coming in self._coming:
            coming.cancel()
        for coming in self._coming:
            if not coming.cancelled():
                coming.exception()  # waits for the one that is being read
        self._coming.clear()
        self._ahead = self.position

    def _read_next(self) -> tuple[list[StepSample], int]:
        """This rank's share of the next global batch, and the stream position after it."""
        share, self._ahead = self._read_share(self._ahead, self.global_batch)
        return share, self._ahead

    def _read_share(self, start: int, size: int) -> tuple[list[StepSample], int]:
        """This rank's share of the `size` trajectories from a position on, and the position after them."""
        places, ahead = self._plan(start, size)
        places = places[self.rank :: self.world_size]
        of_shard: dict[str, list[int]] = {}
        for place in dict.fromkeys(places):
            of_shard.setdefault(self._shard_of(place), []).append(place)
        samples = {}
        for name, problem in self.store.fetch_all(of_shard):
            for place in of_shard[name]:
                samples[place] = self._read(name, problem, place)
        self.store.check_unchanged()
        return [samples[place] for place in places], ahead

    def _read(self, name: str, problem: str | None, place: int) -> StepSample:
        for _ in range(READS):
            if problem is not None:
                raise self._error(name, problem)
            try:
                return decode_sample(self._reader[place])
            except FileNotFoundError:  # removed from the cache by another process, or from the folder
                problem = self.store.fetch(name)
        raise ValueError(
            f"{self.store.shown(name)} is removed from the cache faster than it is read: raise training.shards_cache_limit"
        )

    def _plan(self, position: int, size: int) -> tuple[list[int], int]:
        """The next `size` samples from `position` on, and the position after them."""
        places: list[int] = []
        while len(places) < size:
            place = self._index(position)
            if not self.skipped or self._shard_of(place) not in self.skipped:
                places.append(place)
            position += 1
        return places, position

    def _shard_of(self, place: int) -> str:
        return self._names[self._reader.shard_of(place)]

    def _index(self, position: int) -> int:
        epoch, at = divmod(position, self.manifest.trajectories)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, self._permutation(epoch)
        return self._order[at]

    def _permutation(self, epoch: int) -> list[int]:
        """Sorting by a hash: unlike NumPy's generators, the same in every version of every library."""
        bounds = self._reader.bounds

        def drawn(what: str) -> int:
            return xxhash.xxh64_intdigest(f"{self.seed}/{epoch}/{what}".encode())

        shards = sorted(range(len(self._names)), key=lambda shard: (drawn(f"shard {shard}"), shard))
        size = self.shuffle_shards or len(shards)
        order: list[int] = []
        for begin in range(0, len(shards), size):
            group = [i for shard in shards[begin : begin + size] for i in range(bounds[shard], bounds[shard + 1])]
            order += sorted(group, key=lambda i: (drawn(str(i)), i))
        return order

    def _error(self, name: str, problem: str) -> ValueError:
        remedy = f"set training.bad_shards=skip to go on without its {self.samples(name)} trajectories"
        if self.skip_bad:  # the ranks agreed before the first batch, and do not again
            remedy = "start again to go on without it: it was whole when training started"
        return ValueError(f"{self.store.shown(name)} {problem}: {self.store.remedy}, or {remedy}")

    def state_dict(self) -> dict[str, Any]:
        """JSON values, equal on all ranks: everything that says which batch comes next."""
        return {
            "position": self.position,
            "seed": self.seed,
            "shuffle_shards": self.shuffle_shards,
            "content_hash": self.manifest.content_hash,
            "skipped": self.skipped,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on after the last batch of the stream that gave the state; world size and global_batch may be others.

        Shards that were skipped stay skipped, also when they are whole by now: the order stays that of the run. Of shards
        that are bad since, only what would still have come in this epoch is left out.

        Raises ValueError when seed, shuffle_shards or the shards are not those of the state: the order would be another.
        """
        here = self.state_dict()
        for key in ("seed", "shuffle_shards", "content_hash"):
            if state[key] != here[key]:
                raise ValueError(
                    f"{self.store.shown()}: the checkpoint's {key} is {state[key]!r}, here it is {here[key]!r}: "
                    "resume with the settings and shards it was trained on, or start another run.name"
                )
        self.position = int(state["position"])
        self.skip({**state["skipped"], **self.skipped})
