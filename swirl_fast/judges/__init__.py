"""Process judges: GOOD, BAD or UNKNOWN for one step, given the text it followed."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from fractions import Fraction

from swirl_fast.config import ConfigError, JudgeConfig
from swirl_fast.config.judge_schema import JUDGES
from swirl_fast.config.references import is_reference
from swirl_fast.formats.format import Format
from swirl_fast.formats.tags import TAGS
from swirl_fast.judges.judge import Judge
from swirl_fast.judges.own import OwnJudge, own_judge_id
from swirl_fast.judges.recorded_action import RecordedActionJudge, recorded_action_judge_id
from swirl_fast.judges.reference import ReferenceJudge, reference_judge_id
from swirl_fast.judges.rules import RulesJudge
from swirl_fast.judges.self_consistency import PREFIX, SelfConsistentJudge, check_tools
from swirl_fast.tasks.task import Split, Task
from swirl_fast.tools.tool import ToolSpec


def load_judge(
    config: JudgeConfig,
    tools_by_task: Mapping[str, Collection[ToolSpec]],
    probe: bool = True,
    tasks: Sequence[Task] = (),
    form: Format = TAGS,
) -> Judge:
    """The judge a config names, ready for work.

    tools_by_task: task name -> the tools on offer there: by it the rules judge decides what is malformed, and a model judge is
    asked about calls of these tools.
    tasks: those whose steps it will judge, of which the reference judge takes the worked solutions; none for labelled steps, which the
    judges that know more than a step refuse.
    form: how actions are written.
    probe: ask the endpoint of a model judge once, so that a wrong address, key or model name fails here.

    Raises ValueError, with the key, the value and the remedy, for a setting or an endpoint that cannot work.
    """
    if not config.self_consistency:
        return _judge_of_kind(config, tools_by_task, probe, tasks, form)
    check_tools(tools_by_task)
    return SelfConsistentJudge(_judge_of_kind(config, tools_by_task, probe, tasks, form), tools_by_task, form)


def _judge_of_kind(
    config: JudgeConfig,
    tools_by_task: Mapping[str, Collection[ToolSpec]],
    probe: bool,
    tasks: Sequence[Task],
    form: Format,
) -> Judge:
    if config.kind == "rules":
        return RulesJudge(config.rules, tools_by_task, form)
    if config.kind == "model":
        from swirl_fast.judges.model import ModelJudge  # httpx is loaded only where an endpoint is asked

        judge = ModelJudge(config.model, tools_by_task, form=form)
        if probe:
            judge.check()
        return judge
    if config.kind == "reference":
        return ReferenceJudge(tools_by_task, _worked_solutions(tasks), form)
    if config.kind == "recorded_action":
        if not tasks:
            raise ConfigError(
                "judge.kind=recorded_action compares with the recorded trajectories of a run, and labelled steps (judge --against) come "
                "without any; use judge.kind=rules or model"
            )
        return RecordedActionJudge(config.recorded_action, tools_by_task, form)
    if is_reference(config.kind):
        return OwnJudge(config.kind, tools_by_task, form)
    raise ConfigError(_unknown_kind(config))


def judge_id(config: JudgeConfig, tools_by_task: Mapping[str, Collection[ToolSpec]], form: Format = TAGS) -> str:
    """The id that `load_judge` of the same arguments has, under which its verdicts are stored. Opens no connection and reads no file
    but a rubric and the source of an own judge.

    Raises ValueError for a setting that cannot work.
    """
    if config.self_consistency:
        return PREFIX + judge_id(replace(config, self_consistency=False), tools_by_task, form)
    if config.kind == "rules":
        return RulesJudge(config.rules, tools_by_task, form).id
    if config.kind == "model":
        from swirl_fast.judges.model import model_step_judge_id

        return model_step_judge_id(config.model, tools_by_task, form)
    if config.kind == "reference":
        return reference_judge_id(tools_by_task, form)
    if config.kind == "recorded_action":
        return recorded_action_judge_id(config.recorded_action, tools_by_task, form)
    if is_reference(config.kind):
        return own_judge_id(config.kind, tools_by_task, form)
    raise ConfigError(_unknown_kind(config))


def close_judge(judge: Judge) -> None:
    """Closes the connections of a judge that has some."""
    close = getattr(judge, "close", None)
    if close is not None:
        close()


def _unknown_kind(config: JudgeConfig) -> str:
    return (
        f"judge.kind is {config.kind!r}; use {', '.join(JUDGES)}, or a reward of your own: FILE.py:NAME or MODULE:NAME"
    )


def _worked_solutions(tasks: Sequence[Task]) -> dict[str, tuple[Fraction, ...]]:
    """Question text -> results of its solution's steps, of the questions that have one."""
    if not tasks:
        raise ConfigError(
            "judge.kind=reference is shown the worked solutions of a run's own questions, and labelled steps (judge --against) "
            "come without any; use judge.kind=rules or model"
        )
    splits: tuple[Split, ...] = ("train", "eval")
    asked = [(task, question) for task in tasks for split in splits for question in task.questions(split)]
    solutions = {question.text: task.solution(question) for task, question in asked}
    return {text: tuple(steps) for text, steps in solutions.items() if steps}
