"""Exact arithmetic on text that a model wrote, which may be anything. Pure: nothing here knows of tools or processes.

    text -> tokens -> Python expression -> syntax tree -> Fraction -> text
         normalise                   ast.parse     evaluate    render_value

No part of the text is ever executed. The tokenizer knows numbers, operators and a dozen words and rejects the rest;
the walk over the tree knows six kinds of nodes; every power and factorial is bounded before it is computed. So
`evaluate` is safe in any process. The calculator runs it in a worker process all the same (calculator_worker.py), without
site-packages: this file imports nothing but the standard library.

What has two readings is refused, and the message says how to write either. The rule for `%`:

    percentage   nothing that could be divided by follows: `50%`, `50% * 80`, `50% of 80`, `(50%)`; or it stands right after its
                 operand, and `+` or `-` follows with blanks on both sides: `100% - 40%`
    remainder    a plain number follows, with blanks on both sides of `%` or on neither: `10 % 3`, `10%3`
    refused      all else before a number, a sign, a bracket or a function: `50% 80`, `5 % -3`, `0%-(1)`, `50%(2)`; write
                 `(50/100)` for the percentage, `mod(a, b)` for the remainder

`x` is a multiplication sign between two operands (`3x4`), but `0x10` may be hexadecimal and `2x-3` an unknown. `3!!`, `5%%`, `2²!`,
`√9%` and `1/50% of 8` need brackets. `1,200` is 1200, but `0,500` may be a decimal comma. `2½` and `2 1/2` lack an operator.

Left out: units, variables, equations, complex numbers, trigonometry and logarithms.
"""

from __future__ import annotations

import ast
import math
import re
import unicodedata
from decimal import Decimal, localcontext
from fractions import Fraction

MAX_CHARS = 500
MAX_NODES = 200
MAX_DIGITS = 2_000  # of a numerator or denominator
MAX_EXPONENT = 10_000

_MAX_BITS = int(MAX_DIGITS * math.log2(10))
_PRECISION = 30  # significant digits of an irrational result, e.g. sqrt(2)
_PI = Fraction("3.14159265358979323846264338328")

_FUNCTIONS = {  # name -> fewest and most arguments
    "abs": (1, 1),
    "ceil": (1, 1),
    "factorial": (1, 1),
    "floor": (1, 1),
    "max": (1, MAX_NODES),
    "min": (1, MAX_NODES),
    "mod": (2, 2),
    "round": (1, 2),
    "sqrt": (1, 1),
}
_SEVERAL = {name for name, (_, most) in _FUNCTIONS.items() if most > 1}

GROUPED = r"\d{1,3}(?:,\d{3}){1,20}(?!\d|,\d)(?:\.\d+)?"  # 1,200 and 1,200.50
_PLAIN = r"(?:\d+(?:\.\d*)?|\.\d+)(?:e[+-]?\d+)?"
_TOKEN = re.compile(
    rf"\s*(?:(?P<number>(?!0){GROUPED}|{_PLAIN})|(?P<word>[a-z]+)|(?P<power>⁻?[⁰¹²³⁴⁵⁶⁷⁸⁹]+)|(?P<sign>\*\*|//|[-+*/%!(),]))",
    re.ASCII,
)
_PLAIN_TOKEN = re.compile(rf"\s*(?P<number>{_PLAIN})", re.ASCII)
_SPELLINGS = str.maketrans(
    {
        **dict.fromkeys("−–—‒‐‑", "-"),
        **dict.fromkeys("×·⋅∗•✕✖", "*"),
        **dict.fromkeys("÷∕", "/"),
        **dict.fromkeys("[{", "("),
        **dict.fromkeys("]}", ")"),
        **dict.fromkeys("$€£", " "),
        "^": "**",
        "√": "sqrt",
        "π": "pi",
    }
)
_RAISED = str.maketrans("⁻⁰¹²³⁴⁵⁶⁷⁸⁹", "-0123456789")
_NOT_ASCII = re.compile(r"[^\x00-\x7f]")


class CalculationError(ValueError):
    """An expression that has no value here; the message is a sentence addressed to the model."""


def normalise(expression: str) -> str:
    """The expression in one canonical spelling, which is also a valid Python expression; a fixed point of itself.

    Full-width and other compatibility forms become ASCII; `½` becomes `(1/2)`; `^` and superscripts become `**`; `x`, `×`, `÷`, `of`
    and typographic minus signs their operators; thousands commas and currency signs go; `50%` becomes `(50/100)`, or stays where it is
    the remainder (module docstring); `5!` becomes `factorial(5)`; brackets and braces become parentheses; a trailing `=` or `= ?` is
    dropped. Inside `max(…)`, `min(…)`, `mod(…)` and `round(…)` a comma always separates arguments: `max(1,200)` has two.

    Raises CalculationError for any other character or word, unbalanced parentheses, a missing operator, two readings, or more than
    500 characters. Linear in the length of the text.
    """
    if len(expression) > MAX_CHARS:
        raise CalculationError(f"The expression has {len(expression)} characters; at most {MAX_CHARS} are allowed.")
    text = _spell(expression)
    if not text:
        raise CalculationError("The expression is empty.")
    if "=" in text:
        raise CalculationError("This is an equation; write only the expression to calculate, without `=`.")
    return _Reader(text).read()


def _spell(expression: str) -> str:
    """Without what has no meaning of its own, and in ASCII but for superscripts and what will be refused."""
    text = fold(expression)
    text = _NOT_ASCII.sub(lambda match: _vulgar_fraction(match[0]), text)
    text = re.sub(r"(?<![\d.,])(\d{1,50})\u2044(\d{1,50})(?![\d.,])", r"(\1/\2)", text, flags=re.ASCII)
    text = text.translate(_SPELLINGS).lower().strip()
    text = re.sub(r"\\(times|cdot|div)\b", lambda match: "/" if match[1] == "div" else "*", text)
    return re.sub(r"\s*=\s*\??$", "", text)


def fold(text: str, blanks: bool = True) -> str:
    """NFKC, as far as it makes one ASCII character of one: `３（％` is `3(%`. A superscript is no digit and stays, as does `①`.

    blanks: also the spaces.
    """
    return _NOT_ASCII.sub(
        lambda match: match[0] if not blanks and match[0].isspace() else _fold_character(match[0]), text
    )


def _fold_character(character: str) -> str:
    if unicodedata.decomposition(character).startswith(("<super>", "<sub>", "<circle>")):
        return character
    folded = unicodedata.normalize("NFKC", character)
    return folded if len(folded) == 1 and folded.isascii() else character


def _vulgar_fraction(character: str) -> str:
    """`½` is `(1/2)`, never digits that join those before it; other characters stay."""
    numerator, slash, denominator = unicodedata.normalize("NFKC", character).partition("\u2044")
    return f"({numerator}/{denominator})" if numerator and slash and denominator else character


class _Reader:
    """Reads an expression from left to right into canonical tokens."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.start = self.end = 0  # of the token in hand, without the blanks before it
        self.out: list[str] = []
        self.opened: list[int] = []  # index in `out` of each open parenthesis
        self.operand = -1  # index in `out` where the operand that just ended begins; -1: an operator came last
        # what ended that operand, where a further `!`, `%` or power could belong to all of it or only to its end
        self.closed_by = ""

    def read(self) -> str:
        take = {"number": self.number, "word": self.word, "power": self.power, "sign": self.sign}
        while self.end < len(self.text):
            match = (self._separates() and _PLAIN_TOKEN.match(self.text, self.end)) or _TOKEN.match(self.text, self.end)
            if not match:
                wrong = self.text[self.end :].lstrip()[:1]
                raise CalculationError(f"{_show(wrong)} cannot be calculated; write numbers and + - * / ^ ( ).")
            kind = match.lastgroup or ""
            self.start, self.end = match.span(kind)
            take[kind](match[kind])
        if self.opened:
            raise CalculationError("A parenthesis is not closed.")
        return "".join(f"{token} " if token == "," else token for token in self.out)

    def number(self, token: str) -> None:
        """A number, or pi."""
        self._refuse_other_base(token)
        self._want_operator(token)
        canonical = token if token == "pi" else _canonical_number(token)
        before = self.out[-1] if self.out else ""
        if before == "sqrt":  # √16
            self.operand, self.closed_by = len(self.out) - 1, "√"
            self.out += ["(", canonical, ")"]
        elif before in _FUNCTIONS:
            raise CalculationError(f"Write brackets: {before}({canonical[:20]}).")
        else:
            self.operand, self.closed_by = len(self.out), "remainder" if before == "%" else ""
            self.out.append(canonical)

    def _refuse_other_base(self, token: str) -> None:
        base = re.match(r"([xbo])([\da-f]{1,20})", self.text[self.end :], re.ASCII) if token == "0" else None
        if base:
            product = f", or 0 * {base[2]} for a product" if base[1] == "x" and base[2].isdigit() else ""
            raise CalculationError(f"`0{base[0]}` looks like a number in another base; write it in decimal{product}.")

    def word(self, token: str) -> None:
        if token == "of":
            self._of()
        elif token == "x":
            self._want_operand("x")
            if re.match(r"\s*[-+]", self.text[self.end :], re.ASCII):
                raise CalculationError("`x` before a sign may be an unknown; write 3 * -4, or numbers only.")
            self._operator("*")
        elif token == "pi":
            self.number(token)
        elif token in _FUNCTIONS:
            self._want_operator(token)
            self.out.append(token)
        else:
            raise CalculationError(
                f"{_show(token)} cannot be calculated; write numbers and + - * / ^ ( ) without words or units."
            )

    def _of(self) -> None:
        self._want_operand("of")
        before = self.out[self.operand - 1] if self.operand else ""
        if before in ("/", "//", "%", "**"):
            raise CalculationError(f"`of` after `{before}` has two readings; use brackets.")
        self._operator("*")

    def power(self, token: str) -> None:
        """Superscripts: `5²`, `10⁻³`."""
        self._want_operand(token)
        self._refuse_after("²")
        exponent = token.translate(_RAISED)
        self.out += ["**", *(["-"] if exponent[0] == "-" else []), _canonical_number(exponent.lstrip("-"))]
        self.closed_by = "²"

    def sign(self, token: str) -> None:
        if token == "(":
            self._want_operator(token)
            self.opened.append(len(self.out))
            self.out.append(token)
        elif token == ")":
            self._close()
        elif token == "%":
            self._percent()
        elif token == "!":
            self._factorial()
        elif token == "," and not self._separates():
            raise CalculationError("A comma is misplaced; write 1200 or 1,200 for thousands and a point for decimals.")
        else:
            self._operator(token)

    def _close(self) -> None:
        if not self.opened:
            raise CalculationError("A closing parenthesis has no opening one.")
        start = self.opened.pop()
        self.out.append(")")
        self.operand, self.closed_by = start - 1 if self._function_before(start) else start, ""

    def _percent(self) -> None:
        self._want_operand("%")
        self._refuse_after("%")
        follows = _TOKEN.match(self.text, self.end)
        divides = follows and (
            follows["number"] or follows["word"] not in (None, "of", "x") or follows["sign"] in ("(", "+", "-")
        )
        blanks = self.text[self.start - 1].isspace(), self.text[self.end : self.end + 1].isspace()
        if not follows or not divides or (not blanks[0] and re.match(r"\s+[-+]\s", self.text[self.end :])):
            self._refuse_after("²", "remainder", "√")
            self.out[self.operand :] = ["(", *self.out[self.operand :], "/", "100", ")"]
            self.closed_by = "%"
        elif follows["number"] and blanks[0] == blanks[1]:
            self._operator("%")
        else:
            operand = "".join(self.out[self.operand :])[:20]
            raise CalculationError(
                f"`%` before `{follows[follows.lastgroup or 0][:20]}` has two readings; write ({operand}/100) for a "
                f"percentage, mod({operand}, …) for a remainder."
            )

    def _factorial(self) -> None:
        self._want_operand("!")
        self._refuse_after("!", "²", "remainder", "√")
        operand = self.out[self.operand :]
        self.out[self.operand :] = ["factorial", *(operand if operand[0] == "(" else ["(", *operand, ")"])]
        self.closed_by = "!"

    def _operator(self, token: str) -> None:
        if token in ("*", "/") and self.out[-1:] == [token]:
            raise CalculationError(f"A number is missing between `{token}` and `{token}`.")
        if token == "**":
            self._refuse_after("²")
        self.out.append(token)
        self.operand, self.closed_by = -1, ""

    def _want_operand(self, token: str) -> None:
        if self.operand < 0:
            raise CalculationError(f"There is no number before `{token}`.")

    def _want_operator(self, token: str) -> None:
        if self.operand >= 0:
            raise CalculationError(f"An operator is missing between `{self.out[-1][:20]}` and `{token[:20]}`.")

    def _refuse_after(self, *endings: str) -> None:
        if self.closed_by in endings:
            shown = self.text[max(0, self.start - 10) : self.end].strip()
            raise CalculationError(f"`{shown}` has two readings; use brackets.")

    def _separates(self) -> bool:
        """Whether a comma separates arguments here."""
        return bool(self.opened) and self._function_before(self.opened[-1]) in _SEVERAL

    def _function_before(self, parenthesis: int) -> str:
        name = self.out[parenthesis - 1] if parenthesis else ""
        return name if name in _FUNCTIONS else ""


def _show(text: str) -> str:
    return f"`{text[:20]}`" if text.isprintable() else f"The character U+{ord(text[0]):04X}"


def _canonical_number(token: str) -> str:
    digits, e, exponent = token.replace(",", "").partition("e")
    whole, point, decimals = digits.partition(".")
    if e and abs(int(exponent)) > MAX_DIGITS:
        raise CalculationError(f"The number {token[:20]} is too large or too small.")
    return (whole.lstrip("0") or "0") + (f".{decimals}" if decimals else "") + (f"e{int(exponent)}" if e else "")


def evaluate(expression: str) -> Fraction:
    """The exact value of an arithmetic expression; only irrational roots and powers are rounded, to 30 digits.

    Understands + - * / // % ** ^ ! parentheses, percentages, sqrt, abs, round (half away from zero), min, max, mod, floor,
    ceil, factorial and pi. Pure, bounded in time and memory, safe on any text. Raises CalculationError with the
    reason.
    """
    return evaluate_normalised(normalise(expression))


def evaluate_normalised(source: str) -> Fraction:
    """As `evaluate`, of a text that `normalise` gave, or of such texts joined by operators and parentheses."""
    try:
        tree = ast.parse(source, mode="eval")
    except SyntaxError:
        raise CalculationError("The expression is incomplete or malformed.") from None
    except (RecursionError, MemoryError):
        raise CalculationError("The expression is nested too deeply.") from None
    if sum(isinstance(node, ast.expr) for node in ast.walk(tree)) > MAX_NODES:
        raise CalculationError(f"The expression has more than {MAX_NODES} parts; split it.")
    try:
        return _value(tree.body, source)
    except ZeroDivisionError:
        raise CalculationError("Division by zero.") from None
    except RecursionError:
        raise CalculationError("The expression is nested too deeply.") from None


def _value(node: ast.expr, source: str) -> Fraction:
    match node:
        case ast.Constant():  # from its text: the tree holds a float, and 1e400 would be infinite
            return _bounded(Fraction(source[node.col_offset : node.end_col_offset]))
        case ast.Name(id="pi"):
            return _PI
        case ast.UnaryOp(op=ast.USub() | ast.UAdd()):
            value = _value(node.operand, source)
            return -value if isinstance(node.op, ast.USub) else value
        case ast.BinOp():
            return _bounded(_binary(node.op, _value(node.left, source), _value(node.right, source)))
        case ast.Call(func=ast.Name(id=name)) if name in _FUNCTIONS and not node.keywords:
            low, high = _FUNCTIONS[name]
            if not low <= len(node.args) <= high:
                raise CalculationError(
                    f"{name} takes {low if low == high else f'{low} to {high}'} numbers, not {len(node.args)}."
                )
            return _bounded(_call(name, [_value(argument, source) for argument in node.args]))
    raise CalculationError("The expression is incomplete or malformed.")


def _binary(op: ast.operator, left: Fraction, right: Fraction) -> Fraction:
    match op:
        case ast.Add():
            return left + right
        case ast.Sub():
            return left - right
        case ast.Mult():
            return left * right
        case ast.Div():
            return left / right
        case ast.FloorDiv():
            return Fraction(left // right)
        case ast.Mod():
            return left % right
        case ast.Pow():
            return _power(left, right)
    raise CalculationError("The expression is incomplete or malformed.")


def _power(base: Fraction, exponent: Fraction) -> Fraction:
    if base == 0 and exponent < 0:
        raise CalculationError("Division by zero.")
    if abs(exponent) > MAX_EXPONENT:
        raise CalculationError(f"The exponent is larger than {MAX_EXPONENT}.")
    if exponent.denominator == 1:
        longest = max(abs(base.numerator), base.denominator)
        if (longest.bit_length() - 1) * abs(exponent.numerator) > _MAX_BITS:
            raise CalculationError(f"The result has more than {MAX_DIGITS} digits.")
        return base**exponent.numerator
    if base < 0:
        raise CalculationError("A negative number has no real power with a fractional exponent.")
    if base == 0:
        return Fraction(0)
    roots = _whole_root(base.numerator, exponent.denominator), _whole_root(base.denominator, exponent.denominator)
    if roots[0] and roots[1]:
        return _power(Fraction(roots[0], roots[1]), Fraction(exponent.numerator))
    with localcontext(prec=2 * _PRECISION):
        base_decimal = Decimal(base.numerator) / Decimal(base.denominator)
        exponent_decimal = Decimal(exponent.numerator) / Decimal(exponent.denominator)
        if abs(exponent_decimal * base_decimal.log10()) > MAX_DIGITS:
            raise CalculationError(f"The result has more than {MAX_DIGITS} digits.")
        power = base_decimal**exponent_decimal
    with localcontext(prec=_PRECISION):
        return Fraction(+power)


def _whole_root(number: int, degree: int) -> int | None:
    """The root when it is a whole number."""
    if degree > number.bit_length():
        return 1 if number == 1 else None
    root, better = 0, 1 << -(-number.bit_length() // degree)
    while not root or better < root:  # Newton from above: falls until it is the floor of the root
        root, better = better, ((degree - 1) * better + number // better ** (degree - 1)) // degree
    return root if root**degree == number else None


def _call(name: str, values: list[Fraction]) -> Fraction:
    first = values[0]
    match name:
        case "abs":
            return abs(first)
        case "ceil":
            return Fraction(math.ceil(first))
        case "floor":
            return Fraction(math.floor(first))
        case "max":
            return max(values)
        case "min":
            return min(values)
        case "mod":
            return first % values[1]
        case "sqrt":
            if first < 0:
                raise CalculationError("A negative number has no real square root.")
            return _power(first, Fraction(1, 2))
        case "round":
            return _round(first, values[1] if len(values) > 1 else Fraction(0))
    if first.denominator != 1 or first < 0:
        raise CalculationError("factorial takes a whole number that is not negative.")
    if first > MAX_DIGITS or math.lgamma(float(first) + 1) / math.log(10) > MAX_DIGITS:
        raise CalculationError(f"The result has more than {MAX_DIGITS} digits.")
    return Fraction(math.factorial(first.numerator))


def _round(value: Fraction, decimals: Fraction) -> Fraction:
    if decimals.denominator != 1 or abs(decimals) > MAX_DIGITS:
        raise CalculationError("The second number of round is the count of decimals, e.g. round(2.345, 2).")
    unit = Fraction(10) ** -decimals.numerator
    whole = math.floor(abs(value) / unit + Fraction(1, 2))
    return (whole if value >= 0 else -whole) * unit


def _bounded(value: Fraction) -> Fraction:
    if max(value.numerator.bit_length(), value.denominator.bit_length()) > _MAX_BITS + 1:
        raise CalculationError(f"The result has more than {MAX_DIGITS} digits.")
    return value


def render_value(value: Fraction) -> str:
    """The value as the tool shows it, in the style of Python's floats: 24 is `24.0`, 1/3 is `0.3333333333`.

    Whole numbers of up to 30 digits are exact. Others show 10 significant digits, or 4 decimals where that is more, so
    that cents survive; below 1e-5, or beyond 30 digits before the point, in the form `1.5e+40`.
    """
    if value == 0:
        return "0.0"
    whole = abs(value.numerator) // value.denominator
    if value.denominator == 1 and whole < 10**30:
        return f"{value.numerator}.0"
    with localcontext(prec=MAX_DIGITS):
        number = Decimal(value.numerator) / Decimal(value.denominator)
        if whole >= 10**30 or abs(value) < Fraction(1, 10**5):
            mantissa, _, exponent = f"{number:.9e}".partition("e")
            mantissa = mantissa.rstrip("0")
            return f"{mantissa}{'0' if mantissa.endswith('.') else ''}e{int(exponent):+03d}"
        text = f"{number:.{max(9 - number.adjusted(), 4)}f}".rstrip("0")
        return text + "0" if text.endswith(".") else text
