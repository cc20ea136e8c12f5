"""The prompts of benchmarks.rollouts: nested states of trajectories with about the lengths of search QA.

    prompt    instructions, worked examples and a question of a task, in the model's chat template
    action    sampled by the model, at most so many tokens
    result    text of the task, cut to so many tokens: HotPotQA's passages, else other questions with their answers

No tool is called: what a result says changes neither a cache nor a count, and lengths like these need search results,
which generated tasks do not have.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

from swirl_fast.config import TasksConfig
from swirl_fast.engines.engine import Engine, Request, Sampling
from swirl_fast.rendering import Renderer, conversation
from swirl_fast.seeds import seed_of
from swirl_fast.tasks import load_task
from swirl_fast.tasks.task import Task
from swirl_fast.tools import describe_tools


def make_task(data: Path | None, trajectories: int, seed: int) -> Task:
    """GSM8K or HotPotQA from a file in the official format, which is recognised by HotPotQA's field `context`; without a file
    generated word problems. Raises ConfigError or ValueError for a file that is neither."""
    if data is None:
        return load_task(TasksConfig(dataset="gsm_symbolic", limit=64 + 64 * trajectories, eval_limit=1), seed)
    with data.open(encoding="utf-8-sig") as stream:
        kind = "hotpotqa" if '"context"' in stream.read(1 << 16) else "gsm8k"
    return load_task(TasksConfig(kind=kind, path=str(data), limit=0), seed)


def texts(task: Task, skip: int) -> Iterator[str]:
    """What results are made of, over and over; the first `skip` questions are left to the prompts."""
    found = [f"{title}: {text}" for title, text in task.passages()] or [
        f"{question.text} {question.answers[0]}" for question in task.questions("train")[skip:]
    ]
    return itertools.cycle(found)


def nested_states(
    engine: Engine,
    renderer: Renderer,
    task: Task,
    *,
    trajectories: int,
    states: int,
    action: int,
    result: int,
    room: int,
    seed: int,
) -> list[list[list[int]]]:
    """Token ids [trajectory][state]: each state begins with all of the one before. room: tokens that must still fit into the
    engine's context after the last state. Raises ValueError where they do not, or where the task has too few questions."""
    questions = task.questions("train")
    if len(questions) <= trajectories:
        raise ValueError(
            f"{task.name} has {len(questions)} questions to train on; {trajectories} trajectories need more"
        )
    tools = describe_tools(task.tools)
    examples = task.examples[: TasksConfig().examples]
    trunks = [renderer.prompt(conversation(q.text, tools, states, examples)) for q in questions[:trajectories]]
    source = texts(task, trajectories)
    found = [[list(trunk)] for trunk in trunks]
    for step in range(1, states):
        requests = [
            Request(trunk, Sampling(action), stop_ids=renderer.stop_ids, seed=seed_of(seed, t, step), cache_key=str(t))
            for t, trunk in enumerate(trunks)
        ]
        for trunk, (completion,) in zip(trunks, engine.generate(requests), strict=True):
            trunk += [
                *completion.tokens.tolist(),
                *renderer.observation(_text(renderer, source, result), completion.finish == "stop"),
            ]
            if len(trunk) + room > engine.max_context:
                raise ValueError(
                    f"state {step + 1} has {len(trunk)} tokens, which leaves no room for {room} new ones in the model's context "
                    f"of {engine.max_context}; lower --states, --action or --result"
                )
        for trajectory, trunk in zip(found, trunks, strict=True):
            trajectory.append(list(trunk))
    return found


def _text(renderer: Renderer, source: Iterator[str], count: int) -> str:
    """The next texts, about `count` tokens of them."""
    tokens: list[int] = []
    while len(tokens) < count:
        tokens += renderer.tokenizer.encode(next(source) + "\n", add_special_tokens=False)
    return renderer.text(tokens[:count])
