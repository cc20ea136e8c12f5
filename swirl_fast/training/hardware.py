"""What a training ran on, for its report."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import torch

from swirl_fast.ranks import Ranks


def hardware(ranks: Ranks) -> dict[str, str | int]:
    """processor: the GPU of this rank, or the CPU. cores: of the CPU, where that is the processor. ranks: how many train, on how many
    nodes."""
    of_a_node = int(os.environ.get("LOCAL_WORLD_SIZE", ranks.size))
    shared: dict[str, str | int] = {"ranks": ranks.size, "nodes": -(-ranks.size // of_a_node)}
    if ranks.device.type == "cuda":
        return {"processor": torch.cuda.get_device_name(ranks.device), **shared}
    return {"processor": cpu_name(), "cores": os.cpu_count() or 1, **shared}


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    named = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())
