"""What export writes: the type of the source, equal file modes, its licence, and a manifest that finds a flipped bit."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.small_models import train_tokenizer
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from swirl_fast.config import EMBEDDED_MODEL, ConfigError, ModelConfig, load
from swirl_fast.models.load import check_weights_folder, load_model, load_tokenizer, resolve
from swirl_fast.models.policy import Policy
from swirl_fast.ranks import Ranks
from swirl_fast.training import build
from swirl_fast.training.export import export

ONE = Ranks(0, 1, torch.device("cpu"))


def source(folder: Path, dtype: torch.dtype) -> ModelConfig:
    tokenizer = train_tokenizer(["1 + 2"])
    tokenizer.chat_template = "{{ messages[0].content }}"
    tokenizer.save_pretrained(folder)
    size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=512, tie_word_embeddings=False, **size)
    LlamaForCausalLM(config).to(dtype).save_pretrained(folder)
    return ModelConfig(path=str(folder))


def exported(folder: Path, config: ModelConfig, wanted: str = "source") -> Path:
    settings = load(None, [f"model.path={config.path}", f"training.export_dtype={wanted}"])
    policy = Policy(load_model(config, "float32"), 1.0)
    build._export(settings, folder, policy, load_tokenizer(config), ONE)
    return folder


@pytest.mark.parametrize(
    ("dtype", "wanted", "expected"),
    [
        (torch.bfloat16, "source", torch.bfloat16),
        (torch.float16, "source", torch.float16),
        (torch.float32, "source", torch.float32),
        (torch.bfloat16, "float32", torch.float32),
        (torch.float32, "bfloat16", torch.bfloat16),
    ],
)
def test_weights_have_the_type_of_the_source_unless_another_is_set(
    tmp_path: Path, dtype: torch.dtype, wanted: str, expected: torch.dtype
) -> None:
    config = source(tmp_path / "source", dtype)
    folder = exported(tmp_path / "model", config, wanted)
    before, after = (load_file(one / "model.safetensors") for one in (tmp_path / "source", folder))
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert after[name].dtype == expected and torch.equal(after[name], tensor.to(expected)), name
    assert json.loads((folder / "config.json").read_text(encoding="utf-8"))["dtype"] == str(expected).split(".")[1]
    assert AutoModelForCausalLM.from_pretrained(folder).dtype == expected


def test_a_weight_too_large_for_float16_is_named(tmp_path: Path) -> None:
    policy = Policy(load_model(source(tmp_path / "source", torch.float32), "float32"), 1.0)
    policy.model.lm_head.weight.data[3, 4] = 1e6
    tokenizer = load_tokenizer(ModelConfig(path=str(tmp_path / "source")))
    with pytest.raises(ValueError, match="lm_head.weight has numbers beyond 65504, .*--dtype bfloat16"):
        export(tmp_path / "model", policy, tokenizer, ONE, dtype=torch.float16)
    assert not (tmp_path / "model").exists()


def test_modes_are_equal_and_the_licence_is_handed_on(tmp_path: Path) -> None:
    config = source(tmp_path / "source", torch.bfloat16)
    for name in ("LICENSE", "Notice.txt"):
        (tmp_path / "source" / name).write_text(f"text of {name}", encoding="utf-8")
    (tmp_path / "source" / "LICENSE").chmod(0o600)
    folder = exported(tmp_path / "model", config)
    beside = tmp_path / "file"
    beside.touch()
    assert {path.stat().st_mode for path in folder.iterdir()} == {beside.stat().st_mode}
    for name in ("LICENSE", "Notice.txt"):
        assert (folder / name).read_text(encoding="utf-8") == f"text of {name}"


def test_a_flipped_bit_in_an_exported_folder_is_found(tmp_path: Path) -> None:
    """20 of 20 in the weights, and one in the tokenizer; by model.path, by an evaluation's folder, and by whoever loads it."""
    config = source(tmp_path / "source", torch.bfloat16)
    folder = exported(tmp_path / "model", config)
    own, rng = ModelConfig(path=str(folder)), random.Random(0)
    check_weights_folder(config, str(folder))
    load_model(own, "float32")
    for name in ["model.safetensors"] * 20 + ["tokenizer.json", "config.json"]:
        whole = (folder / name).read_bytes()
        flipped = bytearray(whole)
        flipped[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
        (folder / name).write_bytes(flipped)
        for look in (
            lambda: resolve(str(folder)),
            lambda: load_model(own, "float32"),
            lambda: load_model(config, "float32", str(folder)),
            lambda: check_weights_folder(config, str(folder)),
        ):
            with pytest.raises(ConfigError, match=f"model: {name} is damaged .*: copy the folder again"):
                look()
        (folder / name).write_bytes(whole)
    load_model(own, "float32")


def test_a_flipped_bit_in_the_converted_default_model_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SWIRL_FAST_CACHE", str(tmp_path))
    folder = exported(tmp_path / EMBEDDED_MODEL, source(tmp_path / "source", torch.float32))
    assert resolve(EMBEDDED_MODEL) == str(folder)
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(ConfigError, match=rf"converted in {folder}: model.safetensors is damaged .*or remove it"):
        resolve(EMBEDDED_MODEL)


def test_a_folder_that_lost_or_gained_files_is_refused(tmp_path: Path) -> None:
    folder = exported(tmp_path / "model", source(tmp_path / "source", torch.bfloat16))
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1])
    with pytest.raises(ConfigError, match=rf"has {len(whole) - 1} bytes instead of {len(whole)}"):
        resolve(str(folder))
    weights.unlink()
    with pytest.raises(ConfigError, match=r"model\.safetensors is missing"):
        resolve(str(folder))
    weights.write_bytes(whole)
    (folder / "more.safetensors").write_bytes(whole)
    with pytest.raises(ConfigError, match=r"more\.safetensors is not in manifest\.json"):
        resolve(str(folder))
    (folder / "manifest.json").write_text('{"files": []}', encoding="utf-8")
    with pytest.raises(ConfigError, match=r"manifest\.json cannot be read"):
        resolve(str(folder))
    (folder / "manifest.json").unlink()
    assert resolve(str(folder)) == str(folder), "a folder of somebody else's"
