"""The tasks, by the name they have in the configuration."""

from __future__ import annotations

from collections.abc import Callable

from swirl_fast.config import ConfigError, TasksConfig
from swirl_fast.tasks.beerqa import BeerQA
from swirl_fast.tasks.cofca import CofCA
from swirl_fast.tasks.gsm8k import GSM8K
from swirl_fast.tasks.hotpotqa import HotPotQA
from swirl_fast.tasks.musique import MuSiQue
from swirl_fast.tasks.reasoning_gym import ReasoningGym
from swirl_fast.tasks.task import Task
from swirl_fast.tasks.two_wiki import TwoWikiMultihopQA

_KINDS: dict[str, Callable[[TasksConfig, int], Task]] = {
    "reasoning_gym": ReasoningGym,
    "gsm8k": GSM8K,
    "hotpotqa": HotPotQA,
    "musique": MuSiQue,
    "2wikimultihopqa": TwoWikiMultihopQA,
    "beerqa": BeerQA,
    "cofca": CofCA,
}
TEXT_ANSWERS = frozenset(_KINDS) - {"reasoning_gym", "gsm8k"}  # names of the tasks whose answers are texts, not numbers


def load_task(config: TasksConfig, seed: int) -> Task:
    """The task with its questions read or generated. seed: of generated questions; files are used in their own order.

    Raises ConfigError for a setting that cannot work, ValueError for malformed data, naming file, line and field.
    """
    if config.kind not in _KINDS:
        raise ConfigError(f"tasks.kind={config.kind}: must be one of {', '.join(_KINDS)}")
    return _KINDS[config.kind](config, seed)
