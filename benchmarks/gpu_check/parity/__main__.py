"""A worker of benchmarks.gpu_check."""

from __future__ import annotations

import argparse
import json
import os
import sys

from benchmarks.gpu_check.parity import parity_cases, run_case


def main() -> int:
    """A worker: reads `NAME / DTYPE` lines, answers each with one line of JSON; all else it prints goes to stderr."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_check.parity", description=main.__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), required=True)
    device = parser.parse_args().device
    if device == "cuda":
        os.environ["SWIRL_KERNELS_BACKEND"] = "triton"
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    cases = {case.name: case for case in parity_cases()}
    for line in sys.stdin:
        name, dtype = line.rstrip("\n").rsplit(" / ", 1)
        row = run_case(cases[name], dtype, device)
        print(json.dumps(row), file=answers, flush=True)
        if row["restart"]:
            return 1
    return 0


sys.exit(main())
