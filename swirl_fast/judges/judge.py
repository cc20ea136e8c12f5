"""The protocol of a process judge."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Protocol

from swirl_fast.config import ConfigError
from swirl_fast.formats.format import Action, Format
from swirl_fast.formats.tags import TAGS
from swirl_fast.tools.tool import ToolSpec
from swirl_fast.trajectory import StepView
from swirl_fast.verdict import Judgement, JudgeStats, Verdict

NO_REPLY = "no reply"  # how the reason of an UNKNOWN begins when an endpoint did not answer
BY_VOTE = "by vote: "  # how the reason of a verdict begins for which no judge was asked (self_consistency.py)
GIVEN_UP = "no reply: given up"  # and when it was not asked, or not as often as it should have been


class Refusal(ConfigError):
    """The judge's endpoint refuses to go on, as when a key is withdrawn. answered: a judgement or None for each step, in order."""

    def __init__(self, message: str, answered: Sequence[Judgement | None] = ()) -> None:
        super().__init__(message)
        self.answered = list(answered)


class Judge(Protocol):
    """One that may judge malformed actions too has `judges_malformed(step) -> bool`, which says at which states."""

    id: str  # names the judge and the version of its prompt or rules; verdicts are cached under it

    def stats(self) -> JudgeStats: ...

    def judge(self, steps: Sequence[StepView]) -> list[Judgement]:
        """One judgement a step, in order. Never raises for what a step contains; a judge that cannot answer says UNKNOWN."""
        ...


def tool_identities(
    tools_by_task: Mapping[str, Collection[ToolSpec]], form: Format = TAGS
) -> dict[str, tuple[str, ...]]:
    """Task -> what its tools are called in the ids of judges, and how calls are written where that is not the default; in a fixed order."""
    identities = {
        task: tuple(sorted({spec.identity for spec in specs})) for task, specs in sorted(tools_by_task.items())
    }
    return {**identities, "": (form.identity,)} if form.identity else identities


def judge_malformed(action: Action) -> Judgement:
    return Judgement(Verdict.BAD, f"malformed: {action.error}")


def is_for(judge: Judge, view: StepView, action: Action) -> bool:
    """Whether the judge sees an action. A malformed one is BAD by the environment's own rule (it did nothing), unless it is whole and the
    judge says that it judges it."""
    if action.kind != "malformed":
        return True
    judges_malformed = getattr(judge, "judges_malformed", None)
    return judges_malformed is not None and not action.cut_off and judges_malformed(view)


def judge_actions(judge: Judge, views: Sequence[StepView], actions: Sequence[Action]) -> list[Judgement]:
    """One judgement an action: the judge's, of those that are for it."""
    seen = [i for i, (view, action) in enumerate(zip(views, actions, strict=True)) if is_for(judge, view, action)]
    judgements = dict(zip(seen, judge.judge([views[i] for i in seen]), strict=True))
    return [judgements[i] if i in judgements else judge_malformed(action) for i, action in enumerate(actions)]
