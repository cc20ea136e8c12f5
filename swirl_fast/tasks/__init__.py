"""The tasks, by the name they have in the configuration."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from swirl_fast.config import Config, ConfigError, TasksConfig
from swirl_fast.config.references import is_reference
from swirl_fast.files import is_file
from swirl_fast.tasks.beerqa import BeerQA
from swirl_fast.tasks.cofca import CofCA
from swirl_fast.tasks.conversations import Conversations, LogPart
from swirl_fast.tasks.gsm8k import GSM8K
from swirl_fast.tasks.hotpotqa import HotPotQA
from swirl_fast.tasks.mixture import Mixture
from swirl_fast.tasks.musique import MuSiQue
from swirl_fast.tasks.own import OwnTask
from swirl_fast.tasks.qa import QA
from swirl_fast.tasks.reasoning_gym import ReasoningGym
from swirl_fast.tasks.svamp import SVAMP
from swirl_fast.tasks.task import Task
from swirl_fast.tasks.two_step import TwoStep
from swirl_fast.tasks.two_wiki import TwoWikiMultihopQA
from swirl_fast.tasks.worked_examples import read_examples
from swirl_fast.tools import describe_tools
from swirl_fast.tools.characters import whole_characters
from swirl_fast.tools.tool import ToolSpec

_KINDS: dict[str, Callable[[TasksConfig, int], Task]] = {
    "reasoning_gym": ReasoningGym,
    "two_step": TwoStep,
    "qa": QA,
    "gsm8k": GSM8K,
    "svamp": SVAMP,
    "hotpotqa": HotPotQA,
    "musique": MuSiQue,
    "2wikimultihopqa": TwoWikiMultihopQA,
    "beerqa": BeerQA,
    "cofca": CofCA,
}
# Names of the tasks whose answers are texts, whatever they look like, and of those whose answers are numbers.
TEXT_ANSWERS = frozenset(_KINDS) - {"reasoning_gym", "two_step", "qa", "gsm8k", "svamp"}

ToolsByTask = Mapping[str, Sequence[ToolSpec]]


def open_task(config: Config) -> Task:
    """What the trajectories of a run are about: its task, or the conversations of a log. Raises as `load_task` does."""
    if config.collect.source == "conversations":
        return Conversations(config)
    return load_task(config.tasks, config.run.seed)


def load_task(config: TasksConfig, seed: int) -> Task:
    """The task with its questions read or generated, and what the settings put in the place of its own tools, examples and instructions.

    seed: of generated questions; files are used in their own order.

    Raises ConfigError for a setting that cannot work, ValueError for malformed data, naming file, line and field.
    """
    if config.mix:
        return Mixture(config, seed, load_task)
    if is_reference(config.kind):
        task: Task = OwnTask(config, seed)
    elif config.kind in _KINDS:
        task = _KINDS[config.kind](config, seed)
    else:
        raise ConfigError(
            f"tasks.kind={config.kind}: must be one of {', '.join(_KINDS)}, or FILE.py:NAME or MODULE:NAME"
        )
    if config.skip and not task.questions("train"):
        raise ConfigError(f"tasks.skip={config.skip}: {task.name} has no more training questions; pass over fewer")
    if config.tools:
        task.tools = tuple(config.tools)
    if config.worked_examples:
        task.examples = read_examples(Path(config.worked_examples), describe_tools(task.tools))
    task.examples = task.examples[: config.examples]
    if config.instructions:
        task.instructions = whole_characters(_instructions(config.instructions))
    return task


def parts_of(task: Task) -> Mapping[str, Task]:
    """The tasks by the names that their questions give: itself, those of a mixture, or the parts of a log."""
    return task.parts if isinstance(task, Mixture | Conversations) else {task.name: task}


def offered_tools(task: Task) -> ToolsByTask:
    """The tools on offer, by the name of a question's task. Raises ConfigError for one of a user's own that forgets something."""
    return {
        name: part.specs if isinstance(part, LogPart) else describe_tools(part.tools)
        for name, part in parts_of(task).items()
    }


def _instructions(written: str) -> str:
    return Path(written).expanduser().read_text(encoding="utf-8-sig").strip() if is_file(written) else written
