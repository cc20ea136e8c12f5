"""Trajectories to read, each with its verdicts and gold answers, and which of many to read."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from swirl_fast.data.store import Store
from swirl_fast.judges.cached import NOT_JUDGED, judged_trajectories
from swirl_fast.tasks import TEXT_ANSWERS
from swirl_fast.tasks.scoring import score_auto, score_number, score_text
from swirl_fast.tasks.task import Score
from swirl_fast.trajectory import Finish, Trajectory
from swirl_fast.verdict import Judgement, Verdict

NUMBERS = frozenset(
    {"reasoning_gym", "two_step", "gsm8k", "svamp"}
)  # tasks whose answers are numbers, as those of tasks.TEXT_ANSWERS are texts

FINISHES = {
    Finish.ANSWER: "answered",
    Finish.STEP_LIMIT: "step limit reached",
    Finish.CONTEXT_LIMIT: "context full",
    None: "not finished",
}
MATCHES = {True: "= gold", False: "≠ gold", None: "no answer"}


@dataclass(frozen=True)
class Reading:
    """judgements: one a step, None for a step the judge was not asked about. right: as the task scored the answer, None where no
    evaluation has written that down."""

    trajectory: Trajectory
    gold: tuple[str, ...]
    judgements: tuple[Judgement | None, ...]
    right: bool | None = None

    @property
    def matches(self) -> bool | None:
        """Whether the answer equals a gold answer; None without an answer or a gold one. Some tasks accept a rounded number, or score by a
        function of a user's own, which only they can tell: the score of an evaluation goes before the comparison here."""
        answer = self.trajectory.answer
        if answer is None:
            return None
        if self.right is not None:
            return self.right
        if not self.gold:
            return None
        return _comparison(self.trajectory.task)(answer, self.gold).exact_match == 1.0

    @property
    def match(self) -> str:
        """`matches` in words."""
        if self.matches is None and self.trajectory.answer is not None:
            return "no gold"
        return MATCHES[self.matches]

    @property
    def verdicts(self) -> list[str]:
        """The names of the steps' verdicts; `NONE` for a step that was not judged."""
        return [each.verdict.value if each else "NONE" for each in self.judgements]

    @property
    def good(self) -> str:
        """`2 of 3 GOOD`, as a share of the steps with a verdict."""
        known = [one for one in self.judgements if one is not None and one.verdict is not Verdict.UNKNOWN]
        if not known:
            return "no verdict"
        return f"{sum(one.verdict is Verdict.GOOD for one in known)} of {len(known)} GOOD"

    @property
    def kind(self) -> tuple[str, ...]:
        """What a sample should have some of each: the verdicts that occur, the match with gold, the finish."""
        return (*sorted(set(self.verdicts)), self.match, FINISHES[self.trajectory.finish])


def _comparison(task: str) -> Callable[[str | None, Sequence[str]], Score]:
    if task in TEXT_ANSWERS:
        return score_text
    return score_number if task in NUMBERS else score_auto


class Readings:
    """The trajectories of a store with their verdicts by `judge_id`, a batch of them at a time.

    judge_id: None for the judge with most verdicts there. scores: question id -> mean accuracy of its trajectories; 1 and 0 tell each of
    them.
    """

    def __init__(self, store: Store, judge_id: str | None, scores: Mapping[str, float] | None = None) -> None:
        self._store, self._judge_id = store, judge_id or store.main_judge()
        self._gold = {question.id: question.answers for question in store.questions()}
        self._scores = scores or {}

    def kinds(self) -> dict[str, tuple[str, ...]]:
        """Trajectory id -> `Reading.kind`, of all, in natural order."""
        shared: dict[tuple[str, ...], tuple[str, ...]] = {}  # few kinds, many trajectories
        return {
            reading.trajectory.id: shared.setdefault(reading.kind, reading.kind)
            for reading in self.of(self._store.ids())
        }

    def of(self, ids: Sequence[str]) -> Iterator[Reading]:
        """The trajectories with these ids, in this order."""
        for trajectory, judgements in judged_trajectories(self._store, self._judge_id, ids):
            shown = tuple(None if judgement is NOT_JUDGED else judgement for judgement in judgements)
            right = {1.0: True, 0.0: False}.get(self._scores.get(trajectory.question_id, 0.5))
            yield Reading(trajectory, self._gold[trajectory.question_id], shown, right)


def sample(kinds: Mapping[str, tuple[str, ...]], limit: int) -> set[str]:
    """At most `limit` of the ids: one of every kind in turn, so that rare kinds are seen; within a kind in the order
    of a hash, so that no question is preferred."""
    order: dict[tuple[str, ...], list[str]] = {}
    for id_ in sorted(kinds, key=lambda id_: hashlib.sha256(id_.encode("utf-8", "surrogatepass")).digest()):
        order.setdefault(kinds[id_], []).append(id_)
    turns = sorted((turn, kind, id_) for kind, ids in order.items() for turn, id_ in enumerate(ids))
    return {id_ for _, _, id_ in turns[:limit]}
