"""MuSiQue: questions composed of two to four single-hop ones (Trivedi et al. 2022, TACL, arXiv 2108.00573).

Official format (github.com/StonyBrookNLP/musique, musique_ans_v1.0_train.jsonl and so on): one JSON object a line with
`id`, `question`, `answer`, `answer_aliases`, `answerable` and `paragraphs`, each of them with `title` and
`paragraph_text`. `dgslibisey/MuSiQue` on Hugging Face has the same rows; of `bdsaglam/musique` name a configuration:
`bdsaglam/musique:answerable`. The blind test file has no answers.
"""

from __future__ import annotations

from swirl_fast.tasks.paragraph_qa import ParagraphQA, passage
from swirl_fast.tasks.rows import Row
from swirl_fast.tasks.scoring import score_text
from swirl_fast.tasks.task import Question, Score, Split


class MuSiQue(ParagraphQA):
    """An alias is as right as the answer.

    MuSiQue-Full has every question twice, under one id: once answerable, once without a paragraph it needs. Where all
    paragraphs are searched the second is no different from the first. So the unanswerable row asks nothing (the
    official answer metric skips it too), and its paragraphs are searched like all others.
    """

    name = "musique"
    id_fields = ("id",)
    left_out = "they are not answerable"

    def asked(self, rows: list[Row], split: Split) -> list[Row]:
        for row in rows:
            if not isinstance(row.fields.get("answerable", True), bool):
                raise row.error("answerable", "must be true or false")
        return [row for row in rows if row.fields.get("answerable", True)]

    def answers(self, row: Row) -> list[str]:
        return [row.text("answer"), *row.texts("answer_aliases")]

    def paragraphs(self, row: Row) -> list[tuple[str, str]]:
        paragraphs = row.fields.get("paragraphs")
        if not isinstance(paragraphs, list) or not paragraphs:
            remedy = "must be a list of {title, paragraph_text}" if "paragraphs" in row.fields else "is missing"
            raise row.error("paragraphs", remedy)
        passages = []
        for i, entry in enumerate(paragraphs):
            match entry:
                case {"title": str(title), "paragraph_text": str(text)}:
                    passages.append(passage(title, text))
                case _:
                    raise row.error("paragraphs", f"entry {i} must have the texts `title` and `paragraph_text`")
        return passages

    def score(self, question: Question, answer: str | None) -> Score:
        """The official metrics/answer.py knows no words that match only themselves."""
        return score_text(answer, question.answers, closed=())
