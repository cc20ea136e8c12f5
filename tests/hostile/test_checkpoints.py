"""Checkpoints that hold code instead of data, with hashes that match: they are refused by name and run nothing."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from swirl_fast.files import hash_file
from swirl_fast.ranks import Ranks
from swirl_fast.training.checkpoint import Checkpoints, load_weights
from swirl_fast.training.checkpoint_reader import METADATA

ALONE = Ranks(0, 1, torch.device("cpu"))


class Code:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.target}",)


def new_training() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    model = torch.nn.Linear(4, 3)
    return model, torch.optim.AdamW(model.parameters())


def seal(checkpoint: Path, name: str) -> None:
    manifest = json.loads((checkpoint / "manifest.json").read_text(encoding="utf-8"))
    manifest[name] = hash_file(checkpoint / name)
    (checkpoint / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    with Checkpoints(tmp_path / "checkpoints", ALONE, keep=1) as checkpoints:
        checkpoints.save(1, *new_training(), {"step": 1})
    return tmp_path / "checkpoints/step_000001"


def refused(checkpoint: Path, match: str) -> None:
    model, optimizer = new_training()
    with Checkpoints(checkpoint.parent, ALONE, keep=1) as checkpoints, pytest.raises(ValueError, match=match):
        checkpoints.load_latest(model, optimizer)
    with pytest.raises(ValueError, match=match):
        load_weights(checkpoint, model)


def test_metadata_that_names_a_function_runs_nothing(checkpoint: Path, tmp_path: Path) -> None:
    metadata = pickle.loads((checkpoint / METADATA).read_bytes())
    metadata.planner_data = Code(tmp_path / "ran")
    (checkpoint / METADATA).write_bytes(pickle.dumps(metadata))
    seal(checkpoint, METADATA)
    refused(checkpoint, r"step_000001/\.metadata: names (posix|os)\.system, .*remove step_000001")
    assert not (tmp_path / "ran").exists()


def test_metadata_that_names_a_file_elsewhere_is_refused(checkpoint: Path) -> None:
    metadata = pickle.loads((checkpoint / METADATA).read_bytes())
    next(iter(metadata.storage_data.values())).relative_path = "../elsewhere.distcp"
    (checkpoint / METADATA).write_bytes(pickle.dumps(metadata))
    seal(checkpoint, METADATA)
    refused(checkpoint, r"names a file outside its folder, \.\./elsewhere")


def test_a_value_that_names_a_function_runs_nothing(checkpoint: Path, tmp_path: Path) -> None:
    metadata = pickle.loads((checkpoint / METADATA).read_bytes())
    place = next(place for index, place in metadata.storage_data.items() if "param_groups" in index.fqn)
    file = checkpoint / place.relative_path
    place.offset = file.stat().st_size
    with file.open("ab") as stream:
        torch.save(Code(tmp_path / "ran"), stream)
    place.length = file.stat().st_size - place.offset
    (checkpoint / METADATA).write_bytes(pickle.dumps(metadata))
    for name in (METADATA, file.name):
        seal(checkpoint, name)
    with (
        Checkpoints(checkpoint.parent, ALONE, keep=1) as checkpoints,
        pytest.raises(RuntimeError, match=r"(?s)step_000001 cannot be loaded.*system"),
    ):
        checkpoints.load_latest(*new_training())
    assert not (tmp_path / "ran").exists()
