"""Settings as a table: of Python values, or composed by OmegaConf, as Hydra hands them over."""

import pytest
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
