"""Tasks and score functions of a user's own, by reference.

A task is a class that is made with (config, seed), the settings tasks.* and run.seed, or with nothing. It has

    name: str
    questions(split) -> Question objects, or tables {"question": …, "answer": …, "id": …}; split is "train" or "eval"

and, if it wants, tools, examples, instructions, passages(), score(question, answer), solution(question), demonstration(question).
A score is a number in [0, 1], true or false, or a Score.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

from swirl_fast.config import ConfigError, TasksConfig
from swirl_fast.config.references import absolute, load, running
from swirl_fast.config.schema import SCORES, TASKS
from swirl_fast.tasks.rows import gold_answers, question_id
from swirl_fast.tasks.scoring import ZERO, score_auto
from swirl_fast.tasks.task import Example, Question, Score, Split
from swirl_fast.tools.characters import same_text, whole_characters, whole_values


class OwnTask:
    """Adds what a user's class leaves out. Raises ConfigError for what it must have and forgets."""

    notes: Sequence[str] = ()

    def __init__(self, config: TasksConfig, seed: int) -> None:
        self._reference = config.kind
        made = load("tasks.kind", config.kind, TASKS)
        if not inspect.isclass(made):
            raise self._error("must be a class")
        self._task = self._made(made, config, seed)
        lacks = [] if isinstance(getattr(self._task, "name", None), str) and self._task.name else ["name"]
        lacks += [] if callable(getattr(self._task, "questions", None)) else ["questions"]
        if lacks:
            raise self._error(f"lacks {' and '.join(lacks)}: a task has a name and questions(split)")
        self.name: str = self._task.name
        if "/" in self.name:
            raise self._error(f"its name {self.name!r} must not contain a slash")
        self.tools = self._tools()
        self.examples: tuple[Example, ...] = tuple(getattr(self._task, "examples", ()))
        if not all(isinstance(example, Example) for example in self.examples):
            raise self._error(
                "examples must be Example objects (swirl_fast.tasks.task); tasks.worked_examples reads a file"
            )
        self.instructions: str = getattr(self._task, "instructions", "")
        self._own_score = (
            _checked_score(f"tasks.kind={self._reference}", self._task.score) if hasattr(self._task, "score") else None
        )
        held_out = self._read("eval", config.eval_limit, set())
        self.held_out = frozenset(same_text(question.text) for question in held_out)
        train = self._read("train", config.limit and config.skip + config.limit, set(self.held_out))[config.skip :]
        self._questions: dict[Split, list[Question]] = {"train": train, "eval": held_out}

    def _made(self, made: type, config: TasksConfig, seed: int) -> Any:
        for arguments in ((config, seed), ()):
            try:
                inspect.signature(made).bind(*arguments)
            except (TypeError, ValueError):
                continue
            with running("tasks.kind", self._reference, "making it"):
                return made(*arguments)
        raise self._error("the class must be made with (config, seed), or without arguments")

    def _tools(self) -> tuple[str, ...]:
        """FILE.py of a tool is looked for beside the file of the task."""
        names = getattr(self._task, "tools", ())
        if isinstance(names, str) or not all(isinstance(name, str) for name in names):
            raise self._error('tools must be a list of names, such as ("calculator", "mine.py:convert")')
        folder = Path(self._reference.rpartition(":")[0]).parent
        return tuple(absolute(name, folder) for name in names)

    def _read(self, split: Split, limit: int, held_out: set[str]) -> list[Question]:
        found: dict[str, Question] = {}
        with running("tasks.kind", self._reference, f"questions({split!r})"):
            for place, given in enumerate(self._task.questions(split)):
                question = self._question(given, f"{split} question {place}")
                if same_text(question.text) in held_out:
                    continue
                if question.id in found:
                    raise self._error(f"two {split} questions have the id {question.id!r}")
                found[question.id] = question
                if len(found) == limit:  # 0: all
                    break
        if not found:
            raise self._error(f"questions({split!r}) gives none" + (" that is not held out too" if held_out else ""))
        return list(found.values())

    def _question(self, given: Any, place: str) -> Question:
        if isinstance(given, Mapping):
            given = dict(whole_values(dict(given)))  # type: ignore[call-overload]
            text, answer = given.get("question"), given.get("answer", [])
            answers = () if answer in ([], ()) else gold_answers(list(answer) if isinstance(answer, tuple) else answer)
            if answers is None:
                raise self._error(f"{place}: its `answer` {answer!r:.80} must be a text, a number, or a list of those")
            if not isinstance(text, str) or not text.strip():
                raise self._error(
                    f"{place}: must have a text `question`, and has {', '.join(map(str, given)) or 'nothing'}"
                )
            id_ = str(given["id"]) if "id" in given else question_id(self.name, text)
            given = Question(id_, self.name, text, answers, dict(given))
        if not isinstance(given, Question):
            raise self._error(f"{place}: must be a Question or a table, not {type(given).__name__}")
        if given.task != self.name:
            raise self._error(f"{place}: is of the task {given.task!r}; use the task's own name")
        if "/" in given.id:
            raise self._error(f"{place}: its id {given.id!r} must not contain a slash")
        text = whole_characters(given.text)
        return given if text == given.text else replace(given, text=text)

    def _error(self, remedy: str) -> ConfigError:
        return ConfigError(f"tasks.kind={self._reference}: {remedy}")

    def questions(self, split: Split) -> Sequence[Question]:
        return self._questions[split]

    def solution(self, question: Question) -> tuple[Fraction, ...]:
        return tuple(self._task.solution(question)) if hasattr(self._task, "solution") else ()

    def demonstration(self, question: Question) -> tuple[str, ...]:
        return tuple(self._task.demonstration(question)) if hasattr(self._task, "demonstration") else ()

    def passages(self) -> Sequence[tuple[str, str]]:
        if not hasattr(self._task, "passages"):
            return ()
        return [(whole_characters(title), whole_characters(text)) for title, text in self._task.passages()]

    def score(self, question: Question, answer: str | None) -> Score:
        return self._own_score(question, answer) if self._own_score else score_auto(answer, question.answers)


def own_score(reference: str) -> Callable[[Question, str | None], Score]:
    """The score function of a reference. Raises ConfigError."""
    return _checked_score(f"tasks.score={reference}", load("tasks.score", reference, SCORES))


def _checked_score(setting: str, function: Any) -> Callable[[Question, str | None], Score]:
    """What is called where there is an answer; none is worth nothing. Raises ConfigError where the function cannot be called so, and,
    when it is called, ValueError for what it raises and for a result that is no score."""
    try:
        inspect.signature(function).bind(None, None)
    except (TypeError, ValueError):
        raise ConfigError(
            f"{setting}: must be a function of (question, answer) that gives a number in [0, 1]"
        ) from None

    def score(question: Question, answer: str | None) -> Score:
        if answer is None:
            return ZERO
        place = f"{setting}: for question {question.id} and the answer {answer[:80]!r}"
        try:
            found = function(question, answer)
            value = found if isinstance(found, Score) else float(found) if not isinstance(found, str) else math.nan
        except Exception as error:  # whatever a stranger's function raises
            raise ValueError(f"{place} it raised {type(error).__name__}: {error}") from error
        if isinstance(value, Score):
            return value
        if not 0 <= value <= 1:
            raise ValueError(f"{place} it gave {found!r}; it must give a number in [0, 1], true or false")
        return Score.of(value)

    return score
