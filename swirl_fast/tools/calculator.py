"""The calculator: exact arithmetic on text that a model wrote, which may be anything.

    text -> tokens -> Python expression -> syntax tree -> Fraction -> text
         normalise                   ast.parse     evaluate    render

No part of the text is ever executed. The tokenizer knows numbers, operators and a dozen words and rejects the rest;
the walk over the tree knows six kinds of nodes; every power and factorial is bounded before it is computed. So
`evaluate` is safe in any process. The tool runs it in one worker process all the same, under a memory limit and a time
limit: whatever was overlooked here then costs one call, not the run.

The worker is this file run as a script. It imports nothing but the standard library (30 ms to start), never the
caller's `__main__` as multiprocessing would, so it starts alike under pytest, torchrun and `python -m`.

Left out: units, variables, equations, complex numbers, trigonometry and logarithms.
"""

from __future__ import annotations

import ast
import json
import math
import os
import re
import select
import signal
import subprocess
import sys
import threading
import time
from decimal import Decimal, localcontext
from fractions import Fraction
from types import TracebackType

MAX_CHARS = 500
MAX_NODES = 200
MAX_DIGITS = 2_000  # of a numerator or denominator
MAX_EXPONENT = 10_000
TIME_LIMIT = 2.0  # seconds a call
MEMORY_LIMIT = 512 * 2**20  # bytes of address space of the worker
START_LIMIT = 60.0  # seconds the worker may take to start: a loaded machine is no fault of the model's

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
    "round": (1, 2),
    "sqrt": (1, 1),
}
_SEVERAL = {name for name, (_, most) in _FUNCTIONS.items() if most > 1}

_GROUPED = r"\d{1,3}(?:,\d{3}){1,20}(?!\d|,\d)(?:\.\d+)?"  # 1,200 and 1,200.50
_PLAIN = r"(?:\d+(?:\.\d*)?|\.\d+)(?:e[+-]?\d+)?"
_TOKEN = re.compile(
    rf"\s*(?:(?P<grouped>{_GROUPED})|(?P<number>{_PLAIN})|(?P<word>[a-z]+)|(?P<sign>\*\*|//|[-+*/%!(),]))", re.ASCII
)
_PLAIN_TOKEN = re.compile(rf"\s*(?P<number>{_PLAIN})", re.ASCII)
_SPELLINGS = str.maketrans(
    {
        **dict.fromkeys("−–—‒﹣－", "-"),
        **dict.fromkeys("×·⋅∗•✕✖", "*"),
        **dict.fromkeys("÷∕⁄", "/"),
        **dict.fromkeys("[{", "("),
        **dict.fromkeys("]}", ")"),
        **dict.fromkeys("$€£", ""),
        **dict.fromkeys("\u00a0\u2009\u202f", " "),
        "^": "**",
        "²": "**2",
        "³": "**3",
        "√": "sqrt",
        "π": "pi",
    }
)


class CalculationError(ValueError):
    """An expression that has no value here; the message is a sentence addressed to the model."""


def normalise(expression: str) -> str:
    """The expression in one canonical spelling, which is also a valid Python expression; a fixed point of itself.

    `^` and superscripts become `**`; `x`, `×`, `÷`, `of` and typographic minus signs their operators; thousands commas
    and currency signs go; `50%` becomes `(50/100)` unless an operand follows, where `%` is the remainder; `5!` becomes
    `factorial(5)`; brackets and braces become parentheses; a trailing `=` or `= ?` is dropped. Inside `max(…)`,
    `min(…)` and `round(…)` a comma always separates arguments: `max(1,200)` has two.

    Raises CalculationError for any other character or word, unbalanced parentheses, a missing operator, or more than
    500 characters. Linear in the length of the text.
    """
    if len(expression) > MAX_CHARS:
        raise CalculationError(f"The expression has {len(expression)} characters; at most {MAX_CHARS} are allowed.")
    text = expression.translate(_SPELLINGS).lower().strip()
    text = re.sub(r"\\(times|cdot|div)\b", lambda match: "/" if match[1] == "div" else "*", text)
    text = re.sub(r"\s*=\s*\??$", "", text)
    text = re.sub(r"(?<![a-z])x(?![a-z])", "*", text)
    text = re.sub(r"sqrt\s*(\d+(?:\.\d+)?)", r"sqrt(\1)", text)
    if not text:
        raise CalculationError("The expression is empty.")
    if "=" in text:
        raise CalculationError("This is an equation; write only the expression to calculate, without `=`.")

    out: list[str] = []
    opened: list[int] = []  # index in `out` of each open parenthesis
    operand = -1  # index in `out` where the operand that just ended begins; -1: an operator came last

    def function_before(parenthesis: int) -> str:
        return out[parenthesis - 1] if parenthesis and out[parenthesis - 1] in _FUNCTIONS else ""

    at = 0
    while at < len(text):
        separates = bool(opened) and function_before(opened[-1]) in _SEVERAL
        match = (separates and _PLAIN_TOKEN.match(text, at)) or _TOKEN.match(text, at)
        if not match:
            raise CalculationError(
                f"{_show(text[at:].lstrip()[:1])} cannot be calculated; write numbers and + - * / ^ ( )."
            )
        at = match.end()
        token = match[match.lastgroup or 0]
        if match.lastgroup in ("grouped", "number") or token == "pi":
            _operator_wanted(operand, out, token)
            operand = len(out)
            out.append(_canonical_number(token) if token != "pi" else token)
        elif token == "of":
            if operand < 0:
                raise CalculationError("There is no number before `of`.")
            out.append("*")
            operand = -1
        elif match.lastgroup == "word":
            if token not in _FUNCTIONS:
                raise CalculationError(
                    f"{_show(token)} cannot be calculated; write numbers and + - * / ^ ( ) without words or units."
                )
            _operator_wanted(operand, out, token)
            out.append(token)
        elif token == "(":
            _operator_wanted(operand, out, token)
            opened.append(len(out))
            out.append(token)
        elif token == ")":
            if not opened:
                raise CalculationError("A closing parenthesis has no opening one.")
            start = opened.pop()
            out.append(token)
            operand = start - 1 if function_before(start) else start
        elif token == "%" and not _operand_follows(text, at):
            if operand < 0:
                raise CalculationError("There is no number before `%`.")
            out[operand:] = ["(", *out[operand:], "/", "100", ")"]
        elif token == "!":
            if operand < 0:
                raise CalculationError("There is no number before `!`.")
            inner = out[operand:] if out[operand] == "(" else ["(", *out[operand:], ")"]
            out[operand:] = ["factorial", *inner]
        elif token == "," and not separates:
            raise CalculationError("A comma is misplaced; write 1200 or 1,200 for thousands and a point for decimals.")
        else:
            out.append(token)
            operand = -1
    if opened:
        raise CalculationError("A parenthesis is not closed.")
    return "".join(f"{token} " if token == "," else token for token in out)


def _show(text: str) -> str:
    return f"`{text[:20]}`" if text.isprintable() else f"The character U+{ord(text[0]):04X}"


def _operator_wanted(operand: int, out: list[str], token: str) -> None:
    if operand >= 0:
        raise CalculationError(f"An operator is missing between `{out[-1][:20]}` and `{token[:20]}`.")


def _operand_follows(text: str, at: int) -> bool:
    """Whether `%` before `at` is the remainder: an operand comes next (`7 % 3`), not `of` or an operator."""
    match = _TOKEN.match(text, at)
    if match is None or match["word"] == "of":
        return False
    return match["sign"] is None or match["sign"] == "("


def _canonical_number(token: str) -> str:
    digits, e, exponent = token.replace(",", "").partition("e")
    whole, point, decimals = digits.partition(".")
    if e and abs(int(exponent)) > MAX_DIGITS:
        raise CalculationError(f"The number {token[:20]} is too large or too small.")
    return (whole.lstrip("0") or "0") + (f".{decimals}" if decimals else "") + (f"e{int(exponent)}" if e else "")


def evaluate(expression: str) -> Fraction:
    """The exact value of an arithmetic expression; only irrational roots and powers are rounded, to 30 digits.

    Understands + - * / // % ** ^ ! parentheses, percentages, sqrt, abs, round (half away from zero), min, max, floor,
    ceil, factorial and pi. Pure, bounded in time and memory, safe on any text. Raises CalculationError with the
    reason.
    """
    source = normalise(expression)
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


def render(value: Fraction) -> str:
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


_MENTION = re.compile(
    r"(?P<minus>(?<![\w)%.!])(?<![\d)%!] )-)?"  # directly before the number and not after an operand
    r"\$?(?:(?<![\w.])|(?<=\dx))"  # not inside a word, but 3x4 is 3 and 4
    rf"(?P<number>{_GROUPED}|(?:\d+(?:\.\d+)?|\.\d+)(?:e[+-]?\d+(?![\w.]))?)"
    r"(?P<percent>%(?![\d(])|\s%(?!\s*[\d(]))?",  # 7%3 and 7 % 3 are remainders
    re.IGNORECASE | re.ASCII,
)
_TEXT_SPELLINGS = str.maketrans(
    {**dict.fromkeys("−–—‒﹣－", "-"), **dict.fromkeys("€£", "$"), "\u00a0": " ", "\u202f": " "}
)


def numbers(text: str) -> list[Fraction]:
    """All numbers mentioned in a text, in order: 1,200 is 1200, $3.50 is 7/2, 50% is 1/2, 3/4 is 3 and 4, 3rd is 3.

    A minus counts as a sign only where no subtraction can be meant: `-4` and `7 - -4` have one, `7-4` and `7 -4`
    have none. Digits inside a word (`H2O`) and numbers of more than 2,000 digits are left out. Never raises; linear in
    the length.
    """
    found = []
    for match in _MENTION.finditer(re.sub(r"[ \t]+", " ", text.translate(_TEXT_SPELLINGS))):
        digits, _, exponent = match["number"].replace(",", "").lower().partition("e")
        if len(digits) > MAX_DIGITS or len(exponent) > 5 or abs(int(exponent or 0)) > MAX_DIGITS:
            continue
        value = Fraction(f"{digits}e{exponent or 0}")
        value = -value if match["minus"] else value
        found.append(value / 100 if match["percent"] else value)
    return found


class Calculator:
    """The tool. One worker process, started at the first call; a context manager.

    A call that takes longer than `time_limit` seconds kills the worker (by its pid) and answers with an error; the
    next call starts another (about 0.03 s, which the limit does not count). Raises RuntimeError when no worker can be
    started. The worker ends with its parent: at the end of its input, and at the latest a second after the parent has
    gone. Threads may share one calculator; a forked child gets a worker of its own.
    """

    name = "calculator"
    description = (
        "a calculator: write one arithmetic expression with + - * / ^ ( ) and numbers; it gives back the value"
    )

    def __init__(self, time_limit: float = TIME_LIMIT) -> None:
        if not time_limit > 0:
            raise ValueError(f"time_limit={time_limit}: must be above 0 seconds")
        self.time_limit = time_limit
        self._worker: subprocess.Popen[bytes] | None = None
        self._owner = os.getpid()
        self._lock = threading.Lock()

    def call(self, argument: str) -> str:
        """The value as `render` writes it, or `ERROR: ` and the reason. Never raises for what the text contains."""
        if len(argument) > MAX_CHARS:  # not worth sending
            return f"ERROR: The expression has {len(argument)} characters; at most {MAX_CHARS} are allowed."
        if os.getpid() != self._owner:  # forked: the worker belongs to the parent, and its lock may be held there
            self._worker, self._owner, self._lock = None, os.getpid(), threading.Lock()
        with self._lock:
            request = json.dumps(argument).encode() + b"\n"
            for _ in range(2):  # a worker that someone killed between two calls is replaced once
                answer = self._ask(request)
                if answer is not None:
                    return answer
            return "ERROR: The expression could not be calculated; write a simpler one."

    def _ask(self, request: bytes) -> str | None:
        """None when the worker ended without an answer; it is then gone."""
        if self._worker is None:
            self._start()
        worker = self._worker
        assert worker is not None and worker.stdin is not None, "_start leaves a worker with pipes"
        try:
            worker.stdin.write(request)
            line = _read_line(worker, self.time_limit)
        except TimeoutError:
            self._stop()
            return f"ERROR: The calculation took longer than {self.time_limit:g} seconds; write a simpler expression."
        except BrokenPipeError:
            line = b""
        except BaseException:  # interrupted: an answer that arrives later must not be taken for that of the next call
            self._stop()
            raise
        if not line:
            self._stop()
            return None
        return json.loads(line)

    def _start(self) -> None:
        # -I -S: neither the environment, the working directory nor site-packages decide what the worker imports
        command = [sys.executable, "-I", "-S", __file__, str(os.getpid()), str(self.time_limit)]
        self._worker = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0)
        try:
            ready = _read_line(self._worker, START_LIMIT)
        except TimeoutError:
            ready = b""
        if not ready:
            self._stop()
            raise RuntimeError(f"the calculator's worker did not start: {' '.join(command)}")

    def _stop(self) -> None:
        worker, self._worker = self._worker, None
        if worker is None or os.getpid() != self._owner:
            return
        worker.kill()
        with worker:  # closes the pipes and waits
            pass

    def close(self) -> None:
        """Ends the worker. A later call starts one again."""
        self._stop()

    def __enter__(self) -> Calculator:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _read_line(worker: subprocess.Popen[bytes], seconds: float) -> bytes:
    """One line of the worker's output, empty at its end. Raises TimeoutError."""
    assert worker.stdout is not None, "the worker is started with pipes"
    deadline = time.monotonic() + seconds
    line = b""
    while not line.endswith(b"\n"):
        poll = select.poll()  # select.select fails above 1,024 open files
        poll.register(worker.stdout, select.POLLIN)
        if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
            raise TimeoutError
        chunk = os.read(worker.stdout.fileno(), 65536)
        if not chunk:
            return b""
        line += chunk
    return line


def _serve(parent: int, time_limit: float) -> None:
    """The worker: one JSON string a line in, one out, until the input ends or the parent is gone."""
    import resource

    signal.signal(
        signal.SIGINT, signal.SIG_IGN
    )  # Ctrl-C reaches the whole group; the parent decides when the worker ends
    try:
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT, MEMORY_LIMIT))
    except (ValueError, OSError):
        pass  # macOS knows no limit of address space
    os.write(1, b"ready\n")
    pending = b""
    while os.getppid() == parent:
        if not select.select([0], [], [], 1.0)[0]:
            continue
        chunk = os.read(0, 65536)
        if not chunk:
            return
        *lines, pending = (pending + chunk).split(b"\n")
        for line in lines:
            signal.setitimer(
                signal.ITIMER_REAL, time_limit + 1
            )  # SIGALRM ends the worker even if the parent is gone by then
            try:
                answer = render(evaluate(json.loads(line)))
            except CalculationError as error:
                answer = f"ERROR: {error}"
            except MemoryError:
                answer = "ERROR: The calculation needs too much memory; write a simpler expression."
            signal.setitimer(signal.ITIMER_REAL, 0)
            os.write(1, json.dumps(answer).encode() + b"\n")


if __name__ == "__main__":
    _serve(int(sys.argv[1]), float(sys.argv[2]))
