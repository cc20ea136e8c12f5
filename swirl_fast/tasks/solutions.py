"""Worked solutions of word problems: the calculations in their text.

GSM8K's official solutions mark each one, `48/2 = <<48/2=24>>24`; those of generated problems are read off the text, `35 × 3 = 105 apples`.
"""

from __future__ import annotations

import re
import string
from fractions import Fraction

from swirl_fast.tasks.scoring import number
from swirl_fast.tools.arithmetic import CalculationError, evaluate
from swirl_fast.tools.numerals import mentions, numbers

_MARKED = re.compile(r"<<([^<>=]*)=([^<>]*)>>")
_RESULT = re.compile(
    r"=\s*(?:[$£€]\s*)?(-?(?>[\d,]*\.?\d+)(?: ?(?:hundred|thousand|million|billion|trillion)\b|[kKMB]\b)?)(?![\d.,]*\s*[-+*/x×÷])"
)
_LEFT = "0123456789.,+-*/×÷x()% "  # characters of a calculation
_RIGHT = re.compile(r"=\s*(-?(?>[\d,]*\.?\d+))(?![\d.,]*\s*[-+*/x×÷=])")
_CONSTANTS = {
    Fraction(one)
    for one in ("1", "2", "3", "4", "7", "10", "12", "24", "30", "52", "60", "100", "365", "1/2", "1/4", "3/4")
}
_UNIT = re.compile(r"(?<=[\d)%])\s*(?>[A-Za-z]+(?: +[A-Za-z]+)*)(?=\s*[-+*/×÷=)])")  # `64 pears + 52 pears = `


def marked_steps(solution: str) -> int:
    """How many calculations are marked as `<<48/2=24>>`."""
    return len(_MARKED.findall(solution))


def step_results(solution: str, answer: str) -> tuple[Fraction, ...]:
    """The numbers after the equals signs of a solution, in order, and the answer. answer: one number."""
    found = [number(match[1]) for match in _RESULT.finditer(solution)]
    return tuple(value for value in [*found, number(answer)] if value is not None)


def step_expressions(question: str, solution: str, answer: str) -> tuple[str, ...]:
    """The calculations of a solution, in order, as they can be given to the calculator: each evaluates to what the solution says, from
    numbers of the question, earlier results and everyday constants, and the last one to the answer. Empty where the text does not allow
    that, because a step is done in words, say."""
    known = {*_CONSTANTS, *(abs(value) for found in mentions(question) for value in (found.value, found.bare))}
    marked = _MARKED.findall(solution)
    text = re.sub(r"[$£€]", "", solution)
    found: dict[Fraction, str] = {}
    for expression, result in marked or _equations(_UNIT.sub("", text)):
        expression = re.sub(r"^[,.)\s]+", "", re.sub(r"[$£€]", "", expression)).strip()
        try:
            value = evaluate(expression)
        except CalculationError:
            continue
        used = [abs(one) for one in numbers(expression)]
        if value != number(result) or len(used) < 2:
            continue
        if not known.issuperset(used):
            return ()
        known.add(abs(value))
        found.setdefault(value, expression)
    if not found or list(found)[-1] != number(answer):
        return ()
    return tuple(found.values())


def _equations(text: str) -> list[tuple[str, str]]:
    """(calculation, number) on both sides of the equals signs."""
    found, at = [], 0
    for sign in re.finditer("=", text):
        before = text[at : sign.start()]
        ended = before.rstrip(")" + string.whitespace)
        right = _RIGHT.match(text, sign.start())
        at = sign.end()
        if right and ended.rstrip(".,%")[-1:].isdecimal():
            found.append((before[len(ended.rstrip(_LEFT)) :], right[1]))
            at = right.end()
    return found
