"""The judge that is shown worked solutions: what it accepts, and where the solutions come from."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path

import pytest

from swirl_fast.config import ConfigError, JudgeConfig, TasksConfig, load
from swirl_fast.judges import load_judge
from swirl_fast.judges.reference import ReferenceJudge
from swirl_fast.tasks import load_task, offered_tools
from swirl_fast.tasks.solutions import step_results
from swirl_fast.tools.calculator import Calculator
from swirl_fast.tools.tool import CALCULATOR, observation
from swirl_fast.trajectory import StepView
from swirl_fast.verdict import Verdict

QUESTION = "A shop packs 4 boxes of 12 pens and sells 9 pens. How many are left?"
SOLUTION = (Fraction(48), Fraction(39), Fraction(39))
FIRST = ("<math_exp>4 * 12</math_exp>", observation("4 * 12", "48.0"))
SECOND = ("<math_exp>48 - 9</math_exp>", observation("48 - 9", "39.0"))


@pytest.mark.parametrize(
    ("history", "action", "verdict", "reason"),
    [
        ((), "<math_exp>12 * 4</math_exp>", Verdict.GOOD, "the result of a step"),
        ((), "<math_exp>4 * 12 - 9</math_exp>", Verdict.GOOD, "the result of a step"),
        ((FIRST,), "<math_exp>48 - 9</math_exp>", Verdict.GOOD, "the result of a step"),
        ((FIRST, SECOND), "<answer>39 pens</answer>", Verdict.GOOD, "the answer of the solution"),
        ((FIRST, SECOND), "<answer>39%</answer>", Verdict.GOOD, "the answer of the solution"),  # a share in percent
        ((FIRST, SECOND), "<answer>39k</answer>", Verdict.BAD, "not the answer"),
        ((FIRST, SECOND), "<answer>minus 39</answer>", Verdict.BAD, "not the answer"),
        ((), "<math_exp>4 + 12</math_exp>", Verdict.BAD, "not the result of a step"),
        ((), "<math_exp>48</math_exp>", Verdict.BAD, "a number, not a calculation"),
        ((), "<math_exp>4 *</math_exp>", Verdict.BAD, "does not evaluate"),
        ((FIRST,), "<math_exp>12 * 4</math_exp>", Verdict.BAD, "shows this result already"),
        ((FIRST,), "<answer>48</answer>", Verdict.BAD, "not the answer"),
        ((FIRST,), "<answer>39</answer>", Verdict.BAD, "no observation shows it"),
        (
            (("I think 39 is it. <math_exp>1 + 1</math_exp>", "1 + 1 -> 2.0"),),
            "<answer>39</answer>",
            Verdict.BAD,
            "no observation",
        ),
        ((), "39", Verdict.BAD, "malformed"),
        ((FIRST, SECOND), "<answer>about 39 or 40</answer>", Verdict.BAD, "not the answer"),
    ],
)
def test_verdicts(history: tuple[tuple[str, str], ...], action: str, verdict: Verdict, reason: str) -> None:
    judge = ReferenceJudge({"gsm8k": (CALCULATOR,)}, {QUESTION: SOLUTION})
    (judgement,) = judge.judge([StepView("gsm8k", QUESTION, history, action)])
    assert judgement.verdict is verdict and reason in judgement.reason


def test_what_it_was_not_told_is_unknown() -> None:
    judge = ReferenceJudge({"gsm8k": (CALCULATOR,)}, {QUESTION: SOLUTION})
    views = [StepView("gsm8k", "Another?", (), FIRST[0]), StepView("other", QUESTION, (), FIRST[0])]
    assert [one.verdict for one in judge.judge(views)] == [Verdict.UNKNOWN] * 2


def test_the_steps_of_solutions() -> None:
    official = "She sold 48/2 = <<48/2=24>>24 clips in May.\nIn all 48+24 = <<48+24=72>>72 clips.\n#### 72"
    assert set(step_results(official, "72")) == {24, 72}
    generated = "1. So 35 × 3 = 105 kiwi\n2. 105 + 35 = 140, worth $1,200=$1,200.50\n#### 140"
    assert step_results("They pay 3 * 5 = $15 thousand and 2 * 2 = 4k. #### 4k", "4k") == (15_000, 4_000, 4_000)
    assert step_results(generated, "140") == (105, 140, Fraction("1200.5"), 140)


def test_a_task_hands_over_its_solutions(tmp_path: Path) -> None:
    """Each official step of generated word problems, done with the real calculator, is GOOD or repeats a result."""
    task = load_task(TasksConfig(kind="reasoning_gym", dataset="gsm_symbolic", limit=40, eval_limit=5), 0)
    judge = load_judge(JudgeConfig(kind="reference"), offered_tools(task), tasks=[task])
    calculator = Calculator()
    for question in [*task.questions("train"), *task.questions("eval")]:
        steps = task.solution(question)
        assert len(steps) >= 2 and str(steps[-1]) == question.answers[0]
        call = f"{steps[-1]} + 0"
        seen = observation(call, calculator.call(call))
        first = StepView(task.name, question.text, (), f"<math_exp>{call}</math_exp>")
        last = StepView(
            task.name, question.text, ((first.action_text, seen),), f"<answer>{question.answers[0]}</answer>"
        )
        assert [one.verdict for one in judge.judge([first, last])] == [Verdict.GOOD] * 2
    calculator.close()
    row = {"question": QUESTION, "answer": "4*12=<<4*12=48>>48\n48-9=<<48-9=39>>39\n#### 39"}
    (tmp_path / "train.jsonl").write_text(json.dumps(row) + "\n" + json.dumps({**row, "question": "Another?"}) + "\n")
    gsm8k = load_task(TasksConfig(kind="gsm8k", path=str(tmp_path / "train.jsonl")), 0)
    assert set(gsm8k.solution(gsm8k.questions("train")[0])) == {48, 39}


def test_a_task_without_solutions_is_refused() -> None:
    config = load(None, ["judge.kind=reference", "tasks.limit=2", "tasks.eval_limit=2"])
    with pytest.raises(ConfigError, match="judge.kind=reference: the questions of chain_sum have no worked solutions"):
        load_judge(config.judge, {"chain_sum": (CALCULATOR,)}, tasks=[load_task(config.tasks, 0)])
