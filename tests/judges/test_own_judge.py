"""Rewards and judges of a user's own: what they are given, what they may give, and how they fail."""

from __future__ import annotations

import asyncio
import warnings
from pathlib import Path

import pytest

from swirl_fast.config import ConfigError, JudgeConfig
from swirl_fast.judges import judge_id, load_judge
from swirl_fast.tools import describe_tools
from swirl_fast.tools.tool import CALCULATOR
from swirl_fast.trajectory import StepView
from swirl_fast.verdict import Judgement, Verdict

TOOLS = {"sums": (CALCULATOR,)}
HISTORY = (("<math_exp>1+2</math_exp>", "1+2 -> 3.0"),)


def views(*texts: str) -> list[StepView]:
    return [StepView("sums", "What is 1 + 2?", HISTORY, text) for text in texts]


def judged(
    tmp_path: Path,
    source: str,
    name: str = "reward",
    texts: tuple[str, ...] = ("<answer>3</answer>", "<answer>4</answer>"),
):
    path = tmp_path / "mine.py"
    path.write_text(source, encoding="utf-8")
    judge = load_judge(JudgeConfig(kind=f"{path}:{name}"), TOOLS)
    try:
        return judge.judge(views(*texts))
    finally:
        judge.close()


SEES = """
def reward(step):
    assert step.task == "sums" and step.question == "What is 1 + 2?"
    assert step.history == (("<math_exp>1+2</math_exp>", "1+2 -> 3.0"),)
    if step.action.kind == "answer":
        return float(step.action.argument) / 4
    assert step.action_text == f"So <math_exp>{step.action.argument}</math_exp>"
    return step.action.tool == "calculator" and step.action.arguments == {"expression": "3*3"}
"""


def test_a_function_sees_the_step_and_grades_it(tmp_path: Path) -> None:
    found = judged(tmp_path, SEES, texts=("<answer>3</answer>", "<answer>1</answer>", "So <math_exp>3*3</math_exp>"))
    assert [(one.reward, one.verdict) for one in found] == [
        (0.75, Verdict.GOOD),
        (0.25, Verdict.BAD),
        (1.0, Verdict.GOOD),
    ]


@pytest.mark.parametrize(
    ("source", "rewards"),
    [
        ("def reward(step): return None", [None, None]),
        ("def reward(step): return '3' in step.action.argument", [1.0, 0.0]),
        ("import numpy\ndef reward(step): return numpy.float32(0.5)", [0.5, 0.5]),
        ("def reward(steps): return [len(steps) / 2, None]", [1.0, None]),
        ("import asyncio\nasync def reward(step):\n    await asyncio.sleep(0)\n    return 0.25", [0.25, 0.25]),
        ("async def reward(steps): return [0, 1]", [0.0, 1.0]),
        (
            "from swirl_fast.verdict import Judgement\nclass reward:\n    def judge(self, steps):\n"
            "        return [Judgement.graded(0.75, 'because'), False]",
            [0.75, 0.0],
        ),
    ],
)
def test_forms_of_a_judge(tmp_path: Path, source: str, rewards: list) -> None:
    assert [one.reward for one in judged(tmp_path, source)] == rewards


@pytest.mark.parametrize(
    "bad", ["float('nan')", "2.0", "-0.1", "'high'", "b'1'", "[0.5, 0.5]", "1 / 0", "float('inf')"]
)
def test_what_is_no_reward_is_unknown_and_shown_once(tmp_path: Path, bad: str) -> None:
    source = f"def reward(step):\n    return 1.0 if step.action.argument == '3' else {bad}\n"
    with pytest.warns(
        UserWarning, match="mine.py:reward: a step has no reward .UNKNOWN.: .*(it gave|ZeroDivisionError)"
    ) as shown:
        found = judged(tmp_path, source, texts=("<answer>3</answer>", "<answer>4</answer>", "<answer>5</answer>"))
    assert [one.reward for one in found] == [1.0, None, None] and len(shown) == 1
    assert all(one.reason.startswith("the judge failed: ") for one in found[1:])


BATCH = """
import numpy as np
from swirl_fast.verdict import Judgement, Verdict

class Odd:
    def __float__(self): raise RuntimeError("no number")
    def __repr__(self): raise RuntimeError("no text")

class reward:
    def judge(self, steps):
        return [Judgement.graded(0.75, "because"), GIVEN]
"""


@pytest.mark.parametrize(
    "bad",
    [
        "10**400",
        "10**5000",
        "Odd()",
        "np.zeros(2)",
        "Judgement(Verdict.GOOD, None)",
        "Judgement(Verdict.UNKNOWN, 5)",
    ],
)
def test_a_batch_with_one_that_is_no_reward_keeps_the_others(tmp_path: Path, bad: str) -> None:
    with pytest.warns(UserWarning, match="a step has no reward .UNKNOWN.: ValueError: it gave .*"):
        good, unknown = judged(tmp_path, BATCH.replace("GIVEN", bad))
    assert good == Judgement(Verdict.GOOD, "because", 0.75)
    assert unknown.verdict is Verdict.UNKNOWN and unknown.reason.startswith("the judge failed: ValueError: ")


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ("Judgement.graded(np.float32(0.75), 'r')", Judgement(Verdict.GOOD, "r", 0.75)),
        ("Judgement.graded(np.float64(0.25), np.str_('r'))", Judgement(Verdict.BAD, "r", 0.25)),
        ("Judgement(Verdict.GOOD, 'r', True)", Judgement(Verdict.GOOD, "r", 1.0)),
        ("Judgement('BAD', 'r')", Judgement(Verdict.BAD, "r", 0.0)),
        ("Judgement(Verdict.UNKNOWN, 'r')", Judgement(Verdict.UNKNOWN, "r")),
        ("np.float16(0.5)", Judgement(Verdict.GOOD, "", 0.5)),
    ],
)
def test_judgements_are_kept_in_plain_numbers_and_texts(tmp_path: Path, given: str, wanted: Judgement) -> None:
    found = judged(tmp_path, BATCH.replace("GIVEN", given))[1]
    assert found == wanted
    assert type(found.reward) is type(wanted.reward) and type(found.reason) is str and type(found.verdict) is Verdict


def test_an_asynchronous_one_that_ends_the_process_is_unknown_too(tmp_path: Path) -> None:
    source = "import sys\nasync def reward(step): return 1.0 if step.action.argument == '3' else sys.exit(3)"
    with pytest.warns(UserWarning, match="a step has no reward .UNKNOWN.: SystemExit: 3"):
        found = judged(tmp_path, source)
    assert [one.reward for one in found] == [1.0, None]


def test_one_that_fails_for_all_steps_stops(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"it failed for all of 2 steps: NameError: .* \(mine.py, line 1\)"):
        judged(tmp_path, "def reward(step): return missing_name")
    with pytest.raises(RuntimeError, match="it gave 1 rewards for 2 steps"):
        judged(tmp_path, "def reward(steps): return [1]")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert judged(tmp_path, "def reward(step): return None")[0] == Judgement(
            Verdict.UNKNOWN, "the judge cannot say"
        )


def test_it_works_where_an_event_loop_runs_and_ends_no_process(tmp_path: Path) -> None:
    async def notebook() -> list[Judgement]:
        return judged(tmp_path, "async def reward(step): return 0.5")

    assert [one.reward for one in asyncio.run(notebook())] == [0.5, 0.5]
    with pytest.raises(RuntimeError, match="it failed for all of 2 steps: SystemExit: 3"):
        judged(tmp_path, "import sys\ndef reward(step): sys.exit(3)")
    with pytest.raises(ConfigError, match="mine.py:reward: making it fails: OSError: no key"):
        judged(
            tmp_path, "class reward:\n    def __init__(self): raise OSError('no key')\n    def judge(self, steps): pass"
        )


def test_the_id_is_that_of_the_source_and_of_the_tools(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"

    def identity(source: str, tools=TOOLS) -> str:
        path.write_text(source, encoding="utf-8")
        config = JudgeConfig(kind=f"{path}:reward")
        assert judge_id(config, tools) == load_judge(config, tools).id
        return judge_id(config, tools)

    first = identity("def reward(step): return 1.0")
    assert first == identity("def reward(step): return 1.0") and first.startswith("own-reward@")
    assert first != identity("def reward(step): return 1.1"), "one character"
    tool = "\ndef tool(a: int):\n    '''Adds.\n\n    Args:\n        a: a number\n    '''\n"
    (tmp_path / "tool.py").write_text(tool, encoding="utf-8")
    own = describe_tools([f"{tmp_path}/tool.py:tool"])
    assert first != identity("def reward(step): return 1.0", {"sums": own})


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("reward = 3", "must be a function of a step, or a class with judge.steps., not int"),
        ("def reward(): return 1", "must be a function of one step, or of a list called `steps`"),
        ("def reward(step, gold): return 1", "must be a function of one step"),
        ("class reward: pass", "the class lacks judge"),
        ("class reward:\n    def __init__(self, x): pass\n    def judge(self, steps): pass", "made without arguments"),
    ],
)
def test_what_is_no_judge_is_refused(tmp_path: Path, source: str, message: str) -> None:
    with pytest.raises(ConfigError, match=f"judge.kind=.*mine.py:reward: .*{message}"):
        judged(tmp_path, source)
