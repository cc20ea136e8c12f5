"""Signs of a policy that plays for the judge instead of the question: longer turns, padding outside the tag, repeated calls.

Sums over actions, so that ranks can add theirs; the same numbers for training and evaluation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from swirl_fast.formats.format import Action, Call, Format
from swirl_fast.formats.tags import TAGS
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
    outside: float = summed()  # of these, outside calls, answers and thoughts
    good: float = summed()
    good_tokens: float = summed()
    bad: float = summed()
    bad_tokens: float = summed()

    def observe(
        self, text: str, action: Action, tokens: int, verdict: Verdict, earlier: Sequence[Action], form: Format = TAGS
    ) -> None:
        """One action, `tokens` long; earlier: the actions before it in its trajectory. form: how they are written."""
        self.observed += 1
        self.observed_tokens += tokens
        self.cut_off += action.cut_off
        if action.kind != "malformed":
            self.characters += len(text)
            self.outside += form.outside(text, action)
        if action.kind == "tool":
            made = {_key(call) for before in earlier for call in before.calls}
            self.repeated += any(_key(call) in made for call in action.calls)
        if verdict is Verdict.GOOD:
            self.good += 1
            self.good_tokens += tokens
        elif verdict is Verdict.BAD:
            self.bad += 1
            self.bad_tokens += tokens


def _key(call: Call) -> tuple[str, str]:
    """White space aside."""
    return call.tool, "".join(call.argument.split())


def gaming_metrics(sums: Mapping[str, float]) -> dict[str, float]:
    """The metrics of swirl_fast.metrics.GAMING; NaN where there is nothing to average. sums: the fields of a GamingSigns."""
    return values(GAMING, sums, {})
