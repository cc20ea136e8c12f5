"""collect.source=solutions: trajectories written down from worked solutions, with the real tools, to warm up a model that could not do the
task at all. Train on them with filter.kind=none and algorithm.name=sft.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from swirl_fast.config import ConfigError
from swirl_fast.formats.format import Format, observation_of
from swirl_fast.formats.tags import ANSWER_TAG, TAGS, parse
from swirl_fast.rendering import Renderer, message_of, observed
from swirl_fast.tasks.task import Question, Task
from swirl_fast.tools.tool import CALCULATOR
from swirl_fast.tools.toolbox import Toolbox, ToolCall
from swirl_fast.trajectory import Finish, Step, Trajectory


def demonstrations(
    task: Task,
    questions: Sequence[Question],
    tools: Mapping[str, Toolbox],
    renderer: Renderer,
    prompt: Callable[[Question], list[int]],
    max_steps: int,
    form: Format = TAGS,
) -> Iterator[Trajectory]:
    """One finished trajectory for every question whose solution can be written as at most `max_steps` actions. Log-probs are 0: nobody
    sampled these actions.

    tools: by the name of the task, opened. Raises ConfigError where no question has such a solution.
    """
    tag = CALCULATOR.tag
    written = 0
    for question in questions:
        expressions = task.demonstration(question)
        if not expressions or len(expressions) >= max_steps:
            continue
        tokens, box = prompt(question), tools[question.task]
        trajectory = Trajectory(
            f"{question.id}/0", question.id, question.task, question.text, 0, len(tokens), np.asarray(tokens, np.int32)
        )
        texts = [f"<{tag}>{expression}</{tag}>" for expression in expressions]
        for text in [*texts, f"<{ANSWER_TAG}>{question.answers[0]}</{ANSWER_TAG}>"]:
            message = message_of(parse(text, box.specs), form, text)
            ids = renderer.written(message)
            text = renderer.text(ids)
            action = form.parse(text, box.specs)
            start = len(trajectory.tokens)
            step = Step(start, start + len(ids), text, action, [0.0] * len(ids), 0)
            trajectory.extend(ids)
            trajectory.steps.append(step)
            if action.kind == "tool":
                results = box.call([ToolCall(trajectory.id, call.tool, call.arguments or {}) for call in action.calls])
                step.observation = observation_of(action.calls, results)
                trajectory.extend(
                    renderer.following(message, observed(action, step.observation, form, results), ids[-1])
                )
        trajectory.finish = Finish.ANSWER
        written += 1
        yield trajectory
    if not written:
        raise ConfigError(
            f"collect.source=solutions: no question of {task.name} has a worked solution of at most {max_steps} actions; use gsm8k, svamp, "
            "two_step or reasoning_gym's gsm_symbolic, and raise tasks.max_steps"
        )
