"""A process judge that is shown the worked solution of each word problem: a stand-in for a judge that could solve it.

The paper's judge is a model much larger than the policy, which judges without gold labels (arXiv 2504.04736). Where no such model can be
served, as on a CPU, this one shows what step-wise training does with verdicts that are right: a calculation is GOOD if it gives the result
of a step of the solution, the answer included, that was not there yet; an answer is GOOD if it is the solution's and an observation shows
it. It uses gold labels, so what it shows does not measure the paper's method, and its verdicts do not replace a real judge.

Limits: a solution is one of several ways; steps that another way would take are BAD. A result can be right by chance.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence
from fractions import Fraction

from swirl_fast.config import ConfigError
from swirl_fast.formats.format import Action, Call, Format, results_in
from swirl_fast.formats.tags import TAGS
from swirl_fast.judges.judge import tool_identities
from swirl_fast.judges.rules.calculations import read_calculation
from swirl_fast.tasks.scoring import states
from swirl_fast.tools.arithmetic import CalculationError
from swirl_fast.tools.numerals import numbers
from swirl_fast.tools.tool import ToolSpec
from swirl_fast.trajectory import StepView
from swirl_fast.verdict import Judgement, JudgeStats, Verdict

VERSION = 2  # part of the judge's id, under which verdicts are cached


class ReferenceJudge:
    """solutions: question text -> results of the steps of its solution, the answer last. A step of any other question is UNKNOWN.

    Raises ConfigError when there are no solutions at all.
    """

    def __init__(
        self,
        tools_by_task: Mapping[str, Collection[ToolSpec]],
        solutions: Mapping[str, Sequence[Fraction]],
        form: Format = TAGS,
    ) -> None:
        if not solutions:
            raise ConfigError(
                f"judge.kind=reference: the questions of {', '.join(tools_by_task)} have no worked solutions; use gsm8k, "
                "svamp, two_step or reasoning_gym's gsm_symbolic, or judge.kind=rules or model"
            )
        self._tools = tools_by_task
        self._solutions = solutions
        self._form = form
        self.id = reference_judge_id(tools_by_task, form)

    def stats(self) -> JudgeStats:
        return JudgeStats()

    def judge(self, steps: Sequence[StepView]) -> list[Judgement]:
        """One judgement a step, in order. Never raises for what a step contains."""
        return [self._judge(step) for step in steps]

    def _judge(self, step: StepView) -> Judgement:
        solution = self._solutions.get(step.question)
        if solution is None or step.task not in self._tools:
            return Judgement(Verdict.UNKNOWN, "the judge has no solution of this question")
        tools = self._tools[step.task]
        action = self._form.parse(step.action_text, tools)
        if action.kind == "malformed":
            return Judgement(Verdict.BAD, f"malformed: {action.error}")
        shown: list[Fraction] = []
        for text, seen in step.history:
            shown += _results(self._form.parse(text, tools), seen)
        if action.kind == "answer":
            if not states(action.argument, solution[-1]):
                return Judgement(Verdict.BAD, "not the answer of the solution")
            if solution[-1] not in shown:
                return Judgement(Verdict.BAD, "the answer of the solution, but no observation shows it")
            return Judgement(Verdict.GOOD, "the answer of the solution, as an observation shows it")
        judged = [_judge_call(call, solution, shown) for call in action.calls]
        return next((one for one in judged if one.verdict is Verdict.BAD), judged[0])


def _judge_call(call: Call, solution: Sequence[Fraction], shown: Sequence[Fraction]) -> Judgement:
    try:
        calculation = read_calculation(call.argument)
    except CalculationError as error:
        return Judgement(Verdict.BAD, f"the calculation does not evaluate: {error}")
    if len(calculation.literals) < 2:
        return Judgement(Verdict.BAD, "a number, not a calculation")
    if calculation.value in shown:
        return Judgement(Verdict.BAD, "an observation shows this result already")
    if calculation.value not in solution:
        return Judgement(Verdict.BAD, "not the result of a step of the solution")
    return Judgement(Verdict.GOOD, "the result of a step of the solution")


def reference_judge_id(tools_by_task: Mapping[str, Collection[ToolSpec]], form: Format = TAGS) -> str:
    digest = hashlib.sha256(repr(sorted(tool_identities(tools_by_task, form).items())).encode()).hexdigest()[:8]
    return f"reference-v{VERSION}-tools.{digest}"


def _results(action: Action, seen: str) -> list[Fraction]:
    """What the environment wrote after the calls of a turn, not what the model claims."""
    found = [numbers(text) for text in results_in(action.calls, seen) or ()]
    return [values[0] for values in found if len(values) == 1]
