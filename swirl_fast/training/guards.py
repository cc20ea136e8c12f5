"""Safety stops: steps without an update are counted and end the run after a limit; a runaway KL warns."""

from __future__ import annotations

import math
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from swirl_fast.metrics import NOTHING_LEARNED
from swirl_fast.ranks import Ranks

ENOUGH_TO_TELL = 8  # judged actions without a single verdict: below that it may be the actions

SIGNALLESS = 3  # steps in a row without any signal: a batch or two may be so by chance


@dataclass
class GuardCounts:
    """Goes into checkpoints; skipped_steps and unknown_steps are metrics, too."""

    skipped_steps: int = 0  # loss or gradient was not finite
    unknown_steps: int = 0  # the judge gave no verdict
    in_a_row: int = 0  # of either kind, up to now
    unanswered: int = 0  # actions without a verdict in this row
    kl_high: bool = False  # in the step before
    signalless: int = 0  # steps in a row at whose states every advantage was 0, up to now
    steps_without_signal: int = 0  # all such steps


class Guards:
    """The counts are equal on all ranks. A step counts as done whether it was skipped or not: schedule and policy version go on."""

    def __init__(self, ranks: Ranks, limit: int, kl_limit: float, folder: Path) -> None:
        self._ranks, self._limit, self._kl_limit, self._folder = ranks, limit, kl_limit, folder
        self.counts = GuardCounts()
        self.skipped = False  # this step

    def begin(self) -> None:
        """Starts a step: nothing is skipped yet."""
        self.skipped = False

    def signal(self, step: int, states: float, without_signal: float) -> None:
        """Counts a step at none of whose states an action had an advantage. states, without_signal: of all ranks. SIGNALLESS of them in a
        row are warned about once, until a state has a signal."""
        counts = self.counts
        if not states:
            return
        silent = without_signal >= states
        counts.steps_without_signal += silent
        counts.signalless = counts.signalless + 1 if silent else 0
        if counts.signalless == SIGNALLESS:
            self._warn(
                f"training step {step}: for {SIGNALLESS} steps in a row all actions of a state have had the same reward, so there was "
                f"nothing to learn. {NOTHING_LEARNED}"
            )

    def end(self, step: int, kl: float) -> None:
        """Ends the `step`-th step. kl: mean a token; a high one is warned about once, until it is low again."""
        counts = self.counts
        if not self.skipped:
            counts.in_a_row = counts.unanswered = 0
        high = bool(self._kl_limit) and kl > self._kl_limit
        if high and not counts.kl_high:
            self._warn(
                f"training step {step}: the KL to the reference is {kl:.2f} nats a token, above training.kl_warning={self._kl_limit:g}; "
                "read some actions, and raise algorithm.kl_coef or lower training.learning_rate when they have gone wrong"
            )
        counts.kl_high = high

    def finite(self, step: int, loss: float, grad_norm: float) -> bool:
        """Whether to make an update. Collective. loss: this rank's share; grad_norm: over all ranks.

        Raises FloatingPointError when this was not so in `limit` steps in a row.
        """
        here = not (math.isfinite(loss) and math.isfinite(grad_norm))
        if not self._ranks.max(torch.tensor([float(here)])).item():
            return True
        self.counts.skipped_steps += 1
        what = f"training step {step}: the gradient norm is {grad_norm}" + (
            "" if math.isfinite(loss) else f" and the loss {loss}"
        )
        if self._skip():
            raise FloatingPointError(
                f"{what}, the last of {self.counts.in_a_row} steps in a row without an update (training.max_skipped_steps); lower "
                f"training.learning_rate, or compute in model.dtype=float32. The newest checkpoint in {self._folder} is intact"
            )
        self._warn(f"{what}: no update was made")
        return False

    def answered(self, step: int, asked: int, known: int, others: int, judge: str, reason: str) -> bool:
        """Whether there is something to learn from: False when the judge answered none of a step's well-formed actions, and there were
        enough to tell or no other ones. Collective. All numbers are this rank's; others: actions that it was not asked
        about; reason: why a verdict was not given.

        Raises ValueError when this was not so in `limit` steps in a row: a dead judge must not look like training.
        """
        asked, known, others = map(int, self._ranks.sum(torch.tensor([asked, known, others])).tolist())
        if known or not asked or (asked < ENOUGH_TO_TELL and others):
            return True
        self.counts.unknown_steps += 1
        self.counts.unanswered += asked
        what = (
            f"training step {step}: the judge {judge} gave no verdict on any of {asked} actions"
            + f" ({reason})" * bool(reason)
        )
        if self._skip() and self.counts.unanswered >= ENOUGH_TO_TELL:
            raise ValueError(
                f"{what}, the last of {self.counts.in_a_row} steps in a row without an update (training.max_skipped_steps). "
                "Start train again when it answers; it goes on from the newest checkpoint"
            )
        self._warn(f"{what}: no update was made")
        return False

    def state_dict(self) -> dict[str, Any]:
        return asdict(self.counts)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.counts = GuardCounts(**state)

    def _skip(self) -> bool:
        """Counts a step without an update. Returns whether the limit is reached."""
        self.skipped = True
        self.counts.in_a_row += 1
        return self.counts.in_a_row >= self._limit

    def _warn(self, text: str) -> None:
        if self._ranks.main:
            warnings.warn(text, stacklevel=3)
