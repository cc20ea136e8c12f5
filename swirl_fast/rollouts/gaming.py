"""Signs of a policy that plays for the judge instead of the question: longer turns, padding outside the tag, repeated calls.

Sums over actions, so that ranks can add theirs; the same numbers for training and evaluation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from swirl_fast.formats.tags import Action, render
from swirl_fast.metrics import GAMING, summed, values
from swirl_fast.verdict import Verdict


@dataclass
class GamingSigns:
    """Sums over the actions that were observed."""

    observed: float = summed()
    observed_tokens: float = summed()
    cut_off: float = summed()
    repeated: float = summed()
    characters: float = summed()  # of well-formed actions
    outside: float = summed()  # of these, outside the tag
    good: float = summed()
    good_tokens: float = summed()
    bad: float = summed()
    bad_tokens: float = summed()

    def observe(self, text: str, action: Action, tokens: int, verdict: Verdict, earlier: Sequence[Action]) -> None:
        """One action, `tokens` long; earlier: the actions before it in its trajectory."""
        self.observed += 1
        self.observed_tokens += tokens
        self.cut_off += action.cut_off
        if action.kind != "malformed":
            self.characters += len(text)
            self.outside += max(0, len(text) - len(render(action)))
        if action.kind == "tool":
            self.repeated += any(_call(action) == _call(before) for before in earlier if before.kind == "tool")
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
    """The metrics of swirl_fast.metrics.GAMING; NaN where there is nothing to average. sums: the fields of a GamingSigns."""
    return values(GAMING, sums, {})
