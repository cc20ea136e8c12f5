"""Trajectories into a store, where they are missing: drawn from a model, for `collect` and `evaluate`, or written from worked solutions."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice

from tqdm import tqdm

from swirl_fast.config import Config
from swirl_fast.data.store import BATCH, Store
from swirl_fast.engines.engine import Sampling
from swirl_fast.rendering import open_format, open_renderer
from swirl_fast.rollouts.collector import Collector, prompt_of, trajectory_ids
from swirl_fast.rollouts.demonstrations import demonstrations
from swirl_fast.stages.build import built_engine, opened_tools
from swirl_fast.tasks import ToolsByTask, offered_tools
from swirl_fast.tasks.task import Question, Task


def finished_ids(store: Store, wanted: Sequence[str]) -> list[str]:
    """Those of the wanted trajectories that are finished, in the order wanted."""
    finished = set(store.ids(finished=True))
    return [id_ for id_ in wanted if id_ in finished]


def roll_out(
    config: Config,
    task: Task,
    offered: ToolsByTask,
    questions: Sequence[Question],
    count: int,
    sampling: Sampling,
    store: Store,
    seed: int,
    what: str,
    weights: str | None = None,
) -> list[str]:
    """Fills the store up to `count` trajectories a question. Returns the ids of those asked for, in the order of the questions.

    offered: the tools, by the name of a question's task; without any, the worked examples, which call tools, are left out of the prompt.
    what: of messages.
    """
    store.add_questions(questions)
    wanted = trajectory_ids(questions, count)
    finished = finished_ids(store, wanted)
    if len(finished) == len(wanted):
        return finished
    renderer, form = open_renderer(config.model), open_format(config.actions, config.model)
    with opened_tools(config, task, offered) as tools, built_engine(config, weights) as engine:
        prompt = prompt_of(config, task, renderer, offered, form)
        collector = Collector(
            engine, renderer, tools, prompt, sampling, config.tasks.max_steps, config.collect.batch, seed, form=form
        )
        with tqdm(
            desc=what, total=len(wanted), initial=len(finished), unit="trajectory", disable=None, leave=False
        ) as bar:
            collector.collect(store, questions, count, lambda trajectories, steps: bar.update(trajectories))
        stats = engine.stats()
    seconds = max(stats.prefill_seconds + stats.decode_seconds, 1e-9)
    print(
        f"{what}: {stats.generated_tokens} tokens generated at {stats.generated_tokens / seconds:.0f} a second, "
        f"{stats.cached_tokens / max(stats.prompt_tokens, 1):.0%} of the prompt tokens came from the prefix cache "
        f"({stats.cached_tokens / max(stats.cacheable_tokens, 1):.0%} of what an ideal cache would give)"
    )
    return finished_ids(store, wanted)


def write_demonstrations(config: Config, task: Task, questions: Sequence[Question], store: Store) -> list[str]:
    """Fills the store from worked solutions. Returns the ids of those that could be written."""
    store.add_questions(questions)
    renderer, form = open_renderer(config.model), open_format(config.actions, config.model)
    # Not again: a template that writes today's date gives them another prompt by now.
    recorded = set(store.ids())
    ids = []
    offered = offered_tools(task)
    with opened_tools(config, task, offered) as tools:
        prompt = prompt_of(config, task, renderer, offered, form)
        written = demonstrations(task, questions, tools, renderer, prompt, config.tasks.max_steps, form)
        while batch := list(islice(written, BATCH)):
            store.record(trajectory for trajectory in batch if trajectory.id not in recorded)
            ids += [trajectory.id for trajectory in batch]
    return finished_ids(store, ids)
