"""How often does a judge agree with people, on steps that real models took?

    python -m benchmarks.judge_people --search FILE --calculator FILE --out FILE                 the rules judge, seconds
    python -m benchmarks.judge_people --search FILE --questions 20 --out FILE judge.kind=model judge.model.url=http://…/v1

`search` and `calculator` are of the judge by itself. `self_consistency` is of the same verdicts under judge.self_consistency=true: an
answer is also held against those of the other trajectories of its question in the file, whoever's they are.

The files are AgentProcessBench's and GSM8K's own (trajectories.py says where they are from and how they are read); nothing of them is
in the result. Every file is cut into halves by a hash of the question: `tune`, on which the rules judge was improved, and `check`, on
which it was not.

A step: accuracy, Cohen's kappa, bad_seen (share of the BAD steps that are called BAD), good_kept (of the GOOD steps that are called
GOOD), all without UNKNOWN, whose share stands beside them. A trajectory: whether "all steps are GOOD" tells that its answer is right
(precision, recall), and how well the share of GOOD steps ranks right above wrong ones (AUC).

Intervals are 95 %: Wilson's for shares, which takes steps as independent; for kappa and AUC a bootstrap over questions, whose
trajectories are alike.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.environment import environment
from benchmarks.judge_people.trajectories import LabelledTrajectory, read_calculator, read_search
from swirl_fast.config import load
from swirl_fast.formats.tags import parse
from swirl_fast.intervals import wilson
from swirl_fast.judges import load_judge
from swirl_fast.judges.agreement import agreement
from swirl_fast.judges.labels import LabelledStep
from swirl_fast.judges.self_consistency import by_vote, has_result
from swirl_fast.verdict import Judgement, Verdict

HALVES = ("tune", "check")
DRAWS = 2000  # of the bootstrap
GOOD, BAD = Verdict.GOOD, Verdict.BAD
Judged = tuple[LabelledTrajectory, Sequence[Judgement]]


def measure(judged: Sequence[Judged]) -> dict[str, Any]:
    """JSON-able; the numbers of one half."""
    pairs = [
        pair
        for trajectory, judgements in judged
        for pair in zip(trajectory.steps, judgements, strict=True)
        if pair[0].label
    ]
    kinds = sorted({step.kind for step, _ in pairs})
    return {
        "questions": len({trajectory.question for trajectory, _ in judged}),
        "steps": _step_measures(pairs),
        "by_kind": {kind: _step_measures([pair for pair in pairs if pair[0].kind == kind]) for kind in kinds},
        "trajectories": _trajectory_measures(judged),
    }


def _step_measures(pairs: Sequence[tuple[LabelledStep, Judgement]]) -> dict[str, Any]:
    report = agreement([step for step, _ in pairs], [judgement for _, judgement in pairs])
    good, bad = (report["confusion"][label.value] for label in (GOOD, BAD))
    shares = {
        "bad_seen": (bad["BAD"], bad["BAD"] + bad["GOOD"]),
        "good_kept": (good["GOOD"], good["GOOD"] + good["BAD"]),
        "unknown_share": (report["unknown"], report["steps"]),
    }
    table = _by_question([(step.view.question, (step.label, judgement.verdict)) for step, judgement in pairs])
    return {
        **{key: report[key] for key in ("steps", "labelled_good", "accuracy", "accuracy_interval", "kappa")},
        "kappa_interval": _bootstrap(table, _kappas),
        **{key: value for name, share in shares.items() for key, value in _share(name, *share).items()},
        "confusion": report["confusion"],
    }


def _share(name: str, part: int, whole: int) -> dict[str, Any]:
    return {name: part / whole if whole else None, f"{name}_interval": list(wilson(part, whole))}


def _trajectory_measures(judged: Sequence[Judged]) -> dict[str, Any]:
    """Of the trajectories of which it is known whether they are right; UNKNOWN counts as not GOOD."""
    rows = []
    for trajectory, judgements in judged:
        if trajectory.right is not None and judgements:
            good = sum(judgement.verdict is GOOD for judgement in judgements)
            rows.append((trajectory.question, trajectory.right, good / len(judgements)))
    right = sum(row[1] for row in rows)
    kept = [row[1] for row in rows if row[2] == 1]
    scores = sorted({row[2] for row in rows})
    return {
        "trajectories": len(rows),
        **_share("right", right, len(rows)),
        **_share("precision", sum(kept), len(kept)),
        **_share("recall", sum(kept), right),
        "auc": _finite(_aucs(np.ones((1, 1)), _tables(rows, scores).sum(0, keepdims=True))[0]),
        "auc_interval": _bootstrap(_tables(rows, scores), _aucs),
    }


def _by_question(rows: Sequence[tuple[str, tuple[Verdict | None, Verdict]]]) -> NDArray[np.float64]:
    """[questions, 4]: steps that are GOOD and called GOOD, GOOD BAD, BAD GOOD, BAD BAD; UNKNOWN is in none."""
    questions = {question: at for at, question in enumerate(dict.fromkeys(question for question, _ in rows))}
    cells = {(GOOD, GOOD): 0, (GOOD, BAD): 1, (BAD, GOOD): 2, (BAD, BAD): 3}
    table = np.zeros((len(questions), 4))
    for question, cell in rows:
        if cell in cells:
            table[questions[question], cells[cell]] += 1
    return table


def _tables(rows: Sequence[tuple[str, bool, float]], scores: Sequence[float]) -> NDArray[np.float64]:
    """[questions, 2 * scores]: trajectories with each score, the wrong ones and then the right ones."""
    questions = {question: at for at, question in enumerate(dict.fromkeys(row[0] for row in rows))}
    places = {score: at for at, score in enumerate(scores)}
    table = np.zeros((len(questions), 2 * len(scores)))
    for question, right, score in rows:
        table[questions[question], places[score] + len(scores) * right] += 1
    return table


def _bootstrap(table: NDArray[np.float64], statistic: Any) -> list[float] | None:
    """95 % percentile interval; None where the statistic has no value in most draws. table: [questions, counts]."""
    if not len(table):
        return None
    weights = np.random.default_rng(0).multinomial(len(table), np.full(len(table), 1 / len(table)), DRAWS)
    values = statistic(weights.astype(float), table)
    values = values[np.isfinite(values)]
    return [float(value) for value in np.quantile(values, [0.025, 0.975])] if 2 * len(values) > DRAWS else None


def _kappas(weights: NDArray[np.float64], table: NDArray[np.float64]) -> NDArray[np.float64]:
    """(observed - chance) / (1 - chance) for every row of weights."""
    with np.errstate(divide="ignore", invalid="ignore"):
        gg, gb, bg, bb = ((weights @ table) / (weights @ table).sum(1, keepdims=True)).T
        chance = (gg + gb) * (gg + bg) + (bg + bb) * (gb + bb)
        return (gg + bb - chance) / (1 - chance)


def _aucs(weights: NDArray[np.float64], table: NDArray[np.float64]) -> NDArray[np.float64]:
    """P(score of a right one > score of a wrong one) + P(equal) / 2 for every row of weights."""
    wrong, right = np.split(weights @ table, 2, axis=1)
    below = np.cumsum(wrong, axis=1) - wrong / 2
    with np.errstate(divide="ignore", invalid="ignore"):
        return (right * below).sum(1) / (right.sum(1) * wrong.sum(1))


def _finite(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def judged_by(overrides: Sequence[str], trajectories: Sequence[LabelledTrajectory]) -> tuple[str, list[Judged]]:
    """(id of the judge, every trajectory with a judgement a step)."""
    steps = [step for trajectory in trajectories for step in trajectory.steps]
    judge = load_judge(load(None, overrides).judge, {step.view.task: step.tools for step in steps})
    judgements = iter(judge.judge([step.view for step in steps]))
    return judge.id, [(trajectory, [next(judgements) for _ in trajectory.steps]) for trajectory in trajectories]


def with_votes(judged: Sequence[Judged]) -> list[Judged]:
    """The same with the votes on answers."""
    answers = [_answer(trajectory) for trajectory, _ in judged]
    informed = [
        any(has_result(parse(text, last.tools), seen) for text, seen in last.view.history)
        for last in (trajectory.steps[-1] for trajectory, _ in judged)
    ]
    of_question: dict[str, list[int]] = {}
    for at, (trajectory, _) in enumerate(judged):
        of_question.setdefault(trajectory.question, []).append(at)
    found = []
    for at, (trajectory, judgements) in enumerate(judged):
        others = tuple(o for i in of_question[trajectory.question] if i != at and (o := answers[i]) is not None)
        vote = (
            None
            if (answer := answers[at]) is None
            else by_vote(answer, others, trajectory.question, informed[at], recorded=True)
        )
        found.append((trajectory, judgements if vote is None else [*judgements[:-1], vote]))
    return found


def _answer(trajectory: LabelledTrajectory) -> str | None:
    last = trajectory.steps[-1]
    action = parse(last.view.action_text, last.tools)
    return action.argument if action.kind == "answer" else None


def describe(name: str, halves: dict[str, Any]) -> str:
    """A table of steps and a line of trajectories for each half."""
    lines = []
    for half, report in halves.items():
        lines += [
            f"\n{name}, {half}: {report['questions']} questions",
            f"{'':26}{'steps':>7}{'GOOD':>7}{'accuracy':>10}{'kappa':>20}{'BAD seen':>10}{'GOOD kept':>11}{'UNKNOWN':>9}",
        ]
        for kind, part in {"all": report["steps"], **report["by_kind"]}.items():
            low, high = part["kappa_interval"] or (None, None)
            kappa = (
                "–"
                if part["kappa"] is None
                else f"{part['kappa']:.2f}" + (f" [{low:.2f}, {high:.2f}]" if low is not None else "")
            )
            shares = "".join(
                f"{_percent(part[key]):>{wide}}"
                for key, wide in (("bad_seen", 10), ("good_kept", 11), ("unknown_share", 9))
            )
            lines.append(
                f"{kind:26}{part['steps']:7}{part['labelled_good']:7}{_percent(part['accuracy']):>10}{kappa:>20}{shares}"
            )
        whole = report["trajectories"]
        shares = ", ".join(f"{key} {_percent(whole[key])}" for key in ("right", "precision", "recall"))
        lines.append(
            f"{whole['trajectories']} trajectories, all steps GOOD: {shares}; AUC {whole['auc'] or float('nan'):.2f}"
        )
    return "\n".join(lines)


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{share:.1%}"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="How often does a judge agree with people?")
    parser.add_argument("--search", metavar="FILE", help="AgentProcessBench's hotpotqa.jsonl")
    parser.add_argument("--calculator", metavar="FILE", help="GSM8K's example_model_solutions.jsonl")
    parser.add_argument("--halves", nargs="+", choices=HALVES, default=HALVES, help="what is measured; both without it")
    parser.add_argument("--questions", type=int, help="of each half of a file; all without it")
    parser.add_argument("--out", help="JSON file of the result")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="of the config, e.g. judge.rules.coverage=full"
    )
    options = parser.parse_args(arguments)
    if not (options.search or options.calculator):
        parser.error("give --search FILE, --calculator FILE, or both")
    result: dict[str, Any] = {
        "environment": environment(),
        "settings": {"questions": options.questions, "config": options.overrides},
        "judges": {},
        "self_consistency": {},
    }
    for name, path, read in (
        ("search", options.search, read_search),
        ("calculator", options.calculator, read_calculator),
    ):
        if path:
            found = _chosen(read(path), options.halves, options.questions)
            result["judges"][name], judged = judged_by(options.overrides, found)
            voted = with_votes(judged)
            for report, what, of in ((result, name, judged), (result["self_consistency"], f"{name}, votes", voted)):
                report[name] = {half: measure([one for one in of if one[0].half == half]) for half in options.halves}
                print(describe(what, report[name]))
    if options.out:
        Path(options.out).parent.mkdir(parents=True, exist_ok=True)
        Path(options.out).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def _chosen(
    trajectories: Sequence[LabelledTrajectory], halves: Sequence[str], questions: int | None
) -> list[LabelledTrajectory]:
    """Those of the first questions of each half."""
    chosen: list[LabelledTrajectory] = []
    for half in halves:
        there = [trajectory for trajectory in trajectories if trajectory.half == half]
        kept = set(list(dict.fromkeys(trajectory.question for trajectory in there))[:questions])
        chosen += [trajectory for trajectory in there if trajectory.question in kept]
    return chosen
