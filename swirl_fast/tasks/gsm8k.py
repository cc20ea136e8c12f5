"""GSM8K: grade-school word problems with a calculator (Cobbe et al. 2021, arXiv 2110.14168).

Official format: one JSON object a line, `question` and `answer`, the latter a worked solution that ends in `#### N`.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

from swirl_fast.config import ConfigError, TasksConfig
from swirl_fast.tasks.rows import Row, question_id, read_splits
from swirl_fast.tasks.scoring import number, score_number
from swirl_fast.tasks.solutions import marked_steps, step_expressions, step_results
from swirl_fast.tasks.task import Example, Question, Score, Split, TaskDefaults
from swirl_fast.tools.characters import same_text
from swirl_fast.tools.tool import observation


def worked(question: str, expression: str, value: str, answer: str) -> Example:
    """An example of one calculation, which computes everything, and the answer."""
    actions = (f"<math_exp>{expression}</math_exp>", f"<answer>{answer}</answer>")
    return Example(question, actions, (observation(expression, value),))


WORD_PROBLEMS = (
    worked(
        "A baker fills 6 trays with 12 rolls each. She sells 45 rolls and gives away 9. How many rolls are left?",
        "6 * 12 - 45 - 9",
        "18.0",
        "18",
    ),
    worked(
        "Tickets cost $14 for adults and $8 for children. What do 2 adults and 5 children pay together?",
        "2 * 14 + 5 * 8",
        "68.0",
        "68",
    ),
    Example(
        "A tank holds 240 liters and is 35% full. A pump adds 12 liters a minute. After how many minutes is it full?",
        ("<math_exp>240 - 35% of 240</math_exp>", "<math_exp>156 / 12</math_exp>", "<answer>13</answer>"),
        (observation("240 - 35% of 240", "156.0"), observation("156 / 12", "13.0")),
    ),
)


class GSM8K(TaskDefaults):
    """path, eval_path: files, or Hugging Face names such as `openai/gsm8k` (splits train and test).

    Without eval_path the last tenth of `path` is held out. A training question that is also in the held-out split is
    dropped. limit and eval_limit take the first rows of those that max_solution_steps allows.
    """

    name = "gsm8k"
    tools: tuple[str, ...] = ("calculator",)
    examples: tuple[Example, ...] = WORD_PROBLEMS

    def __init__(self, config: TasksConfig, seed: int = 0) -> None:
        self._solutions: dict[str, str] = {}  # question id -> worked solution
        splits = self.splits(config)
        held_out = self._parse(splits["eval"], set())
        self.held_out = frozenset(same_text(question.text) for question in held_out)
        train = self._parse(splits["train"], set(self.held_out))
        train, held_out = self._easier(train, config), self._easier(held_out, config)
        train = train[config.skip :][: config.limit or None]
        self._questions = {"train": train, "eval": held_out[: config.eval_limit or None]}

    def splits(self, config: TasksConfig) -> dict[Split, list[Row]]:
        return read_splits(config.path, config.eval_path, hub=("main", "test"))

    def read(self, row: Row) -> tuple[str, str, str]:
        """Question, worked solution, answer. Raises ValueError naming file, row and field."""
        text, solution = row.text("question"), row.text("answer")
        _, marker, answer = solution.rpartition("####")
        if not marker or number(answer) is None:
            raise row.error("answer", "must end in `#### N` with one number N, such as 1200, -0.5 or 3/4")
        return text, solution, answer.strip()

    def _parse(self, rows: list[Row], seen: set[str]) -> list[Question]:
        questions = []
        for row in rows:
            text, solution, answer = self.read(row)
            if same_text(text) not in seen:
                seen.add(same_text(text))
                questions.append(Question(question_id(self.name, text), self.name, text, (answer,)))
                self._solutions[questions[-1].id] = solution
        return questions

    def _easier(self, questions: list[Question], config: TasksConfig) -> list[Question]:
        """Those that tasks.max_solution_steps allows. Raises ConfigError where there is none."""
        if not (most := config.max_solution_steps):
            return questions
        found = [one for one in questions if 0 < marked_steps(self._solutions[one.id]) <= most]
        if questions and not found:
            raise ConfigError(
                f"tasks.max_solution_steps={most}: no solution marks so few calculations (and one at least) as <<48/2=24>>; raise it"
            )
        return found

    def questions(self, split: Split) -> Sequence[Question]:
        return self._questions[split]

    def solution(self, question: Question) -> tuple[Fraction, ...]:
        return step_results(self._solutions[question.id], question.answers[0])

    def demonstration(self, question: Question) -> tuple[str, ...]:
        return step_expressions(question.text, self._solutions[question.id], question.answers[0])

    def score(self, question: Question, answer: str | None) -> Score:
        return score_number(answer, question.answers)
