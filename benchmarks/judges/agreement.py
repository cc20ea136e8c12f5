"""How often is a judge right on steps whose label is known by construction (steps.py)?

    python -m benchmarks.judges --out benchmarks/results/DATE-judge-agreement.json       the rules judge, seconds
    python -m benchmarks.judges --good 1 --bad 1 --seeds 1 --out FILE judge.kind=model judge.model.url=http://…/v1
    python -m benchmarks.judges --labels FILE                         only the set, for swirl-fast judge --against FILE

Read with care: the steps are made, not sampled from a policy, and their kinds are ours; a policy that is trained makes other mistakes,
in other shares. What is measured is whether a judge sees the kinds of fault that are in the set, one by one: read by_kind.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.environment import environment
from benchmarks.judges.steps import BAD_STEPS, GOOD_STEPS, constructed
from swirl_fast.config import Config, load
from swirl_fast.judges import load_judge
from swirl_fast.judges.agreement import agreement, describe
from swirl_fast.judges.labels import LabelledStep, write_labels


def measure(config: Config, steps: Sequence[LabelledStep]) -> dict[str, Any]:
    judge = load_judge(config.judge, {step.view.task: step.tools for step in steps})
    # asked also about malformed steps, which the stages call BAD without asking
    return {"judge": judge.id, **agreement(steps, judge.judge([step.view for step in steps]))}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description="How often is a judge right on steps whose label is known by construction?"
    )
    parser.add_argument("--out", help="JSON file of the result")
    parser.add_argument("--labels", help="only write the steps into this file")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--seeds", type=int, default=5, help="sets that are judged; only the accuracy of the further ones is printed"
    )
    parser.add_argument("--good", type=int, default=GOOD_STEPS, help="steps of each GOOD kind")
    parser.add_argument("--bad", type=int, default=BAD_STEPS, help="steps of each BAD kind")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="of the config, e.g. judge.rules.coverage=full"
    )
    options = parser.parse_args(arguments)
    config = load(None, options.overrides)
    if options.labels:
        written = write_labels(options.labels, constructed(options.seed, options.good, options.bad))
        print(f"{written} labelled steps in {options.labels}")
        return
    report = measure(config, constructed(options.seed, options.good, options.bad))
    further = range(options.seed + 1, options.seed + options.seeds)
    accuracy = {
        str(seed): measure(config, constructed(seed, options.good, options.bad))["accuracy"] for seed in further
    }
    print(describe(report))
    if accuracy:
        print(
            f"\naccuracy on sets of other seeds: {', '.join(f'{value:.1%}' for value in accuracy.values() if value is not None)}"
        )
    if options.out:
        settings = {
            "seed": options.seed,
            "each_good_kind": options.good,
            "each_bad_kind": options.bad,
            "config": options.overrides,
        }
        result = {"environment": environment(), "settings": settings, "accuracy_of_other_seeds": accuracy, **report}
        Path(options.out).parent.mkdir(parents=True, exist_ok=True)
        Path(options.out).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
