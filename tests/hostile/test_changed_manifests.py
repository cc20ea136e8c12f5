"""Manifests that were changed at random: refused with a message or still true of the files, and no other error."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.mutations import changed, damaged, written
from support.stores import FINGERPRINT, make_samples

from swirl_fast.config import ConfigError
from swirl_fast.data import shards
from swirl_fast.data.shards import parse_manifest, verify_shards, write_shards
from swirl_fast.files import hash_file
from swirl_fast.models.manifest import check_manifest, write_manifest
from swirl_fast.training.checkpoint import damage

FILES = {"config.json": "{}", "tokenizer.json": "[]", "model.safetensors": "weights", "chat_template.jinja": "{{ x }}"}
CHECKPOINT = {".metadata": "what is where", "state.json": '{"step": 3}', "__0_0.distcp": "tensors"}
_few = settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])


@pytest.fixture(scope="module")
def shard_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards") / "shards"
    write_shards(folder, make_samples(2), fingerprint=FINGERPRINT)
    return folder


@given(data=st.data())
@_few
def test_a_shard_manifest(shard_folder: Path, data: st.DataObject) -> None:
    """Its bytes damaged, or its values changed without a new seal."""
    text = (shard_folder / "manifest.json").read_bytes()
    whole = parse_manifest(text, "m")
    other = data.draw(damaged(text) | changed(json.loads(text)).map(written))
    try:
        assert parse_manifest(other, "m") == whole
    except ValueError as error:
        assert str(error).startswith("m ")


@given(data=st.data())
@_few
def test_a_shard_manifest_that_was_sealed_again(shard_folder: Path, data: st.DataObject) -> None:
    """Its files are still the files, or it is refused."""
    path = shard_folder / "manifest.json"
    text = path.read_bytes()
    body = json.loads(text)
    del body["xxh64"]
    other = data.draw(changed(body))
    if not isinstance(other, dict):
        return
    try:
        path.write_text(json.dumps({**other, "xxh64": shards._hash_json(other)}), encoding="utf-8")
        assert verify_shards(shard_folder).files == body["files"]
    except ValueError as error:
        assert "manifest.json" in str(error) or "shard" in str(error)
    finally:
        path.write_bytes(text)


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"files": ' * 50_000, "\0", '{"files": {"a\\u0000b": {"bytes": 1, "xxh64": ""}}}']
)
def test_texts_that_no_random_change_finds(tmp_path: Path, text: str) -> None:
    folder = model_folder(tmp_path)
    (folder / "manifest.json").write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match="model.path=m: "):
        check_manifest(folder, "model.path=m")
    with pytest.raises(ValueError, match="m is damaged"):
        parse_manifest(text.encode(), "m")
    for name in CHECKPOINT:
        (folder / name).touch()
    assert damage(folder)


@pytest.mark.parametrize("name", sorted(FILES))
def test_a_file_of_a_model_that_the_manifest_leaves_out_is_refused(tmp_path: Path, name: str) -> None:
    folder = model_folder(tmp_path)
    body = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    del body["files"][name]
    (folder / "manifest.json").write_text(json.dumps(body), encoding="utf-8")
    with pytest.raises(ConfigError, match=f"model.path=m: {name} is not in manifest.json"):
        check_manifest(folder, "model.path=m")


@pytest.mark.parametrize("name", sorted(CHECKPOINT))
def test_a_file_of_a_checkpoint_that_the_manifest_leaves_out_is_damage(tmp_path: Path, name: str) -> None:
    for file, text in CHECKPOINT.items():
        (tmp_path / file).write_text(text, encoding="utf-8")
    hashes = {file: hash_file(tmp_path / file) for file in CHECKPOINT if file != name}
    (tmp_path / "manifest.json").write_text(json.dumps(hashes), encoding="utf-8")
    assert damage(tmp_path) == f"manifest.json does not name {name}"


def model_folder(base: Path) -> Path:
    folder = base / "model"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for name, text in FILES.items():
        (folder / name).write_text(text, encoding="utf-8")
    write_manifest(folder)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_folder(tmp_path_factory.mktemp("base"))


@given(data=st.data())
@_few
def test_the_manifest_of_a_model(model: Path, tmp_path: Path, data: st.DataObject) -> None:
    """Alone, and together with a file that was changed: whatever became of the manifest, the file is never taken for whole."""
    folder = tmp_path / "copy"
    shutil.copytree(model, folder, dirs_exist_ok=True)
    path = folder / "manifest.json"
    text = path.read_bytes()
    path.write_bytes(data.draw(damaged(text) | changed(json.loads(text)).map(written)))
    try:
        check_manifest(folder, "model.path=m")
    except ConfigError as error:
        assert str(error).startswith("model.path=m: ")
    with (folder / data.draw(st.sampled_from(sorted(FILES)))).open("ab") as file:
        file.write(b"!")
    with pytest.raises(ConfigError, match="model.path=m: "):
        check_manifest(folder, "model.path=m")


@given(data=st.data())
@_few
def test_the_manifest_of_a_checkpoint(tmp_path: Path, data: st.DataObject) -> None:
    for name, text in CHECKPOINT.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    hashes = {name: hash_file(tmp_path / name) for name in CHECKPOINT}
    (tmp_path / "manifest.json").write_bytes(data.draw(damaged(written(hashes)) | changed(hashes).map(written)))
    assert isinstance(damage(tmp_path), str | None)
    with (tmp_path / data.draw(st.sampled_from(sorted(CHECKPOINT)))).open("ab") as file:
        file.write(b"!")
    assert isinstance(damage(tmp_path), str)
