"""Generated questions with numeric answers and a calculator, from the package reasoning-gym.

Any of its generators will do whose answers are numbers (chain_sum, basic_arithmetic, gsm_symbolic, leg_counting, …).
The splits are drawn from different seeds, and a question's own text decides which split may have it: so they are
disjoint whatever the limits, the seed and the size of the generator's space, and an evaluation with another seed never
meets a training question either.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import re
from collections.abc import Iterator, Sequence
from decimal import Decimal
from fractions import Fraction
from typing import Any

from swirl_fast.config import ConfigError, TasksConfig
from swirl_fast.tasks.gsm8k import WORD_PROBLEMS, worked
from swirl_fast.tasks.rows import question_id, side_of
from swirl_fast.tasks.scoring import ZERO, number, score_number
from swirl_fast.tasks.solutions import step_expressions, step_results
from swirl_fast.tasks.task import Example, Question, Score, Split, TaskDefaults
from swirl_fast.tools.arithmetic import CalculationError, evaluate, render_value
from swirl_fast.tools.characters import same_text
from swirl_fast.tools.numerals import numbers

_CHUNK = 256  # questions drawn from one seed of the generator
_PATIENCE = 10  # chunks without a new question after which the generator counts as exhausted
_ANSWER = re.compile(r"-?(0|[1-9][0-9,]*)(\.[0-9]+)?(e[+-]?[0-9]+)?|-?[1-9][0-9]*/[1-9][0-9]*", re.IGNORECASE)
_ROUNDED = (
    "decimal_arithmetic",
    "power_function",
)  # these ask for rounded answers: their own scorers tell which are right


class ReasoningGym(TaskDefaults):
    """dataset: the generator's name; options: its settings, as reasoning-gym names them.

    Its seed and size are not options: they are run.seed and tasks.limit. Questions are kept as they are generated,
    without duplicates.

    The worked examples come from the same generator when it states the expression behind a question, and are then in
    no split; otherwise they are word problems.

    Raises ConfigError for an unknown dataset or option, a dataset whose answers are not numbers, an unlimited number
    of questions, or more questions than the generator has.
    """

    tools: tuple[str, ...] = ("calculator",)

    def __init__(self, config: TasksConfig, seed: int) -> None:
        self.name = config.dataset
        self._options = config.options
        self._check_options()
        self._scorer = self._generator(0)
        self._entries: dict[
            str, dict[str, Any]
        ] = {}  # question id -> what the generator said, where its scorer is needed
        self._solutions: dict[str, str] = {}  # question id -> worked solution, where the generator gives one
        self.examples = self._worked_examples()
        shown = {example.question for example in self.examples}
        self._questions: dict[Split, list[Question]] = {
            "train": self._draw("train", seed, "tasks.limit", config.limit, shown, config.skip),
            "eval": self._draw("eval", seed, "tasks.eval_limit", config.eval_limit, shown),
        }
        self.held_out = frozenset(same_text(question.text) for question in self._questions["eval"])

    def _check_options(self) -> None:
        try:
            from reasoning_gym.factory import DATASETS
        except ModuleNotFoundError as error:
            raise ConfigError(f"tasks.kind=reasoning_gym: {error}; pip install reasoning-gym") from None
        if self.name not in DATASETS:
            close = difflib.get_close_matches(self.name, DATASETS, n=3, cutoff=0.4)
            hint = f"did you mean {' or '.join(close)}?" if close else "chain_sum and gsm_symbolic are two of them"
            raise ConfigError(f"tasks.dataset={self.name}: reasoning-gym has no such dataset; {hint}")
        accepted = [
            field.name for field in dataclasses.fields(DATASETS[self.name][1]) if field.name not in ("seed", "size")
        ]
        for option in self._options:
            if option in ("seed", "size"):
                remedy = "set run.seed" if option == "seed" else "set tasks.limit and tasks.eval_limit"
                raise ConfigError(f"tasks.options.{option}={self._options[option]}: not an option here; {remedy}")
            if option not in accepted:
                raise ConfigError(
                    f"tasks.options.{option}={self._options[option]}: {self.name} has no such option; "
                    f"it accepts {', '.join(accepted)}; tasks.options={{}} drops those of another dataset"
                )

    def _generator(self, seed: int) -> Any:
        from reasoning_gym.factory import create_dataset

        try:
            return create_dataset(self.name, seed=seed, size=_CHUNK, **self._options)
        except Exception as error:  # the generators check with asserts, and fail as they may on a wrong type
            raise ConfigError(f"tasks.options={self._options}: refused by {self.name}: {error}") from error

    def _entries_of(self, *key: object) -> Iterator[dict[str, Any]]:
        digest = hashlib.sha256("/".join(map(str, (self.name, *key))).encode()).digest()
        generator = self._generator(int.from_bytes(digest[:4]))
        for i in range(_CHUNK):
            try:
                entry = generator[i]
            except Exception as error:
                raise ConfigError(f"tasks.options={self._options}: {self.name} fails with them: {error!r}") from error
            answer = str(entry["answer"])
            if not _ANSWER.fullmatch(answer) or number(answer) is None:
                raise ConfigError(
                    f"tasks.dataset={self.name}: its answers are not all numbers ({answer[:40]!r}); "
                    "choose one whose are, e.g. chain_sum"
                )
            yield entry

    def _draw(self, split: Split, seed: int, key: str, limit: int, shown: set[str], skip: int = 0) -> list[Question]:
        if limit < 1:
            raise ConfigError(f"{key}={limit}: a generator has no end; say how many questions")
        questions: dict[str, Question] = {}
        chunk = idle = 0
        while idle < _PATIENCE:
            before = len(questions)
            for entry in self._entries_of(split, seed, chunk):
                text = entry["question"]
                if text in questions or text in shown or side_of(text) != split:
                    continue
                questions[text] = Question(question_id(self.name, text), self.name, text, (str(entry["answer"]),))
                worked_out = entry["metadata"].get("answer_cot")
                if isinstance(worked_out, str):
                    self._solutions[questions[text].id] = worked_out
                if self.name in _ROUNDED:
                    self._entries[questions[text].id] = entry
                if len(questions) == skip + limit:
                    return list(questions.values())[skip:]
            chunk += 1
            idle = idle + 1 if len(questions) == before else 0
        raise ConfigError(
            f"{key}={limit}: {self.name} has only {len(questions)} different questions for this split; "
            "ask for fewer, or widen tasks.options"
        )

    def _worked_examples(self) -> tuple[Example, ...]:
        candidates = []
        for entry in self._entries_of("examples"):
            expression = entry["metadata"].get("expression")
            try:
                value = evaluate(expression) if isinstance(expression, str) else None
            except CalculationError:
                value = None
            if value is None or value != number(str(entry["answer"])):
                return WORD_PROBLEMS
            candidates.append((entry["question"], expression, render_value(value), str(entry["answer"])))
            if len(candidates) == 16:
                break
        # one operator teaches little: three numbers or more come first
        candidates.sort(key=lambda candidate: len(numbers(candidate[1])) < 3)
        return tuple(worked(*candidate) for candidate in dict.fromkeys(candidates[:3]))

    def questions(self, split: Split) -> Sequence[Question]:
        return self._questions[split]

    def solution(self, question: Question) -> tuple[Fraction, ...]:
        solution = self._solutions.get(question.id)
        return step_results(solution, question.answers[0]) if solution else ()

    def demonstration(self, question: Question) -> tuple[str, ...]:
        solution = self._solutions.get(question.id)
        return step_expressions(question.text, solution, question.answers[0]) if solution else ()

    def score(self, question: Question, answer: str | None) -> Score:
        score = score_number(answer, question.answers)
        value = number(answer) if answer is not None else None
        if score == ZERO and value is not None and question.id in self._entries:
            decimal = str(Decimal(value.numerator) / Decimal(value.denominator))
            right = self._scorer.score_answer(decimal, self._entries[question.id]) == 1.0
            return Score(1.0, 1.0, 1.0, 1.0) if right else ZERO
        return score
