"""Generated word problems of two operations, with a calculator: of the kinds that MultiArith has (Roy and Roth 2015, arXiv 1608.01413), in
our own words. Every question needs all three of its numbers, and both operations have whole, positive results.

The splits are disjoint whatever the limits and the seed, as reasoning_gym's are: a question's own text decides which may have it.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction

from swirl_fast.config import ConfigError, TasksConfig
from swirl_fast.tasks.gsm8k import WORD_PROBLEMS
from swirl_fast.tasks.rows import question_id, side_of
from swirl_fast.tasks.scoring import score_number
from swirl_fast.tasks.task import Example, Question, Score, Split, TaskDefaults
from swirl_fast.tools.arithmetic import evaluate
from swirl_fast.tools.characters import same_text

NAMES = (
    "Ada Bruno Chloe Dev Elif Farid Greta Hugo Ines Jonas Kofi Lena Mina Noor Oskar Priya Ravi Sofia Tomas Yara".split()
)
ITEMS = (
    "apples beads books buttons cards coins cookies flowers marbles pencils photos shells stamps stickers toys".split()
)
_PATIENCE = 10_000  # draws without a new question after which there are no more


Numbers = Callable[[random.Random], tuple[int, int, int]]  # the a, b and c of a text


@dataclass(frozen=True)
class Template:
    """text: with {name}, {friend}, {items}, {a}, {b}, {c}. steps: both calculations, the second with {r} for the result of the first."""

    text: str
    steps: tuple[str, str]
    numbers: Numbers


def _times(draw: random.Random) -> tuple[int, int, int]:
    """a * b, and c less than that."""
    a, b = draw.randint(2, 12), draw.randint(3, 12)
    return a, b, draw.randint(2, a * b - 1)


def _shared(draw: random.Random) -> tuple[int, int, int]:
    """a - b is several times c."""
    b, c = draw.randint(2, 40), draw.randint(2, 12)
    return b + c * draw.randint(2, 12), b, c


def _together(draw: random.Random) -> tuple[int, int, int]:
    """a + b is several times c."""
    c = draw.randint(2, 12)
    whole = c * draw.randint(3, 12)
    a = draw.randint(1, whole - 1)
    return a, whole - a, c


def _falling(draw: random.Random) -> tuple[int, int, int]:
    """a is more than b, by whatever number; c is any."""
    b = draw.randint(2, 50)
    return b + draw.randint(2, 50), b, draw.randint(2, 50)


def _parts(draw: random.Random) -> tuple[int, int, int]:
    """a is several times b, and c less than a / b."""
    b, each = draw.randint(2, 12), draw.randint(4, 20)
    return b * each, b, draw.randint(2, each - 1)


def _lawns(draw: random.Random) -> tuple[int, int, int]:
    """a is more than b; all are small."""
    b = draw.randint(2, 9)
    return b + draw.randint(2, 12), b, draw.randint(2, 15)


def _small(draw: random.Random) -> tuple[int, int, int]:
    return draw.randint(2, 15), draw.randint(2, 15), draw.randint(2, 12)


TEMPLATES = (
    Template(
        "{name} had {a} {items}. {friend} gave {name} {c} more, but before that {name} had lost {b} of them. How many {items} does {name} "
        "have now?",
        ("{a} - {b}", "{r} + {c}"),
        _falling,
    ),
    Template(
        "{a} people were on a bus. At the next stop {b} of them got off and {c} others got on. How many people are on the bus now?",
        ("{a} - {b}", "{r} + {c}"),
        _falling,
    ),
    Template(
        "{name} bought {a} boxes of {items} with {b} {items} in each box, and gave {c} {items} to {friend}. How many {items} does {name} "
        "have left?",
        ("{a} * {b}", "{r} - {c}"),
        _times,
    ),
    Template(
        "{name} put {b} {items} on each page of an album and filled {a} pages. Then {friend} brought {c} more {items}. How many {items} "
        "are there in all?",
        ("{a} * {b}", "{r} + {c}"),
        _times,
    ),
    Template(
        "A shop had {a} {items}. It sold {b} of them and packed the rest into bags of {c}. How many bags did it fill?",
        ("{a} - {b}", "{r} / {c}"),
        _shared,
    ),
    Template(
        "{name} had {a} dollars and spent {b} on a ticket. With the rest {name} buys {items} at {c} dollars each. How many is that?",
        ("{a} - {b}", "{r} / {c}"),
        _shared,
    ),
    Template(
        "{name} found {a} {items} and {friend} found {b}. They shared all of them equally among {c} children. How many did each child get?",
        ("{a} + {b}", "{r} / {c}"),
        _together,
    ),
    Template(
        "A baker made {a} rolls in the morning and {b} in the afternoon, and put them on trays of {c}. How many trays were needed?",
        ("{a} + {b}", "{r} / {c}"),
        _together,
    ),
    Template(
        "{name} earns {c} dollars for each lawn. There were {a} lawns to mow, but {name} forgot {b} of them. How much did {name} earn?",
        ("{a} - {b}", "{r} * {c}"),
        _lawns,
    ),
    Template(
        "{name} sold {a} red and {b} blue {items} for {c} dollars each. How many dollars did {name} get?",
        ("{a} + {b}", "{r} * {c}"),
        _small,
    ),
    Template(
        "{name} shared {a} {items} equally among {b} friends. One of them, {friend}, gave {c} away. How many does {friend} have left?",
        ("{a} / {b}", "{r} - {c}"),
        _parts,
    ),
    Template(
        "{a} {items} were put into {b} equal rows. Then {c} more were added to the first row. How many are in the first row now?",
        ("{a} / {b}", "{r} + {c}"),
        _parts,
    ),
)


class TwoStep(TaskDefaults):
    """Raises ConfigError for an unlimited number of questions, more than there are, and options."""

    name = "two_step"
    tools: tuple[str, ...] = ("calculator",)
    examples: tuple[Example, ...] = WORD_PROBLEMS

    def __init__(self, config: TasksConfig, seed: int) -> None:
        if config.options:
            raise ConfigError(
                f"tasks.options={config.options}: two_step has none; tasks.options={{}} drops those of another task"
            )
        self._steps: dict[str, tuple[str, str]] = {}  # question id -> its calculations
        self._questions: dict[Split, list[Question]] = {
            "train": self._draw("train", seed, "tasks.limit", config.limit, config.skip),
            "eval": self._draw("eval", seed, "tasks.eval_limit", config.eval_limit),
        }
        self.held_out = frozenset(same_text(question.text) for question in self._questions["eval"])

    def _draw(self, split: Split, seed: int, key: str, limit: int, skip: int = 0) -> list[Question]:
        if limit < 1:
            raise ConfigError(f"{key}={limit}: a generator has no end; say how many questions")
        draw = random.Random(f"{self.name}/{split}/{seed}")
        found: dict[str, Question] = {}
        idle = 0
        while idle < _PATIENCE:
            text, steps = written(draw)
            idle += 1
            if text in found or side_of(text) != split:
                continue
            idle = 0
            question = Question(question_id(self.name, text), self.name, text, (str(evaluate(steps[1])),))
            found[text] = question
            self._steps[question.id] = steps
            if len(found) == skip + limit:
                return list(found.values())[skip:]
        raise ConfigError(
            f"{key}={limit}: {self.name} has only {len(found)} different questions for this split; ask for fewer"
        )

    def questions(self, split: Split) -> Sequence[Question]:
        return self._questions[split]

    def solution(self, question: Question) -> tuple[Fraction, ...]:
        return tuple(evaluate(step) for step in self._steps[question.id])

    def demonstration(self, question: Question) -> tuple[str, ...]:
        return self._steps[question.id]

    def score(self, question: Question, answer: str | None) -> Score:
        return score_number(answer, question.answers)


def written(draw: random.Random) -> tuple[str, tuple[str, str]]:
    """A question and its two calculations."""
    template = draw.choice(TEMPLATES)
    name, friend = draw.sample(NAMES, 2)
    a, b, c = template.numbers(draw)
    values = {"name": name, "friend": friend, "items": draw.choice(ITEMS), "a": a, "b": b, "c": c}
    first = template.steps[0].format(**values)
    return template.text.format(**values), (first, template.steps[1].format(r=evaluate(first), **values))
