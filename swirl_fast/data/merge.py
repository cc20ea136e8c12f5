"""One store out of several that were filled side by side: by content, so that merging twice, or after a kill, doubles nothing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice

from swirl_fast.data.store import BATCH, Store
from swirl_fast.trajectory import Trajectory
from swirl_fast.verdict import Judgement

VERDICTS = 1024  # written at a time


def merge(target: Store, parts: Sequence[Store], order: Sequence[str]) -> int:
    """Puts questions, trajectories and verdicts of the parts into `target`, the trajectories in the order of their ids in `order`, those
    that it does not name behind them. Returns how many trajectories were left out.

    Of several copies of a trajectory that is not finished in `target` the one that came furthest is taken. It is left out where
    `target` holds another beginning of it: what is there stays. Verdicts as in `Store.add_verdicts`. Raises ValueError as
    `Store.add_questions`.
    """
    for part in parts:
        target.add_questions(part.questions())
    dropped = 0
    known = set(target.ids())
    for copies in _copies(target, parts, order):
        recorded = {one.id: one for one in target.trajectories([one.id for one in copies if one.id in known])}
        target.record(one for one in copies if one.id not in known or _goes_on(one, recorded[one.id]))
        dropped += sum(
            not _goes_on(one, copy) and not _goes_on(copy, one) for copy in copies if (one := recorded.get(copy.id))
        )
    for part in parts:
        _add_verdicts(target, part)
    return dropped


def _copies(target: Store, parts: Sequence[Store], order: Sequence[str]) -> Iterator[list[Trajectory]]:
    """The furthest copy of every trajectory that `target` has not finished, BATCH at a time."""
    done = set(target.ids(finished=True))
    holders: dict[str, list[Store]] = {}
    for part in parts:
        for id_ in part.ids():
            if id_ not in done:
                holders.setdefault(id_, []).append(part)
    named = set(order)
    ids = [id_ for id_ in order if id_ in holders] + [id_ for id_ in holders if id_ not in named]
    for at in range(0, len(ids), BATCH):
        batch = ids[at : at + BATCH]
        found: dict[str, Trajectory] = {}
        for part in parts:
            for one in part.trajectories([id_ for id_ in batch if part in holders[id_]]):
                if one.id not in found or _reach(one) > _reach(found[one.id]):
                    found[one.id] = one
        yield [found[id_] for id_ in batch]


def _reach(trajectory: Trajectory) -> tuple[bool, int]:
    return trajectory.finish is not None, trajectory.num_steps


def _goes_on(one: Trajectory, recorded: Trajectory) -> bool:
    """Whether it is the recorded one or a continuation of it."""
    steps, size = recorded.num_steps, len(recorded.tokens)
    if one.num_steps < steps or one.tokens[:size].tolist() != recorded.tokens.tolist():
        return False
    texts = [[(step.start, step.end, step.text, step.observation) for step in t.steps[:steps]] for t in (one, recorded)]
    return texts[0] == texts[1] and (one.num_steps > steps or len(one.tokens) == size)


def _add_verdicts(target: Store, part: Store) -> None:
    rows = part.judged()
    while batch := list(islice(rows, VERDICTS)):
        by_judge: dict[str, dict[str, Judgement]] = {}
        for judge_id, key, judgement in batch:
            by_judge.setdefault(judge_id, {})[key] = judgement
        for judge_id, judgements in by_judge.items():
            target.add_verdicts(judge_id, judgements)
