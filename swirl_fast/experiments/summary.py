"""What the cells of an experiment say together: means over seeds, intervals, gains in pairs, and cost.

Intervals are percentile bootstraps at 95 % with two levels: seeds are drawn with replacement, then the questions of each drawn seed, or
once for all of them where every seed has the same questions, as those of a file.
Arms share seeds and questions, so a difference is drawn in pairs: the same seeds and questions for both. Where all answers are alike (no
right one, say) a bootstrap knows no doubt; Wilson's interval over all questions is given instead.

An evaluation on several tasks (tasks.mix) is there as a whole and by task, as `EVALUATION/TASK`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from swirl_fast.intervals import Floats, bootstrap, wilson

Results = Mapping[tuple[str, int], Mapping[str, Any]]


def summarise(
    arms: Sequence[str],
    evaluations: Sequence[str],
    seeds: Sequence[int],
    compare: tuple[str, str],
    results: Results,
    pairs: Mapping[str, tuple[str, str]] | None = None,
    fewer_seeds: Mapping[str, Sequence[int]] | None = None,
) -> dict[str, Any]:
    """JSON-able. results: (arm, seed) -> a finished cell; cells may be missing: `complete` tells.

    arms: NAME -> in_domain {accuracy, interval, process_label, …}, out_of_domain {EVALUATION: the same}, cost.
    in_domain_relative_gain: of compare[0] over compare[1]; cross_task_relative_gain: the same of the mean accuracy over the other
    evaluations. Null where the second arm has no right answer. comparisons: every arm against compare[1]. lead: compare[0] against
    every other arm. pairs: NAME -> the first of two arms against the second, of those that are asked for.
    fewer_seeds: arm -> its seeds, of those that have not all. Arms are compared by the seeds that both have.
    """
    done = {arm: [seed for seed in seeds if (arm, seed) in results] for arm in arms}
    fewer = dict(fewer_seeds or {})
    complete = all(len(done[arm]) == len(fewer.get(arm, seeds)) for arm in arms)
    summary: dict[str, Any] = {"seeds": list(seeds), **({"fewer_seeds": fewer} if fewer else {}), "complete": complete}
    others = [name for name in evaluations if name != "in_domain"]
    summary["arms"] = {
        arm: {
            "in_domain": _one(arm, "in_domain", done[arm], results),
            "out_of_domain": {name: _one(arm, name, done[arm], results) for name in others},
            "seeds": done[arm],
            "cost": _cost([results[arm, seed] for seed in done[arm]]),
        }
        for arm in arms
        if done[arm]
    }
    parts = [f"{name}/{task}" for name in evaluations for task in _tasks(name, results)]
    treated, control = compare
    summary["compare"] = list(compare)

    def gains(arm: str, other: str) -> dict[str, Any]:
        found = {name: _gain(arm, other, [name], done, results) for name in [*evaluations, *parts]}
        return found | ({"across_tasks": _gain(arm, other, others, done, results)} if others else {})

    summary["comparisons"] = {
        arm: gains(arm, control) for arm in arms if arm != control and done[arm] and done[control]
    }
    summary["lead"] = {arm: gains(treated, arm) for arm in arms if arm != treated and done[arm] and done[treated]}
    if pairs:
        summary["pairs"] = {
            name: {"arms": [one, other], **gains(one, other)}
            for name, (one, other) in pairs.items()
            if done[one] and done[other]
        }
    own = summary["comparisons"].get(treated, {})
    summary["in_domain_relative_gain"] = own.get("in_domain", {}).get("relative_gain")
    summary["cross_task_relative_gain"] = own.get("across_tasks", {}).get("relative_gain")
    return summary


def _one(arm: str, evaluation: str, seeds: Sequence[int], results: Results) -> dict[str, Any]:
    cells = [results[arm, seed] for seed in seeds]
    found = _means(evaluation, cells)
    rows = [cell["evaluations"][evaluation] for cell in cells]
    for key in ("malformed", "repeated", "answered", "steps"):
        values = [row[key] for row in rows if row[key] is not None]  # without a step nothing is repeated
        found[key] = float(np.mean(values)) if values else None
    found["questions"] = sum(row["questions"] for row in rows)
    found["by_seed"] = [row["accuracy"] for row in rows]
    if tasks := _tasks(evaluation, results):
        found["by_task"] = {task: _means(f"{evaluation}/{task}", cells) for task in tasks}
        for task in tasks:
            by_seed = [_values(cell, f"{evaluation}/{task}", "accuracy") for cell in cells]
            found["by_task"][task] |= {
                "questions": sum(map(len, by_seed)),
                "by_seed": [float(own.mean()) for own in by_seed],
            }
    return found


def _means(evaluation: str, cells: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """With their intervals; None where no question has a value."""
    found: dict[str, Any] = {}
    for key in ("accuracy", "process_label", "f1"):
        name = "interval" if key == "accuracy" else f"{key}_interval"
        values = [own for cell in cells if len(own := _values(cell, evaluation, key))]
        if not values:  # a judge that answered nothing gives no label, not one of 0
            found |= {key: None, name: None}
            continue
        crossed = [0] if _same_questions(cells, evaluation, key) else []
        ends = bootstrap([values], lambda means: means[0], crossed=crossed)
        whole = values[0] if crossed else np.concatenate(values)
        if len(whole) and all((own == whole[0]).all() for own in values):
            ends = list(wilson(float(whole.sum()), len(whole)))
        found |= {key: float(np.mean([own.mean() for own in values])), name: ends}
    return found


def _tasks(evaluation: str, results: Results) -> list[str]:
    """Of an evaluation on several."""
    rows = [row for cell in results.values() for row in cell["evaluations"][evaluation]["by_question"].values()]
    return sorted({row["task"] for row in rows if "task" in row})


def _rows(cell: Mapping[str, Any], evaluation: str, key: str) -> dict[str, float]:
    """Question -> value, those without one left out. evaluation: also EVALUATION/TASK."""
    name, _, task = evaluation.partition("/")
    rows = cell["evaluations"][name]["by_question"]
    return {id_: row[key] for id_, row in rows.items() if row[key] is not None and task in ("", row.get("task"))}


def _values(cell: Mapping[str, Any], evaluation: str, key: str) -> Floats:
    return np.array(list(_rows(cell, evaluation, key).values()), np.float64)


def _same_questions(cells: Sequence[Mapping[str, Any]], evaluation: str, key: str) -> bool:
    """Whether several seeds were asked the same questions, in the same order."""
    asked = [list(_rows(cell, evaluation, key)) for cell in cells]
    return len(cells) > 1 and all(one == asked[0] for one in asked)


def _gain(
    arm: str, control: str, evaluations: Sequence[str], done: Mapping[str, Sequence[int]], results: Results
) -> dict[str, Any]:
    """Of the mean accuracy over `evaluations`, over the seeds that both arms have."""
    seeds = [seed for seed in done[arm] if seed in done[control]]
    if not seeds:
        return {}
    sides = [
        [[_values(results[side, seed], name, "accuracy") for seed in seeds] for name in evaluations]
        for side in (arm, control)
    ]
    new, old = (float(np.mean([np.mean([own.mean() for own in values]) for values in side])) for side in sides)
    count = len(evaluations)
    pairs = [*range(count)] * 2
    cells = [results[side, seed] for side in (arm, control) for seed in seeds]
    crossed = [at for at, name in enumerate(evaluations) if len(seeds) > 1 and _same_questions(cells, name, "accuracy")]
    difference = bootstrap(
        [*sides[0], *sides[1]], lambda means: (means[:count] - means[count:]).mean(0), pairs, crossed
    )
    relative = bootstrap(
        [*sides[0], *sides[1]],
        lambda means: (means[:count].mean(0) - means[count:].mean(0)) / np.maximum(means[count:].mean(0), 1e-12),
        pairs,
        crossed,
    )
    return {
        "difference": new - old,
        "difference_interval": difference,
        "relative_gain": (new - old) / old if old else None,
        "relative_gain_interval": [None if abs(end) > 1e6 else end for end in relative] if old else None,
    }


def _cost(cells: Sequence[Mapping[str, Any]]) -> dict[str, float] | None:
    """Means over seeds; None for an arm that is not trained."""
    trained = [cell for cell in cells if cell["trained"]]
    if not trained:
        return None
    keys = ("steps", "seconds", "generated_tokens", "tokens_computed")
    cost = {key: float(np.mean([cell["training"][key] for cell in trained])) for key in keys}
    return cost | {"trajectories": float(np.mean([cell["filter"]["kept"] for cell in trained]))}


def results_table(summary: Mapping[str, Any]) -> str:
    """As text, one line an arm: accuracy and its interval, and the process label, of every evaluation."""
    names = ["in_domain", *next(iter(summary["arms"].values()))["out_of_domain"]]
    width = max(12, *(len(arm) + 2 for arm in summary["arms"]))
    lines = [" " * width + "".join(f"{name:34}" for name in names)]
    for arm, row in summary["arms"].items():
        cells = [row["in_domain"], *row["out_of_domain"].values()]
        texts = [
            f"{one['accuracy']:6.1%} [{one['interval'][0]:.1%}, {one['interval'][1]:.1%}] label "
            + ("–" if one["process_label"] is None else f"{one['process_label']:.0%}")
            for one in cells
        ]
        lines.append(f"{arm:{width}}" + "".join(f"{text:34}" for text in texts))
    treated, control = summary["compare"]
    for key, what in (("in_domain", "in-domain"), ("cross_task", "across tasks")):
        gain = summary[f"{key}_relative_gain"]
        if gain is not None and math.isfinite(gain):
            lines.append(f"{treated} against {control}, {what}: {gain:+.1%} relative")
    for name, gains in summary.get("pairs", {}).items():
        one, gain = gains["arms"], gains["in_domain"]
        low, high = gain["difference_interval"]
        lines.append(
            f"{name}: {one[0]} against {one[1]}, in-domain: {100 * gain['difference']:+.1f} points [{100 * low:+.1f}, {100 * high:+.1f}]"
        )
    return "\n".join(lines)
