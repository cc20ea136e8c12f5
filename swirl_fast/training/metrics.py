"""One place where a training step's numbers go out: screen, metrics.jsonl and TensorBoard get the same dict."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import TracebackType
from typing import Self

METRICS_FILE = "metrics.jsonl"


def read_metrics(folder: Path) -> list[dict[str, float]]:
    """Rows of metrics.jsonl in order; a last line cut off by a crash is left out."""
    path = folder / METRICS_FILE
    rows = []
    for line in path.read_text().splitlines() if path.is_file() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


class MetricsLog:
    """Writes only where `active` (rank 0). Rows of steps behind `step`, left by a run that died after its last checkpoint, are
    dropped first, so that every step stands once."""

    def __init__(self, folder: Path, step: int, active: bool, tensorboard: bool, total: int) -> None:
        self._active, self._total = active, total
        self._file = self._board = None
        if not active:
            return
        kept = [row for row in read_metrics(folder) if row["step"] <= step]
        path = folder / METRICS_FILE
        temporary = path.with_name(METRICS_FILE + ".tmp")
        temporary.write_text("".join(json.dumps(row) + "\n" for row in kept))
        temporary.rename(path)
        self._file = path.open("a")
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

    def write(self, metrics: dict[str, float]) -> None:
        if not self._active:
            return
        assert self._file is not None
        self._file.write(json.dumps(metrics) + "\n")
        self._file.flush()
        if self._board is not None:
            for name, value in metrics.items():
                self._board.add_scalar(name, value, int(metrics["step"]))
        print(line(metrics, self._total), flush=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()
        if self._board is not None:
            self._board.close()
        sys.stdout.flush()


def line(metrics: dict[str, float], total: int) -> str:
    """The console line of a training step."""
    m = metrics
    return (
        f"step {m['step']:.0f}/{total}  reward {m['reward']:.3f}  label {m['process_label']:.3f}  malformed {m['malformed']:.2f}  "
        f"unknown {m['unknown']:.0f}  kl {m['kl']:.4f}  entropy {m['entropy']:.2f}  grad {m['grad_norm']:.2f}  "
        f"gap {m['engine_gap_mean']:.1e}  cached {m['cache_hit_rate']:.0%}  "
        f"tok/s {m['tokens_computed_per_second']:.0f} ({m['tokens_effective_per_second']:.0f} effective)  {m['seconds']:.1f} s"
    )
