"""What index.json and manifest.json of a shard folder may say: what write_shards writes, and nothing else.

Both may come from strangers, with hashes that fit. The library believes index.json: of a column with encoding `pkl` it runs what the
shard says, and it joins the names of files to the folder without a look at them. So both are compared, before it opens anything.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

INDEX = "index.json"
COLUMNS = {"tokens": "ndarray:int32", "spans": "ndarray:int32", "logprobs": "ndarray:float32", "meta": "json"}
MAX_BYTES = 1 << 32  # of a shard: MDS keeps offsets as uint32
ENTRY_BYTES = 1 << 12  # of a shard in index.json, at most; the writer needs 500
DISTRUST = "filter did not write this; use only shards that you can trust"


def shard_name(number: int) -> str:
    """As MDSWriter names them."""
    return f"shard.{number:05}.mds"


def check_files(files: Any, shown: str) -> None:
    """Raises ValueError unless these are the files that write_shards writes: index.json and shard.00000.mds, shard.00001.mds, …

    files: of the manifest. shown: what error messages call the manifest.
    """
    if not isinstance(files, dict) or len(files) < 2:
        raise ValueError(f"{shown} names no shard: {DISTRUST}")
    expected = {INDEX, *map(shard_name, range(len(files) - 1))}
    if unknown := sorted(files.keys() - expected):
        raise ValueError(
            f"{shown} names a file {unknown[0]!r}, but a shard folder holds {INDEX}, {shard_name(0)}, …: {DISTRUST}"
        )
    for name, entry in files.items():
        limit = MAX_BYTES if name != INDEX else ENTRY_BYTES * len(files)
        if not isinstance(entry, dict) or entry.keys() != {"bytes", "xxh64"}:
            raise ValueError(f"{shown}: {name} has {entry!r:.80} in the place of bytes and xxh64: {DISTRUST}")
        if not _is_count(entry["bytes"]) or entry["bytes"] >= limit:
            raise ValueError(
                f"{shown}: {name} has bytes {entry['bytes']!r:.80}, not a whole number below {limit}: {DISTRUST}"
            )
        if not isinstance(entry["xxh64"], str) or not re.fullmatch(r"[0-9a-f]{16}", entry["xxh64"]):
            raise ValueError(f"{shown}: {name} has xxh64 {entry['xxh64']!r:.80}, not 16 hex digits: {DISTRUST}")


def check_index(text: bytes, files: Mapping[str, Mapping[str, Any]], trajectories: int, shown: str) -> None:
    """Raises ValueError unless this is the index that write_shards writes for these files and so many trajectories."""
    try:
        index = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{shown} is not JSON ({error}): {DISTRUST}") from error
    shards = index.get("shards") if isinstance(index, dict) else None
    if not isinstance(shards, list) or index != {"shards": shards, "version": 2} or len(shards) != len(files) - 1:
        raise ValueError(
            f"{shown} is not an index of version 2 with the {len(files) - 1} shards of the manifest: {DISTRUST}"
        )
    for number, shard in enumerate(shards):
        _check_shard(shard, number, files, shown)
    if (samples := sum(shard["samples"] for shard in shards)) != trajectories:
        raise ValueError(f"{shown}: {samples} samples, the manifest says {trajectories}: {DISTRUST}")


def _check_shard(shard: Any, number: int, files: Mapping[str, Mapping[str, Any]], shown: str) -> None:
    names, name = sorted(COLUMNS), shard_name(number)
    expected = {
        "column_encodings": [COLUMNS[column] for column in names],
        "column_names": names,
        "column_sizes": [None] * len(names),
        "compression": None,
        "format": "mds",
        "hashes": [],
        "raw_data": {"basename": name, "bytes": files[name]["bytes"], "hashes": {}},
        "version": 2,
        "zip_data": None,
    }
    if not isinstance(shard, dict) or shard.keys() != expected.keys() | {"samples", "size_limit"}:
        raise ValueError(f"{shown}: {name} is not described as filter describes it: {DISTRUST}")
    for key, value in expected.items():
        if json.dumps(shard[key], sort_keys=True) != json.dumps(
            value, sort_keys=True
        ):  # tells 2 from 2.0, and 1 from True
            raise ValueError(f"{shown}: {key} of {name} is {shard[key]!r:.200} instead of {value!r}: {DISTRUST}")
    for key in ("samples", "size_limit"):
        if not _is_count(shard[key]) or not 0 < shard[key] < MAX_BYTES:
            raise ValueError(f"{shown}: {key} of {name} is {shard[key]!r:.80}, not a whole number above 0: {DISTRUST}")


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0
