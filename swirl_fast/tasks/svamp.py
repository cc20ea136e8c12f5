"""SVAMP: word problems of one or two operations, with a calculator (Patel, Bhattamishra and Goyal 2021, arXiv 2103.07191).

Official format: a JSON list of objects with `Body`, `Question`, `Equation` (the gold expression, `( 76.0 - 25.0 )`) and `Answer` (51.0).

The authors wrote about ten variations of each of a hundred stories, with other numbers and other questions, and the file has them in no
order: of its last 300 rows 219 have a row before them that shares more than four fifths of its words. So whole stories are held out: rows
that share more than half of their words, directly or through others, are one story. Of the official file that makes 96 stories.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Sequence

import networkx
import numpy as np

from swirl_fast.config import ConfigError, TasksConfig
from swirl_fast.tasks.gsm8k import GSM8K
from swirl_fast.tasks.rows import Row, held_out_groups, read_splits
from swirl_fast.tasks.scoring import number
from swirl_fast.tasks.task import Split
from swirl_fast.tools.arithmetic import CalculationError, evaluate

HELD_OUT = 0.3  # share of the rows that is held out, about, where there is no eval_path
ALIKE = 0.5  # shared words over all words of two rows (Jaccard), above which they tell one story
BLOCK = 512  # rows that are compared with all others at a time


class SVAMP(GSM8K):
    """path, eval_path: files in the official format. Without eval_path about three tenths of `path` are held out: whole stories, the same
    ones whatever the seed and the order of the rows.

    The gold expression is the demonstration, one calculation, where it gives the answer.
    """

    name = "svamp"

    def splits(self, config: TasksConfig) -> dict[Split, list[Row]]:
        if config.eval_path:
            return read_splits(config.path, config.eval_path, hub=("default", "test"))
        halves = read_splits(config.path, None, hub=("default", "test"))
        rows = halves["train"] + halves["eval"]
        texts = [self.read(row)[0] for row in rows]
        held_out = held_out_rows(texts)
        if len(held_out) == len(rows):
            raise ConfigError(
                f"tasks.path={config.path}: its {len(rows)} rows tell one story, of which no part can be held out; give tasks.eval_path"
            )
        return {
            "train": [row for at, row in enumerate(rows) if at not in held_out],
            "eval": [row for at, row in enumerate(rows) if at in held_out],
        }

    def read(self, row: Row) -> tuple[str, str, str]:
        """As of GSM8K. The solution is the gold expression, marked as GSM8K marks its calculations."""
        text = f"{row.text('Body')} {row.text('Question')}"
        expression, answer = bare(row.text("Equation")), _answer(row.fields.get("Answer"))
        if answer is None:
            raise row.error("Answer", "must be a number, such as 51.0")
        try:
            evaluate(expression)
        except CalculationError as error:
            raise row.error("Equation", f"must be a calculation of numbers, such as ( 76.0 - 25.0 ): {error}") from None
        return text, f"<<{expression}={answer}>>", answer


def held_out_rows(texts: Sequence[str]) -> set[int]:
    """Places of the rows of the stories that are held out: those whose hash is smallest, until they have HELD_OUT of all rows."""
    by_hash = {min(_hash(texts[at]) for at in story): story for story in stories(texts)}
    chosen = held_out_groups({key: len(story) for key, story in by_hash.items()}, HELD_OUT)
    return set().union(*(by_hash[key] for key in chosen))


def stories(texts: Sequence[str]) -> list[set[int]]:
    """Places of the texts that tell one story."""
    words = [set(re.findall(r"[^\W\d_]+", text.lower())) for text in texts]
    column = {word: at for at, word in enumerate(sorted(set().union(*words)))}
    has = np.zeros((len(texts), len(column)), np.float32)  # texts x words
    for at, own in enumerate(words):
        has[at, [column[word] for word in own]] = 1
    sizes = has.sum(1)
    graph = networkx.Graph()
    graph.add_nodes_from(range(len(texts)))
    for first in range(0, len(texts), BLOCK):
        shared = has[first : first + BLOCK] @ has.T
        alike = shared > ALIKE * (sizes[first : first + BLOCK, None] + sizes - shared)
        graph.add_edges_from((first + one, other) for one, other in np.argwhere(alike).tolist())
    return list(networkx.connected_components(graph))


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def bare(expression: str) -> str:
    """Without `.0` of whole numbers and without brackets around it all: `( 76.0 - 25.0 )` is `76 - 25`."""
    expression = re.sub(r"(?<![\d.])(\d+)\.0+(?!\d)", r"\1", expression).strip()
    while expression.startswith("(") and _closing(expression) == len(expression) - 1:
        expression = expression[1:-1].strip()
    return expression


def _closing(expression: str) -> int:
    """Where the bracket closes that the expression begins with; -1: nowhere."""
    depth = 0
    for at, char in enumerate(expression):
        depth += (char == "(") - (char == ")")
        if not depth:
            return at
    return -1


def _answer(value: object) -> str | None:
    """As a text without `.0`, None where it is no number."""
    if isinstance(value, str):
        return value.strip() if number(value) is not None else None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return str(int(value)) if value == int(value) else repr(value)
