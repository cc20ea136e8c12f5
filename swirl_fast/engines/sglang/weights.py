"""Ways to bring a trainer's weights to SGLang servers: a folder they read, shared memory, or a broadcast; always bucket by bucket.

`match_weights` compares names and shapes with the model's own files first: SGLang would silently skip what it does not know.
"""

from __future__ import annotations

import base64
import functools
import io
import json
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import AutoConfig

from swirl_fast.engines.engine import EngineError, whole

T = TypeVar("T")
Bucket = list[tuple[str, Tensor]]

KEEPER_TRIES = 10  # of a second each

_INDEX = "model.safetensors.index.json"


def tied_names(folder: Path) -> frozenset[str]:
    """Weights of the output layer, which need not be sent where they are the embedding's."""
    # not only from config.json, which leaves out what is its model type's default
    tied = AutoConfig.from_pretrained(folder, trust_remote_code=False).get_text_config().tie_word_embeddings
    return frozenset({"lm_head.weight"}) if tied else frozenset()


def vocabulary_of(folder: Path) -> int | None:
    """How many token ids the model of a Hugging Face folder has; None where its config does not say."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return config.get("text_config", config).get("vocab_size")


def shapes_of(folder: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a Hugging Face folder's weights, from the headers of its safetensors files."""
    from safetensors import safe_open

    shapes = {}
    for file in _files(folder):
        with safe_open(file, "pt") as opened:
            for name in opened.keys():
                shapes[name] = tuple(opened.get_slice(name).get_shape())
    return shapes


def read_weights(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """The weights of a Hugging Face folder's safetensors files, one at a time."""
    from safetensors import safe_open

    for file in _files(folder):
        with safe_open(file, "pt") as opened:
            for name in opened.keys():
                yield name, opened.get_tensor(name)


def _files(folder: Path) -> list[Path]:
    """Those of the index where there is one: some folders hold the weights a second time, under other names."""
    index = folder / _INDEX
    if index.is_file():
        return [
            folder / name for name in sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        ]
    return sorted(folder.glob("*.safetensors"))


def match_weights(
    named: Iterable[tuple[str, Tensor]], shapes: dict[str, tuple[int, ...]], tied: frozenset[str]
) -> list[tuple[str, Tensor]]:
    """The tensors as a list, each as it comes, sharded or not. Raises KeyError for names the model does not have and for missing ones,
    ValueError for a wrong shape. shapes: of the model's own files, empty when there are none to compare with. tied: names that
    need not come, since they share another's weights."""
    tensors = list(named)
    if not shapes:
        return tensors
    for name, tensor in tensors:
        if name not in shapes and name not in tied:
            raise KeyError(f"the model has no weights named {name}; its names are like {next(iter(shapes))}")
        if tuple(tensor.shape) != shapes.get(name, tuple(tensor.shape)):
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, the model's is {shapes[name]}")
    missing = shapes.keys() - {name for name, _ in tensors} - tied
    if missing:
        some = ", ".join(sorted(missing)[:3])
        raise KeyError(f"{len(missing)} weights are missing: {some}; send every parameter of the model")
    return tensors


def buckets(named: Iterable[tuple[str, Tensor]], limit: int, dtype: torch.dtype) -> Iterator[Bucket]:
    """Gathers and casts tensors, and groups them to at most `limit` bytes; one that is larger gets a bucket of its own."""
    bucket: Bucket = []
    size = 0
    for name, given in named:
        tensor = whole(given, dtype)
        own = tensor.numel() * tensor.element_size()
        if bucket and size + own > limit:
            yield bucket
            bucket, size = [], 0
        bucket.append((name, tensor))
        size += own
    if bucket:
        yield bucket


class Snapshot:
    """Weights written bucket by bucket to `folder/NAME`, a Hugging Face folder once `finish` has renamed it.

    source: the folder whose config and tokenizer files are copied. `prune` removes the snapshots before it.
    """

    def __init__(self, folder: Path, name: str, source: Path) -> None:
        self.target = folder / name
        self._writing = folder / f"{name}.tmp"
        self._map: dict[str, str] = {}
        self._size = 0
        shutil.rmtree(self._writing, ignore_errors=True)
        self._writing.mkdir(parents=True)
        for file in source.iterdir():
            if (
                file.is_file()
                and file.suffix in (".json", ".txt", ".model", ".jinja", ".py")
                and not file.name.endswith(_INDEX)
            ):
                shutil.copy(file, self._writing / file.name)

    def add(self, bucket: Bucket) -> None:
        from safetensors.torch import save_file

        name = f"model-{len(set(self._map.values())) + 1:05d}.safetensors"
        tensors = {key: tensor.to("cpu", copy=True).contiguous() for key, tensor in bucket}
        save_file(tensors, self._writing / name, metadata={"format": "pt"})
        self._map |= dict.fromkeys(tensors, name)
        self._size += sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())

    def finish(self) -> Path:
        (self._writing / _INDEX).write_text(
            json.dumps({"metadata": {"total_size": self._size}, "weight_map": self._map}), encoding="utf-8"
        )
        shutil.rmtree(self.target, ignore_errors=True)
        self._writing.rename(self.target)
        return self.target

    def prune(self) -> None:
        for old in self.target.parent.glob("v*"):
            if old != self.target and re.fullmatch(r"v\d+(\.tmp)?", old.name):
                shutil.rmtree(old, ignore_errors=True)


def pickle_handles(bucket: Bucket, copies: int) -> list[str]:
    """A bucket as SGLang's /update_weights_from_tensor takes it: one pickle of handles for each tensor-parallel rank.

    On a CPU the tensors are moved to shared memory; on a GPU their CUDA IPC handles are sent, which needs sglang's patch of torch's
    reductions (devices are named by their id, since each process numbers them differently).
    """
    if bucket[0][1].is_cuda:
        try:
            from sglang.srt.utils.patch_torch import monkey_patch_torch_reductions
        except ImportError:
            raise EngineError(
                "engine.weight_sync.method=tensor needs the package sglang in the trainer's environment too, for GPU weights; "
                "install it there, or use disk or distributed"
            ) from None
        monkey_patch_torch_reductions()
    # file descriptors cannot be handed to a process that is not a child of this one; names of files can
    before = torch.multiprocessing.get_sharing_strategy()
    torch.multiprocessing.set_sharing_strategy("file_system")
    try:
        if not bucket[0][1].is_cuda:
            _start_keeper()
        payloads = []
        for _ in range(copies):
            payloads.append(base64.b64encode(_patiently(lambda: _pickled(bucket))).decode())
        return payloads
    finally:
        torch.multiprocessing.set_sharing_strategy(before)


def _pickled(bucket: Bucket) -> bytes:
    buffer = io.BytesIO()
    ForkingPickler(buffer).dump(bucket)
    return buffer.getvalue()


def _patiently(share: Callable[[], T]) -> T:
    """torch gives its keeper of shared files a second to answer, which is not always enough on a busy machine."""
    for left in reversed(range(KEEPER_TRIES)):
        try:
            return share()
        except RuntimeError as error:
            if not left or "memory manager" not in str(error):
                raise
    raise AssertionError("the last try returns or raises")


@functools.cache
def _start_keeper() -> None:
    """Once a process. The first shared file makes torch start a process that keeps them, and it stays while any server that read one
    runs. It must not hold this process's stderr: whoever reads that to its end would wait as long."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        _patiently(lambda: torch.zeros(1).share_memory_())
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


class Broadcast:
    """A process group of the trainer (rank 0) and all ranks of some servers, only for their weights.

    The default process group is left as it is; torch has no public way to make a group with processes outside of it, so this uses the
    helper that SGLang itself uses on its side.
    """

    def __init__(self, name: str, address: str, port: int, world_size: int, backend: str, timeout: float) -> None:
        self.name, self.address, self.port = name, address, port
        self.world_size, self.backend, self.timeout = world_size, backend, timeout
        self._group: Any = None

    def join(self) -> None:
        """Blocks until all servers have joined; they must have been asked to before. Raises EngineError after the time-out."""
        from torch.distributed import PrefixStore, TCPStore
        from torch.distributed.distributed_c10d import Backend, GroupName, _new_process_group_helper, _world

        wait = timedelta(seconds=self.timeout)
        try:
            store = TCPStore(
                self.address, self.port, self.world_size, is_master=True, timeout=wait, wait_for_workers=False
            )
            self._group, _ = _new_process_group_helper(
                self.world_size,
                0,
                [],
                Backend(self.backend),
                PrefixStore(self.name, store),
                group_name=GroupName(self.name),
                timeout=wait,
            )
        except (RuntimeError, ValueError) as error:
            raise EngineError(
                f"engine.weight_sync: no process group with the servers at {self.address}:{self.port} ({error}). "
                "Is engine.weight_sync.address an address of this machine that every server reaches?"
            ) from None
        _world.pg_group_ranks[self._group] = {i: i for i in range(self.world_size)}

    def send(self, bucket: Bucket, failed: Callable[[], str | None]) -> None:
        """Broadcasts a bucket. failed: asked meanwhile for a server's refusal; a server that does not take part would let this wait
        forever. Raises EngineError then, and after the time-out; the group is of no use any more."""
        tensors = [tensor.contiguous() for _, tensor in bucket]
        works = [torch.distributed.broadcast(tensor, 0, group=self._group, async_op=True) for tensor in tensors]
        end = time.monotonic() + self.timeout
        for work in works:
            while not work.is_completed():
                reason = failed()
                if reason is None and time.monotonic() > end:
                    reason = f"not done in engine.weight_sync.timeout={self.timeout:g} s"
                if reason is not None:
                    raise EngineError(f"the broadcast of weights broke off: {reason}")
                time.sleep(0.001)
            try:
                work.wait()
            except RuntimeError as error:
                raise EngineError(f"the broadcast of weights broke off: {error}") from None

    def leave(self) -> None:
        if self._group is not None:
            torch.distributed.destroy_process_group(self._group)
            self._group = None
