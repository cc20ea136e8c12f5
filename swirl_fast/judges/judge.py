"""The protocol of a process judge, and its verdicts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

from swirl_fast.actions import Action
from swirl_fast.config import ConfigError
from swirl_fast.trajectory import StepView


class Verdict(str, Enum):
    GOOD = "GOOD"
    BAD = "BAD"
    UNKNOWN = "UNKNOWN"  # the judge failed or gave no verdict: never a reward, always counted


@dataclass(frozen=True)
class Judgement:
    verdict: Verdict
    reason: str


NO_REPLY = "no reply"  # how the reason of an UNKNOWN begins when an endpoint did not answer
GIVEN_UP = "no reply: given up"  # and when it was not asked, or not as often as it should have been


@dataclass(frozen=True)
class JudgeStats:
    """Tokens since the judge was made; 0 where none are read, or where the endpoint does not tell."""

    prompt_tokens: int = 0
    cached_tokens: int = 0  # of these, not computed again by the endpoint


class Refusal(ConfigError):
    """The judge's endpoint refuses to go on, as when a key is withdrawn. answered: one a step, in order; None where there is no verdict."""

    def __init__(self, message: str, answered: Sequence[Judgement | None] = ()) -> None:
        super().__init__(message)
        self.answered = list(answered)


class Judge(Protocol):
    id: str  # names the judge and the version of its prompt or rules; verdicts are cached under it

    def stats(self) -> JudgeStats: ...

    def judge(self, steps: Sequence[StepView]) -> list[Judgement]:
        """One judgement a step, in order. Never raises for what a step contains; a judge that cannot answer says UNKNOWN."""
        ...


def judge_malformed(action: Action) -> Judgement:
    return Judgement(Verdict.BAD, f"malformed: {action.error}")


def judge_actions(judge: Judge, views: Sequence[StepView], actions: Sequence[Action]) -> list[Judgement]:
    """One judgement an action. A malformed action is BAD by the environment's own rule (it did nothing); the judge sees the rest."""
    judgements = {i: judge_malformed(action) for i, action in enumerate(actions) if action.kind == "malformed"}
    rest = [i for i in range(len(views)) if i not in judgements]
    judgements.update(zip(rest, judge.judge([views[i] for i in rest]), strict=True))
    return [judgements[i] for i in range(len(views))]
