"""Verdicts that are in the store already are not asked for again, and those that were given are kept whatever comes after them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

from tqdm import tqdm

from swirl_fast.data.store import Store
from swirl_fast.judges.judge import GIVEN_UP, NO_REPLY, Judge, Refusal, judge_malformed
from swirl_fast.trajectory import Trajectory
from swirl_fast.verdict import Judgement, Verdict

T = TypeVar("T")
CHUNK = 256  # judged between two writes
SILENT_CHUNK = 8  # so many prompts at a time without any reply from an endpoint are its fault, not theirs
NOT_JUDGED = Judgement(Verdict.UNKNOWN, "not judged yet: run the judge stage")


def judge_missing(
    store: Store, judge_id: str, asked: Mapping[str, T], ask: Callable[[list[T]], Sequence[Judgement]], what: str
) -> None:
    """asked: content hash -> a step, or an answer. ask: as Judge.judge. what: of the progress bar.

    A Refusal comes through when what was answered before it is written: those verdicts were paid for. Raises RuntimeError when an
    endpoint has stopped answering; verdicts until then are kept.
    """
    missing = store.missing(judge_id, asked)
    before = store.verdicts(judge_id, missing)  # UNKNOWN: what got no reply another time may be the reason itself
    with tqdm(desc=what, total=len(missing), unit="verdict", disable=None, leave=False) as bar:
        for at in range(0, len(missing), CHUNK):
            keys = missing[at : at + CHUNK]
            try:
                judgements: Sequence[Judgement | None] = ask([asked[key] for key in keys])
            except Refusal as error:
                _keep(store, judge_id, keys, error.answered)
                raise
            _keep(store, judge_id, keys, judgements)
            bar.update(len(keys))
            reasons = [one.reason for one in judgements if one is not None and one.verdict is Verdict.UNKNOWN]
            silent = len(reasons) == len(keys) and all(reason.startswith(NO_REPLY) for reason in reasons)
            if silent and sum(key not in before for key in keys) >= SILENT_CHUNK:
                raise RuntimeError(
                    f"{what}: the judge {judge_id} replied to none of {len(keys)} prompts: {reasons[-1]}. Verdicts until then are kept; "
                    "start it again when the endpoint at judge.model.url answers, or raise judge.model.timeout"
                )


def _keep(store: Store, judge_id: str, keys: Sequence[str], judgements: Sequence[Judgement | None]) -> None:
    """But for those that were not asked about."""
    given = {key: one for key, one in zip(keys, judgements, strict=True) if one is not None}
    store.add_verdicts(judge_id, {key: one for key, one in given.items() if not one.reason.startswith(GIVEN_UP)})


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
    judge_missing(store, judge.id, steps, judge.judge, what)
