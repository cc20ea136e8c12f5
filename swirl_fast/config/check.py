"""Which values of the settings can work: `check` raises ConfigError for those that can be told impossible without loading anything.

What a setting means stands where it is declared, in config.py; what it accepts, and together with which others, stands here.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from swirl_fast.config.schema import Config

TASKS = ("reasoning_gym", "gsm8k", "hotpotqa", "musique", "2wikimultihopqa", "beerqa", "cofca")
ALGORITHMS = ("reinforce", "rloo", "grpo", "ppo", "sft")
REWARDS = ("process", "outcome")
WEIGHTINGS = ("state", "token", "trajectory")
SHARD_URLS = ("s3", "gs", "hf", "azure", "azure-dl", "oci", "sftp", "dbfs", "alipan", "file")  # that can be read
UPLOAD_URLS = ("s3", "gs", "azure", "azure-dl", "oci", "dbfs", "file")
CHECKPOINTING = ("none", "full", "selective")
KEEP_BEST = {
    "process_label": 1,
    "reward": 1,
    "malformed": -1,
}  # metrics that name a best checkpoint; -1: smaller is better
OUTCOMES = ("exact", "judge")
FILTERS = ("none", "process", "outcome", "process_and_outcome")
HTTP = ("http://", "https://")


class ConfigError(ValueError):
    """A setting that cannot work: names the key, the value and the remedy."""


def check(config: Config, files: bool = True) -> None:
    """Raises ConfigError for values that can be told impossible without loading anything. files: also for files that are not there."""
    values = _Values(config)
    _check_data(config, values)
    if files:
        _check_files(config, values)
    _check_engine(config, values)
    _check_stages(config, values)
    _check_algorithm(config, values)
    _check_training(config, values)


class _Values:
    """The settings by their keys, and what can be asked of them."""

    def __init__(self, config: Config) -> None:
        self._config = config

    def __getitem__(self, key: str) -> Any:
        return operator.attrgetter(key)(self._config)

    def fail(self, key: str, remedy: str) -> NoReturn:
        raise ConfigError(f"{key}={self[key]}: {remedy}")

    def one_of(self, key: str, accepted: Sequence[str]) -> None:
        if self[key] not in accepted:
            self.fail(key, f"must be one of {', '.join(accepted)}")

    def at_least(self, low: float, *keys: str) -> None:
        for key in keys:
            if not (self[key] >= low and math.isfinite(self[key])):
                self.fail(key, f"must be at least {low:g}")

    def above_zero(self, *keys: str) -> None:
        for key in keys:
            if not (self[key] > 0 and math.isfinite(self[key])):
                self.fail(key, "must be above 0")


def _check_data(config: Config, values: _Values) -> None:
    """run, model, tasks, search."""
    fail = values.fail
    if not config.run.name or "/" in config.run.name or config.run.name.startswith("."):
        fail("run.name", "must be a plain folder name")
    values.at_least(0, "run.seed")
    values.one_of("model.dtype", ("float32", "bfloat16"))
    values.one_of("tasks.kind", TASKS)
    if config.tasks.kind != "reasoning_gym" and not config.tasks.path:
        fail("tasks.path", f"tasks.kind={config.tasks.kind} needs the path of a data file in its official format")
    values.at_least(0, "tasks.limit", "tasks.eval_limit", "tasks.examples")
    s = config.search
    values.at_least(1, "search.top_k", "search.passage_chars", "search.batch")
    values.one_of("search.kind", ("bm25", "dense"))
    values.one_of("search.index", ("flat", "fp16", "hnsw"))
    if s.kind == "dense" and not s.model:
        fail("search.model", "search.kind=dense needs a sentence-transformers folder or a Hugging Face name")


def _check_files(config: Config, values: _Values) -> None:
    for key in ("tasks.path", "tasks.eval_path"):
        value = values[key]
        if value and (value.startswith((".", "/", "~")) or value.endswith((".json", ".jsonl"))):
            if not Path(value).expanduser().is_file():
                values.fail(key, "no such file")
    if config.model.chat_template and not Path(config.model.chat_template).expanduser().is_file():
        values.fail("model.chat_template", "no such file; give the path of a Jinja template")
    model = config.search.model
    if model and model.startswith((".", "/", "~")) and not Path(model).expanduser().is_dir():
        values.fail("search.model", "no such folder")


def _check_engine(config: Config, values: _Values) -> None:
    fail, engine = values.fail, config.engine
    values.one_of("engine.kind", ("local", "sglang"))
    values.at_least(0, "engine.threads", "engine.retries", "engine.max_restarts")
    values.at_least(1, "engine.launch.servers", "engine.launch.gpus_per_server")
    for key in (
        "engine.timeout",
        "engine.launch.startup_timeout",
        "engine.weight_sync.timeout",
        "engine.weight_sync.bucket_mb",
    ):
        if not values[key] > 0:  # endless is possible
            fail(key, "must be above 0")
    for url in engine.urls:
        if not re.fullmatch(r"https?://[^/\s]+/?", url):
            fail("engine.urls", f"{url!r} is no address of a server, such as http://10.0.0.2:30000")
    if len({url.rstrip("/") for url in engine.urls}) < len(engine.urls):
        fail("engine.urls", "names a server twice")
    launch, sync = engine.launch, engine.weight_sync
    if not 0 < launch.memory_fraction < 1:
        fail("engine.launch.memory_fraction", "must be in (0, 1)")
    if not 0 < launch.port < 65536:
        fail("engine.launch.port", "must be in [1, 65535]")
    needed = launch.servers * launch.gpus_per_server
    if launch.gpus and len(set(launch.gpus)) < needed:
        fail(
            "engine.launch.gpus",
            f"{launch.servers} servers of {launch.gpus_per_server} devices need {needed} different ones",
        )
    values.one_of("engine.weight_sync.method", ("disk", "tensor", "distributed"))
    if engine.urls and sync.method == "tensor":
        from swirl_fast.loopback import is_loopback  # here, so that a config without servers needs no httpx

        for url in engine.urls:
            if not is_loopback(url):
                fail(
                    "engine.weight_sync.method",
                    f"tensors are shared on one node only, and {url} is another; use disk or distributed",
                )
    values.one_of("engine.dtype", ("float32", "bfloat16"))
    values.at_least(1, "engine.max_sequences", "engine.cache_tokens")


def _check_stages(config: Config, values: _Values) -> None:
    """collect, judge, filter, evaluate."""
    fail, c, e = values.fail, config.collect, config.evaluate
    values.at_least(
        1, "collect.trajectories_per_question", "tasks.max_steps", "collect.max_action_tokens", "collect.batch"
    )
    values.at_least(0, "collect.temperature", "collect.top_k", "evaluate.temperature")
    if c.temperature == 0 and c.trajectories_per_question > 1:
        fail(
            "collect.temperature",
            f"greedy trajectories are all alike, and {c.trajectories_per_question} a question are asked for; set it above 0",
        )
    if not 0 < c.top_p <= 1:
        fail("collect.top_p", "must be in (0, 1]")
    values.one_of("collect.source", ("policy", "solutions"))
    values.one_of("judge.kind", ("rules", "model", "reference"))
    values.one_of("judge.rules.coverage", ("connected", "full"))
    example = "the URL of an OpenAI-compatible endpoint, e.g. http://127.0.0.1:30000/v1"
    if config.judge.kind == "model" and not config.judge.model.url.startswith(HTTP):
        fail("judge.model.url", f"judge.kind=model needs {example}")
    for key in ("filter.outcome", "evaluate.outcome"):
        values.one_of(key, OUTCOMES)
        if values[key] == "judge" and not config.judge.model.url.startswith(HTTP):
            fail(key, f"needs judge.model.url, {example}")
    values.at_least(1, "judge.model.max_tokens", "judge.model.concurrency")
    values.at_least(0, "judge.model.retries", "judge.model.temperature")
    values.above_zero("judge.model.timeout")
    values.one_of("filter.kind", FILTERS)
    values.one_of("filter.when_empty", ("error", "none"))
    values.at_least(0, "filter.max_trajectories")
    for key, schemes in (("filter.upload", UPLOAD_URLS), ("training.shards", SHARD_URLS)):
        scheme, separator, _ = values[key].partition(":/")
        if separator and scheme not in schemes:
            fail(key, f"must be a folder or a URL of the kind {', '.join(f'{one}://' for one in schemes)}")
    values.at_least(1, "evaluate.samples")
    values.at_least(0, "evaluate.max_action_tokens")
    if e.temperature == 0 and e.samples > 1:
        fail("evaluate.samples", "greedy samples are all alike; set evaluate.temperature above 0")


def _check_algorithm(config: Config, values: _Values) -> None:
    fail, a, t = values.fail, config.algorithm, config.training
    values.one_of("algorithm.name", ALGORITHMS)
    values.one_of("algorithm.reward", REWARDS)
    values.one_of("algorithm.weighting", WEIGHTINGS)
    values.at_least(0, "algorithm.kl_coef", "algorithm.clip_low", "algorithm.clip_high", "algorithm.importance_cap")
    values.one_of("algorithm.importance_level", ("token", "action"))
    if a.importance_level == "action" and not a.importance_cap:
        fail(
            "algorithm.importance_level",
            "without algorithm.importance_cap there are no importance weights: set it, e.g. to 2",
        )
    values.at_least(1, "algorithm.updates_per_batch")
    if a.clip_low >= 1:
        fail("algorithm.clip_low", "must be below 1: the ratio is clipped to [1 - clip_low, 1 + clip_high]")
    if a.name == "sft" and a.reward != "process":
        fail("algorithm.reward", "algorithm.name=sft imitates recorded actions and knows no reward; leave it out")
    if a.name == "sft" and t.lag:
        fail("training.lag", "algorithm.name=sft samples nothing that could run beside the training; use 0")
    if a.name in ("reinforce", "rloo", "grpo", "sft") and a.updates_per_batch > 1:
        fail(
            "algorithm.updates_per_batch",
            f"{a.name} has no clip against its own drift; use algorithm.name=ppo to reuse a batch",
        )
    if a.name == "sft" and a.importance_cap:
        # Of worked solutions the recorded log-probs are 0: every token would be scaled by its own probability.
        fail(
            "algorithm.importance_cap",
            "algorithm.name=sft imitates recorded actions as they are, there is no sampler to correct for; use 0",
        )
    if a.name in ("rloo", "grpo", "ppo") and t.group_size < 2:
        fail(
            "training.group_size",
            f"algorithm.name={a.name} compares the samples of one state: it needs at least 2 (or algorithm.name=reinforce)",
        )


def _check_training(config: Config, values: _Values) -> None:
    fail, t = values.fail, config.training
    values.at_least(
        0,
        "training.steps",
        "training.warmup_steps",
        "training.weight_decay",
        "training.max_path_tokens",
        "training.max_engine_gap",
        "training.time_limit",
        "training.kl_warning",
        "training.peak_tflops",
        "training.on_policy_batches",
        "training.shuffle_shards",
        "training.prefetch",
        "training.shard_size",
    )
    values.at_least(
        1,
        "training.trajectories_per_step",
        "training.group_size",
        "training.max_action_tokens",
        "training.token_budget",
        "training.checkpoint_every",
        "training.keep_checkpoints",
        "training.max_skipped_steps",
    )
    values.above_zero("training.temperature", "training.learning_rate", "training.clip_grad_norm")
    if t.wandb and (re.search(r"[/\\#?%:]", t.wandb) or len(t.wandb) > 128):
        fail("training.wandb", "must be the name of a project: at most 128 characters, none of / \\ # ? % :")
    if t.keep_best:
        values.one_of("training.keep_best", tuple(KEEP_BEST))
        if config.algorithm.name == "sft":
            fail(
                "training.keep_best",
                "algorithm.name=sft draws no actions, so nothing tells which checkpoint's are best; leave it empty",
            )
        if t.keep_best == "process_label" and config.algorithm.reward == "outcome":
            fail("training.keep_best", "algorithm.reward=outcome asks no process judge; use reward or malformed")
    if len(t.betas) != 2 or not all(0 <= beta < 1 for beta in t.betas):
        fail("training.betas", "must be two numbers in [0, 1)")
    values.one_of("training.schedule", ("constant", "cosine"))
    if t.lag not in (0, 1):
        fail("training.lag", "must be 0 or 1")
    if t.lag and not config.algorithm.importance_cap:
        fail(
            "training.lag",
            "actions drawn by an older policy need importance weights: set algorithm.importance_cap, e.g. to 2",
        )
    if t.lag and config.engine.kind == "local" and not config.engine.own_process:
        # Two threads of one process share its interpreter, and on a GPU its stream: stale actions, and hardly a second saved.
        fail(
            "training.lag",
            "engine.kind=local generates in the trainer's process, where little of it would run beside the training; set "
            "engine.own_process=true, or engine.kind=sglang",
        )
    values.one_of("training.bad_shards", ("stop", "skip"))
    if t.shards_cache_limit and not re.fullmatch(r"\d+(\.\d+)?(kb|mb|gb|tb)", t.shards_cache_limit.lower()):
        fail("training.shards_cache_limit", "must be a number with kb, mb, gb or tb, such as 10gb; empty for no limit")
    values.one_of("training.activation_checkpointing", CHECKPOINTING)
    if t.liger and t.compile:
        fail("training.liger", "torch.compile fuses the same operations; set either training.liger or training.compile")
    if t.flash_attention and config.model.dtype != "bfloat16":
        fail("training.flash_attention", "flash-attn computes in half precision; set model.dtype=bfloat16")
    if t.reference_offload and config.algorithm.kl_coef == 0:
        fail("training.reference_offload", "algorithm.kl_coef=0 loads no reference model; leave it false")
