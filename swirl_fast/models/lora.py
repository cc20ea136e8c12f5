"""LoRA (Hu et al., arXiv 2106.09685): beside the weight W of a linear layer two small matrices, which alone are trained.

    y = W x + scale B (A x)        A [rank, in], B [out, rank], scale = alpha / rank; B starts at 0

The layers are peft's, put in the place of the model's own: around them all stays transformers' model. Outside, weights have the plain
model's names, W + scale B A where there is an adapter (`named_weights`); it is made when somebody takes it, so that W never changes.
Left out: dropout, which is not exact over shared prefixes; adapters of embeddings, the output layer, and fused experts.
"""

from __future__ import annotations

import copy
import importlib.util
import math
import re
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from swirl_fast.config import ConfigError, LoraConfig, ModelConfig
from swirl_fast.seeds import seed_of

ADAPTER = "default"  # peft's own name for a model's only adapter
_PART = re.compile(rf"\.lora_([AB])\.{ADAPTER}\.weight$")


def check_lora(config: ModelConfig, model_config: PreTrainedConfig) -> None:
    """Raises ConfigError where model.lora cannot work: no peft, quantised weights, targets that no layer has. No weights are read."""
    if config.lora.rank is None:
        return
    setting = f"model.lora.rank={config.lora.rank}"
    if importlib.util.find_spec("peft") is None:
        raise ConfigError(f"{setting}: the package peft is missing; run: pip install 'swirl-fast[lora]'")
    if getattr(model_config, "quantization_config", None):
        raise ConfigError(
            f"{setting}: the weights of model.path={config.path} are quantised, and no adapter can be merged into them for the engine and "
            "the export; give the folder or name of the model before it was quantised"
        )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(copy.deepcopy(model_config), trust_remote_code=False)
    target_layers(model, config.lora.targets)


def linear_layers(model: PreTrainedModel) -> dict[str, Any]:
    """The layers that can have an adapter, by name: plain linear ones with a weight of their own, but for the output layer, whose weight
    the fused log-probs read."""
    owners = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    return {
        name: module
        for name, module in model.named_modules()
        if type(module) in (nn.Linear, Conv1D)
        and module is not model.get_output_embeddings()
        and owners[id(module.weight)] == 1
    }


def target_layers(model: PreTrainedModel, targets: Sequence[str]) -> dict[str, Any]:
    """Those of `linear_layers` that the setting model.lora.targets asks for; all where it is empty. Raises ConfigError, with the names
    there are, for a target that is none of them."""
    layers = linear_layers(model)
    ends = ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in layers))
    for target in targets:
        if not any(_matches(name, target) for name in layers):
            raise ConfigError(
                f"model.lora.targets={list(targets)}: model type {model.config.model_type} has no linear layer {target} that can take an "
                f"adapter; there are {ends}"
            )
    if not layers:
        raise ConfigError(
            f"model.lora.rank: model type {model.config.model_type} has no plain linear layer for an adapter; leave model.lora out"
        )
    return {name: layer for name, layer in layers.items() if not targets or any(_matches(name, t) for t in targets)}


def _matches(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")  # as peft does it


def add_adapters(model: PreTrainedModel, lora: LoraConfig, seed: int) -> None:
    """Freezes the model and puts adapters beside its linear layers, in float32 (float64 in a float64 model). Their first values follow
    from the seed and their names; on the meta device they have none (`initial_values`)."""
    assert lora.rank is not None
    from peft import LoraConfig as PeftConfig
    from peft.tuners.lora import Linear

    model.requires_grad_(False)
    for name, layer in target_layers(model, lora.targets).items():
        transposed, alpha = isinstance(layer, Conv1D), _plain(lora.alpha)
        own = PeftConfig(r=lora.rank, lora_alpha=alpha, lora_dropout=0.0, fan_in_fan_out=transposed)
        adapted = Linear(layer, ADAPTER, own, r=lora.rank, lora_alpha=alpha, is_target_conv_1d_layer=transposed)
        adapted.cast_input_dtype_enabled = False  # the input is of A's type already, or autocast casts both
        dtype = torch.promote_types(layer.weight.dtype, torch.float32)
        for part in (adapted.lora_A, adapted.lora_B):
            part.to(dtype).requires_grad_(True)
        model.set_submodule(name, adapted.train(layer.training))
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not parameter.is_meta:
            values = initial_values(name, parameter.shape, seed)
            assert values is not None, "only adapters are trained"
            parameter.data.copy_(values)


def initial_values(name: str, shape: Sequence[int], seed: int) -> Tensor | None:
    """What an adapter's parameter starts with, float32, the same on every rank; None for a parameter that is no adapter's.

    As peft's: A uniform in ± 1 / sqrt(in), B zero, so that the model starts as it is without adapters.
    """
    part = _PART.search(name)
    if part is None:
        return None
    if part[1] == "B":
        return torch.zeros(*shape)
    generator = torch.Generator().manual_seed(seed_of("lora", seed, name))
    bound = 1 / math.sqrt(shape[1])
    return torch.empty(*shape).uniform_(-bound, bound, generator=generator)


def adapted_layers(model: nn.Module) -> dict[str, Any]:
    """peft's layers by the names of those in whose place they are; none in a model without adapters."""
    if "peft" not in sys.modules:  # what has an adapter has imported it
        return {}
    from peft.tuners.lora import LoraLayer

    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}


def plain_name(name: str) -> str:
    """What a parameter, or a part of the model, is called in the model without adapters."""
    return name.replace(".base_layer.", ".")


@dataclass(frozen=True, eq=False)
class Merged:
    """The weight W + scale B A of a layer with an adapter, as a promise: `whole` makes it. W, A, B may be sharded (DTensor); none changes.

    weight: [out, in]; of a Conv1D [in, out] (transposed).
    """

    weight: Tensor
    a: Tensor
    b: Tensor
    scale: float
    transposed: bool

    @property
    def shape(self) -> torch.Size:
        return self.weight.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.b.dtype

    def numel(self) -> int:
        return self.weight.numel()

    def element_size(self) -> int:
        return self.b.element_size()

    def whole(self) -> Tensor:
        """In the adapter's type. A collective of all ranks where it is sharded."""
        weight, a, b = (x.full_tensor() if isinstance(x, DTensor) else x for x in (self.weight, self.a, self.b))
        change = b @ a
        return weight.to(change.dtype) + (change.T if self.transposed else change) * self.scale


def named_weights(model: PreTrainedModel) -> Iterator[tuple[str, Any]]:
    """(name in the model without adapters, weight) of every parameter, as it is sharded; `Merged` where there is an adapter."""
    layers = adapted_layers(model)
    for name, parameter in model.named_parameters():
        owner, _, attribute = name.rpartition(".")
        layer = layers.get(owner.removesuffix(".base_layer"))
        if _PART.search(name) and owner.rsplit(".", 2)[0] in layers:
            continue
        if layer is None or attribute != "weight":
            yield plain_name(name), parameter.detach()
            continue
        a, b = layer.lora_A[ADAPTER].weight.detach(), layer.lora_B[ADAPTER].weight.detach()
        yield plain_name(name), Merged(parameter.detach(), a, b, layer.scaling[ADAPTER], layer.fan_in_fan_out)


class WithoutAdapters:
    """A policy whose adapters are off while it is called: the reference model, in no memory of its own. policy: of `Policy`'s form."""

    def __init__(self, policy: Any) -> None:
        self._policy, self._layers = policy, list(adapted_layers(policy).values())

    def __call__(self, packed: Any) -> Tensor:
        try:
            self._switch(off=True)
            return self._policy(packed)
        finally:
            self._switch(off=False)

    def _switch(self, off: bool) -> None:
        # peft's enable_adapters would change requires_grad as well, which FSDP reads when a parameter is first gathered
        for layer in self._layers:
            layer._disable_adapters = off


def frozen_in_compute_type(config: ModelConfig, model_config: PreTrainedConfig) -> bool:
    """Whether the weights that adapters leave as they are can be stored in model.dtype, in which they are multiplied: where config.json
    says that they have that type, so that nothing is lost, not in the merged weights either."""
    return config.lora.rank is not None and str(model_config.dtype).removeprefix("torch.") == config.dtype


def keep_frozen_in(dtype: torch.dtype, model: PreTrainedModel) -> None:
    """Stores the weights of frozen linear layers in `dtype`, in which autocast would multiply with them anyway. Not the output layer's,
    nor shared ones, which also stand where nothing casts."""
    for module in linear_layers(model).values():
        if not module.weight.requires_grad:
            module.to(dtype)


def adapter_config(model: PreTrainedModel, lora: LoraConfig, base: str) -> Any:
    """peft's description of the adapters, for adapter_config.json. base: the folder or name of the model without them.

    Raises ConfigError where peft would put them beside other layers when it reads it.
    """
    from peft import LoraConfig as PeftConfig
    from peft.utils import transformers_weight_conversion as reading

    adapted = adapted_layers(model)
    names = sorted({name.rpartition(".")[2] for name in adapted})  # as servers read them
    others = [name for name, _ in model.named_modules() if name not in adapted]
    if any(_matches(name, end) for name in others for end in names):
        names = sorted(adapted)
    assert lora.rank is not None
    config = PeftConfig(
        task_type="CAUSAL_LM",
        base_model_name_or_path=base,
        r=lora.rank,
        lora_alpha=_plain(lora.alpha),
        lora_dropout=0.0,
        target_modules=names,
        fan_in_fan_out=any(layer.fan_in_fan_out for layer in adapted.values()),
        inference_mode=True,
    )
    read: Any = copy.deepcopy(config)
    try:
        reading.convert_peft_config_for_transformers(read, model, reading.get_model_conversion_mapping(model))
        taken = sorted(set(names) - set(read.target_modules))
    except ValueError:  # some, but not all, of those that it takes for one
        taken = names
    if taken:
        raise ConfigError(
            f"--adapter: in a model of type {model.config.model_type} peft takes {', '.join(taken)} for the experts, which have no adapter "
            "here; use --merged, or train with model.lora.targets without them"
        )
    return config


def adapter_tensors(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """(name in adapter_model.safetensors, tensor) of every adapter's parameter, as it is sharded."""
    for name, parameter in model.named_parameters():
        if _PART.search(name):
            yield f"base_model.model.{name.replace(f'.{ADAPTER}.', '.')}", parameter.detach()


def _plain(alpha: float) -> Any:
    """A whole number as one: some readers of adapter_config.json take no other."""
    return int(alpha) if alpha == int(alpha) else alpha
