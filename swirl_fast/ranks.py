"""This process among those that torchrun started, and what they send each other beside gradients and weights: gloo on CPUs, nccl on
GPUs.

A rank that dies is torchrun's matter. One whose machine is cut off from the others, or stands still, would leave them waiting in a
collective for hours: `Liveness` ends them.
"""

from __future__ import annotations

import functools
import os
import pickle
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, ParamSpec, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")
P = ParamSpec("P")

# Ranks wait so long for one whose server hangs and is started again, or whose disk is slow. nccl's own 10 minutes are less than a request
# may take (engine.timeout). A rank that dies does not take that long: torchrun ends the others.
TIMEOUT = timedelta(hours=2)
# Seconds without a sign of life from a rank. A thread gives them, which a long call that keeps Python's lock holds up.
SILENCE = 300.0

_store: dist.Store | None = None
_liveness: Liveness | None = None
_meetings = _groups = 0


@dataclass(frozen=True)
class Group:
    """Ranks that tell each other something. handle: of torch.distributed; None: all ranks."""

    members: Sequence[int]
    handle: dist.ProcessGroup | None = None


@dataclass(frozen=True)
class Ranks:
    """This process among those that torchrun started; rank 0 of 1 without torchrun."""

    rank: int
    size: int
    device: torch.device

    @property
    def main(self) -> bool:
        return self.rank == 0

    @property
    def distributed(self) -> bool:
        return dist.is_initialized()

    def sum(self, values: Tensor) -> Tensor:
        """Sum over ranks of a small CPU tensor; every rank gets it."""
        return self._reduce(values, dist.ReduceOp.SUM)

    def max(self, values: Tensor) -> Tensor:
        return self._reduce(values, dist.ReduceOp.MAX)

    def gather(self, value: T) -> list[T]:
        """Every rank's value, in the order of ranks. Values are pickled, and every rank holds all of them: keep them small."""
        if not self.distributed:
            return [value]
        values: list[T] = [value] * self.size
        dist.all_gather_object(values, value)
        return values

    def group(self, partition: Sequence[Sequence[int]]) -> Group:
        """That part of all ranks which this one belongs to. Every rank calls it, with the same partition."""
        members = next(part for part in partition if self.rank in part)
        if not self.distributed or len(partition) == 1:
            return Group(members)
        return Group(members, dist.new_subgroups_by_enumeration([list(part) for part in partition])[0])

    def numbers(self, value: float, group: Group) -> list[float]:
        """The number of every rank of a group, in its order; rounded to float32, 4 bytes a rank."""
        if not self.distributed:
            return [value]
        values = torch.empty(len(group.members))
        dist.all_gather_into_tensor(values, torch.tensor([value], dtype=torch.float32), group=group.handle)
        return values.tolist()

    def exchange(self, given: Mapping[int, T], givers: Sequence[int]) -> list[T]:
        """Sends each rank in `given` a value, pickled; returns those of `givers`, in their order. All sides must name each other. What
        arrives is held twice for a moment."""
        sent = []
        for rank, value in given.items():
            blob = torch.frombuffer(bytearray(pickle.dumps(value, protocol=5)), dtype=torch.uint8)
            for part in (torch.tensor([len(blob)]), blob):
                sent.append((part, dist.isend(part, rank)))  # the tensor must live until it is sent
        found = [pickle.loads(self.receive(rank)) for rank in givers]
        for _, work in sent:
            assert work is not None, "this rank is in the group"
            work.wait()
        return found

    def wait(self) -> None:
        """Until this rank's device has done what it was given, so that what is measured ends with it."""
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()

    def barrier(self) -> None:
        if self.distributed:
            dist.barrier()

    def meet(self) -> None:
        """As `barrier`, without a limit of time: where the work of a rank may take hours longer than that of another."""
        global _meetings
        if self.size > 1 and _store is not None:
            _meetings += 1
            key, pause = f"swirl_fast/meeting/{_meetings}", 0.01
            _store.add(key, 1)
            while _store.add(key, 0) < self.size:
                time.sleep(pause)
                pause = min(2 * pause, 0.5)
        self.barrier()  # nobody leaves, and takes the store along, before all have seen it

    def send(self, data: bytes, to: int) -> None:
        """To a rank that is in `receive`."""
        dist.send(torch.tensor([len(data)]), to)
        if data:
            dist.send(torch.frombuffer(bytearray(data), dtype=torch.uint8), to)

    def receive(self, source: int) -> bytes:
        """What the rank `source` sends."""
        size = torch.zeros(1, dtype=torch.int64)
        dist.recv(size, source)
        data = torch.empty(int(size), dtype=torch.uint8)
        if len(data):
            dist.recv(data, source)
        return data.numpy().tobytes()

    def _reduce(self, values: Tensor, operation: dist.ReduceOp.RedOpType) -> Tensor:
        if not self.distributed:
            return values
        moved = values.to(self.device)
        dist.all_reduce(moved, operation)
        return moved.cpu()


def start() -> Ranks:
    """Joins the process group when torchrun set one up (environment variable WORLD_SIZE)."""
    cuda = torch.cuda.is_available()
    if "WORLD_SIZE" not in os.environ:
        return Ranks(0, 1, torch.device("cuda" if cuda else "cpu"))
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    if not dist.is_initialized():
        store, rank, size = next(dist.rendezvous("env://"))
        if os.environ.get("GROUP_WORLD_SIZE") == "1":
            # Restarting its workers, torchrun keeps the store in which they find each other (unless --rdzv-backend is c10d): without a
            # prefix they would find the addresses of dead ones. On several machines the numbers of restarts may differ.
            store = dist.PrefixStore(f"restart_{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
        backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
        global _store, _liveness, _groups, _meetings
        _groups += 1
        _meetings = 0
        if _groups > 1:  # this process was in a group before, whose addresses are still in the store
            store = dist.PrefixStore(f"group_{_groups}", store)
        _store = store
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=TIMEOUT)
        if size > 1:
            _liveness = Liveness(store, rank, size, SILENCE)
    device = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
    return Ranks(dist.get_rank(), dist.get_world_size(), device)


def shared_store() -> dist.Store | None:
    """The keys and values that all ranks share; None without torchrun."""
    return _store


def stop() -> None:
    global _store, _liveness
    if _liveness is not None:
        _liveness.stop()
        _liveness = None
    if dist.is_initialized():
        dist.destroy_process_group()
    _store = None


@contextmanager
def joined() -> Iterator[Ranks]:
    """The ranks of a command, from its start to its end; within another `joined` its group."""
    inner = dist.is_initialized()
    ranks = start()
    try:
        yield ranks
    finally:
        if not inner:
            stop()


def by_rank_0(stage: Callable[P, None]) -> Callable[P, None]:
    """A stage that one process does; under torchrun the other ranks wait for it."""

    @functools.wraps(stage)
    def done_by_rank_0(*arguments: P.args, **named: P.kwargs) -> None:
        with joined() as ranks:
            if ranks.main:
                stage(*arguments, **named)
            ranks.meet()

    return done_by_rank_0


class Liveness:
    """Two threads of this rank. One says in the store that the ranks share that this rank is there, and reads what the others say. The
    second ends the process, with a message, when nothing was heard from a rank, or from the store itself, for `silence` seconds. It
    reads clocks alone: where the network is gone a question to the store may never come back.

    Slow is not silent: only a process that stands still, or a machine that cannot be reached, says nothing.
    """

    def __init__(
        self, store: dist.Store, rank: int, size: int, silence: float, end: Callable[[int], Any] = os._exit
    ) -> None:
        self._store: dist.Store = store.clone()  # type: ignore[attr-defined]
        self._rank, self._silence, self._end = rank, silence, end
        self._store.set_timeout(timedelta(seconds=max(silence, 10.0)))
        self._stopped = threading.Event()
        now = time.monotonic()
        self._said = dict.fromkeys((other for other in range(size) if other != rank), "")
        self._heard = dict.fromkeys(self._said, now)
        self._answered = now  # by the store
        self._talking = threading.Thread(target=self._talk, name="liveness", daemon=True)
        self._talking.start()
        threading.Thread(target=self._watch, name="liveness", daemon=True).start()

    def stop(self) -> None:
        """This rank leaves in order, and says so where the store still answers."""
        self._stopped.set()
        self._talking.join(5.0)

    def _talk(self) -> None:
        count = 0
        while True:
            leaving = self._stopped.is_set()
            count += 1
            try:
                self._store.set(f"swirl_fast/alive/{self._rank}", "left" if leaving else str(count))
                if leaving:
                    return
                for other, before in self._said.items():
                    said = self._store.get(f"swirl_fast/alive/{other}").decode()
                    if said != before:
                        self._said[other], self._heard[other] = said, time.monotonic()
                self._answered = time.monotonic()
            except (RuntimeError, ValueError):
                if leaving:
                    return
            self._stopped.wait(self._silence / 20)

    def _watch(self) -> None:
        while not self._stopped.wait(self._silence / 20):
            now = time.monotonic()
            reason = self._reason(now)
            if reason and not self._stopped.is_set():
                print(
                    f"rank {self._rank}: {reason} for {self._silence:g} seconds, so this rank ends. Start the command again, with the "
                    "nodes that are left or when all can be reached; it goes on from what is stored",
                    file=sys.stderr,
                    flush=True,
                )
                if self._lost(now) and "TORCHELASTIC_RUN_ID" in os.environ:
                    # torchrun asks the store too, and would not notice for many minutes that its ranks have ended, nor end in order
                    with suppress(OSError):
                        os.kill(os.getppid(), signal.SIGKILL)
                self._end(1)
                return

    def _lost(self, now: float) -> bool:
        return now - self._answered > self._silence

    def _reason(self, now: float) -> str:
        """Why to end; empty: not at all."""
        if self._said.get(0) == "left":  # the store may have gone with it
            return ""
        if self._lost(now):
            return "the store that the ranks share, on the node of --rdzv-endpoint, has not answered"
        silent = [
            other for other, heard in self._heard.items() if now - heard > self._silence and self._said[other] != "left"
        ]
        if not silent:
            return ""
        return f"rank {', '.join(map(str, silent))} {'has' if len(silent) == 1 else 'have'} given no sign of life"
