"""A deterministic process judge: checks every step against the text it followed, without gold labels.

It replays the history of a step, so that a verdict depends on nothing but the view. What a calculation may do depends on the
question:

- The question states an expression (`12 + 34 - 5`, `( 56 + -33 ) - 84`). A calculation must compute the expression, or under
  coverage "connected" a contiguous part of it that respects precedence, with exactly the numbers of that part: value and
  multiset of numbers must agree. Results may stand for the parts they are the value of. So the value of what is left never
  changes, and an answer that passes is right.
- It is a word problem. A number must come from the question, from an accepted result or from the allowed constants, and no more
  often than it is there; every number must have an influence; under "connected" each calculation must use a number of the
  question that was not used, or join two results that were not joined; the answer must rest on all numbers.
- The tool is search. A query must be new and share content words with what was read; the answer must be a span of a result.

Only accepted (GOOD) calculations count as results: otherwise one bad step would launder a made-up number for all later ones.

Limits, so that nobody takes it for more: in a word problem it cannot see a wrong operation (`a + b` for `a * b`), nor the sign of
a number; it takes every number in the text as needed, and number words and units (`three`, `half`, `week`) as allowed, not as
needed; a number may be used as often as it is written, in each calculation. In search, a wrong span of a right passage, and a
guessed yes or no, pass: use a model as judge where that matters.
"""

from __future__ import annotations

import ast
import hashlib
import json
import re
import string
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from fractions import Fraction
from functools import lru_cache

from swirl_fast.actions import TOOL_TAGS, Action, parse
from swirl_fast.config import RulesConfig
from swirl_fast.judges.judge import Judgement, Verdict
from swirl_fast.tools.calculator import CalculationError, evaluate, normalise, numbers
from swirl_fast.tools.tool import observation
from swirl_fast.trajectory import StepView

VERSION = 1  # of the rules: part of the judge's id, under which verdicts are cached
COVERAGES = ("connected", "full")
MAX_ANSWER_CHARS = 40  # of a number with its unit
MAX_ANSWER_WORDS = 12  # of a span
MAX_QUERY_WORDS = 30

_NUMBER = r"(?:\d+(?:,\d{3})+|\d+)(?:\.\d+)?"
_STATED = re.compile(rf"(?<![\w.])[($\-\s]*{_NUMBER}[\d.,()+\-*/^×÷−$\s]*(?:(?<=[\d)\s])x(?=[\s\d(])[\d.,()+\-*/^×÷−$\s]*)*(?!\w)")
_SPACED = re.compile(r"\s[-+*/^×÷−]+\s")
_CUE = re.compile(r"(?:calculate|compute|evaluate|simplify|solve|work out|what is|what's|value of|result of|:)\s*$", re.I)
_WORD_VALUES: dict[str, tuple[str, ...]] = {
    "zero": ("0",), "one": ("1",), "two": ("2",), "three": ("3",), "four": ("4",), "five": ("5",), "six": ("6",),
    "seven": ("7",), "eight": ("8",), "nine": ("9",), "ten": ("10",), "eleven": ("11",), "twelve": ("12",),
    "twenty": ("20",), "thirty": ("30",), "forty": ("40",), "fifty": ("50",), "sixty": ("60",), "hundred": ("100",),
    "thousand": ("1000",), "half": ("2", "1/2"), "third": ("3", "1/3"), "thirds": ("3", "1/3"), "quarter": ("4", "1/4"),
    "fourth": ("4", "1/4"), "fifth": ("5", "1/5"), "tenth": ("10", "1/10"), "once": ("1",), "twice": ("2",),
    "double": ("2",), "doubled": ("2",), "triple": ("3",), "tripled": ("3",), "dozen": ("12",), "dozens": ("12",),
    "pair": ("2",), "couple": ("2",), "minute": ("60",), "minutes": ("60",), "hour": ("60", "24"), "hours": ("60", "24"),
    "day": ("24", "7"), "days": ("24", "7"), "daily": ("7",), "week": ("7", "52"), "weeks": ("7", "52"), "weekly": ("7", "52"),
    "month": ("12", "30"), "months": ("12", "30"), "monthly": ("12",), "year": ("12", "52", "365"), "years": ("12", "52", "365"),
    "feet": ("12",), "foot": ("12",), "yard": ("3",), "yards": ("3",), "cents": ("100",),
}  # fmt: skip
_STOP_WORDS = frozenset(
    "a an the of in on at to for from by with and or but not no is are was were be been being am do does did has have had "
    "it its this that these those which what who whom whose when where why how many much as than then there their his her he "
    "she they them him i you we me my your our both also into about between can could will would should may might".split()
)


@dataclass(frozen=True)
class _Source:
    """A number that a calculation may use. covers: the question's numbers (by position) that it rests on."""

    value: Fraction
    covers: frozenset[int]
    origin: str  # question | result | constant


@dataclass(frozen=True)
class _Question:
    """numbers: absolute values of the numbers an answer must rest on. allowed: further sources. parts: of a stated expression,
    (first, end) positions -> value of every contiguous sub-expression; empty in a word problem."""

    numbers: tuple[Fraction, ...]
    needed: frozenset[int]
    allowed: tuple[_Source, ...]
    parts: Mapping[tuple[int, int], Fraction]


@dataclass(frozen=True)
class _Result:
    """An accepted calculation. shown: the value as the tool wrote it, possibly rounded."""

    value: Fraction
    shown: Fraction
    covers: frozenset[int]
    uses: frozenset[int] = frozenset()  # positions of the earlier results in it


@dataclass
class _State:
    """What a replay of the history leaves behind."""

    calls: set[object] = field(default_factory=set)
    results: list[_Result] = field(default_factory=list)
    passages: list[list[str]] = field(default_factory=list)  # normalised words of search results
    succeeded: str = ""  # the tool of the last call that gave a result, also of one that was not accepted


class _Bad(Exception):
    """Carries the reason of a BAD verdict."""


class RulesJudge:
    """Judges calculator and search steps by rules.

    tools_by_task: task name -> names of the tools on offer there (keys of actions.TOOL_TAGS). Raises ValueError for an unknown
    coverage, a constant that is no finite number, or an unknown tool. A step of a task that is not listed is UNKNOWN.
    """

    def __init__(self, config: RulesConfig, tools_by_task: Mapping[str, Collection[str]]) -> None:
        if config.coverage not in COVERAGES:
            raise ValueError(f"judge.rules.coverage is {config.coverage!r}; use one of {', '.join(COVERAGES)}")
        try:
            self._constants = tuple(sorted({Fraction(str(constant)) for constant in config.constants}))
        except ValueError:
            raise ValueError(f"judge.rules.constants is {list(config.constants)}; use finite numbers") from None
        for task, tools in tools_by_task.items():
            if unknown := sorted(set(tools) - set(TOOL_TAGS)):
                raise ValueError(f"task {task!r} offers unknown tools {unknown}; known are {', '.join(TOOL_TAGS)}")
        self._full = config.coverage == "full"
        self._tools = {task: tuple(sorted(set(tools))) for task, tools in tools_by_task.items()}
        self.id = f"rules-v{VERSION}-{config.coverage}"
        if self._constants != tuple(sorted(Fraction(str(constant)) for constant in RulesConfig().constants)):
            self.id += f"-constants.{_digest([str(constant) for constant in self._constants])}"
        self.id += f"-tools.{_digest(sorted(self._tools.items()))}"

    def judge(self, steps: Sequence[StepView]) -> list[Judgement]:
        """One judgement a step. Never raises for what a step contains."""
        return [self._judge(step) for step in steps]

    def _judge(self, step: StepView) -> Judgement:
        tools = self._tools.get(step.task)
        if tools is None:
            return Judgement(Verdict.UNKNOWN, f"the judge was not told the tools of task {step.task[:80]!r}")
        question = _read_question(step.question)
        state = _State()
        for text, seen in step.history:
            self._replay(state, question, step.question, parse(text, tools), seen)
        try:
            reason, _ = self._consider(state, question, step.question, parse(step.action_text, tools))
        except _Bad as bad:
            return Judgement(Verdict.BAD, str(bad))
        return Judgement(Verdict.GOOD, reason)

    def _replay(self, state: _State, question: _Question, text: str, action: Action, seen: str) -> None:
        """Adds one earlier step to the state. A result is what the environment wrote behind the call, never the model's own text."""
        if action.kind != "tool":
            return
        try:
            _, result = self._consider(state, question, text, action)
        except _Bad:
            result = None
        state.calls.add(_call_key(action))
        head = observation(action.argument, "")
        shown = seen[len(head) :].strip() if seen.startswith(head) else ""
        if not shown or shown.startswith("ERROR"):
            return
        if action.tool == "search":
            state.succeeded = "search"
            state.passages.append(_words(shown))
        elif len(values := numbers(shown)) == 1:
            state.succeeded = "calculator"
            if result is not None:
                state.results.append(_Result(result.value, values[0], result.covers, result.uses))

    def _consider(self, state: _State, question: _Question, text: str, action: Action) -> tuple[str, _Result | None]:
        """(reason, result if it is an accepted calculation). Raises _Bad."""
        if action.kind == "malformed":
            raise _Bad(f"malformed: {action.error}")
        if action.kind == "answer":
            if not state.succeeded:
                raise _Bad("an answer before any tool gave a result: too little information")
            if state.succeeded == "search":
                return _span_answer(state, text, action.argument), None
            return _number_answer(state, question, action.argument), None
        if action.tool == "search":
            return _query(state, text, action), None
        return self._calculation(state, question, action)

    def _calculation(self, state: _State, question: _Question, action: Action) -> tuple[str, _Result]:
        try:
            value = evaluate(action.argument)
            tree, literals = _literals(action.argument)
        except CalculationError as error:
            raise _Bad(f"the calculation does not evaluate: {str(error)[:120]}") from None
        if _call_key(action) in state.calls:
            raise _Bad("the same calculation was made before")
        if not any(isinstance(node, ast.BinOp) for node in ast.walk(tree)):
            raise _Bad(f"{_show(value)} is a number, not a calculation")
        if done := next((result for result in state.results if result.covers >= question.needed), None):
            raise _Bad(f"the result {_show(done.shown)} rests on all numbers already: answer with it")
        if question.parts:
            covers = self._match_stated(state, question, tree, literals, value)
            uses: frozenset[int] = frozenset()
        else:
            covers, uses = self._match_words(state, question, tree, literals, value)
        missing = [question.numbers[i] for i in sorted(question.needed - covers)]
        if missing and self._full:
            raise _Bad(f"the calculation leaves out {_list(missing)}")
        rest = f", {_list(missing)} left" if missing else ", all numbers are in"
        return f"{_show(value)} is computed from numbers at hand{rest}", _Result(value, value, covers, uses)

    def _match_stated(
        self, state: _State, question: _Question, tree: ast.expr, literals: Counter[Fraction], value: Fraction
    ) -> frozenset[int]:
        """The numbers of the stated expression that the calculation covers. Raises _Bad unless it equals a part of it."""
        pieces: dict[int, list[tuple[int, Fraction]]] = {}  # start -> (end, absolute value as it may be written)
        spans = []
        for result in state.results:
            start, end = min(result.covers), max(result.covers) + 1
            spans.append((start, end))
            pieces.setdefault(start, []).extend({(end, abs(result.value)), (end, abs(result.shown))})
            if result.shown != result.value and abs(result.shown) in literals:
                # a rounded result is written for the exact one: compare exact values
                value = evaluate(ast.unparse(_exchange(tree, abs(result.shown), abs(result.value))))
        whole = (0, len(question.numbers))
        for (start, end), part in question.parts.items():
            if part != value or (self._full and (start, end) != whole):
                continue
            if any(start < b and a < end and not (start <= a and b <= end) for a, b in spans) or (start, end) in spans:
                continue  # inside a part that is computed already, or across its border
            if _composed(question.numbers, pieces, start, end, literals):
                return frozenset(range(start, end))
        if self._full:
            raise _Bad(f"{_show(value)} is not the stated expression, {_show(question.parts[whole])}, with all its numbers")
        raise _Bad(f"{_show(value)} from {_list(sorted(literals.elements()))} is no open part of the stated expression")

    def _match_words(
        self, state: _State, question: _Question, tree: ast.expr, literals: Counter[Fraction], value: Fraction
    ) -> tuple[frozenset[int], frozenset[int]]:
        """(numbers of the question the calculation rests on, earlier results in it). Raises _Bad."""
        joined = frozenset().union(*(result.uses for result in state.results))
        used = frozenset().union(*(result.covers for result in state.results))
        covers: set[int] = set()
        uses: set[int] = set()
        grounded = False
        for literal, count in literals.items():
            sources: list[tuple[bool, _Source, int]] = [
                (not source.covers - used, source, -1) for source in question.allowed if source.value == literal
            ]
            for at, result in enumerate(state.results):
                if literal in (abs(result.value), abs(result.shown)):
                    sources.append((at in joined, _Source(literal, result.covers, "result"), at))
            if not sources and literal in self._constants:
                sources.append((True, _Source(literal, frozenset(), "constant"), -1))
            if not sources:
                raise _Bad(f"{_show(literal)} is neither in the question nor an accepted result")
            if count > len(sources):
                raise _Bad(f"{_show(literal)} is used {count} times but given {len(sources)} times")
            for _, source, at in sorted(sources, key=lambda entry: entry[0])[:count]:
                grounded |= source.origin != "constant"
                covers |= source.covers
                uses |= {at} - {-1}
        if not grounded:
            raise _Bad("the calculation uses no number of the question and no result")
        given = {source.value for source in question.allowed if source.origin == "question"}
        _check_influence(tree, literals, value, given)
        if state.results and not covers - used and len(uses - joined) < 2:
            raise _Bad("the calculation neither uses a new number of the question nor joins two results")
        return frozenset(covers), frozenset(uses)


def _number_answer(state: _State, question: _Question, argument: str) -> str:
    values = numbers(argument)
    if len(argument) > MAX_ANSWER_CHARS or len(values) != 1:
        raise _Bad(f"the answer is not one number in at most {MAX_ANSWER_CHARS} characters ({len(values)} numbers found)")
    last = next((result for result in reversed(state.results) if result.covers >= question.needed), None)
    if last is None:
        used = frozenset().union(*(result.covers for result in state.results))
        missing = [question.numbers[i] for i in sorted(question.needed - used)]
        raise _Bad(f"no accepted result rests on all numbers of the question (not used: {_list(missing) or 'none'})")
    if not _rounded(values[0], last):
        raise _Bad(f"the answer {_show(values[0])} is not the last result, {_show(last.shown)}")
    return f"the answer {_show(values[0])} is the last result and rests on all numbers"


def _rounded(answer: Fraction, result: _Result) -> bool:
    """The answer is the result, or the result rounded to the two or more decimals that the answer shows."""
    if answer in (result.value, result.shown):
        return True
    for decimals in range(2, 16):
        if (answer * 10**decimals).denominator == 1:
            return abs(answer - result.value) * 2 * 10**decimals <= 1
    return False


@lru_cache(maxsize=4096)
def _read_question(text: str) -> _Question:
    stated = _stated_expression(text)
    if stated is not None:
        values, parts = stated
        return _Question(values, frozenset(range(len(values))), (), parts)
    values = tuple(abs(value) for value in numbers(text))
    allowed = [_Source(value, frozenset({i}), "question") for i, value in enumerate(values)]
    percents = {abs(value) for match in re.finditer(rf"{_NUMBER}\s*%", text) for value in numbers(match.group())}
    percents |= {value * 100 for value in percents} | {value / 100 for value in percents}
    for i, value in enumerate(values):
        if value in percents:  # 30% is written 30, 30/100 or 0.3
            other = value / 100 if value > 1 else value * 100
            allowed.append(_Source(other, frozenset({i}), "question"))
    for i, (top, bottom) in enumerate(zip(values, values[1:], strict=False)):
        if bottom and f"{_show(top)}/{_show(bottom)}" in text:  # 3/4 is written 0.75
            allowed.append(_Source(top / bottom, frozenset({i, i + 1}), "question"))
    for word in re.findall(r"[a-z]+", text.lower()):
        allowed += [_Source(Fraction(value), frozenset(), "question") for value in _WORD_VALUES.get(word, ())]
    # a factor of 1 is rarely written down: "1 hour at $12"
    needed = frozenset(i for i, value in enumerate(values) if value != 1)
    return _Question(values, needed, tuple(allowed), {})


def _stated_expression(text: str) -> tuple[tuple[Fraction, ...], dict[tuple[int, int], Fraction]] | None:
    """(numbers, parts) of the one arithmetic expression the question states; None where it states none or several.

    `1/2`, `5-10` and `8 x 10` also stand in word problems: an expression has spaces around an operator, two operators, an equals
    sign behind it, or a cue like "calculate" before it and the end of the sentence behind it.
    """
    found = []
    for match in _STATED.finditer(text):
        source = match.group().strip(" \t\n\r,.")
        try:
            tree, literals = _literals(source)
            evaluate(source)
        except CalculationError:
            continue
        count = literals.total()
        after = text[match.end() :].lstrip()[:1]
        cued = _CUE.search(text[: match.start()].rstrip()[-40:]) and (after in ("", "?", "!") or match.group().rstrip()[-1] == ".")
        spaced = _SPACED.search(source) is not None and "x" not in source
        if count >= 2 and (spaced or count >= 3 or after == "=" or cued):
            found.append(tree)
    if len(found) != 1:
        return None
    values: list[Fraction] = []
    parts: dict[tuple[int, int], Fraction] = {}
    _collect(found[0], values, parts)
    return tuple(values), parts


def _collect(node: ast.expr, values: list[Fraction], parts: dict[tuple[int, int], Fraction]) -> tuple[int, int]:
    """Appends the literals of a subtree, in order, and the value of each of its parts; gives its positions (first, end)."""
    start = len(values)
    if isinstance(node, ast.Constant):
        values.append(Fraction(str(node.value)))
        return start, start + 1
    terms: list[tuple[str, str, int, int]] = []  # operator before it, text, first, end
    for operator, operand in _chain(node):
        terms.append((operator, ast.unparse(operand), *_collect(operand, values, parts)))
    for i in range(len(terms)):
        for j in range(i + 1, len(terms)):
            first = {"-": "-", "/": "1/"}.get(terms[i][0], "")
            body = "".join(f"{operator}({inner})" for operator, inner, _, _ in terms[i + 1 : j + 1])
            try:
                parts[terms[i][2], terms[j][3]] = evaluate(f"{first}({terms[i][1]}){body}")
            except CalculationError:
                continue
    return start, len(values)


def _chain(node: ast.expr) -> list[tuple[str, ast.expr]]:
    """`a - b + c` -> [("", a), ("-", b), ("+", c)]; likewise products; a power or a function gives its operands."""
    for plus, minus, symbols in ((ast.Add, ast.Sub, "+-"), (ast.Mult, ast.Div, "*/")):
        terms: list[tuple[str, ast.expr]] = []
        at = node
        while isinstance(at, ast.BinOp) and isinstance(at.op, (plus, minus)):
            terms.append((symbols[isinstance(at.op, minus)], at.right))
            at = at.left
        if terms:
            return [("", at), *reversed(terms)]
    if isinstance(node, ast.BinOp):
        return [("", node.left), ("**", node.right)]
    return [("", child) for child in ast.iter_child_nodes(node) if isinstance(child, ast.expr)]


def _composed(
    values: Sequence[Fraction],
    pieces: Mapping[int, list[tuple[int, Fraction]]],
    start: int,
    end: int,
    literals: Counter[Fraction],
) -> bool:
    """Whether the literals are exactly the numbers from start to end, where results may stand for the runs they computed."""
    if start == end:
        return not +literals
    for stop, value in [(start + 1, values[start]), *pieces.get(start, ())]:
        if stop <= end and literals[value] > 0:
            literals[value] -= 1
            fits = _composed(values, pieces, stop, end, literals)
            literals[value] += 1
            if fits:
                return True
    return False


def _check_influence(tree: ast.expr, literals: Counter[Fraction], value: Fraction, given: Collection[Fraction]) -> None:
    """Raises _Bad for `0*(…)`, `x**0`, `x*1`, `x+0` and the like: numbers that are there to be seen."""
    for node in ast.walk(tree):
        if isinstance(node, ast.BinOp):
            neutral = 0 if isinstance(node.op, (ast.Add, ast.Sub)) else 1
            sides = [node.right] if isinstance(node.op, (ast.Sub, ast.Div, ast.Pow)) else [node.left, node.right]
            for side in sides:
                if isinstance(side, ast.Constant) and side.value == neutral and Fraction(neutral) not in given:
                    raise _Bad(f"a neutral {neutral} adds nothing to the calculation")
    for literal in literals:
        try:
            changed = evaluate(ast.unparse(_exchange(tree, literal, literal + Fraction(1, 7))))
        except CalculationError:
            continue  # a non-integer power, a division by zero: the number does have an influence
        if changed == value:
            raise _Bad(f"{_show(literal)} has no influence on the value")


def _exchange(tree: ast.expr, old: Fraction, new: Fraction) -> ast.expr:
    """A copy of the tree with one literal written as a fraction instead."""

    class Exchange(ast.NodeTransformer):
        def visit_Constant(self, node: ast.Constant) -> ast.expr:
            if Fraction(str(node.value)) != old:
                return node
            return ast.BinOp(ast.Constant(new.numerator), ast.Div(), ast.Constant(new.denominator))

    return ast.fix_missing_locations(Exchange().visit(ast.parse(ast.unparse(tree), mode="eval").body))


@lru_cache(maxsize=4096)
def _literals_of(expression: str) -> tuple[ast.expr, tuple[Fraction, ...]]:
    try:
        tree = ast.parse(normalise(expression), mode="eval").body
        return tree, tuple(
            Fraction(str(node.value)) for node in ast.walk(tree) if isinstance(node, ast.Constant)
        )
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise CalculationError(f"it cannot be read: {error}") from None


def _literals(expression: str) -> tuple[ast.expr, Counter[Fraction]]:
    """The syntax tree and the unsigned numbers of an expression. Raises CalculationError."""
    tree, values = _literals_of(expression)
    return tree, Counter(values)
