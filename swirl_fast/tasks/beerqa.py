"""BeerQA: questions of one, two and, in the blind test file, more steps (Qi et al. 2021, EMNLP, arXiv 2010.12527).

Official format (beerqa_train_v1.0.json, beerqa_dev_v1.0.json from beerqa.github.io; read by github.com/beerqa/IRRR):
an object with `version`, `split` and `data`, a list of objects with `id`, `src` (squad or hotpotqa), `question`,
`answers` and `context` = [[title, text], …]. The test file has no answers.

`context` has only the gold paragraphs, and the authors search all of Wikipedia (August 2020), which the files do not
hold: the search here, over all gold paragraphs of the files, is easier than theirs. The official script,
utils/eval_beerqa.py, takes the gold answer with the best F1, as here, and averages over the sources in addition.
"""

from __future__ import annotations

from swirl_fast.tasks.paragraph_qa import ParagraphQA, titled
from swirl_fast.tasks.rows import Row


class BeerQA(ParagraphQA):
    name = "beerqa"
    id_fields = ("id",)

    def answers(self, row: Row) -> list[str]:
        answers = row.texts("answers")
        if not answers:
            raise row.error("answers", "must have an answer" if "answers" in row.fields else "is missing")
        return answers

    def paragraphs(self, row: Row) -> list[tuple[str, str]]:
        return titled(row, row.fields.get("context"), whole=True)
