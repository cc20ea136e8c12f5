"""judge.kind=recorded_action: the reward of PivotRL (arXiv 2603.21383), how far an action does what was done at its state in the recorded
trajectory, by whomever.

    kinds       a call is compared with a recorded call, an answer with a recorded answer; anything else is 0
    calls       of one turn are matched so that they agree best; the reward is F1, with how far two matched calls agree in place of hits
    a call      tool by name, arguments by name: the mean over all names of either, where one that is missing or surplus counts 0
    numbers     and texts that are nothing else, by value: 5, 5.0 and "$5" are one number; "5%" is 0.05, and "$5" is not "5 €". What is
                given to the calculator by the value of its calculation
    texts       by token F1 of their words, as answers are scored; by their symbols, case and all, where they hold operators or brackets:
                `a < 5` and `a > 5` are different calls. The same words or symbols are 1, in another order less
    lists of texts   such as several queries: 1 where each text agrees with the one in its place; else matched so that they agree best,
                F1, below 1, with at most 64 texts
    other JSON  equal or not

An answer is compared as a text or a number. The paper asks for functional equivalence, by a verifier of each domain, and leaves its form
open: `arguments`, `threshold`, `turns_without_a_call` and the rules above are ours. A verifier of your own is judge.kind=FILE.py:NAME,
whose steps have `recorded`.

UNKNOWN, never 0: every whole action at a state whose recorded turn is neither a call nor an answer, unless a function of a user's own
judges it, and a step without a recorded one, as in an evaluation. The judge stage compares every recorded action with itself: 1, or
UNKNOWN, which costs nothing and says only where there is something to compare with; recorded turns that are malformed are BAD there, as for
every judge.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from fractions import Fraction
from typing import Any, TypeGuard

from swirl_fast.config import RecordedActionConfig
from swirl_fast.formats.format import Call, Format
from swirl_fast.formats.tags import TAGS
from swirl_fast.judges.judge import judge_malformed, tool_identities
from swirl_fast.judges.own import OwnJudge, own_judge_id
from swirl_fast.judges.rules.calculations import read_calculation
from swirl_fast.tasks.scoring import normalise_answer, score_text
from swirl_fast.tools.arithmetic import CalculationError
from swirl_fast.tools.numerals import currency_in, number_in
from swirl_fast.tools.tool import CALCULATOR, ToolSpec
from swirl_fast.trajectory import StepView
from swirl_fast.verdict import Judgement, JudgeStats, Verdict

VERSION = 4  # of the comparison: part of the judge's id, under which verdicts are cached
MOST_TEXTS = 64  # of a list that is matched: the work grows with their square
OWN = "judge.recorded_action.turns_without_a_call"
NONE = "unknown"  # its value where there is no function

# Symbols that make another call of the same words: operators, brackets of code, and what stands between or before digits.
_FORMAL = re.compile(r"[+*/^=<>%|&~\\{}\[\]_$#@]|\d[.,:-]\d|(?<!\w)[-−]\s?\d|(?<!\w)\.\d|\w-(?!\w)|\d\s*[-−]")


class RecordedActionJudge:
    """tools_by_task: task name -> the tools on offer there, by which both actions are read. A step of a task not listed is UNKNOWN.

    Raises ConfigError for a reference that names nothing; `judge` raises what OwnJudge raises where such a function always fails.
    """

    def __init__(
        self, config: RecordedActionConfig, tools_by_task: Mapping[str, Collection[ToolSpec]], form: Format = TAGS
    ) -> None:
        self.id = recorded_action_judge_id(config, tools_by_task, form)
        self._form = form
        self._exact, self._threshold = config.arguments == "exact", config.threshold
        self._tools = tools_by_task
        own = config.turns_without_a_call
        self._own = None if own == NONE else OwnJudge(own, tools_by_task, form, OWN, (NONE,))

    def stats(self) -> JudgeStats:
        return JudgeStats()

    def close(self) -> None:
        if self._own is not None:
            self._own.close()

    def judges_malformed(self, step: StepView) -> bool:
        """Where the recorded turn is neither a call nor an answer, so that one like it is not worth less than another."""
        tools = self._tools.get(step.task)
        if tools is None or step.recorded is None:
            return False
        return self._form.parse(step.recorded, tools).kind == "malformed"

    def judge(self, steps: Sequence[StepView]) -> list[Judgement]:
        """One judgement a step, in order."""
        judgements = [self._judge(step) for step in steps]
        rest = [i for i, judgement in enumerate(judgements) if judgement is None]
        unknown = Judgement(Verdict.UNKNOWN, "the recorded turn is neither a call nor an answer")
        own = [unknown] * len(rest) if self._own is None else self._own.judge([steps[i] for i in rest])
        for i, judgement in zip(rest, own, strict=True):
            judgements[i] = judgement
        return [judgement for judgement in judgements if judgement is not None]

    def _judge(self, step: StepView) -> Judgement | None:
        """None where the recorded turn can be compared with nothing."""
        tools = self._tools.get(step.task)
        if tools is None:
            return Judgement(Verdict.UNKNOWN, f"the judge was not told the tools of task {step.task[:80]!r}")
        if step.recorded is None:
            return Judgement(Verdict.UNKNOWN, "no action is recorded at this state")
        fresh = self._form.parse(step.action_text, tools)
        recorded = self._form.parse(step.recorded, tools)
        if recorded.kind == "malformed":
            return None
        if fresh.kind == "malformed":
            return judge_malformed(fresh)
        if fresh.kind != recorded.kind:
            names = {"tool": "a call", "answer": "an answer"}
            return Judgement.graded(0.0, f"{names[fresh.kind]}, where {names[recorded.kind]} is recorded")
        if fresh.kind == "answer":
            what, agreement = "the answer", self._texts(fresh.argument, recorded.argument)
        else:
            what, agreement = "the call", self._calls(fresh.calls, recorded.calls)
        if agreement < self._threshold:
            limit = f"judge.recorded_action.threshold={self._threshold:g}"
            return Judgement.graded(0.0, f"{what} agrees with the recorded one by {agreement:.2f}, less than {limit}")
        return Judgement.graded(agreement, f"{what} agrees with the recorded one by {agreement:.2f}")

    def _calls(self, fresh: Sequence[Call], recorded: Sequence[Call]) -> float:
        """F1 of the calls, in [0, 1]."""
        together = [[self._call(one, other) for other in recorded] for one in fresh]
        return min(1.0, 2 * best_matching(together) / (len(fresh) + len(recorded)))

    def _call(self, fresh: Call, recorded: Call) -> float:
        if fresh.tool != recorded.tool:
            return 0.0
        one, other = fresh.arguments or {}, recorded.arguments or {}
        names, shared = one.keys() | other.keys(), one.keys() & other.keys()
        agreements = {
            name: self._values(fresh.tool, one[name], other[name]) if name in shared else 0.0 for name in names
        }
        mean = math.fsum(agreements.values()) / len(names) if names else 1.0
        return float(mean == 1.0) if self._exact else mean

    def _values(self, tool: str, one: Any, other: Any) -> float:
        if tool == CALCULATOR.name and isinstance(one, str) and isinstance(other, str):
            same = _same_calculation(one, other)
            if same is not None:
                return float(same)
        if isinstance(one, str) and isinstance(other, str):
            return self._texts(one, other)
        if _is_texts(one) and _is_texts(other):
            return self._lists(one, other)
        same = _same_number(one, other)
        if same is not None:
            return float(same)
        return float(_same_json(one, other))

    def _lists(self, fresh: Sequence[str], recorded: Sequence[str]) -> float:
        if len(fresh) == len(recorded) and all(one == 1.0 for one in map(text_agreement, fresh, recorded)):
            return 1.0
        if self._exact or max(len(fresh), len(recorded)) > MOST_TEXTS:
            return 0.0
        whole = len(fresh) + len(recorded)
        agreement = best_matching([[self._texts(one, other) for other in recorded] for one in fresh])
        return min(2 * agreement, whole - 1) / whole

    def _texts(self, fresh: str, recorded: str) -> float:
        agreement = text_agreement(fresh, recorded)
        return float(agreement == 1.0) if self._exact else agreement


def recorded_action_judge_id(
    config: RecordedActionConfig, tools_by_task: Mapping[str, Collection[ToolSpec]], form: Format = TAGS
) -> str:
    tools = hashlib.sha256(json.dumps(tool_identities(tools_by_task, form)).encode()).hexdigest()[:8]
    own = config.turns_without_a_call
    function = "" if own == NONE else f"-{own_judge_id(own, tools_by_task, form, OWN, (NONE,))}"
    return f"recorded_action-v{VERSION}-{config.arguments}-threshold.{config.threshold!r}{function}-tools.{tools}"


def best_matching(agreements: Sequence[Sequence[float]]) -> float:
    """The largest sum of agreements of pairs, each row and each column in one pair at most."""
    if len(agreements) == 1 or len(agreements[0]) == 1:
        return max(max(row) for row in agreements)
    import networkx  # comes with torch; a turn with several calls is rare

    graph = networkx.Graph()
    for i, row in enumerate(agreements):
        graph.add_weighted_edges_from(
            (("fresh", i), ("recorded", j), agreement) for j, agreement in enumerate(row) if agreement
        )
    pairs = networkx.max_weight_matching(graph)
    return math.fsum(graph.edges[pair]["weight"] for pair in pairs)


def text_agreement(one: str, other: str) -> float:
    """In [0, 1]; 1 for texts that say the same."""
    one, other = " ".join(one.split()), " ".join(other.split())
    if one == other:
        return 1.0
    same = _same_number(one, other)
    if same is not None:
        return float(same)
    if formal(one) or formal(other):
        return _token_f1(_symbols(one), _symbols(other))
    score = score_text(one, [other])
    return min(score.f1, _token_f1(normalise_answer(one).split(), normalise_answer(other).split()))


def formal(text: str) -> bool:
    """Whether its symbols say something that its words do not."""
    return _FORMAL.search(text) is not None


def _symbols(text: str) -> list[str]:
    return re.findall(r"\w+|[^\w\s]", text)


def _token_f1(one: Sequence[str], other: Sequence[str]) -> float:
    """Below 1 for the same tokens in another order: `a - b` is not `b - a`, nor is "Paris to Rome" "Rome to Paris"."""
    if one == other:
        return 1.0
    common = sum((Counter(one) & Counter(other)).values())
    whole = len(one) + len(other)
    return min(2 * common, whole - 1) / whole if common else 0.0


def _same_calculation(one: str, other: str) -> bool | None:
    """Whether the calculator gives the same value, and a number alone stands against another number alone; None where the recorded one
    gives none."""
    try:
        recorded = read_calculation(other)
    except CalculationError:
        return None
    try:
        fresh = read_calculation(one)
    except CalculationError:
        return False
    return fresh.value == recorded.value and (len(fresh.literals) < 2) == (len(recorded.literals) < 2)


def _is_texts(value: Any) -> TypeGuard[list[str]]:
    return isinstance(value, list) and len(value) > 0 and all(isinstance(one, str) for one in value)


def _same_number(one: Any, other: Any) -> bool | None:
    """By value, and by currency where both name one; None where one of them is no number."""
    left, right = _number(one), _number(other)
    if left is None or right is None:
        return None
    return left[0] == right[0] and (left[1] == right[1] or "" in (left[1], right[1]))


def _number(value: Any) -> tuple[Fraction, str] | None:
    """A JSON number, or a text that is a number and nothing else, with its currency."""
    if isinstance(value, str):
        stated = number_in(value)
        return (stated.value, currency_in(value)) if stated and stated.whole else None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return Fraction(str(value)) if isinstance(value, float) else Fraction(value), ""


def _same_json(one: Any, other: Any) -> bool:
    """True is not 1, 1 is 1.0, in whatever depth; nothing here is bounded by the interpreter's recursion."""
    waiting = [(one, other)]
    while waiting:
        left, right = waiting.pop()
        if isinstance(left, dict) and isinstance(right, dict):
            if left.keys() != right.keys():
                return False
            waiting += [(left[key], right[key]) for key in left]
        elif isinstance(left, list) and isinstance(right, list):
            if len(left) != len(right):
                return False
            waiting += zip(left, right, strict=True)
        elif isinstance(left, bool) != isinstance(right, bool) or left != right:
            return False
    return True
