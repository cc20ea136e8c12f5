"""How well can anything tell right calculator solutions from wrong ones by what rules look at?

    python -m benchmarks.judge_people.bound --calculator FILE --out FILE                       seconds

A logistic regression over what a rule could ask of a solution: the reasons of the rules judge, which operations stand where, which numbers
are used, what the question asks for. It is fitted to the labels of the half `tune`, with the strength of its penalty chosen by
cross-validation over questions there, and measured on both halves. On `tune` it has seen every label: what it misses there, no rule of
this kind that is right in general can see. Rules are not fitted, so they should do worse than it does on `check`, or as well.
"""

from __future__ import annotations

import argparse
import json
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.environment import environment
from benchmarks.judge_people.measure import HALVES, judged_by
from benchmarks.judge_people.trajectories import LabelledTrajectory, read_calculator
from swirl_fast.judges.rules.calculations import Calculation, read_calculation
from swirl_fast.tools.arithmetic import CalculationError
from swirl_fast.tools.numerals import mentions
from swirl_fast.verdict import Judgement, Verdict

PENALTIES = (3.0, 10.0, 30.0, 100.0, 300.0, 1000.0)
FOLDS = 5
LENIENT, STRICT = 0.08, 0.38  # right answers called BAD; wrong answers called GOOD
_ASKS = re.compile(r"(?:how (?:many|much|long|far|old)|what)\b[^.?]*\??\s*$")
_ASKED = ("more", "left", "total", "each", "average", "percent", "than", "remain", "cost", "how much", "how many")
_TOLD = ("half", "twice", "%", "each", "per", "week", "hour", "other", "remain", "than", "if")
Array = NDArray[np.float64]


def features(trajectory: LabelledTrajectory, judgements: Sequence[Judgement]) -> Counter[str]:
    """Name -> value."""
    found: Counter[str] = Counter()
    for judgement in judgements:
        found["reason " + re.sub(r"[-\d./,]+", "#", judgement.reason)[:40]] += 1
    text = trajectory.question.lower()
    asks = _ASKS.search(text)
    asked = asks[0] if asks else text[-100:]
    calls = _calls(trajectory)
    numbers = [abs(one.value) for one in mentions(trajectory.question)]
    operations = "".join(_operations(call) for call in calls)
    found["calls"], found["numbers"], found["words"] = len(calls), len(numbers), len(text.split())
    found["calls beyond numbers"] = len(calls) - len(numbers)
    found.update({f"told {word}": 1 for word in _TOLD if word in text})
    for symbol in "+-*/":
        found[f"has {symbol}"] = min(operations.count(symbol), 4)
    for word in _ASKED:
        if word in asked:
            found.update({f"asked {word}": 1, **{f"asked {word}, has {symbol}": 1 for symbol in set(operations)}})
            found[f"asked {word}, ends with {operations[-1:]}"] = 1
    if calls:
        values, used = [call.value for call in calls], [{value for *_, value in call.literals} for call in calls]
        found["ends with " + _operations(calls[-1])[-1:]] = 1
        found["below zero"], found["no whole number"] = values[-1] < 0, values[-1].denominator != 1
        found["size"] = len(str(abs(int(values[-1]))))
        found["a number of the question"] = values[-1] in numbers
        found["results not used"] = sum(
            not any(value in later for later in used[at + 1 :]) for at, value in enumerate(values[:-1])
        )
        found["numbers not used"] = sum(number not in set().union(*used) for number in numbers)
        known = {*numbers, *values}
        found["numbers from elsewhere"] = sum(number not in known for numbers_ in used for number in numbers_)
    return found


def _calls(trajectory: LabelledTrajectory) -> list[Calculation]:
    expressions = [re.search(r"<math_exp>(.*?)</math_exp>", step.view.action_text) for step in trajectory.steps]
    calls = []
    for expression in expressions:
        try:
            calls += [read_calculation(expression[1])] if expression else []
        except CalculationError:
            continue
    return calls


def _operations(call: Calculation) -> str:
    return re.sub(r"[^-+*/]", "", call.source)


def fitted(features: Array, labels: Array, penalty: float) -> Array:
    """The weights of a logistic regression. features: [solutions, features]."""
    weights = np.zeros(features.shape[1])
    for _ in range(12):  # of Newton's method
        p = 1 / (1 + np.exp(-np.clip(features @ weights, -30, 30)))
        slope = features.T @ (p - labels) + penalty * weights
        curvature = (features * (p * (1 - p))[:, None]).T @ features + penalty * np.eye(len(weights))
        weights -= np.linalg.solve(curvature, slope)
    return weights


def auc(scores: Array, labels: Array) -> float:
    """P(score of a right one > score of a wrong one) + P(equal) / 2."""
    right, wrong = scores[labels == 1], scores[labels == 0]
    return float((right[:, None] > wrong).mean() + (right[:, None] == wrong).mean() / 2)


def operating_points(scores: Array, labels: Array) -> dict[str, Any]:
    """What comes of the thresholds at which right answers called BAD, or wrong ones called GOOD, are as many as LENIENT and STRICT say."""
    thresholds = {
        f"right_called_bad_{LENIENT}": np.quantile(scores[labels == 1], LENIENT),
        f"wrong_called_good_{STRICT}": np.quantile(scores[labels == 0], 1 - STRICT),
    }
    return {"auc": auc(scores, labels)} | {
        name: _shares(scores >= threshold, labels) for name, threshold in thresholds.items()
    }


def _shares(good: NDArray[np.bool_], labels: Array) -> dict[str, float]:
    return {
        "right_called_bad": float(1 - good[labels == 1].mean()),
        "wrong_called_good": float(good[labels == 0].mean()),
        "precision": float(labels[good].mean()),
    }


def measure(trajectories: Sequence[LabelledTrajectory]) -> dict[str, Any]:
    """JSON-able. Of the solutions that end in an answer."""
    judge, judged = judged_by([], trajectories)
    judged = [one for one in judged if one[0].right is not None and one[0].steps[-1].kind == "answer"]
    found = [features(*one) for one in judged]
    tune = np.array([one[0].half == "tune" for one in judged])
    names = sorted({name for one, there in zip(found, tune, strict=True) if there for name in one})
    table = np.array([[float(one[name]) for name in names] for one in found])
    table = (table - table[tune].mean(0)) / (table[tune].std(0) + 1e-6)
    table = np.hstack([table, np.ones((len(table), 1))])
    labels = np.array([float(bool(one[0].right)) for one in judged])
    order = {question: at for at, question in enumerate(dict.fromkeys(one[0].question for one in judged))}
    folds = np.array([order[one[0].question] % FOLDS for one in judged])

    def across(penalty: float) -> float:
        scores = np.zeros(len(labels))
        for fold in range(FOLDS):
            there = tune & (folds == fold)
            scores[there] = table[there] @ fitted(table[tune & ~there], labels[tune & ~there], penalty)
        return auc(scores[tune], labels[tune])

    penalty = max(PENALTIES, key=across)
    scores = table @ fitted(table[tune], labels[tune], penalty)
    good = np.array([one[1][-1].verdict is Verdict.GOOD for one in judged])
    return {
        "judge": judge,
        "features": len(names),
        "penalty": penalty,
        "auc_across_questions_of_tune": across(penalty),
        **{
            half: {
                "answers": int(there.sum()),
                "fitted": operating_points(scores[there], labels[there]),
                "rules": _shares(good[there], labels[there]),
            }
            for half, there in zip(HALVES, (tune, ~tune), strict=True)
        },
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description="How well can what rules look at tell right solutions from wrong ones?"
    )
    parser.add_argument("--calculator", metavar="FILE", required=True, help="GSM8K's example_model_solutions.jsonl")
    parser.add_argument("--out", help="JSON file of the result")
    options = parser.parse_args(arguments)
    result = {"environment": environment(), **measure(read_calculator(options.calculator))}
    for half in HALVES:
        print(half, json.dumps(result[half], indent=1))
    if options.out:
        Path(options.out).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
