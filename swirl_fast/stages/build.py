"""What the stages build from a config: its task, its judge, its engine; and the copy of the config in the run's folder."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from swirl_fast.config import Config, ConfigError, dump
from swirl_fast.engines.engine import Engine
from swirl_fast.files import write_text
from swirl_fast.judges import close_judge, load_judge
from swirl_fast.judges.judge import Judge
from swirl_fast.ranks import Ranks
from swirl_fast.rendering import open_format
from swirl_fast.tasks import ToolsByTask, offered_tools, open_task, parts_of
from swirl_fast.tasks.corpus import passages_of
from swirl_fast.tasks.task import Question, Task
from swirl_fast.tools import open_tools
from swirl_fast.tools.toolbox import Toolbox


def build_task(config: Config) -> Task:
    return open_task(config)


def check_corpus(config: Config, task: Task) -> None:
    """Raises ConfigError for a corpus that no tool searches."""
    if config.search.corpus and not any("search" in part.tools for part in parts_of(task).values()):
        raise ConfigError(f"search.corpus={config.search.corpus}: no tool searches in it; add search to tasks.tools")


@contextlib.contextmanager
def opened_tools(config: Config, task: Task, offered: ToolsByTask) -> Iterator[dict[str, Toolbox]]:
    """Those on offer, ready for calls, by the name of a question's task. Says afterwards which failed, and how often. Raises as
    `check_corpus` does."""
    check_corpus(config, task)
    with contextlib.ExitStack() as stack:
        boxes = {
            name: stack.enter_context(
                open_tools(specs, config.tools, config.search, passages_of(config, parts_of(task)[name]))
            )
            for name, specs in offered.items()
        }
        yield boxes
    for box in boxes.values():
        for tool, counts in box.counts.items():
            if counts.first_error:
                print(
                    f"tools: {counts.errors} of {counts.calls} calls of {tool} failed; the first: {counts.first_error}"
                )


def questions_by_id(questions: Sequence[Question]) -> dict[str, Question]:
    return {question.id: question for question in questions}


@contextlib.contextmanager
def task_judge(config: Config, task: Task, votes: bool = True) -> Iterator[Judge]:
    """The judge of the steps of a task. A model judge's endpoint is asked once, so that one that cannot work fails here. votes: False for
    an evaluation, whose answers would be held against each other, and so every model's by another measure."""
    form = open_format(config.actions, config.model)
    tasks = list(parts_of(task).values())
    settings = config.judge if votes else replace(config.judge, self_consistency=False)
    with closing_judge(load_judge(settings, offered_tools(task), tasks=tasks, form=form)) as judge:
        yield judge


@contextlib.contextmanager
def labels_judge(config: Config, tools_by_task: ToolsByTask) -> Iterator[Judge]:
    """The judge of labelled steps, which may be of several tasks. tools_by_task: task name -> the tools on offer."""
    settings = replace(config.judge, self_consistency=False)  # labelled steps come without other trajectories
    with closing_judge(load_judge(settings, tools_by_task)) as judge:
        yield judge


@contextlib.contextmanager
def closing_judge(judge: Judge) -> Iterator[Judge]:
    """Closes the connections of a judge that has some."""
    try:
        yield judge
    finally:
        close_judge(judge)


@contextlib.contextmanager
def built_engine(config: Config, weights: str | None, ranks: Ranks | None = None) -> Iterator[Engine]:
    """weights: a Hugging Face folder; None: those of model.path. ranks: those that call this together; the servers that one of them started
    are there until all are done."""
    import torch

    from swirl_fast.engines import load_engine

    engine = load_engine(config, "cuda" if torch.cuda.is_available() else "cpu", weights, ranks)
    try:
        yield engine
        if ranks is not None:
            ranks.meet()
    finally:
        engine.close()


def save_config(config: Config, path: Path | None = None) -> None:
    """By default as config.yaml in the run's folder."""
    write_text(path or config.folder / "config.yaml", dump(config))
