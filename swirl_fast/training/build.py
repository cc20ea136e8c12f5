"""Config -> trainer -> trained model: loads, shards and wires what `trainer.Trainer` works with."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from swirl_fast.config import Config, ConfigError
from swirl_fast.data.shard_source import check_clients, open_shards
from swirl_fast.data.stream import TrajectoryStream
from swirl_fast.engines import load_engine
from swirl_fast.engines.engine import SharedEngine
from swirl_fast.files import describe_changes, read_json, write_json
from swirl_fast.formats.format import Format
from swirl_fast.judges import close_judge, judge_id, load_judge
from swirl_fast.judges.judge import Judge
from swirl_fast.judges.self_consistency import votes
from swirl_fast.models.check import compare, refuse_disagreement, refuse_untold_windows, stored_alike
from swirl_fast.models.exact import context_of, refuse_inexact
from swirl_fast.models.load import DTYPES, load_config, load_model, load_tokenizer, local_folder, resolve, stored_dtype
from swirl_fast.models.lora import (
    WithoutAdapters,
    adapted_layers,
    add_adapters,
    check_lora,
    frozen_in_compute_type,
    keep_frozen_in,
)
from swirl_fast.models.policy import DeviceComb, Policy
from swirl_fast.models.routing import Replay, about_experts, refuse_routing
from swirl_fast.models.rows import open_policy, packs_rows
from swirl_fast.ranks import Ranks
from swirl_fast.rendering import Renderer, open_format, open_renderer
from swirl_fast.rollouts.pipeline import RolloutPipeline
from swirl_fast.rollouts.whole import WholeRollouts
from swirl_fast.tasks import offered_tools, open_task, parts_of
from swirl_fast.tasks.corpus import passages_of
from swirl_fast.tasks.task import Task
from swirl_fast.tools import open_tools
from swirl_fast.training import fsdp, layers, sharded_weights
from swirl_fast.training.checkpoint import load_weights, named, recorded_state
from swirl_fast.training.export import export, export_adapter
from swirl_fast.training.memory import estimate
from swirl_fast.training.metrics_log import check_wandb
from swirl_fast.training.resume import MARKER, check_budget, model_settings, settings_of
from swirl_fast.training.trainer import Trainer
from swirl_fast.training.turns import lend
from swirl_fast.training.utilization import GIB


def check_machine(config: Config, ranks: Ranks) -> PreTrainedConfig:
    """The model's configuration, when nothing that this machine has speaks against the settings: ranks, GPUs, packages. Needs no shards.

    Raises ConfigError for settings that cannot be followed here, ImportError for a missing package, each with what to do.
    """
    training = config.training
    check_clients(training.shards)
    fsdp.check_sharding(training, ranks)
    check_wandb(training)
    model_config = load_config(config.model)
    layers.check_layers(training, model_config, ranks.device)
    refuse_inexact(model_config, training.sharing)
    check_lora(config.model, model_config)
    for key, wanted in (
        ("training.replay_routing", training.replay_routing),
        ("engine.return_routed_experts", config.engine.return_routed_experts),
    ):
        if wanted:
            refuse_routing(model_config, key)
            if not training.sharing and not packs_rows(model_config):
                raise ConfigError(
                    f"{key}=true: rows of model type {model_config.model_type} go through transformers' own layers, whose routing is not "
                    "replayed; leave it false"
                )
    if config.engine.share_gpu and ranks.device.type != "cuda":
        raise ConfigError("engine.share_gpu=true: this machine has no GPU that could be shared; leave it false")
    return model_config


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


def make_policy(config: Config, ranks: Ranks, frozen: bool = False, routed: bool = True) -> Policy:
    """The policy, or the frozen reference, ready to run on these ranks. Collective. routed: with what the settings ask of its routers.

    Under torchrun every rank reads only its own part of the weights, where the files allow it; rank 0 says so where they do not.
    """
    training = config.training
    compute = DTYPES[config.model.dtype]
    if not ranks.distributed:
        # FSDP gathers parameters in the compute type; one process casts them under autocast. Either way they are stored in float32.
        autocast = compute if compute != torch.float32 else None
        model = _with_adapters(load_model(config.model, "float32"), config)
        if frozen_in_compute_type(config.model, load_config(config.model)):
            keep_frozen_in(compute, model)
        policy = open_policy(model, training.temperature, autocast, training.sharing)
        weights = None
    else:
        # what is never stepped can be stored in the type in which it is gathered: the same numbers
        small = frozen or frozen_in_compute_type(config.model, load_config(config.model))
        dtype = config.model.dtype if small else "float32"
        model, weights, reason = None, None, ""
        try:
            model = sharded_weights.empty_model(config.model, dtype)
            weights = sharded_weights.find_weights(config.model, model)
        except sharded_weights.Unsharded as error:
            reason = str(error)
        if reasons := [text for text in ranks.gather(reason) if text]:
            if ranks.main:
                print(f"train: model.path={config.model.path}: {reasons[0]}; every rank loads the whole model first")
            model, weights = load_model(config.model, dtype), None
        policy = open_policy(_with_adapters(model, config), training.temperature, sharing=training.sharing)
    if frozen:
        policy.requires_grad_(False)
    elif routed and (training.replay_routing or config.engine.return_routed_experts):
        Replay(policy.model, training.replay_routing)
    policy.workspace_mb = training.logprob_workspace_mb
    layers.prepare(policy, training)
    offload = frozen and training.reference_offload
    fsdp.shard(policy, ranks, compute, training.shard_size, offload)
    if weights is not None:
        sharded_weights.fill(policy, weights, torch.device("cpu") if offload else ranks.device, config.run.seed)
    return policy


def make_reference(config: Config, ranks: Ranks, policy: Policy) -> Callable[[DeviceComb], Tensor] | None:
    """What the policy was before training; None where the loss has no KL term. Collective. With adapters it is the policy itself, with
    them off."""
    if config.algorithm.kl_coef == 0:
        return None
    if config.model.lora.rank is not None:
        return WithoutAdapters(policy)
    return make_policy(config, ranks, frozen=True)


def _with_adapters(model: PreTrainedModel, config: Config) -> PreTrainedModel:
    if config.model.lora.rank is not None:
        add_adapters(model, config.model.lora, config.run.seed)
    return model


def check_model(config: Config, ranks: Ranks, policy: Policy, longest_path: int) -> dict[str, float]:
    """The metrics of training.check_model; none where it is false, when only the windows of compiled layers are looked at.
    Collective: all ranks compute the same tree, so that a sharded policy is checked as it will be trained, with nothing held twice, and
    before reference and optimizer are there.

    longest_path: tokens of the longest path that there may be. Raises ConfigError for a model over which training would not be exact.
    """
    if not config.training.check_model:
        if config.training.compile and not policy.padded:
            refuse_untold_windows(policy, ranks.device, longest_path)
        return {}
    found = compare(policy, ranks.device, longest_path)
    in_float32 = not ranks.distributed and stored_alike(policy)
    computed_in = torch.float32 if in_float32 else DTYPES[config.model.dtype]
    gaps = ranks.max(torch.tensor([found.logprob_gap, found.gradient_gap], dtype=torch.float64)).tolist()
    found = replace(found, logprob_gap=gaps[0], gradient_gap=gaps[1])  # the same on all ranks, and so is what follows
    refuse_disagreement(found, policy.model.config.model_type, computed_in, policy.padded)
    return {"model_check_logprob": found.logprob_gap, "model_check_gradient": found.gradient_gap}


@dataclass
class Training:
    """A training whose settings are accepted; trainer: None when runs/NAME/model is there already."""

    config: Config
    ranks: Ranks
    trainer: Trainer | None
    tokenizer: PreTrainedTokenizerBase | None
    marker: dict[str, Any]

    def run(self) -> None:
        """Trains to `training.steps` and writes runs/NAME/model, a Hugging Face folder. Collective."""
        target, ranks = self.config.folder / "model", self.ranks
        if self.trainer is None:
            if ranks.main:
                print(f"train: {target} is trained to step {self.config.training.steps} already")
            return
        self.trainer.run()
        _export(self.config, target, self.trainer.policy, self.tokenizer, ranks)
        if ranks.main:
            write_json(target / MARKER, self.marker)
        ranks.barrier()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


@contextlib.contextmanager
def open_training(config: Config, ranks: Ranks) -> Iterator[Training]:
    """Loads all that a training needs and restores its newest checkpoint: when this has succeeded, nothing in the run's folder speaks
    against the settings. Nothing is loaded where the model is trained already. Collective.

    Raises ConfigError for settings that cannot work here, or that are not those of the checkpoint.
    """
    with contextlib.ExitStack() as stack:
        yield _open_training(config, ranks, stack)


def _open_training(config: Config, ranks: Ranks, stack: contextlib.ExitStack) -> Training:
    training = config.training
    model_config = check_machine(config, ranks)
    stream = open_stream(config, ranks)
    stack.callback(stream.close)
    task = open_task(config)
    tools_by_task = offered_tools(task)
    form = open_format(config.actions, config.model)
    settings = settings_of(config, judge_id(config.judge, tools_by_task, form))
    marker = {
        "step": training.steps,
        "shards": stream.manifest.content_hash,
        "dtype": training.export_dtype,
        **settings,
    }
    if read_json(config.folder / "model" / MARKER) == marker:
        return Training(config, ranks, None, None, marker)
    check_budget(config, stream.manifest, context_of(model_config))  # once more when an engine says what it can do
    judged = config.algorithm.name != "sft" and config.algorithm.reward == "process"
    if judged and config.judge.self_consistency and not votes(str(stream.manifest.fingerprint.get("judge"))):
        raise ConfigError(
            "judge.self_consistency=true: the shards hold no answers of other trajectories, for they were filtered without it; run filter "
            "again, with the same judge.* settings"
        )
    judge = load_judge(config.judge, tools_by_task, probe=judged, tasks=list(parts_of(task).values()), form=form)
    stack.callback(close_judge, judge)
    renderer = open_renderer(config.model)
    tokenizer = renderer.tokenizer
    rollouts = _open_rollouts(config, ranks, stream, task, judge, renderer, form, stack)
    context = rollouts.engine.max_context if rollouts.engine else context_of(model_config)
    check_budget(config, stream.manifest, context)
    if ranks.main:
        _say_what_to_expect(config, ranks, stream, model_config)
    policy = make_policy(config, ranks)
    if ranks.main and config.model.lora.rank is not None:
        _say_what_is_trained(config, policy)
    checked = check_model(config, ranks, policy, training.max_path_tokens or context)
    reference = make_reference(config, ranks, policy)
    trainer = Trainer(config, ranks, policy, reference, rollouts, settings, checked)
    stack.callback(trainer.close)
    trainer.restore()
    return Training(config, ranks, trainer, tokenizer, marker)


def _open_rollouts(
    config: Config,
    ranks: Ranks,
    stream: TrajectoryStream,
    task: Task,
    judge: Judge,
    renderer: Renderer,
    form: Format,
    stack: contextlib.ExitStack,
) -> RolloutPipeline:
    """What draws the actions and judges them. Raises ConfigError for shards that were collected with another tokenizer."""
    stop_ids = stream.manifest.stop_ids
    if stop_ids and not set(renderer.stop_ids) & set(stop_ids):
        raise ConfigError(
            f"model.path={config.model.path}: its turns end with token {renderer.stop_id}, but none of the recorded actions does; "
            "the shards were collected with another model's tokenizer"
        )
    engine = whole = None
    if config.algorithm.name != "sft":
        engine = load_engine(config, ranks.device, ranks=ranks)
        stack.callback(engine.close)
        if config.engine.share_gpu:
            lend(cast(SharedEngine, engine), ranks)  # the memory is for the trainer that is loaded next
        if config.algorithm.reward == "outcome":
            tools = {
                name: stack.enter_context(
                    open_tools(specs, config.tools, config.search, passages_of(config, parts_of(task)[name]))
                )
                for name, specs in offered_tools(task).items()
            }
            whole = WholeRollouts(config, task, tools, engine, renderer, form)
    rollouts = RolloutPipeline(config, ranks, engine, judge, renderer, offered_tools(task), stream, whole, form)
    stack.callback(rollouts.close)
    return rollouts


def _say_what_to_expect(config: Config, ranks: Ranks, stream: TrajectoryStream, model_config: PreTrainedConfig) -> None:
    count, wanted = stream.manifest.trajectories - stream.skipped_samples, config.training.trajectories_per_step
    if count < wanted:
        print(
            f"train: {count} trajectories passed the filter, fewer than training.trajectories_per_step={wanted}: every step repeats some, "
            "with fresh actions"
        )
    if said := about_experts(model_config, config):
        print(f"train: {said}")
    if ranks.device.type == "cuda":
        memory = torch.cuda.get_device_properties(ranks.device).total_memory / GIB
        needed = estimate(model_config, config, ranks.size if ranks.distributed else 0)
        print(f"train: the GPU has {memory:.1f} GiB; estimated need {needed}")


def _say_what_is_trained(config: Config, policy: Policy) -> None:
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in policy.parameters()]
    trained, total = sum(size for size, own in sizes if own), sum(size for size, _ in sizes)
    print(
        f"train: {trained:,} of {total:,} parameters are trained ({100 * trained / total:.2g} %): adapters of rank "
        f"{config.model.lora.rank} at {len(adapted_layers(policy))} linear layers"
    )


def _export(
    config: Config, target: Path, policy: Policy, tokenizer: PreTrainedTokenizerBase | None, ranks: Ranks
) -> None:
    source, wanted = local_folder(config.model), config.training.export_dtype
    dtype = stored_dtype(source) if wanted == "source" else getattr(torch, wanted)
    export(target, policy, tokenizer, ranks, dtype=dtype, source=source)


def export_checkpoint(config: Config, ranks: Ranks, name: str, target: Path, adapter: bool = False) -> None:
    """Writes the weights of `checkpoints/NAME` (best, step_000020) to `target`, a Hugging Face folder, or their adapters alone, a folder
    of peft's. Collective. Raises as `check_export` does."""
    source = check_export(config, name, target, adapter)
    policy = make_policy(config, ranks, routed=False)
    load_weights(source, policy)
    tokenizer, taken = load_tokenizer(config.model), source.resolve().name
    if not adapter:
        _export(config, target, policy, tokenizer, ranks)
        said = f"the weights of {taken}, to be evaluated with --of {target}"
    else:
        folder, wanted = local_folder(config.model), config.training.export_dtype
        dtype = torch.float32 if wanted == "source" else getattr(torch, wanted)  # as they are trained: they are small
        base = str(folder.absolute()) if Path(resolve(config.model.path)).is_dir() else config.model.path
        export_adapter(target, policy, config.model.lora, base, tokenizer, ranks, dtype, folder)
        said = f"the adapters of {taken}, to be loaded onto {base} by peft"
    if ranks.main:
        print(f"export: {target} holds {said}")


def check_export(config: Config, name: str, target: Path, adapter: bool = False) -> Path:
    """The folder of a checkpoint that `export_checkpoint` can write. Raises ConfigError when it is of another model or `target` is there
    already, ValueError when it is not there or damaged."""
    if adapter and config.model.lora.rank is None:
        raise ConfigError(
            "--adapter: without model.lora.rank all weights were trained, and there is no adapter; leave it out"
        )
    check_lora(config.model, load_config(config.model))
    if target.exists():
        raise ConfigError(f"{target} is already there; remove it, or name another folder with --out")
    source = named(config.folder / "checkpoints", name)
    recorded, wanted = recorded_state(source)["settings"]["model"], model_settings(config)
    if recorded != wanted:
        raise ConfigError(f"{source} was trained from another model: {describe_changes(recorded, wanted, 'model')}")
    return source
