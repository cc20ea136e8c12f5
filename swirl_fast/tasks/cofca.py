"""CofCA: counterfactual questions of two, three and four hops, for evaluation (Wu et al. 2025, ICLR, arXiv 2402.11924).

The paper names no format. The one read here is how a project that evaluates on the released files (paper, section 1:
anonymous.4open.science/r/LLM_inherent_multi_step_eval-3818) reads them: github.com/kilian-group/phantom-reasoning,
examples/wiki/utils/data_utils.py. Each file is a JSON list of objects in HotPotQA's format with `_id`, `question`,
`answer`, `type` and `context` = [[title, [sentence, …]], …], and is scored with HotPotQA's script; a paragraph may also
be one text. The sub-questions are not used.

Give each file as tasks.path and tasks.eval_path, so that all of it is held out: there is no training file.
"""

from __future__ import annotations

from swirl_fast.tasks.paragraph_qa import ParagraphQA, titled
from swirl_fast.tasks.rows import Row, question_id
from swirl_fast.tasks.task import Split


class CofCA(ParagraphQA):
    """The `_id`s repeat, among the questions about one passage and beyond: a question is known by its text, and one that
    repeats is asked once, with its first answer."""

    name = "cofca"

    def asked(self, rows: list[Row], split: Split) -> list[Row]:
        first: dict[str, Row] = {}
        for row in rows:
            first.setdefault(row.text("question"), row)
        return list(first.values())

    def id(self, row: Row) -> str:
        return question_id(self.name, row.text("question"))

    def paragraphs(self, row: Row) -> list[tuple[str, str]]:
        return titled(row, row.fields.get("context"), sentences=True, whole=True)
