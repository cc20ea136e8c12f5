"""tasks.kind=qa: questions and answers of a user's own, with any tools.

Rows with the columns question, answer and, where there is one, id; tasks.fields says what they are called. An answer is a text, a number,
or a list of those, any of which is right. All columns are there for tools and score functions: Question.fields.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import NamedTuple

from swirl_fast.config import ConfigError, TasksConfig
from swirl_fast.config.references import is_reference
from swirl_fast.tasks.own import own_score
from swirl_fast.tasks.rows import Row, gold_answers, plain_name, question_id, read_splits
from swirl_fast.tasks.scoring import score_auto, score_exact, score_f1, score_number
from swirl_fast.tasks.task import Question, Score, Split, TaskDefaults
from swirl_fast.tools.characters import same_text

COLUMNS = ("question", "answer", "id")
_SCORES: dict[str, Callable[[str | None, Sequence[str]], Score]] = {
    "auto": score_auto,
    "exact": score_exact,
    "number": score_number,
    "f1": score_f1,
}


class _Asked(NamedTuple):
    """A row. same: equal for texts that look the same."""

    row: Row
    text: str
    same: str
    answers: tuple[str, ...]


class QA(TaskDefaults):
    """Without tasks.eval_path the last tenth of the rows is held out. A training question that is also held out is left out, and of equal
    questions the first stays; they are equal where their texts are, unless both their answers and their other columns differ.

    notes: how many were left out."""

    def __init__(self, config: TasksConfig, seed: int = 0) -> None:
        if unknown := sorted(set(config.fields) - set(COLUMNS)):
            raise ConfigError(
                f"tasks.fields.{unknown[0]}: must be one of {', '.join(COLUMNS)}; other columns need no name here"
            )
        self.notes: list[str] = []
        self.name = config.name or plain_name(config.path or "", "qa")
        self._columns = {name: config.fields.get(name, name) for name in COLUMNS}
        self._needs_id = "id" in config.fields
        self._own = own_score(config.score) if is_reference(config.score) else None
        self._score = None if self._own else _SCORES[config.score]
        splits = read_splits(config.path, config.eval_path, hub=("default", "test"))
        asked = {split: [self._asked(row, config.score) for row in rows] for split, rows in splits.items()}
        self._templates = self._find_templates([*asked["train"], *asked["eval"]])
        held_out = self._questions_of(asked["eval"], set())
        self.held_out = frozenset(one.same for one in asked["eval"] if one.same not in self._templates)
        train = self._questions_of(asked["train"], {self._key(one) for one in asked["eval"]})
        train = train[config.skip :][: config.limit or None]
        self._questions = {"train": train, "eval": held_out[: config.eval_limit or None]}

    def _asked(self, row: Row, score: str) -> _Asked:
        text, answers = self._column(row, "question", row.text), self._answers(row)
        if score == "number" and (
            wrong := [answer for answer in answers if not score_number(answer, [answer]).exact_match]
        ):
            raise row.error(
                self._columns["answer"],
                f"tasks.score=number needs one number, and {wrong[0]!r} is none; write one such as 1200 or 3/4",
            )
        return _Asked(row, text, same_text(text), answers)

    def _find_templates(self, asked: list[_Asked]) -> set[str]:
        """Texts that are asked of several things, which other columns say: their rows differ in those and in their answers."""
        rows: dict[str, list[_Asked]] = {}
        for one in asked:
            rows.setdefault(one.same, []).append(one)
        several = {same: found for same, found in rows.items() if len(found) > 1}
        return {
            same
            for same, found in several.items()
            if len({self._others(one) for one in found}) > 1
            and (self._own or len({frozenset(one.answers) for one in found}) > 1)
        }

    def _others(self, one: _Asked) -> str:
        """The columns that tools and score functions see beside the question, as a text."""
        named = set(self._columns.values())
        others = {str(name): value for name, value in one.row.fields.items() if name not in named}
        return json.dumps(others, sort_keys=True, default=str)

    def _key(self, one: _Asked) -> str:
        return f"{one.same}\n{self._others(one)}" if one.same in self._templates else one.same

    def _questions_of(self, asked: list[_Asked], held_out: set[str]) -> list[Question]:
        found: dict[str, Question] = {}
        first: dict[str, _Asked] = {}
        again = kept_out = 0
        for one in asked:
            key = self._key(one)
            if key in held_out:
                kept_out += 1
                continue
            if (same := first.setdefault(key, one)) is not one:
                if set(same.answers) != set(one.answers):
                    raise one.row.error(
                        self._columns["answer"],
                        f"{same.row.where} asks the same and has another answer; give all right answers as a list in one row, or "
                        "leave one of the rows out",
                    )
                again += 1
                continue
            id_ = self._id(one.row, key if one.same in self._templates else one.text)
            if id_ in found:
                raise one.row.error(self._columns["id"], "an earlier row has the same id")
            found[id_] = Question(id_, self.name, one.text, one.answers, one.row.fields)
        if again:
            self.notes.append(f"{again} rows of {self.name} ask what an earlier one asks, and are left out")
        if kept_out:
            self.notes.append(f"{kept_out} rows of {self.name} ask what is held out, and are left out")
        return list(found.values())

    def _column(self, row: Row, name: str, read: Callable[[str], str]) -> str:
        column = self._columns[name]
        if column not in row.fields:
            raise ValueError(
                f"{row.head or row.where}: there is no column {column!r}, only {', '.join(map(str, row.fields)) or 'none'}; say which "
                f"holds the {name}: tasks.fields={{{name}: COLUMN}}"
            )
        return read(column)

    def _id(self, row: Row, text: str) -> str:
        column = self._columns["id"]
        if column not in row.fields and not self._needs_id:
            return question_id(self.name, text)
        value = row.fields.get(column)
        if isinstance(value, bool) or not isinstance(value, str | int) or not str(value).strip() or "/" in str(value):
            raise row.error(column, "must be an id: text or a whole number, without a slash")
        return f"{self.name}-{str(value).strip()}"

    def _answers(self, row: Row) -> tuple[str, ...]:
        column = self._columns["answer"]
        if column not in row.fields and self._own:
            return ()
        self._column(row, "answer", str)
        answers = gold_answers(row.fields[column])
        if answers is None:
            raise row.error(column, "must be a text, a number, or a list of those")
        return answers

    def questions(self, split: Split) -> Sequence[Question]:
        return self._questions[split]

    def score(self, question: Question, answer: str | None) -> Score:
        if self._own:
            return self._own(question, answer)
        assert self._score is not None, "either of them"
        return self._score(answer, question.answers)
