"""Would more rules tell right calculator solutions from wrong ones better?

    python -m benchmarks.judge_people.fit --calculator FILE --out FILE                       seconds

A logistic regression over what such rules could look at: the reasons of the rules judge, which operations stand where, which numbers are
used, words of the question. It is fitted to the labels of the half `tune` with penalties of several strengths, and measured on `tune`,
where it knows the labels, and on `check`, whose questions it has not seen: how many right answers it calls BAD where it calls as many wrong
ones GOOD as the rules do. `more_than_rules` is the difference, with a 95 % bootstrap interval over questions. A hint, no proof: another
kind of feature or fit may do better.
"""

from __future__ import annotations

import argparse
import ast
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
from swirl_fast.judges.rules.word_problems import asked
from swirl_fast.tools.arithmetic import CalculationError
from swirl_fast.tools.numerals import mentions
from swirl_fast.verdict import Judgement, Verdict

PENALTIES = (0.1, 1.0, 10.0, 100.0, 1000.0)
DRAWS = 1000  # of the bootstrap
_ASKS = re.compile(r"(?:how (?:many|much|long|far|old)|what)\b[^.?]*\??\s*$")
_ASKED = "more left total each average percent than remain cost much many".split()
_TOLD = "half twice each per week hour other remain than if".split()
Array = NDArray[np.float64]


def look(trajectory: LabelledTrajectory, judgements: Sequence[Judgement]) -> Counter[str]:
    """Name of a feature -> value."""
    found: Counter[str] = Counter()
    for judgement in judgements:
        found["reason " + re.sub(r"[-\d./,]+", "#", judgement.reason)[:40]] += 1
    text = trajectory.question.lower()
    asks = _ASKS.search(text)
    told, wanted = (set(re.findall(r"[a-z]+", part)) for part in (text, asks[0] if asks else text[-100:]))
    mentioned = mentions(trajectory.question)
    numbers = [abs(one.value) for one in mentioned]
    calls = _calls(trajectory)
    operations = Counter(name for call in calls for name in _operations(call))
    found.update({f"told {word}": 1 for word in told.intersection(_TOLD)})
    found.update({f"asked {word}": 1 for word in wanted.intersection(_ASKED)})
    found.update({f"asked {word}, has {name}": 1 for word in wanted.intersection(_ASKED) for name in operations})
    found.update({f"has {name}": min(count, 4) for name, count in operations.items()})
    found["calls"], found["numbers"], found["words"] = len(calls), len(numbers), len(text.split())
    if calls:
        values, used = [call.value for call in calls], [{value for *_, value in call.literals} for call in calls]
        end = type(getattr(calls[-1].tree, "op", calls[-1].tree)).__name__
        found[f"ends with {end}"] = 1
        found.update({f"asked {word}, ends with {end}": 1 for word in wanted.intersection(_ASKED)})
        found["not what is asked for"] = bool(asked(trajectory.question, mentioned).fault(calls[-1]))
        found["below zero"], found["no whole number"] = values[-1] < 0, values[-1].denominator != 1
        found["digits"] = len(str(abs(int(values[-1]))))
        found["a number of the question"] = values[-1] in numbers
        found["results not used"] = sum(
            not any(value in later for later in used[at + 1 :]) for at, value in enumerate(values[:-1])
        )
        found["numbers not used"] = sum(number not in set().union(*used) for number in numbers)
        found["numbers from elsewhere"] = sum(value not in {*numbers, *values} for one in used for value in one)
    return found


def _calls(trajectory: LabelledTrajectory) -> list[Calculation]:
    calls = []
    for step in trajectory.steps:
        try:
            if written := re.search(r"<math_exp>(.*?)</math_exp>", step.view.action_text):
                calls.append(read_calculation(written[1]))
        except CalculationError:
            continue
    return calls


def _operations(call: Calculation) -> list[str]:
    return [type(node.op).__name__ for node in ast.walk(call.tree) if isinstance(node, ast.BinOp)]


def fitted(table: Array, labels: Array, penalty: float) -> Array:
    """The weights of a logistic regression. table: [solutions, features]."""
    weights = np.zeros(table.shape[1])
    for _ in range(25):  # of Newton's method
        p = 1 / (1 + np.exp(-np.clip(table @ weights, -30, 30)))
        slope = table.T @ (p - labels) + penalty * weights
        curvature = (table * (p * (1 - p))[:, None]).T @ table + penalty * np.eye(len(weights))
        weights -= np.linalg.solve(curvature, slope)
    return weights


def right_called_bad(scores: Array, labels: Array, wrong_called_good: float) -> float:
    """Where the threshold is such that this share of the wrong answers is called GOOD."""
    threshold = np.quantile(scores[labels == 0], 1 - wrong_called_good)
    return float((scores[labels == 1] < threshold).mean())


def beside_rules(scores: Array, good: NDArray[np.bool_], labels: Array, questions: NDArray[np.int64]) -> dict[str, Any]:
    """scores of the fit, verdicts of the rules, labels, the number of the question; [answers] each."""

    def measured(at: NDArray[Any]) -> tuple[float, float]:
        rules = float(1 - good[at][labels[at] == 1].mean())
        return right_called_bad(scores[at], labels[at], float(good[at][labels[at] == 0].mean())), rules

    fit, rules = measured(np.arange(len(labels)))
    random = np.random.default_rng(0)
    rows = [np.flatnonzero(questions == question) for question in np.unique(questions)]
    drawn = [
        measured(np.concatenate([rows[at] for at in random.integers(len(rows), size=len(rows))])) for _ in range(DRAWS)
    ]
    interval = np.nanquantile([one - other for one, other in drawn], [0.025, 0.975])
    return {"right_called_bad": fit, "more_than_rules": fit - rules, "interval": [float(edge) for edge in interval]}


def measure(trajectories: Sequence[LabelledTrajectory]) -> dict[str, Any]:
    """JSON-able. Of the solutions that end in an answer."""
    judge, judged = judged_by([], trajectories)
    judged = [one for one in judged if one[0].right is not None and one[0].steps[-1].kind == "answer"]
    looks = [look(*one) for one in judged]
    tune = np.array([one[0].half == "tune" for one in judged])
    names = sorted({name for one, there in zip(looks, tune, strict=True) if there for name in one})
    table = np.array([[float(one[name]) for name in names] for one in looks])
    table = (table - table[tune].mean(0)) / (table[tune].std(0) + 1e-6)
    table = np.hstack([table, np.ones((len(table), 1))])
    labels = np.array([float(bool(one[0].right)) for one in judged])
    good = np.array([one[1][-1].verdict is Verdict.GOOD for one in judged])
    order = {question: at for at, question in enumerate(dict.fromkeys(one[0].question for one in judged))}
    questions = np.array([order[one[0].question] for one in judged])
    halves = dict(zip(HALVES, (tune, ~tune), strict=True))
    result: dict[str, Any] = {"judge": judge, "features": len(names)}
    for half, there in halves.items():
        result[half] = {
            "answers": int(there.sum()),
            "rules": {
                "right_called_bad": float(1 - good[there & (labels == 1)].mean()),
                "wrong_called_good": float(good[there & (labels == 0)].mean()),
            },
            "fit": {},
        }
    for penalty in PENALTIES:
        scores = table @ fitted(table[tune], labels[tune], penalty)
        for half, there in halves.items():
            result[half]["fit"][str(penalty)] = beside_rules(
                scores[there], good[there], labels[there], questions[there]
            )
    return result


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Would more rules tell right solutions from wrong ones better?")
    parser.add_argument("--calculator", metavar="FILE", required=True, help="GSM8K's example_model_solutions.jsonl")
    parser.add_argument("--out", help="JSON file of the result")
    options = parser.parse_args(arguments)
    result = {"environment": environment(), **measure(read_calculator(options.calculator))}
    for half in HALVES:
        print(half, json.dumps(result[half], indent=1))
    if options.out:
        Path(options.out).parent.mkdir(parents=True, exist_ok=True)
        Path(options.out).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
