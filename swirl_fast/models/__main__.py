"""python -m swirl_fast.models --sweep: which model types are exact over shared prefixes."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from swirl_fast.models.sweep import model_types, sweep, write_table


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 1 for a model type that is accepted and wrong, 2 for an argument that cannot work."""
    parser = argparse.ArgumentParser(
        "swirl_fast.models", description="What training over shared prefixes is exact for."
    )
    parser.add_argument("--sweep", action="store_true", required=True, help="try every causal model type, made small")
    parser.add_argument("--only", help="model types, separated by commas")
    parser.add_argument("--write", type=Path, help="a page whose table gets the rows, as docs/models.md")
    options = parser.parse_args(arguments)
    types = options.only.split(",") if options.only else model_types()
    if unknown := sorted(set(types) - set(model_types())):
        parser.error(f"--only: no causal model types of this transformers: {', '.join(unknown)}")
    rows = []
    for row in sweep(types):
        print(row, flush=True)
        rows.append(row)
    if options.write:
        write_table(options.write, rows)
    return int(any(row.result == "WRONG" for row in rows))


if __name__ == "__main__":
    sys.exit(main())
