"""The tasks, by the name they have in the configuration."""

from __future__ import annotations

from collections.abc import Callable

from swirl_fast.config import ConfigError, TasksConfig
from swirl_fast.tasks.gsm8k import GSM8K
from swirl_fast.tasks.hotpotqa import HotPotQA
from swirl_fast.tasks.reasoning_gym import ReasoningGym
from swirl_fast.tasks.task import Task

_KINDS: dict[str, Callable[[TasksConfig, int], Task]] = {
    "reasoning_gym": ReasoningGym,
    "gsm8k": GSM8K,
    "hotpotqa": HotPotQA,
}


def load_task(config: TasksConfig, seed: int) -> Task:
    """The task with its questions read or generated. seed: of generated questions; files are used in their own order.

    Raises ConfigError for a setting that cannot work, ValueError for malformed data, naming file, line and field.
    """
    if config.kind not in _KINDS:
        raise ConfigError(f"tasks.kind={config.kind}: must be one of {', '.join(_KINDS)}")
    return _KINDS[config.kind](config, seed)
