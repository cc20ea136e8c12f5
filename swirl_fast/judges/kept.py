"""Verdicts that are in the store already are not asked for again, and those that were given are kept whatever comes after them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

from tqdm import tqdm

from swirl_fast.judges.judge import NO_REPLY, Judge, Judgement, Refusal, Verdict, judge_malformed
from swirl_fast.store import Store
from swirl_fast.trajectory import StepView, Trajectory

T = TypeVar("T")
CHUNK = 256  # judged between two writes
SILENT_CHUNK = 8  # so many steps at a time without any reply from an endpoint are its fault, not theirs
NOT_JUDGED = Judgement(Verdict.UNKNOWN, "not judged yet: run the judge stage")


def judge_missing(
    store: Store,
    judge_id: str,
    asked: Mapping[str, T],
    ask: Callable[[list[T]], Sequence[Judgement]],
    done: Callable[[list[str], Sequence[Judgement]], object] = lambda keys, judgements: None,
) -> None:
    """asked: content hash -> a step, or an answer. ask: as Judge.judge. done: called with each chunk when it is written.

    A Refusal comes through when what was answered before it is written: those verdicts were paid for.
    """
    missing = store.missing(judge_id, asked)
    for at in range(0, len(missing), CHUNK):
        keys = missing[at : at + CHUNK]
        try:
            judgements = ask([asked[key] for key in keys])
        except Refusal as error:
            answered = zip(keys, error.answered, strict=True)
            store.add_verdicts(judge_id, {key: one for key, one in answered if one is not None})
            raise
        store.add_verdicts(judge_id, dict(zip(keys, judgements, strict=True)))
        done(keys, judgements)


def judgements_of(judge: Judge, store: Store, trajectories: Sequence[Trajectory]) -> dict[str, list[Judgement]]:
    """Trajectory id -> one judgement a step; NOT_JUDGED where the judge was not asked yet."""
    found: dict[str, list[Judgement]] = {}
    for trajectory in trajectories:
        hashes = [view.content_hash() for view in trajectory.views()]
        stored = store.verdicts(judge.id, hashes)
        found[trajectory.id] = [
            judge_malformed(step.action) if step.action.kind == "malformed" else stored.get(key, NOT_JUDGED)
            for step, key in zip(trajectory.steps, hashes, strict=True)
        ]
    return found


def judge_steps(judge: Judge, store: Store, trajectories: Sequence[Trajectory], what: str) -> None:
    """Asks the judge about every well-formed step without a verdict, and keeps the answers chunk by chunk."""
    steps = {
        view.content_hash(): view
        for trajectory in trajectories
        for view, step in zip(trajectory.views(), trajectory.steps, strict=True)
        if step.action.kind != "malformed"
    }
    judge_views(judge, store, steps, what)


def judge_views(judge: Judge, store: Store, steps: Mapping[str, StepView], what: str) -> None:
    """steps: content hash -> step. Raises RuntimeError when an endpoint has stopped answering; verdicts until then are kept."""
    missing = store.missing(judge.id, steps)
    # UNKNOWN: steps that got no reply another time may be the reason themselves
    before = store.verdicts(judge.id, missing)
    with tqdm(desc=what, total=len(missing), unit="step", disable=None, leave=False) as bar:

        def written(keys: list[str], judgements: Sequence[Judgement]) -> None:
            bar.update(len(keys))
            silent = all(one.verdict is Verdict.UNKNOWN and one.reason.startswith(NO_REPLY) for one in judgements)
            if silent and sum(key not in before for key in keys) >= SILENT_CHUNK:
                raise RuntimeError(
                    f"{what}: the judge {judge.id} replied to none of {len(keys)} steps: {judgements[-1].reason}. Verdicts until then are "
                    "kept; start it again when the endpoint at judge.model.url answers, or raise judge.model.timeout"
                )

        judge_missing(store, judge.id, steps, judge.judge, written)
