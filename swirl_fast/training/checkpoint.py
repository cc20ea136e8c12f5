"""Checkpoints: DCP for model and optimizer, JSON for the loop's own state, a manifest of hashes over all of it.

A checkpoint is written under a temporary name and renamed when everything lies on disk, so that a folder `step_000010` is
whole or damaged later. DCP loads flipped bytes silently, hence the hashes: a damaged checkpoint is skipped with a warning in
favour of the one before.
"""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
import xxhash
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from swirl_fast.policy import Policy
from swirl_fast.training.parallel import Ranks

_MANIFEST = "manifest.json"


def save(
    folder: Path,
    step: int,
    policy: Policy,
    optimizer: torch.optim.Optimizer,
    state: dict[str, Any],
    ranks: Ranks,
    keep: int,
) -> Path:
    """Writes `folder/step_N` and removes all but the last `keep`. Collective. state: JSON-able, the same on every rank."""
    target = folder / f"step_{step:06d}"
    writing = folder / f"{target.name}.tmp"
    if ranks.main:
        shutil.rmtree(writing, ignore_errors=True)
        writing.mkdir(parents=True)
    ranks.barrier()
    model_state, optimizer_state = get_state_dict(policy, optimizer)
    with _quiet():
        dcp.save(
            {"model": model_state, "optimizer": optimizer_state}, checkpoint_id=writing, no_dist=not ranks.distributed
        )
    ranks.barrier()
    if ranks.main:
        (writing / "state.json").write_text(json.dumps(state))
        hashes = {file.name: _hash(file) for file in sorted(writing.iterdir())}
        (writing / _MANIFEST).write_text(json.dumps(hashes, indent=1))
        for file in writing.iterdir():
            _fsync(file)
        shutil.rmtree(target, ignore_errors=True)
        writing.rename(target)
        _fsync(folder)
        for old in _checkpoints(folder)[:-keep]:
            shutil.rmtree(old)
    ranks.barrier()
    return target


def load_latest(folder: Path, policy: Policy, optimizer: torch.optim.Optimizer, ranks: Ranks) -> dict[str, Any] | None:
    """Restores the newest whole checkpoint and returns its state, None when there is none. Collective."""
    step = -1
    if ranks.main:
        whole = latest(folder)
        step = int(whole.name.removeprefix("step_")) if whole else -1
    step = int(ranks.max(torch.tensor([step]))[0])
    if step < 0:
        return None
    source = folder / f"step_{step:06d}"
    model_state, optimizer_state = get_state_dict(policy, optimizer)
    with _quiet():
        dcp.load(
            {"model": model_state, "optimizer": optimizer_state}, checkpoint_id=source, no_dist=not ranks.distributed
        )
    set_state_dict(policy, optimizer, model_state_dict=model_state, optim_state_dict=optimizer_state)
    return json.loads((source / "state.json").read_text())


def latest(folder: Path) -> Path | None:
    """The newest checkpoint whose files match their hashes; warns about damaged ones."""
    for path in reversed(_checkpoints(folder)):
        problem = damage(path)
        if problem is None:
            return path
        warnings.warn(f"checkpoint {path} is damaged ({problem}); using the one before it", stacklevel=2)
    return None


def damage(path: Path) -> str | None:
    """What is wrong with a checkpoint, None when it is whole."""
    try:
        hashes = json.loads((path / _MANIFEST).read_text())
    except (OSError, ValueError) as error:
        return f"{_MANIFEST}: {error}"
    for name, wanted in hashes.items():
        if not (path / name).is_file():
            return f"{name} is missing"
        if _hash(path / name) != wanted:
            return f"{name} does not match its hash"
    return None


@contextmanager
def _quiet() -> Iterator[None]:
    """Without DCP's warning that there is no process group, which in one process is as it should be."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def _checkpoints(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("step_*") if path.is_dir() and not path.name.endswith(".tmp"))


def _hash(file: Path) -> str:
    digest = xxhash.xxh64()
    with file.open("rb") as stream:
        while block := stream.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
