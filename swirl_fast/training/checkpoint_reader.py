"""DCP's files read as data. They hold pickles, which may name any function of Python; those named here only describe tensors."""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import ReadItem

METADATA = ".metadata"
_DCP = "torch.distributed.checkpoint"
_CLASSES = {
    *(
        (f"{_DCP}.metadata", name)
        for name in (
            "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta", "TensorProperties",
            "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
        )
    ),
    (f"{_DCP}.filesystem", "_StorageInfo"),
    ("collections", "OrderedDict"),
    ("pathlib", "PosixPath"),
    ("pathlib._local", "PosixPath"),  # Python 3.13
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),  # looks a name up
}  # fmt: skip


def load(path: Path, values: dict[str, Any]) -> None:
    """Restores `values` in place from a checkpoint. Collective.

    Raises ValueError on every rank, before anything is restored, when .metadata names what no checkpoint needs or a file outside the
    folder, CheckpointException when the checkpoint does not fit `values` or one of them holds code.
    """
    dcp.load(values, storage_reader=_Reader(path), planner=_Planner(), no_dist=not dist.is_initialized())


def read_metadata(path: Path) -> Metadata:
    file = path / METADATA
    with file.open("rb") as stream:
        try:
            metadata = _Unpickler(stream).load()
        except pickle.UnpicklingError as error:
            raise ValueError(
                f"{file}: {error}; nothing of it was run: remove {path.name}, or take it again from where it was made"
            ) from error
    if not isinstance(metadata, Metadata):
        raise ValueError(
            f"{file} holds no metadata of a checkpoint but a {type(metadata).__name__}: remove {path.name}"
        )
    for place in (metadata.storage_data or {}).values():
        if Path(place.relative_path).name != place.relative_path:
            raise ValueError(f"{file} names a file outside its folder, {place.relative_path}: remove {path.name}")
    return metadata


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _CLASSES or (module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"names {module}.{name}, which no checkpoint needs")


class _Reader(dcp.FileSystemReader):
    """Its tensors are read with weights_only by DCP itself."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._metadata = read_metadata(path)

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        if self._metadata.storage_meta is None:
            self._metadata.storage_meta = StorageMeta()
        self._metadata.storage_meta.load_id = self.load_id
        return self._metadata


class _Planner(dcp.DefaultLoadPlanner):
    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        data = io.BytesIO()  # DCP reads it with weights_only=False, so it gets what is only data
        torch.save(torch.load(value, weights_only=True), data)
        data.seek(0)
        super().load_bytes(read_item, data)
