"""Scores of an answer against gold answers: numeric equality, the official HotPotQA metrics, or those with the characters that make
another answer of the same words (`score_exact`). Pure functions.

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
from swirl_fast.tools.arithmetic import GROUPED
from swirl_fast.tools.characters import same_text
from swirl_fast.tools.numerals import Mention, number_in

ZERO = Score(0.0, 0.0, 0.0, 0.0)
RIGHT = Score(1.0, 1.0, 1.0, 1.0)
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
    return RIGHT if right else ZERO


def normalise_answer(text: str) -> str:
    """The official normalisation: lower case, punctuation and articles dropped, white space collapsed."""
    text = _without_punctuation(unicodedata.normalize("NFC", text).lower())
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


# Punctuation that the official metrics drop, and that makes another answer: 2.5, 12:30, 2020-01-05; .5; -5 and -$5; C++, C#, O-; < and >.
_TELLING = re.compile(
    r"(?<=\d)[^\w\s](?=\d)|(?<![\w.])\.(?=\d)|(?<!\w)-(?=[$£€]?\.?\d)|(?<=\w)(?:-|[+#]{1,2})(?![\w+#-])|[<>=^]|!(?==)"
)
_THOUSANDS = re.compile(rf"(?<![\d.,])(?!0){GROUPED}")
_DASHES = re.compile(r"[‐‑‒–—−](?=[$£€]?\.?\d)")
_KEPT = {ord(char): 0xE000 + ord(char) for char in string.punctuation}  # no punctuation to the official normalisation


def score_exact(answer: str | None, golds: Sequence[str]) -> Score:
    """The measures of `score_text`, where 25 km is not 2.5 km, -5 is not 5, and C is neither C++ nor C#. A gold answer that has nothing but
    articles and punctuation, as the A of a multiple choice, is compared as it is, but for case."""
    if answer is None:
        return ZERO
    scores = [_score_telling(answer, gold) for gold in golds]
    return max(scores, key=lambda score: (score.exact_match, score.f1), default=ZERO)


def score_auto(answer: str | None, golds: Sequence[str]) -> Score:
    """By number for each gold answer that is a plain number, by words for each other one; the best of them."""
    numeric = [gold for gold in golds if (stated := number_in(gold)) and stated.whole]
    if score_number(answer, numeric) == RIGHT:
        return RIGHT
    return score_exact(answer, [gold for gold in golds if gold not in numeric])


def score_f1(answer: str | None, golds: Sequence[str]) -> Score:
    """Worth its F1, by degrees."""
    score = score_exact(answer, golds)
    return replace(score, graded=score.f1)


def _score_telling(answer: str, gold: str) -> Score:
    one, other = _telling(answer), _telling(gold)
    if wanted := normalise_answer(other):
        return _score_normalised(normalise_answer(one), wanted, WHOLLY_CLOSED)
    given, wanted = (_without_punctuation(text.casefold()) for text in (one, other))
    if not wanted:
        given, wanted = same_text(answer).casefold(), same_text(gold).casefold()
    return RIGHT if given == wanted else ZERO


def _telling(text: str) -> str:
    """A text in which no normalisation drops what `_TELLING` names, and 1,200 is 1200."""
    text = _DASHES.sub("-", unicodedata.normalize("NFC", text))
    text = _THOUSANDS.sub(lambda found: found[0].replace(",", ""), text)
    return _TELLING.sub(_kept, text)


def _kept(found: re.Match[str]) -> str:
    kept = found[0].translate(_KEPT)
    return f" {kept} " if found[0] in "<>=^!" else kept


def _without_punctuation(text: str) -> str:
    return " ".join("".join(char for char in text if char not in string.punctuation).split())


def _score_normalised(given: str, gold: str, closed: Collection[str]) -> Score:
    if given != gold and (given in closed or gold in closed):
        return ZERO
    given_words, gold_words = given.split(), gold.split()
    common = sum((Counter(given_words) & Counter(gold_words)).values())
    if not common:  # also where both normalise to nothing
        return ZERO
    precision, recall = common / len(given_words), common / len(gold_words)
    return Score(float(given == gold), 2 * precision * recall / (precision + recall), precision, recall)
