"""Which model types of the installed transformers are exact over shared prefixes, tried one by one.

    python -m swirl_fast.models --sweep [--only TYPE,…] [--write docs/models.md]

Every causal language model is made small and random (models/shrink.py), with a sliding window where it can have one, and a tree through
`Policy` is compared with separate rows through the model itself (models/check.py): log-probs and every gradient, in float32. The models
run in a process of their own, which is started again when one of them ends it.
"""

from __future__ import annotations

import datetime
import multiprocessing
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from swirl_fast.comb.tree import SampledState, Trunk
from swirl_fast.config import ConfigError
from swirl_fast.models.check import compare
from swirl_fast.models.exact import refuse_inexact
from swirl_fast.models.policy import Policy
from swirl_fast.models.shrink import small_config, small_model

LIMITS = (1e-4, 1e-3)  # nats a token; share of a parameter's own gradient
RESULTS = ("exact", "refused", "not tried", "WRONG")
BEGIN, END = "<!-- models: begin -->", "<!-- models: end -->"
_SECONDS = 300


@dataclass(frozen=True)
class Row:
    """What was found out about a model type. gaps: largest differences of a log-prob and of a gradient, "" where nothing was computed."""

    model_type: str
    result: str
    logprob: str = ""
    gradient: str = ""
    why: str = ""

    def __str__(self) -> str:
        return f"| {' | '.join((self.model_type, self.result, self.logprob, self.gradient, self.why))} |"


def model_types() -> list[str]:
    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def try_model(model_type: str) -> Row:
    """With a window first; a model type that is refused with one is tried without."""
    row = _try(model_type, window=True)
    if row.result != "refused" or "window" not in row.why:
        return row
    without = _try(model_type, window=False)
    return (
        Row(model_type, "exact", without.logprob, without.gradient, f"refused with a window: {row.why}")
        if without.result == "exact"
        else row
    )


def _try(model_type: str, window: bool) -> Row:
    try:
        config = small_config(model_type, window)
        refuse_inexact(config)
        model = small_model(config)
    except ConfigError as error:
        return Row(model_type, "refused", why=_short(error))
    except Exception as error:  # of any kind: what transformers raises for a configuration that it cannot build
        return Row(model_type, "not tried", why=f"cannot be made small: {type(error).__name__}: {_short(error)}")
    try:
        policy = Policy(model)
        found = compare(policy, trunk=_tree(config.get_text_config().vocab_size))
    except ConfigError as error:
        return Row(model_type, "refused", why=_short(error))
    except Exception as error:
        return Row(model_type, "not tried", why=f"its forward raises {type(error).__name__}: {_short(error)}")
    exact = found.logprob_gap <= LIMITS[0] and found.parameter_gap <= LIMITS[1]
    why = "" if exact else f"most at {found.worst}"
    return Row(model_type, "exact" if exact else "WRONG", f"{found.logprob_gap:.0e}", f"{found.parameter_gap:.0e}", why)


def _tree(vocabulary: int) -> Trunk:
    """Five rows of 26 tokens: teeth that begin alike, and one that begins as the trunk goes on."""
    draw = np.random.default_rng(1)
    trunk, a, b, c = (draw.integers(3, vocabulary, n).astype(np.int32) for n in (20, 18, 12, 6))
    early = (a, np.concatenate([a[:7], b[:11]]), np.concatenate([trunk[8:13], b, a[:1]]))
    late = (c, np.concatenate([c[:2], a[:4]]))
    return Trunk(trunk, (SampledState(8, early, (0, 1, 2)), SampledState(20, late, (3, 4))))


def _short(error: Exception) -> str:
    """The reason of a message, without the model type before it and the remedy after it."""
    text = re.sub(r"^model type \S+: | \(.*?\)", "", " ".join(str(error).split()))
    text = re.sub(r"^(\S+)(, \S+)+ are ", r"\1 and others are ", text)
    return re.split(r"; |\. |: training over|, and paths may", text)[0].replace("|", "/")[:120]


# ---- a process that may end


def sweep(types: Iterable[str], work: Callable[[str], Row] = try_model, start: str = "spawn") -> Iterator[Row]:
    """A row a model type, in order; a process that ends or hangs costs the one it was at."""
    context = multiprocessing.get_context(start)
    process = connection = None
    try:
        for model_type in types:
            if process is None or connection is None:
                connection, theirs = context.Pipe()
                process = context.Process(target=_serve, args=(theirs, work), daemon=True)
                process.start()
                theirs.close()
            connection.send(model_type)
            try:
                row = connection.recv() if connection.poll(_SECONDS) else None
                why = f"took more than {_SECONDS} seconds"
            except EOFError:
                process.join()
                row, why = None, f"ended its process with code {process.exitcode}"
            if row is None:
                process.kill()
                process = connection = None
                row = Row(model_type, "not tried", why=why)
            yield row
    finally:
        if process is not None:
            process.kill()


def _serve(connection: Connection, work: Callable[[str], Row]) -> None:
    while True:
        connection.send(work(connection.recv()))


# ---- the table


def table(rows: Iterable[Row]) -> str:
    rows = sorted(rows, key=lambda row: row.model_type)
    count = Counter(row.result for row in rows)
    summary = ", ".join(f"{count[result]} {result}" for result in RESULTS)
    head = (
        f"{datetime.date.today()}, transformers {transformers.__version__}: {len(rows)} model types, {summary}.",
        "",
        "| model type | result | log-probs | gradients | why |",
        "|---|---|---|---|---|",
    )
    return "\n".join([*head, *map(str, rows)])


def read_table(text: str) -> dict[str, Row]:
    """The rows between the markers of a page, by model type. Raises ValueError for a page without markers."""
    if BEGIN not in text or END not in text:
        raise ValueError(f"the page has no lines {BEGIN} and {END}, between which the table belongs")
    body = text.split(BEGIN)[1].split(END)[0]
    cells = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in body.splitlines() if line.startswith("| ")
    ]
    return {row[0]: Row(*row) for row in cells if row[0] != "model type"}


def write_table(page: Path, rows: Iterable[Row]) -> None:
    """Puts rows into the page's table, in the place of those of the same model types."""
    text = page.read_text(encoding="utf-8")
    known = read_table(text) | {row.model_type: row for row in rows}
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    page.write_text(f"{before}{BEGIN}\n{table(known.values())}\n{END}{after}", encoding="utf-8")
