"""FSDP2: the same code for one process, gloo on CPUs and nccl on GPUs.

Without torchrun there is no process group and nothing is sharded; under torchrun every decoder layer is a `fully_shard` group
and the rest of the policy (embeddings, final norm, output layer) is the root group, gathered inside its forward.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from transformers import PreTrainedModel

from swirl_fast.config import ConfigError, TrainingConfig
from swirl_fast.engines.engine import whole
from swirl_fast.models.lora import named_weights
from swirl_fast.models.policy import Policy
from swirl_fast.ranks import Ranks


def check_sharding(training: TrainingConfig, ranks: Ranks) -> None:
    """Raises ConfigError for settings that these ranks cannot follow; nothing has been loaded yet."""
    if training.shard_size and ranks.size % training.shard_size:
        raise ConfigError(
            f"training.shard_size={training.shard_size}: does not divide the {ranks.size} ranks that were started; use a divisor, or 0 to "
            "share the parameters among all"
        )
    if training.reference_offload and ranks.device.type != "cuda":
        raise ConfigError(
            "training.reference_offload=true: without a GPU the reference is in CPU memory already; leave it false"
        )
    if training.reference_offload and not ranks.distributed:
        raise ConfigError(
            "training.reference_offload=true: one process without torchrun does not shard, and only shards are brought back layer by "
            "layer; start it with torchrun --nproc-per-node 1"
        )


def shard(
    policy: Policy,
    ranks: Ranks,
    compute_dtype: torch.dtype = torch.float32,
    shard_size: int = 0,
    offload: bool = False,
) -> Policy:
    """Moves the policy to the device and shards it. Parameters on the meta device stay there, as shards (`sharded_weights.fill`).

    compute_dtype: of gathered parameters; gradients are reduced in float32, and parameters stepped in the type they are stored in.
    shard_size: ranks that share one copy (consecutive ranks, so those of one machine); groups of them are replicas; 0: all ranks.
    offload: parameters stay in CPU memory and are copied to the device when they are gathered.
    """
    if not ranks.distributed:
        policy.to(ranks.device)
        return policy
    mesh = _mesh(ranks, shard_size)
    mixed = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=torch.float32)
    place = CPUOffloadPolicy(pin_memory=ranks.device.type == "cuda") if offload else OffloadPolicy()
    for layer in decoder_layers(policy):
        fully_shard(layer, mesh=mesh, mp_policy=mixed, offload_policy=place)
    fully_shard(policy, mesh=mesh, mp_policy=mixed, offload_policy=place)
    register_fsdp_forward_method(policy, "plain")
    return policy


def _mesh(ranks: Ranks, shard_size: int) -> DeviceMesh:
    """[shard], or [replicate, shard] when a copy is shared by fewer than all ranks."""
    if shard_size in (0, ranks.size):
        return init_device_mesh(ranks.device.type, (ranks.size,), mesh_dim_names=("shard",))
    shape = (ranks.size // shard_size, shard_size)
    return init_device_mesh(ranks.device.type, shape, mesh_dim_names=("replicate", "shard"))


def set_gradient_sync(policy: Policy, last: bool, every: bool) -> None:
    """To be called before the forward of a micro-batch; last: of its update.

    every=False: no gradient leaves the rank before the last one's backward. every=True: each backward adds to the sharded gradients;
    replicas still meet once an update.
    """
    policy.set_requires_gradient_sync(last or every)
    policy.set_requires_all_reduce(last)


def decoder_layers(policy: Policy) -> torch.nn.ModuleList:
    return layers_of(policy.model)


def layers_of(model: PreTrainedModel) -> torch.nn.ModuleList:
    """The one ModuleList that holds the model's decoder layers."""
    for module in model.base_model.modules():
        if isinstance(module, torch.nn.ModuleList) and len(module) == model.config.get_text_config().num_hidden_layers:
            return module
    raise ValueError(f"model type {model.config.model_type}: no list of decoder layers was found to shard")


def full_parameters(policy: Policy) -> Iterator[tuple[str, Tensor]]:
    """(name in the transformers model, whole tensor) of every parameter, with its adapter where it has one, one at a time; a
    collective: all ranks must iterate."""
    for name, weight in named_weights(policy.model):
        yield name, whole(weight)
