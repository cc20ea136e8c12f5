"""Signs of a policy that plays for the judge instead of the question: longer turns, padding outside the tag, repeated calls.

Sums over actions, so that ranks can add theirs; the same numbers for training and evaluation.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from swirl_fast.formats.tags import Action, render
from swirl_fast.verdict import Verdict


@dataclass
class GamingSigns:
    """Sums over the actions that were observed."""

    observed: float = 0.0
    observed_tokens: float = 0.0
    cut_off: float = 0.0
    repeated: float = 0.0
    characters: float = 0.0  # of well-formed actions
    outside: float = 0.0  # of these, outside the tag
    good: float = 0.0
    good_tokens: float = 0.0
    bad: float = 0.0
    bad_tokens: float = 0.0

    def observe(self, text: str, action: Action, tokens: int, verdict: Verdict, earlier: Sequence[Action]) -> None:
        """One action, `tokens` long; earlier: the actions before it in its trajectory."""
        self.observed += 1
        self.observed_tokens += tokens
        self.cut_off += action.cut_off
        if action.kind != "malformed":
            self.characters += len(text)
            self.outside += max(0, len(text) - len(render(action)))
        if action.kind == "tool":
            self.repeated += any(_call(action) == _call(one) for one in earlier if one.kind == "tool")
        if verdict is Verdict.GOOD:
            self.good += 1
            self.good_tokens += tokens
        elif verdict is Verdict.BAD:
            self.bad += 1
            self.bad_tokens += tokens


def _call(action: Action) -> tuple[str | None, str]:
    """White space aside."""
    return action.tool, "".join(action.argument.split())


def gaming_metrics(sums: Mapping[str, float]) -> dict[str, float]:
    """sums: the fields of a GamingSigns. NaN where there is nothing to average.

    action_length, action_length_good, action_length_bad: mean tokens of all, GOOD and BAD actions: a judge that is paid by length shows
    here. cut_off: share of the actions that hit the length limit. outside_tag: characters outside the tag, as a share of those of
    well-formed actions. repeated: calls made before in their trajectory, as a share of all actions.
    """

    def mean(part: str, whole: str) -> float:
        return sums[part] / sums[whole] if sums[whole] else math.nan

    return {
        "action_length": mean("observed_tokens", "observed"),
        "action_length_good": mean("good_tokens", "good"),
        "action_length_bad": mean("bad_tokens", "bad"),
        "cut_off": mean("cut_off", "observed"),
        "outside_tag": mean("outside", "characters"),
        "repeated": mean("repeated", "observed"),
    }
