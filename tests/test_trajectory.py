"""The datum: states are views of one array, and content hashes do not depend on how they are computed."""

from __future__ import annotations

import copy

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from support.stores import make_question, make_trajectory

from swirl_fast.formats.format import Action
from swirl_fast.trajectory import Finish, Step, Trajectory

ANY_TEXT = st.text(st.characters(), max_size=20)


@given(ANY_TEXT, ANY_TEXT, st.lists(st.tuples(ANY_TEXT, st.none() | ANY_TEXT), max_size=6))
def test_all_content_hashes_are_those_of_the_views(
    task: str, question: str, turns: list[tuple[str, str | None]]
) -> None:
    """Verdicts in stores are found by them, so they are fixed for good."""
    steps = [
        Step(i, i + 1, text, Action("malformed"), [0.0], 0, observation) for i, (text, observation) in enumerate(turns)
    ]
    trajectory = Trajectory("t", "q", task, question, 0, 0, np.arange(len(steps), dtype=np.int32), steps)
    assert trajectory.content_hashes() == [view.content_hash() for view in trajectory.views()]
    assert trajectory.views() == [trajectory.view(i) for i in range(len(steps))]


def test_a_content_hash_stays_what_it_was() -> None:
    steps = [
        Step(1, 2, "<math_exp>5+5</math_exp>", Action("tool", "calculator", "5+5"), [0.0], 0, "5+5 -> 10.0"),
        Step(2, 3, "<answer>10 \ud83d</answer>", Action("answer", argument="10"), [0.0], 0),
    ]
    trajectory = Trajectory("t", "q", "sums", "How much are 5 and 5? “ü”", 0, 1, np.array([7, 8, 9], np.int32), steps)
    assert trajectory.content_hashes() == [
        "95e61148ca1471ceb60a67565b614e3a83fcf6422602134743d164bbdc7630f6",
        "a019fea4d0b18788dde75ac7cd1658081db1a490a78360811c7b0965af425952",
    ]


def test_tokens_are_one_int32_array_and_states_are_views_of_it() -> None:
    trajectory = make_trajectory(make_question(1), 0, 3, Finish.STEP_LIMIT)
    assert Trajectory("t", "q", "sums", "?", 0, 1, [1, 2]).tokens.dtype == np.int32  # type: ignore[arg-type]
    states = [trajectory.state(i) for i in range(3)]
    assert all(np.shares_memory(state, trajectory.tokens) for state in states)
    before = states[-1].tolist()
    trajectory.extend([1, 2**31 - 1])
    assert trajectory.tokens.dtype == np.int32 and trajectory.tokens[-2:].tolist() == [1, 2**31 - 1]
    assert states[-1].tolist() == before, "what was handed out stays"


def test_trajectories_are_equal_when_all_their_fields_are() -> None:
    trajectory = make_trajectory(make_question(1), 0, 3, Finish.STEP_LIMIT)
    other = copy.deepcopy(trajectory)
    assert trajectory == other
    other.tokens[0] += 1
    assert trajectory != other
    other = copy.deepcopy(trajectory)
    other.steps[1].text += "."
    assert trajectory != other and trajectory != "trajectory"
