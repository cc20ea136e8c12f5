"""A deterministic process judge: checks every step against the text it followed, without gold labels.

It replays the history of a step, so that a verdict depends on nothing but the view. What a calculation may do depends
on the question:

- The question states an expression (`12 + 34 - 5`, `( 56 + -33 ) - 84`). A calculation must compute all of it, or under
  coverage "connected" a contiguous part that respects precedence: its value and the multiset of its numbers must be
  those of the part, where a result may stand for the part it is the value of. What is left always has the same value,
  so an answer that passes is right. Once the value is there, a further call is BAD.
- It is a word problem. Every number must come from the question, an accepted result or the allowed constants, be used
  no more often than it is given there, and have an influence. Under "connected" a calculation must bring in a number of
  the question that was not used, or join a result that is still open with another number; under "full" it must use all
  numbers. The answer is the last result that rests, directly or through other results, on all numbers of the question.
  Under "single" one calculation must do, which may leave numbers out, but is of a kind that the words ask for
  (word_problems.py).
- The tool is search. A query must be new and about what was read: it holds a name of it, or half of its content words come
  from there. The answer must be a span of a result, and of the form that is asked for (queries.py).

Only accepted (GOOD) calculations count as results: otherwise one bad step would launder a made-up number for all later
ones.

Limits, so that nobody takes it for more. In a word problem it does not see a wrong operation (`a + b` for `a * b`) or
sign (under "single" some), takes every number in digits but 1 as needed (under "single" none), and number words and
units (`three`, `half`, `week`) as allowed, not as needed. Right solutions that it refuses do arithmetic in the head, use
facts of the world (eight legs), or leave out a number that does not matter. In search, any span of a passage that has the
form asked for passes, and so does a guessed yes or no when both sides were looked up. Use a model as judge where that
matters; benchmarks/judges and benchmarks/judge_people measure it.
"""

from __future__ import annotations

import ast
import hashlib
import json
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from decimal import Context, Decimal
from fractions import Fraction
from functools import lru_cache

from swirl_fast.config import ConfigError, RulesConfig
from swirl_fast.config.judge_schema import COVERAGES
from swirl_fast.formats.format import Action, Call, Format, results_in
from swirl_fast.formats.tags import TAGS
from swirl_fast.judges.judge import tool_identities
from swirl_fast.judges.rules.calculations import (
    Calculation,
    composed,
    exchanged,
    idle_numbers,
    read_calculation,
    stated_expression,
)
from swirl_fast.judges.rules.queries import answer_fault, query_fault, words
from swirl_fast.judges.rules.word_problems import Asked, asked
from swirl_fast.tools.arithmetic import CalculationError
from swirl_fast.tools.numerals import mentions, number_in, numbers
from swirl_fast.tools.search import NOTHING_FOUND
from swirl_fast.tools.tool import BUILT_IN, ToolSpec
from swirl_fast.trajectory import StepView
from swirl_fast.verdict import Judgement, JudgeStats, Verdict

VERSION = 7  # of the rules: part of the judge's id, under which verdicts are cached
MAX_ANSWER_CHARS = 40  # of a number with its unit

_SPOKEN = {  # word -> numbers it may stand for
    word: tuple(Fraction(value) for value in entry.split(":")[0].split())
    for entry in (
        "0: zero; 1: one once; 2: two twice double doubled pair couple; 3: three triple tripled; 4: four;"
        "5: five; 6: six; 7: seven daily; 8: eight; 9: nine; 10: ten; 11: eleven; 12: twelve dozen monthly foot feet;"
        "15: fifteen; 20: twenty; 30: thirty; 40: forty; 50: fifty; 60: sixty minute; 100: hundred cent;"
        "1000: thousand; 2 1/2: half halves; 3 1/3: third; 4 1/4 25: fourth quarter; 5 1/5: fifth; 8 1/8: eighth;"
        "10 1/10: tenth; 60 24: hour; 24 7: day; 7 52: week; 12 30: month; 12 52 365 366: year; 10: decade dime;"
        "5: nickel weekday pentagon; 100: century; 31: january march july august october december;"
        "30: april june september november; 28 29: february; 16: pound ounce; 3: yard triangle; 4: gallon; 6: hexagon;"
        "1000: kilometer kilogram km kg gram liter ton; 1000 100: meter; 36 12 3: inch inches"
    ).split(";")
    for word in entry.split(":")[1].split()
}


@dataclass(frozen=True)
class _Source:
    """A number that a calculation may use.

    covers: positions of the question's numbers it rests on; number words come after those in digits. result: position
    in the list of results, -1 for none. fresh: it brings in something: a number not yet used, or a result still open.
    """

    value: Fraction
    covers: frozenset[int] = frozenset()
    result: int = -1
    fresh: bool = False
    constant: bool = False


@dataclass(frozen=True)
class _Question:
    """numbers: absolute values, in order. needed: positions of those an answer must rest on.

    sources: what a calculation may use of a word problem. asked: what its words ask for. parts: (first, end) -> value of every
    contiguous part of a stated expression; empty in a word problem.
    """

    text: str
    numbers: tuple[Fraction, ...]
    needed: frozenset[int]
    sources: tuple[_Source, ...]
    parts: Mapping[tuple[int, int], Fraction]
    asked: Asked = Asked()


@dataclass(frozen=True)
class _Result:
    """An accepted calculation. shown: its value as the tool wrote it. joins: positions of the results in it."""

    value: Fraction
    shown: Fraction
    covers: frozenset[int]
    joins: frozenset[int] = frozenset()


@dataclass
class _State:
    """What the replay of a history leaves. coverage: that of the task."""

    coverage: str = "connected"
    calls: set[object] = field(default_factory=set)
    results: list[_Result] = field(default_factory=list)
    passages: list[str] = field(default_factory=list)  # the search results
    succeeded: str = ""  # the tool of the last call with a result, whether or not the call was accepted


class _Bad(Exception):
    """The reason of a BAD verdict."""


class RulesJudge:
    """Judges calculator and search steps by rules.

    tools_by_task: task name -> the tools on offer there. Raises ValueError for an unknown coverage, a constant that is no finite number,
    or a tool that it has no rules for. A step of a task not listed is UNKNOWN.
    """

    def __init__(
        self, config: RulesConfig, tools_by_task: Mapping[str, Collection[ToolSpec]], form: Format = TAGS
    ) -> None:
        by_task = {f"coverage_by_task.{task}": coverage for task, coverage in config.coverage_by_task.items()}
        for key, coverage in {"coverage": config.coverage, **by_task}.items():
            if coverage not in COVERAGES:
                raise ValueError(f"judge.rules.{key} is {coverage!r}; use one of {', '.join(COVERAGES)}")
        try:
            self._constants = {Fraction(str(constant)) for constant in config.constants}
        except ValueError:
            raise ValueError(f"judge.rules.constants is {list(config.constants)}; use finite numbers") from None
        for task, tools in tools_by_task.items():
            if unknown := sorted(spec.name for spec in tools if spec.name not in BUILT_IN):
                raise ConfigError(
                    f"judge.kind=rules: has no rules for {', '.join(unknown)}, a tool of task {task}; it knows {' and '.join(BUILT_IN)}. "
                    "Use judge.kind=model, or a reward of your own, judge.kind=FILE.py:NAME"
                )
        self._coverage = {task: config.coverage_by_task.get(task, config.coverage) for task in tools_by_task}
        self._tools, self._form = tools_by_task, form
        own = [f"{task}.{coverage}" for task, coverage in sorted(self._coverage.items()) if coverage != config.coverage]
        self.id = "-".join([f"rules-v{VERSION}-{config.coverage}", *own])
        if self._constants != {Fraction(str(constant)) for constant in RulesConfig().constants}:
            self.id += f"-constants.{_hash_json(sorted(map(str, self._constants)))}"
        self.id += f"-tools.{_hash_json(tool_identities(tools_by_task, form))}"

    def stats(self) -> JudgeStats:
        return JudgeStats()

    def judge(self, steps: Sequence[StepView]) -> list[Judgement]:
        """One judgement a step, in order. Never raises for what a step contains."""
        return [self._judge(step) for step in steps]

    def _judge(self, step: StepView) -> Judgement:
        tools = self._tools.get(step.task)
        if tools is None:
            return Judgement(Verdict.UNKNOWN, f"the judge was not told the tools of task {step.task[:80]!r}")
        question = _read_question(step.question)
        state = _State(self._coverage[step.task])
        for text, seen in step.history:
            self._replay(state, question, self._form.parse(text, tools), seen)
        try:
            reason = self._consider_turn(state, question, self._form.parse(step.action_text, tools))
        except _Bad as bad:
            return Judgement(Verdict.BAD, str(bad))
        return Judgement(Verdict.GOOD, reason)

    def _replay(self, state: _State, question: _Question, action: Action, seen: str) -> None:
        """Adds one earlier step. A result is what the environment wrote after the call, not what the model claims."""
        # A turn that was cut off by the length limit may hold a whole call, which nobody made: it may be made again.
        results = results_in(action.calls, seen) if action.kind == "tool" else None
        if results is None:
            return
        considered: list[_Result | None] = []
        one_too_many = _one_too_many(state, action)
        for call in action.calls:
            try:
                considered.append(None if one_too_many else self._consider_call(state, question, call)[1])
            except _Bad:
                considered.append(None)
            state.calls.add(_call_key(call))
        for call, result, text in zip(action.calls, considered, results, strict=True):
            _add_result(state, call, result, text.strip())

    def _consider_turn(self, state: _State, question: _Question, action: Action) -> str:
        """The reason for GOOD. The calls of one turn are made beside each other: none knows the result of another. Raises _Bad."""
        if action.kind == "malformed":
            raise _Bad(f"malformed: {action.error}")
        if action.kind == "answer":
            if not state.succeeded:
                raise _Bad("an answer before any tool gave a result: too little information")
            if state.succeeded == "search":
                reason = answer_fault(action.argument, question.text, state.passages)
                return _pass(
                    reason, "the answer stands in a search result, or is a yes or no after both were looked up"
                )
            return _number_answer(state, question, action.argument)
        if _one_too_many(state, action):
            raise _Bad("one calculation is enough")
        reasons = []
        for call in action.calls:
            reasons.append(self._consider_call(state, question, call)[0])
            state.calls.add(_call_key(call))
        return "; ".join(reasons)

    def _consider_call(self, state: _State, question: _Question, call: Call) -> tuple[str, _Result | None]:
        """(reason, the result of an accepted calculation). Raises _Bad."""
        if call.tool == "search":
            if _call_key(call) in state.calls:
                raise _Bad("the same words were searched before")
            reason = query_fault(call.argument, question.text, state.passages)
            return _pass(reason, "a new query about the question or what was found"), None
        return self._calculation(state, question, call)

    def _calculation(self, state: _State, question: _Question, action: Call) -> tuple[str, _Result]:
        try:
            calculation = read_calculation(action.argument)
        except CalculationError as error:
            raise _Bad(f"the calculation does not evaluate: {error}") from None
        if _call_key(action) in state.calls:
            raise _Bad("the same calculation was made before")
        value = calculation.value
        nodes = list(ast.walk(calculation.tree))
        calls = {node.func.id for node in nodes if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}
        if not any(isinstance(node, ast.BinOp) for node in nodes) and not calls & {"sqrt", "factorial", "mod"}:
            raise _Bad(f"{_show(value)} is a number, not a calculation")
        if calls & {"max", "min"}:
            raise _Bad("max and min let numbers in that have no influence")
        asks_pi = not question.parts and re.search(r"\bpi\b|π", question.text, re.I)
        if not asks_pi and any(isinstance(node, ast.Name) and node.id == "pi" for node in nodes):
            raise _Bad("pi is not in the question")
        full, single = state.coverage == "full", state.coverage == "single" and not question.parts
        done = next((result for result in state.results if result.covers >= question.needed), None)
        # no end is certain in a word problem: 48/2 rests on every number of "48, and half as many. How many in all?"
        if done and (question.parts or full):
            raise _Bad(f"the result {_show(done.shown)} rests on all numbers already: answer with it")
        if single and state.results:
            raise _Bad(f"there is a result already, {_show(state.results[0].shown)}: answer with it")
        match = self._match_stated if question.parts else self._match_words
        covers, joins = match(state, question, calculation)
        missing = [question.numbers[i] for i in sorted(question.needed - covers)]
        if missing and full:
            raise _Bad(f"the calculation leaves out {_list(missing)}")
        if single and (fault := question.asked.fault(calculation)):
            raise _Bad(f"{_show(value)} {fault}")
        rest = f"without {_list(missing)}" if missing else "and rests on all numbers"
        return f"{_show(value)} is computed from numbers at hand {rest}", _Result(value, value, covers, joins)

    def _match_stated(
        self, state: _State, question: _Question, calculation: Calculation
    ) -> tuple[frozenset[int], frozenset[int]]:
        """(positions of the stated numbers it covers, nothing). Raises _Bad unless it equals a part still open."""
        spans = []
        exact: dict[Fraction, Fraction] = {}
        pieces: dict[int, set[tuple[int, Fraction]]] = {}  # start -> (end, absolute value that stands for start..end)
        for result in state.results:
            start, end = min(result.covers), max(result.covers) + 1
            spans.append((start, end))
            pieces.setdefault(start, set()).update({(end, abs(result.value)), (end, abs(result.shown))})
            if result.shown != result.value:
                exact[abs(result.shown)] = abs(result.value)
        # exact values are compared, also where a rounded result was written
        value = exchanged(calculation, exact) if exact else calculation.value
        literals = Counter(literal for _, _, literal in calculation.literals)
        whole, full = (0, len(question.numbers)), state.coverage == "full"
        for (start, end), part in question.parts.items():
            if part != value or (full and (start, end) != whole):
                continue
            # where it overlaps a part that is computed already, it must hold all of that part and more
            overlaps = [(a, b) for a, b in spans if start < b and a < end]
            if any(a < start or end < b or (a, b) == (start, end) for a, b in overlaps):
                continue
            if composed(question.numbers, pieces, start, end, literals):
                return frozenset(range(start, end)), frozenset()
        used, shown = _list(list(literals.elements())), _show(calculation.value)
        if full:
            raise _Bad(f"{shown} from {used} is not the stated expression with all of {_list(question.numbers)}")
        raise _Bad(f"{shown} from {used} is no open part of the stated expression")

    def _match_words(
        self, state: _State, question: _Question, calculation: Calculation
    ) -> tuple[frozenset[int], frozenset[int]]:
        """(positions of the question's numbers it rests on, positions of the results in it). Raises _Bad."""
        joined = frozenset[int]().union(*(result.joins for result in state.results))
        used = frozenset[int]().union(*(result.covers for result in state.results))
        chosen: list[_Source] = []
        for literal, count in Counter(_percentages(calculation, question)).items():
            sources = [
                _Source(literal, source.covers, fresh=not source.covers <= used)
                for source in question.sources
                if source.value == literal
            ]
            sources += [
                _Source(literal, result.covers, at, fresh=at not in joined)
                for at, result in enumerate(state.results)
                if literal in (abs(result.value), abs(result.shown))
            ]
            if literal in self._constants and not sources:
                sources = [_Source(literal, constant=True)]
            if not sources:
                raise _Bad(f"{_show(literal)} is neither in the question nor an accepted result")
            if count > len(sources):
                raise _Bad(f"{_show(literal)} is used {count} times, but given {len(sources)} times")
            # a 7 may be the days of a week and the sum of 3 and 4: what rests on more numbers that an answer needs is meant
            chosen += sorted(sources, key=lambda one: (not one.fresh, -len(one.covers & question.needed)))[:count]
        if all(source.constant for source in chosen):
            raise _Bad("the calculation uses no number of the question and no result")
        neutral, idle = idle_numbers(calculation.source)
        idle |= neutral - {source.value for source in chosen if not source.constant}
        if idle:
            raise _Bad(f"{_list(sorted(idle))} has no influence on the result")
        if state.results and not _progress(chosen):
            raise _Bad("the calculation brings in no new number and joins no open result with another number")
        covers = frozenset[int]().union(*(source.covers for source in chosen))
        return covers, frozenset(source.result for source in chosen if source.result >= 0)


def _one_too_many(state: _State, action: Action) -> bool:
    """Whether a turn holds several calculations where one must do."""
    return state.coverage in ("full", "single") and sum(call.tool == "calculator" for call in action.calls) > 1


def _pass(fault: str, reason: str) -> str:
    if fault:
        raise _Bad(fault)
    return reason


def _progress(chosen: Sequence[_Source]) -> bool:
    if any(source.fresh and source.result < 0 for source in chosen):
        return True
    return any(source.fresh for source in chosen) and sum(not source.constant for source in chosen) >= 2


def _add_result(state: _State, call: Call, result: _Result | None, shown: str) -> None:
    """shown: what the environment wrote after the call. result: of an accepted calculation."""
    if not shown or shown.startswith("ERROR:") or shown == NOTHING_FOUND:
        return
    if call.tool == "search":
        state.succeeded = "search"
        state.passages.append(shown)
    elif len(values := numbers(shown)) == 1:
        state.succeeded = "calculator"
        if result is not None:
            state.results.append(_Result(result.value, values[0], result.covers, result.joins))


def _number_answer(state: _State, question: _Question, argument: str) -> str:
    stated = number_in(argument)
    if len(argument) > MAX_ANSWER_CHARS or stated is None:
        raise _Bad(f"the answer is not one number in at most {MAX_ANSWER_CHARS} characters")
    wanted = [stated.value, stated.bare] if stated.percent else [stated.value]
    single = state.coverage == "single" and not question.parts
    needed = frozenset() if single else question.needed
    last = next((result for result in reversed(state.results) if result.covers >= needed), None)
    if last is None:
        used = frozenset[int]().union(*(result.covers for result in state.results))
        if missing := [question.numbers[i] for i in sorted(needed - used)]:
            raise _Bad(f"no accepted result rests on all numbers of the question; not used: {_list(missing)}")
        if not state.results:
            raise _Bad("no calculation was accepted that the answer could rest on")
        meant = [result for result in state.results if any(_equal(answer, result) for answer in wanted)]
        nearest = max(reversed(meant or state.results), key=lambda result: len(result.covers & question.needed))
        without = [question.numbers[i] for i in sorted(question.needed - nearest.covers)]
        raise _Bad(
            "no accepted result rests on all numbers of the question: "
            f"{_show(nearest.shown)} is without {_list(without)}, which other results use"
        )
    if single and question.asked.size:  # 5 - 12 tells the difference of 12 and 5, too
        last = replace(last, value=abs(last.value), shown=abs(last.shown))
    if not any(_equal(answer, last) for answer in wanted):
        raise _Bad(f"the answer {_show(stated.value)} is not the last result, {_show(last.shown)}")
    return f"the answer {_show(stated.value)} is the {'result' if single else 'last result and rests on all numbers'}"


def _equal(answer: Fraction, result: _Result) -> bool:
    """The answer is the result, or the result rounded to the decimals that the answer shows, two at least."""
    if answer in (result.value, result.shown):
        return True
    decimals = next((places for places in range(2, 13) if (answer * 10**places).denominator == 1), None)
    return decimals is not None and answer.denominator > 1 and abs(answer - result.value) * 2 * 10**decimals <= 1


def _call_key(action: Call) -> object:
    """Equal for calls that ask the same."""
    if action.tool == "search":
        return frozenset(words(action.argument))
    try:
        return read_calculation(action.argument).source
    except CalculationError:
        return action.argument.replace(" ", "")


@lru_cache(maxsize=4096)
def _read_question(text: str) -> _Question:
    stated = stated_expression(text)
    if stated is not None:
        values, parts = stated
        return _Question(text, values, frozenset(range(len(values))), (), parts)
    mentioned = mentions(text)
    values = tuple(abs(one.value) for one in mentioned)
    sources = [_Source(value, frozenset({at})) for at, value in enumerate(values)]
    # 30% is 3/10, and may be written 30; 5 million may be written 5
    sources += [_Source(abs(one.bare), frozenset({at})) for at, one in enumerate(mentioned) if one.bare != one.value]
    for match in re.finditer(r"(?<![\w./])(\d{1,9})/(\d{1,9})(?![\w/])", text):  # 3/4 may be written 0.75
        top, bottom = Fraction(match[1]), Fraction(match[2])
        at = next((i for i in range(len(values) - 1) if values[i : i + 2] == (top, bottom)), -1)
        if at >= 0 and bottom:
            sources.append(_Source(top / bottom, frozenset({at, at + 1})))
    for at, word in enumerate(re.findall(r"[a-z]+", text.lower()), start=len(values)):
        spoken = _SPOKEN.get(word) or _SPOKEN.get(word.removesuffix("s"), ())
        sources += [_Source(value, frozenset({at})) for value in spoken]
    # a factor of 1 is rarely written down: "1 hour at $12"
    needed = frozenset(at for at, one in enumerate(mentioned) if 1 not in (one.value, one.bare))
    return _Question(text, values, needed, tuple(sources), {}, asked(text, mentioned))


def _percentages(calculation: Calculation, question: _Question) -> list[Fraction]:
    """The numbers of a calculation, where `30/100` counts as 0.3 if that is a number of the question."""
    values = {source.value for source in question.sources}
    literals: list[Fraction] = []
    previous_end = -1
    for start, end, literal in calculation.literals:
        over_100 = literal == 100 and start == previous_end + 1 and calculation.source[previous_end] == "/"
        if literals and over_100 and literals[-1] / 100 in values:
            literals[-1] /= 100
        else:
            literals.append(literal)
        previous_end = end
    return literals


def _show(value: Fraction) -> str:
    if value.denominator == 1 and abs(value) < 10**15:
        return str(value.numerator)
    short = Context(prec=6)
    return f"{short.divide(Decimal(value.numerator), Decimal(value.denominator)):g}"


def _list(values: Sequence[Fraction]) -> str:
    shown = [_show(value) for value in values]
    return ", ".join(shown[:10]) + (", …" if len(shown) > 10 else "")


def _hash_json(content: object) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:8]
