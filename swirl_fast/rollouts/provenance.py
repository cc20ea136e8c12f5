"""What the trajectories of a store were made with, so that others are never mixed with them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from swirl_fast.config import Config, ToolsConfig
from swirl_fast.config.contents import contents
from swirl_fast.engines.engine import Sampling
from swirl_fast.rendering import Message, Renderer, open_format, open_renderer
from swirl_fast.rollouts.collector import prompt_of
from swirl_fast.rollouts.logged import max_trajectory_tokens
from swirl_fast.tasks import ToolsByTask, offered_tools
from swirl_fast.tasks.conversations import Conversations
from swirl_fast.tasks.corpus import corpus_hash
from swirl_fast.tasks.task import Question, Task

PROBE = "Probe: how many of 1,234 naïve “tokens” are 56.78 % of {x}?\n"  # tokenizers split these differently


def fingerprint(config: Config, sampling: Sampling) -> dict[str, Any]:
    """What the trajectories of a store depend on, besides the prompt (`prompt_hash`); which questions, and how many, may change."""
    from swirl_fast.models.load import model_fingerprint

    tasks = contents(config.tasks, "tasks")
    for table in (tasks, *tasks["mix"]):
        for name in ("skip", "limit", "eval_limit", "max_solution_steps"):
            table.pop(name, None)
    search: dict[str, Any] = {"top_k": config.search.top_k, "passage_chars": config.search.passage_chars}
    if config.search.corpus:
        search["corpus"] = corpus_hash(config.search.corpus)
    if config.search.kind == "dense":
        from swirl_fast.tools.search.dense import folder_hash, model_folder

        search |= {name: getattr(config.search, name) for name in ("kind", "query_prefix", "passage_prefix", "index")}
        assert config.search.model, "refused by the check of the config"
        search["model"] = folder_hash(model_folder(config.search.model))
    return {
        "model": model_fingerprint(config.model),
        "chat_template": contents(config.model, "model")["chat_template"],
        "engine_dtype": config.engine.dtype,
        "tasks": tasks,
        "search": search,
        "sampling": asdict(sampling),
        "max_steps": config.tasks.max_steps,
        **_tool_limits(config.tools),
        **({"source": config.collect.source} if config.collect.source != "policy" else {}),
        "seed": config.run.seed,
    }


def _tool_limits(tools: ToolsConfig) -> dict[str, Any]:
    """What decides what a model is shown of a call, where it is not the default."""
    limits = {name: getattr(tools, name) for name in ("timeout", "result_chars")}
    return {f"tools.{name}": value for name, value in limits.items() if value != getattr(ToolsConfig(), name)}


def prompt_hash(renderer: Renderer, prompts: Sequence[Sequence[int]]) -> str:
    """Hex digest of the tokens that an observation and a probe question of each task become: of the chat template, the tokenizer, the
    wording of the instructions and the worked examples, none of which the settings name by their contents."""
    tokens = [*map(list, prompts), renderer.observation(PROBE, stopped=False)]
    return hashlib.sha256(json.dumps(tokens).encode()).hexdigest()[:16]


def _of_log(config: Config, task: Conversations) -> dict[str, Any]:
    """What trajectories that were written from a log depend on; how many of its conversations are used may grow."""
    from swirl_fast.models.load import model_fingerprint

    collect = contents(config.collect, "collect")
    renderer = open_renderer(config.model, dated=False)
    form = open_format(config.actions, config.model)
    probe: list[Message] = [{"role": "user", "content": PROBE}]
    tools = {name: [spec.identity for spec in specs] for name, specs in offered_tools(task).items()}
    return {
        "model": model_fingerprint(config.model),
        "chat_template": contents(config.model, "model")["chat_template"],
        "source": config.collect.source,
        "log": {name: collect[name] for name in ("path", "eval_path", "broken_lines")},
        "name": task.name,
        "tools": hashlib.sha256(json.dumps(tools).encode("utf-8", "surrogatepass")).hexdigest()[:16],
        "max_tokens": max_trajectory_tokens(config),
        "max_action_tokens": config.training.max_action_tokens,
        "prompt": prompt_hash(renderer, [renderer.prompt(probe)]),
        **({"actions": form.identity} if form.identity else {}),
    }


def provenance(config: Config, task: Task, offered: ToolsByTask, sampling: Sampling) -> dict[str, Any]:
    """The fingerprint of a collection or an evaluation, with a hash of what `prompt_of` makes of a probe; kept with
    `Store.check_meta`. offered: the tools, by the name of a question's task."""
    if isinstance(task, Conversations):
        return _of_log(config, task)
    renderer = open_renderer(config.model, dated=False)
    form = open_format(config.actions, config.model)
    prompt = prompt_of(config, task, renderer, offered, form)
    probes = [prompt(Question("probe", name, PROBE, ())) for name in offered]
    tools = {name: [spec.identity for spec in specs] for name, specs in offered.items()}
    found = fingerprint(config, sampling) | {"prompt": prompt_hash(renderer, probes), "tools": tools}
    return found | ({"actions": form.identity} if form.identity else {})
