"""Asks a judge only about steps without a stored verdict, and stores every chunk of answers before the next question.

Trajectories are read and judged in batches: no more of a store is held than what is asked about next.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain, islice
from typing import TypeVar

from tqdm import tqdm

from swirl_fast.data.store import Store
from swirl_fast.judges.judge import GIVEN_UP, NO_REPLY, Judge, Refusal, judge_malformed
from swirl_fast.judges.self_consistency import by_vote, has_result, stored_id, votes, with_other_answers
from swirl_fast.trajectory import StepView, Trajectory
from swirl_fast.verdict import Judgement, Verdict

T = TypeVar("T")
CHUNK = 256  # judged between two writes
SILENT_CHUNK = 8  # so many prompts at a time without any reply from an endpoint are its fault, not theirs
NOT_JUDGED = Judgement(Verdict.UNKNOWN, "not judged yet: run the judge stage")


def judge_missing(
    store: Store,
    judge_id: str,
    asked: Iterable[tuple[str, T]],
    ask: Callable[[list[T]], Sequence[Judgement]],
    what: str,
) -> None:
    """asked: (content hash, a step or an answer), read as they are needed; each content is asked about once. ask: as Judge.judge.
    what: of error messages.

    A Refusal comes through when what was answered before it is written: those verdicts were paid for. Raises RuntimeError when an
    endpoint has stopped answering; verdicts until then are kept.
    """
    rest = iter(asked)
    waiting: dict[str, T] = {}
    answered_in_vain: set[str] = set()  # asked about in this call, and still without a verdict
    while pairs := dict(islice(rest, CHUNK)):
        keys = (key for key in store.missing(judge_id, pairs) if key not in answered_in_vain)
        waiting |= {key: pairs[key] for key in keys}
        while len(waiting) >= CHUNK:
            chunk = {key: waiting.pop(key) for key in list(waiting)[:CHUNK]}
            answered_in_vain |= _judge_chunk(store, judge_id, chunk, ask, what)
    if waiting:
        _judge_chunk(store, judge_id, waiting, ask, what)


def _judge_chunk(
    store: Store, judge_id: str, chunk: dict[str, T], ask: Callable[[list[T]], Sequence[Judgement]], what: str
) -> set[str]:
    """Returns the keys that got no verdict."""
    keys = list(chunk)
    before = store.verdicts(judge_id, keys)  # UNKNOWN: what got no reply another time may be the reason itself
    try:
        judgements: Sequence[Judgement | None] = ask(list(chunk.values()))
    except Refusal as error:
        _store_answers(store, judge_id, keys, error.answered)
        raise
    _store_answers(store, judge_id, keys, judgements)
    unknown = {
        key: judgement.reason
        for key, judgement in zip(keys, judgements, strict=True)
        if judgement is not None and judgement.verdict is Verdict.UNKNOWN
    }
    reasons = list(unknown.values())
    silent = len(reasons) == len(keys) and all(reason.startswith(NO_REPLY) for reason in reasons)
    if silent and sum(key not in before for key in keys) >= SILENT_CHUNK:
        raise RuntimeError(
            f"{what}: the judge {judge_id} replied to none of {len(keys)} prompts: {reasons[-1]}. Verdicts until then are kept; "
            "start it again when the endpoint at judge.model.url answers, or raise judge.model.timeout"
        )
    return set(unknown)


def _store_answers(store: Store, judge_id: str, keys: Sequence[str], judgements: Sequence[Judgement | None]) -> None:
    """Those that were asked about."""
    given = {key: judgement for key, judgement in zip(keys, judgements, strict=True) if judgement is not None}
    asked = {key: judgement for key, judgement in given.items() if not judgement.reason.startswith(GIVEN_UP)}
    store.add_verdicts(judge_id, asked)


def lacks_verdict(store: Store, judge_id: str, trajectory: Trajectory) -> bool:
    """Whether the judge would be asked about a step of it."""
    pairs = zip(trajectory.steps, trajectory.content_hashes(), strict=True)
    return bool(store.missing(stored_id(judge_id), [key for step, key in pairs if step.action.kind != "malformed"]))


def judge_steps(
    judge: Judge, store: Store, ids: Sequence[str], what: str, recorded: bool = False, shown: bool = True
) -> None:
    """Asks the judge about every well-formed step of these trajectories without a verdict, and keeps the answers chunk by chunk. recorded:
    whether each step counts as the recorded one of its state, as `Trajectory.views`. shown: whether a bar tells how far it is."""

    def steps() -> Iterator[tuple[str, StepView]]:
        with tqdm(desc=what, total=len(ids), unit="trajectory", disable=None if shown else True, leave=False) as bar:
            for trajectory in store.trajectories(ids):
                keys, views = trajectory.content_hashes(), trajectory.views(recorded)
                for step, key, view in zip(trajectory.steps, keys, views, strict=True):
                    if step.action.kind != "malformed":
                        yield key, view
                bar.update()

    judge_missing(store, stored_id(judge.id), steps(), judge.judge, what)


def judged_trajectories(
    store: Store, judge_id: str, ids: Sequence[str]
) -> Iterator[tuple[Trajectory, list[Judgement]]]:
    """Each of these trajectories, in order, with one judgement a step; NOT_JUDGED where the judge was not asked yet. Votes are counted
    here, over all trajectories of the store."""
    answers = store.answers() if votes(judge_id) else {}
    for read in store.batches(ids):
        batch = list(with_other_answers(read, answers))
        keys = [trajectory.content_hashes() for trajectory in batch]
        stored = store.verdicts(stored_id(judge_id), chain.from_iterable(keys))
        for trajectory, hashes in zip(batch, keys, strict=True):
            judgements = [
                judge_malformed(step.action) if step.action.kind == "malformed" else stored.get(key, NOT_JUDGED)
                for step, key in zip(trajectory.steps, hashes, strict=True)
            ]
            if votes(judge_id) and trajectory.answer is not None and judgements[-1] is not NOT_JUDGED:
                informed = any(has_result(step.action, step.observation) for step in trajectory.steps)
                vote = by_vote(
                    trajectory.answer, trajectory.other_answers, trajectory.question, informed, recorded=True
                )
                judgements[-1] = vote or judgements[-1]
            yield trajectory, judgements
