"""Config -> trainer -> trained model: loads, shards and wires what `loop.Trainer` works with."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from pathlib import Path

import torch

from swirl_fast.config import Config, ConfigError
from swirl_fast.data.shard_source import open_shards
from swirl_fast.data.stream import TrajectoryStream
from swirl_fast.engines import load_engine
from swirl_fast.files import describe_changes
from swirl_fast.judges import load_judge
from swirl_fast.models.load import DTYPES, load_config, load_model, load_tokenizer
from swirl_fast.models.policy import Policy
from swirl_fast.ranks import Ranks
from swirl_fast.rendering import Renderer
from swirl_fast.rollouts.whole import WholeRollouts
from swirl_fast.tasks import load_task
from swirl_fast.tools import open_tools
from swirl_fast.training import fsdp, layers, metrics_log, sharded_weights
from swirl_fast.training.checkpoint import load_weights, recorded_state
from swirl_fast.training.export import export
from swirl_fast.training.memory import GIB, estimate
from swirl_fast.training.resume import check_budget, completed, model_settings, settings_of
from swirl_fast.training.trainer import Trainer

_MARKER = "trained.json"


def open_stream(config: Config, ranks: Ranks) -> TrajectoryStream:
    """Collective: all ranks read the same shards and skip the same ones."""
    training = config.training
    location = training.shards or str(config.folder / "shards")
    stream = TrajectoryStream(
        open_shards(location, training.shards_cache, training.shards_cache_limit),
        global_batch=training.trajectories_per_step,
        rank=ranks.rank,
        world_size=ranks.size,
        seed=config.run.seed,
        shuffle_shards=training.shuffle_shards,
        skip_bad=training.bad_shards == "skip",
        prefetch=training.prefetch,
    )
    seen = ranks.gather((stream.manifest.content_hash, stream.problems))
    if len({content for content, _ in seen}) > 1:
        raise ValueError(f"{location} is not the same on all ranks; copy the same folder to every machine")
    stream.skip({name: problem for _, problems in seen for name, problem in problems.items()})
    if ranks.main:
        for name, problem in stream.skipped.items():
            skipped = f"its {stream.samples(name)} trajectories are skipped"
            print(f"train: {stream.store.shown(name)} {problem}; {skipped} (training.bad_shards=skip)")
    return stream


def make_policy(config: Config, ranks: Ranks, frozen: bool = False) -> Policy:
    """The policy, or the frozen reference, ready to run on these ranks. Collective.

    Under torchrun every rank reads its own part of the weights alone, where the files allow it; rank 0 says so where they do not.
    """
    training = config.training
    compute = DTYPES[config.model.dtype]
    if not ranks.distributed:
        # FSDP gathers parameters in the compute type; one process casts them under autocast. Either way they are stored in float32.
        autocast = compute if compute != torch.float32 else None
        policy = Policy(load_model(config.model, "float32"), training.temperature, autocast)
        weights = None
    else:
        # what is never stepped can be stored in the type in which it is gathered: the same numbers
        dtype = config.model.dtype if frozen else "float32"
        model, weights, reason = None, None, ""
        try:
            model = sharded_weights.empty_model(config.model, dtype)
            weights = sharded_weights.find_weights(config.model, model)
        except sharded_weights.Unsharded as error:
            reason = str(error)
        if reasons := [one for one in ranks.gather(reason) if one]:
            if ranks.main:
                print(f"train: model.path={config.model.path}: {reasons[0]}; every rank loads the whole model first")
            model, weights = load_model(config.model, dtype), None
        policy = Policy(model, training.temperature)
    if frozen:
        policy.requires_grad_(False)
    layers.prepare(policy, training)
    offload = frozen and training.reference_offload
    fsdp.shard(policy, ranks, compute, training.shard_size, offload)
    if weights is not None:
        sharded_weights.fill(policy, weights, torch.device("cpu") if offload else ranks.device)
    return policy


def run_training(config: Config, ranks: Ranks, accepted: Callable[[], object] = lambda: None) -> None:
    """Trains to `training.steps` and writes runs/NAME/model, a Hugging Face folder. Does nothing when that is there already.

    accepted: called on rank 0 when nothing in the run's folder speaks against the settings, before the first step.
    """
    with contextlib.ExitStack() as stack:
        _run_training(config, ranks, accepted, stack)


def _run_training(config: Config, ranks: Ranks, accepted: Callable[[], object], stack: contextlib.ExitStack) -> None:
    training = config.training
    fsdp.check(training, ranks)
    metrics_log.check(training)
    layers.check(training, load_config(config.model), ranks.device)
    target = config.folder / "model"
    stream = open_stream(config, ranks)
    stack.callback(stream.close)
    task = load_task(config.tasks, config.run.seed)
    tools_by_task = {task.name: task.tools}
    settings = settings_of(config, load_judge(config.judge, tools_by_task, probe=False, tasks=[task]).id)
    marker = {"step": training.steps, "shards": stream.manifest.content_hash, **settings}
    if (target / _MARKER).is_file() and completed(json.loads((target / _MARKER).read_text()), marker) == marker:
        if ranks.main:
            accepted()
            print(f"train: {target} is trained to step {training.steps} already")
        return
    judged = config.algorithm.name != "sft" and config.algorithm.reward == "process"
    judge = load_judge(config.judge, tools_by_task, probe=judged, tasks=[task])
    if ranks.main and (count := stream.manifest.trajectories - stream.skipped_samples) < training.trajectories_per_step:
        print(
            f"train: {count} trajectories passed the filter, fewer than "
            f"training.trajectories_per_step={training.trajectories_per_step}: every step repeats some, with fresh actions"
        )
    tokenizer = load_tokenizer(config.model)
    renderer = Renderer(tokenizer, config.model.path)
    stop_ids = stream.manifest.stop_ids
    if stop_ids and renderer.stop_id not in stop_ids:
        raise ConfigError(
            f"model.path={config.model.path}: its turns end with token {renderer.stop_id}, but none of the recorded actions does; "
            "the shards were collected with another model's tokenizer"
        )

    engine = None
    if config.algorithm.name != "sft":
        engine = load_engine(config, ranks.device, ranks=ranks)
        stack.callback(engine.close)
    max_context = engine.max_context if engine else load_config(config.model).get_text_config().max_position_embeddings
    check_budget(config, stream.manifest, max_context)
    outcomes = None
    if engine is not None and config.algorithm.reward == "outcome":
        tools = stack.enter_context(open_tools(task.tools, config.search, task.passages()))
        outcomes = WholeRollouts(config, task, tools, engine, renderer)
    if ranks.main and ranks.device.type == "cuda":
        there = torch.cuda.get_device_properties(ranks.device).total_memory / GIB
        needed = estimate(load_config(config.model), config, ranks.size if ranks.distributed else 0)
        print(f"train: the GPU has {there:.1f} GiB; estimated need {needed}")
    policy = make_policy(config, ranks)
    reference = make_policy(config, ranks, frozen=True) if config.algorithm.kl_coef > 0 else None
    trainer = Trainer(config, ranks, policy, reference, engine, judge, renderer, task.tools, stream, settings, outcomes)
    trainer.train(accepted)
    export(target, policy, tokenizer, ranks)
    if ranks.main:
        (target / _MARKER).write_text(json.dumps(marker))
    ranks.barrier()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def export_checkpoint(config: Config, ranks: Ranks, name: str, target: Path) -> None:
    """Writes the weights of `checkpoints/NAME` (best, step_000020) to `target`, a Hugging Face folder. Collective.

    Raises ConfigError when the checkpoint is of another model or `target` is there already, ValueError when it is not there or damaged.
    """
    if target.exists():
        raise ConfigError(f"{target} is already there; remove it, or name another folder with --out")
    source = config.folder / "checkpoints" / name
    wanted = {"model": model_settings(config)}
    recorded = completed({"model": recorded_state(source)["settings"]["model"]}, wanted)
    if recorded != wanted:
        raise ConfigError(f"{source} was trained from another model: {describe_changes(recorded, wanted)}")
    policy = make_policy(config, ranks)
    load_weights(source, policy)
    export(target, policy, load_tokenizer(config.model), ranks)
    if ranks.main:
        print(f"export: {target} holds the weights of {source.resolve().name}, to be evaluated with --of {target}")
