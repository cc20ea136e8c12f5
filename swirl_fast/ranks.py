"""This process among those that torchrun started, and what they send each other beside gradients and weights: gloo on CPUs, nccl on
GPUs."""

from __future__ import annotations

import os
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")

# Ranks wait so long for one whose server hangs and is started again, or whose disk is slow. nccl's own 10 minutes are less than a request
# may take (engine.timeout). A rank that dies does not take that long: torchrun ends the others.
TIMEOUT = timedelta(hours=2)


_store: dist.Store | None = None


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

    def numbers(self, value: float) -> list[float]:
        """Every rank's number, in the order of ranks; rounded to float32, 4 bytes a rank."""
        if not self.distributed:
            return [value]
        values = torch.empty(self.size)
        dist.all_gather_into_tensor(values, torch.tensor([value], dtype=torch.float32))
        return values.tolist()

    def exchange(self, given: Mapping[int, T], givers: Sequence[int]) -> list[T]:
        """Sends each rank in `given` a value, pickled; returns those of `givers`, in their order. All sides must name each other. What
        arrives is held twice for a moment."""
        sent = []
        for rank, value in given.items():
            blob = torch.frombuffer(bytearray(pickle.dumps(value, protocol=5)), dtype=torch.uint8)
            for part in (torch.tensor([len(blob)]), blob):
                sent.append((part, dist.isend(part, rank)))  # the tensor must live until it is sent
        found = []
        for rank in givers:
            length = torch.zeros(1, dtype=torch.int64)
            dist.recv(length, rank)
            blob = torch.empty(int(length), dtype=torch.uint8)
            dist.recv(blob, rank)
            found.append(pickle.loads(blob.numpy().tobytes()))
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
        global _store
        _store = store
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=TIMEOUT)
    device = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
    return Ranks(dist.get_rank(), dist.get_world_size(), device)


def shared_store() -> dist.Store | None:
    """The keys and values that all ranks share; None without torchrun."""
    return _store


def stop() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
