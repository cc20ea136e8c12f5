"""engine.share_gpu on the trainer's side: its state goes out of memory and comes back bit for bit, and the training is the same."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support import small_models
from support.parallel_variants import Rollouts, config_of, train, trainer_of
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from swirl_fast.config import ConfigError, load
from swirl_fast.ranks import Ranks
from swirl_fast.training.build import check_machine
from swirl_fast.training.offload import Offload

CPU = torch.device("cpu")
ALONE = Ranks(0, 1, CPU)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    small_models.build("llama", torch.float32).save_pretrained(folder)
    return folder


@pytest.fixture
def one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@pytest.mark.parametrize("sharded", [False, True])
def test_state_comes_back_bit_for_bit(sharded: bool, one_rank: None) -> None:
    """Not-a-number, infinities and negative zeros too; views and tied tensors stay what they are, and the optimizer goes on."""
    model = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Linear(7, 3))
    if sharded:
        fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(4, 5)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    with torch.no_grad():
        for parameter in model.parameters():
            local(parameter).view(-1)[:3] = torch.tensor([float("nan"), -0.0, float("-inf")])
    states = [value for state in optimizer.state.values() for value in state.values()]
    tensors = [*model.parameters(), *states, model[0].bias]  # one of them twice
    before = [local(tensor).detach().clone() for tensor in tensors]
    offload = Offload(CPU)
    for _ in range(2):
        offload.out(tensors)
        assert all(local(tensor).untyped_storage().nbytes() == 0 for tensor in tensors)
        offload.back()
        for tensor, copy in zip(tensors, before, strict=True):
            assert local(tensor).detach().clone().numpy().tobytes() == copy.numpy().tobytes()
    model(torch.randn(4, 5)).sum().backward()
    optimizer.step()
    assert all(not torch.equal(local(p).detach(), copy) for p, copy in zip(model.parameters(), before, strict=False))


def test_what_is_constant_is_copied_once() -> None:
    one = torch.randn(5)
    offload = Offload(CPU, constant=True)
    offload.out([one])
    (copy,) = offload._copies.values()
    kept = copy.clone()
    offload.back()
    offload.out([one])
    assert offload._copies[one.untyped_storage()] is copy
    offload.back()
    assert one.numpy().tobytes() == kept.numpy().tobytes()


@pytest.mark.parametrize("variant", ["turns", "turns_resumed", "turns_lora"])
def test_the_training_is_the_same(variant: str, llama: Path, tmp_path: Path) -> None:
    seen, parameters = train(llama, variant, ALONE, tmp_path / variant)
    wanted, reference = train(llama, variant.replace("turns_", "").replace("turns", "plain"), ALONE, tmp_path / "plain")
    assert seen["metrics"] == wanted["metrics"]
    for name, tensor in reference.items():
        assert torch.equal(parameters[name], tensor), name


def test_who_has_the_memory_when(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of(llama, "turns")
    config.run.folder = str(tmp_path)
    config.folder.mkdir(parents=True)
    trainer = trainer_of(config, ALONE, [])
    events: list[tuple[str, int, int, int]] = []

    def held(tensors: Any) -> int:
        return sum(tensor.untyped_storage().nbytes() for tensor in tensors)

    def note(what: str) -> None:
        states = (value for state in trainer.optimizer.state.values() for value in state.values())
        events.append(
            (what, held(trainer.policy.parameters()), held(trainer.reference.parameters()), held(states))  # type: ignore[union-attr]
        )

    def noted(name: str) -> Any:
        plain = getattr(Rollouts, name)

        def call(self: Rollouts, *arguments: Any) -> Any:
            note(name)
            return plain(self, *arguments)

        return call

    for name in ("generate", "update_weights", "resume_memory", "release_memory"):
        monkeypatch.setattr(Rollouts, name, noted(name))
    trainer.rollouts.engine.release_memory()  # type: ignore[union-attr]
    for _ in range(2):
        trainer.train_step()
        note("trained")
    p = held(trainer.policy.parameters())
    s = events[-1][3]
    turn = [
        ("update_weights", p, 0, 0),
        ("resume_memory", 0, 0, 0),
        ("generate", 0, 0, 0),
        ("release_memory", 0, 0, 0),
        ("trained", p, p, s),
    ]
    assert s >= 2 * p and events == [("release_memory", p, p, 0), *turn, *turn]
    assert trainer.rows[-1]["seconds_share_gpu"] >= 0 and trainer.rows[-1]["seconds_weight_sync"] >= 0


REFUSED: dict[str, tuple[Sequence[str], str]] = {
    "in this process": ([], "engine.share_gpu=True: only SGLang's servers can release.*engine.kind=sglang"),
    "beside the training": (
        ["engine.kind=sglang", "training.lag=1", "algorithm.importance_cap=2"],
        "training.lag=1: .*no memory to sample beside the training; use 0",
    ),
    "nccl": (
        ["engine.kind=sglang", "engine.weight_sync.method=distributed"],
        "weight_sync.method=distributed: nccl takes no two processes on one GPU.*use tensor or disk",
    ),
    "nothing to start from": (
        ["engine.kind=sglang", "engine.weight_sync.method=tensor", "engine.weight_sync.snapshot=false"],
        "weight_sync.snapshot=False: .*set it to true",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_settings_that_cannot_share(what: str) -> None:
    settings, message = REFUSED[what]
    with pytest.raises(ConfigError, match=message):
        load(None, ["engine.share_gpu=true", *settings])


def test_without_a_gpu_there_is_nothing_to_share(llama: Path) -> None:
    with pytest.raises(ConfigError, match="engine.share_gpu=true: this machine has no GPU"):
        check_machine(config_of(llama, "turns"), ALONE)
