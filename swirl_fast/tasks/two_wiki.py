"""2WikiMultihopQA: questions over two to four Wikipedia articles (Ho et al. 2020, COLING, aclanthology 2020.coling-main.580).

Official format (github.com/Alab-NII/2wikimultihop): HotPotQA's, a JSON list of objects with `_id`, `question`,
`answer`, `context` = [[title, [sentence, …]], …], `type`, `evidences` and, in the release with ids, `answer_id`. That
release comes with `id_aliases.json`, one object a line with `Q_id`, `aliases` and `demonyms`: where the file lies
beside the data file, the aliases of an answer's id are right too, as in 2wikimultihop_evaluate_v1.1.py.

On Hugging Face: the rows of `framolfese/2WikiMultihopQA` (`id`; `context` = {title, sentences}) and of
`xanhho/2WikiMultihopQA` (`context` is JSON text). The blind test file has no answers.
"""

from __future__ import annotations

import json
from pathlib import Path

from swirl_fast.config import TasksConfig
from swirl_fast.files import is_file
from swirl_fast.tasks.paragraph_qa import ParagraphQA, titled
from swirl_fast.tasks.rows import Row, read_file

ALIASES = "id_aliases.json"


class TwoWikiMultihopQA(ParagraphQA):
    name = "2wikimultihopqa"

    def __init__(self, config: TasksConfig, seed: int = 0) -> None:
        files = [Path(path).expanduser() for path in (config.path, config.eval_path) if path and is_file(path)]
        folders = dict.fromkeys(file.parent for file in files)
        self._aliases: dict[str, list[str]] = {}
        for file in (folder / ALIASES for folder in folders):
            for row in read_file(file) if file.is_file() else ():
                self._aliases[row.text("Q_id")] = row.texts("aliases") + row.texts("demonyms")
        super().__init__(config, seed)

    def answers(self, row: Row) -> list[str]:
        id = row.fields.get("answer_id")
        return [row.text("answer"), *(self._aliases.get(id, ()) if isinstance(id, str) else ())]

    def paragraphs(self, row: Row) -> list[tuple[str, str]]:
        context = row.fields.get("context")
        if isinstance(context, str):
            try:
                context = json.loads(context)
            except (json.JSONDecodeError, RecursionError) as error:
                raise row.error("context", f"is text but not JSON: {error}") from None
        return titled(row, context, sentences=True)
