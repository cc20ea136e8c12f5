"""What the data sets of questions with paragraphs share: multi-hop questions, and a search engine over all paragraphs.

A data set is a class of a few lines that says how its official rows are read (HotPotQA, 2WikiMultihopQA, MuSiQue,
BeerQA, CofCA). Everything else is here: the splits, what is kept out of training, the passages, the worked examples.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from swirl_fast.config import ConfigError, TasksConfig
from swirl_fast.tasks.rows import Row, read_splits
from swirl_fast.tasks.scoring import score_text
from swirl_fast.tasks.task import Example, Question, Score, Split, TaskDefaults
from swirl_fast.tools.characters import same_text
from swirl_fast.tools.tool import observation

EXAMPLE_PASSAGES = (
    (
        "Amber Road",
        "The Amber Road was an ancient trade route for amber from the Baltic coast to Aquileia on the Adriatic Sea.",
    ),
    ("Aquileia", "Aquileia is a town in the region Friuli-Venezia Giulia in Italy, founded by the Romans in 181 BC."),
    ("Lake Balaton", "Lake Balaton is a freshwater lake in Hungary with a surface of 592 square kilometers."),
    ("Lake Garda", "Lake Garda is the largest lake in Italy with a surface of 370 square kilometers."),
)


def _found(query: str, passage: int) -> str:
    title, text = EXAMPLE_PASSAGES[passage]
    return observation(query, f"{title}: {text}")


EXAMPLES = (
    Example(
        "In which year was the town founded where the Amber Road ended?",
        (
            "<search_query>Amber Road end</search_query>",
            "<search_query>Aquileia founded</search_query>",
            "<answer>181 BC</answer>",
        ),
        (_found("Amber Road end", 0), _found("Aquileia founded", 1)),
    ),
    Example(
        "Is Lake Garda larger than Lake Balaton?",
        (
            "<search_query>Lake Garda surface</search_query>",
            "<search_query>Lake Balaton surface</search_query>",
            "<answer>no</answer>",
        ),
        (_found("Lake Garda surface", 3), _found("Lake Balaton surface", 2)),
    ),
)


class ParagraphQA(TaskDefaults):
    """path, eval_path: files in the official format, or names of Hugging Face data sets.

    Without eval_path the last tenth of `path` is held out; the same file as both is held out whole. A training row
    with the id or the question of a held-out one is left out. limit and eval_limit take the first questions. The
    passages are those of all rows of both splits, left-out rows included: fewer questions do not make the search
    easier.

    Raises ConfigError when no row of a split asks a question, ValueError naming file, row and field for a malformed row
    and for an id that repeats within a split.
    """

    name: str
    hub = ("default", "validation")  # configuration and evaluation split of the Hugging Face data set
    id_fields: tuple[str, ...] = ("_id", "id")  # the first that a row has; `id` on Hugging Face
    left_out = ""  # why `asked` leaves rows out, for the error when none is left
    tools: tuple[str, ...] = ("search",)
    examples: tuple[Example, ...] = EXAMPLES

    def __init__(self, config: TasksConfig, seed: int = 0) -> None:
        splits = read_splits(config.path, config.eval_path, self.hub)
        asked: dict[Split, list[Row]] = {split: self.asked(rows, split) for split, rows in splits.items()}
        for split, rows in splits.items():
            if not asked[split]:
                source = f"tasks.eval_path={config.eval_path}" if split == "eval" else f"tasks.path={config.path}"
                raise ConfigError(f"{source}: all {len(rows)} {split} rows are left out: {self.left_out}")
        held_out = self._parse(asked["eval"], set(), set())
        self.held_out = frozenset(same_text(question.text) for question in held_out)
        train = self._parse(asked["train"], {question.id for question in held_out}, set(self.held_out))
        train = train[config.skip :][: config.limit or None]
        self._questions = {"train": train, "eval": held_out[: config.eval_limit or None]}
        rows = splits["train"] + splits["eval"]
        self._passages = list(dict.fromkeys(passage for row in rows for passage in self.paragraphs(row)))

    def _parse(self, rows: list[Row], other_ids: set[str], other_texts: set[str]) -> list[Question]:
        questions: dict[str, Question] = {}
        for row in rows:
            id, text, answers = self.id(row), row.text("question"), self.answers(row)
            if id in questions:
                raise row.error(self._id_field(row), "an earlier row has the same id")
            if id not in other_ids and same_text(text) not in other_texts:
                questions[id] = Question(id, self.name, text, tuple(dict.fromkeys(answers)))
        return list(questions.values())

    # ---- how a data set's rows are read

    def asked(self, rows: list[Row], split: Split) -> list[Row]:
        """The rows that are questions, in their order."""
        return rows

    def id(self, row: Row) -> str:
        return row.text(self._id_field(row))

    def _id_field(self, row: Row) -> str:
        return next((field for field in self.id_fields if field in row.fields), self.id_fields[0])

    def answers(self, row: Row) -> list[str]:
        """The gold answers of a row, at least one."""
        return [row.text("answer")]

    def paragraphs(self, row: Row) -> list[tuple[str, str]]:
        """(title, text) of every paragraph of a row."""
        return titled(row, row.fields.get("context"), sentences=True)

    # ---- the task

    def questions(self, split: Split) -> Sequence[Question]:
        return self._questions[split]

    def passages(self) -> Sequence[tuple[str, str]]:
        return self._passages

    def score(self, question: Question, answer: str | None) -> Score:
        return score_text(answer, question.answers)


def titled(row: Row, context: Any, *, sentences: bool = False, whole: bool = False) -> list[tuple[str, str]]:
    """(title, text) of the entries of a row's `context`, white space collapsed.

    context: a list of pairs, or Hugging Face's {title: […], sentences: […]}. sentences: [title, [sentence, …]] is
    allowed; whole: [title, text] is.
    """
    form = " or ".join(["[title, [sentence, …]]"] * sentences + ["[title, text]"] * whole)
    if isinstance(context, dict):
        titles, texts = context.get("title"), context.get("sentences")
        if not isinstance(titles, list) or not isinstance(texts, list) or len(titles) != len(texts):
            raise row.error("context", "must have equally many `title` and `sentences`")
        context = [list(pair) for pair in zip(titles, texts, strict=True)]
    if not isinstance(context, list) or not context:
        raise row.error("context", f"must be a list of {form}" if "context" in row.fields else "is missing")
    passages = []
    for i, entry in enumerate(context):
        match entry:
            case [str(title), [*parts]] if sentences and all(isinstance(part, str) for part in parts):
                passages.append(passage(title, " ".join(parts)))
            case [str(title), str(text)] if whole:
                passages.append(passage(title, text))
            case _:
                raise row.error("context", f"entry {i} must be {form}")
    return passages


def passage(title: str, text: str) -> tuple[str, str]:
    return title.strip(), " ".join(text.split())
