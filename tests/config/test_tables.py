"""Settings as a table: of Python values, or composed by OmegaConf, as Hydra hands them over."""

import decimal
import enum
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from swirl_fast.config import ConfigError, load


def test_a_table_is_read_as_the_same_yaml_is() -> None:
    table = {
        "run": {"name": "1e3"},
        "training": {"steps": 3, "betas": [0.8, 0.9]},
        "tasks": {"options": {"min_terms": 2}},
    }
    config = load(table, ["training.steps=4"])
    assert config == load(
        None, ["run.name=1e3", "training.steps=4", "training.betas=[0.8, 0.9]", "tasks.options.min_terms=2"]
    )


def test_paths_and_scalars_of_numpy_are_what_they_stand_for(tmp_path: Path) -> None:
    class Name(str, enum.Enum):
        LONG = "long"

    table = {
        "run": {"folder": tmp_path, "name": Name.LONG, "seed": np.int64(3)},
        "search.cache": PurePosixPath("a/b"),
        "training": {"steps": torch.tensor(4), "learning_rate": np.float32(0.5), "betas": (np.float64(0.25), 0.5)},
        "training.compile": np.bool_(True),
        "tasks": {"options": {"min_terms": np.uint8(2), "file": Path("x")}, "tools": ("calculator",)},
    }
    config = load(table)
    assert (config.run.folder, config.run.name, config.run.seed) == (str(tmp_path), "long", 3)
    assert config.search.cache == "a/b" and config.training.compile and config.tasks.tools == ["calculator"]
    assert (config.training.steps, config.training.learning_rate, config.training.betas) == (4, 0.5, [0.25, 0.5])
    assert config.tasks.options == {"min_terms": 2, "file": "x"}


@pytest.mark.parametrize("value", [np.zeros(2), object(), decimal.Decimal("0.5"), len, 1j, range(2)])
def test_what_no_setting_can_be_is_named_by_its_key(value: Any) -> None:
    with pytest.raises(ConfigError, match=r"^training\.betas\[1\]: an? \w+ is no setting; give a text, a path"):
        load({"training": {"betas": [0.5, value]}})
    with pytest.raises(ConfigError, match=r"^tasks\.options\.x: a"):
        load({"tasks.options": {"x": value}})


def test_omegaconf_resolves_its_interpolations() -> None:
    composed = OmegaConf.create({"rate": 2e-5, "training": {"learning_rate": "${rate}"}, "run": {"name": "r"}})
    del composed["rate"]
    with pytest.raises(ConfigError, match="rate"):
        load(composed)
    composed = OmegaConf.create({"training": {"learning_rate": 2e-5, "group_size": "${training.steps}", "steps": 6}})
    config = load(composed)
    assert (config.training.learning_rate, config.training.group_size) == (2e-5, 6)
    with pytest.raises(ConfigError, match=r"training\.lr .*unknown key; did you mean training\.learning_rate"):
        load(OmegaConf.create({"training": {"lr": 1.0}}))
