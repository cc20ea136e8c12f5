"""Config -> trainer -> trained model: loads, shards and wires what `loop.Trainer` works with."""

from __future__ import annotations

import json
from dataclasses import asdict

import torch

from swirl_fast.config import Config, ConfigError
from swirl_fast.engines.local import LocalEngine
from swirl_fast.judges import load_judge
from swirl_fast.model import DTYPES, load_model, load_tokenizer, model_fingerprint
from swirl_fast.policy import Policy
from swirl_fast.rendering import Renderer
from swirl_fast.shards import TrajectoryStream, read_trajectories
from swirl_fast.tasks import load_task
from swirl_fast.training import checkpoint
from swirl_fast.training.loop import Trainer, check_budget
from swirl_fast.training.parallel import Ranks, shard

_MARKER = "trained.json"


def settings_of(config: Config, judge_id: str) -> dict[str, object]:
    """What a checkpoint's further course depends on; what may change on resuming (its length, its saving and its guards) is left out."""
    training = asdict(config.training)
    if config.training.schedule == "constant":
        del training["steps"]  # a cosine depends on where it ends
    for name in (
        "checkpoint_every",
        "keep_checkpoints",
        "keep_best",
        "async_checkpoints",
        "time_limit",
        "max_skipped_steps",
        "kl_warning",
        "tensorboard",
        "token_budget",
        "max_path_tokens",
        "activation_checkpointing",
    ):
        del training[name]
    return {
        "model": asdict(config.model) | {"weights": model_fingerprint(config.model)},
        "engine_dtype": config.engine.dtype,
        "judge": judge_id,
        "algorithm": asdict(config.algorithm),
        "training": training,
        "seed": config.run.seed,
    }


def run_training(config: Config, ranks: Ranks) -> None:
    """Trains to `training.steps` and writes runs/NAME/model, a Hugging Face folder. Does nothing when that is there already."""
    training = config.training
    target = config.folder / "model"
    stream = TrajectoryStream(
        config.folder / "shards",
        global_batch=training.trajectories_per_step,
        rank=ranks.rank,
        world_size=ranks.size,
        seed=config.run.seed,
    )
    content = int(stream.manifest.content_hash, 16) >> 12  # exact in a float64
    spread = ranks.max(torch.tensor([content, -content], dtype=torch.float64)).sum()
    if spread != 0:
        raise ValueError(
            f"{config.folder / 'shards'} is not the same on all ranks; copy the same folder to every machine"
        )
    task = load_task(config.tasks, config.run.seed)
    tools_by_task = {task.name: task.tools}
    settings = settings_of(config, load_judge(config.judge, tools_by_task, probe=False).id)
    marker = {"step": training.steps, "shards": stream.manifest.content_hash, **settings}
    if (target / _MARKER).is_file() and json.loads((target / _MARKER).read_text()) == marker:
        if ranks.main:
            print(f"train: {target} is trained to step {training.steps} already")
        return
    judge = load_judge(config.judge, tools_by_task)
    if ranks.main and stream.manifest.trajectories < training.trajectories_per_step:
        print(
            f"train: {stream.manifest.trajectories} trajectories passed the filter, fewer than "
            f"training.trajectories_per_step={training.trajectories_per_step}: every step repeats some, with fresh actions"
        )
    tokenizer = load_tokenizer(config.model)
    renderer = Renderer(tokenizer, config.model.path)
    recorded = [sample.trajectory for sample in read_trajectories(config.folder / "shards")]
    # a well-formed action was not cut off, so it ends with the stop token of the tokenizer that sampled it
    stop_ids = {t.tokens[step.end - 1] for t in recorded for step in t.steps if step.action.kind != "malformed"}
    if stop_ids and renderer.stop_id not in stop_ids:
        raise ConfigError(
            f"model.path={config.model.path}: its turns end with token {renderer.stop_id}, but none of the recorded actions does; "
            "the shards were collected with another model's tokenizer"
        )

    compute = DTYPES[config.model.dtype]
    # FSDP gathers parameters in the compute type; one process casts them under autocast. Either way they are stored in float32.
    autocast = compute if compute != torch.float32 and not ranks.distributed else None
    engine = LocalEngine(
        load_model(config.model, config.engine.dtype),
        max_sequences=config.engine.max_sequences,
        cache_tokens=config.engine.cache_tokens,
        device=ranks.device,
    )
    check_budget(config, recorded, engine.max_context)
    policy = Policy(load_model(config.model, "float32"), training.temperature, autocast)
    if training.activation_checkpointing:
        policy.model.gradient_checkpointing_enable({"use_reentrant": False})
        policy.model.train()  # transformers checkpoints in training mode only; dropout was refused
    shard(policy, ranks, compute)
    reference = None
    if config.algorithm.kl_coef > 0:
        reference = Policy(load_model(config.model, "float32"), training.temperature, autocast)
        reference.requires_grad_(False)
        shard(reference, ranks, compute)
    trainer = Trainer(config, ranks, policy, reference, engine, judge, renderer, task.tools, stream, settings)
    try:
        trainer.train()
        checkpoint.export(target, policy, tokenizer, ranks)
        if ranks.main:
            (target / _MARKER).write_text(json.dumps(marker))
        ranks.barrier()
    finally:
        engine.close()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
