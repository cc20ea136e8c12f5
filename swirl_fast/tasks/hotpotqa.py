"""HotPotQA: questions that need two passages, with a search engine over all (Yang et al. 2018, arXiv 1809.09600).

Official format: a JSON list of objects with `_id`, `question`, `answer`, `context` = [[title, [sentence, …]], …] and,
in the training file, `level`. The same rows one a line, and the form of the Hugging Face data set (`id`; `context` =
{title, sentences}), are read too.
"""

from __future__ import annotations

from collections.abc import Sequence

from swirl_fast.config import ConfigError, TasksConfig
from swirl_fast.tasks.rows import Row, read_splits
from swirl_fast.tasks.scoring import score_text
from swirl_fast.tasks.task import Example, Question, Score, Split
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


class HotPotQA:
    """path, eval_path: files, or Hugging Face names such as `hotpotqa/hotpot_qa` (splits train and validation).

    Without eval_path the last tenth of `path` is held out. Training leaves out the rows whose level is "easy", as the
    paper does (section 3), and those that are also held out; a file without levels is used whole. limit and eval_limit
    take the first rows. The passages are those of all rows of both splits, left-out rows included: fewer questions do
    not make the search easier.
    """

    name = "hotpotqa"
    tools: tuple[str, ...] = ("search",)
    examples: tuple[Example, ...] = EXAMPLES

    def __init__(self, config: TasksConfig, seed: int = 0) -> None:
        splits = read_splits(config.path, config.eval_path, hub=("distractor", "validation"))
        hard = [row for row in splits["train"] if row.fields.get("level") != "easy"]
        if not hard:
            raise ConfigError(
                f"tasks.path={config.path}: all {len(splits['train'])} training rows have the level 'easy'"
            )
        held_out = self._parse(splits["eval"], set(), set())
        train = self._parse(hard, {question.id for question in held_out}, {question.text for question in held_out})
        self._questions = {"train": train[: config.limit or None], "eval": held_out[: config.eval_limit or None]}
        rows = splits["train"] + splits["eval"]
        self._passages = list(dict.fromkeys(passage for row in rows for passage in _paragraphs(row)))

    def _parse(self, rows: list[Row], other_ids: set[str], other_texts: set[str]) -> list[Question]:
        questions: dict[str, Question] = {}
        for row in rows:
            field = "_id" if "_id" in row.fields or "id" not in row.fields else "id"
            id, text, answer = row.text(field), row.text("question"), row.text("answer")
            if id in questions:
                raise row.error(field, "an earlier row has the same id")
            if id not in other_ids and text not in other_texts:
                questions[id] = Question(id, self.name, text, (answer,))
        return list(questions.values())

    def questions(self, split: Split) -> Sequence[Question]:
        return self._questions[split]

    def passages(self) -> Sequence[tuple[str, str]]:
        return self._passages

    def score(self, question: Question, answer: str | None) -> Score:
        return score_text(answer, question.answers)


def _paragraphs(row: Row) -> list[tuple[str, str]]:
    context = row.fields.get("context")
    if isinstance(context, dict):
        titles, sentences = context.get("title"), context.get("sentences")
        if not isinstance(titles, list) or not isinstance(sentences, list) or len(titles) != len(sentences):
            raise row.error("context", "must have equally many `title` and `sentences`")
        context = [list(pair) for pair in zip(titles, sentences, strict=True)]
    if not isinstance(context, list) or not context:
        raise row.error(
            "context", "must be a list of [title, [sentence, …]]" if "context" in row.fields else "is missing"
        )
    passages = []
    for i, entry in enumerate(context):
        match entry:
            case [str(title), [*sentences]] if all(isinstance(sentence, str) for sentence in sentences):
                passages.append((title.strip(), " ".join(" ".join(sentences).split())))
            case _:
                raise row.error("context", f"entry {i} must be [title, [sentence, …]]")
    return passages
