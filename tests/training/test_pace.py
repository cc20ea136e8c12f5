"""What is said of the time that a training still takes, with a clock of its own."""

from __future__ import annotations

import time

import pytest

from swirl_fast.training import pace
from swirl_fast.training.pace import Pace, duration


def test_the_rest_is_as_long_as_the_last_steps_were() -> None:
    times = iter([0.0, 100.0, *(100.0 + 10 * number for number in range(1, 12))])
    steps = Pace(100, clock=lambda: next(times))
    assert steps.finish(1) == "  2 h 45 min left", "99 steps of 100 s"
    said = [steps.finish(number) for number in range(2, 13)]
    assert said[0] == "  90 min left", "98 of (100 + 10) / 2"
    assert said[-1] == "  15 min left", "88 of 10 s: the slow first one is no longer among the last ten"
    times = iter([0.0, 1.0])
    assert Pace(7, clock=lambda: next(times)).finish(7) == ""


def test_a_long_step_says_that_it_lives(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(pace, "QUIET", 0.05)
    steps, shown = Pace(9, done=lambda: "sampling"), ""
    steps.start()
    deadline = time.monotonic() + 60
    while shown.count("under way") < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
        shown += capsys.readouterr().out
    assert shown.startswith("train: the first step is under way for 0 s; done so far: sampling\n")
    steps.finish(3)
    assert steps.sign(70) == "train: step 4/9 is under way for 70 s; done so far: sampling"
    steps.stop()


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0 s"), (99.4, "99 s"), (720, "12 min"), (11100, "3 h 05 min"), (187200, "2 d 4 h")]
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text
