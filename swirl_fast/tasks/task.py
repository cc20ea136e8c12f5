"""The protocol of a task: questions with gold answers, the tools on offer, worked examples and a score."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, Literal, Protocol

Split = Literal["train", "eval"]
SHOWN_TASKS = (
    16  # with more of them, as logs whose conversations all have tools of their own, no numbers of each are shown
)


@dataclass(frozen=True)
class Question:
    """answers: gold answers, any of which is right. Gold answers never reach a process judge or the policy. fields: the row that the
    question was read from, for tools and score functions of a user's own."""

    id: str
    task: str
    text: str
    answers: tuple[str, ...]
    fields: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)


@dataclass(frozen=True)
class Score:
    """exact_match, f1, precision and recall in [0, 1]; where an answer is a number, all four are equal. graded: what the answer is worth
    where that is not exact_match."""

    exact_match: float
    f1: float
    precision: float
    recall: float
    graded: float | None = None

    @property
    def reward(self) -> float:
        """What training and filter go by, in [0, 1]."""
        return self.exact_match if self.graded is None else self.graded

    @classmethod
    def of(cls, value: float) -> Score:
        """An answer that is worth `value` and has no words to count."""
        return cls(value, value, value, value)


@dataclass(frozen=True)
class Example:
    """A worked example, shown as earlier turns of the conversation.

    actions: texts of the model's turns, the last with an answer tag. observations: one full observation (`QUERY -> RESULT`)
    between each two of them.
    """

    question: str
    actions: tuple[str, ...]
    observations: tuple[str, ...]


class TaskDefaults:
    """What a task has where it says nothing else."""

    tools: tuple[str, ...] = ()
    examples: tuple[Example, ...] = ()
    instructions = ""
    held_out: frozenset[str] = frozenset()
    notes: Sequence[str] = ()

    def passages(self) -> Sequence[tuple[str, str]]:
        return ()

    def solution(self, question: Question) -> tuple[Fraction, ...]:
        return ()

    def demonstration(self, question: Question) -> tuple[str, ...]:
        return ()


class Task(Protocol):
    name: str
    tools: tuple[str, ...]  # on offer: names of built-in ones, references to others
    examples: tuple[Example, ...]  # worked examples, best first
    instructions: str  # in place of the built-in system message; empty: that one
    held_out: frozenset[str]  # `same_text` of all questions that are held out, also where tasks.eval_limit asks fewer

    @property
    def notes(self) -> Sequence[str]:
        """What was left out, in sentences."""
        ...

    def questions(self, split: Split) -> Sequence[Question]:
        """The questions of a split, in a fixed order. Raises ValueError naming file, line and field for a malformed row."""
        ...

    def passages(self) -> Sequence[tuple[str, str]]:
        """(title, text) of every passage of all splits, in a fixed order, without duplicates; empty for tasks without search."""
        ...

    def solution(self, question: Question) -> tuple[Fraction, ...]:
        """The results of the steps of its worked solution, the answer last; empty where there is none. For the reference judge."""
        ...

    def demonstration(self, question: Question) -> tuple[str, ...]:
        """Calculations that lead to the answer, in order; empty where no worked solution gives them. For demonstrations."""
        ...

    def score(self, question: Question, answer: str | None) -> Score:
        """Zero for None. Never raises, whatever the answer."""
        ...
