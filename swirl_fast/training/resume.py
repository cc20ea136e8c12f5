"""What a training depends on: whether the recorded trajectories fit, and whether a checkpoint or a finished model was made with it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from swirl_fast.config import Config, ConfigError
from swirl_fast.config.contents import contents
from swirl_fast.data.shards import Manifest
from swirl_fast.files import describe_changes, read_json
from swirl_fast.judges import judge_id
from swirl_fast.models.load import model_fingerprint
from swirl_fast.rendering import open_format
from swirl_fast.rollouts.logged import max_trajectory_tokens
from swirl_fast.tasks import offered_tools
from swirl_fast.tasks.task import Task
from swirl_fast.training.checkpoint import newest_state

MARKER = "trained.json"
SHARDS = {
    "shards": None,
    "dtype": None,
}  # what else is in it, and is not known before the filter, or changes no training


def settings_of(config: Config, judge_id: str) -> dict[str, Any]:
    """What a checkpoint's further course depends on; what may change on resuming (its length, its saving and its guards) is left out."""
    training = asdict(config.training)
    if config.training.schedule == "constant":
        del training["steps"]  # a cosine depends on where it ends
    for name in (
        "checkpoint_every",
        "keep_checkpoints",
        "keep_best",
        "async_checkpoints",
        "export_dtype",
        "time_limit",
        "step_timeout",
        "max_skipped_steps",
        "kl_warning",
        "tensorboard",
        "wandb",
        "peak_tflops",
        "samples_mb",
        "token_budget",
        "logprob_workspace_mb",
        "sharing",
        "max_path_tokens",
        "activation_checkpointing",
        "offload_activations",
        "max_engine_gap",
        "check_model",
        "shards",  # the stream compares their contents
        "shards_cache",
        "shards_cache_limit",
        "bad_shards",  # which ones are skipped is in the stream's state
        "prefetch",
        "shard_size",
        "shard_accumulated_gradients",
        "compile",
        "liger",
        "flash_attention",
        "reference_offload",
    ):
        del training[name]
    if not training["replay_routing"]:  # a checkpoint from before there was such a thing goes on
        del training["replay_routing"]
    tasks = contents(config.tasks, "tasks")
    for name in ("skip", "max_solution_steps"):
        if not tasks[name]:  # as above
            del tasks[name]
    outcome: dict[str, Any] = {}
    if config.algorithm.reward == "outcome":  # what whole fresh trajectories depend on
        tools = {"timeout": config.tools.timeout, "result_chars": config.tools.result_chars}
        length = {"least of token_budget, max_path_tokens and the context": max_trajectory_tokens(config)}
        outcome = {"max_steps": config.tasks.max_steps, "search": asdict(config.search), "tasks": tasks}
        outcome |= {"tools": tools, "training": length}
    return {
        "model": model_settings(config),
        "engine_dtype": config.engine.dtype,
        "judge": judge_id,
        "algorithm": asdict(config.algorithm),
        **({"outcome": outcome} if outcome else {}),
        "training": training,
        "seed": config.run.seed,
    }


def model_settings(config: Config) -> dict[str, Any]:
    """What was trained, wherever it lies."""
    settings = contents(config.model, "model") | {"path": model_fingerprint(config.model)}
    if config.model.lora.rank is None:
        del settings["lora"]  # as in checkpoints that were written before there was any
    return settings


def check_state(folder: Path, state: Mapping[str, Any], settings: Mapping[str, Any], steps: int) -> None:
    """state: of a checkpoint in `folder`. settings, steps: of now. Raises ConfigError where it must not be gone on with."""
    recorded = state["settings"]
    if recorded != settings:
        judged = ""
        if recorded.get("judge") != settings["judge"]:
            judged = " (The judge's name says what it is made of: judge.*, hashes of a rubric, of tools and of code of your own.)"
        raise ConfigError(
            f"{folder} was trained with other settings: {describe_changes(recorded, settings)}. Go back to them, or use another "
            f"run.name{judged}"
        )
    if state["step"] > steps:
        raise ConfigError(
            f"training.steps={steps}: {folder} is at step {state['step']} already; ask for at least as many, or use another run.name"
        )


def check_newest(config: Config, make_task: Callable[[Config], Task]) -> None:
    """Raises ConfigError where training would not go on from the newest checkpoint of the run, for its settings: stages that take hours
    come before it. Whether the shards are still the same is seen later, and of a checkpoint that cannot be read training itself says so.

    make_task: called where there is a checkpoint."""
    folder, steps = config.folder / "checkpoints", config.training.steps
    if state := newest_state(folder):
        offered = offered_tools(make_task(config))
        settings = settings_of(config, judge_id(config.judge, offered, open_format(config.actions, config.model)))
        trained = read_json(config.folder / "model" / MARKER)
        same = isinstance(trained, dict) and {**trained, **SHARDS} == {"step": steps, **SHARDS, **settings}
        if not same:
            check_state(folder, state, settings, steps)


def check_budget(config: Config, manifest: Manifest, max_context: int) -> None:
    """Raises ConfigError, before any work, when the longest recorded state with a longest action, or for algorithm.name=sft with the
    recorded one, fits neither a micro-batch nor the longest path allowed nor the context."""
    training = config.training
    if config.algorithm.name == "sft":
        path = manifest.longest_path["tokens"]
        what = f"trajectory {manifest.longest_path['id']} has {path} tokens up to its last action"
        key = f"tasks.max_steps={config.tasks.max_steps}"
    else:
        longest = training.max_action_tokens
        path = manifest.longest_state["tokens"] + longest
        what = f"trajectory {manifest.longest_state['id']} has a state of {path - longest} tokens, and actions may have {longest}"
        key = f"training.max_action_tokens={longest}"
    if path - 1 > training.token_budget:  # an action's last token is not computed
        raise ConfigError(f"training.token_budget={training.token_budget}: {what}; set it to at least {path - 1}")
    if training.max_path_tokens and path > training.max_path_tokens:
        raise ConfigError(
            f"training.max_path_tokens={training.max_path_tokens}: {what}; set it to at least {path}, or to 0 for the model's context of "
            f"{max_context}"
        )
    if path > max_context:
        raise ConfigError(f"{key}: {what}; together this exceeds the model's context of {max_context}")
