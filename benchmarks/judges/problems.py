"""Problems for the calculator: sums of reasoning-gym, whose expression is stated, and word problems of our own templates, whose
calculation is known."""

from __future__ import annotations

import functools
import random
import re
from typing import NamedTuple

import reasoning_gym

from benchmarks.judges.steps import call
from swirl_fast.tools.arithmetic import CalculationError, evaluate, render_value
from swirl_fast.tools.tool import observation

NAMES = ("Amira", "Bruno", "Chen", "Dalia", "Emeka", "Freya")
# question, first calculation, the calculation that joins its result r with the rest
WORDS = (
    ("{n} buys {a} boxes with {b} pencils each and {c} loose pencils. How many pencils is that?", "{a}*{b}", "{r}+{c}"),
    (
        "A baker bakes {a} loaves a morning on {b} mornings and sells {c}. How many loaves are left?",
        "{a}*{b}",
        "{r}-{c}",
    ),
    ("Each of {c} crates holds {a} red and {b} green apples. How many apples are there?", "{a}+{b}", "{r}*{c}"),
    ("{n} rides {a} km to a lake and {b} km back by a detour, on {c} tours. How many km in all?", "{a}+{b}", "{r}*{c}"),
    (
        "{n} reads {a} pages an evening. After {b} evenings {c} pages are left. How long is the book?",
        "{a}*{b}",
        "{r}+{c}",
    ),
    ("{n} saves ${a} and ${b}, and then buys a lamp for ${c}. How many dollars remain?", "{a}+{b}", "{r}-{c}"),
    ("A hall has {a} rows of {b} seats; {c} seats are broken. How many can be used?", "{a}*{b}", "{r}-{c}"),
    ("{a} adults and {b} children each pay ${c} for the boat. How much do they pay?", "{a}+{b}", "{r}*{c}"),
)
# question, calculation: with a number word, a share, or a fact of the world
SPOKEN = (
    ("{n} picks {a} plums, and {m} picks twice as many. How many plums do they have?", "{a}+2*{a}"),
    ("A shirt costs ${a}, and today half of that. What is today's price in dollars?", "{a}/2"),
    ("{n} buys three bags with {a} marbles each. How many marbles?", "3*{a}"),
    ("A phone of ${a} is 20% cheaper this week. How many dollars does it cost?", "{a}*(1-20/100)"),
    ("Of {a} guests 25% are children. How many children?", "{a}*25/100"),
    ("{n} plants five rows of {a} onions and {b} leeks. How many plants?", "5*{a}+{b}"),
    ("A cook uses a dozen eggs a cake and bakes {a} cakes. How many eggs?", "12*{a}"),
    ("A quarter of the {a} lamps are off. How many lamps are off?", "{a}/4"),
)
FACTS = (
    ("A ward uses {a} liters of milk every day. How many liters does it use in March?", "{a}*31"),
    ("{n} has {a} quarters and {b} dimes. How many cents is that?", "{a}*25+{b}*10"),
    ("How many ounces are {a} pounds and {b} ounces?", "{a}*16+{b}"),
    ("A farmer has {a} cows and {b} hens. How many legs do they have?", "{a}*4+{b}*2"),
    ("{n} keeps {a} spiders. How many legs is that?", "{a}*8"),
    ("Each side of a hexagonal garden is {a} meters long. How long is the fence around it?", "{a}*6"),
    ("How many seconds are {a} minutes and {b} seconds?", "{a}*60+{b}"),
    ("A sack holds {a} kilograms of flour, of which {b} grams are used. How many grams are left?", "{a}*1000-{b}"),
    ("How many days are {a} weeks and {b} days?", "{a}*7+{b}"),
    ("{n} puts {a} grains on each square of a chessboard. How many grains?", "{a}*64"),
    ("How many cards are in {a} decks of playing cards without jokers?", "{a}*52"),
    ("{n} walks {a} kilometers and {b} meters. How many meters is that?", "{a}*1000+{b}"),
)
IDLE = (
    "{n} is {d} years old.",
    "It is the {d}th day of the fair.",
    "The bus of line {d} is late again.",
    "{n} lives in house number {d}.",
)
MADE_UP = (37, 43, 59, 67, 71, 83, 89, 97)  # no number word, unit or constant stands for these


class Sum(NamedTuple):
    """A stated chain: numbers and the operators between them."""

    question: str
    numbers: tuple[int, ...]
    operators: tuple[str, ...]

    @property
    def whole(self) -> str:
        return chain(self.numbers, self.operators)

    @property
    def first(self) -> str:
        """The part with the first two numbers."""
        return chain(self.numbers[:2], self.operators[:1])

    @property
    def rest(self) -> str:
        """What is left to do with the result of `first`."""
        return chain((value(self.first), *self.numbers[2:]), self.operators[1:])


class Problem(NamedTuple):
    question: str
    first: str
    rest: str
    whole: str
    numbers: tuple[int, ...]


def chain(numbers: tuple[object, ...], operators: tuple[str, ...]) -> str:
    return " ".join([str(numbers[0])] + [f"{o} {n}" for o, n in zip(operators, numbers[1:], strict=True)])


def value(expression: str) -> str:
    """As the calculator shows it, a whole number without `.0`."""
    return render_value(evaluate(expression)).removesuffix(".0")


def turn(expression: str) -> tuple[str, str]:
    """A call and what the calculator answers."""
    try:
        result = render_value(evaluate(expression))
    except CalculationError as error:
        result = f"ERROR: {error}"
    return call("math_exp", expression), observation(expression, result)


@functools.cache
def sums() -> list[Sum]:
    """Chains of different numbers whose partial results are numbers of their own."""
    chains = []
    for item in reasoning_gym.create_dataset("chain_sum", seed=5, size=800, min_digits=2, min_terms=3, max_terms=4):
        expression = item["metadata"]["expression"]
        numbers = tuple(map(int, re.findall(r"\d+", expression)))
        stated = Sum(item["question"], numbers, tuple(re.findall(r"[-+]", expression)))
        results = {abs(int(value(stated.first))), abs(int(value(stated.whole)))}
        if len({*numbers} | results | {0, 1, 2, 100}) == len(numbers) + 6 and stated.whole == expression:
            chains.append(stated)
    return chains


def draw_sum(rng: random.Random) -> Sum:
    return rng.choice(sums())


def draw_problem(rng: random.Random, templates: tuple[tuple[str, str, str], ...] = WORDS) -> Problem:
    """A word problem with whole positive results that differ from its numbers."""
    while True:
        a, b, c = rng.randint(6, 29), rng.randint(6, 29), rng.randint(6, 29)
        text, first, rest = rng.choice(templates)
        fill = {"n": rng.choice(NAMES), "a": a, "b": b, "c": c}
        part = first.format(**fill)
        r = value(part)
        joined = rest.format(r=r, **fill)
        if len({a, b, c, int(r), int(value(joined))} - {12, 20, 24, 7}) == 5 and int(value(joined)) > 2:
            whole = rest.format(r=f"({part})", **fill)
            return Problem(text.format(**fill), part, joined, whole, (a, b, c))


def draw_simple_problem(rng: random.Random, templates: tuple[tuple[str, str], ...]) -> tuple[str, str]:
    """(question, its calculation) of a problem that is done in one step."""
    text, expression = rng.choice(templates)
    fill = {
        "n": rng.choice(NAMES[:3]),
        "m": rng.choice(NAMES[3:]),
        "a": 4 * rng.randint(8, 24),
        "b": rng.randint(13, 19),
    }
    return text.format(**fill), expression.format(**fill)


def swapped(expression: str) -> str:
    """The first operator exchanged for one that the question does not ask for."""
    return re.sub(r"[-+*/]", lambda m: {"+": "*", "-": "+", "*": "+", "/": "*"}[m[0]], expression, count=1)
