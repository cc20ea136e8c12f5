"""Skipped steps, silent judges, a KL that runs away, and stops in order: each by itself here, in whole trainings in
tests/stages/test_faults.py."""

from __future__ import annotations

import math
import os
import signal
import time
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from swirl_fast.metrics import without_gradient
from swirl_fast.ranks import Ranks
from swirl_fast.training import interrupt
from swirl_fast.training.guards import Guards
from swirl_fast.training.interrupt import Interrupts

SAME = "all actions of a state have had the same reward"
REMEDIES = ("filter.states=variance", "training.refill=true", "other data", "algorithm.name=sft", "training.group_size")
ALONE = Ranks(0, 1, torch.device("cpu"))


class OneOfTwo(Ranks):
    """Rank 0 of 2; `others` is what rank 1 has in every reduction."""

    others: tuple[float, ...] = ()

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        return values + torch.tensor(self.others)

    def max(self, values: torch.Tensor) -> torch.Tensor:
        return torch.maximum(values, torch.tensor(self.others, dtype=values.dtype))


def beside(*others: float) -> Ranks:
    ranks = OneOfTwo(0, 2, torch.device("cpu"))
    object.__setattr__(ranks, "others", others)
    return ranks


def guards(ranks: Ranks = ALONE, limit: int = 3, kl_limit: float = 0.5) -> Guards:
    return Guards(ranks, limit, kl_limit, Path("runs/r/checkpoints"))


@pytest.mark.parametrize(("loss", "norm"), [(math.nan, 1.0), (math.inf, 1.0), (0.1, math.nan), (0.1, math.inf)])
def test_what_is_not_finite_is_skipped_and_counted(loss: float, norm: float) -> None:
    found = guards()
    assert found.finite(1, 0.1, 1.0) and not found.skipped
    with pytest.warns(UserWarning, match="training step 2: the gradient norm is"):
        assert not found.finite(2, loss, norm)
    found.end(2, 0.0)
    assert found.skipped and (found.counts.skipped_steps, found.counts.unknown_steps) == (1, 0)


def test_a_loss_that_is_not_finite_on_another_rank_skips_the_step_here() -> None:
    with pytest.warns(UserWarning):
        assert not guards(beside(1.0)).finite(1, 0.1, 1.0)
    assert guards(beside(0.0)).finite(1, 0.1, 1.0)


def test_the_limit_is_of_steps_in_a_row_of_either_kind_and_survives_a_checkpoint() -> None:
    def skip(found: Guards, step: int) -> None:
        found.begin()
        with pytest.warns(UserWarning):
            assert not found.finite(step, math.nan, 1.0)
        found.end(step, 0.0)

    found = guards()
    skip(found, 1)
    skip(found, 2)
    found.begin()
    assert found.finite(3, 0.1, 1.0)
    found.end(3, 0.0)
    skip(found, 4)
    found.begin()
    with pytest.warns(UserWarning):
        assert not found.answered(5, asked=8, known=0, others=0, judge="j", reason="")
    found.end(5, 0.0)
    resumed = guards()
    resumed.load_state_dict(found.state_dict())
    resumed.begin()
    with pytest.raises(FloatingPointError, match=r"step 6.*last of 3 steps in a row.*learning_rate.*float32.*intact"):
        resumed.finite(6, math.nan, math.nan)
    assert (resumed.counts.skipped_steps, resumed.counts.unknown_steps) == (4, 1)


@pytest.mark.parametrize(
    ("asked", "known", "malformed", "learn"),
    [
        (8, 0, 0, False),
        (8, 0, 5, False),  # enough to tell that the judge is dead; malformed actions do not ask it
        (7, 0, 5, True),  # it may be the actions, and the malformed ones are known to be bad
        (7, 0, 0, False),  # nothing known at all
        (0, 0, 5, True),
        (50, 1, 0, True),
    ],
)
def test_a_batch_without_verdicts_is_no_update(asked: int, known: int, malformed: int, learn: bool) -> None:
    found = guards()
    with warnings.catch_warnings():
        warnings.simplefilter("error" if learn else "ignore")
        assert found.answered(1, asked, known, malformed, "j", "") is learn
    assert found.counts.unknown_steps == (not learn)


def test_a_verdict_on_another_rank_is_a_verdict() -> None:
    assert guards(beside(9, 1, 0)).answered(1, asked=9, known=0, others=0, judge="j", reason="")


def test_a_silent_judge_stops_training_only_when_it_was_asked_often_enough() -> None:
    found = guards(limit=2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for step in (1, 2, 3):
            assert not found.answered(step, asked=2, known=0, others=0, judge="j", reason="timeout")
    with pytest.raises(
        ValueError, match=r"step 4: the judge j gave no verdict on any of 2 actions \(timeout\).*4 steps"
    ):
        found.answered(4, asked=2, known=0, others=0, judge="j", reason="timeout")


def test_a_kl_that_runs_away_warns_once_each_time() -> None:
    found, warned = guards(), {}
    for step, kl in enumerate([0.4, 0.6, 0.9, 0.4, 0.7, math.nan], 1):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            found.end(step, kl)
        if caught:
            warned[step] = str(caught[0].message)
    assert list(warned) == [2, 5] and "0.60 nats a token, above training.kl_warning=0.5" in warned[2]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        guards(kl_limit=0).end(1, 100.0)
        guards(Ranks(1, 2, torch.device("cpu"))).end(1, 100.0)  # rank 0 says it


@pytest.mark.parametrize("number", interrupt.SIGNALS)
def test_a_signal_is_noted_and_the_handlers_come_back(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with Interrupts(ALONE) as found:
        assert found.reason() == ""
        os.kill(os.getpid(), number)
        assert found.reason() == found.reason() == number.name
    assert signal.getsignal(number) is before


def test_a_signal_to_another_rank_stops_this_one() -> None:
    assert Interrupts(beside(float(signal.SIGUSR1), 0)).reason() == "SIGUSR1"
    assert Interrupts(beside(0, 1.0), minutes=5).reason() == "training.time_limit=5 minutes"


def test_the_time_limit_leaves_room_for_the_longest_recent_step_and_a_checkpoint(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(interrupt, "time", SimpleNamespace(monotonic=lambda: 1000.0))
    monkeypatch.setattr(interrupt, "_launched", lambda: 940.0)
    found = Interrupts(ALONE, minutes=2)  # a minute is left
    for seconds in (1000.0, 40.0, *[20.0] * 9):  # the first is no recent one
        found.measure(seconds)
    assert found.reason() == "" and found.reason(reserve=15) == ""
    assert found.reason(reserve=25) == "training.time_limit=2 minutes"
    found.measure(61.0)
    assert found.reason() != ""
    assert Interrupts(ALONE, minutes=0.5).reason() != "" and Interrupts(ALONE).reason(reserve=1e9) == ""


def test_time_is_counted_from_the_start_of_the_process_or_of_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    own = time.monotonic() - interrupt._launched()
    assert own > 0
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    assert time.monotonic() - interrupt._launched() > own  # the parent is older


def test_a_training_that_had_nothing_to_learn_from_says_so_in_words() -> None:
    def row(states: float, without: float, reward: float) -> dict[str, float]:
        return {"states": states, "states_without_signal": without, "reward": reward}

    said = without_gradient([row(5, 5, 0.0), row(4, 4, 0.5)])
    assert said.startswith("no step had a gradient from rewards: ") and "(0.25 on average)" in said
    assert "algorithm.name=sft, or a larger training.group_size" in said
    assert without_gradient([row(5, 5, 1.0), row(5, 5, 1.0), row(5, 4, 0.9)]).startswith("only 1 of 3 steps had a ")
    for rows in ([], [row(5, 5, 0.0), row(5, 4, 0.1)], [row(0, 0, float("nan"))], [{"step": 1}]):
        assert without_gradient(rows) == ""


def test_steps_without_a_signal_are_warned_about_once_in_a_row() -> None:
    found = guards()
    said = []
    for step, silent in enumerate([4, 4, 0, 4, 4, 4, 4, 4, 3, 4, 4, 4], start=1):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            found.signal(step, 4, silent)
            found.signal(step, 0, 0)  # a step without states, as a skipped one, says nothing
        said += [step for one in caught if SAME in str(one.message)]
        assert all(remedy in str(one.message) for one in caught for remedy in REMEDIES)
        again = guards()
        again.load_state_dict(found.state_dict())
        found = again
    assert said == [6, 12] and found.counts.steps_without_signal == 10
