"""Stage 1: trajectories of the training questions, in runs/NAME/trajectories.db."""

from __future__ import annotations

from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from dataclasses import asdict
from typing import Any

from swirl_fast.config import Config, ConfigError
from swirl_fast.data.store import Store
from swirl_fast.engines.engine import Sampling
from swirl_fast.ranks import Ranks, joined
from swirl_fast.rollouts.collector import trajectory_ids
from swirl_fast.rollouts.provenance import provenance
from swirl_fast.seeds import seed_of
from swirl_fast.stages.build import build_task, save_config
from swirl_fast.stages.parts import Parts, agree, main_store
from swirl_fast.stages.roll_out import finished_ids, roll_out, write_conversations, write_demonstrations
from swirl_fast.tasks import offered_tools, parts_of
from swirl_fast.tasks.conversations import Conversations
from swirl_fast.tasks.task import Question, Task

COLLECTION = "collection"  # key of the fingerprint in the store


def collect(config: Config) -> None:
    """Under torchrun, one call a rank: the questions are dealt over the ranks. What is written from solutions or a log is rank 0's work."""
    with joined() as ranks:
        task = build_task(config)
        questions, sampling, fingerprint = _collection(config, task)
        agree(ranks, {**asdict(config), COLLECTION: fingerprint})
        count = config.collect.trajectories_per_question
        parts = Parts(ranks, config.store, COLLECTION, fingerprint)
        with main_store(ranks, config.store) as store:
            if store is not None:
                store.check_meta(COLLECTION, fingerprint)
                store.add_questions(questions)
                # With a checkpoint there it is train's, which may refuse these settings.
                if not any((config.folder / "checkpoints").glob("step_*")):
                    save_config(config)
            order = trajectory_ids(questions, count)
            parts.gather(store, order)
            ids = []
            if config.collect.source == "policy" and not isinstance(task, Conversations):
                _draw(config, task, questions, sampling, ranks, parts, store)
                ids = finished_ids(store, order) if store is not None else []
            elif store is not None and isinstance(task, Conversations):
                ids = write_conversations(config, task, store)
            elif store is not None:
                ids = write_demonstrations(config, task, questions, store)
            if store is not None:
                steps, tokens = store.count(ids)
                for note in (note for part in parts_of(task).values() for note in part.notes):
                    print(f"collect: {note}")
                print(f"collect: {len(ids)} trajectories of {len(questions)} questions, {steps} steps, {tokens} tokens")
            ranks.meet()


def _draw(
    config: Config,
    task: Task,
    questions: Sequence[Question],
    sampling: Sampling,
    ranks: Ranks,
    parts: Parts,
    store: Store | None,
) -> None:
    """What is missing, from the policy. Whoever draws it, the random numbers of a trajectory come from the seed and its id."""
    count, seed = config.collect.trajectories_per_question, seed_of(config.run.seed, "collect")

    def fill(into: Store, mine: Sequence[Question], elsewhere: AbstractSet[str]) -> None:
        offered = offered_tools(task)
        roll_out(config, task, offered, mine, count, sampling, into, seed, "collect", ranks=ranks, elsewhere=elsewhere)

    parts.fill(store, questions, count, lambda one: one.finish is None, fill)


def check_collection(config: Config) -> None:
    """Raises what `collect` would raise for these settings, and writes nothing."""
    fingerprint = _collection(config, build_task(config))[-1]
    if not config.store.is_file():
        return
    try:
        store = Store(config.store, writable=False)
    except ValueError:  # empty, after a kill, or none of ours: collect says so
        return
    with store:
        if COLLECTION in store.meta():
            store.check_meta(COLLECTION, fingerprint)


def collected_ids(config: Config, task: Task, store: Store, what: str) -> list[str]:
    """The finished trajectories of the questions and the number a question that the config asks for; says so where some are missing.
    what: of the message."""
    wanted = trajectory_ids(task.questions("train"), config.collect.trajectories_per_question)
    finished = finished_ids(store, wanted)
    missing = set(wanted).difference(finished)
    if config.collect.source != "policy":  # questions without a solution that can be written down have no trajectory
        missing &= set(store.ids(finished=False))
    if missing:
        print(
            f"{what}: {len(missing)} of {len(missing) + len(finished)} trajectories are not collected yet, and are left out: run collect "
            "with the same settings to its end"
        )
    return finished


def _collection(config: Config, task: Task) -> tuple[Sequence[Question], Sampling, dict[str, Any]]:
    """The questions, how they are answered, and the fingerprint of the collection. Raises ConfigError without a question."""
    questions = task.questions("train")
    if not questions:
        raise ConfigError(f"tasks.path={config.tasks.path}: every row is also held out; give another tasks.eval_path")
    settings = config.collect
    sampling = Sampling(settings.max_action_tokens, settings.temperature, settings.top_p, settings.top_k)
    return questions, sampling, provenance(config, task, offered_tools(task), sampling)
