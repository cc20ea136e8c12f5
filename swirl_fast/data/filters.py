"""Which trajectories are trained on: the four filters of the paper (arXiv 2504.04736, section 3.2), as pure functions.

none                  every finished trajectory
process               every step is GOOD
outcome               the answer is right
process_and_outcome   both

They decide on what is known of a trajectory (Candidate), so that a store of any size passes through in batches.

filter.states=variance then looks at the states of the trajectories that stay (`state_reason`; the pivots of arXiv 2603.21383).
"""

from __future__ import annotations

import hashlib
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import get_args

from swirl_fast.config.schema import Filter
from swirl_fast.trajectory import Trajectory
from swirl_fast.verdict import GOOD_FROM, Judgement, Verdict

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
    "no_state": "without a state that filter.states=variance keeps",
}
REMEDIES = {
    "unfinished": "let collect run to its end",
    "no_steps": "collect again: the prompt fills the model's context",
    "bad_step": "collect more trajectories a question, or use filter.kind=none, or filter.when_empty=none, which does so only where "
    "nothing would be left",
    "unknown_step": "run judge again: UNKNOWN steps are asked again; where a judge gives hardly any verdict, see what `judge` says, "
    "or use filter.kind=none",
    "no_answer": "raise tasks.max_steps, or use filter.kind=process",
    "wrong_answer": "collect more trajectories a question or easier questions, or use filter.kind=process",
    "unknown_outcome": "run judge again: answers without a verdict are asked about again, or use filter.outcome=exact",
    "over_limit": "raise filter.max_trajectories",
    "no_state": "the base model's rewards do not vary where they should: widen filter.states_min_mean and filter.states_max_mean, raise "
    "filter.states_group, or use data that are harder or easier for it, or filter.states=all",
}
# Why a state is left out: the first that applies, in this order.
STATE_REASONS = {
    "too_long": "with no room for an action of training.max_action_tokens in the context",
    "unknown": "with less than two known rewards",
    "equal": "with rewards that vary too little",
    "too_low": "with a mean reward below filter.states_min_mean",
    "too_high": "with a mean reward above filter.states_max_mean",
}


@dataclass(frozen=True, slots=True)
class Candidate:
    """What a filter has to know of a trajectory.

    verdicts: one a step. low: one of its steps has less than filter.min_reward. answered: it ends with an answer. right: is that answer
    right, None where nobody said. turned_down: a judge gave a well-formed step less than that; a malformed one is BAD without a judge.
    """

    id: str
    question_id: str
    task: str
    finished: bool
    verdicts: tuple[Verdict, ...]
    low: bool
    answered: bool
    right: bool | None
    turned_down: bool

    @classmethod
    def of(
        cls,
        trajectory: Trajectory,
        judgements: Sequence[Judgement],
        right: bool | None = None,
        min_reward: float = GOOD_FROM,
    ) -> Candidate:
        """judgements: one a step. right: is its answer right; None where the outcome judge is UNKNOWN. Raises ValueError for another
        number of judgements."""
        if len(judgements) != trajectory.num_steps:
            raise ValueError(
                f"trajectory {trajectory.id!r} has {trajectory.num_steps} steps and {len(judgements)} judgements: judge it first"
            )
        verdicts = tuple(judgement.verdict for judgement in judgements)
        low = [judgement.reward is not None and judgement.reward < min_reward for judgement in judgements]
        turned_down = any(
            below and step.action.kind != "malformed" for step, below in zip(trajectory.steps, low, strict=True)
        )
        finished, answered = trajectory.finish is not None, trajectory.answer is not None
        return cls(
            trajectory.id,
            trajectory.question_id,
            trajectory.task,
            finished,
            verdicts,
            any(low),
            answered,
            right,
            turned_down,
        )


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
        return _survivors("collected", self.total, self.dropped, REASONS)

    def describe(self) -> str:
        """One line, e.g. `filter process kept 3 of 10 trajectories: 2 not finished, 5 with a BAD step`."""
        return _described(
            f"filter {self.kind} kept {len(self.kept)} of {self.total} trajectories", self.dropped, REASONS
        )

    def remedy(self) -> str:
        """What to do about the reason that took most."""
        if not self.total:
            return "collect trajectories first"
        return REMEDIES[max(self.dropped, key=lambda reason: self.dropped[reason])]


def select(candidates: Iterable[Candidate], kind: Filter, *, max_trajectories: int = 0, seed: int = 0) -> Selection:
    """Applies one of the four filters.

    Verdicts are looked at by `process` and `process_and_outcome`, answers by `outcome` and `process_and_outcome`.
    max_trajectories: keep at most so many of those that passed (0: all), see `subset`.

    Raises ValueError for an unknown kind, a negative limit, and an id that comes twice.
    """
    if kind not in get_args(Filter):
        raise ValueError(f"filter.kind is {kind!r}: use one of {', '.join(get_args(Filter))}")
    if max_trajectories < 0:
        raise ValueError(f"filter.max_trajectories is {max_trajectories}: use 0 for all, or a positive number")
    seen: set[str] = set()
    passed: dict[str, str] = {}  # trajectory id -> question id
    dropped: Counter[str] = Counter()
    for candidate in candidates:
        if candidate.id in seen:
            raise ValueError(f"trajectory {candidate.id!r} comes twice")
        seen.add(candidate.id)
        reason = _reason(candidate, kind)
        if reason is None:
            passed[candidate.id] = candidate.question_id
        else:
            dropped[reason] += 1
    kept = subset(passed, max_trajectories, seed) if max_trajectories else tuple(passed)
    dropped["over_limit"] = len(passed) - len(kept)
    return Selection(kind, kept, {reason: dropped[reason] for reason in REASONS})


@dataclass(frozen=True)
class Window:
    """Which states filter.states=variance keeps, by the rewards of the actions drawn there: mean in [min_mean, max_mean], population
    variance above min_variance."""

    min_mean: float
    max_mean: float
    min_variance: float


def state_reason(rewards: Sequence[float | None], window: Window) -> str | None:
    """Why a state is left out (a key of STATE_REASONS), None when it is kept. rewards: of its actions, None where there is none; empty
    where no action could be drawn."""
    if not rewards:
        return "too_long"
    known = [reward for reward in rewards if reward is not None]
    if len(known) < 2:
        return "unknown"
    # exact for equal rewards, where a sum of squares leaves a rounding error
    if statistics.pvariance(known) <= window.min_variance:
        return "equal"
    mean = statistics.fmean(known)
    return "too_low" if mean < window.min_mean else "too_high" if mean > window.max_mean else None


@dataclass(frozen=True)
class StateSelection:
    """kept: trajectory id -> whether each of its states is. dropped: reason (key of STATE_REASONS) -> states, every reason present."""

    kept: dict[str, list[bool]]
    dropped: dict[str, int]

    @classmethod
    def of(cls, rewards: Mapping[str, Sequence[Sequence[float | None]]], window: Window) -> StateSelection:
        """rewards: trajectory id -> of each of its states, as `state_reason` takes them."""
        reasons = {id_: [state_reason(state, window) for state in states] for id_, states in rewards.items()}
        counts = Counter(reason for states in reasons.values() for reason in states)
        kept = {id_: [reason is None for reason in states] for id_, states in reasons.items()}
        return cls(kept, {reason: counts[reason] for reason in STATE_REASONS})

    @property
    def total(self) -> int:
        return sum(map(len, self.kept.values()))

    def survivors(self) -> list[tuple[str, int]]:
        """As `Selection.survivors`, of states."""
        return _survivors("of the kept trajectories", self.total, self.dropped, STATE_REASONS)

    def describe(self) -> str:
        kept = sum(map(sum, self.kept.values()))
        return _described(f"filter.states=variance kept {kept} of {self.total} states", self.dropped, STATE_REASONS)

    def applied(self, selection: Selection) -> Selection:
        """The selection without the trajectories that have no state left."""
        kept = tuple(id_ for id_ in selection.kept if any(self.kept[id_]))
        dropped = {**selection.dropped, "no_state": len(selection.kept) - len(kept)}
        return replace(selection, kept=kept, dropped=dropped)


def _survivors(first: str, total: int, dropped: Mapping[str, int], reasons: Mapping[str, str]) -> list[tuple[str, int]]:
    rows, left = [(first, total)], total
    for reason, count in dropped.items():
        if count:
            left -= count
            rows.append((f"without those {reasons[reason]}", left))
    return rows


def _described(line: str, dropped: Mapping[str, int], reasons: Mapping[str, str]) -> str:
    parts = ", ".join(f"{count} {reasons[reason]}" for reason, count in dropped.items() if count)
    return f"{line}: {parts}" if parts else line


def judged_enough(selection: Selection, candidates: Iterable[Candidate]) -> bool:
    """Whether an empty selection reflects the judge's verdicts rather than missing ones.

    Of n trajectories that a judge ruled out none passed, so that at 95 % fewer than 3 in n do (the rule of three); of u without a verdict
    less than one is then expected to pass as long as u <= n / 3. One that is BAD for a malformed step counts on neither side: no judge
    is asked about it.
    """
    ruled_out = selection.dropped["wrong_answer"]
    if selection.kind in ("process", "process_and_outcome"):
        ruled_out += sum(candidate.turned_down for candidate in candidates)
    if selection.kind == "process_and_outcome":
        ruled_out += selection.dropped["no_answer"]  # all its steps were judged
    return 3 * selection.undecided <= ruled_out


def _reason(candidate: Candidate, kind: Filter) -> str | None:
    """Why the trajectory is left out, None when it stays."""
    if not candidate.finished:
        return "unfinished"
    if not candidate.verdicts:
        return "no_steps"
    if kind in ("process", "process_and_outcome"):
        if candidate.low:
            return "bad_step"
        if Verdict.UNKNOWN in candidate.verdicts:
            return "unknown_step"
    if kind in ("outcome", "process_and_outcome"):
        if not candidate.answered:
            return "no_answer"
        if candidate.right is None:
            return "unknown_outcome"
        if not candidate.right:
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
