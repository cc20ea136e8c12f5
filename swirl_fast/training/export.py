"""The trained policy as a Hugging Face folder, written file by file: rank 0 holds one file's weights at a time, other ranks one
parameter."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from swirl_fast.models.policy import Policy
from swirl_fast.ranks import Ranks
from swirl_fast.training.fsdp import full_parameters
from swirl_fast.training.sharded_weights import Unsharded, conversions, persistent_buffers

FILE_BYTES = 4 << 30


def export(folder: Path, policy: Policy, tokenizer: Any, ranks: Ranks, file_bytes: int = FILE_BYTES) -> None:
    """Writes a folder that transformers, SGLang and vLLM load. Collective. Of tied weights one name is written.

    file_bytes: of one safetensors file; a larger tensor gets a file of its own.
    """
    writing = folder.with_name(folder.name + ".tmp")
    if ranks.main:
        shutil.rmtree(writing, ignore_errors=True)
        writing.mkdir(parents=True)
    try:
        converted = bool(conversions(policy.model))
    except Unsharded:
        converted = True
    if converted:
        _write_converted(writing, policy, ranks)
    else:
        _write_files(writing, policy, ranks, file_bytes)
    if ranks.main:
        tokenizer.save_pretrained(writing)
        shutil.rmtree(folder, ignore_errors=True)
        writing.rename(folder)
    ranks.barrier()


def _write_files(folder: Path, policy: Policy, ranks: Ranks, file_bytes: int) -> None:
    model = policy.model
    buffers = dict(persistent_buffers(policy.model))
    sizes = {
        name: tensor.numel() * tensor.element_size() for name, tensor in (*model.named_parameters(), *buffers.items())
    }
    file_of = _files(sizes, file_bytes)
    waiting: dict[str, Tensor] = {}
    names = list(file_of)
    for i, (name, tensor) in enumerate(_whole(policy, buffers)):
        assert name == names[i], "tensors come in the order in which they were planned"
        if not ranks.main:
            continue
        waiting[name] = tensor.cpu().contiguous()
        if i + 1 == len(names) or file_of[names[i + 1]] != file_of[name]:
            save_file(waiting, folder / file_of[name], metadata={"format": "pt"})
            waiting.clear()
    if not ranks.main:
        return
    if len(set(file_of.values())) > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": file_of}
        (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    if model.can_generate():
        # not save_pretrained, which refuses settings that many published folders have (a temperature without do_sample)
        model.generation_config.to_json_file(folder / "generation_config.json")


def _write_converted(folder: Path, policy: Policy, ranks: Ranks) -> None:
    """For model types whose weights transformers converts (experts): its own code converts them back, and needs all of them at once."""
    if ranks.main:
        print(
            f"train: weights of model type {policy.model.config.model_type} are converted on export: rank 0 gathers them all"
        )
    weights = {}
    for name, tensor in _whole(policy, dict(persistent_buffers(policy.model))):
        if ranks.main:
            weights[name] = tensor.cpu().clone()
    if ranks.main:
        policy.model.save_pretrained(folder, state_dict=weights)


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
