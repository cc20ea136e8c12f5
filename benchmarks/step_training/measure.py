"""Measures one optimizer step of benchmarks.step_training: seconds by phase, peak memory, loss, gradients against another way's."""

from __future__ import annotations

import ctypes
import gc
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import PreTrainedModel

from benchmarks.step_training.ways import WAYS, Case

SHORT = 3.0  # a cell is repeated until it has taken so many seconds, up to
MOST_REPEATS = 5
PHASES = ("pack", "forward", "backward", "optimizer")


@dataclass(frozen=True)
class Settings:
    device: str
    autocast: torch.dtype | None
    token_budget: int
    rows: int


@dataclass(frozen=True)
class Step:
    """seconds: by phase. gradients are in the model."""

    loss: float
    tokens: int
    micro_batches: int
    seconds: dict[str, float]


class PeakMemory:
    """Most memory in use since this was made, above what was in use then; MiB, None where the system does not tell.

    CUDA: the allocator's own count. CPU: Linux's high-water mark of resident pages, reset after free pages were handed back.
    """

    def __init__(self, device: str) -> None:
        self.device = device
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            self.before: int | None = torch.cuda.memory_allocated()
            return
        try:
            ctypes.CDLL(None).malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
            self.before = self._resident()
        except (OSError, AttributeError):  # no Linux, no glibc, or not allowed
            self.before = None

    def mib(self) -> float | None:
        if self.before is None:
            return None
        peak = torch.cuda.max_memory_allocated() if self.device == "cuda" else self._resident()
        return (peak - self.before) / 2**20

    @staticmethod
    def _resident() -> int:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


@contextmanager
def timed(seconds: dict[str, float], phase: str, device: str) -> Iterator[None]:
    if device == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    yield
    if device == "cuda":
        torch.cuda.synchronize()
    seconds[phase] += time.perf_counter() - started


def forward_backward(model: PreTrainedModel, way: str, case: Case, settings: Settings, bar: tqdm | None = None) -> Step:
    """Leaves the gradient of the whole loss in the model."""
    device = settings.device
    policy = WAYS[way].policy(model, settings.autocast)
    model.zero_grad(set_to_none=True)
    seconds: dict[str, float] = defaultdict(float)
    with timed(seconds, "pack", device):
        batches = WAYS[way].batches(case, settings.token_budget, settings.rows, device)
    loss = 0.0
    for batch in batches:
        with timed(seconds, "forward", device):
            part = -(batch.weights_N * policy(batch.inputs)).sum()
        with timed(seconds, "backward", device):
            part.backward()
        loss += float(part.detach())
        if bar is not None:
            bar.update(batch.tokens)
    return Step(loss, sum(batch.tokens for batch in batches), len(batches), seconds)


class Comparison:
    """The gradients of the first way seen; of every later one the largest difference from it."""

    def __init__(self) -> None:
        self.loss = 0.0
        self.gradients: dict[str, torch.Tensor] = {}

    def differences(self, model: PreTrainedModel, loss: float) -> dict[str, float]:
        """Relative, of the gradients the norm of a parameter's difference over its norm, the largest of all parameters."""
        gradients = {name: p.grad.detach() for name, p in model.named_parameters() if p.grad is not None}
        if not self.gradients:
            self.loss, self.gradients = loss, {name: g.clone() for name, g in gradients.items()}
        assert gradients.keys() == self.gradients.keys(), "one way reaches parameters that another does not"
        worst = max(
            float((g - self.gradients[name]).norm() / self.gradients[name].norm()) for name, g in gradients.items()
        )
        return {
            "loss_difference": abs(loss - self.loss) / abs(self.loss),
            "max_relative_gradient_difference": worst,
        }


def measure_way(
    model: PreTrainedModel,
    initial: dict[str, torch.Tensor],
    way: str,
    case: Case,
    settings: Settings,
    repeats: int,
    comparison: Comparison,
    bar: tqdm,
) -> dict[str, Any]:
    """Trains at least `repeats` steps, each from the `initial` weights. Timings are those of the median step, the rest is of the first.

    peak_memory_mib: over weights and optimizer state. gradient_norm: of all parameters, of the loss, before any clipping.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    for p in model.parameters():  # makes AdamW's moments, which a trainer has from its second step on
        p.grad = torch.zeros_like(p)
    optimizer.step()
    found: dict[str, Any] = {}
    timings: list[dict[str, float]] = []
    while len(timings) < repeats or (sum(map(_total, timings)) < SHORT and len(timings) < MOST_REPEATS):
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.copy_(initial[name])
        model.zero_grad(set_to_none=True)  # gradients count as memory of the step
        memory = PeakMemory(settings.device) if not timings else None
        step = forward_backward(model, way, case, settings, bar if len(timings) < repeats else None)
        with timed(step.seconds, "optimizer", settings.device):
            optimizer.step()
        timings.append(step.seconds)
        if memory is None:
            continue
        found = {
            "tokens_effective": case.effective_tokens,
            "tokens_computed": step.tokens,
            "micro_batches": step.micro_batches,
            "peak_memory_mib": memory.mib(),
            "loss": step.loss,
            "gradient_norm": float(
                torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
            ),
        }
        if settings.autocast is None:
            found |= comparison.differences(model, step.loss)
    middle = sorted(timings, key=_total)[(len(timings) - 1) // 2]
    return {
        **found,
        "seconds": _total(middle),
        **{f"seconds_{phase}": middle[phase] for phase in PHASES},
        "seconds_of_each_repeat": [_total(one) for one in timings],
    }


def _total(seconds: dict[str, float]) -> float:
    return sum(seconds.values())


def compare_in_float32(model: PreTrainedModel, ways: list[str], case: Case, settings: Settings) -> dict[str, float]:
    """The largest differences of the ways without autocast, whose rounding would hide them."""
    exact = replace(settings, autocast=None)
    comparison = Comparison()
    found = [comparison.differences(model, forward_backward(model, way, case, exact).loss) for way in ways]
    return {key: max(row[key] for row in found) for key in found[0]}
