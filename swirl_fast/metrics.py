"""The numbers of every training step, in runs/NAME/metrics.jsonl."""

from __future__ import annotations

import json
import math
from pathlib import Path

METRICS_FILE = "metrics.jsonl"


def read_metrics(folder: Path) -> list[dict[str, float]]:
    """Rows of metrics.jsonl in order, NaN where a value is null; a last line cut off by a crash is left out."""
    path = folder / METRICS_FILE
    rows = []
    for line in path.read_text().splitlines() if path.is_file() else []:
        try:
            row = json.loads(line)
        except ValueError:
            break
        if isinstance(row, dict):
            row = {name: math.nan if value is None else value for name, value in row.items()}
        rows.append(row)
    return rows
