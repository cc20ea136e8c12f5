"""The four filters by hand and against their definition, and the subset under a limit."""

from collections import Counter
from collections.abc import Iterable, Mapping
from types import MappingProxyType

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swirl_fast.data.filters import (
    REASONS,
    Candidate,
    StateSelection,
    Window,
    judged_enough,
    select,
    state_reason,
    subset,
)
from swirl_fast.formats.format import Action
from swirl_fast.trajectory import Finish, Step, Trajectory
from swirl_fast.verdict import Judgement, Verdict

KINDS = ("none", "process", "outcome", "process_and_outcome")
VERDICTS = {"G": Verdict.GOOD, "B": Verdict.BAD, "U": Verdict.UNKNOWN}


def make(id_: str, question: str, num_steps: int, answer: bool, finished: bool = True) -> Trajectory:
    """num_steps actions of one token each."""
    steps = [Step(i, i + 1, "t", Action("tool", "calculator", "1"), [0.0], 0, "1 -> 1") for i in range(num_steps)]
    if answer:
        steps[-1].action = Action("answer", argument="1")
    finish = None if not finished else Finish.ANSWER if answer else Finish.STEP_LIMIT
    return Trajectory(id_, question, "gsm8k", "?", 0, 0, list(range(num_steps)), steps, finish)


def candidates(
    trajectories: Iterable[Trajectory],
    judgements: Mapping[str, list[Judgement]],
    outcomes: Mapping[str, bool | None] = MappingProxyType({}),
) -> list[Candidate]:
    return [Candidate.of(one, judgements[one.id], outcomes.get(one.id)) for one in trajectories]


def judged(letters: str) -> list[Judgement]:
    return [Judgement(VERDICTS[letter], "") for letter in letters]


# name: verdicts of the steps, has an answer, the answer is right, is finished
TABLE = {
    "good_right": ("GGG", True, True, True),
    "good_wrong": ("GG", True, False, True),
    "good_limit": ("GG", False, False, True),
    "bad_right": ("GBG", True, True, True),
    "unknown_right": ("GU", True, True, True),
    "unknown_bad": ("UB", True, False, True),
    "unfinished": ("GG", False, False, False),
    "no_steps": ("", False, False, True),
}
TRAJECTORIES = [make(name, name, len(row[0]), row[1], row[3]) for name, row in TABLE.items()]
JUDGEMENTS = {name: judged(row[0]) for name, row in TABLE.items()}
OUTCOMES = {name: row[2] for name, row in TABLE.items() if row[1]}
CANDIDATES = candidates(TRAJECTORIES, JUDGEMENTS, OUTCOMES)


@pytest.mark.parametrize(
    ("kind", "kept", "dropped"),
    [
        ("none", "good_right good_wrong good_limit bad_right unknown_right unknown_bad", {}),
        ("process", "good_right good_wrong good_limit", {"bad_step": 2, "unknown_step": 1}),
        ("outcome", "good_right bad_right unknown_right", {"no_answer": 1, "wrong_answer": 2}),
        (
            "process_and_outcome",
            "good_right",
            {"bad_step": 2, "unknown_step": 1, "no_answer": 1, "wrong_answer": 1},
        ),
    ],
)
def test_each_filter_by_hand(kind, kept: str, dropped: dict[str, int]) -> None:
    selection = select(CANDIDATES, kind)
    assert selection.kept == tuple(kept.split())
    expected = {"unfinished": 1, "no_steps": 1, **dropped}
    assert {reason: count for reason, count in selection.dropped.items() if count} == expected
    assert list(selection.dropped) == list(REASONS)
    assert selection.total == len(TABLE)
    table = selection.survivors()
    assert table[0] == ("collected", len(TABLE)) and table[-1][1] == len(selection.kept)
    assert [before - after for (_, before), (_, after) in zip(table, table[1:], strict=False)] == list(
        expected.values()
    )


@given(
    st.lists(st.tuples(st.text("GBU", max_size=4), st.booleans(), st.booleans(), st.booleans()), max_size=12),
    st.sampled_from(KINDS),
)
def test_a_trajectory_stays_by_definition_and_every_other_has_one_reason(rows, kind) -> None:
    trajectories, judgements, outcomes, expected = [], {}, {}, []
    for i, (letters, answer, right, finished) in enumerate(rows):
        answer = answer and bool(letters)
        trajectories.append(make(f"t{i}", f"q{i}", len(letters), answer, finished))
        judgements[f"t{i}"], outcomes[f"t{i}"] = judged(letters), right
        process = "process" not in kind or set(letters) <= {"G"}
        outcome = "outcome" not in kind or (answer and right)
        if finished and letters and process and outcome:
            expected.append(f"t{i}")
    selection = select(iter(candidates(trajectories, judgements, outcomes)), kind)
    assert list(selection.kept) == expected
    assert sum(selection.dropped.values()) == len(rows) - len(expected)


def test_only_what_a_filter_looks_at_decides() -> None:
    trajectory, silent = make("t", "q", 2, True), judged("UU")
    assert select([Candidate.of(trajectory, silent)], "none").kept == ("t",)
    assert select([Candidate.of(trajectory, silent, True)], "outcome").kept == ("t",)
    assert select([Candidate.of(trajectory, judged("GG"))], "process").kept == ("t",)
    with pytest.raises(ValueError, match="'t' has 2 steps and 3 judgements"):
        Candidate.of(trajectory, judged("GGG"))
    with pytest.raises(ValueError, match="'t' comes twice"):
        select([Candidate.of(trajectory, silent)] * 2, "none")
    with pytest.raises(ValueError, match="'good'.*process_and_outcome"):
        select([], "good")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="-1"):
        select([], "none", max_trajectories=-1)


def test_the_line_says_what_was_dropped_and_the_remedy_meets_the_largest_loss() -> None:
    selection = select(CANDIDATES, "process")
    assert selection.describe() == (
        "filter process kept 3 of 8 trajectories: "
        "1 not finished, 1 without a step, 2 with a BAD step, 1 with an UNKNOWN and no BAD step"
    )
    assert "filter.kind=none" in selection.remedy()
    unknown = select(candidates(TRAJECTORIES[:1], {"good_right": judged("UUU")}), "process")
    assert "run judge again" in unknown.remedy()
    assert "collect" in select([], "process").remedy()


def test_a_limit_takes_one_trajectory_of_every_question_first() -> None:
    # Questions 0, 1, 2, … with 5, 1, 2, 5, 1, 2, … trajectories, in order of their ids.
    question_of = {f"q{q}-{i}": f"q{q}" for q in range(60) for i in range((5, 1, 2)[q % 3])}
    chosen = {limit: subset(question_of, limit, seed=3) for limit in range(0, 170, 10)}
    for limit, ids in chosen.items():
        assert len(ids) == min(limit, len(question_of)) == len(set(ids))
        assert list(ids) == [id_ for id_ in question_of if id_ in set(ids)], "the order given stays"
        per_question = Counter(question_of[id_] for id_ in ids)
        rounds = max(per_question.values(), default=0)
        for question, size in Counter(question_of.values()).items():
            assert per_question[question] >= min(size, rounds - 1), "no question gets its n-th before all have n - 1"
    for smaller, larger in zip(chosen, list(chosen)[1:], strict=False):
        assert set(chosen[smaller]) < set(chosen[larger]) or larger > len(question_of)
    assert subset(question_of, 30, seed=3) == chosen[30] != subset(question_of, 30, seed=4)


def test_a_limit_prefers_no_part_of_the_data() -> None:
    """Over 400 seeds every trajectory is chosen in 3 of 24 cases; the standard deviation of that share is .017."""
    question_of = {f"q{q}-{i}": f"q{q}" for q in range(12) for i in range(2)}
    times = Counter(id_ for seed in range(400) for id_ in subset(question_of, 3, seed))
    assert all(abs(times[id_] / 400 - 1 / 8) < 0.06 for id_ in question_of), times


def test_the_limit_counts_what_it_drops() -> None:
    selection = select(CANDIDATES, "none", max_trajectories=4, seed=1)
    assert len(selection.kept) == 4 and selection.dropped["over_limit"] == 2
    assert select(CANDIDATES, "none", max_trajectories=4, seed=1) == selection


@pytest.mark.parametrize(
    ("kind", "letters", "outcome", "enough"),
    [
        ("process", "B B B U", True, True),
        ("process", "B B U", True, False),  # a third of those with a verdict is the most
        ("process", "U U U", True, False),  # the endpoint was down
        ("process", "GGU GB", True, False),
        ("process", "M M MU M U", True, False),  # M: malformed, which no judge is asked about
        ("process", "M M MU M", True, True),  # nothing that a judge could say would let one pass
        ("process", "MB MB MB U", True, True),
        ("outcome", "G G G", False, True),
        ("outcome", "G", None, False),
        ("process_and_outcome", "G G G U", False, True),
        ("process_and_outcome", "G G U", False, False),
        ("process_and_outcome", "B B B G", None, True),
        ("process_and_outcome", "B G", None, False),
    ],
)
def test_nothing_passed_is_a_result_only_where_the_judge_answered(
    kind, letters: str, outcome: bool | None, enough: bool
) -> None:
    trajectories, judgements = [], {}
    for i, own in enumerate(letters.split()):
        one = make(f"t{i}", f"q{i}", len(own), True)
        for step, letter in zip(one.steps, own, strict=True):
            if letter == "M":
                step.action = Action("malformed", error="no tag")
        trajectories.append(one)
        judgements[one.id] = judged(own.replace("M", "B"))
    made = candidates(trajectories, judgements, {one.id: outcome for one in trajectories})
    selection = select(made, kind)
    assert not selection.kept
    assert judged_enough(selection, made) is enough


def test_without_an_answer_the_steps_were_judged_all_the_same() -> None:
    trajectories = [make(f"t{i}", "q", 1, answer=False) for i in range(4)]

    def enough(letters: str) -> bool:
        made = candidates(trajectories, {f"t{i}": judged(letter) for i, letter in enumerate(letters)})
        return judged_enough(select(made, "process_and_outcome"), made)

    assert enough("GGGU")
    assert not enough("GGUU")


@pytest.mark.parametrize(
    ("min_reward", "kept"), [(0.1, "low high zero_one"), (0.5, "high zero_one"), (0.9, "zero_one"), (1.0, "zero_one")]
)
def test_graded_rewards_pass_from_the_least_one_on(min_reward: float, kept: str) -> None:
    rewards = {"low": [0.2, 0.9], "high": [0.5, 0.8], "zero_one": [1.0, 1.0], "none": [0.0, 1.0]}
    found = [
        Candidate.of(make(name, name, 2, True), [Judgement.graded(one, "") for one in own], True, min_reward)
        for name, own in rewards.items()
    ]
    selection = select(found, "process")
    assert selection.kept == tuple(kept.split()) and selection.dropped["bad_step"] == 4 - len(selection.kept)


WIDE = Window(0.0, 1.0, 0.0)


@pytest.mark.parametrize(
    ("rewards", "window", "reason"),
    [
        ([0, 1, 1, 0], WIDE, None),
        ([1, 1, 1, 1], WIDE, "equal"),
        ([0.1] * 3, WIDE, "equal"),  # the mean of which is not 0.1 in floating point
        ([0.3, 0.3000001], WIDE, None),
        ([0, 0.5], Window(0.0, 1.0, 0.0625), "equal"),  # 0.0625 is not above itself
        ([0, 0.5], Window(0.0, 1.0, 0.0624), None),
        ([None, 1, None, 0], WIDE, None),
        ([None, 1, None], WIDE, "unknown"),
        ([None, None], WIDE, "unknown"),
        ([], WIDE, "too_long"),
        ([0, 0, 0, 1], Window(0.3, 1.0, 0.0), "too_low"),
        ([0, 0, 0, 1], Window(0.25, 1.0, 0.0), None),
        ([0, 1, 1, 1], Window(0.0, 0.7, 0.0), "too_high"),
        ([0, 1, 1, 1], Window(0.0, 0.75, 0.0), None),
    ],
)
def test_a_state_is_kept_where_its_rewards_vary_in_the_window(
    rewards: list[float | None], window: Window, reason: str | None
) -> None:
    assert state_reason(rewards, window) == reason


def test_trajectories_without_a_state_left_are_left_out_and_counted() -> None:
    selection = select(CANDIDATES, "none")
    rewards: dict[str, list[list[float | None]]] = {id_: [[1, 1]] * 2 for id_ in selection.kept}
    rewards |= {"good_right": [[0, 1], [1, 1], [None, 1]], "bad_right": [[1, 1], [0, 1], []]}
    states = StateSelection.of(rewards, WIDE)
    assert states.kept["good_right"] == [True, False, False] and states.kept["bad_right"] == [False, True, False]
    assert states.total == 14 and states.dropped["equal"] == 10 and sum(states.dropped.values()) == 12
    assert states.describe() == (
        "filter.states=variance kept 2 of 14 states: 1 with no room for an action of training.max_action_tokens in the context, "
        "1 with less than two known rewards, 10 with rewards that vary too little"
    )
    assert states.survivors()[0] == ("of the kept trajectories", 14) and states.survivors()[-1][1] == 2
    left = states.applied(selection)
    assert left.kept == ("good_right", "bad_right") and left.total == selection.total
    assert left.dropped == {**selection.dropped, "no_state": 4}
    assert left.survivors()[-1] == ("without those without a state that filter.states=variance keeps", 2)
    assert "filter.states_min_mean" in left.remedy() and "filter.states=all" in left.remedy()
