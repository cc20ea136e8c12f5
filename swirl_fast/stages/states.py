"""filter.states=variance: the rewards of actions that the base model draws at the states of the kept trajectories, in runs/NAME/states.db.

They are stored a batch of trajectories at a time, under a hash of all that they depend on: a filter that was killed goes on where it was,
and one with another window draws nothing again. Seeds come from the trajectory, so what is drawn does not depend on what is there already.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from tqdm import tqdm

from swirl_fast.config import Config
from swirl_fast.config.contents import contents
from swirl_fast.data.filters import StateSelection, Window
from swirl_fast.data.store import Store
from swirl_fast.data.store_tables import REMEDY
from swirl_fast.files import canonical_json
from swirl_fast.judges import judge_id
from swirl_fast.judges.cached import SILENT_CHUNK
from swirl_fast.judges.judge import NO_REPLY
from swirl_fast.judges.self_consistency import with_other_answers
from swirl_fast.models.load import model_fingerprint
from swirl_fast.rendering import open_format, open_renderer
from swirl_fast.rollouts.at_states import asked_about, judge_sampled, sample_actions
from swirl_fast.seeds import seed_of
from swirl_fast.stages.build import built_engine, task_judge
from swirl_fast.tasks import offered_tools
from swirl_fast.tasks.task import Task
from swirl_fast.trajectory import Trajectory

STORE = "states.db"
Rewards = list[
    list[float | None]
]  # of the actions at each state of a trajectory; none where there is no room for an action


def select_states(config: Config, task: Task, store: Store, ids: Sequence[str]) -> StateSelection:
    """Which states of these trajectories are kept. Draws and judges the actions that are not stored yet."""
    settings = config.filter
    window = Window(settings.states_min_mean, settings.states_max_mean, settings.states_min_variance)
    return StateSelection.of(dict(_rewards(config, task, store, ids)), window)


def sampling_fingerprint(config: Config, task: Task) -> dict[str, Any]:
    """What the rewards depend on, besides the trajectories."""
    return {
        "model": model_fingerprint(config.model),
        "chat_template": contents(config.model, "model")["chat_template"],
        "engine_dtype": config.engine.dtype,
        "tools": {name: [spec.identity for spec in specs] for name, specs in offered_tools(task).items()},
        "judge": judge_id(config.judge, offered_tools(task), open_format(config.actions, config.model)),
        "group": config.filter.states_group,
        "max_action_tokens": config.training.max_action_tokens,
        "temperature": config.training.temperature,
        "seed": config.run.seed,
    }


def _rewards(config: Config, task: Task, store: Store, ids: Sequence[str]) -> Iterator[tuple[str, Rewards]]:
    """(id, rewards) of each trajectory, in order."""
    fingerprint = canonical_json(sampling_fingerprint(config, task))
    with contextlib.ExitStack() as stack:
        known_store = stack.enter_context(Store(config.folder / STORE))
        known = known_store.meta()
        draw: Callable[[Sequence[Trajectory]], tuple[list[Rewards], list[bool]]] | None = None
        bar = stack.enter_context(
            tqdm(desc="filter: states", total=len(ids), unit="trajectory", disable=None, leave=False)
        )
        answers = store.answers() if config.judge.self_consistency else {}
        for read in store.batches(ids):
            batch = list(with_other_answers(read, answers))
            keys = [_key(fingerprint, trajectory) for trajectory in batch]
            missing = [i for i, key in enumerate(keys) if key not in known]
            found = {
                i: _read(known_store, keys[i], known[keys[i]], one) for i, one in enumerate(batch) if keys[i] in known
            }
            if missing:
                draw = draw or _opened(config, task, stack)
                rewards, answered = draw([batch[i] for i in missing])
                found |= zip(missing, rewards, strict=True)
                # What a judge did not reply to is drawn and asked about again by the next filter.
                known_store.set_all_meta(
                    {keys[i]: found[i] for i, whole in zip(missing, answered, strict=True) if whole}
                )
            yield from ((trajectory.id, found[i]) for i, trajectory in enumerate(batch))
            bar.update(len(batch))


def _opened(
    config: Config, task: Task, stack: contextlib.ExitStack
) -> Callable[[Sequence[Trajectory]], tuple[list[Rewards], list[bool]]]:
    """Trajectories -> the rewards of each, and whether the judge replied to all that it was asked about it. Opens engine and judge."""
    judge = stack.enter_context(task_judge(config, task))
    engine = stack.enter_context(built_engine(config, None))
    renderer, tools = open_renderer(config.model), offered_tools(task)
    form = open_format(config.actions, config.model)
    training = replace(config.training, group_size=config.filter.states_group)

    def draw(batch: Sequence[Trajectory]) -> tuple[list[Rewards], list[bool]]:
        room = engine.max_context - training.max_action_tokens
        fits = [[step.start <= room for step in trajectory.steps] for trajectory in batch]
        seeds = [seed_of(config.run.seed, "states", trajectory.id) for trajectory in batch]
        sampled = sample_actions(batch, engine, renderer, tools, training, seeds, fits, form)
        judgements = judge_sampled(sampled, judge)
        asked = asked_about(sampled, judgements)
        if len(asked) >= SILENT_CHUNK and all(judgement.reason.startswith(NO_REPLY) for judgement in asked):
            raise RuntimeError(
                f"filter.states=variance: the judge {judge.id} replied to none of {len(asked)} prompts: {asked[-1].reason}. What was drawn "
                "before is kept; start filter again when the endpoint at judge.model.url answers"
            )
        rewards: list[Rewards] = [[[] for _ in trajectory.steps] for trajectory in batch]
        answered = [True] * len(batch)
        for sample, judgement in zip(sampled, judgements, strict=True):
            rewards[sample.trajectory][len(sample.view.history)].append(judgement.reward)
            answered[sample.trajectory] &= not judgement.reason.startswith(NO_REPLY)
        return rewards, answered

    return draw


def _key(fingerprint: str, trajectory: Trajectory) -> str:
    """Names what was drawn at the states of a trajectory: of the settings, its seed, and all that engine and judge read of it."""
    starts = [step.start for step in trajectory.steps]
    cut_off = [step.recorded is None for step in trajectory.steps]
    digest = hashlib.sha256(canonical_json([fingerprint, trajectory.id, starts, cut_off]).encode())
    digest.update(trajectory.content_hashes()[-1].encode() + trajectory.tokens.tobytes())
    if trajectory.other_answers:
        digest.update(canonical_json(trajectory.other_answers).encode("utf-8", "surrogatepass"))
    return f"rewards/{digest.hexdigest()[:32]}"


def _read(store: Store, key: str, value: Any, trajectory: Trajectory) -> Rewards:
    """Raises ValueError for what this module does not write."""
    if (
        not isinstance(value, list)
        or len(value) != trajectory.num_steps
        or not all(isinstance(state, list) for state in value)
        or not all(one is None or (type(one) in (int, float) and 0 <= one <= 1) for state in value for one in state)
    ):
        raise ValueError(f"{store.path}, table meta, key {key!r}: is not the rewards of {trajectory.id}: {REMEDY}")
    return value
