"""Which trajectories are trained on: the four filters of the paper (arXiv 2504.04736, section 3.2), as pure functions.

none                  every finished trajectory
process               every step is GOOD
outcome               the answer is right
process_and_outcome   both
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import get_args

from swirl_fast.config.schema import Filter
from swirl_fast.trajectory import Trajectory
from swirl_fast.verdict import Judgement, Verdict

# Why a trajectory is left out: the first that applies, in this order, so that the counts add up.
REASONS = {
    "unfinished": "not finished",
    "no_steps": "without a step",
    "bad_step": "with a BAD step",
    "unknown_step": "with an UNKNOWN and no BAD step",
    "no_answer": "without an answer",
    "wrong_answer": "with a wrong answer",
    "unknown_outcome": "with an answer that the outcome judge gave no verdict on",
    "over_limit": "over filter.max_trajectories",
}
REMEDIES = {
    "unfinished": "let collect run to its end",
    "no_steps": "collect again: the prompt fills the model's context",
    "bad_step": "collect more trajectories a question, or use filter.kind=none",
    "unknown_step": "run judge again: UNKNOWN steps are asked anew",
    "no_answer": "raise tasks.max_steps, or use filter.kind=process",
    "wrong_answer": "collect more trajectories a question or easier questions, or use filter.kind=process",
    "unknown_outcome": "run judge again: answers without a verdict are asked about anew, or use filter.outcome=exact",
    "over_limit": "raise filter.max_trajectories",
}


@dataclass(frozen=True)
class Selection:
    """kept: ids, in the order given. dropped: reason (key of REASONS) -> number, every reason present.

    `len(kept) + sum(dropped.values())` is the number of trajectories looked at.
    """

    kind: Filter
    kept: tuple[str, ...]
    dropped: dict[str, int]

    @property
    def total(self) -> int:
        return len(self.kept) + sum(self.dropped.values())

    @property
    def undecided(self) -> int:
        """Trajectories that a verdict is missing for."""
        return self.dropped["unknown_step"] + self.dropped["unknown_outcome"]

    def survivors(self) -> list[tuple[str, int]]:
        """Rows of the survivor table: what was asked, and how many trajectories are left after it."""
        rows, left = [("collected", self.total)], self.total
        for reason, count in self.dropped.items():
            if count:
                left -= count
                rows.append((f"without those {REASONS[reason]}", left))
        return rows

    def describe(self) -> str:
        """One line, e.g. `filter process kept 3 of 10 trajectories: 2 not finished, 5 with a BAD step`."""
        parts = ", ".join(f"{count} {REASONS[reason]}" for reason, count in self.dropped.items() if count)
        line = f"filter {self.kind} kept {len(self.kept)} of {self.total} trajectories"
        return f"{line}: {parts}" if parts else line

    def remedy(self) -> str:
        """What to do about the reason that took most."""
        if not self.total:
            return "collect trajectories first"
        return REMEDIES[max(self.dropped, key=lambda reason: self.dropped[reason])]


def keep(
    trajectories: Iterable[Trajectory],
    judgements: Mapping[str, Sequence[Judgement]],
    outcomes: Mapping[str, bool | None],
    kind: Filter,
    *,
    max_trajectories: int = 0,
    seed: int = 0,
) -> Selection:
    """Applies one of the four filters.

    judgements: trajectory id -> one judgement a step; looked at by `process` and `process_and_outcome`.
    outcomes: trajectory id -> is its answer right, None where the outcome judge is UNKNOWN; looked at by `outcome` and
    `process_and_outcome`, and only for trajectories that have an answer.
    max_trajectories: keep at most so many of those that passed (0: all), see `subset`.

    Raises ValueError for an unknown kind, an id that comes twice, and a judgement or outcome that is missing.
    """
    if kind not in get_args(Filter):
        raise ValueError(f"filter.kind is {kind!r}: use one of {', '.join(get_args(Filter))}")
    if max_trajectories < 0:
        raise ValueError(f"filter.max_trajectories is {max_trajectories}: use 0 for all, or a positive number")
    seen: set[str] = set()
    passed: dict[str, str] = {}  # trajectory id -> question id
    dropped: Counter[str] = Counter()
    for trajectory in trajectories:
        if trajectory.id in seen:
            raise ValueError(f"trajectory {trajectory.id!r} comes twice")
        seen.add(trajectory.id)
        reason = _reason(trajectory, judgements, outcomes, kind)
        if reason is None:
            passed[trajectory.id] = trajectory.question_id
        else:
            dropped[reason] += 1
    kept = subset(passed, max_trajectories, seed) if max_trajectories else tuple(passed)
    dropped["over_limit"] = len(passed) - len(kept)
    return Selection(kind, kept, {reason: dropped[reason] for reason in REASONS})


def judged_enough(
    selection: Selection, trajectories: Iterable[Trajectory], judgements: Mapping[str, Sequence[Judgement]]
) -> bool:
    """Whether that nothing passed is what the judges said, and not their silence.

    Of n trajectories that a judge ruled out none passed, so that at 95 % fewer than 3 in n do (the rule of three); of u without a verdict
    less than one is then expected to pass as long as u <= n / 3. One that is BAD for a malformed step counts on neither side: no judge
    is asked about it.
    """
    ruled_out = selection.dropped["wrong_answer"]
    if selection.kind in ("process", "process_and_outcome"):
        ruled_out += sum(
            any(
                judgement.verdict is Verdict.BAD and step.action.kind != "malformed"
                for step, judgement in zip(trajectory.steps, judgements[trajectory.id], strict=True)
            )
            for trajectory in trajectories
        )
    if selection.kind == "process_and_outcome":
        ruled_out += selection.dropped["no_answer"]  # all its steps were judged
    return 3 * selection.undecided <= ruled_out


def _reason(
    trajectory: Trajectory,
    judgements: Mapping[str, Sequence[Judgement]],
    outcomes: Mapping[str, bool | None],
    kind: Filter,
) -> str | None:
    """Why the trajectory is left out, None when it stays."""
    if trajectory.finish is None:
        return "unfinished"
    if not trajectory.steps:
        return "no_steps"
    if kind in ("process", "process_and_outcome"):
        verdicts = [judgement.verdict for judgement in judgements.get(trajectory.id, ())]
        if len(verdicts) != trajectory.num_steps:
            raise ValueError(
                f"trajectory {trajectory.id!r} has {trajectory.num_steps} steps and {len(verdicts)} judgements: "
                "judge it first"
            )
        if Verdict.BAD in verdicts:
            return "bad_step"
        if any(verdict is not Verdict.GOOD for verdict in verdicts):
            return "unknown_step"
    if kind in ("outcome", "process_and_outcome"):
        if trajectory.answer is None:
            return "no_answer"
        if trajectory.id not in outcomes:
            raise ValueError(f"trajectory {trajectory.id!r} has an answer and no outcome: score it first")
        if outcomes[trajectory.id] is None:
            return "unknown_outcome"
        if not outcomes[trajectory.id]:
            return "wrong_answer"
    return None


def subset(question_of: Mapping[str, str], limit: int, seed: int) -> tuple[str, ...]:
    """At most `limit` of the trajectories, in the order given; question_of: trajectory id -> question id.

    One trajectory of every question, then a second one of every question, and so on; the order of the questions, and of
    the trajectories of one question, is that of a hash with the seed. So no part of the data set is preferred, easy
    questions of which many trajectories passed do not crowd out the others, and a larger limit keeps all that a smaller
    one kept.
    """
    rounds: Counter[str] = Counter()
    turn: dict[str, tuple[int, bytes]] = {}  # trajectory id -> (round, place of its question in a round)
    for id_ in sorted(question_of, key=lambda id_: _hash(seed, "trajectory", id_)):
        question = question_of[id_]
        turn[id_] = (rounds[question], _hash(seed, "question", question))
        rounds[question] += 1
    chosen = set(sorted(turn, key=lambda id_: turn[id_])[:limit])
    return tuple(id_ for id_ in question_of if id_ in chosen)


def _hash(seed: int, what: str, id_: str) -> bytes:
    return hashlib.sha256(f"{seed}\0{what}\0{id_}".encode("utf-8", "surrogatepass")).digest()
