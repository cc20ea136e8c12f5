"""A model that is too large for one rank: built without storage, sharded, then filled from safetensors files by slices.

    model = empty_model(config, dtype)      parameters on the meta device, buffers real
    weights = find_weights(config, model)   where each parameter lies in which file; nothing is read
    shard(Policy(model), …)                 parameters are shards, still on the meta device
    fill(policy, weights, device)           every rank reads its rows of each parameter

Where the files do not hold the parameters one to one (experts that transformers fuses, quantised weights, .bin files), `find_weights`
raises Unsharded, and the whole model is loaded on every rank instead.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

from swirl_fast.config import ModelConfig
from swirl_fast.models.load import DTYPES, load_config, named_errors, resolve
from swirl_fast.models.lora import initial_values, plain_name
from swirl_fast.models.policy import Policy

_ROWS = 1 << 14  # compared at a time


class Unsharded(Exception):
    """The reason why a model cannot be loaded by slices."""


@dataclass(frozen=True)
class Weights:
    """file_of: name of a parameter or persistent buffer -> (file, name in the file), of tied parameters under one of their names."""

    file_of: dict[str, tuple[Path, str]]


def empty_model(config: ModelConfig, dtype: str) -> PreTrainedModel:
    """The model in evaluation mode with parameters on the meta device in `dtype`, and the buffers that no file holds on the CPU.

    Raises Unsharded for a model whose construction needs values.
    """
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(load_config(config), dtype=DTYPES[dtype], trust_remote_code=False)
    except (RuntimeError, NotImplementedError) as error:
        raise Unsharded(f"cannot be built without storage ({error})") from error
    _make_buffers(model)
    try:
        model.generation_config = GenerationConfig.from_pretrained(resolve(config.path))
    except OSError:  # the folder has none: the one made from config.json is used
        pass
    return model.eval()


def _make_buffers(model: PreTrainedModel) -> None:
    """Gives non-persistent buffers (rotary frequencies, Gemma's embedding scale) storage and their values, by the code that transformers
    runs after loading."""
    for module in model.modules():
        names = [
            name for name, b in module._buffers.items() if b is not None and name in module._non_persistent_buffers_set
        ]
        for name in names:
            empty = torch.empty_like(module._buffers[name], device="cpu")
            module._buffers[name] = empty.fill_(torch.nan) if empty.is_floating_point() else empty
        if names:  # initialize_weights is to visit it; its parameters have no storage to overwrite
            module._is_hf_initialized = False
    model.initialize_weights()
    for name, buffer in model.named_non_persistent_buffers():
        if not buffer.is_floating_point() or bool(buffer.isnan().any()):
            raise Unsharded(f"transformers does not make the buffer {name} again")
    for module in model.modules():
        for name, value in vars(module).items():
            if isinstance(value, Tensor) and value.is_meta:
                raise Unsharded(f"{type(module).__name__}.{name} is a tensor but neither parameter nor buffer")


def find_weights(config: ModelConfig, model: PreTrainedModel) -> Weights:
    """Where to read each parameter and persistent buffer. Raises Unsharded when the files do not hold them as they are."""
    if conversions(model):
        raise Unsharded(f"transformers converts the weights of model type {model.config.model_type} when it loads them")
    if getattr(model.config, "quantization_config", None):
        raise Unsharded("its weights are quantised")
    places = dict(_places(config))
    aliases: dict[int, list[str]] = {}
    tensors = {}
    for name, tensor in (*model.named_parameters(remove_duplicate=False), *persistent_buffers(model)):
        aliases.setdefault(id(tensor), []).append(name)
        tensors[id(tensor)] = tensor
    file_of = {}
    with ExitStack() as stack:
        files = {path: stack.enter_context(safe_open(path, "pt")) for path in set(places.values())}
        for key, names in aliases.items():
            there = [name for name in names if name in places]
            if not there:
                raise Unsharded(f"no file holds {names[0]}")
            slices = [files[places[name]].get_slice(name) for name in there]
            if any(list(one.get_shape()) != list(tensors[key].shape) for one in slices):
                raise Unsharded(f"{there[0]} has another shape in the file")
            kinds = {one.get_dtype() for one in slices}
            if tensors[key].is_floating_point() and not kinds <= {"F64", "F32", "F16", "BF16"}:
                raise Unsharded(f"{there[0]} is {', '.join(kinds)} in the file")
            if any(not _equal(slices[0], other) for other in slices[1:]):
                raise Unsharded(f"{' and '.join(there)} are tied in config.json, but differ in the files")
            file_of[names[0]] = (places[there[0]], there[0])
    return Weights(file_of)


def conversions(model: PreTrainedModel) -> list[Any]:
    """How transformers changes names and layout between files and this model, beyond names of ten years ago."""
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
    except ImportError as error:
        raise Unsharded("this transformers does not say how it converts weights") from error
    return get_model_conversion_mapping(model, add_legacy=False)


def _places(config: ModelConfig) -> Iterator[tuple[str, Path]]:
    """(name, file) of every tensor in the folder's or the hub's safetensors."""
    source = resolve(config.path)

    def locate(name: str) -> str | None:
        with named_errors(config):
            return cached_file(source, name, _raise_exceptions_for_missing_entries=False)

    single = locate(SAFE_WEIGHTS_NAME)  # wins over an index, as in from_pretrained
    if single is not None:
        with safe_open(single, "pt") as file:
            for name in file.keys():
                yield name, Path(single)
        return
    index = locate(SAFE_WEIGHTS_INDEX_NAME)
    if index is None:
        raise Unsharded("it has no safetensors files")
    weight_map = json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"]
    paths = {}
    for file in sorted(set(weight_map.values())):
        path = locate(file)
        if path is None:
            raise Unsharded(f"{index} names {file}, which is missing")
        paths[file] = Path(path)
    for name, file in weight_map.items():
        yield name, paths[file]


def persistent_buffers(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """Those that belong into files."""
    passing = {name for name, _ in model.named_non_persistent_buffers()}
    return ((name, buffer) for name, buffer in model.named_buffers() if name not in passing)


def _equal(one: Any, other: Any) -> bool:
    rows = one.get_shape()[0]
    return all(torch.equal(one[i : i + _ROWS], other[i : i + _ROWS]) for i in range(0, rows, _ROWS))


def fill(policy: Policy, weights: Weights, device: torch.device, seed: int = 0) -> None:
    """Reads this rank's rows of every parameter of a sharded policy, in the type that the policy was built in; buffers whole. Adapters,
    which no file has, get what they start with by the seed.

    At no time does a rank hold more of a parameter than its own rows. Raises RuntimeError when a tensor stays without values.
    """
    owners: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in policy.model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append((module, name))
    with ExitStack() as stack:
        paths = {path for path, _ in weights.file_of.values()}
        files = {path: stack.enter_context(safe_open(path, "pt")) for path in paths}
        for name, parameter in list(policy.model.named_parameters()):
            rows: Any = initial_values(name, parameter.shape, seed)
            if rows is None:
                path, key = weights.file_of[plain_name(name)]
                rows = files[path].get_slice(key)
            filled = nn.Parameter(_read(rows, parameter, device), parameter.requires_grad)
            for module, attribute in owners[id(parameter)]:  # several for tied weights, which stay one parameter
                module._parameters[attribute] = filled
        for name, buffer in list(persistent_buffers(policy.model)):
            path, key = weights.file_of[name]
            parent, _, attribute = name.rpartition(".")
            value = files[path].get_tensor(key).to(device, buffer.dtype, copy=True)
            policy.model.get_submodule(parent)._buffers[attribute] = value
    empty = [name for name, tensor in (*policy.named_parameters(), *policy.named_buffers()) if tensor.is_meta]
    if empty:
        raise RuntimeError(f"{len(empty)} tensors were not loaded: {', '.join(empty[:3])}")


def _read(rows: Any, like: Tensor, device: torch.device) -> Tensor:
    """rows: the tensor, in the file or in memory. Returns it as `like` is sharded: fully_shard cuts along the first dimension."""
    assert isinstance(like, DTensor), "fill is for a policy that `shard` sharded"
    shape, offset = compute_local_shape_and_global_offset(like.shape, like.device_mesh, like.placements)
    assert tuple(shape[1:]) == tuple(like.shape[1:]), f"{like.placements} cuts along another dimension than the first"
    if shape[0] == 0:  # more ranks than rows
        local = torch.empty(shape, dtype=like.dtype, device=device)
    else:
        # a copy: the slice is a view of the mapped file, whose storage DCP cannot copy
        local = rows[offset[0] : offset[0] + shape[0]].to(device, like.dtype, copy=True)
    return DTensor.from_local(
        local.contiguous(), like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )
