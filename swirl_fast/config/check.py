"""Which settings can work together: `check` raises ConfigError for those that are known to be impossible without loading anything.

The words and the range that a single setting accepts are declared with it, in schema.py. Here are the rules that join settings, look at
files, or ask for a form that words and ranges cannot say.
"""

from __future__ import annotations

import dataclasses
import operator
import re
from typing import TYPE_CHECKING, Any, NoReturn

from swirl_fast.config import references
from swirl_fast.config.error import ConfigError
from swirl_fast.config.fields import settings
from swirl_fast.config.read import check_each
from swirl_fast.config.rubric import read_rubric
from swirl_fast.config.shipped import ready
from swirl_fast.files import is_file, is_folder

if TYPE_CHECKING:
    from swirl_fast.config.schema import Config, TasksConfig

# Of shards that can be read, and of those that can be written.
SHARD_URLS = ("s3", "gs", "hf", "az", "abfs", "oci", "sftp", "file")
UPLOAD_URLS = ("s3", "gs", "az", "abfs", "oci", "sftp", "file")
HTTP = ("http://", "https://")
DATA_FILES = tuple(
    ".json .jsonl .jsonlines .ndjson .csv .tsv .parquet .arrow .feather .txt .gz .bz2 .xz .zst .lz4 .zip .tar .xls .xlsx .ods .yaml .yml "
    ".xml .pkl .db .sqlite".split()
)


PLAIN = "printable characters, no /, no dot at the beginning, at most 200 bytes"


def is_plain_name(name: str) -> bool:
    """Whether a run, an evaluation or an arm may be called so: it becomes the name of a file or a folder, with an ending."""
    return (
        bool(name) and "/" not in name and not name.startswith(".") and name.isprintable() and len(name.encode()) <= 200
    )


def looks_like_file(path: str) -> bool:
    """Whether a path is one of a file, and not the name of a Hugging Face data set, NAME or OWNER/NAME, or a folder that datasets loads."""
    nested = path.count("/") > 1 and not is_folder(path.partition(":")[0])
    return nested or path.startswith((".", "/", "~")) or path.lower().endswith(DATA_FILES)


def check(config: Config, files: bool = True) -> None:
    """Raises ConfigError for values that are known to be impossible without loading anything. files: also for missing files."""
    check_each(config)
    for key, urls in _urls(config):
        for url in urls:
            refuse_secrets(key, url)
            _check_address(key, url)
    values = _Values(config)
    _check_data(config, values)
    if files:
        _check_files(config, values)
    _check_lora(config, values)
    _check_engine(config, values)
    _check_stages(config, values)
    _check_conversations(config, values)
    _check_algorithm(config, values)
    _check_training(config, values)


def _urls(config: Config) -> list[tuple[str, list[str]]]:
    """(setting, addresses) of all that may name one."""
    model = config.judge.model
    return [
        ("judge.model.url", [model.url]),
        ("judge.model.replicas", model.replicas),
        ("engine.urls", config.engine.urls),
        ("training.shards", [config.training.shards]),
        ("filter.upload", [config.filter.upload]),
    ]


def refuse_secrets(key: str, url: str) -> None:
    """Raises ConfigError, which does not show it, for an address with a user name, a password or a query: settings are stored in the run's
    folder, shown in reports, and part of messages."""
    where = {
        "judge.model.url": "a key into the environment variable that judge.model.api_key_env names",
        "judge.model.replicas": "a key into the environment variable that judge.model.api_key_env names",
        "engine.urls": "a key into the environment variable that engine.api_key_env names",
    }.get(key, "credentials where the storage's own client looks for them, such as AWS_ACCESS_KEY_ID or its files")
    if re.match(r"\s*[A-Za-z][\w+.-]*:/*[^/?#]*@", url):
        raise ConfigError(
            f"{key}: the address has a user name or a password before the @, which would be stored with the run: leave them out, and put "
            f"{where}"
        )
    if re.match(r"\s*https?:[^?#]*[?#]", url, re.IGNORECASE):
        raise ConfigError(
            f"{key}: the address has a query or a fragment (? or #), to which no path can be added: leave it out, and put {where}"
        )


def _check_address(key: str, url: str) -> None:
    """Raises ConfigError for an address of HTTP that names no server."""
    if url.startswith(HTTP):
        from swirl_fast.http_client import wrong_address  # here, so that a config without servers needs no httpx

        if problem := wrong_address(url):
            raise ConfigError(f"{key}={url}: is not the address of a server, such as http://10.0.0.2:30000: {problem}")


class _Values:
    """The settings by their keys."""

    def __init__(self, config: Config) -> None:
        self._config = config

    def __getitem__(self, key: str) -> Any:
        return operator.attrgetter(key)(self._config)

    def fail(self, key: str, remedy: str) -> NoReturn:
        raise ConfigError(f"{key}={self[key]}: {remedy}")


def _check_data(config: Config, values: _Values) -> None:
    """run, tasks, search."""
    fail, search = values.fail, config.search
    if not is_plain_name(config.run.name):
        fail("run.name", f"must be a plain folder name: {PLAIN}")
    for prefix, tasks in task_configs(config):
        generated = tasks.kind in ("reasoning_gym", "two_step") or references.is_reference(tasks.kind)
        if not generated and not tasks.path:
            form = "with your questions" if tasks.kind == "qa" else "in its official format"
            raise ConfigError(
                f"{prefix}.path={tasks.path}: {prefix}.kind={tasks.kind} needs the path of a data file {form}"
            )
        if tasks.max_solution_steps and tasks.kind != "gsm8k":
            raise ConfigError(
                f"{prefix}.max_solution_steps={tasks.max_solution_steps}: only gsm8k's solutions mark their calculations; leave it "
                f"out with {prefix}.kind={tasks.kind}"
            )
        if len(set(tasks.tools)) < len(tasks.tools):
            raise ConfigError(f"{prefix}.tools={tasks.tools}: names a tool twice")
    if search.kind == "dense" and not search.model:
        fail("search.model", "search.kind=dense needs a sentence-transformers folder or a Hugging Face name")


def task_configs(config: Config) -> list[tuple[str, TasksConfig]]:
    """(where its settings are, settings) of each task: one, or those of tasks.mix on top of the settings around them."""
    if not config.tasks.mix:
        return [("tasks", config.tasks)]
    return [
        (f"tasks.mix[{i}]", dataclasses.replace(config.tasks, **{"mix": [], **entry}))
        for i, entry in enumerate(config.tasks.mix)
    ]


def _check_files(config: Config, values: _Values) -> None:
    for prefix, tasks in task_configs(config):
        for key in ("path", "eval_path", "worked_examples"):
            value = getattr(tasks, key)
            if value and (looks_like_file(value) or key == "worked_examples") and not is_file(value):
                raise ConfigError(f"{prefix}.{key}={value}: no such file")
    for key in ("collect.path", "collect.eval_path"):
        if values[key] and not is_file(values[key]):
            values.fail(key, "no such file")
    kind: type = type(config)
    for key, entry in settings(kind).items():
        if entry.reads == "reference":
            for name in values[key] if isinstance(values[key], list) else [values[key]]:
                if name.rpartition(":")[0].endswith(".py"):
                    references.identity(key, name, entry.known)
    if config.search.corpus and not (is_file(config.search.corpus) or is_folder(config.search.corpus)):
        values.fail("search.corpus", "no such file")
    read_rubric(config.judge.model.rubric)
    if config.model.chat_template and not is_file(config.model.chat_template):
        values.fail("model.chat_template", f"no such file; give the path of a Jinja template; {ready('template')}")
    model = config.search.model
    if model and model.startswith((".", "/", "~")) and not is_folder(model):
        values.fail("search.model", "no such folder")


def _check_lora(config: Config, values: _Values) -> None:
    lora = config.model.lora
    if lora.rank is None:
        for entry in dataclasses.fields(lora):
            if getattr(lora, entry.name) != getattr(type(lora)(), entry.name):
                values.fail(
                    f"model.lora.{entry.name}", "without model.lora.rank nothing has an adapter: set it, e.g. to 16"
                )
        return
    if lora.dropout:
        values.fail(
            "model.lora.dropout",
            "training computes what actions share once, and all of them would get the same inputs dropped: it would not be exact; use 0",
        )
    if config.training.reference_offload:
        values.fail(
            "training.reference_offload",
            "with model.lora.rank the reference is the policy with its adapters off, and takes no memory; leave it false",
        )


def _check_engine(config: Config, values: _Values) -> None:
    fail, engine = values.fail, config.engine
    for url in engine.urls:
        if not re.fullmatch(r"https?://[^/\s]+/?", url):
            fail("engine.urls", f"{url!r} is not the address of a server, such as http://10.0.0.2:30000")
    if len({url.rstrip("/") for url in engine.urls}) < len(engine.urls):
        fail("engine.urls", "names a server twice")
    launch = engine.launch
    if any(re.match(r"--(admin-)?api-key\b", flag) for flag in launch.flags):
        raise ConfigError(
            "engine.launch.flags: a key among the arguments would be stored with the run and seen by all users of the machine; put it into "
            f"the environment variable {engine.api_key_env} (engine.api_key_env)"
        )
    needed = launch.servers * launch.gpus_per_server
    if launch.gpus and len(set(launch.gpus)) < needed:
        fail(
            "engine.launch.gpus",
            f"{launch.servers} servers of {launch.gpus_per_server} devices need {needed} different ones",
        )
    if engine.share_gpu:
        _check_sharing(config, values)
    if engine.urls and engine.weight_sync.method == "tensor":
        # here, so that a config without servers needs no httpx
        from swirl_fast.http_client import is_loopback

        for url in engine.urls:
            if not is_loopback(url):
                fail(
                    "engine.weight_sync.method",
                    f"tensors are shared on one node only, and {url} is another; use disk or distributed",
                )


def _check_sharing(config: Config, values: _Values) -> None:
    """engine.share_gpu: what needs the engine beside the trainer, or a way of handing over weights that does not work on one GPU."""
    if config.engine.kind != "sglang":
        values.fail("engine.share_gpu", "only SGLang's servers can release their memory; set engine.kind=sglang")
    if config.training.lag:
        values.fail("training.lag", "engine.share_gpu=true leaves no memory to sample beside the training; use 0")
    sync = config.engine.weight_sync
    if sync.method == "distributed":
        values.fail(
            "engine.weight_sync.method",
            "nccl takes no two processes on one GPU, and engine.share_gpu=true has servers and trainer there; use tensor or disk",
        )
    if sync.method == "tensor" and not sync.snapshot:
        values.fail(
            "engine.weight_sync.snapshot",
            "with engine.share_gpu=true a server that dies without its weights is started again from the snapshot; set it to true",
        )


def _check_stages(config: Config, values: _Values) -> None:
    """collect, judge, filter, evaluate."""
    fail, collect, evaluate = values.fail, config.collect, config.evaluate
    if collect.temperature == 0 and collect.trajectories_per_question > 1 and collect.source == "policy":
        fail(
            "collect.temperature",
            f"greedy trajectories are all alike, and {collect.trajectories_per_question} a question are asked for; set it above 0",
        )
    if config.judge.self_consistency:
        if config.judge.kind in ("reference", "recorded_action"):
            fail(
                "judge.self_consistency",
                f"judge.kind={config.judge.kind} knows what is right without a vote; leave it out",
            )
        if (collect.source != "policy" or collect.trajectories_per_question < 3) and not config.training.shards:
            fail(
                "judge.self_consistency",
                "needs several trajectories of a question: collect.source=policy and collect.trajectories_per_question of 3 or more, "
                "such as 5; set it to false where there are none, as in an arm that imitates solutions",
            )
    if config.judge.model.scale == 1:
        fail("judge.model.scale", "must be 0, for GOOD or BAD, or the best grade of at least 2, such as 5")
    if config.judge.model.read == "logprobs" and config.judge.model.scale > 9:
        fail(
            "judge.model.scale",
            "judge.model.read=logprobs reads scores of one digit; use a scale up to 9, or read=text",
        )
    example = "the URL of an OpenAI-compatible endpoint, e.g. http://127.0.0.1:30000/v1"
    if config.judge.kind == "model" and not config.judge.model.url.startswith(HTTP):
        fail("judge.model.url", f"judge.kind=model needs {example}")
    for url in config.judge.model.replicas:
        if not url.startswith(HTTP):
            fail("judge.model.replicas", f"{url!r} is not {example}")
    urls = [url.rstrip("/") for url in (config.judge.model.url, *config.judge.model.replicas) if url]
    if len(set(urls)) < len(urls):
        fail("judge.model.replicas", "names an endpoint twice, or that of judge.model.url; name each once")
    for key in ("filter.outcome", "evaluate.outcome"):
        if values[key] == "judge" and not config.judge.model.url.startswith(HTTP):
            fail(key, f"needs judge.model.url, {example}")
    for key, schemes in (("filter.upload", UPLOAD_URLS), ("training.shards", SHARD_URLS)):
        scheme, separator, _ = values[key].partition(":/")
        if separator and scheme not in schemes:
            fail(key, f"must be a folder or a URL of the kind {', '.join(f'{name}://' for name in schemes)}")
    if (low := config.filter.states_min_mean) > (high := config.filter.states_max_mean):
        fail(
            "filter.states_min_mean", f"no mean reward is at least {low:g} and at most filter.states_max_mean={high:g}"
        )
    if config.filter.states == "variance" and config.algorithm.reward == "outcome":
        fail("filter.states", "algorithm.reward=outcome draws whole trajectories from the question on; use all")
    if evaluate.temperature == 0 and evaluate.samples > 1:
        fail("evaluate.samples", "greedy samples are all alike; set evaluate.temperature above 0")


def _check_conversations(config: Config, values: _Values) -> None:
    """collect.source=conversations: what needs tools that run, questions that can be asked, or gold answers is refused."""
    fail, collect = values.fail, config.collect
    if collect.source != "conversations":
        for key in ("collect.path", "collect.eval_path"):
            if values[key]:
                fail(
                    key,
                    "is read by collect.source=conversations; set that, or leave it out (a task's data are tasks.path)",
                )
        if config.evaluate.states:
            fail(
                "evaluate.states",
                "only collect.source=conversations has held-out states; leave it out, and questions are answered",
            )
        return
    if not collect.path:
        fail("collect.path", "collect.source=conversations needs the path of a log, such as logs.jsonl")
    if config.tasks.skip:
        fail("tasks.skip", "the conversations of a log are taken from the first on; leave it out")
    if config.tasks.mix:
        fail("tasks.mix", "collect.source=conversations has the log in the place of tasks; leave it out")
    without = "a log has neither tools that run nor gold answers"
    if config.algorithm.reward == "outcome":
        fail("algorithm.reward", f"{without}, so no fresh trajectory can be drawn or scored; use process")
    if "outcome" in config.filter.kind:
        fail("filter.kind", f"{without}; use process or none")
    if config.evaluate.outcome == "judge":
        fail("evaluate.outcome", f"{without}; leave it out")
    if not config.evaluate.use_tools:
        fail("evaluate.use_tools", "the conversations of a log name their tools themselves; leave it out")
    if config.judge.kind == "reference" or (config.judge.kind == "rules" and config.actions.format == "native"):
        fail(
            "judge.kind",
            "cannot judge the actions of a log; use recorded_action, which compares with the logged ones, model, or a function of your own",
        )


def _check_algorithm(config: Config, values: _Values) -> None:
    fail, algorithm, training = values.fail, config.algorithm, config.training
    if algorithm.importance_level == "action" and not algorithm.importance_cap:
        fail(
            "algorithm.importance_level",
            "without algorithm.importance_cap there are no importance weights: set it, e.g. to 2",
        )
    if algorithm.name == "sft" and algorithm.reward != "process":
        fail("algorithm.reward", "algorithm.name=sft imitates recorded actions and knows no reward; leave it out")
    if algorithm.name == "sft" and training.lag:
        fail("training.lag", "algorithm.name=sft samples nothing that could run beside the training; use 0")
    if algorithm.name != "ppo" and algorithm.updates_per_batch > 1:
        fail(
            "algorithm.updates_per_batch",
            f"{algorithm.name} has no clip against its own drift; use algorithm.name=ppo to reuse a batch",
        )
    if algorithm.name == "sft" and algorithm.importance_cap:
        # Of worked solutions the recorded log-probs are 0: every token would be scaled by its own probability.
        fail(
            "algorithm.importance_cap",
            "algorithm.name=sft imitates recorded actions as they are, there is no sampler to correct for; use 0",
        )
    if algorithm.name in ("rloo", "grpo", "ppo", "raft") and training.group_size < 2:
        fail(
            "training.group_size",
            f"algorithm.name={algorithm.name} compares the samples of one state: it needs at least 2 (or algorithm.name=reinforce)",
        )


def _check_training(config: Config, values: _Values) -> None:
    fail, training = values.fail, config.training
    if training.wandb and (re.search(r"[/\\#?%:]", training.wandb) or len(training.wandb) > 128):
        fail("training.wandb", "must be the name of a project: at most 128 characters, none of / \\ # ? % :")
    if training.keep_best and config.algorithm.name == "sft":
        fail(
            "training.keep_best",
            "algorithm.name=sft draws no actions, so nothing tells which checkpoint's are best; leave it empty",
        )
    if training.keep_best == "process_label" and config.algorithm.reward == "outcome":
        fail("training.keep_best", "algorithm.reward=outcome asks no process judge; use reward or malformed")
    if training.lag and not config.algorithm.importance_cap:
        fail(
            "training.lag",
            "actions drawn by an older policy need importance weights: set algorithm.importance_cap, e.g. to 2",
        )
    if training.lag and config.engine.kind == "local" and not config.engine.own_process:
        # Two threads of one process share its interpreter, and on a GPU its stream: stale actions, and hardly a second saved.
        fail(
            "training.lag",
            "engine.kind=local generates in the trainer's process, where little of it would run beside the training; set "
            "engine.own_process=true, or engine.kind=sglang",
        )
    if training.refill and (
        config.algorithm.name in ("sft", "raft", "reinforce") or config.algorithm.reward == "outcome"
    ):
        reason = {
            "sft": "algorithm.name=sft draws no actions",
            "raft": "algorithm.name=raft imitates the best of equal rewards, too",
            "reinforce": "algorithm.name=reinforce has no baseline, so equal rewards have a gradient, too",
        }.get(config.algorithm.name, "algorithm.reward=outcome draws whole trajectories, and no states")
        fail("training.refill", f"{reason}; leave it false")
    limit = training.shards_cache_limit
    if limit and not re.fullmatch(r"\d+(\.\d+)?(kb|mb|gb|tb)", limit.lower()):
        fail("training.shards_cache_limit", "must be a number with kb, mb, gb or tb, such as 10gb; empty for no limit")
    if training.replay_routing and (config.algorithm.name == "sft" or config.algorithm.reward == "outcome"):
        reason = (
            "imitates what no engine here has drawn" if config.algorithm.name == "sft" else "draws whole trajectories"
        )
        key = "name=sft" if config.algorithm.name == "sft" else "reward=outcome"
        fail("training.replay_routing", f"algorithm.{key} {reason}, without their routed experts; leave it false")
    if training.replay_routing and training.compile:
        fail(
            "training.compile",
            "training.replay_routing steps into the routers, which compiled layers do not allow; use false",
        )
    if training.offload_activations and training.activation_checkpointing == "none":
        fail(
            "training.offload_activations",
            "moves what checkpointed layers keep; set training.activation_checkpointing=full, or selective",
        )
    if training.liger and training.compile:
        fail("training.liger", "torch.compile fuses the same operations; set either training.liger or training.compile")
    if training.flash_attention and config.model.dtype != "bfloat16":
        fail("training.flash_attention", "flash-attn computes in half precision; set model.dtype=bfloat16")
    if training.reference_offload and config.algorithm.kl_coef == 0:
        fail("training.reference_offload", "algorithm.kl_coef=0 loads no reference model; leave it false")
