"""Process judges: GOOD, BAD or UNKNOWN for one step, given the text it followed."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from swirl_fast.config import ConfigError, JudgeConfig
from swirl_fast.judges.judge import Judge
from swirl_fast.judges.reference import ReferenceJudge
from swirl_fast.judges.rules import RulesJudge
from swirl_fast.tasks.task import Split, Task


def load_judge(
    config: JudgeConfig, tools_by_task: Mapping[str, Collection[str]], probe: bool = True, tasks: Sequence[Task] = ()
) -> Judge:
    """The judge a config names, ready for work.

    tools_by_task: task name -> names of the tools on offer there: the rules judge tells by it what is malformed, a model judge is asked
    about calls of these tools.
    tasks: those whose steps it will judge; only the reference judge needs them, for their worked solutions.
    probe: ask the endpoint of a model judge once, so that a wrong address, key or model name fails here.

    Raises ValueError, with the key, the value and the remedy, for a setting or an endpoint that cannot work.
    """
    if config.kind == "rules":
        return RulesJudge(config.rules, tools_by_task)
    if config.kind == "model":
        from swirl_fast.judges.model import ModelJudge  # httpx is loaded only where an endpoint is asked

        judge = ModelJudge(config.model, tools_by_task)
        if probe:
            judge.check()
        return judge
    if config.kind == "reference":
        if not tasks:
            raise ConfigError(
                "judge.kind=reference is shown the worked solutions of a run's own questions, and labelled steps (judge --against) "
                "come without any; use judge.kind=rules or model"
            )
        splits: tuple[Split, ...] = ("train", "eval")
        asked = [(task, question) for task in tasks for split in splits for question in task.questions(split)]
        solutions = {question.text: task.solution(question) for task, question in asked}
        return ReferenceJudge(tools_by_task, {text: steps for text, steps in solutions.items() if steps})
    raise ConfigError(f"judge.kind is {config.kind!r}; use rules, model or reference")
