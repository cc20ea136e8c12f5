"""Ranks and FSDP2: the same code for one process, gloo on CPUs and nccl on GPUs.

Without torchrun there is no process group and nothing is sharded; under torchrun every decoder layer is a `fully_shard` group
and the rest of the policy (embeddings, final norm, output layer) is the root group, gathered inside its forward.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from swirl_fast.config import ConfigError, TrainingConfig
from swirl_fast.policy import Policy

T = TypeVar("T")

# Ranks wait so long for one whose server hangs and is started again, or whose disk is slow. nccl's own 10 minutes are less than a request
# may take (engine.timeout). A rank that dies does not take that long: torchrun ends the others.
TIMEOUT = timedelta(hours=2)


@dataclass(frozen=True)
class Ranks:
    """This process among those that torchrun started; rank 0 of 1 without torchrun."""

    rank: int
    size: int
    device: torch.device

    @property
    def main(self) -> bool:
        return self.rank == 0

    @property
    def distributed(self) -> bool:
        return dist.is_initialized()

    def sum(self, values: Tensor) -> Tensor:
        """Sum over ranks of a small CPU tensor; every rank gets it."""
        return self._reduce(values, dist.ReduceOp.SUM)

    def max(self, values: Tensor) -> Tensor:
        return self._reduce(values, dist.ReduceOp.MAX)

    def gather(self, value: T) -> list[T]:
        """Every rank's value, in the order of ranks; pickled, so something small."""
        if not self.distributed:
            return [value]
        values: list[T] = [value] * self.size
        dist.all_gather_object(values, value)
        return values

    def wait(self) -> None:
        """Until this rank's device has done what it was given, so that what is measured ends with it."""
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()

    def barrier(self) -> None:
        if self.distributed:
            dist.barrier()

    def _reduce(self, values: Tensor, operation: dist.ReduceOp.RedOpType) -> Tensor:
        if not self.distributed:
            return values
        moved = values.to(self.device)
        dist.all_reduce(moved, operation)
        return moved.cpu()


def start() -> Ranks:
    """Joins the process group when torchrun set one up (environment variable WORLD_SIZE)."""
    cuda = torch.cuda.is_available()
    if "WORLD_SIZE" not in os.environ:
        return Ranks(0, 1, torch.device("cuda" if cuda else "cpu"))
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    if not dist.is_initialized():
        store, rank, size = next(dist.rendezvous("env://"))
        if os.environ.get("GROUP_WORLD_SIZE") == "1":
            # Restarting its workers, torchrun keeps the store in which they find each other (unless --rdzv-backend is c10d): without a
            # prefix they would find the addresses of dead ones. On several machines the numbers of restarts may differ.
            store = dist.PrefixStore(f"restart_{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
        backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=TIMEOUT)
    device = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
    return Ranks(dist.get_rank(), dist.get_world_size(), device)


def stop() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def check(training: TrainingConfig, ranks: Ranks) -> None:
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
    return fully_shard(policy, mesh=mesh, mp_policy=mixed, offload_policy=place)


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
    """(name in the transformers model, whole tensor) of every parameter, one at a time; a collective: all ranks must iterate."""
    for name, parameter in policy.model.named_parameters():
        tensor = parameter.detach()
        yield name, tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
