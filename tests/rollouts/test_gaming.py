"""Signs of gaming, counted by hand."""

import math

import pytest

from swirl_fast.formats.format import Action
from swirl_fast.formats.tags import parse
from swirl_fast.rollouts.gaming import GamingSigns, gaming_metrics
from swirl_fast.tools.tool import CALCULATOR
from swirl_fast.verdict import Verdict

TOOLS = (CALCULATOR,)


def test_each_number_by_hand() -> None:
    texts = [  # text, tokens, verdict
        ("Sum: <math_exp>1 + 2</math_exp>", 10, Verdict.GOOD),
        ("<math_exp>1+2</math_exp>", 6, Verdict.BAD),  # the same but for white space
        ("no tag, and much more text than a tag would have", 20, Verdict.BAD),
        ("<answer> 3 </answer>", 4, Verdict.GOOD),
        ("<answer>3</answer>", 30, Verdict.UNKNOWN),
    ]
    signs, earlier = GamingSigns(), []
    for text, tokens, verdict in texts:
        action = parse(text, TOOLS)
        signs.observe(text, action, tokens, verdict, earlier)
        earlier.append(action)
    text = "<answer>4</answer>"
    signs.observe(text, parse(text, TOOLS, truncated=True), 64, Verdict.BAD, earlier)
    well_formed = [text for text, _, _ in texts if "no tag" not in text]
    outside = len("Sum: ") + 2  # and the spaces in the answer's tag
    assert gaming_metrics(vars(signs)) == {
        "action_length": (10 + 6 + 20 + 4 + 30 + 64) / 6,
        "action_length_good": (10 + 4) / 2,
        "action_length_bad": (6 + 20 + 64) / 3,
        "cut_off": 1 / 6,
        "outside_tag": pytest.approx(outside / sum(map(len, well_formed))),
        "repeated": 1 / 6,
    }


def test_answers_and_malformed_turns_repeat_no_call() -> None:
    signs = GamingSigns()
    answer, malformed = Action("answer", argument="3"), Action("malformed", error="The turn has no tag.")
    call = Action("tool", "calculator", "3")
    for action in (answer, malformed, call):
        signs.observe("<answer>3</answer>", action, 1, Verdict.GOOD, [answer, malformed])
    signs.observe("", call, 1, Verdict.GOOD, [Action("tool", "search", "3")])
    assert signs.repeated == 0


def test_nothing_to_average_is_nan() -> None:
    assert all(math.isnan(value) for value in gaming_metrics(vars(GamingSigns())).values())
