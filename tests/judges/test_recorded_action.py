"""The reward that compares an action with the recorded one: by hand, case by case; what is cached under which key; and the judge stage."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from support.collected import collected

from swirl_fast import cli
from swirl_fast.config import ConfigError, JudgeConfig, RecordedActionConfig, TrainingConfig, load
from swirl_fast.data.store import Store
from swirl_fast.engines.engine import Completion, Request, Sampling
from swirl_fast.formats.format import Call
from swirl_fast.formats.tags import TAGS, parse
from swirl_fast.judges import judge_id, load_judge
from swirl_fast.judges.judge import judge_actions
from swirl_fast.judges.recorded_action import RecordedActionJudge, best_matching
from swirl_fast.rollouts.at_states import judge_sampled, sample_actions
from swirl_fast.stages import held_out
from swirl_fast.tasks.scoring import ZERO
from swirl_fast.tasks.task import Question
from swirl_fast.tools.tool import CALCULATOR, SEARCH, ToolSpec
from swirl_fast.trajectory import Step, StepView, Trajectory
from swirl_fast.verdict import Verdict

SCHEMA = {
    "type": "object",
    "properties": {
        "value": {"type": ["number", "string"]},
        "to": {"type": "string"},
        "more": {"type": ["object", "array", "boolean", "null", "number"]},
    },
    "required": [],
}
CONVERT = ToolSpec("convert", "units", SCHEMA, "convert", "mine.py:convert", "convert@1")
WEIGH = ToolSpec("weigh", "weights", SCHEMA, "weigh", "mine.py:weigh", "weigh@1")
TOOLS = {"t": (CALCULATOR, SEARCH, CONVERT, WEIGH)}


def judged(fresh: str, recorded: str | None, **settings: Any) -> tuple[float | None, str]:
    judge = RecordedActionJudge(RecordedActionConfig(**settings), TOOLS)
    (judgement,) = judge.judge([StepView("t", "?", (), fresh, recorded)])
    return judgement.reward, judgement.reason


def convert(arguments: str, tool: str = "convert") -> str:
    return f"Let me see. <{tool}>{arguments}</{tool}>"


def calculate(expression: str) -> str:
    return f"<math_exp>{expression}</math_exp>"


def search(query: str) -> str:
    return f"<search_query>{query}</search_query>"


def answer(text: str) -> str:
    return f"<answer>{text}</answer>"


CASES = [
    # numbers written differently, names in another order, other words around the call
    (convert('{"value": 3, "to": "m"}'), convert('{"to": "M", "value": 3.0}'), 1.0, 1.0),
    (convert('{"value": "3", "to": "m"}'), convert('{"value": 3, "to": "m"}'), 1.0, 1.0),
    (convert('{"value": 1e999}'), convert('{"value": 3}'), 0.0, 0.0),
    (convert('{"value": 4, "to": "m"}'), convert('{"value": 3, "to": "m"}'), 0.5, 0.0),
    # missing and surplus arguments
    (convert('{"value": 3}'), convert('{"value": 3, "to": "m"}'), 0.5, 0.0),
    (convert('{"value": 3, "to": "m", "more": null}'), convert('{"value": 3, "to": "m"}'), 2 / 3, 0.0),
    (convert("{}"), convert("{}"), 1.0, 1.0),
    (convert("{}"), convert('{"to": "m"}'), 0.0, 0.0),
    # other JSON: equal or not; true is not 1
    (convert('{"more": {"a": [1, {"b": null}]}}'), convert('{"more": {"a": [1.0, {"b": null}]}}'), 1.0, 1.0),
    (convert('{"more": {"a": [1, 2]}}'), convert('{"more": {"a": [2, 1]}}'), 0.0, 0.0),
    (convert('{"more": [true]}'), convert('{"more": [1]}'), 0.0, 0.0),
    # lists of texts: matched, and not quite the same in another order
    (convert('{"more": ["red car", "sky"]}'), convert('{"more": ["red car", "sky"]}'), 1.0, 1.0),
    (convert('{"more": ["sky", "red car"]}'), convert('{"more": ["red car", "sky"]}'), 3 / 4, 0.0),
    (convert('{"more": ["Who is X?", "$5"]}'), convert('{"more": ["who is X", "5"]}'), 1.0, 1.0),
    (convert('{"more": ["the sky", "sky"]}'), convert('{"more": ["sky", "Sky!"]}'), 1.0, 1.0),
    (convert('{"more": ["5", "Who is X?"]}'), convert('{"more": ["who is X", "5"]}'), 3 / 4, 0.0),
    (convert('{"more": ["sky"]}'), convert('{"more": ["red car", "sky"]}'), 2 / 3, 0.0),
    (convert('{"more": ["red bus"]}'), convert('{"more": ["red car"]}'), 1 / 2, 0.0),
    (convert('{"more": []}'), convert('{"more": ["sky"]}'), 0.0, 0.0),
    (convert('{"more": [' + ", ".join(['"sky"'] * 65) + "]}"), convert('{"more": ["sky"]}'), 0.0, 0.0),
    (
        convert('{"more": [' + ", ".join(['"sky"'] * 65) + "]}"),
        convert('{"more": [' + ", ".join(['"Sky"'] * 65) + "]}"),
        1.0,
        1.0,
    ),
    (convert('{"more": true}'), convert('{"more": 1}'), 0.0, 0.0),
    (
        convert('{"more": ' + "[" * 60 + "]" * 60 + "}"),
        convert('{"more": ' + "[" * 60 + "1" + "]" * 60 + "}"),
        0.0,
        0.0,
    ),
    # another tool, another kind
    (convert('{"value": 3}', "weigh"), convert('{"value": 3}'), 0.0, 0.0),
    (answer("3"), calculate("1+2"), 0.0, 0.0),
    (calculate("1+2"), answer("3"), 0.0, 0.0),
    # calculations by their value
    (calculate("2 * 3"), calculate("3*2"), 1.0, 1.0),
    (calculate("48/2"), calculate("48 * 0.5"), 1.0, 1.0),
    (calculate("5 - 5"), calculate("5+5"), 0.0, 0.0),
    (calculate("6"), calculate("2*3"), 0.0, 0.0),
    (calculate("2*"), calculate("2*3"), 0.0, 0.0),
    # words, by F1 of those that are left when articles and punctuation are gone
    (search("Who directed the film 'Jaws'?"), search("who directed film jaws"), 1.0, 1.0),
    (search("director of Jaws"), search("who directed Jaws"), 1 / 3, 0.0),
    (search("Spielberg's birthday"), search("capital of France"), 0.0, 0.0),
    (search("1999"), search("1998"), 0.0, 0.0),
    (search("?"), search("?"), 1.0, 1.0),
    (search("?"), search("!"), 0.0, 0.0),
    # operators, order and case count where there are operators
    (search("a < 5"), search("a > 5"), 2 / 3, 0.0),
    (search("the town at (-1, 2)"), search("the town at (1, 2)"), 16 / 17, 0.0),
    (search("the town at (1, - 2)"), search("the town at (1, 2)"), 16 / 17, 0.0),
    (search("drops of .5 mg"), search("drops of 5 mg"), 8 / 9, 0.0),
    (search("blood of type O-"), search("blood of type O"), 8 / 9, 0.0),
    (search("x = a - b"), search("x = b - a"), 9 / 10, 0.0),
    (search("x=y"), search("x = y"), 1.0, 1.0),
    (search("N=m"), search("n=m"), 2 / 3, 0.0),
    (search("version 1.5"), search("version 15"), 2 / 6, 0.0),
    # a number beside words is one word of several, and a currency or a percent sign belongs to it
    (search("population of Spain 2020"), search("population of France 2020"), 3 / 4, 0.0),
    (search("population of Spain 2021"), search("population of Spain 2020"), 3 / 4, 0.0),
    (search("delete 3 files"), search("create 3 files"), 2 / 3, 0.0),
    (search("10 minutes"), search("10 hours"), 1 / 2, 0.0),
    (search("May 5"), search("June 5"), 1 / 2, 0.0),
    (convert('{"value": "3 apples"}'), convert('{"value": 3}'), 0.0, 0.0),
    (convert('{"value": "100 USD"}'), convert('{"value": "100 EUR"}'), 0.0, 0.0),
    (convert('{"value": "$100"}'), convert('{"value": "€100"}'), 0.0, 0.0),
    (convert('{"value": "$100"}'), convert('{"value": "100.00 USD"}'), 1.0, 1.0),
    (convert('{"value": "₹100"}'), convert('{"value": "Rs. 100"}'), 1.0, 1.0),
    (convert('{"value": "€100"}'), convert('{"value": 100}'), 1.0, 1.0),
    (convert('{"value": "5%"}'), convert('{"value": "5"}'), 0.0, 0.0),
    (convert('{"value": "5%"}'), convert('{"value": "0.05"}'), 1.0, 1.0),
    # the same words in another order
    (search("flights from Paris to Rome"), search("flights from Rome to Paris"), 9 / 10, 0.0),
    (search("The dog bites a man"), search("man bites dog"), 5 / 6, 0.0),
    # answers
    (answer("$10.00"), answer("10"), 1.0, 1.0),
    (answer("11"), answer("10"), 0.0, 0.0),
    (answer("the Eiffel Tower"), answer("Eiffel tower."), 1.0, 1.0),
    (answer("Eiffel Tower in Paris"), answer("Eiffel Tower"), 2 / 3, 0.0),
    (answer("yes"), answer("yes, indeed"), 0.0, 0.0),
]


@pytest.mark.parametrize(("fresh", "recorded", "fuzzy", "exact"), CASES)
def test_an_action_is_worth_its_agreement(fresh: str, recorded: str, fuzzy: float, exact: float) -> None:
    assert judged(fresh, recorded)[0] == pytest.approx(fuzzy)
    assert judged(fresh, recorded, arguments="exact")[0] == exact
    assert judged(recorded, recorded) == judged(recorded, recorded, threshold=1.0, arguments="exact")
    assert judged(recorded, recorded)[0] == 1.0


def test_a_threshold_turns_partial_agreement_down_and_keeps_the_rest() -> None:
    partly = convert('{"value": 3, "to": "m", "more": null}'), convert('{"value": 3, "to": "m"}')
    assert judged(*partly, threshold=0.6)[0] == pytest.approx(2 / 3)
    reward, reason = judged(*partly, threshold=0.7)
    assert reward == 0.0 and reason.endswith("by 0.67, less than judge.recorded_action.threshold=0.7")


def test_calls_of_one_turn_are_matched_so_that_they_agree_best() -> None:
    judge = RecordedActionJudge(RecordedActionConfig(), TOOLS)

    def f1(fresh: Sequence[Call], recorded: Sequence[Call]) -> float:
        return judge._calls(fresh, recorded)

    one, two = Call("convert", "", {"value": 1, "to": "m"}), Call("convert", "", {"value": 2, "to": "ft"})
    three, near = Call("weigh", "", {"value": 3}), Call("convert", "", {"value": 1, "to": "ft"})
    assert f1([three, two, one], [one, two, three]) == 1.0
    assert f1([one, one], [one]) == pytest.approx(2 / 3), "a call is matched once"
    assert f1([one], [one, two, three]) == pytest.approx(0.5)
    assert f1([two, three], [one, three]) == pytest.approx(0.5)
    # near agrees by a half with both; taking the first best pair would leave one and two unmatched
    assert f1([near, one], [one, two]) == pytest.approx((0.5 + 1.0) / 2)
    assert f1([three], [one]) == 0.0


def test_the_best_matching_is_not_the_greedy_one() -> None:
    assert best_matching([[0.9, 0.8], [0.8, 0.0]]) == pytest.approx(1.6)
    assert best_matching([[0.9, 0.8]]) == 0.9 and best_matching([[0.2], [0.7]]) == 0.7
    assert best_matching([[0.0, 0.0], [0.0, 0.0]]) == 0.0


@pytest.mark.parametrize(
    ("recorded", "reason"),
    [
        ("I think that it is done now.", "neither a call nor an answer"),
        ("<answer>1</answer><answer>2</answer>", "neither a call nor an answer"),
        (None, "no action is recorded"),
    ],
)
def test_what_cannot_be_compared_is_unknown(recorded: str | None, reason: str) -> None:
    found = judged(answer("1"), recorded)
    assert found[0] is None and reason in found[1]


def test_steps_of_other_tasks_are_unknown_and_malformed_ones_bad() -> None:
    judge = RecordedActionJudge(RecordedActionConfig(), TOOLS)
    other, malformed = judge.judge(
        [StepView("else", "?", (), answer("1"), answer("1")), StepView("t", "?", (), "no tag", answer("1"))]
    )
    assert other.verdict is Verdict.UNKNOWN and malformed.verdict is Verdict.BAD


OWN = """
def same_words(step):
    assert step.question == "?" and step.action.kind == "answer"
    return step.action.argument in step.recorded
"""


def test_turns_without_a_call_may_be_judged_by_a_function_of_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(OWN, encoding="utf-8")
    config = RecordedActionConfig(turns_without_a_call=f"{path}:same_words")
    judge = RecordedActionJudge(config, TOOLS)
    views = [("seven", "It is seven."), ("eight", "It is seven."), ("seven", answer("eight")), ("seven", None)]
    found = judge.judge([StepView("t", "?", (), answer(text), recorded) for text, recorded in views])
    assert [one.reward for one in found] == [1.0, 0.0, 0.0, None]
    before = judge.id
    path.write_text(OWN + "\n# changed\n", encoding="utf-8")
    assert RecordedActionJudge(config, TOOLS).id != before, "verdicts of other code are not those of this one"
    with pytest.raises(ConfigError, match=r"judge.recorded_action.turns_without_a_call=.*mine.py has no other"):
        RecordedActionJudge(RecordedActionConfig(turns_without_a_call=f"{path}:other"), TOOLS)
    wrong = load(None, []).judge.recorded_action.turns_without_a_call
    assert wrong == "unknown"
    with pytest.raises(ConfigError, match="turns_without_a_call=none: must be one of unknown, or FILE.py:NAME"):
        load(None, ["judge.recorded_action.turns_without_a_call=none"])


CLOSE = """
def same_text(step):
    assert step.action.kind == "malformed"
    return step.action_text == step.recorded
"""
PLAIN = "Shall I go on?"


@pytest.mark.parametrize("recorded", [PLAIN, "<answer>1</answer><answer>2</answer>", "<no_tool>x</no_tool>"])
def test_where_no_call_is_recorded_one_without_a_call_is_not_worth_less(recorded: str, tmp_path: Path) -> None:
    (tmp_path / "close.py").write_text(CLOSE, encoding="utf-8")
    own = RecordedActionConfig(turns_without_a_call=f"{tmp_path / 'close.py'}:same_text")
    views = [StepView("t", "?", (), text, recorded) for text in (recorded, "Well.")]
    actions = [parse(view.action_text, TOOLS["t"]) for view in views]
    cut_off = parse(recorded, TOOLS["t"], truncated=True)
    for config, rewards in ((RecordedActionConfig(), [None, None]), (own, [1.0, 0.0])):
        judge = RecordedActionJudge(config, TOOLS)
        assert [one.reward for one in judge.judge(views)] == rewards
        assert [one.reward for one in judge_actions(judge, views, actions)] == rewards
        (cut,) = judge_actions(judge, views[:1], [cut_off])
        assert cut.verdict is Verdict.BAD, "it did not end"
        call = [StepView("t", "?", (), PLAIN, calculate("1+2")), StepView("t", "?", (), PLAIN, answer("3"))]
        bad = judge_actions(judge, call, [parse(PLAIN, TOOLS["t"])] * 2)
        assert [one.reward for one in bad] == [0.0, 0.0]
        assert all(one.reason.startswith("malformed: ") for one in bad)


def test_the_id_names_all_that_a_reward_depends_on() -> None:
    configs = [{}, {"arguments": "exact"}, {"threshold": 0.5}, {"threshold": 0.5000001}]
    ids = [RecordedActionJudge(RecordedActionConfig(**one), TOOLS).id for one in configs]
    ids.append(RecordedActionJudge(RecordedActionConfig(), {"t": (CALCULATOR,)}).id)
    assert len(set(ids)) == 5
    assert judge_id(JudgeConfig(kind="recorded_action"), TOOLS) == ids[0]


def test_a_verdict_is_kept_under_what_was_recorded() -> None:
    """The same action at the same state is worth something else where something else was recorded."""
    view, other = (StepView("t", "?", (), answer("1"), answer(text)) for text in ("2", "3"))
    plain, itself = StepView("t", "?", (), answer("1")), StepView("t", "?", (), answer("1"), answer("1"))
    assert len({view.content_hash(), other.content_hash(), plain.content_hash()}) == 3
    assert itself.content_hash() == plain.content_hash(), "a recorded step says itself what was recorded"


class Answering:
    def generate(self, requests: Sequence[Request]) -> list[list[Completion]]:
        return [[Completion(np.array([1], np.int32), [-1.0], "stop", 0)] * request.n for request in requests]


def test_training_compares_with_the_turn_that_is_recorded_at_the_state() -> None:
    """One that was cut off is compared with nothing, even if its text holds a whole call."""
    texts = [calculate("1+2"), calculate("3+4") + " and on", answer("7")]
    actions = [parse(text, TOOLS["t"], truncated=i == 1) for i, text in enumerate(texts)]
    assert actions[1].cut_off
    steps = [
        Step(1 + i, 2 + i, text, action, [0.0], 0) for i, (text, action) in enumerate(zip(texts, actions, strict=True))
    ]
    recorded = Trajectory("x/0", "x", "t", "?", 0, 1, np.arange(4), steps)
    renderer: Any = SimpleNamespace(stop_ids=(1,), text=lambda tokens: calculate("2+1"))
    engine: Any = Answering()
    drawn = sample_actions([recorded], engine, renderer, TOOLS, TrainingConfig(group_size=2), [0])
    assert [one.view.recorded for one in drawn[::2]] == [texts[0], None, texts[2]]
    rewards = [one.reward for one in judge_sampled(drawn, RecordedActionJudge(RecordedActionConfig(), TOOLS))]
    assert rewards == [1.0, 1.0, None, None, 0.0, 0.0]
    own = [one.recorded for one in recorded.views(recorded=True)]
    assert own == [texts[0], None, texts[2]] and [one.recorded for one in recorded.views()] == [None] * 3


def test_held_out_states_are_judged_as_those_of_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first of three recorded turns is a call, the others are none, as every fresh action."""
    texts = [calculate("1+2"), "Well.", PLAIN]
    steps = [Step(1 + i, 2 + i, text, parse(text, TOOLS["t"]), [0.0], 0) for i, text in enumerate(texts)]
    recorded = Trajectory("x/0", "x", "t", "?", 0, 1, np.arange(4), steps)
    renderer: Any = SimpleNamespace(stop_ids=(1,), text=lambda tokens: PLAIN)
    writer: Any = SimpleNamespace(renderer=renderer, form=TAGS, write=lambda _: iter([recorded]), notes=list)
    monkeypatch.setattr(held_out, "log_writer", lambda *_: writer)
    monkeypatch.setattr(held_out, "built_engine", lambda *_: contextlib.nullcontext(Answering()))
    monkeypatch.setattr(held_out, "offered_tools", lambda _: TOOLS)
    task: Any = SimpleNamespace(
        name="t",
        questions=lambda _: [Question("x", "t", "?", ())],
        conversations=lambda _: [],
        score=lambda *_: ZERO,
    )
    judge = RecordedActionJudge(RecordedActionConfig(), TOOLS)
    with Store(tmp_path / "evaluation.db") as store:
        config = load(None, ["evaluate.samples=1"])
        summary = held_out.score_states(config, task, Sampling(8), judge, store, "evaluate", None).summary()
    assert (summary["steps"], summary["process_label"], summary["unknown"]) == (3, 0.0, 2)


def test_labelled_steps_have_nothing_to_compare_with() -> None:
    with pytest.raises(ConfigError, match=r"judge.kind=recorded_action compares .*judge --against"):
        load_judge(JudgeConfig(kind="recorded_action"), TOOLS)


def test_the_judge_stage_says_where_there_is_something_to_compare_with(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = [*collected(tmp_path), "judge.kind=recorded_action", "filter.kind=process"]
    assert cli.main(["judge", *run]) == 0
    assert "4 GOOD, 0 BAD, 0 UNKNOWN" in capsys.readouterr().out
    assert cli.main(["filter", *run]) == 0
    assert "filter process kept 4 of 4" in capsys.readouterr().out
    with Store(tmp_path / "r" / "trajectories.db", writable=False) as store:
        keys = [key for one in store.trajectories() for key in one.content_hashes()]
        found = store.verdicts(store.main_judge(), keys)
    assert {one.reward for one in found.values()} == {1.0} and len(found) == 4
    assert json.loads((tmp_path / "r" / "filter.json").read_text())["judge"].startswith("recorded_action-v4-fuzzy")
