from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swirl_fast.formats.format import Action
from swirl_fast.formats.tags import parse, render
from swirl_fast.tools.tool import CALCULATOR

TOOLS = (CALCULATOR,)


@pytest.mark.parametrize(
    ("text", "action"),
    [
        ("<math_exp>1 + 2</math_exp>", Action("tool", "calculator", "1 + 2")),
        ("I add them. <math_exp> 1 + 2\n</math_exp> now", Action("tool", "calculator", "1 + 2")),
        ("<answer>3</answer>", Action("answer", argument="3")),
        ("a < b > c <answer>x < y</answer>", Action("answer", argument="x < y")),
    ],
)
def test_well_formed(text: str, action: Action) -> None:
    assert parse(text, TOOLS) == action


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "no tag"),
        ("the answer is 3", "no tag"),
        ("<answer>3", "not opened and closed"),
        ("3</answer>", "not opened and closed"),
        ("</answer>3<answer>", "not opened and closed"),
        ("<answer>3</math_exp>", "not opened and closed"),
        ("<answer> </answer>", "empty"),
        ("<answer>3</answer><answer>4</answer>", "more than one"),
        ("<math_exp>1</math_exp><answer>1</answer>", "more than one"),
        ("<answer><answer>3</answer></answer>", "more than one"),
        ("<search_query>who</search_query>", "no tool <search_query>"),
        ("<answer>" + "9" * 3000 + "</answer>", "longer than"),
        ("<ANSWER>3</ANSWER>", "no tag"),
    ],
)
def test_malformed_says_why(text: str, why: str) -> None:
    action = parse(text, TOOLS)
    assert action.kind == "malformed" and why in action.error


def test_cut_off_is_malformed_even_with_a_whole_tag() -> None:
    assert "cut off" in parse("<answer>3</answer> and", TOOLS, truncated=True).error


@given(st.text())
def test_never_raises_on_any_text(text: str) -> None:
    parse(text, TOOLS)
    parse(f"<answer>{text}</answer>", TOOLS)
    parse(f"<math_exp>{text}", ())


@pytest.mark.parametrize(
    "text", ["<" * 1_000_000, "<answer>" * 125_000, "<answer>" + "\ud800" * 500_000, "</" * 500_000]
)
def test_a_megabyte_is_parsed(text: str) -> None:
    """In a moment: with a pattern that backtracks over it this would take hours."""
    assert parse(text, TOOLS).kind == "malformed"


@given(st.text(min_size=1).map(str.strip).filter(lambda t: t and "<" not in t and len(t) <= 2000))
def test_render_and_parse_are_inverse(argument: str) -> None:
    for action in (Action("answer", argument=argument), Action("tool", "calculator", argument)):
        assert parse(render(action), TOOLS) == action


def test_a_malformed_action_has_no_tag_form() -> None:
    with pytest.raises(ValueError, match="no tag form"):
        render(parse("", TOOLS))
