"""Process judges: GOOD, BAD or UNKNOWN for one step, given the text it followed."""

from __future__ import annotations

from collections.abc import Sequence

from swirl_fast.config import ConfigError, JudgeConfig
from swirl_fast.judges.judge import Judge
from swirl_fast.judges.reference import ReferenceJudge
from swirl_fast.judges.rules import RulesJudge
from swirl_fast.tasks.task import Split, Task


def load_judge(config: JudgeConfig, tasks: Sequence[Task], probe: bool = True) -> Judge:
    """The judge a config names, ready for work.

    tasks: those whose steps it will judge; their tools tell the rules judge what is malformed, their solutions are for the reference judge.
    probe: ask the endpoint of a model judge once, so that a wrong address, key or model name fails here.

    Raises ValueError, with the key, the value and the remedy, for a setting or an endpoint that cannot work.
    """
    tools_by_task = {task.name: task.tools for task in tasks}
    if config.kind == "rules":
        return RulesJudge(config.rules, tools_by_task)
    if config.kind == "model":
        from swirl_fast.judges.model import ModelJudge  # httpx is loaded only where an endpoint is asked

        judge = ModelJudge(config.model)
        if probe:
            judge.check()
        return judge
    if config.kind == "reference":
        splits: tuple[Split, ...] = ("train", "eval")
        asked = [(task, question) for task in tasks for split in splits for question in task.questions(split)]
        solutions = {question.text: task.solution(question) for task, question in asked}
        return ReferenceJudge(tools_by_task, {text: steps for text, steps in solutions.items() if steps})
    raise ConfigError(f"judge.kind is {config.kind!r}; use rules, model or reference")
