"""What the trajectories of a store were made with, so that others are never mixed with them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from swirl_fast.config import Config
from swirl_fast.config.contents import contents
from swirl_fast.engines.engine import Sampling
from swirl_fast.rendering import Renderer, open_format, open_renderer
from swirl_fast.rollouts.collector import prompt_of
from swirl_fast.tasks import ToolsByTask
from swirl_fast.tasks.corpus import corpus_hash
from swirl_fast.tasks.task import Question, Task

PROBE = "Probe: how many of 1,234 naïve “tokens” are 56.78 % of {x}?\n"  # tokenizers split these differently


def fingerprint(config: Config, sampling: Sampling) -> dict[str, Any]:
    """What the trajectories of a store depend on, besides the prompt (`prompt_hash`); the number of questions may grow."""
    from swirl_fast.models.load import model_fingerprint

    tasks = contents(config.tasks, "tasks")
    for table in (tasks, *tasks["mix"]):
        for name in ("limit", "eval_limit"):
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
        **({"source": config.collect.source} if config.collect.source != "policy" else {}),
        "seed": config.run.seed,
    }


def prompt_hash(renderer: Renderer, prompts: Sequence[Sequence[int]]) -> str:
    """Hex digest of the tokens that an observation and a probe question of each task become: of the chat template, the tokenizer, the
    wording of the instructions and the worked examples, none of which the settings name by their contents."""
    tokens = [*map(list, prompts), renderer.observation(PROBE, stopped=False)]
    return hashlib.sha256(json.dumps(tokens).encode()).hexdigest()[:16]


def provenance(config: Config, task: Task, offered: ToolsByTask, sampling: Sampling) -> dict[str, Any]:
    """The fingerprint of a collection or an evaluation, with a hash of what `prompt_of` makes of a probe; kept with
    `Store.check_meta`. offered: the tools, by the name of a question's task."""
    renderer = open_renderer(config.model, dated=False)
    form = open_format(config.actions, config.model)
    prompt = prompt_of(config, task, renderer, offered, form)
    probes = [prompt(Question("probe", name, PROBE, ())) for name in offered]
    tools = {name: [spec.identity for spec in specs] for name, specs in offered.items()}
    found = fingerprint(config, sampling) | {"prompt": prompt_hash(renderer, probes), "tools": tools}
    return found | ({"actions": form.identity} if form.identity else {})
