"""HotPotQA: questions that need two passages (Yang et al. 2018, arXiv 1809.09600).

Official format: a JSON list of objects with `_id`, `question`, `answer`, `context` = [[title, [sentence, …]], …] and,
in the training file, `level`. The same rows one a line, and the form of the Hugging Face data set
`hotpotqa/hotpot_qa` (`id`; `context` = {title, sentences}), are read too.
"""

from __future__ import annotations

from swirl_fast.tasks.paragraph_qa import ParagraphQA
from swirl_fast.tasks.rows import Row
from swirl_fast.tasks.task import Split


class HotPotQA(ParagraphQA):
    """Training leaves out the rows whose level is "easy", as the SWiRL paper does (section 3); a file without levels is
    used whole."""

    name = "hotpotqa"
    hub = ("distractor", "validation")
    left_out = "they have the level 'easy'"

    def asked(self, rows: list[Row], split: Split) -> list[Row]:
        return [row for row in rows if split == "eval" or row.fields.get("level") != "easy"]
