"""training.offload_activations: the same gradients bit for bit, and of checkpointed layers the input alone is moved."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from support.model_families import build, trees

from swirl_fast.comb.tree import pack
from swirl_fast.config import ConfigError, TrainingConfig, load
from swirl_fast.models.policy import DeviceComb, Policy
from swirl_fast.ranks import Ranks
from swirl_fast.training import layers
from swirl_fast.training.activation_offload import OffloadedCheckpoint
from swirl_fast.training.fsdp import full_parameters, shard

CPU = torch.device("cpu")


@pytest.fixture
def one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def gradients(policy: Policy) -> list[torch.Tensor]:
    policy(DeviceComb.of(pack(trees()[0]))).sum().backward()
    found = [parameter.grad for parameter in policy.parameters()]
    return [gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient for gradient in found]  # type: ignore[union-attr]


@pytest.mark.parametrize(("mode", "moved"), [("full", 3), ("selective", 2)])
@pytest.mark.parametrize("sharded", [False, True])
def test_the_same_gradients(
    mode: str, moved: int, sharded: bool, one_rank: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[torch.Size] = []
    plain = OffloadedCheckpoint._out
    monkeypatch.setattr(
        OffloadedCheckpoint, "_out", lambda self, tensor: (sizes.append(tensor.shape), plain(self, tensor))[1]
    )
    model = build("gemma3", torch.float32)
    found = []
    for offload in (False, True):
        policy = Policy(copy.deepcopy(model), autocast=None if sharded else torch.bfloat16)
        layers.prepare(policy, TrainingConfig(activation_checkpointing=mode, offload_activations=offload))
        if sharded:
            shard(policy, Ranks(0, 1, CPU), torch.bfloat16)
        found.append(gradients(policy))
        assert len(sizes) == (moved if offload else 0), "one input a checkpointed layer"
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
    tokens = pack(trees()[0]).computed_tokens
    assert set(sizes) == {torch.Size([1, tokens, 32])}
    assert list(full_parameters(policy))


def test_what_cannot_work_is_refused() -> None:
    with pytest.raises(ConfigError, match="offload_activations=True: moves what checkpointed layers keep; set .*=full"):
        load(None, ["training.offload_activations=true"])
    settings = TrainingConfig(activation_checkpointing="full", offload_activations=True)
    with pytest.raises(ConfigError, match="offload_activations=true: without a GPU"):
        layers.check_layers(settings, build("llama", torch.float32).config, CPU)
