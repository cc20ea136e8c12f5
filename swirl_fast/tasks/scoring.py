"""Scores of an answer against gold answers: numeric equality, or the official HotPotQA metrics. Pure functions.

The HotPotQA metrics are those of hotpot_evaluate_v1.py (Yang et al. 2018, arXiv 1809.09600): lower case, no
punctuation, no articles, single spaces; token F1; `yes`, `no` and `noanswer` match only themselves. Two differences: an
answer that normalises to nothing scores 0, also against a gold answer that does; and accents are composed first (NFC).

The scripts of 2WikiMultihopQA (v1.1), BeerQA and MuSiQue normalise in the same way and take the best of several gold
answers: exact match and F1 are theirs too, with MuSiQue's missing rule about `yes` and `no` (`closed`). Precision and
recall are those of the best gold answer, as in BeerQA's script; 2WikiMultihopQA's takes the best of each by itself.
"""

from __future__ import annotations

import re
import string
import unicodedata
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import replace
from fractions import Fraction

from swirl_fast.tasks.task import Score
from swirl_fast.tools.numerals import Mention, number_in

ZERO = Score(0.0, 0.0, 0.0, 0.0)
WHOLLY_CLOSED = ("yes", "no", "noanswer")


def number(text: str) -> Fraction | None:
    """The one number a text states, None when it states none, several, or what may be another number (tools/numerals.py).

    `10`, `10.00`, `$10`, `10 clips`, `1,200`, `3/4`, `5k` (= 5000) and `50%` (= 1/2) are numbers. `48/2` is an unfinished calculation
    rather than a number: a fraction counts only when it is not a whole number. Never raises.
    """
    stated = number_in(text)
    return stated.value if stated else None


def same_number(answer: str, gold: str) -> bool:
    """Whether both state one number and the numbers are equal, exactly: 10 == 10.00 == $10; 0.333 is not 1/3, 5k is not 5.

    Where only one side has a percent sign it may also be the unit of the answer (GSM8K's gold answers have no units):
    `50%` equals 50 as well as 0.5.
    """
    left, right = number_in(answer), number_in(gold)
    if left is None or right is None:
        return False
    return left.value == right.value or (left.percent != right.percent and _without_unit(left) == _without_unit(right))


def states(answer: str, value: Fraction) -> bool:
    """Whether an answer states the value, in the way of `same_number`."""
    stated = number_in(answer)
    return stated is not None and value in (stated.value, _without_unit(stated))


def _without_unit(stated: Mention) -> Fraction:
    return stated.bare if stated.percent else stated.value


def score_number(answer: str | None, golds: Sequence[str]) -> Score:
    """All four measures 1 when the answer equals a gold number, else 0."""
    right = answer is not None and any(same_number(answer, gold) for gold in golds)
    return Score(1.0, 1.0, 1.0, 1.0) if right else ZERO


def normalise_answer(text: str) -> str:
    """The official normalisation: lower case, punctuation and articles dropped, white space collapsed."""
    text = unicodedata.normalize("NFC", text)
    text = "".join(char for char in text.lower() if char not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def score_text(answer: str | None, golds: Sequence[str], closed: Collection[str] = WHOLLY_CLOSED) -> Score:
    """Exact match, F1, precision and recall against the gold answer that fits best (highest exact match, then F1).

    closed: normalised answers that match only themselves.
    """
    if answer is None:
        return ZERO
    given = normalise_answer(answer)
    scores = (_score_normalised(given, normalise_answer(gold), closed) for gold in golds)
    return max(scores, key=lambda score: (score.exact_match, score.f1), default=ZERO)


def score_auto(answer: str | None, golds: Sequence[str]) -> Score:
    """By number where the gold answers are plain numbers, else by words."""
    numeric = golds and all((stated := number_in(gold)) and stated.whole for gold in golds)
    return score_number(answer, golds) if numeric else score_text(answer, golds)


def score_f1(answer: str | None, golds: Sequence[str]) -> Score:
    """Worth its F1, by degrees."""
    score = score_text(answer, golds)
    return replace(score, graded=score.f1)


def _score_normalised(given: str, gold: str, closed: Collection[str]) -> Score:
    if given != gold and (given in closed or gold in closed):
        return ZERO
    given_words, gold_words = given.split(), gold.split()
    common = sum((Counter(given_words) & Counter(gold_words)).values())
    if not common:  # also where both normalise to nothing
        return ZERO
    precision, recall = common / len(given_words), common / len(gold_words)
    return Score(float(given == gold), 2 * precision * recall / (precision + recall), precision, recall)
