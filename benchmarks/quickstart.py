"""What does the quickstart teach, and what does it cost? Keeps a finished run's numbers with the machine they were made on.

    make quickstart && .venv/bin/python -m benchmarks.quickstart --out benchmarks/results/DATE-quickstart.json

Not a comparison of methods: one seed, one small model, an easy task; the seconds hold for this machine only.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from benchmarks.environment import environment
from swirl_fast.metrics import read_metrics

STEP_KEYS = (
    "step",
    "reward",
    "process_label",
    "engine_gap_mean",
    "tokens_computed",
    "tokens_effective",
    "cache_hit_rate",
    "seconds",
    "seconds_data",
    "seconds_rollout",
    "seconds_forward_backward",
)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=Path("runs/quickstart"), help="folder of a finished run")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(arguments)
    for name in ("summary.json", "filter.json", "metrics.jsonl"):
        if not (options.run / name).is_file():
            parser.error(f"--run {options.run}: there is no {name}; give the folder of a finished run")
    result = {
        "environment": environment(),
        "summary": json.loads((options.run / "summary.json").read_text(encoding="utf-8")),
        "filter": json.loads((options.run / "filter.json").read_text(encoding="utf-8"))["describe"],
        "steps": [{key: row[key] for key in STEP_KEYS} for row in read_metrics(options.run)],
    }
    options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(options.out)


if __name__ == "__main__":
    main()
