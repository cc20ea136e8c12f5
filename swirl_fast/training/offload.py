"""Tensors whose numbers wait in CPU memory while another process needs the device's (engine.share_gpu).

What moves are storages, byte for byte. Tensors, their views, FSDP2's shards and the optimizer's references to them stay the objects that
they are: in between their storages are empty, and nothing may read them.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor


class Offload:
    """device: the memory that is to be freed; what lies elsewhere stays. constant: the tensors never change, so that they are copied out
    once and later only dropped."""

    def __init__(self, device: torch.device, constant: bool = False) -> None:
        self._device, self._constant = device, constant
        # Of every storage that was ever out, its bytes, uint8 [bytes]: pinned memory is slow to get, so it is kept.
        self._copies: dict[torch.UntypedStorage, Tensor] = {}
        self._away: list[torch.UntypedStorage] = []

    @torch.no_grad()
    def out(self, tensors: Iterable[Tensor]) -> None:
        """Empties the storages of these tensors, and so whatever shares them. Of a sharded one (DTensor) it is the local part."""
        assert not self._away, "what is out must come back first"
        self._away = _storages(tensors, self._device)
        known = self._copies
        self._copies = {storage: known.get(storage, _NOTHING) for storage in self._away}
        for storage in self._away:
            copy = self._copies[storage]
            if copy.numel() != storage.nbytes():
                copy = torch.empty(storage.nbytes(), dtype=torch.uint8, pin_memory=self._device.type == "cuda")
            elif self._constant:
                continue
            self._copies[storage] = copy.copy_(_bytes(storage), non_blocking=True)
        self._wait()
        for storage in self._away:
            storage.resize_(0)
        if self._device.type == "cuda":
            torch.cuda.ipc_collect()  # of weights that a server has read there
            torch.cuda.empty_cache()  # it is for another process

    @torch.no_grad()
    def back(self) -> None:
        """Gives all storages their bytes again."""
        for storage in self._away:
            copy = self._copies[storage]
            storage.resize_(copy.numel())
            _bytes(storage).copy_(copy, non_blocking=True)
        self._wait()
        self._away = []

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


_NOTHING = torch.empty(0, dtype=torch.uint8)


def _storages(tensors: Iterable[Tensor], device: torch.device) -> list[torch.UntypedStorage]:
    """Those that hold something on the device, each once. Mapped files, which only a CPU's may be, stay."""
    found: dict[int, torch.UntypedStorage] = {}
    for tensor in tensors:
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        storage = local.untyped_storage()
        if local.device.type == device.type and storage.nbytes() and storage.resizable():
            found.setdefault(storage.data_ptr(), storage)
    return list(found.values())


def _bytes(storage: torch.UntypedStorage) -> Tensor:
    """The whole storage as a tensor, uint8 [bytes]."""
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
