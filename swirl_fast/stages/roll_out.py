"""Trajectories into a store, where they are missing: drawn from a model, for `collect` and `evaluate`, or written from worked
solutions or from the conversations of a log."""

from __future__ import annotations

from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from dataclasses import fields, replace
from itertools import islice

from tqdm import tqdm

from swirl_fast.config import Config, ConfigError
from swirl_fast.data.store import BATCH, Store
from swirl_fast.engines.engine import EngineStats, Sampling
from swirl_fast.ranks import Ranks
from swirl_fast.rendering import open_format, open_renderer
from swirl_fast.rollouts.collector import Collector, prompt_of, trajectory_ids
from swirl_fast.rollouts.demonstrations import demonstrations
from swirl_fast.rollouts.logged import log_writer
from swirl_fast.stages.build import built_engine, opened_tools
from swirl_fast.tasks import ToolsByTask, offered_tools
from swirl_fast.tasks.conversations import Conversations
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
    ranks: Ranks | None = None,
    elsewhere: AbstractSet[str] = frozenset(),
) -> list[str]:
    """Fills the store up to `count` trajectories a question. Returns the ids of those asked for, in the order of the questions.

    offered: the tools, by the name of a question's task; without any, the worked examples, which call tools, are left out of the prompt.
    what: of messages. ranks: those that call this together, each with its own questions and store. elsewhere: ids that are in
    another store.
    """
    store.add_questions(questions)
    wanted = [id_ for id_ in trajectory_ids(questions, count) if id_ not in elsewhere]
    finished = finished_ids(store, wanted)
    missing = len(finished) < len(wanted)
    if not any([missing] if ranks is None else ranks.gather(missing)):  # the engine takes all ranks or none
        return finished
    speaks = ranks is None or ranks.main
    renderer, form = open_renderer(config.model), open_format(config.actions, config.model)
    with opened_tools(config, task, offered) as tools, built_engine(config, weights, ranks) as engine:
        prompt = prompt_of(config, task, renderer, offered, form)
        collector = Collector(
            engine, renderer, tools, prompt, sampling, config.tasks.max_steps, config.collect.batch, seed, form=form
        )
        with tqdm(
            desc=what if ranks is None or ranks.size == 1 else f"{what}, rank 0 of {ranks.size}",
            total=len(wanted),
            initial=len(finished),
            unit="trajectory",
            disable=None if speaks else True,
            leave=False,
        ) as bar:

            def progress(trajectories: int, steps: int) -> None:
                bar.update(trajectories)

            collector.collect(store, questions, count, progress, elsewhere)
        stats = engine.stats()
    if ranks is not None:
        stats = _all_of(ranks.gather(stats))
    if speaks:
        _say(what, stats)
    return finished_ids(store, wanted)


def _all_of(found: Sequence[EngineStats]) -> EngineStats:
    """The sums of several engines that worked side by side, in the time of the slowest."""
    sums = EngineStats(**{each.name: sum(getattr(one, each.name) for one in found) for each in fields(EngineStats)})
    slowest = max(found, key=lambda one: one.prefill_seconds + one.decode_seconds)
    return replace(sums, prefill_seconds=slowest.prefill_seconds, decode_seconds=slowest.decode_seconds)


def _say(what: str, stats: EngineStats) -> None:
    seconds = max(stats.prefill_seconds + stats.decode_seconds, 1e-9)
    print(
        f"{what}: {stats.generated_tokens} tokens generated at {stats.generated_tokens / seconds:.0f} a second, "
        f"{stats.cached_tokens / max(stats.prompt_tokens, 1):.0%} of the prompt tokens came from the prefix cache "
        f"({stats.cached_tokens / max(stats.cacheable_tokens, 1):.0%} of what an ideal cache would give)"
    )


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


def write_conversations(config: Config, task: Conversations, store: Store) -> list[str]:
    """Fills the store from a log, and says what was left out or cut. Returns the ids of those that could be written. Raises ConfigError
    where there is none."""
    questions = task.questions("train")
    store.add_questions(questions)
    recorded = set(store.ids())
    ids = []
    writer = log_writer(config, offered_tools(task))
    with tqdm(desc="collect", total=len(questions), unit="conversation", disable=None, leave=False) as bar:
        written = writer.write(task.conversations("train"))
        while batch := list(islice(written, BATCH)):
            store.record(trajectory for trajectory in batch if trajectory.id not in recorded)
            ids += [trajectory.id for trajectory in batch]
            bar.update(len(batch))
    notes = [*task.notes, *writer.notes()]
    if not ids:
        raise ConfigError(f"collect.path={config.collect.path}: no conversation can be used; {'; '.join(notes)}")
    for note in notes:
        print(f"collect: {note}")
    return finished_ids(store, ids)
