"""Three training steps of a small model in several ways, one after another in one process group: for `torchrun`, or imported.

    python -m torch.distributed.run --nproc-per-node N tests/support/parallel_variants.py OUT MODEL:VARIANT …

Everything is the trainer's own but rollouts, judge and stream, which are made up here from seeds. Rank 0 writes OUT/VARIANT.json
(metrics, micro-batches, collectives) and OUT/VARIANT.safetensors (the trained parameters). MODEL:load only loads: OUT/NAME.json has
what was read, OUT/NAME.safetensors all parameters and buffers, OUT/NAME a folder exported in small files; NAME is that of MODEL.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file
from support.small_models import SHAPE

from swirl_fast.config import Config, load
from swirl_fast.engines.engine import Completion, EngineStats, Request
from swirl_fast.formats.tags import parse
from swirl_fast.judges.judge import Judge
from swirl_fast.models.policy import Policy
from swirl_fast.ranks import Ranks, start, stop
from swirl_fast.rollouts.pipeline import RolloutPipeline, SampledBatch
from swirl_fast.training import sharded_weights
from swirl_fast.training.batch import MicroBatch
from swirl_fast.training.build import check_model, make_policy, make_reference
from swirl_fast.training.export import export
from swirl_fast.training.fsdp import full_parameters
from swirl_fast.training.trainer import Metrics, Trainer
from swirl_fast.trajectory import Step, StepView, Trajectory
from swirl_fast.verdict import Judgement, JudgeStats, Verdict

STEPS = 3
STATES = ("states", "states_without_signal", "states_drawn", "states_drawn_without_signal", "steps_without_signal")
MICRO = "training.token_budget=64"  # at least 4 micro-batches on each of two ranks
EVERY = "training.shard_accumulated_gradients=true"
VARIANTS: dict[str, tuple[str, ...]] = {
    "plain": (),
    "accumulated": (MICRO,),
    "unchecked": ("training.check_model=false",),
    "resumed": (),
    "full": ("training.activation_checkpointing=full",),
    "selective": ("training.activation_checkpointing=selective",),
    "compiled": ("training.compile=true",),
    "everything": ("training.compile=true", "training.activation_checkpointing=selective", MICRO, EVERY),
    "accumulated_sharded": (MICRO, EVERY),
    "bfloat16": ("model.dtype=bfloat16",),
    "offloaded": ("training.reference_offload=true",),
    "hsdp": ("training.shard_size=2",),
    "hsdp_accumulated": ("training.shard_size=2", MICRO),
    "hsdp_accumulated_sharded": ("training.shard_size=2", MICRO, EVERY),
    "rows": ("training.sharing=false",),
    "rows_accumulated_resumed": ("training.sharing=false", MICRO, "training.activation_checkpointing=selective"),
    "padded": ("training.sharing=false",),
    "padded_accumulated_resumed": ("training.sharing=false", "training.token_budget=400"),
    "refilled": ("training.refill=true",),
    "refilled_resumed": ("training.refill=true",),
    "lora": ("model.lora.rank=3",),
    "lora_resumed": ("model.lora.rank=3", MICRO, EVERY, "training.activation_checkpointing=selective"),
    "turns": ("engine.kind=sglang", "engine.share_gpu=true"),
    "turns_resumed": ("engine.kind=sglang", "engine.share_gpu=true"),
    "turns_lora": ("engine.kind=sglang", "engine.share_gpu=true", "model.lora.rank=3"),
}


def config_of(model: Path, variant: str) -> Config:
    common = (
        f"model.path={model}",
        "algorithm.kl_coef=0.1",
        f"training.steps={STEPS}",
        "training.max_engine_gap=0",  # the engine here makes its log-probs up
        "training.trajectories_per_step=12",
        "training.group_size=3",
        "training.max_action_tokens=8",
        "training.learning_rate=1e-4",
        "training.tensorboard=false",
        "training.clip_grad_norm=0.5",  # below the norm, so that clipping is at work
    )
    return load(None, [*common, *VARIANTS[variant]])


class Rollouts:
    """An engine whose tokens follow from the seeds."""

    max_context = SHAPE["max_position_embeddings"]
    lent = False  # its memory, to the trainer

    def release_memory(self) -> None:
        self.lent = True

    def resume_memory(self) -> None:
        self.lent = False

    def generate(self, requests: Sequence[Request]) -> list[list[Completion]]:
        assert not self.lent

        def sample(request: Request, k: int) -> Completion:
            draw = np.random.default_rng([request.seed, k])
            tokens = draw.integers(1, SHAPE["vocab_size"], draw.integers(1, 9)).astype(np.int32)
            return Completion(tokens, [-1.0] * len(tokens), "stop", 0)

        return [[sample(request, k) for k in range(request.n)] for request in requests]

    def update_weights(self, named_tensors: Iterable[tuple[str, torch.Tensor]], version: int) -> None:
        """Real rollouts would come from them; here tokens come from the seeds."""

    def stats(self) -> EngineStats:
        return EngineStats()


class Coin:
    id = "coin"

    def stats(self) -> JudgeStats:
        return JudgeStats()

    def judge(self, steps: Sequence[StepView]) -> list[Judgement]:
        heads = [hashlib.sha256(step.action_text.encode()).digest()[0] < 100 for step in steps]
        return [Judgement(Verdict.GOOD if head else Verdict.BAD, "") for head in heads]


class Stream:
    """Trajectories of two or three steps, in the order of `TrajectoryStream`: rank r takes every size-th."""

    skipped_samples = 0

    def __init__(self, ranks: Ranks, batch: int) -> None:
        self.ranks, self.batch, self.position = ranks, batch, 0

    def next_batch(self) -> list[SimpleNamespace]:
        numbers = range(self.position + self.ranks.rank, self.position + self.batch, self.ranks.size)
        self.position += self.batch
        return [sample(number) for number in numbers]

    def further(self, start: int, count: int) -> tuple[list[SimpleNamespace], int]:
        numbers = range(start + self.ranks.rank, start + count * self.ranks.size, self.ranks.size)
        return [sample(number) for number in numbers], start + count * self.ranks.size

    def pass_over(self, count: int) -> None:
        self.position += count * self.ranks.size

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.position = state["position"]


def sample(number: int) -> SimpleNamespace:
    one = trajectory(number)
    return SimpleNamespace(trajectory=one, kept=[True] * one.num_steps)


def trajectory(number: int) -> Trajectory:
    draw = np.random.default_rng(number)
    steps = int(draw.integers(2, 4))
    tokens = draw.integers(1, SHAPE["vocab_size"], 10 + 15 * steps).tolist()
    action = parse("<answer>1</answer>", ())
    spans = [Step(10 + 15 * i, 16 + 15 * i, "<answer>1</answer>", action, [-1.0] * 6, 0) for i in range(steps)]
    return Trajectory(f"t{number}", f"q{number}", "none", "?", number, 10, tokens, spans)


@contextlib.contextmanager
def counted() -> Iterator[Counter[str]]:
    """How often FSDP reduces gradients: FSDP looks both functions up in torch.distributed at every call."""
    calls: Counter[str] = Counter()
    reduce_scatter = "reduce_scatter_single" if hasattr(dist, "reduce_scatter_single") else "reduce_scatter_tensor"
    originals = {name: getattr(dist, name) for name in (reduce_scatter, "all_reduce")}

    def counting(name: str) -> Any:
        def call(*arguments: Any, **named: Any) -> Any:
            calls["all_reduce" if name == "all_reduce" else "reduce_scatter"] += 1
            return originals[name](*arguments, **named)

        return call

    for name in originals:
        setattr(dist, name, counting(name))
    try:
        yield calls
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)


class Watched(Trainer):
    """Keeps the metrics of every step, how many trajectories it took further, how many micro-batches the last update had, and which
    collectives its backward called."""

    rows: list[Metrics]
    further: list[int]

    def train_step(self) -> Metrics:
        metrics = super().train_step()
        self.rows.append(metrics)
        return metrics

    def _pack(self, batch: SampledBatch, *rest: Any) -> list[MicroBatch]:
        self.further.append(batch.further)
        return super()._pack(batch, *rest)

    def _update(self, batches: list[MicroBatch], *rest: Any, **named: Any) -> float:
        with counted() as calls:
            norm = super()._update(batches, *rest, **named)
        self.seen = {"micro_batches": len(batches), **calls}
        return norm


def train(model: Path, variant: str, ranks: Ranks, out: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """(what was seen, the trained parameters)"""
    config = config_of(model, variant)
    config.run.folder = str(out)
    rows: list[Metrics] = []
    config.folder.mkdir(parents=True, exist_ok=True)
    # a second trainer, with weights from the files again, goes on from the first one's checkpoint
    if variant.endswith("resumed"):
        for config.training.steps in (1, STEPS):
            trainer = trainer_of(config, ranks, rows)
            trainer.restore()
            trainer.run()
    else:
        trainer = trainer_of(config, ranks, rows)
        for _ in range(STEPS):
            trainer.train_step()
    parameters = list(trainer.policy.parameters())
    assert {parameter.dtype for parameter in parameters} == {torch.float32}, "weights are stepped in float32"
    keep = ("loss", "grad_norm", "kl", "reward", "tokens_computed", *STATES)
    seen = {"metrics": [{key: row[key] for key in keep} for row in rows], "checked": trainer.checked, **trainer.seen}
    seen["positions"] = ranks.gather(trainer.state()["stream"]["position"])
    seen["further"] = ranks.gather(trainer.further)
    if ranks.distributed:
        seen["mesh"] = parameters[0].device_mesh.mesh.tolist()
    return seen, {name: tensor.clone() for name, tensor in full_parameters(trainer.policy)}


def trainer_of(
    config: Config, ranks: Ranks, rows: list[Metrics], judge: Judge | None = None, stream: Any = None
) -> Watched:
    """judge: Coin() where None. stream: one of trajectories that are made up where None."""
    policy = make_policy(config, ranks)
    checked = check_model(config, ranks, policy, Rollouts.max_context)
    reference = make_reference(config, ranks, policy)
    if config.engine.share_gpu and not ranks.distributed:
        others = reference.parameters() if isinstance(reference, Policy) else ()
        for parameter in (*policy.parameters(), *others):
            parameter.data = parameter.data.clone()  # in memory that can be given back, as a GPU's: no mapped file
    renderer: Any = SimpleNamespace(stop_id=1, stop_ids=(1,), text=lambda tokens: f"<answer>{sum(tokens)}</answer>")
    stream = stream or Stream(ranks, config.training.trajectories_per_step)
    rollouts = RolloutPipeline(config, ranks, Rollouts(), judge or Coin(), renderer, {"none": ()}, stream)
    trainer = Watched(config, ranks, policy, reference, rollouts, {}, checked)
    trainer.rows, trainer.further = rows, []
    return trainer


class Recorder:
    """safe_open that notes how many numbers of each tensor are read."""

    read: Counter[str] = Counter()

    def __init__(self, path: Path, framework: str) -> None:
        self.file = safe_open(path, framework)

    def __enter__(self) -> Recorder:
        self.file.__enter__()
        return self

    def __exit__(self, *arguments: Any) -> None:
        self.file.__exit__(*arguments)

    def keys(self) -> list[str]:
        return list(self.file.keys())

    def get_slice(self, name: str) -> RecordedSlice:
        return RecordedSlice(name, self.file.get_slice(name))

    def get_tensor(self, name: str) -> torch.Tensor:
        tensor = self.file.get_tensor(name)
        self.read[name] += tensor.numel()
        return tensor


class RecordedSlice:
    def __init__(self, name: str, rows: Any) -> None:
        self.name, self.rows = name, rows
        self.get_shape, self.get_dtype = rows.get_shape, rows.get_dtype

    def __getitem__(self, at: slice) -> torch.Tensor:
        part = self.rows[at]
        Recorder.read[self.name] += part.numel()
        return part


def load_and_export(model: Path, out: Path, ranks: Ranks) -> None:
    Recorder.read.clear()
    sharded_weights.safe_open = Recorder
    policy = make_policy(config_of(model, "plain"), ranks)
    sharded_weights.safe_open = safe_open
    reads = ranks.gather(dict(Recorder.read))
    tensors = {name: tensor.clone() for name, tensor in full_parameters(policy)}
    tensors |= {f"buffer {name}": buffer.clone() for name, buffer in policy.model.named_buffers()}
    if ranks.main:
        save_file(tensors, out / f"{model.name}.safetensors")
        (out / f"{model.name}.json").write_text(json.dumps(reads), encoding="utf-8")
    tokenizer = SimpleNamespace(
        save_pretrained=lambda folder: (folder / "tokenizer.json").write_text("{}", encoding="utf-8")
    )
    export(out / model.name, policy, tokenizer, ranks, file_bytes=20_000)


if __name__ == "__main__":
    out_folder = Path(sys.argv[1])
    all_ranks = start()
    for argument in sys.argv[2:]:
        folder, _, one = argument.rpartition(":")
        if one == "load":
            load_and_export(Path(folder), out_folder, all_ranks)
            continue
        torch._dynamo.reset()
        found, parameters = train(Path(folder), one, all_ranks, out_folder / "runs" / one)
        if all_ranks.main:
            (out_folder / f"{one}.json").write_text(json.dumps(found), encoding="utf-8")
            save_file(parameters, out_folder / f"{one}.safetensors")
    stop()
