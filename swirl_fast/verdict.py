"""What a judge says of one action."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Verdict(str, Enum):
    GOOD = "GOOD"
    BAD = "BAD"
    UNKNOWN = "UNKNOWN"  # the judge failed or gave no verdict: never a reward, always counted


@dataclass(frozen=True)
class Judgement:
    verdict: Verdict
    reason: str


@dataclass(frozen=True)
class JudgeStats:
    """Tokens since the judge was made; 0 where none are read, or where the endpoint does not tell."""

    prompt_tokens: int = 0
    cached_tokens: int = 0  # of these, not computed again by the endpoint
