"""Numbers in texts that people and models wrote. One reader, two questions:

    number_in(text)   the one number that a text states (an answer, a gold answer); None where it states none, several, or something
                      that may be another number. Nothing beside the digits is passed over: what is not known to leave the value as it
                      is makes it no number.
    mentions(text)    every number that a longer text names (a word problem, a result), in order.

What belongs to a number:

    sign          -5  −5  —5  minus 5  negative 5  -$5
    thousands     1,200  10_000  1'200  1,00,000  1.200,50; with a space, 1 200, where nothing else is in the text
    factor        5k  5K  5M  5B  5bn  5 hundred  1.5 million  3 hundred thousand  5 dozen  2 lakh
    percent       50%  50 percent
    fraction      3/4  1 1/2  ½  1½  5 and a half; but 48/2 is a calculation that was not made
    power of ten  1e5  1.5×10^3  10³
    currency      $5  US$5  5 €  USD 5
    unit          10 clips  5kg  5 m²

No number, because it is another thing or may be one: `5x`, `5m` (metres or millions), `3rd`, `3D`, `v2`, `12:30`, `2020-01-05`, `1.2.3`,
`3-5`, `1,5`, `5!`, `5²`, `0.3…`, `half of 5`, `at least 5`, `5 or more`, `5 squared`, digits of other scripts.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from fractions import Fraction

from swirl_fast.tools.arithmetic import GROUPED, MAX_DIGITS, fold

MAX_CHARS = 2_000  # of a text that states one number: an answer is a few words

_FACTORS = {
    **dict.fromkeys(("k", "thousand"), 10**3),
    **dict.fromkeys(("m", "mio", "million"), 10**6),
    **dict.fromkeys(("b", "bn", "mrd", "billion"), 10**9),
    "trillion": 10**12,
    "lakh": 10**5,
    "crore": 10**7,
    "hundred": 100,
    "dozen": 12,
}
_FACTOR_WORDS = r"(?i:(?:hundred|thousand|million|billion|trillion|lakh|crore|dozen)s?|bn|mio|mrd)(?![\w-])"
_FACTOR = rf"(?:(?-i:[kKMB]|bn|Bn|BN)(?![\w'/-])(?:\s{_FACTOR_WORDS}){{0,3}}|(?:\s?{_FACTOR_WORDS}){{1,3}})"
_PERCENT = r"(?:\s?\\?%|\s?(?i:percent|per cent|pct)\b)"

_OPEN, _SHUT = "\ue000", "\ue001"  # around a fraction that was one character
_GAP = "\ue002"  # between digits, where a space was that does not break a line
_BLANKS = re.compile(r"(?<=\d)[\u00a0\u2007\u2009\u202f](?=\d{3}(?!\d))", re.ASCII)
_DASHES = "−–—‒‐‑⁃"
_RAISED = str.maketrans("⁺⁻⁰¹²³⁴⁵⁶⁷⁸⁹", "+-0123456789")

_CODES = "USD|EUR|GBP|JPY|CNY|INR|CHF|CAD|AUD"
_SYMBOLS = {"$": "USD", "US$": "USD", "€": "EUR", "£": "GBP", "¥": "JPY", "₹": "INR", "Rs": "INR"}
_CURRENCY = re.compile(rf"{_CODES}|Rs|[A-Z]{{0,2}}\$|[¢-¥\u20a0-\u20cf]")
_BEFORE = re.compile(
    r"(?P<sign>(?<![^\W_])(?i:minus|negative|neg\.?)\s|[-+]\s?)?"
    rf"(?P<currency>\\?(?:(?<![^\W_])(?:US|CA|AU|NZ|HK|[ACS]))?\$\s?|(?<![^\W_])(?:{_CODES}|Rs\.?)\s?)?(?P<inner>[-+])?$"
)
_WHOLE = (
    rf"(?!0){GROUPED}"
    r"|(?!0)\d{1,2}(?:,\d{2}){1,9},\d{3}(?:\.\d+)?"  # 1,00,000
    r"|(?!0)\d{1,3}(?:_\d{3}){1,20}(?:\.\d+)?"
    r"|(?!0)\d{1,3}(?:['’]\d{3}){1,20}(?:\.\d+)?"
    r"|(?!0)\d{1,3}(?:\.\d{3}){1,20},\d{1,2}"  # 1.200,50
    rf"|(?!0)\d{{1,3}}(?:{_GAP}\d{{3}}){{1,20}}(?:[.,]\d{{1,2}})?"
    r"|\d+(?:\.\d+)?|\.\d+"
)
_TEN = r"10\s?(?:(?:\^|\*\*)\s?(?:[-+]?\d{1,6}|\{[-+]?\d{1,6}\}|\([-+]?\d{1,6}\))|[⁺⁻]?[⁰¹²³⁴⁵⁶⁷⁸⁹]{1,6})"
_NUMBER = re.compile(
    rf"(?:(?:(?P<mixed>\d+)\s)?(?P<top>\d+)\s?[/\u2044]\s?(?P<bottom>\d+)"
    rf"|(?:(?P<before>\d+)\s?)?{_OPEN}(?P<small>\d+)\u2044(?P<large>\d+){_SHUT}"
    rf"|(?P<ten>{_TEN})"
    rf"|(?P<number>{_WHOLE})(?:[eE](?P<e>[-+]?\d{{1,6}})|\s?[x*]\s?(?P<times>{_TEN}))?)"
    r"(?P<part>\s(?i:and a (?:half|quarter))\b)?"
    rf"(?:(?P<percent>{_PERCENT})|(?P<factor>{_FACTOR}))?"
    rf"(?:\s?\\?\$(?!\s?\d)|\s?[¢￠]|\s?(?:{_CODES})(?!\w))?",
    re.ASCII,
)
_DIGIT = re.compile(rf"(?:\.|{_OPEN})?\d", re.ASCII)
_NAME = re.compile(r"(?<!\w)[^\W\d]\w*")
_CODE = re.compile(rf"(?:{_CODES}|Rs)\d", re.ASCII)
_EMPHASIS = re.compile(r"(?<![\w*])(\*{1,3}|`{1,3})(?=[^\s*`])([^*`\n]{1,100})(?<=\S)\1(?![\w*])")
_SURFACE = re.compile(r"(?<=[\d\s])(?:[kcmd]?m|ft|in)[²³](?!\w)")  # m²
_SPACED = re.compile(r"(?<![\d.,])(\d{1,3}(?: \d{3})+)(?![\d ]*\d)", re.ASCII)

_UNIT = re.compile(
    r"(?:km/h|m/s|ft/s|[kcm]?m[²³]|ft[²³]|in[²³]|[kcm]m[23]|ft[23]|[kKMGTm]B|[kKMG]?Hz|k?Pa|k?cal|k?Wh|k[gmNWVJ]|mAh|[kcmd][mgl]|m[lLs]|lbs?|oz|ft|yd"
    r"|mi|hrs?|mins?|secs?|[mk]ph|°[CF]?|℃|℉|[gLlhsWV])(?![\w/^-])"
)
_PER = re.compile(
    r"\s?(?:/|per)\s?(?:hour|hr|h|day|week|month|year|minute|min|second|sec|s|person|unit|item|mile|kg|lb)\b"
)
_COUNTS = (
    "two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen twenty "
    "thirty forty fifty sixty seventy eighty ninety"
)
# words right before a number, with which it is another one, a bound, or a name
_CHANGED_BY = frozenset(
    f"{_COUNTS} one zero hundred thousand million billion half twice double triple thrice quadruple point dot root sqrt log ln than "
    "least most over under above below beyond exceeding between within plus minus less x times not never isn't wasn't aren't nor base "
    "version chapter page step question problem option line".split()
)
_CHANGING = re.compile(
    r"(?:\bnot|n't|\bcannot|\bnever)(?: \w+){1,2}$"
    r"|\b(?:(?:half|halves|thirds?|quarters?|\w+ths?|percent|square|power|root) of|(?:up|close|next|prior|power) to|divided by|n't)$",
    re.I,
)
_LINKS = frozenset("is are was were be equals equal to gives get gets makes".split())  # a sign may follow
# words right after a number, likewise
_CHANGED_TO = frozenset(
    f"{_COUNTS} hundred thousand million billion trillion lakh crore dozen e E k K m M b B t T G mn mln mil mill tn trn tsd bil bill "
    "bln mlj milj zillion gazillion bazillion gross grand milliard milliards milliarde milliarden millionen millones millón mille "
    "tausend mlrd billiard quadrillion quintillion sextillion octillion googol half halves thirds fourths quarter quarters fifths "
    "sixths sevenths eighths ninths tenths hundredths thousandths millionths billionths doubled tripled quadrupled halved max maximum "
    "minimum tops squared cubed factorial pi π plus minus divided multiplied raised point mod modulo fold percentage permille permil "
    "promille ppm ppb ppt basis bp bps pp score ish th st nd rd x am pm o'clock AM PM тыс млн млрд трлн тысяч тысячи тысяча миллион "
    "миллиона миллионов миллиард миллиарда миллиардов duizend tusen tusind tuhat hundert cientos mila tysiąc tysiące tysięcy tisíc "
    "miljon miljoen milion miliony milionów milioni milhão milhões mil milyon miliardi miliardo miliard miliardy miliardów milliárd "
    "lac lacs cr kharab हज़ार हजार लाख करोड़ ألف آلاف مليون مليار אלף 만 천 백 억 조".split()
)
# the scale of a table beside a number: `5 (thousand)`, `5 in millions`; `5 below zero`, `5 k$`, `5 TEUR`
_SCALED = re.compile(
    rf"[(\[]?\s?(?:in\s)?(?:{_FACTOR_WORDS})|(?:\w+ )?below zero\b|[kKMTB](?:\$|(?:{_CODES})\b)|p\.\s?p\."
)
_CHANGES = re.compile(
    r"(?:or|and) (?:more|less|fewer|so|above|below|over|under|up|higher|lower|greater|counting)\b"
    rf"|(?:and|or) (?:(?:an?|one|the) )?(?:{_COUNTS.replace(' ', '|')}|one|half|halves|thirds?|quarters?)\b|to the\b"
    r"|(?:per|in|out of|in every) (?:an? )?(?:mille?|thousand|hundred|million)\b|a\.m|p\.m|at (?:most|least)\b"
    rf"|out of (?:{_COUNTS.replace(' ', '|')})\b",
    re.I,
)
_OPENING, _CLOSING = "([{\"'“‘«„「『", ")]}\"'”’»」』"
_ENDS = re.compile(r"[.,;:?]+(?=\s|$|[)\]}\"'”’»])")
_AROUND = re.compile(r"\\(?:boxed|text|textbf|mathrm|mathbf|fbox)$")


@dataclass(frozen=True)
class Mention:
    """value: with everything that belongs to it. bare: of the digits, without percent and factor: 30 of `30%`, 1.5 of `1.5 million`.
    whole: nothing else is in the text, no word and no unit."""

    value: Fraction
    bare: Fraction
    percent: bool = False
    whole: bool = False


def number_in(text: str) -> Mention | None:
    """The one number a text states, exactly. Never raises; linear in the length, and None above 2,000 characters."""
    if len(text) > MAX_CHARS:
        return None
    text = _spelled(text)
    digit = _DIGIT.search(text)
    found = _NUMBER.match(text, digit.start()) if digit else None
    if not digit or not found:
        return None
    start = max(0, digit.start() - 20)
    prefix = _BEFORE.search(text[start : digit.start()])
    assert prefix, "it matches nothing at the end too"
    before, after = text[: start + prefix.start()], text[found.end() :]
    value = _value(found)
    if value is None or any(unicodedata.category(char)[0] == "N" for char in before + after):
        return None
    if not _fits_before(before, prefix["sign"] or "") or not _fits_after(before, after):
        return None
    signs = [sign.strip().lower() for sign in (prefix["sign"], prefix["inner"]) if sign]
    if len(signs) > 1:
        return None
    value = -value if signs and signs[0] != "+" else value
    scale = Fraction(1, 100) if found["percent"] else _factor(found["factor"] or "")
    return Mention(value * scale, value, bool(found["percent"]), not before.strip() and after.strip() in ("", "."))


def currency_in(text: str) -> str:
    """The currency that a text with one number names, "" where none: USD of `$5`, `US$5` and `5 USD`."""
    found = _CURRENCY.search(unicodedata.normalize("NFKC", text))
    return _SYMBOLS.get(found[0], found[0]) if found else ""


def _spelled(text: str) -> str:
    """Folded, with one dash, one sign of currency and single spaces; without emphasis and without the digits of names."""
    text = text.strip().strip("\ufeff\u200b\u200e\u200f\u2060").strip()
    text = _EMPHASIS.sub(r" \2 ", text).strip()
    if not text.isascii():
        text = fold("".join(map(_plain_character, _BLANKS.sub(_GAP, fold(text, blanks=False)))))
    text = re.sub(r"(?<!\w)Rs\.(?=\s?\d)", "Rs ", text)
    text = re.sub(r"[-=]>", ":", re.sub(r"[ \t\r\n]+", " ", text))
    text = _SURFACE.sub(" units", text.strip())
    spaced = _SPACED.search(text)
    if spaced and not re.search(r"[^\W_]", _without_codes(text[: spaced.start()] + text[spaced.end() :])):
        text = text[: spaced.start()] + spaced[1].replace(" ", _GAP) + text[spaced.end() :]
    return _NAME.sub(_without_digits, text)


def _plain_character(char: str) -> str:
    if char in _DASHES:
        return "-"
    if char.isspace():
        return " "
    if char in "×·⋅∗•✕✖":
        return "*"
    category = unicodedata.category(char)
    if category == "Sc" and char not in "¢￠":
        return "$"
    if category == "No":
        top, slash, bottom = unicodedata.normalize("NFKC", char).partition("\u2044")
        return f"{_OPEN}{top}\u2044{bottom}{_SHUT}" if slash and top and bottom else char
    return char


def _without_codes(text: str) -> str:
    return re.sub(rf"\b(?:minus|negative|percent|per cent|{_CODES}|Rs)\b|{_FACTOR_WORDS}", "", text)


def _without_digits(name: re.Match[str]) -> str:
    """`H2O` -> `HO`; but `USD5` stays, the sign of a currency before the digits."""
    if _CODE.match(name[0]) or not (name[0][0].isalpha() or name[0][0] == "_"):
        return name[0]
    return "".join(char for char in name[0] if unicodedata.category(char)[0] != "N")


def _value(found: re.Match[str]) -> Fraction | None:
    """Without sign, percent and factor; None for a fraction that is none, and for more than 2,000 digits."""
    if len(found[0]) > MAX_DIGITS:
        return None
    if found["top"] or found["small"]:
        whole, top, bottom = (
            int(found[a] or found[b] or 0) for a, b in (("mixed", "before"), ("top", "small"), ("bottom", "large"))
        )
        proper = bottom and (top < bottom if found["mixed"] else top % bottom)
        # 5% of what it is of, or the share? `1/2%` has two readings
        return None if not proper or found["percent"] else whole + Fraction(top, bottom) + _part(found)
    exponent = _exponent(found["ten"] or found["times"]) + int(found["e"] or 0)
    if abs(exponent) > MAX_DIGITS:
        return None
    return Fraction(_decimal(found["number"] or "1")) * Fraction(10) ** exponent + _part(found)


def _decimal(written: str) -> str:
    """`1.200,50` -> `1200.50`"""
    if "," in written and re.search(rf"[.{_GAP}]\d{{3}}", written) and re.search(r",\d{1,2}$", written):
        written = re.sub(r"[.,]", lambda sign: "" if sign[0] == "." else ".", written)
    return re.sub(rf"[,_'’{_GAP}]", "", written)


def _exponent(power: str | None) -> int:
    """Of `10^3`, `10**(-3)`, `10³`."""
    return int(re.sub(r"[\s^*(){}]", "", (power or "100")[2:]).translate(_RAISED) or 0)


def _part(found: re.Match[str]) -> Fraction:
    if not found["part"]:
        return Fraction(0)
    return Fraction(1, 2) if "half" in found["part"].lower() else Fraction(1, 4)


def _factor(written: str) -> Fraction:
    product = 1
    for word in re.findall(r"[a-z]+", written.lower()):
        product *= _FACTORS.get(word) or _FACTORS[word.removesuffix("s")]
    return Fraction(product)


def _fits_before(before: str, sign: str) -> bool:
    """Whether what comes before a number leaves it as it is."""
    rest = before.rstrip(" " + _OPENING)
    around = before[len(rest) :]
    last = rest[-1:]
    if around[:1] in ("(", "[", "{") and last not in ("", ":", "=", ".", ",", ";"):  # f(5), x(5), -(5)
        if not _AROUND.search(rest):
            return False
    elif last and not around and (last.isalnum() or last not in ":=~≈"):  # attached
        return False
    if not rest or last in ".,;?:~≈!|)]}\"'”’»" and not (last == "!" and around[:1] != " "):
        return True
    if last == "=":
        return rest[-2:-1] not in ("!", "<", ">")
    if not last.isalpha():
        return False
    word = re.split(r"[\s\-]", rest[-40:])[-1].strip("(\"'“‘").lower()
    if sign.endswith(" ") and sign[0] in "-+mM" and word not in _LINKS:  # a subtraction, a dash between two clauses
        return False
    return word not in _CHANGED_BY and not _CHANGING.search(rest[-40:])


def _fits_after(before: str, after: str) -> bool:
    """Whether what comes after a number leaves it as it is."""
    while after[:1] and after[0] in _CLOSING:
        if after[0] in "\"'" and after[0] not in before:  # feet and inches
            return False
        after = after[1:]
    if unit := _UNIT.match(after) or _PER.match(after):
        after = after[unit.end() :]
    if end := _ENDS.match(after):
        rest = after[end.end() :]
        return len(set(end[0])) == len(end[0]) and (end[0] != "," or _follows(rest))
    return after == "" or (after[0] == " " and _follows(after))


def _follows(after: str) -> bool:
    after = after.strip()
    if _SCALED.match(after):
        return False
    if not after or after[0] in "([{\"'“‘«=≈|:":
        return True
    if after[0] == "-":  # a dash between two clauses, not a sign of its own
        return after[1:2] == " "
    if not after[0].isalpha():
        return unicodedata.category(after[0]) in ("So", "Po") and after[0] not in "!%‰&*#@/\\"
    if not after[0].isascii() and unicodedata.numeric(after[0], None) is not None:  # 5 万
        return False
    word = re.match(r"[^\s,;:.?!)\]}\"-]+", after)
    assert word, "a letter is at its start"
    return word[0] not in _CHANGED_TO and word[0].lower() not in _CHANGED_TO - set("KMGT") and not _CHANGES.match(after)


# ---- all numbers

_MENTION = re.compile(
    r"(?P<minus>(?<![\w)%.!])(?<![\d)%!] )-)?"  # directly before the number and not after an operand
    r"\$?(?:(?<![\w.])|(?<=\dx))"  # not inside a word, but 3x4 is 3 and 4
    rf"(?P<number>(?!0){GROUPED}|(?!0)\d{{1,3}}(?:[_{_GAP}]\d{{3}}){{1,20}}(?![\d_])(?:\.\d+)?|(?:\d+(?:\.\d+)?|\.\d+)(?:e[+-]?\d+(?![\w.]))?)"
    r"(?P<percent>%(?![\d(])|\s%(?!\s*[\d(])|\s?(?:percent|per cent)\b)?"  # 7%3 and 7 % 3 are remainders
    rf"(?P<factor>{_FACTOR})?",
    re.IGNORECASE | re.ASCII,
)
_TEXT_SPELLINGS = str.maketrans({**dict.fromkeys("−–—‒", "-"), **dict.fromkeys("€£", "$")})


def numbers(text: str) -> list[Fraction]:
    """The values of `mentions`."""
    return [mention.value for mention in mentions(text)]


def mentions(text: str) -> list[Mention]:
    """All numbers mentioned in a text, in order: 1,200 is 1200, $3.50 is 7/2, 50% is 1/2, 5k is 5000, 3/4 is 3 and 4, 3rd is 3.

    A minus counts as a sign only where no subtraction can be meant: `-4` and `7 - -4` have one, `7-4` and `7 -4`
    have none. Digits inside a word (`H2O`) and numbers of more than 2,000 digits are left out. Never raises; linear in
    the length.
    """
    found = []
    text = fold(_BLANKS.sub(_GAP, fold(text, blanks=False))).translate(_TEXT_SPELLINGS)
    for match in _MENTION.finditer(re.sub(r"[ \t]+", " ", text)):
        digits, _, exponent = re.sub(rf"[,_{_GAP}]", "", match["number"]).lower().partition("e")
        if len(digits) > MAX_DIGITS or len(exponent) > 5 or abs(int(exponent or 0)) > MAX_DIGITS:
            continue
        bare = Fraction(f"{digits}e{exponent or 0}")
        bare = -bare if match["minus"] else bare
        scale = Fraction(1, 100) if match["percent"] else _factor(match["factor"] or "")
        found.append(Mention(bare * scale, bare, bool(match["percent"])))
    return found
