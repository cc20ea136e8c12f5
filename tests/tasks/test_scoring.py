import math
import re
import string
from collections import Counter

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from swirl_fast.intervals import wilson
from swirl_fast.tasks.scoring import (
    ZERO,
    normalise_answer,
    number,
    same_number,
    score_auto,
    score_exact,
    score_f1,
    score_number,
    score_text,
)
from swirl_fast.tasks.task import Score

RIGHT = Score(1.0, 1.0, 1.0, 1.0)


@pytest.mark.parametrize(
    ("answer", "gold", "same"),
    [
        ("10", "10", True),
        ("10.00", "10", True),
        ("$10", "10", True),
        ("10 clips", "10", True),
        ("The answer is 10.", "10", True),
        ("x = 10", "10", True),
        ("1,080", "1080", True),
        ("1080.0", "1,080", True),
        ("−4", "-4", True),
        ("- 4", "-4", True),
        ("-$4.50", "-4.5", True),
        ("1e3", "1000", True),
        ("3/4", "0.75", True),
        ("0.75", "3/4", True),
        ("737/960", "737 / 960", True),
        ("1,0", "10", False),
        ("10", "11", False),
        ("4", "-4", False),
        ("0.333", "1/3", False),
        ("48/2", "24", False),  # a calculation that was not made
        ("4/0", "4", False),
        ("10 or 12", "10", False),
        ("5 + 5", "10", False),
        ("10 = 10", "10", False),
        ("ten", "10", False),
        ("", "10", False),
        ("nan", "10", False),
        ("H2O", "2", False),
        # percent
        ("10%", "50%", False),
        ("50%", "50%", True),
        ("50", "50%", True),
        ("50%", "50", True),
        ("50 %", "50", True),
        ("50%", "0.5", True),
        ("0.5", "50%", True),
        ("5000%", "50", True),
        ("5000%", "50%", False),
        ("50", "0.5", False),
        ("0.5", "50", False),
        ("50 percent", "0.5", True),
        ("50 percent", "50", True),
        # nothing beside the digits is dropped
        ("5k", "5", False),
        ("5k", "5000", True),
        ("1.5 million", "1.5", False),
        ("1.5 million", "1,500,000", True),
        ("minus 5", "5", False),
        ("minus 5", "-5", True),
        ("10_000", "10", False),
        ("10_000", "10000", True),
        ("5x", "5", False),
        ("3rd", "3", False),
        ("12:30", "12", False),
        ("0.333...", "0.333", False),
        ("at least 5", "5", False),
        ("½", "0.5", True),
    ],
)
def test_numbers_are_compared_exactly(answer: str, gold: str, same: bool) -> None:
    assert same_number(answer, gold) is same
    assert score_number(answer, [gold]) == (RIGHT if same else ZERO)


def test_a_number_may_equal_any_gold_answer() -> None:
    assert score_number("7", ["6", "7.0"]) == RIGHT
    assert score_number("7", []) == ZERO
    assert score_number(None, ["7"]) == ZERO


@pytest.mark.parametrize(
    ("answer", "gold", "right"),
    [
        ("1500000", "1.5 million", True),
        ("1.5", "1.5 million", False),
        ("-5", "minus 5", True),
        ("5.0", "5", True),
        ("5", "5 clips", False),  # by words
        ("12", "12:30", False),
        ("3-5", "3-5", True),  # by words
        ("3", "3-5", False),
    ],
)
def test_gold_answers_that_are_numbers_are_compared_as_numbers(answer: str, gold: str, right: bool) -> None:
    assert (score_auto(answer, [gold]).exact_match == 1) is right


@pytest.mark.parametrize(
    ("answer", "gold", "right"),
    [
        ("25 km", "2.5 km", False),
        ("2.5 km.", "2.5 km", True),
        ("1,230 km", "1230 km", True),
        (".5 km", "5 km", False),
        ("5 °C", "-5 °C", False),
        ("−5 °C", "-5 °C", True),
        ("$150 each", "$1.50 each", False),
        ("1.50 each", "$1.50 each", True),
        ("-$5 each", "$5 each", False),
        ("1230", "12:30", False),
        ("20200105", "2020-01-05", False),
        ("12 cups", "1/2 cups", False),
        ("3–5", "3-5", True),
        ("35", "3-5", False),
        ("v123", "v1.2.3", False),
        ("C", "C#", False),
        ("C", "C++", False),
        ("c++.", "C++", True),
        ("O-", "O+", False),
        ("x < 5", "x > 5", False),
        ("x<5", "x < 5", True),
        ("x = 5", "x != 5", False),
        ("**Paris**, France.", "paris france", True),
        ("# A Boeing 747", "the Boeing 747", True),
        ("AT&T", "ATT", True),
        ("yes they are", "yes", False),
        # nothing but articles and punctuation
        ("A", "A", True),
        ("(a)", "A", True),
        ("**A.**", "A", True),
        ("B", "A", False),
        ("A+", "A", False),
        ("An", "A", False),
        ("The", "the", True),
        ("+", "+", True),
        ("-", "+", False),
        ("==", "!=", False),
        ("", "+", False),
    ],
)
def test_punctuation_that_makes_another_answer(answer: str, gold: str, right: bool) -> None:
    for score in (score_exact, score_auto, score_f1):
        assert (score(answer, [gold]).exact_match == 1) is right, score
    assert score_exact(None, [gold]) == ZERO


def test_each_gold_answer_is_compared_in_its_own_way() -> None:
    golds = ["5.0", "five", "2.5 km"]
    for answer, right in (
        ("5", 1),
        ("$5", 1),
        ("Five.", 1),
        ("2.5 km", 1),
        ("50", 0),
        ("25 km", 0),
        ("-5", 0),
        (None, 0),
    ):
        assert score_auto(answer, golds).exact_match == right, answer
    assert score_auto("five apples", golds).f1 == pytest.approx(2 / 3)
    assert score_exact("15", ["1.5"]) == score_exact("5", ["-5"]) == ZERO


@pytest.mark.parametrize(
    ("answer", "golds", "score"),
    [
        ("The Rush", ["rush"], RIGHT),
        ("Rush!", ["Rush"], RIGHT),
        ("Canadian band Rush", ["Rush"], Score(0.0, 0.5, 1 / 3, 1.0)),
        ("New York", ["New York City"], Score(0.0, 0.8, 1.0, 2 / 3)),
        ("New New York", ["York New"], Score(0.0, 0.8, 2 / 3, 1.0)),
        ("Paris", ["London", "Paris, France"], Score(0.0, 2 / 3, 1.0, 0.5)),
        ("Paris", ["Paris, France", "Paris"], RIGHT),
        ("London", ["Paris"], ZERO),
        ("yes", ["yes"], RIGHT),
        ("Yes.", ["yes"], RIGHT),
        ("yes", ["no"], ZERO),
        ("yes", ["yes they are"], ZERO),
        ("yes they are", ["yes"], ZERO),
        ("no", ["no man"], ZERO),
        ("noanswer", ["noanswer here"], ZERO),
        ("the", ["the"], ZERO),
        ("", [""], ZERO),
        ("?!", ["a"], ZERO),
        (None, ["Paris"], ZERO),
        ("Paris", [], ZERO),
    ],
)
def test_official_metrics(answer: str | None, golds: list[str], score: Score) -> None:
    assert score_text(answer, golds) == pytest.approx(score)


def official(prediction: str, truth: str) -> tuple[float, float, float, float]:
    """normalize_answer, exact_match_score and f1_score of hotpot_evaluate_v1.py, as published."""

    def normalize(s: str) -> str:
        def remove_articles(text: str) -> str:
            return re.sub(r"\b(a|an|the)\b", " ", text)

        def white_space_fix(text: str) -> str:
            return " ".join(text.split())

        def remove_punc(text: str) -> str:
            exclude = set(string.punctuation)
            return "".join(ch for ch in text if ch not in exclude)

        return white_space_fix(remove_articles(remove_punc(s.lower())))

    p, t = normalize(prediction), normalize(truth)
    match = float(p == t)
    if p in ["yes", "no", "noanswer"] and p != t:
        return match, 0, 0, 0
    if t in ["yes", "no", "noanswer"] and p != t:
        return match, 0, 0, 0
    same = sum((Counter(p.split()) & Counter(t.split())).values())
    if same == 0:
        return match, 0, 0, 0
    precision, recall = same / len(p.split()), same / len(t.split())
    return match, 2 * precision * recall / (precision + recall), precision, recall


_phrases = st.lists(st.sampled_from("the a an yes no Rush rush, New York City 1981 – it's".split()), max_size=5).map(
    " ".join
)


@given(_phrases, _phrases)
def test_equals_the_official_script(answer: str, gold: str) -> None:
    score = score_text(answer, [gold])
    if normalise_answer(answer) or normalise_answer(gold):
        assert (score.exact_match, score.f1, score.precision, score.recall) == pytest.approx(official(answer, gold))
    else:
        assert score == ZERO  # the one difference: nothing is no answer


def of_musique(prediction: str, golds: list[str]) -> tuple[float, float]:
    """Exact match and F1 as MuSiQue's metrics/answer.py defines them: each the best over the gold answers."""
    exact, f1 = [], []
    for gold in golds:
        p, t = (Counter(normalise_answer(text).split()) for text in (prediction, gold))
        exact.append(float(normalise_answer(prediction) == normalise_answer(gold)))
        f1.append(2 * (p & t).total() / (p.total() + t.total()) if p and t else float(p == t))
    return max(exact), max(f1)


def of_beerqa(prediction: str, golds: list[str]) -> tuple[float, float, float, float]:
    """All four as BeerQA's eval_beerqa.py defines them: those of the first gold answer with the highest F1 above 0."""
    best = (0.0, 0.0, 0.0, 0.0)
    for gold in golds:
        one = official(prediction, gold)
        best = one if one[1] > best[1] else best
    return best


@given(_phrases.filter(normalise_answer), st.lists(_phrases.filter(normalise_answer), min_size=1, max_size=4))
def test_equals_the_scripts_for_several_gold_answers(answer: str, golds: list[str]) -> None:
    words = {normalise_answer(gold) for gold in golds}
    # of gold answers with the same words BeerQA's script keeps the first, and so may miss the one that is given
    assume(len({tuple(sorted(one.split())) for one in words}) == len(words))
    score = score_text(answer, golds)
    beerqa = of_beerqa(answer, golds)
    assert (score.exact_match, score.f1) == pytest.approx(beerqa[:2])
    assert score.f1 == pytest.approx(2 * score.precision * score.recall / ((score.precision + score.recall) or 1))
    # 2wikimultihop_evaluate_v1.1.py: the best of each by itself
    each = [official(answer, gold) for gold in golds]
    assert (score.exact_match, score.f1) == pytest.approx([max(column) for column in zip(*each, strict=True)][:2])
    score = score_text(answer, golds, closed=())
    assert (score.exact_match, score.f1) == pytest.approx(of_musique(answer, golds))


@given(st.text(), st.text())
def test_no_answer_raises(answer: str, gold: str) -> None:
    for score in (score_text(answer, [gold]), score_number(answer, [gold])):
        assert 0 <= score.exact_match <= score.f1 <= 1
    number(answer)


@pytest.mark.parametrize(
    "hostile", ["9" * 10**6, "1/" * 10**5, "\ud800", "\x00", "1e99999999999", "-" * 10**5 + "4", "٣"]
)
def test_hostile_answers_are_wrong(hostile: str) -> None:
    assert score_number(hostile, ["3"]) == ZERO
    assert score_text(hostile, ["x"]) == ZERO


def test_interval_against_published_values() -> None:
    # Newcombe 1998, table I, method 3 (Wilson): 81/263, 15/148, 0/20, 1/29
    for successes, n, low, high in [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ]:
        assert wilson(successes, n) == pytest.approx((low, high), abs=5e-5)


@given(st.integers(1, 10_000), st.floats(0, 1))
def test_interval_solves_its_equation(n: int, share: float) -> None:
    successes = min(share * n, n)
    low, high = wilson(successes, n)
    assert 0 <= low <= successes / n + 1e-12 and successes / n <= high + 1e-12 <= 1 + 1e-12
    for p in (low, high):  # |share - p| = z sqrt(p (1 - p) / n)
        if 0 < p < 1:
            expected = 1.959963984540054 * math.sqrt(p * (1 - p) / n)
            assert abs(successes / n - p) == pytest.approx(expected, abs=1e-7)


def test_interval_at_the_edges() -> None:
    assert wilson(0, 0) == (0.0, 1.0)
    assert wilson(5, 5)[1] == 1.0 and wilson(0, 5)[0] == 0.0
    assert wilson(2.5, 5) == pytest.approx((1 - wilson(2.5, 5)[1], wilson(2.5, 5)[1]))
    for successes, n in [(-1, 5), (6, 5), (math.nan, 5), (1, 0), (0, -1)]:
        with pytest.raises(ValueError, match="must be between 0 and n"):
            wilson(successes, n)
