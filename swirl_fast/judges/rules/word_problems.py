"""What one calculation may be, by the words in which a word problem asks for it.

Part of the rules judge, for coverage "single". Words tell little, and only in English: these were chosen with the training questions of
SVAMP and GSM8K and their solutions in view, and refuse some that are right.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Sequence
from dataclasses import dataclass

from swirl_fast.judges.rules.calculations import Calculation
from swirl_fast.tools.numerals import Mention

_ASKS = re.compile(r"\b(?:how|what)\b(?:[^.?!]|\.\d)*", re.I)
_SIZE = re.compile(r"how (?:many|much)\b", re.I)
_BELOW_ZERO = re.compile(r"\b(?:below|debt|owes?|loss|profit|balance|temperature)\b", re.I)
_MEASURES = frozenset(  # what may come in parts, or is asked for as a mean
    "second minute hour day week month year decade inch inche foot feet yard mile meter metre kilometer kilometre centimeter centimetre "
    "millimeter millimetre km cm mm ounce oz pound lb ton gram kilogram g kg milligram mg cup pint quart gallon liter litre milliliter "
    "millilitre ml tablespoon teaspoon dollar cent euro acre hectare percent percentage degree calorie unit time average dozen pizza cake "
    "pie".split()
)
_NOUN_WITHIN = 6  # words after "how many"
_MULTIPLIED = frozenset({ast.Mult, ast.Div, ast.FloorDiv, ast.Mod})
# what the question asks for: its name, and the operations of which there must be one
_NEEDS: tuple[tuple[re.Pattern[str], str, frozenset[type]], ...] = (
    (
        re.compile(r"\bhow (?:many|much) (?:more|fewer|less|additional|extra)\b", re.I),
        "a difference",
        frozenset({ast.Sub}),
    ),
    (
        re.compile(r"\b(?:left|remain\w*|still)\b(?!.{0,200}\beach\b)", re.I),
        "what is left",
        frozenset({ast.Sub, ast.Mod}),
    ),
    (re.compile(r"\b(?:altogether|in all|in total)\b", re.I), "a total", frozenset({ast.Add, ast.Mult})),
    (re.compile(r"\b(?:each|every|per|average)\b(?!.{0,200}\bnow\b)", re.I), "a share", _MULTIPLIED),
)
_RATE = re.compile(r"\d[^.?!]{0,200}\b(?:each|every|per)\b|\b(?:each|every|per)\b[^.?!]{0,200}\d", re.I)
_NOT_BY_RATES = re.compile(r"\b(?:more|fewer|less|left|still|remain\w*|now)\b", re.I)
_GROUPS = re.compile(  # words of which there is one where something is multiplied or divided
    r"\b(?:each|per|every|apiece|times|twice|thrice|doubl\w+|tripl\w+|half|halves|quarters?|thirds?|fourths?|fifths?|equal\w*|same|evenly|"
    r"groups?|split\w*|divid\w*|multipl\w*|product|ratio|shar\w+|rate|speed|costs?|price\w*|worth|rows?|dozens?|percent\w*|average|hours?|"
    r"minutes?|days?|weeks?|months?|years?|daily|weekly|monthly|area|perimeter|volume|square|wide|long|pages?|packs?|packages?|box|boxes|"
    r"bags?|containers?|bottles?|pairs?|sets?|teams?|slices|pieces?|as many|as much|bills?|servings?|rounds?|batch\w*|loaves|crates?|"
    r"cages?|dollars?|cents?|(?:of|with|for) \d+)\b|[%$]|\d/\d",
    re.I,
)


@dataclass(frozen=True)
class Asked:
    """size: of something, so that no answer is below zero. signs: numbers have some. whole: of things that are counted. additive: nothing
    is multiplied or divided. needs: name -> operations; it must be one of these."""

    size: bool = False
    signs: bool = True
    whole: bool = False
    additive: bool = False
    needs: tuple[tuple[str, frozenset[type]], ...] = ()

    def fault(self, calculation: Calculation) -> str:
        """Why a calculation is not what is asked for, "" when it may be."""
        nodes = list(ast.walk(calculation.tree))
        operations = {type(node) for node in nodes}
        if any(isinstance(node, ast.Name) and node.id == "mod" for node in nodes):
            operations.add(ast.Mod)
        if ast.USub in operations and not self.signs:
            return "is made with a sign that no number of the question has"
        if self.whole and calculation.value.denominator != 1:
            return "is not whole, and the question asks how many things there are"
        if self.additive and operations & (_MULTIPLIED - {ast.Mod}):
            return "is a product or a quotient, and nothing in the question comes in groups or parts"
        if self.needs and not any(needed & operations for _, needed in self.needs):
            return f"is not {' or '.join(name for name, _ in self.needs)}, which is asked for"
        return ""


def asked(text: str, mentioned: Sequence[Mention]) -> Asked:
    """mentioned: the numbers of the text."""
    asks = _ASKS.findall(text)
    last = asks[-1] if asks else ""
    counts = re.findall(r"\bhow many\b([^.?!]*)", text, re.I)
    words = [word.removesuffix("s") for word in re.findall(r"[a-z]+", counts[-1].lower())] if counts else []
    needs = [(name, needed) for pattern, name, needed in _NEEDS if pattern.search(last)]
    if _RATE.search(text) and not _NOT_BY_RATES.search(last):
        needs.append(("made of a rate", _MULTIPLIED))
    signs = any(one.value < 0 for one in mentioned)
    return Asked(
        size=bool(_SIZE.match(last)) and not signs and _BELOW_ZERO.search(text) is None,
        signs=signs,
        whole=bool(counts) and not _MEASURES & set(words[:_NOUN_WITHIN]),
        additive=bool(last) and _GROUPS.search(text) is None,
        needs=tuple(needs),
    )
