"""What a judge says of one action: a verdict to show and to store, and the reward that training learns from."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Self


class Verdict(str, Enum):
    GOOD = "GOOD"
    BAD = "BAD"
    UNKNOWN = "UNKNOWN"  # the judge failed or gave no verdict: never a reward, always counted


REWARDS = {Verdict.GOOD: 1.0, Verdict.BAD: 0.0, Verdict.UNKNOWN: None}
GOOD_FROM = 0.5  # a graded reward is shown as GOOD from here on


@dataclass(frozen=True)
class Judgement:
    """verdict: what is shown and counted. reward: in [0, 1], what training learns from; None exactly where the verdict is UNKNOWN.

    Without a reward of its own a verdict has that of REWARDS. A graded reward is shown as GOOD from 0.5 on and as BAD below (`graded`
    makes such a judgement). Raises ValueError for a reward outside [0, 1], NaN included, and for one that its verdict contradicts.
    """

    verdict: Verdict
    reason: str
    reward: float | None = None

    def __post_init__(self) -> None:
        if self.reward is None:
            object.__setattr__(self, "reward", REWARDS[self.verdict])
        elif self.verdict is not _verdict_of(self.reward):
            raise ValueError(
                f"reward {self.reward}: contradicts the verdict {self.verdict.value}; rewards from {GOOD_FROM} on are GOOD, lower ones "
                "BAD, and UNKNOWN has none"
            )

    @classmethod
    def graded(cls, reward: float, reason: str) -> Self:
        """A judgement by degrees, as an F1 score gives one."""
        return cls(_verdict_of(reward), reason, reward)


def _verdict_of(reward: float) -> Verdict:
    if not 0 <= reward <= 1:
        raise ValueError(f"reward {reward}: must be a number in [0, 1]; use the verdict UNKNOWN where there is none")
    return Verdict.GOOD if reward >= GOOD_FROM else Verdict.BAD


@dataclass(frozen=True)
class JudgeStats:
    """Tokens since the judge was made; 0 where none are read, or where the endpoint does not tell."""

    prompt_tokens: int = 0
    cached_tokens: int = 0  # of these, not computed again by the endpoint
