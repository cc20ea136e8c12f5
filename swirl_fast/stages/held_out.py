"""Evaluation at states: fresh actions at the states of held-out conversations, judged as in training; no tool is called.

A fresh action is kept as a trajectory that takes the recorded actions up to its state, and then this one. An evaluation that was
interrupted goes on with the first conversation of which an action is missing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

from tqdm import tqdm

from swirl_fast.config import Config, ConfigError
from swirl_fast.data.store import Store
from swirl_fast.engines.engine import Engine, Sampling
from swirl_fast.judges.cached import NOT_JUDGED, judge_missing
from swirl_fast.judges.judge import Judge, is_for, judge_malformed
from swirl_fast.rollouts.at_states import SampledAction, sample_actions, state_view
from swirl_fast.rollouts.logged import LogWriter, log_writer
from swirl_fast.seeds import seed_of
from swirl_fast.stages.build import built_engine
from swirl_fast.stages.scores import EvaluationScores
from swirl_fast.tasks import offered_tools
from swirl_fast.tasks.conversations import Conversations
from swirl_fast.trajectory import Finish, Step, StepView, Trajectory

BATCH = 16  # conversations at a time
_OF_ANSWERS = ("accuracy", "accuracy_interval", "f1", "precision", "recall", "answered", "trajectories")


class StateScores(EvaluationScores):
    """Mean rewards of fresh actions, averaged within, then across conversations, which are the units of the intervals."""

    def summary(self, outcome_judge: bool = False) -> dict[str, Any]:
        """As for answers, without what only answers have. questions: conversations. states: fresh actions at their states. steps: fresh
        actions a conversation."""
        found = super().summary()
        actions = found["trajectories"]
        for table in (found, *found.get("by_task", {}).values()):
            for name in _OF_ANSWERS:
                table.pop(name, None)
        return found | {"states": actions, "steps": actions / max(found["questions"], 1)}

    def by_question(self) -> dict[str, dict[str, float | None]]:
        return {id_: {"process_label": row["process_label"]} for id_, row in super().by_question().items()}


def score_states(
    config: Config, task: Conversations, sampling: Sampling, judge: Judge, store: Store, what: str, weights: str | None
) -> StateScores:
    """Draws evaluate.samples actions at every held-out state, judges and scores them; what is in the store already is not done again.
    weights: a Hugging Face folder, None for model.path. what: of messages. Raises ConfigError where no held-out state fits."""
    questions, count = task.questions("eval"), config.evaluate.samples
    store.add_questions(questions)
    writer = log_writer(config, offered_tools(task), sampling.max_new_tokens)
    with tqdm(desc=what, total=len(questions), unit="conversation", disable=None, leave=False) as bar:
        for done in _sample(config, task, writer, sampling, store, weights):
            bar.update(done)
    notes = writer.notes()
    for note in notes:
        print(f"{what}: of the held-out ones, {note}")

    def written() -> Iterator[list[Trajectory]]:
        return _batches(
            log_writer(config, offered_tools(task), sampling.max_new_tokens).write(task.conversations("eval"))
        )

    judge_missing(store, judge.id, _to_judge(store, judge, written(), count), judge.judge, f"judge {what}")
    scores, actions = StateScores(task, questions, writer.form), 0
    for batch in written():
        fresh = list(_fresh(store, batch, count))
        stored = store.verdicts(judge.id, [key for _, key, _ in fresh])
        for trajectory, key, view in fresh:
            last = trajectory.steps[-1].action
            judgement = stored.get(key, NOT_JUDGED) if is_for(judge, view, last) else judge_malformed(last)
            scores.add(
                trajectory, [NOT_JUDGED] * (trajectory.num_steps - 1) + [judgement], first=trajectory.num_steps - 1
            )
            actions += 1
    if not actions:
        raise ConfigError(
            f"collect.path={config.collect.path}: no held-out conversation can be used; {'; '.join(notes)}"
        )
    return scores


def _batches(written: Iterable[Trajectory]) -> Iterator[list[Trajectory]]:
    rest = iter(written)
    while batch := list(islice(rest, BATCH)):
        yield batch


def _sample(
    config: Config, task: Conversations, writer: LogWriter, sampling: Sampling, store: Store, weights: str | None
) -> Iterator[int]:
    """Yields how many conversations are done. The engine starts where an action is missing."""
    count, seed, offered = config.evaluate.samples, seed_of(config.run.seed, "evaluate"), offered_tools(task)
    drawn = replace(
        config.training, group_size=count, max_action_tokens=sampling.max_new_tokens, temperature=sampling.temperature
    )
    finished = set(store.ids(finished=True))
    engine: Engine | None = None
    with contextlib.ExitStack() as stack:
        for batch in _batches(writer.write(task.conversations("eval"))):
            missing = [one for one in batch if not finished.issuperset(_ids(one, count))]
            if missing:
                engine = engine or stack.enter_context(built_engine(config, weights))
                seeds = [seed_of(seed, one.id) for one in missing]
                sampled = sample_actions(missing, engine, writer.renderer, offered, drawn, seeds, form=writer.form)
                store.record(one for one in _trajectories(missing, sampled, count) if one.id not in finished)
            yield len(batch)


def _ids(recorded: Trajectory, count: int) -> list[str]:
    return [f"{recorded.question_id}/{i}.{k}" for i in range(recorded.num_steps) for k in range(count)]


def _trajectories(recorded: Sequence[Trajectory], sampled: Sequence[SampledAction], count: int) -> Iterator[Trajectory]:
    """One for each fresh action, in order."""
    names = [(one, name, place // count) for one in recorded for place, name in enumerate(_ids(one, count))]
    for (one, name, i), action in zip(names, sampled, strict=True):
        state, completion = one.state(i), action.completion
        step = Step(
            start=len(state),
            end=len(state) + len(completion.tokens),
            text=action.view.action_text,
            action=action.action,
            logprobs=completion.logprobs,
            policy_version=completion.policy_version,
        )
        finish = Finish.ANSWER if action.action.kind == "answer" else Finish.STEP_LIMIT
        fresh = Trajectory(
            name, one.question_id, one.task, one.question, 0, one.prompt_length, state, [*one.steps[:i], step], finish
        )
        fresh.extend(completion.tokens)
        yield fresh


def _fresh(store: Store, recorded: Sequence[Trajectory], count: int) -> Iterator[tuple[Trajectory, str, StepView]]:
    """(trajectory, key of its verdict, what the judge sees) of each fresh action at the states of these conversations."""
    for one in recorded:
        for trajectory in store.trajectories(_ids(one, count)):
            view = replace(state_view(one, trajectory.num_steps - 1), action_text=trajectory.steps[-1].text)
            yield trajectory, view.content_hash(), view


def _to_judge(
    store: Store, judge: Judge, written: Iterable[list[Trajectory]], count: int
) -> Iterator[tuple[str, StepView]]:
    for batch in written:
        for trajectory, key, view in _fresh(store, batch, count):
            if is_for(judge, view, trajectory.steps[-1].action):
                yield key, view
