"""One place where a training step's numbers go out: screen, metrics.jsonl, TensorBoard and Weights & Biases get the same dict, with the
names of swirl_fast/metrics.py.

What is not a finite number (the reward of a step without verdicts, the gradient norm of a skipped one) is shown as it is on the screen,
is null in metrics.jsonl, because JSON has no NaN, and a gap in the curves of TensorBoard and Weights & Biases.
"""

from __future__ import annotations

import json
import math
import sys
import uuid
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from swirl_fast.config import ConfigError, TrainingConfig
from swirl_fast.files import write_text
from swirl_fast.metrics import METRICS_FILE, console_line, read_metrics
from swirl_fast.training.pace import Pace

WANDB_ID_FILE = "wandb_id"


def check_wandb(training: TrainingConfig) -> None:
    """Raises ConfigError for training.wandb without the package."""
    if not training.wandb:
        return
    try:
        # This also fails for a mere folder called wandb, as runs leave one.
        from wandb import init  # noqa: F401
    except ImportError:
        raise ConfigError(
            f"training.wandb={training.wandb}: the package is missing; run: pip install wandb (or leave it empty)"
        ) from None


class MetricsLog:
    """Writes only where `active` (rank 0). Rows of steps after `step`, left by a run that died after its last checkpoint, are
    dropped first, so that every step is there once. Weights & Biases cannot drop any: of a step done twice it keeps the first row.

    config: settings of the whole run, for Weights & Biases. done: the part of a step that was done last, for a sign of life in a long one.
    """

    def __init__(
        self,
        folder: Path,
        step: int,
        active: bool,
        training: TrainingConfig,
        config: dict[str, Any] | None = None,
        done: Callable[[], str] | None = None,
    ) -> None:
        self._active, self._steps = active, training.steps
        self._pace = Pace(training.steps, done)
        self._file = self._board = self._wandb = None
        if not active:
            return
        kept = [row for row in read_metrics(folder) if row["step"] <= step]
        path = folder / METRICS_FILE
        write_text(path, "".join(_json(row) for row in kept))
        self._file = path.open("a", encoding="utf-8")
        if training.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)
        if training.wandb:
            self._wandb = _start_wandb(folder, training.wandb, config or {})

    def write(self, metrics: dict[str, float]) -> None:
        if not self._active:
            return
        assert self._file is not None
        self._file.write(_json(metrics))
        self._file.flush()
        finite = {name: value for name, value in metrics.items() if math.isfinite(value)}
        if self._board is not None:
            for name, value in finite.items():
                self._board.add_scalar(name, value, int(metrics["step"]))
        if self._wandb is not None:
            self._wandb.log(finite, step=int(metrics["step"]))
        print(console_line(metrics, self._steps) + self._pace.finish(int(metrics["step"])), flush=True)

    def __enter__(self) -> Self:
        if self._active:
            self._pace.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pace.stop()
        if self._file is not None:
            self._file.close()
        if self._board is not None:
            self._board.close()
        if self._wandb is not None:
            self._wandb.finish(exit_code=0 if kind is None else 1)
        sys.stdout.flush()


def _json(metrics: dict[str, float]) -> str:
    """A row with its line end."""
    row = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
    return json.dumps(row, allow_nan=False) + "\n"


def _start_wandb(folder: Path, project: str, config: dict[str, Any]) -> Any:
    """The run of this folder: the same one again when the training is resumed. Mode, entity and server are Weights & Biases' own
    environment variables (WANDB_MODE=offline, WANDB_ENTITY, WANDB_BASE_URL)."""
    import wandb

    path = folder / WANDB_ID_FILE
    if not path.is_file():
        write_text(path, uuid.uuid4().hex[:12])
    return wandb.init(
        project=project,
        id=path.read_text(encoding="utf-8").strip(),
        resume="allow",
        name=folder.name,
        dir=str(folder),
        config=config,
    )
