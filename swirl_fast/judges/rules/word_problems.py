"""What one calculation may be, by the words in which a word problem asks for it.

Part of the rules judge, for coverage "single". Words tell little: of the worked solutions of SVAMP and GSM8K about one in twenty is against
one of these rules.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Sequence
from dataclasses import dataclass

from swirl_fast.judges.rules.calculations import Calculation
from swirl_fast.tools.numerals import Mention

_COUNT = re.compile(r"\bhow many\b([^.?!]*)", re.I)
_MEASURES = frozenset(  # what may come in parts, or is asked for as a mean
    "second minute hour day week month year decade inch inche foot feet yard mile meter metre kilometer kilometre centimeter centimetre "
    "millimeter millimetre km cm mm ounce pound ton gram kilogram kg milligram mg cup pint quart gallon liter litre milliliter millilitre "
    "ml tablespoon teaspoon dollar cent euro acre hectare percent percentage degree calorie unit time average".split()
)
_NOUN_WITHIN = 6  # words after "how many"
_BELOW_ZERO = re.compile(r"\b(?:below|debt|owes?|loss)\b", re.I)
_ASKS = re.compile(r"\b(?:by )?(?:how|what)\b[^.?!]*", re.I)
# what asks for an operation: its name, and the operations of which there must be one
_NEEDS: tuple[tuple[re.Pattern[str], str, frozenset[type]], ...] = (
    (
        re.compile(r"\bhow (?:many|much) (?:more|fewer|less|additional|extra)\b", re.I),
        "a difference",
        frozenset({ast.Sub, ast.USub}),
    ),
    (re.compile(r"\b(?:left|remain\w*|still)\b(?!.*\beach\b)", re.I), "what is left", frozenset({ast.Sub, ast.USub})),
    (re.compile(r"\b(?:altogether|in all|in total|total)\b", re.I), "a total", frozenset({ast.Add, ast.Mult})),
    (re.compile(r"\b(?:each|every|per|average)\b", re.I), "a share", frozenset({ast.Div, ast.Mult, ast.FloorDiv})),
)
_RATE = re.compile(r"\b(?:each|every|per)\b", re.I)
_NOT_BY_RATES = re.compile(r"\b(?:more|fewer|less|left|still|remain\w*)\b", re.I)
_MULTIPLIED = frozenset({ast.Mult, ast.Div, ast.FloorDiv, ast.Mod})
_GROUPS = re.compile(  # without one of these words nothing is multiplied or divided
    r"\b(?:each|per|every|apiece|times|twice|thrice|doubl\w+|tripl\w+|half|halves|quarters?|thirds?|fourths?|fifths?|equal\w*|same|evenly|"
    r"groups?|split\w*|divid\w*|shar\w+|rate|speed|costs?|price\w*|worth|rows?|dozens?|percent\w*|average|hours?|minutes?|days?|weeks?|"
    r"months?|years?|daily|weekly|monthly|area|square|wide|long|pages?|packs?|packages?|box|boxes|bags?|containers?|bottles?|pairs?|sets?|"
    r"teams?|slices|pieces?|as many|as much|bills?|servings?|rounds?|batch\w*|loaves|crates?|cages?)\b|[%$]|\d/\d",
    re.I,
)


@dataclass(frozen=True)
class Asked:
    """below_zero: an answer may be. whole: none comes in parts, for things are counted. additive: nothing is multiplied or divided. needs:
    name and operations, of which there must be one."""

    below_zero: bool = True
    whole: bool = False
    additive: bool = False
    needs: tuple[tuple[str, frozenset[type]], ...] = ()

    def fault(self, calculation: Calculation) -> str:
        """Why a calculation is not what is asked for, "" when it may be."""
        operations = {type(node) for node in ast.walk(calculation.tree)}
        if self.whole and calculation.value.denominator != 1:
            return "is not whole, and the question asks how many things there are"
        if self.additive and operations & _MULTIPLIED:
            return "is a product or a quotient, and nothing in the question comes in groups or parts"
        return next(
            (f"is not {name}, which is asked for" for name, needed in self.needs if not needed & operations), ""
        )


def asked(text: str, mentioned: Sequence[Mention]) -> Asked:
    """mentioned: the numbers of the text."""
    counts = _COUNT.findall(text)
    words = [word.removesuffix("s") for word in re.findall(r"[a-z]+", counts[-1].lower())] if counts else []
    asks = _ASKS.findall(text)
    last = asks[-1] if asks else ""
    needs = [(name, needed) for pattern, name, needed in _NEEDS if pattern.search(last)]
    if _RATE.search(text) and not _NOT_BY_RATES.search(last):
        needs.append(("made of a rate", _MULTIPLIED))
    return Asked(
        below_zero=any(one.value < 0 for one in mentioned) or _BELOW_ZERO.search(text) is not None,
        whole=bool(counts) and not _MEASURES & set(words[:_NOUN_WITHIN]),
        additive=bool(last) and _GROUPS.search(text) is None,
        needs=tuple(needs),
    )
