"""Verdicts that are in the store already are not asked for again, and those that were given are kept whatever comes after them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

from swirl_fast.judges.judge import Judgement, Refusal
from swirl_fast.store import Store

T = TypeVar("T")
CHUNK = 256  # judged between two writes


def judge_missing(
    store: Store,
    judge_id: str,
    asked: Mapping[str, T],
    ask: Callable[[list[T]], Sequence[Judgement]],
    done: Callable[[list[str], Sequence[Judgement]], object] = lambda keys, judgements: None,
) -> None:
    """asked: content hash -> a step, or an answer. ask: as Judge.judge. done: called with each chunk when it is written.

    A Refusal comes through when what was answered before it is written: those verdicts were paid for.
    """
    missing = store.missing(judge_id, asked)
    for at in range(0, len(missing), CHUNK):
        keys = missing[at : at + CHUNK]
        try:
            judgements = ask([asked[key] for key in keys])
        except Refusal as error:
            answered = zip(keys, error.answered, strict=True)
            store.add_verdicts(judge_id, {key: one for key, one in answered if one is not None})
            raise
        store.add_verdicts(judge_id, dict(zip(keys, judgements, strict=True)))
        done(keys, judgements)
