"""MDS, the shard format of mosaicml-streaming, as far as shards.py needs it: its four columns, uncompressed, to the same bytes.

Not the library itself: its newest version pins transformers<5 and numpy<2.2, so that nothing can install it beside what training needs.

    index.json        {"shards": [what is said of each, with its number of samples], "version": 2}
    shard.00000.mds   samples N | N + 1 offsets from the start of the file | column names and encodings as JSON | sample 0 | sample 1 | …
    a sample          the size of each column in bytes, then the columns, both in the order of the names
    ndarray:…         a byte (axes << 2 | i) | the shape, 2^i bytes an axis | the values
    json              UTF-8

All integers are little-endian and unsigned, uint32 where nothing else is said. A `Reader` believes its folder: shard_index.py checks what a
stranger may have written there, before one is opened.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from swirl_fast.data.shard_index import COLUMNS, INDEX, shard_name

_NAMES = sorted(COLUMNS)
_UINT32 = np.dtype("<u4")
_SHAPES = ("<u1", "<u2", "<u4", "<u8")


class Writer:
    """Writes samples to `folder`, which is there, as shards of at most `size_limit` bytes, or one sample where that is larger.

    At most one shard is held. Without `finish` there is no index, and the folder cannot be taken for a whole one.
    """

    def __init__(self, folder: Path, size_limit: int) -> None:
        self._folder, self._limit = folder, size_limit
        self._about = {
            "version": 2,
            "format": "mds",
            "compression": None,
            "hashes": [],
            "size_limit": size_limit,
            "column_names": _NAMES,
            "column_encodings": [COLUMNS[name] for name in _NAMES],
            "column_sizes": [None] * len(_NAMES),
        }
        self._head = json.dumps(self._about, sort_keys=True).encode()
        self._shards: list[dict[str, Any]] = []
        self._clear()

    def write(self, columns: dict[str, Any]) -> None:
        """columns: the values by the names of COLUMNS. Raises ValueError for an array without a value or of another dtype."""
        sample = _encode(columns)
        if self._samples and self._size + len(sample) + _UINT32.itemsize > self._limit:
            self._flush()
        self._samples.append(sample)
        self._size += len(sample) + _UINT32.itemsize

    def finish(self) -> None:
        if self._samples:
            self._flush()
        text = json.dumps({"version": 2, "shards": self._shards}, sort_keys=True)
        (self._folder / INDEX).write_text(text, encoding="utf-8")

    def _clear(self) -> None:
        self._samples: list[bytes] = []
        self._size = 2 * _UINT32.itemsize + len(self._head)

    def _flush(self) -> None:
        count = len(self._samples)
        begin = (count + 2) * _UINT32.itemsize + len(self._head)
        offsets = np.asarray([*accumulate(map(len, self._samples), initial=begin)], _UINT32)
        data = b"".join((np.asarray(count, _UINT32).tobytes(), offsets.tobytes(), self._head, *self._samples))
        name = shard_name(len(self._shards))
        (self._folder / name).write_bytes(data)
        about = {"basename": name, "bytes": len(data), "hashes": {}}
        self._shards.append({"samples": count, "raw_data": about, "zip_data": None, **self._about})
        self._clear()


class Reader:
    """The samples of a folder by their place in the order written. Each is read from its file when it is asked for.

    names: of the shards. samples: how many each holds. bounds: the place of each one's first sample, and the number of all.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        shards = json.loads((folder / INDEX).read_bytes())["shards"]
        self.names = [str(shard["raw_data"]["basename"]) for shard in shards]
        self.samples = [int(shard["samples"]) for shard in shards]
        self.bounds = [*accumulate(self.samples, initial=0)]

    def __len__(self) -> int:
        return self.bounds[-1]

    def shard_of(self, place: int) -> int:
        """The number of the shard that holds the sample. Raises IndexError for a place that no sample has."""
        if not 0 <= place < len(self):
            raise IndexError(f"place {place} of {len(self)} samples")
        return bisect_right(self.bounds, place) - 1

    def __getitem__(self, place: int) -> dict[str, Any]:
        """The columns by their names; arrays are read-only.

        Raises IndexError for a place that no sample has, FileNotFoundError for a missing shard, ValueError for one that ends early.
        """
        shard = self.shard_of(place)
        with open(self._folder / self.names[shard], "rb") as file:
            file.seek((1 + place - self.bounds[shard]) * _UINT32.itemsize)
            begin, end = np.frombuffer(file.read(2 * _UINT32.itemsize), _UINT32, 2).tolist()
            file.seek(begin)
            data = file.read(end - begin)
        if len(data) != end - begin or not data:
            raise ValueError(f"{self._folder / self.names[shard]} ends within a sample")
        return _decode(data)


def _encode(columns: dict[str, Any]) -> bytes:
    data = [
        json.dumps(columns[name]).encode() if COLUMNS[name] == "json" else _encode_array(columns[name], COLUMNS[name])
        for name in _NAMES
    ]
    return b"".join((np.asarray([*map(len, data)], _UINT32).tobytes(), *data))


def _decode(data: bytes) -> dict[str, Any]:
    begin = len(_NAMES) * _UINT32.itemsize
    columns = {}
    for name, size in zip(_NAMES, np.frombuffer(data, _UINT32, len(_NAMES)).tolist(), strict=True):
        value = data[begin : begin + size]
        columns[name] = json.loads(value) if COLUMNS[name] == "json" else _decode_array(value, COLUMNS[name])
        begin += size
    return columns


def _encode_array(array: NDArray[Any], encoding: str) -> bytes:
    if array.dtype != _dtype(encoding) or not array.size or not array.ndim:
        raise ValueError(f"an array of shape {array.shape} and {array.dtype} is no {encoding} with a value")
    width = next(i for i in range(4) if max(array.shape) < 1 << (8 << i))
    return bytes([array.ndim << 2 | width]) + np.asarray(array.shape, _SHAPES[width]).tobytes() + array.tobytes()


def _decode_array(data: bytes, encoding: str) -> NDArray[Any]:
    axes, width = data[0] >> 2, data[0] % 4
    begin = 1 + (axes << width)
    shape = np.frombuffer(data[1:begin], _SHAPES[width]).tolist()
    return np.frombuffer(data[begin:], _dtype(encoding)).reshape(shape)


def _dtype(encoding: str) -> np.dtype[Any]:
    return np.dtype(encoding.partition(":")[2]).newbyteorder("<")
