"""Model folders in, transformers models and tokenizers out."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import transformers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import cached_file

from swirl_fast.config import EMBEDDED_MODEL, ConfigError, ModelConfig
from swirl_fast.files import content_hash, is_file, is_folder
from swirl_fast.models.embedded import embedded_folder
from swirl_fast.models.manifest import check_manifest

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
STORED = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}  # as safetensors names them
LICENCES = (
    "LICENSE*",
    "LICENCE*",
    "COPYING*",
    "NOTICE*",
    "USE_POLICY*",
)  # what model folders call the text, in either case
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt")
_ADAPTER = "adapter_config.json"  # of peft's folders
_DATELESS = "{% macro strftime_now(format) %}1 January 2000{% endmacro %}"


def resolve(path: str) -> str:
    """A folder or name that transformers can load; converts the embedded default on first use (15-25 s).

    Raises ConfigError when a local folder does not hold a model, or not the files that its manifest names, or the embedded default's
    package is missing.
    """
    if path == EMBEDDED_MODEL:
        return str(embedded_folder())
    folder = Path(path).expanduser()
    if is_folder(folder):
        refuse_adapter(folder, f"model.path={path}")
        if not (folder / "config.json").is_file():
            raise ConfigError(
                f"model.path={path}: the folder has no config.json; give a folder that save_pretrained wrote"
            )
        check_manifest(folder, f"model.path={path}")
        return str(folder)
    if path.startswith((".", "/", "~")):
        raise ConfigError(f"model.path={path}: no such folder")
    return path  # a name on the Hugging Face hub


def refuse_adapter(folder: Path, setting: str) -> None:
    """Raises ConfigError, with the model that it belongs to, for a folder that holds adapters and no whole model."""
    file = folder / _ADAPTER
    if not is_file(file):
        return
    try:
        base = json.loads(file.read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError):
        base = "its base model"
    raise ConfigError(
        f"{setting}: holds adapters (adapter_config.json) of {base}, and no whole model. Give a folder in which they are merged: that of a "
        "run by `swirl-fast export --merged`, others by peft's merge_and_unload and save_pretrained"
    )


def load_tokenizer(config: ModelConfig) -> PreTrainedTokenizerBase:
    """The tokenizer, with `model.chat_template` in place of its own template when that is set."""
    source = resolve(config.path)
    with named_errors(config):
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    if config.chat_template:
        tokenizer.chat_template = Path(config.chat_template).expanduser().read_text(encoding="utf-8")
    if not tokenizer.chat_template:
        raise ConfigError(
            f"model.path={config.path}: the tokenizer has no chat template; use an instruct model or set model.chat_template"
        )
    return tokenizer


def end_ids(config: ModelConfig, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The tokens that end a turn by generation_config.json (which may list several), config.json and the tokenizer: those of them that are
    special tokens, for no other token ends a turn by itself."""
    source = resolve(config.path)
    found: list[int] = []
    try:
        given = GenerationConfig.from_pretrained(source).eos_token_id
    except OSError:  # there is none
        given = None
    for ids in (given, load_config(config).get_text_config().eos_token_id, tokenizer.eos_token_id):
        found += ids if isinstance(ids, list) else [] if ids is None else [ids]
    special = set(tokenizer.get_added_vocab().values())
    return tuple(dict.fromkeys(id_ for id_ in found if id_ in special))


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
    refuse_adapter(Path(folder), f"--of {folder}")
    if not is_file(Path(folder) / "config.json"):
        raise ConfigError(
            f"--of {folder}: no folder with a config.json; give base, trained, or a folder that save_pretrained wrote (for a name on the "
            f"Hugging Face hub: model.path={folder} --of base --name NAME)"
        )
    check_manifest(Path(folder), f"--of {folder}")
    if not any((Path(folder) / name).is_file() for name in _TOKENIZER_FILES):
        return
    own = load_tokenizer(config).get_vocab()
    with named_errors(config, folder):
        others = AutoTokenizer.from_pretrained(folder, trust_remote_code=False).get_vocab()
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
    if weights is not None:
        check_manifest(Path(weights), weights)
    with named_errors(config, weights):
        model = AutoModelForCausalLM.from_pretrained(source, dtype=DTYPES[dtype], trust_remote_code=False)
    return model.eval()


def local_folder(config: ModelConfig) -> Path:
    """The folder of `config.path` on this machine; downloaded from the Hugging Face hub where it is a name there."""
    source = resolve(config.path)
    if is_folder(source):
        return Path(source)
    from huggingface_hub import snapshot_download

    with named_errors(config):
        return Path(
            snapshot_download(
                source, allow_patterns=["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja", *LICENCES]
            )
        )


def stored_dtype(folder: Path) -> torch.dtype:
    """The type that most numbers of a folder's safetensors have, float32 where it is none of STORED or there are no such files."""
    numbers: Counter[str] = Counter()
    for file in folder.glob("*.safetensors"):
        with file.open("rb") as stream:
            header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
        for name, entry in header.items():
            if name != "__metadata__":
                numbers[entry["dtype"]] += math.prod(entry["shape"])
    return STORED.get(max(numbers, key=lambda name: numbers[name]), torch.float32) if numbers else torch.float32


def licences(folder: Path) -> list[Path]:
    """The files with the licence of a model folder."""
    names = [pattern.rstrip("*") for pattern in LICENCES]
    return sorted(path for path in folder.iterdir() if path.is_file() and path.name.upper().startswith(tuple(names)))


def load_config(config: ModelConfig) -> transformers.PreTrainedConfig:
    source = resolve(config.path)
    with named_errors(config):
        if not is_folder(source) and (named := _cached(source, _ADAPTER)) is not None:
            # transformers would load its base model with the adapters on
            refuse_adapter(Path(named).parent, f"model.path={config.path}")
        return AutoConfig.from_pretrained(source, trust_remote_code=False)


def _cached(name: str, file: str) -> str | None:
    """A file of a model on the Hugging Face hub; None where it has none, or cannot be reached, which what is read next will say."""
    problems = ("gated_repo", "missing_entries", "connection_errors")
    return cached_file(name, file, **{f"_raise_exceptions_for_{problem}": False for problem in problems})


@contextmanager
def named_errors(config: ModelConfig, folder: str | None = None) -> Iterator[None]:
    """Turns what loading from `folder`, by default `config.path`, raises into a ConfigError that says what to do."""
    name = f"model.path={config.path}" if folder is None else folder
    try:
        yield
    except OSError as error:
        # what transformers raises for a wrong name, a gated repository and a missing network alike
        raise ConfigError(
            f"{name}: cannot be loaded ({' '.join(str(error).split())[:300]}). Give a folder that save_pretrained "
            "wrote, or a name on the Hugging Face hub that this machine can reach (for a gated one, log in with `hf auth login`)"
        ) from error
    except ValueError as error:
        if "trust_remote_code" not in str(error):
            raise
        raise ConfigError(
            f"{name}: brings code of its own (auto_map in its config.json or tokenizer_config.json), which is never run. Give a model "
            "that transformers itself knows, or remove auto_map where model_type is one of those"
        ) from error


def model_fingerprint(config: ModelConfig) -> str:
    """Names the weights that sampled something, wherever they lie: the hash of a local folder (`weights_hash`), else the name on the
    hub."""
    folder = Path(resolve(config.path))
    return f"weights {weights_hash(folder)}" if is_folder(folder) else config.path


def weights_hash(folder: Path) -> str:
    """Hex digest over the safetensors of a folder, or else its pytorch_model*.bin: of each its name, its size and all of its bytes (half a
    minute for a 54 GB model, the first time; see `content_hash`)."""
    import xxhash

    digest = xxhash.xxh64()
    for file in sorted(folder.glob("*.safetensors")) or sorted(folder.glob("pytorch_model*.bin")):
        digest.update(f"{file.name}:{file.stat().st_size}:{content_hash(file)}".encode())
    return digest.hexdigest()
