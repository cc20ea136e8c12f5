"""training.replay_routing from the embedded engine's choice to the metrics of a step."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from support.parallel_variants import Coin, Stream
from support.small_models import SHAPE

from swirl_fast.config import ConfigError, load
from swirl_fast.engines import load_engine
from swirl_fast.ranks import Ranks
from swirl_fast.rollouts.pipeline import RolloutPipeline
from swirl_fast.training.build import check_machine, check_model, make_policy
from swirl_fast.training.resume import settings_of
from swirl_fast.training.trainer import Metrics, Trainer

CPU = torch.device("cpu")
ALONE = Ranks(0, 1, CPU)


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("mixtral")
    config = transformers.MixtralConfig(**SHAPE, num_local_experts=8, num_experts_per_tok=2, initializer_range=0.1)
    transformers.MixtralForCausalLM(config).save_pretrained(folder)
    return folder


def steps(model: Path, *settings: str) -> list[Metrics]:
    common = (
        "algorithm.kl_coef=0",
        "training.trajectories_per_step=4",
        "training.group_size=3",
        "training.max_engine_gap=0",
    )
    config = load(None, [f"model.path={model}", *common, "training.max_action_tokens=12", *settings])
    engine = load_engine(config, CPU)
    renderer: Any = SimpleNamespace(stop_id=1, stop_ids=(1,), text=lambda tokens: f"<answer>{sum(tokens)}</answer>")
    stream: Any = Stream(ALONE, config.training.trajectories_per_step)
    rollouts = RolloutPipeline(config, ALONE, engine, Coin(), renderer, {"none": ()}, stream)
    policy = make_policy(config, ALONE)
    trainer = Trainer(config, ALONE, policy, None, rollouts, {}, check_model(config, ALONE, policy, 64))
    try:
        return [trainer.train_step() for _ in range(2)]
    finally:
        rollouts.close()
        engine.close()


def test_what_a_rounding_engine_chose_is_replayed(mixtral: Path) -> None:
    compared = steps(mixtral, "engine.dtype=bfloat16", "engine.return_routed_experts=true")
    replayed = steps(mixtral, "engine.dtype=bfloat16", "training.replay_routing=true")
    for one, other in zip(compared, replayed, strict=True):
        assert 0 < one["routing_gap"] < 0.5 and other["routing_gap"] > 0
    assert replayed[0]["reward"] == compared[0]["reward"], "the same actions"
    assert replayed[0]["engine_gap_mean"] < 0.9 * compared[0]["engine_gap_mean"]


def test_what_an_exact_engine_chose_changes_nothing(mixtral: Path) -> None:
    plain, compared, replayed = (
        steps(mixtral, *more) for more in ((), ["engine.return_routed_experts=true"], ["training.replay_routing=true"])
    )
    timed = {key for key in plain[0] if "second" in key or key in ("tflops", "memory_gib")}
    for rows in (compared, replayed):
        for one, other in zip(plain, rows, strict=True):
            assert other["routing_gap"] == 0 and "routing_gap" not in one
            assert all(one[key] == other[key] or one[key] != one[key] for key in one.keys() - timed)


def test_a_model_without_experts_is_refused_and_old_checkpoints_are_not(tmp_path: Path) -> None:
    transformers.LlamaConfig(**SHAPE).save_pretrained(tmp_path)
    for key in ("training.replay_routing", "engine.return_routed_experts"):
        with pytest.raises(ConfigError, match=f"{key}=true: model type llama has no experts; leave it false"):
            check_machine(load(None, [f"model.path={tmp_path}", f"{key}=true"]), ALONE)
    settings = [settings_of(load(None, more), "")["training"] for more in ([], ["training.replay_routing=true"])]
    assert "replay_routing" not in settings[0] and settings[1]["replay_routing"]
