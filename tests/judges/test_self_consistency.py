"""The vote on answers: which answers agree, whom the vote decides about, and when it is counted."""

from __future__ import annotations

import itertools
import re
import sqlite3
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from swirl_fast.config import ConfigError, JudgeConfig, load
from swirl_fast.data.shards import StepSample, decode_sample, encode_sample
from swirl_fast.data.store import Store
from swirl_fast.engines.engine import Completion
from swirl_fast.formats.format import Action
from swirl_fast.formats.tags import parse
from swirl_fast.judges import judge_id, load_judge
from swirl_fast.judges.cached import NOT_JUDGED, judge_steps, judged_trajectories, lacks_verdict
from swirl_fast.judges.judge import Refusal
from swirl_fast.judges.self_consistency import (
    PREFIX,
    SelfConsistentJudge,
    by_vote,
    same_answer,
    stored_id,
    with_other_answers,
)
from swirl_fast.rollouts.at_states import SampledAction, asked_about
from swirl_fast.tasks import load_task
from swirl_fast.tasks.task import Question
from swirl_fast.tools.tool import CALCULATOR
from swirl_fast.training.trainer import Trainer
from swirl_fast.trajectory import Finish, Step, StepView, Trajectory
from swirl_fast.verdict import Judgement, JudgeStats, Verdict

TOOLS = {"t": (CALCULATOR,)}
CALLED = (("<math_exp>2+3</math_exp>", "2+3 -> 5"),)
GOOD, BAD, UNKNOWN = Verdict.GOOD, Verdict.BAD, Verdict.UNKNOWN


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("5", "5.0", True),
        ("$1,200", "1200 dollars", True),
        ("50%", "50", True),
        ("5 hundred", "500", True),
        ("10", "10 clips", True),
        ("10", "12 clips", False),
        ("5", "-5", False),
        ("$5", "€5", None),
        ("2 hours", "2 minutes", None),
        ("2 hours", "120 minutes", None),
        ("May 1990", "June 1990", None),
        ("12 Angry Men", "12 Years a Slave", None),
        ("5", "at least 5", None),
        ("5", "5 mln", None),
        ("5", "10 - 5", None),
        ("35", "3-5", None),
        ("1230", "12:30", None),
        ("482", "48/2", None),
        ("52", "5²", None),
        ("(-1, 2)", "(1, 2)", None),
        ("x < 3", "x > 3", None),
        ("C", "C++", None),
        ("B+", "B-", None),
        ("10km", "10 miles", None),
        ("10km", "10 km", True),
        ("five", "5", None),
        ("48/2", "24", None),
        ("1st", "first", None),
        ("5 km", "five kilometres", None),
        ("the 2nd of May", "second of June", None),
        ("25 men", "twenty-five people", None),
        ("seven", "eight", False),
        ("NYC", "New York City", None),
        ("Yes", "yes, both are", None),
        ("Yes, Minister", "Yes, Giorgio", None),
        ("No.", "Yes", False),
        ("no", "The answer is no", None),
        ("No", "No Doubt", None),
        ("No. 5", "No. 7", False),
        ("true", "yes", False),
        ("No Country for Old Men", "No Time to Die", False),
        ("Paris", "paris", True),
        ("Paris", "Paris.", True),
        ("Paris", "Rome", False),
        ("Paris", "in Paris, France", None),
        ("Paris", "Paris or Rome", None),
        ("Paris", "it isn't Paris", None),
        ("Paris", "“Paris”", None),
        ("Москва", "не Москва", None),
        ("巴黎", "巴黎。", None),
        ("巴黎", "北京", False),
        ("Émile Zola", "emile zola", None),
        ("Lee Ann", "Ann Lee", None),
        ("Ann Lee", "Ann Leeson", None),
        ("of", "University of Oxford", None),
        ("The Who", "Who", True),
        ("The Who", "The Band", False),
        ("Battle of Manila (1762)", "Seven Days", False),
        ("A", "a", True),
        ("A", "B", False),
        ("", "", True),
        ("", "5", None),
        ("x " * 1500, "x", None),
        ("x " * 1500, "y", None),
        ("x " * 1500, "X " * 1500, True),
    ],
)
def test_which_answers_agree(one: str, other: str, same: bool | None) -> None:
    assert same_answer(one, other) is same_answer(other, one) is same


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("Yes", "yes, both are", True),
        ("No.", "No - one of them is not", True),
        ("No.", "Yes, both", False),
        ("No", "one of them is not", None),
        ("No", "No Doubt", None),
        ("both are not", "neither is", False),
    ],
)
def test_which_answers_for_yes_or_no_agree(one: str, other: str, same: bool | None) -> None:
    assert same_answer(one, other, closed=True) is same_answer(other, one, closed=True) is same


@pytest.mark.parametrize(
    ("one", "other", "held"),
    [
        ("Paris", "It is Paris, in France.", True),
        ("Ann Lee", "It was Ann Lee.", True),
        ("1990", "on 25 May 1990, they say", True),
        ("Paris", "Paris or Rome", None),
        ("Paris", "Both Paris and Rome", None),
        ("Lee Ann", "Ann Lee", None),
        ("Ann Lee", "Ann Leeson", None),
        ("Paris", "not Paris", None),
        ("Paris", "It isn't Paris", None),
        ("of", "University of Oxford", None),
        ("Paris", "Rome", False),
        ("2 hours", "2 minutes", None),
        ("May 1990", "1990", True),
        ("x " * 1500, "x", None),
        ("(-1, 2)", "(1, 2)", None),
        ("C", "C++ it is", None),
        ("12:30", "1230", None),
        ("Paris", "I couldn't find Paris", None),
        ("Paris", "London rather than Paris", None),
    ],
)
def test_which_recorded_answers_agree(one: str, other: str, held: bool | None) -> None:
    """By a vote of two that must agree."""
    for mine, others in ((one, other), (other, one)):
        found = by_vote(mine, (others,), "?", True, recorded=True)
        assert (found and found.verdict) == (GOOD if held else None)
        rivals = by_vote(mine, (others, others), "?", True, recorded=True)
        assert (rivals and rivals.verdict) == {True: GOOD, False: BAD, None: None}[held]


def test_every_split_of_a_few_votes() -> None:
    """Own answer 1, others 1, 2 or 3: all multisets of up to five others. A fresh answer has no vote itself."""
    for size in range(6):
        for others in itertools.combinations_with_replacement("123", size):
            counts = Counter(others)
            rival = max(counts["2"], counts["3"])
            for recorded in (False, True):
                own = counts["1"] + recorded
                wanted = GOOD if own > max(1, rival) else BAD if rival >= 2 * (counts["1"] + 1) else None
                found = by_vote("1", others, "?", True, recorded)
                assert (found and found.verdict) == wanted, (others, recorded)
                guessed = by_vote("1", others, "?", False, recorded)
                assert (guessed and guessed.verdict) == (BAD if wanted is BAD else None), "a guess is not voted right"


def test_a_fresh_answer_that_sides_disagree_about_wins_nothing() -> None:
    sides = ("December 25", "December 25", "June 25", "June 25")
    assert by_vote("25", sides, "?", True) is None
    found = by_vote("December 25", sides, "?", True)
    assert found is not None and found.verdict is GOOD, "two recorded ones, and June 25 is not plainly another"
    assert by_vote("50%", ("50", "50", "0.5", "0.5"), "?", True) is None
    assert by_vote("5", ("5 km", "5 miles"), "?", True) is None
    assert by_vote("Rome", ("Rome", "Rome", "Oslo", "Oslo"), "?", True) is None
    assert by_vote("7", ("7", "8", "9", "10"), "?", True) is None


def test_rivals_that_say_the_same_in_other_words_are_one() -> None:
    found = by_vote("Rome", ("Paris", "in Paris, France"), "?", True)
    assert found == Judgement(BAD, "by vote: 0 of 2 other answers to the question agree, and 2 are another one")
    assert by_vote("Rome", ("Paris", "Lyon"), "?", True) is None
    agreed = Judgement(GOOD, "by vote: 1 of 2 other answers to the question agree")
    assert by_vote("Rome", ("rome", "Lyon"), "?", True, recorded=True) == agreed


def test_naming_several_answers_wins_nothing() -> None:
    """Fresh ones agree as they are; of recorded ones that hold others, these must not contradict each other."""
    others = ("Paris", "Paris", "Rome", "London")
    for hedge in ("Paris or Rome or London", "Paris Rome London", "Paris", "It is Paris", "it is not Paris"):
        found = by_vote(hedge, others, "?", True)
        assert (found and found.verdict) == (GOOD if hedge == "Paris" else None), hedge
        found = by_vote(hedge, others, "?", True, recorded=True)
        assert (found and found.verdict) == (GOOD if hedge in ("Paris", "It is Paris") else None), hedge
    assert by_vote("5 or 6 or 7", ("5", "6", "7"), "?", True, recorded=True) is None
    both = "Paris had it first, and lost it to Rome."
    assert by_vote(both, ("Paris", "Paris", "Rome"), "?", True, recorded=True) is None
    found = by_vote("Rome", (both, "Paris", "Paris"), "?", True, recorded=True)
    assert found == Judgement(BAD, "by vote: 0 of 3 other answers to the question agree, and 2 are another one")


ANSWERS = st.sampled_from(["5", "5.0", "6", "Paris", "in Paris, France", "not Paris", "", "yes", "Yes it is", "nobody"])


@given(ANSWERS, st.lists(ANSWERS, max_size=9))
def test_the_order_of_the_others_changes_nothing(answer: str, others: list[str]) -> None:
    one, other = tuple(others), tuple(sorted(others, reverse=True))
    for recorded in (False, True):
        assert by_vote(answer, one, "?", True, recorded) == by_vote(answer, other, "?", True, recorded)


class Asked:
    """A judge that keeps what it was asked, and is unsure of everything. refuses: how many it answers before it refuses to go on."""

    id = "asked-v1"

    def __init__(self, refuses: int | None = None) -> None:
        self.asked: list[str] = []
        self.refuses, self.closed = refuses, False

    def stats(self) -> JudgeStats:
        return JudgeStats(7)

    def close(self) -> None:
        self.closed = True

    def judge(self, steps: Sequence[StepView]) -> list[Judgement]:
        self.asked += [step.action_text for step in steps]
        judged = [Judgement.graded(0.25, "unsure") for _ in steps]
        if self.refuses is not None:
            raise Refusal("key withdrawn", judged[: self.refuses])
        return judged


def answer(text: str, *others: str, history: tuple[tuple[str, str], ...] = CALLED, task: str = "t") -> StepView:
    return StepView(task, "?", history, f"<answer>{text}</answer>", None, tuple(others))


STEPS = [
    answer("5", "5", "5", "6"),
    answer("6", "5", "5"),
    answer("7", "5", "6"),
    StepView("t", "?", (), "<math_exp>2+3</math_exp>", None, ("5", "5")),
    answer("5", "5", "5", history=()),
    answer("5", "5", "5", history=(("<math_exp>", "malformed"),)),
    answer("5", "5", "5", history=(("<math_exp>2/0</math_exp>", "2/0 -> ERROR: division by zero"),)),
    answer("5", "5", "5", history=(("<math_exp>2+3</math_exp> and so on, cut off", "The turn was cut off."),)),
    answer("5"),
    answer("5", "5", "5", task="other"),
]


def test_the_judge_behind_it_is_asked_about_the_rest() -> None:
    behind = Asked()
    judge = SelfConsistentJudge(behind, TOOLS)
    unsure = Judgement.graded(0.25, "unsure")
    judged = judge.judge(STEPS)
    assert [one.reward for one in judged[:2]] == [1.0, 0.0] and judged[2:] == [unsure] * 8
    assert behind.asked == [step.action_text for step in STEPS[2:]]
    assert (judge.id, stored_id(judge.id)) == (f"{PREFIX}asked-v1", "asked-v1") and judge.stats() == JudgeStats(7)
    judge.close()
    assert behind.closed
    assert judge.judge([]) == []


def test_what_was_answered_before_a_refusal_keeps_its_place() -> None:
    with pytest.raises(Refusal, match="key withdrawn") as refused:
        SelfConsistentJudge(Asked(refuses=2), TOOLS).judge([STEPS[2], STEPS[0], STEPS[-2], STEPS[3]])
    rewards = [one and one.reward for one in refused.value.answered]
    assert rewards == [0.25, 1.0, 0.25, None]


# ---- in a store


def trajectory(
    question: Question, index: int, given: str | None, finish: Finish | None = Finish.ANSWER, called: bool = True
) -> Trajectory:
    """A call, then an answer; given None: only the call."""
    steps, tokens = [], [1, 2]
    texts = ["<math_exp>2+3</math_exp>"] if called else []
    texts += [] if given is None else [f"<answer>{given}</answer>"]
    for text in texts:
        action = parse(text, [CALCULATOR])
        seen = "2+3 -> 5" if action.kind == "tool" else None
        steps.append(Step(len(tokens), len(tokens) + 1, text, action, [-0.5], 0, seen))
        tokens += [3, 4] if action.kind == "tool" else [3]
    if given is None:
        finish = finish and Finish.STEP_LIMIT
    id_ = f"{question.id}/{index}"
    return Trajectory(id_, question.id, question.task, question.text, index, 2, tokens, steps, finish)


QUESTIONS = [Question(f"q{number}", "t", f"What is {number}?", ("5",)) for number in range(3)]
COLLECTED = [
    *(trajectory(QUESTIONS[0], i, given) for i, given in enumerate(["5", "5.0", "6", None])),
    trajectory(QUESTIONS[0], 4, None, None),
    *(trajectory(QUESTIONS[1], i, given) for i, given in enumerate(["7", "8"])),
    trajectory(QUESTIONS[2], 0, "5", called=False),
    trajectory(QUESTIONS[2], 1, "5"),
]
LATER = [trajectory(QUESTIONS[1], i, "8") for i in (2, 3)]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    with Store(tmp_path / "t.db") as store:
        store.add_questions(QUESTIONS)
        store.record(COLLECTED)
        yield store


def rewards(store: Store, judge_id: str) -> dict[str, list[float | None]]:
    ids = store.ids(finished=True)
    return {one.id: [each.reward for each in judged] for one, judged in judged_trajectories(store, judge_id, ids)}


def test_the_answers_of_all_questions(store: Store) -> None:
    wanted = {"q0": ["5", "5.0", "6"], "q1": ["7", "8"], "q2": ["5", "5"]}
    assert store.answers() == wanted and store.answers() is store.answers(), "read once"
    with Store(store.path, writable=False) as reader:
        assert reader.answers() == wanted
        store.record(LATER[:1])
        assert store.answers() == reader.answers() == {**wanted, "q1": ["7", "8", "8"]}, "and again when there are more"


def test_a_damaged_answer_is_noticed(store: Store) -> None:
    with sqlite3.connect(store.path) as db:
        db.execute("UPDATE steps SET argument = '9' WHERE argument = '8'")
    with pytest.raises(ValueError, match=re.escape("steps") + ".*do not match their hash"):
        store.answers()


def test_a_vote_is_counted_when_verdicts_are_read(store: Store) -> None:
    behind = Asked()
    judge = SelfConsistentJudge(behind, TOOLS)
    assert all(lacks_verdict(store, judge.id, one) for one in COLLECTED)
    assert all(
        judged == [NOT_JUDGED] * len(judged)
        for _, judged in judged_trajectories(store, judge.id, store.ids(finished=True))
    ), "a vote does not stand for the verdict of a judge that was not asked"
    judge_steps(judge, store, store.ids(finished=True), "judge")
    assert {row[0] for row in store.judged()} == {"asked-v1"} and not lacks_verdict(store, judge.id, COLLECTED[0])
    assert rewards(store, judge.id) == {
        "q0/0": [0.25, 1.0],
        "q0/1": [0.25, 1.0],
        "q0/2": [0.25, 0.0],
        "q0/3": [0.25],
        "q1/0": [0.25, 0.25],
        "q1/1": [0.25, 0.25],
        "q2/0": [0.25],
        "q2/1": [0.25, 1.0],
    }
    assert set(itertools.chain(*rewards(store, "asked-v1").values())) == {0.25}, "the judge by itself"
    store.record(LATER)
    asked = len(behind.asked)
    judge_steps(judge, store, store.ids(finished=True), "judge")
    assert len(behind.asked) == asked, "what looks the same is not asked about again"
    found = rewards(store, judge.id)
    assert {id_: found[id_][1] for id_ in ("q1/0", "q1/1", "q1/2", "q1/3")} == {
        "q1/0": 0.0,
        "q1/1": 1.0,
        "q1/2": 1.0,
        "q1/3": 1.0,
    }
    one = dict((one.id, judged) for one, judged in judged_trajectories(store, judge.id, ["q1/0"]))
    assert [each.reward for each in one["q1/0"]] == [0.25, 0.0], "also of a part of the store"


def test_a_fresh_answer_like_a_recorded_one_has_a_vote_less(store: Store) -> None:
    """Two trajectories give 5, a third one comes."""
    judge = SelfConsistentJudge(Asked(), TOOLS)
    for more, wanted in (([], 0.25), ([trajectory(QUESTIONS[0], 5, "$5")], 1.0)):
        store.record(more)
        judge_steps(judge, store, store.ids(finished=True), "judge")
        ((one, judged),) = judged_trajectories(store, judge.id, ["q0/0"])
        assert judged[-1].reward == 1.0 and one.view(1) == one.views()[1]
        assert judge.judge(one.views())[-1].reward == wanted


def test_others_are_all_but_itself(store: Store) -> None:
    found = {one.id: one for one in store.trajectories()}
    assert all(one.other_answers == () for one in found.values())
    before = {id_: one.content_hashes() for id_, one in found.items()}
    assert list(with_other_answers(found.values(), store.answers())) == list(found.values())
    assert found["q0/0"].other_answers == ("5.0", "6") and found["q0/3"].other_answers == ("5", "5.0", "6")
    assert found["q2/0"].other_answers == ("5",) and found["q1/1"].other_answers == ("7",)
    for id_, one in found.items():
        assert one.content_hashes() == before[id_] == [view.content_hash() for view in one.views()]
        sample = StepSample(one, [GOOD] * one.num_steps)
        encoded = encode_sample(sample)
        assert decode_sample(encoded).trajectory.other_answers == one.other_answers
        del encoded["meta"]["other_answers"]  # as filters of earlier versions, or without votes, write it
        assert decode_sample(encoded).trajectory.other_answers == ()


# ---- settings


def test_ids_are_those_of_the_judge_behind_it() -> None:
    config = load(None, ["judge.self_consistency=true", "tasks.limit=2", "tasks.eval_limit=1"])
    task = load_task(config.tasks, 0)
    tools = {"chain_sum": (CALCULATOR,)}
    judge = load_judge(config.judge, tools, tasks=[task])
    assert judge.id == judge_id(config.judge, tools) == PREFIX + judge_id(JudgeConfig(), tools)
    assert load_judge(JudgeConfig(), tools).id == stored_id(judge.id)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["judge.kind=reference"], "judge.kind=reference knows what is right without a vote"),
        (["judge.kind=recorded_action"], "judge.kind=recorded_action knows what is right without a vote"),
        (["collect.trajectories_per_question=2"], "needs several trajectories of a question"),
        (["collect.source=solutions"], "needs several trajectories of a question"),
    ],
)
def test_settings_that_cannot_work(settings: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=f"judge.self_consistency=True: .*{message}"):
        load(None, ["judge.self_consistency=true", *settings])


def test_without_tools_no_vote_could_make_an_answer_good() -> None:
    config = load(None, ["judge.self_consistency=true", "tasks.limit=2", "tasks.eval_limit=1"])
    with pytest.raises(ConfigError, match="task bare has no tools"):
        load_judge(config.judge, {**TOOLS, "bare": ()}, tasks=[load_task(config.tasks, 0)])


def test_votes_do_not_hide_that_the_judge_is_dead() -> None:
    """Neither from the guard that stops training, nor where states are chosen or a batch is filled up."""
    action = Action("answer", argument="5")
    completion = Completion(np.array([1], np.int32), [-1.0], "stop", 0)
    sampled = [SampledAction(0, 0, completion, each, STEPS[0]) for each in (action, action, Action("malformed"))]
    silent = Judgement(UNKNOWN, "no reply in 4 tries")
    vote = by_vote("5", ("5", "5"), "?", True)
    assert vote is not None
    judgements = [vote, silent, Judgement(BAD, "malformed")]
    assert asked_about(sampled, judgements) == [silent]
    told: list[tuple[object, ...]] = []
    guards = SimpleNamespace(answered=lambda *numbers: told.append(numbers))
    trainer = SimpleNamespace(guards=guards, step=4, rollouts=SimpleNamespace(judge_id="j"))
    Trainer._answered(trainer, SimpleNamespace(sampled=sampled, judgements=judgements))  # type: ignore[arg-type]
    assert told == [(5, 1, 0, 2, "j", "no reply in 4 tries")]
