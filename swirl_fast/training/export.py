"""The trained policy as a Hugging Face folder, written file by file: rank 0 holds one file's weights at a time, other ranks one
parameter. Or its adapters alone as a folder of peft's."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from swirl_fast.config import LoraConfig
from swirl_fast.engines.engine import whole
from swirl_fast.files import fsync
from swirl_fast.models.load import licences
from swirl_fast.models.lora import adapter_config, adapter_tensors, named_weights
from swirl_fast.models.manifest import write_manifest
from swirl_fast.models.policy import Policy
from swirl_fast.ranks import Ranks
from swirl_fast.training.fsdp import full_parameters
from swirl_fast.training.sharded_weights import Unsharded, conversions, persistent_buffers

FILE_BYTES = 4 << 30


def export(
    folder: Path,
    policy: Policy,
    tokenizer: Any,
    ranks: Ranks,
    file_bytes: int = FILE_BYTES,
    dtype: torch.dtype | None = None,
    source: Path | None = None,
) -> None:
    """Writes a folder that transformers, SGLang and vLLM load, with a manifest (models/manifest.py). Collective. Of tied weights one name
    is written. Adapters are merged into the weights that are written, and stay beside the policy's own.

    file_bytes: of one safetensors file; a larger tensor gets a file of its own. dtype: of the weights written, None for the policy's own.
    source: the folder whose licence is handed on. Raises ValueError for a weight that is too large for `dtype`.
    """

    def write(writing: Path) -> None:
        try:
            converted = bool(conversions(policy.model))
        except Unsharded:
            converted = True
        if converted:
            _write_converted(writing, policy, ranks, dtype)
        else:
            _write_files(writing, policy, ranks, file_bytes, dtype)

    _write_folder(folder, write, tokenizer, ranks, source)


def export_adapter(
    folder: Path,
    policy: Policy,
    lora: LoraConfig,
    base: str,
    tokenizer: Any,
    ranks: Ranks,
    dtype: torch.dtype | None = None,
    source: Path | None = None,
) -> None:
    """Writes the adapters alone, as a folder that peft's `PeftModel.from_pretrained` loads onto `base`, the folder or name of the model
    without them. Collective. dtype, source: as of `export`."""
    description = adapter_config(policy.model, lora, base)

    def write(writing: Path) -> None:
        tensors = {}
        for name, tensor in adapter_tensors(policy.model):
            full = _cast(name, whole(tensor), dtype)
            if ranks.main:
                tensors[name] = full.cpu().contiguous()
        if ranks.main:
            save_file(tensors, writing / "adapter_model.safetensors", metadata={"format": "pt"})
            description.save_pretrained(writing)

    _write_folder(folder, write, tokenizer, ranks, source)


def _write_folder(
    folder: Path, write: Callable[[Path], None], tokenizer: Any, ranks: Ranks, source: Path | None
) -> None:
    """Gives `folder` its name when all that `write` puts into it, the tokenizer, the licence and the manifest are on disk."""
    writing = folder.with_name(folder.name + ".tmp")
    if ranks.main:
        shutil.rmtree(writing, ignore_errors=True)
        writing.mkdir(parents=True)
    write(writing)
    if ranks.main:
        tokenizer.save_pretrained(writing)
        for licence in licences(source) if source is not None else ():
            shutil.copyfile(licence, writing / licence.name)
        write_manifest(writing)
        shutil.rmtree(folder, ignore_errors=True)
        writing.rename(folder)
        fsync(folder.parent)
    ranks.barrier()


def _write_files(folder: Path, policy: Policy, ranks: Ranks, file_bytes: int, dtype: torch.dtype | None) -> None:
    model = policy.model
    buffers = dict(persistent_buffers(policy.model))
    sizes = {
        name: tensor.numel() * _written(tensor.dtype, dtype).itemsize
        for name, tensor in (*named_weights(model), *buffers.items())
    }
    file_of = _files(sizes, file_bytes)
    waiting: dict[str, Tensor] = {}
    names = list(file_of)
    for i, (name, tensor) in enumerate(_whole(policy, buffers)):
        assert name == names[i], "tensors come in the order in which they were planned"
        if not ranks.main:
            continue
        waiting[name] = _cast(name, tensor, dtype).cpu().contiguous()
        if i + 1 == len(names) or file_of[names[i + 1]] != file_of[name]:
            save_file(waiting, folder / file_of[name], metadata={"format": "pt"})
            waiting.clear()
    if not ranks.main:
        return
    if len(set(file_of.values())) > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": file_of}
        (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    model.config.architectures = [type(model).__name__]
    _typed(model.config, dtype).save_pretrained(folder)
    if model.can_generate():
        # not save_pretrained, which refuses settings that many published folders have (a temperature without do_sample)
        model.generation_config.to_json_file(folder / "generation_config.json")


def _write_converted(folder: Path, policy: Policy, ranks: Ranks, dtype: torch.dtype | None) -> None:
    """For model types whose weights transformers converts (experts): its own code converts them back, and needs all of them at once."""
    if ranks.main:
        print(
            f"train: weights of model type {policy.model.config.model_type} are converted on export: rank 0 gathers them all"
        )
    weights = {}
    for name, tensor in _whole(policy, dict(persistent_buffers(policy.model))):
        if ranks.main:
            weights[name] = _cast(name, tensor, dtype).cpu().clone()
    if ranks.main:
        policy.model.save_pretrained(folder, state_dict=weights)
        _typed(policy.model.config, dtype).save_pretrained(folder)  # in place of the one that names the policy's type


def _written(own: torch.dtype, dtype: torch.dtype | None) -> torch.dtype:
    """The type in which a tensor of type `own` is written."""
    return dtype if dtype is not None and own.is_floating_point else own


def _cast(name: str, tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    cast = tensor.to(_written(tensor.dtype, dtype))
    if cast.dtype == torch.float16 and bool((cast.isinf() & ~tensor.isinf()).any()):
        raise ValueError(
            f"{name} has numbers beyond 65504, too large for float16: export it with --dtype bfloat16 or float32"
        )
    return cast


def _typed(config: PreTrainedConfig, dtype: torch.dtype | None) -> PreTrainedConfig:
    """The configuration that names the type of the weights, also for the parts of a model that has several."""
    if dtype is None:
        return config
    typed = copy.deepcopy(config)
    for one in (typed, *(getattr(typed, name) for name in typed.sub_configs)):
        if one is not None:
            one.dtype = dtype
    return typed


def _whole(policy: Policy, buffers: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    yield from full_parameters(policy)
    yield from buffers.items()


def _files(sizes: Mapping[str, int], file_bytes: int) -> dict[str, str]:
    """Tensor -> file: in order, a new file when the next tensor would make this one too large."""
    number_of: dict[str, int] = {}
    number, filled = 1, 0
    for name, size in sizes.items():
        if filled and filled + size > file_bytes:
            number, filled = number + 1, 0
        number_of[name] = number
        filled += size
    if number == 1:
        return dict.fromkeys(sizes, SAFE_WEIGHTS_NAME)
    stem, suffix = SAFE_WEIGHTS_NAME.rsplit(".", 1)
    return {name: f"{stem}-{n:05d}-of-{number:05d}.{suffix}" for name, n in number_of.items()}
