"""What benchmarks.train_throughput trains on: models of given shapes with random weights, and batches of made-up rollouts.

Nothing is drawn, judged or read: batches are ready before a step begins, and the engine that takes the weights only looks at them.

Legend: K states of a trajectory, G actions drawn at each.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

from benchmarks.step_training.ways import Shape
from swirl_fast.config import Config
from swirl_fast.engines.engine import Completion
from swirl_fast.formats.tags import TAGS, parse
from swirl_fast.models.load import DTYPES
from swirl_fast.models.policy import Policy
from swirl_fast.ranks import Ranks
from swirl_fast.rollouts.at_states import SampledAction
from swirl_fast.rollouts.pipeline import RolloutCounts, SampledBatch
from swirl_fast.training import fsdp, layers
from swirl_fast.training.trainer import Trainer
from swirl_fast.trajectory import Step, StepView, Trajectory
from swirl_fast.verdict import Judgement, Verdict


class ModelShape(NamedTuple):
    """The shape of a Llama: RMSNorm, rotary embedding, gated MLP, no biases. tied: output layer and embeddings are one matrix."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    tied: bool


MODELS = {
    "tiny": ModelShape(32, 2, 4, 2, 8, 64, 256, True),  # for tests
    "135m": ModelShape(576, 30, 9, 3, 64, 1536, 49152, True),  # SmolLM2-135M
    "0.5b": ModelShape(896, 24, 14, 2, 64, 4864, 151936, True),  # Qwen2.5-0.5B, but for its biases
    "1.5b": ModelShape(1536, 28, 12, 2, 128, 8960, 151936, True),  # Qwen2.5-1.5B, but for its biases
    "8b": ModelShape(4096, 32, 32, 8, 128, 14336, 128256, False),  # Llama-3.1-8B
}


def llama(shape: ModelShape, context: int) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        intermediate_size=shape.intermediate,
        vocab_size=shape.vocab,
        tie_word_embeddings=shape.tied,
        max_position_embeddings=context,
    )


def make_policy(model: LlamaConfig, config: Config, ranks: Ranks, frozen: bool = False) -> Policy:
    """As swirl_fast.training.build makes one, with random float32 weights, the same on every call and rank. Every rank makes the whole
    model on its device before it is sharded."""
    training, compute = config.training, DTYPES[config.model.dtype]
    torch.manual_seed(0)
    with torch.device(ranks.device):
        whole = AutoModelForCausalLM.from_config(model, dtype=torch.float32)
    autocast = compute if not ranks.distributed and compute != torch.float32 else None
    policy = Policy(whole, training.temperature, autocast)
    if frozen:
        policy.requires_grad_(False)
    layers.prepare(policy, training)
    return fsdp.shard(policy, ranks, compute, training.shard_size)


def make_batch(
    shape: Shape, states: int, samples: int, trajectories: int, vocab: int, ranks: Ranks, step: int, rows: bool
) -> SampledBatch:
    """This rank's batch of one step: `trajectories` recorded ones with K states and G sampled actions at each, random tokens, every
    second verdict GOOD so that no advantage is 0.

    Trajectories share nothing with each other, and the actions of a state nothing with each other or with the recorded action.
    rows: every state with one action is a trajectory of its own whose first token no other one has, so that the trainer has nothing
    to share: plain packing. Else the tokens, weights and advantages are the same.
    """
    made: list[Trajectory] = []
    sampled: list[SampledAction] = []
    judgements: list[Judgement] = []
    answer = parse("<answer>1</answer>", ())
    for t in range(trajectories):
        place = ranks.rank * trajectories + t  # among those of all ranks
        draw = np.random.default_rng([step, place])
        trunk = draw.integers(1, vocab, shape.state(states) + shape.action).tolist()
        trunk[0] = 1 + place
        if not rows:
            made.append(_trajectory(place, trunk, [shape.state(k + 1) for k in range(states)], shape.action))
        for k in range(states):
            length = shape.state(k + 1)
            others = np.setdiff1d(np.arange(1, vocab), trunk[length])
            firsts = draw.choice(others, samples, replace=False)
            for g in range(samples):
                tokens = [int(firsts[g]), *draw.integers(1, vocab, shape.action - 1).tolist()]
                if rows:
                    number = (place * states + k) * samples + g
                    made.append(_trajectory(number, [1 + number, *trunk[1:length]], [length], 0))
                view = StepView("none", "?", () if rows else (("", ""),) * k, "")
                completion = Completion(np.array(tokens, np.int32), [-1.0] * len(tokens), "stop", step)
                sampled.append(SampledAction(len(made) - 1, t * states + k, completion, answer, view))
                judgements.append(Judgement(Verdict.BAD if g % 2 else Verdict.GOOD, ""))
    return SampledBatch(made, sampled, judgements, RolloutCounts(generated_tokens=len(sampled) * shape.action), 0.0)


def _trajectory(number: int, tokens: list[int], starts: Sequence[int], action: int) -> Trajectory:
    steps = [Step(at, at + action, "", parse("", ()), [-1.0] * action, 0) for at in starts]
    return Trajectory(f"t{number}", f"q{number}", "none", "?", number, starts[0], tokens, steps)


class Prepared:
    """In place of the trainer's RolloutPipeline: hands out batches that are ready."""

    lagged = False
    skipped_samples = 0
    judge_id = "none"
    tasks = ("none",)
    form = TAGS

    def __init__(self, batches: Iterable[SampledBatch], engine: Unused) -> None:
        self._batches, self.engine = iter(batches), engine

    def take(self) -> SampledBatch:
        return next(self._batches)

    def wait(self) -> float:
        return 0.0


class Unused:
    """In place of the engine: takes weights without gathering or copying them."""

    def __init__(self, max_context: int) -> None:
        self.max_context = max_context

    def update_weights(self, named_tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        for _ in named_tensors:
            pass


def make_trainer(
    config: Config, ranks: Ranks, model: LlamaConfig, batches: Iterable[SampledBatch]
) -> tuple[Trainer, int]:
    """The trainer over a new model, and the number of its parameters."""
    policy = make_policy(model, config, ranks)
    reference = make_policy(model, config, ranks, frozen=True) if config.algorithm.kl_coef > 0 else None
    rollouts: Any = Prepared(batches, Unused(model.max_position_embeddings))
    trainer = Trainer(config, ranks, policy, reference, rollouts, {})
    return trainer, sum(parameter.numel() for parameter in policy.parameters())
