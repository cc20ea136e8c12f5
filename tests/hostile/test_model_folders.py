"""A model folder that brings code of its own: nothing is asked on stdin, nothing runs, the error names the folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from swirl_fast.config import ConfigError, ModelConfig
from swirl_fast.models.load import load_config, load_model


def test_auto_map_is_never_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("builtins.input", lambda prompt="": "y")
    (tmp_path / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n", encoding="utf-8")
    values = {"model_type": "own_type", "auto_map": {"AutoConfig": "own.C", "AutoModelForCausalLM": "own.M"}}
    (tmp_path / "config.json").write_text(json.dumps(values), encoding="utf-8")
    config = ModelConfig(path=str(tmp_path))
    for load in (load_config, lambda config: load_model(config, "float32")):
        with pytest.raises(ConfigError, match=rf"model\.path={tmp_path}: brings code of its own .*which is never run"):
            load(config)
    assert not (tmp_path / "ran").exists()
