"""Arithmetic in texts: the numbers of a calculation, and the expression that a question states, with its parts.

Part of the rules judge. Everything goes through the calculator's own arithmetic (tools/arithmetic.py).
"""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

from swirl_fast.tools.arithmetic import CalculationError, evaluate_normalised, normalise

NUMBER = r"(?:\d+(?:,\d{3})+|\d+)(?:\.\d+)?"
_STATED = re.compile(
    rf"(?<![\w.])[($\-−\s]{{0,32}}{NUMBER}[\d.,()+\-*/^×÷−$\s]*(?:(?<=[\d)\s])x(?=[\s\d(])[\d.,()+\-*/^×÷−$\s]*)*"
)
_SPACED = re.compile(r"\s[-+*/^×÷−]+\s")
_CUE = re.compile(r"(?:calculate|compute|evaluate|simplify|solve|work out|what is|what's|value of|result of|:)$", re.I)


@dataclass(frozen=True)
class Calculation:
    """A calculation that evaluates. source: normalised. literals: (start, end, unsigned value) of each number in it."""

    source: str
    value: Fraction
    tree: ast.expr
    literals: tuple[tuple[int, int, Fraction], ...]


@lru_cache(maxsize=16384)
def read_calculation(expression: str) -> Calculation:
    """Raises CalculationError for what does not evaluate."""
    return _read_normalised(normalise(expression))


def _read_normalised(source: str) -> Calculation:
    value = evaluate_normalised(source)
    tree = ast.parse(source, mode="eval").body
    constants = [node for node in ast.walk(tree) if isinstance(node, ast.Constant)]
    literals = sorted((node.col_offset, node.end_col_offset or 0, _value_at(source, node)) for node in constants)
    return Calculation(source, value, tree, tuple(literals))


def _value_at(source: str, node: ast.expr) -> Fraction:
    return Fraction(source[node.col_offset : node.end_col_offset])  # from the text: the tree holds a rounded float


def exchanged(calculation: Calculation, exchange: Mapping[Fraction, Fraction]) -> Fraction | None:
    """The value with numbers exchanged for others wherever they occur; None when that has no value."""
    source = calculation.source
    for start, end, literal in reversed(calculation.literals):
        if literal in exchange:
            new = exchange[literal]
            source = f"{source[:start]}({new.numerator}/{new.denominator}){source[end:]}"
    try:
        return evaluate_normalised(source)
    except CalculationError:
        return None


@lru_cache(maxsize=16384)
def idle_numbers(source: str) -> tuple[frozenset[Fraction], frozenset[Fraction]]:
    """(0 and 1 in neutral places: `x*1`, `x+0`; numbers whose change leaves the value: `0*(…)`, `x**0`, `x+5-5`)."""
    calculation = _read_normalised(source)
    neutral = set()
    for node in ast.walk(calculation.tree):
        if isinstance(node, ast.BinOp):
            element = int(isinstance(node.op, (ast.Mult, ast.Div, ast.Pow)))
            sides = [node.left, node.right] if isinstance(node.op, (ast.Add, ast.Mult)) else [node.right]
            if any(isinstance(side, ast.Constant) and side.value == element for side in sides):
                neutral.add(Fraction(element))
    idle = set()
    for literal in {literal for _, _, literal in calculation.literals}:
        # two distances: a small change may vanish in a rounding
        changed = [exchanged(calculation, {literal: literal + delta}) for delta in (Fraction(1, 7), Fraction(1001, 7))]
        if all(value == calculation.value for value in changed):
            idle.add(literal)
    return frozenset(neutral), frozenset(idle)


def stated_expression(text: str) -> tuple[tuple[Fraction, ...], dict[tuple[int, int], Fraction]] | None:
    """(unsigned numbers in order, parts) of the one arithmetic expression a question states; None for none or several.

    parts: (first, end) positions of numbers -> value, for every contiguous part that respects precedence; of
    `a - b + c` these are `a - b`, `-b + c` and the whole.

    `1/2`, `5-10` and `8 x 10` occur in word problems too. An expression has spaces around an operator other than x
    (once in GSM8K's 7,473 questions), or an equals sign after it, or a cue like "calculate" before it and the end of
    a sentence after it.
    """
    calculations = []
    for match in _STATED.finditer(text):
        end = match.end()
        source = match.group().strip(" \t\r\n,.")
        after = text[end:].lstrip()[:1]
        if text[end : end + 1].isalnum() and not text[end - 1].isspace():  # 98*e
            continue
        before = text[: match.start()].rstrip()
        sentence_ends = after in ("", "?", "!") or match.group().rstrip().endswith(".")
        cued = sentence_ends and (not before or _CUE.search(before[-40:]) is not None)
        if not (after == "=" or cued or (_SPACED.search(source) and "x" not in source)):
            continue
        try:
            calculation = read_calculation(source)
        except CalculationError:
            continue
        if len(calculation.literals) >= 2:
            calculations.append(calculation)
    if len(calculations) != 1:
        return None
    values: list[Fraction] = []
    parts: dict[tuple[int, int], Fraction] = {}
    _collect(calculations[0], calculations[0].tree, values, parts)
    parts[0, len(values)] = calculations[0].value  # with the sign before a group, which _collect leaves out: -(3 + 4)
    return tuple(values), parts


def _collect(
    calculation: Calculation, node: ast.expr, values: list[Fraction], parts: dict[tuple[int, int], Fraction]
) -> tuple[int, int]:
    """Appends the numbers of a subtree, in order, and the value of each contiguous part; gives its (first, end)."""
    begin = len(values)
    terms = []  # operator before it, text, first, end
    for operator, operand in _chain(node):
        if isinstance(operand, ast.Constant):
            values.append(_value_at(calculation.source, operand))
            first, end = len(values) - 1, len(values)
        else:
            first, end = _collect(calculation, operand, values, parts)
        terms.append((operator, calculation.source[operand.col_offset : operand.end_col_offset], first, end))
    for i in range(len(terms)):
        for j in range(i + 1, len(terms)):
            lead = {"-": "-", "/": "1/"}.get(terms[i][0], "")
            rest = "".join(f"{operator}({text})" for operator, text, _, _ in terms[i + 1 : j + 1])
            try:
                parts[terms[i][2], terms[j][3]] = evaluate_normalised(f"{lead}({terms[i][1]}){rest}")
            except CalculationError:
                continue
    return begin, len(values)


def _chain(node: ast.expr) -> list[tuple[str, ast.expr]]:
    """`a - b + c` -> [("", a), ("-", b), ("+", c)], products likewise; of other nodes the operands."""
    for plus, minus, symbols in ((ast.Add, ast.Sub, "+-"), (ast.Mult, ast.Div, "*/")):
        terms: list[tuple[str, ast.expr]] = []
        at = node
        while isinstance(at, ast.BinOp) and isinstance(at.op, (plus, minus)):
            terms.append((symbols[isinstance(at.op, minus)], at.right))
            at = at.left
        if terms:
            return [("", at), *reversed(terms)]
    if isinstance(node, ast.BinOp):
        symbol = {ast.Pow: "**", ast.FloorDiv: "//", ast.Mod: "%"}[type(node.op)]
        return [("", node.left), (symbol, node.right)]
    children = node.args if isinstance(node, ast.Call) else ast.iter_child_nodes(node)
    return [("", child) for child in children if isinstance(child, ast.expr)]


def composed(
    values: Sequence[Fraction],
    pieces: Mapping[int, Collection[tuple[int, Fraction]]],
    start: int,
    end: int,
    literals: Counter[Fraction],
) -> bool:
    """Whether the literals are exactly the numbers start..end, where results may stand for the runs they computed."""
    if start == end:
        return not +literals
    for stop, value in [(start + 1, values[start]), *pieces.get(start, ())]:
        if stop <= end and literals[value] > 0 and composed(values, pieces, stop, end, literals - Counter([value])):
            return True
    return False
