"""Evaluations of a run: of which weights they are, and those that make room for others."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from support.runs import overrides
from support.small_models import train_tokenizer

from swirl_fast import cli
from swirl_fast.data.store import Store
from swirl_fast.models.load import weights_hash
from swirl_fast.stages.evaluation_files import FILES, make_room


def test_weights_in_bin_files_are_hashed(tmp_path: Path) -> None:
    none = weights_hash(tmp_path)
    (tmp_path / "training_args.bin").write_bytes(b"x")
    assert weights_hash(tmp_path) == none
    (tmp_path / "pytorch_model.bin").write_bytes(b"one")
    one = weights_hash(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"two")
    two = weights_hash(tmp_path)
    assert len({none, one, two}) == 3
    (tmp_path / "model.safetensors").write_bytes(b"two")
    beside = weights_hash(tmp_path)
    (tmp_path / "pytorch_model.bin").unlink()
    assert beside == weights_hash(tmp_path) != two


def test_weights_that_model_path_cannot_ask_are_refused_before_anything_is_written(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["evaluate", *overrides(tmp_path / "runs", tiny_model), "--of"]
    assert cli.main([*arguments, str(tmp_path / "typo")]) == 2
    shown = capsys.readouterr().err
    assert f"--of {tmp_path / 'typo'}: no folder with a config.json" in shown and "base, trained" in shown
    other = tmp_path / "other"
    shutil.copytree(tiny_model, other)
    train_tokenizer(["quite another text, of which other words are made"] * 3).save_pretrained(other)
    assert cli.main([*arguments, str(other)]) == 2
    assert f"use model.path={other} --of base --name other" in capsys.readouterr().err
    for name in ("a/b", ".hidden", "a\nb<b>", "e" * 260, "ä" * 150):
        assert cli.main([*arguments, str(tiny_model), "--name", name]) == 2
        assert f"--name {name}: must be a plain file name: printable characters" in capsys.readouterr().err
    assert cli.main([*arguments, "base", "--name", "collected"]) == 2
    assert "--name collected: is what `show` and the report call the collection" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_an_evaluation_is_set_aside_with_its_own_files_alone(tmp_path: Path) -> None:
    for name in ("llama-3", "llama-3.1-8b"):
        with Store(tmp_path / f"{name}.db") as store:
            store.set_meta("evaluation", {"weights": "one"})
        for ending in ("json", "yaml"):
            (tmp_path / f"{name}.{ending}").write_text(name)
    other = {path.name: path.read_bytes() for path in tmp_path.glob("llama-3.1-8b.*")}
    make_room(tmp_path, "llama-3", {"weights": "one"})
    assert not list(tmp_path.glob("llama-3-1.*"))
    with Store(tmp_path / "llama-3.db"), pytest.raises(ValueError, match="llama-3.db is being written by process"):
        make_room(tmp_path, "llama-3", {"weights": "two"})
    make_room(tmp_path, "llama-3", {"weights": "two"})
    assert {path.name: path.read_bytes() for path in tmp_path.glob("llama-3.1-8b.*")} == other
    assert (
        (tmp_path / "llama-3-1.json").read_text(encoding="utf-8")
        == (tmp_path / "llama-3-1.yaml").read_text(encoding="utf-8")
        == "llama-3"
    )
    with Store(tmp_path / "llama-3-1.db", writable=False) as store:
        assert store.meta() == {"evaluation": {"weights": "one"}}
    assert not [ending for ending in FILES if (tmp_path / f"llama-3.{ending}").exists()]


def test_an_evaluation_that_was_set_aside_comes_back_when_it_is_asked_for_again(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["evaluate", *overrides(tmp_path, tiny_model, "tasks.eval_limit=2"), "--of", "base", "--name"]
    evaluations = tmp_path / "r" / "evaluations"
    assert cli.main([*arguments, "one"]) == 0 and cli.main([*arguments, "one-2"]) == 0
    greedy = (evaluations / "one.json").read_bytes()
    assert cli.main([*arguments, "one", "evaluate.temperature=0.7"]) == 0
    assert (evaluations / "one-1.json").read_bytes() == greedy != (evaluations / "one.json").read_bytes()
    sampled = json.loads((evaluations / "one.json").read_text(encoding="utf-8"))
    capsys.readouterr()
    assert cli.main([*arguments, "one"]) == 0
    shown = capsys.readouterr().out
    assert "one-1 was of these weights and settings; it is the evaluation one again" in shown
    assert "tokens generated" not in shown
    again, expected = json.loads((evaluations / "one.json").read_text(encoding="utf-8")), json.loads(greedy)
    assert again | {"seconds": 0} == expected | {"seconds": 0}
    assert json.loads((evaluations / "one-3.json").read_text(encoding="utf-8")) == sampled
    assert json.loads((evaluations / "one-2.json").read_text(encoding="utf-8"))["name"] == "one-2", (
        "asked for by this name"
    )
    assert not list(evaluations.glob("one-1.*"))
