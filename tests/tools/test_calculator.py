import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import threading
import time
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.paths import ROOT

from swirl_fast.tools.calculator import (
    MAX_CHARS,
    MAX_DIGITS,
    CalculationError,
    Calculator,
    _whole_root,
    evaluate,
    normalise,
    numbers,
    render,
)

DATA = Path(os.environ.get("SWIRL_FAST_DATA", ROOT / "../shared/data"))


def shown(expression: str) -> str:
    return render(evaluate(expression))


@pytest.mark.parametrize(
    ("expression", "result"),
    [
        ("48 / 2", "24.0"),
        ("61 - 48 + 15", "28.0"),
        ("0.1 + 0.2", "0.3"),
        ("1/3", "0.3333333333"),
        ("2/3", "0.6666666667"),
        ("-7 // 2", "-4.0"),
        ("7 % 3", "1.0"),
        ("7 %(1+2)", "1.0"),
        ("-2**2", "-4.0"),
        ("2**3**2", "512.0"),
        ("2^-2", "0.25"),
        ("8^(1/3)", "2.0"),
        ("(9/4)^-1.5", "0.2962962963"),
        ("2^0.5", "1.414213562"),
        ("0^0.5", "0.0"),
        ("sqrt(1,024)", "32.0"),
        ("sqrt(2)", "1.414213562"),
        ("√16 + √(9)", "7.0"),
        ("5²", "25.0"),
        ("1,200 × 2", "2400.0"),
        ("1,234,567.5 + 0.5", "1234568.0"),
        ("3 x 4", "12.0"),
        ("3X4", "12.0"),
        ("12 ÷ 4 − 1", "2.0"),
        (r"3 \times 4 \div 2", "6.0"),
        ("[3 + 4] * {2}", "14.0"),
        ("$3.50 * 2", "7.0"),
        ("€1,000 / £4", "250.0"),
        ("48 / 2 =", "24.0"),
        ("48 / 2 = ?", "24.0"),
        ("48 / 2=?", "24.0"),
        ("007 + 00.50", "7.5"),
        (".5 + 1.", "1.5"),
        ("2e3", "2000.0"),
        ("5!", "120.0"),
        ("-(2+1)!", "-6.0"),
        ("max(1,200)", "200.0"),
        ("max(1, 2,000)", "2.0"),  # three arguments: 1, 2 and 000
        ("max((1,200), 3)", "1200.0"),
        ("1,200 + min(3,400)", "1203.0"),
        ("max(3x4, 5)", "12.0"),
        ("abs(-3) + floor(2.7) + ceil(2.1)", "8.0"),
        ("round(2.5)", "3.0"),
        ("round(-2.345, 2)", "-2.35"),
        ("round(1234, -2)", "1200.0"),
        ("pi * 2", "6.283185307"),
        ("123456789012345.678", "123456789012345.678"),
        ("10^29", "1" + "0" * 29 + ".0"),
        ("10^30", "1.0e+30"),
        ("10^400/3", "3.333333333e+399"),
        ("1e-7/3", "3.333333333e-08"),
        ("1e-4", "0.0001"),
        ("0 * -1", "0.0"),
    ],
)
def test_values(expression: str, result: str) -> None:
    assert shown(expression) == result


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("50%", Fraction(1, 2)),
        ("150%", Fraction(3, 2)),
        ("12.5%", Fraction(1, 8)),
        ("50% of 80", 40),
        ("5 % of 20", 1),
        ("100 / 50%", 200),
        ("2 ^ 200%", 4),
        ("10% + 5", Fraction(51, 10)),
        ("(10 + 5)%", Fraction(3, 20)),
        ("max(10, 20)% * 5", 1),
        ("1,200% * 2", 24),
        ("50 % 20", 10),
    ],
)
def test_a_percent_sign_takes_the_whole_operand(expression: str, value: Fraction) -> None:
    assert evaluate(expression) == value


@pytest.mark.parametrize(
    ("expression", "reason"),
    [
        ("", "empty"),
        ("  = ?", "empty"),
        ("1/0", "zero"),
        ("0^-1", "zero"),
        ("5 % 0", "zero"),
        ("5 // (3-3)", "zero"),
        ("48 / 2 = 24", "equation"),
        ("5 apples", "`apples`"),
        ("x", "incomplete"),
        ("2 +", "incomplete"),
        ("(1 + 1", "not closed"),
        ("1 + 1)", "no opening"),
        ("()", "incomplete"),
        ("2(3)", "operator is missing"),
        ("(2)(3)", "operator is missing"),
        ("1 2", "operator is missing"),
        ("1.2.3", "operator is missing"),
        ("1,0", "comma"),
        ("12,34", "comma"),
        ("1,2,3", "comma"),
        ("sqrt(1,2)", "comma"),
        ("max()", "max takes"),
        ("round(1,2,3)", "round takes"),
        ("round(1, 0.5)", "decimals"),
        ("sqrt(-1)", "square root"),
        ("(-8)^(1/3)", "fractional"),
        ("1.5!", "whole number"),
        ("(-5)!", "whole number"),
        ("9**9**9**9", "exponent"),
        ("9^-99999", "exponent"),
        ("99999^9999", "digits"),
        ("factorial(10**7)", "digits"),
        ("999!!", "digits"),
        ("10^1999*10^1999", "digits"),
        ("10^-1999/10^1999", "digits"),
        ("10^1999.5 * 10^999.5", "digits"),
        ("1e5000", "too large"),
        ("1e-5000", "too large"),
        ("1e99999999999", "too large"),
        ("nan", "`nan`"),
        ("inf", "`inf`"),
        ("().__class__", "`.`"),
        ("(1).real", "`.`"),
        ("__import__('os').system('id')", "`_`"),
        ("lambda: 1", "`lambda`"),
        ("max(*[1])", "incomplete"),
        ("max(1 for x in 2)", "`for`"),
        ("1 if 1 else 2", "`if`"),
        ("1 << 9999", "`<`"),
        ("1_000", "`_`"),
        ("5j", "`j`"),
        ("١ + ١", "`١`"),
        ("½", "`½`"),
        ("1\x00+1", "U+0000"),
        ("\ud800", "U+D800"),
        ("1;2", "`;`"),
        ("1\n2", "operator is missing"),
        ("+" * MAX_CHARS, "incomplete"),
        ("(" * 300 + "1" + ")" * 100, "not closed"),
        ("(" * 249 + "1" + ")" * 249, "malformed"),
        ("-" * (MAX_CHARS - 1) + "1", "200 parts"),
        ("1+" * 249 + "1", "200 parts"),
        ("a" * (MAX_CHARS + 1), "501 characters"),
    ],
)
def test_refusals_say_why(expression: str, reason: str) -> None:
    with pytest.raises(CalculationError, match=re.escape(reason)):
        evaluate(expression)


def test_precision_of_irrational_results() -> None:
    root = evaluate("sqrt(2)")
    assert abs(root * root - 2) < Fraction(1, 10**28)
    assert evaluate("sqrt(10^1998)") == 10**999  # exact whatever the size
    assert evaluate("27^(2/3)") == 9
    assert evaluate("(27/64)^(-2/3)") == Fraction(16, 9)


@given(root=st.integers(1, 10**12), degree=st.integers(2, 40), off=st.integers(-1, 1))
def test_whole_roots(root: int, degree: int, off: int) -> None:
    number = root**degree + off
    if number >= 1:
        found = _whole_root(number, degree)
        assert found == root if off == 0 else found is None or found**degree == number


_leaf = st.one_of(
    st.integers(0, 10**6).map(str),
    st.decimals(0, 10**4, places=3).map(lambda value: f"{value:f}"),
)
_operators = st.sampled_from(["+", "-", "*", "/", "//", "%", " - -"])
_expressions = st.recursive(
    _leaf,
    lambda inner: st.one_of(
        st.tuples(inner, _operators, inner)
        .filter(lambda parts: parts[1] != "%" or not parts[2].startswith("-"))  # 50%-(3) is a half less three
        .map("({0[0]}{0[1]}{0[2]})".format),
        inner.map("-({})".format),
        inner.map("abs({})".format),
    ),
    max_leaves=12,
)


@given(_expressions)
def test_equals_python_on_fractions(expression: str) -> None:
    reference = re.sub(r"\d+(?:\.\d+)?", lambda match: f"F('{match[0]}')", expression)
    try:
        value = eval(reference, {"F": Fraction, "abs": abs})
    except ZeroDivisionError:
        with pytest.raises(CalculationError, match="zero"):
            evaluate(expression)
        return
    assert evaluate(expression) == value
    assert normalise(normalise(expression)) == normalise(expression)
    # what the tool shows is the value to ten digits, and reads back as one number
    (read,) = numbers(render(value))
    assert abs(read - value) <= abs(value) / 10**9


@settings(max_examples=300)
@given(st.one_of(st.text(max_size=60), st.text("0123456789.,+-*/%^!()xe =$√²maxroundsqt", max_size=40)))
def test_any_text_gives_a_value_or_a_reason(text: str) -> None:
    start = time.process_time()
    try:
        value = evaluate(text)
    except CalculationError as error:
        assert str(error)
    else:
        assert max(abs(value.numerator), value.denominator) <= 10 ** (MAX_DIGITS + 1)
        assert len(numbers(render(value))) == 1
        assert evaluate(normalise(text)) == value
    assert time.process_time() - start < 1.0
    assert all(isinstance(number, Fraction) for number in numbers(text))


@given(st.integers(-(10**40), 10**40), st.integers(0, 45))
def test_rendering_is_close_and_short(numerator: int, exponent: int) -> None:
    value = Fraction(numerator, 10**exponent)
    text = render(value)
    assert len(text) <= 37
    assert abs(Fraction(Decimal(text)) - value) <= abs(value) / 10**9
    if value.denominator == 1 and abs(value) < 10**30:
        assert text == f"{value}.0"


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("1,200 and $3.50 and 50%", ["1200", "7/2", "1/2"]),
        ("$1,234,567.89. It was 10:30.", ["123456789/100", "10", "30"]),
        ("61 - 48 + 15 -> 28.0", ["61", "48", "15", "28"]),
        ("7-4, 7 -4, 7 - 4, (7)-4", ["7", "4", "7", "4", "7", "4", "7", "4"]),
        ("-4, 7 - -4, (-5) = -6 is -7", ["-4", "7", "-4", "-5", "-6", "-7"]),
        ("-$5 and $-5, −5", ["-5", "-5", "-5"]),
        ("COVID-19, H2O, the 3rd, 3x4, 5–10", ["19", "3", "3", "4", "5", "10"]),
        ("1e5 and 1.5e+20 and 2e-3", ["100000", "150000000000000000000", "1/500"]),
        ("12.5% of 3/4; 7%3 and 7 % 3 and 20% 5", ["1/8", "3", "4", "7", "3", "7", "3", "1/5", "5"]),
        ("1,0 12,34 1234,567", ["1", "0", "12", "34", "1234", "567"]),
        (".5 and 5.", ["1/2", "5"]),
        ("no number", []),
        ("9" * 5000, []),
        ("1e999999999999", []),
    ],
)
def test_numbers_mentioned(text: str, found: list[str]) -> None:
    assert [str(number) for number in numbers(text)] == found


@pytest.mark.parametrize(
    "text", ["111," * 20_000 + "1", "1e" * 100_000, "-" * 200_000, "1." * 100_000, " " * 200_000 + "1"]
)
def test_numbers_is_linear(text: str) -> None:
    start = time.process_time()
    numbers(text)
    assert time.process_time() - start < 5.0  # quadratic would take minutes


def test_annotations_of_gsm8k() -> None:
    path = DATA / "gsm8k/train.jsonl"
    if not path.is_file():
        pytest.skip(f"{path} is not here")
    solutions = [json.loads(line)["answer"] for line in path.read_text().splitlines()]
    annotations = [pair for text in solutions for pair in re.findall(r"<<([^<>=]+)=([^<>=]+)>>", text)][::4]
    wrong = [pair for pair in annotations if abs(evaluate(pair[0]) - evaluate(pair[1])) > Fraction(1, 100)]
    assert len(annotations) > 5_000
    assert not wrong


# the worker


@pytest.fixture(scope="module")
def calculator():
    with Calculator() as calculator:
        yield calculator


def worker_pid(calculator: Calculator) -> int:
    assert calculator._worker is not None
    return calculator._worker.pid


def alive(pid: int) -> bool:
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


def wait_until(condition, seconds: float = 10.0) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and not condition():
        time.sleep(0.02)
    return condition()


def test_tool_calls(calculator: Calculator) -> None:
    assert calculator.call("48 / 2") == "24.0"
    assert calculator.call("1/0") == "ERROR: Division by zero."
    assert calculator.call("5 apples").startswith("ERROR: `apples`")


@pytest.mark.parametrize(
    "hostile",
    [
        "1" * 10**6,
        "(" * 10**6,
        "\ud800\udfff",
        "\n\r\x00\u2028\x1b",
        "9**9**9**9",
        "().__class__.__base__.__subclasses__()",
        "+".join(["sqrt(10^1998+7)"] * 20),
        "+".join(["(7^2300)^(1/100)"] * 25),
        "NaN",
        "🙂" * 100,
    ],
)
def test_hostile_text_is_answered_by_the_same_worker(calculator: Calculator, hostile: str) -> None:
    calculator.call("1")
    pid = worker_pid(calculator)
    result = calculator.call(hostile)
    assert result.startswith("ERROR: ") or len(numbers(result)) == 1
    assert len(result) < 300
    assert calculator.call("2 + 2") == "4.0"
    assert worker_pid(calculator) == pid


@settings(max_examples=100)
@given(st.text(max_size=30))
def test_the_tool_says_what_evaluate_says(text: str) -> None:
    try:
        expected = shown(text)
    except CalculationError as error:
        expected = f"ERROR: {error}"
    assert _shared.call(text) == expected


_shared = Calculator()  # hypothesis wants no fixture of function scope; its worker starts at the first call


def teardown_module() -> None:
    _shared.close()


def test_a_worker_that_hangs_is_replaced() -> None:
    with Calculator(time_limit=0.3) as calculator:
        calculator.call("1")
        pid = worker_pid(calculator)
        os.kill(pid, signal.SIGSTOP)
        start = time.monotonic()
        assert calculator.call("1 + 1").startswith("ERROR: The calculation took longer than 0.3 seconds")
        assert time.monotonic() - start >= 0.3
        assert not alive(pid)
        assert calculator.call("1 + 1") == "2.0"
        assert worker_pid(calculator) != pid


def test_a_worker_that_was_killed_is_replaced_unnoticed() -> None:
    with Calculator() as calculator:
        calculator.call("1")
        pid = worker_pid(calculator)
        os.kill(pid, signal.SIGKILL)
        assert wait_until(lambda: not alive(pid))
        assert calculator.call("1 + 1") == "2.0"


def test_an_interrupted_call_leaves_no_answer_for_the_next() -> None:
    with Calculator(time_limit=30) as calculator:
        calculator.call("1")
        pid = worker_pid(calculator)
        os.kill(pid, signal.SIGSTOP)

        def interrupt(*_: object) -> None:
            os.kill(pid, signal.SIGCONT)  # the old worker could answer from now on
            raise KeyboardInterrupt

        before = signal.signal(signal.SIGALRM, interrupt)
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        try:
            with pytest.raises(KeyboardInterrupt):
                calculator.call("1 + 1")
        finally:
            signal.signal(signal.SIGALRM, before)
        assert calculator.call("3 + 3") == "6.0"


def test_threads_share_a_calculator(calculator: Calculator) -> None:
    results: dict[int, str] = {}

    def work(i: int) -> None:
        for _ in range(20):
            results[i] = calculator.call(f"{i} + {i}")
            assert results[i] == f"{2 * i}.0"

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {i: f"{2 * i}.0" for i in range(8)}


def test_the_worker_is_small_and_limited(calculator: Calculator) -> None:
    calculator.call("1")
    proc = Path(f"/proc/{worker_pid(calculator)}")
    if not proc.exists():
        pytest.skip("needs /proc")
    assert "site-packages" not in (proc / "maps").read_text()  # no torch, no numpy
    (limit,) = re.findall(r"Max address space\s+(\d+)", (proc / "limits").read_text())
    assert int(limit) == 512 * 2**20


def test_close_ends_the_worker_and_a_later_call_starts_another() -> None:
    calculator = Calculator()
    calculator.close()
    assert calculator.call("2 * 3") == "6.0"
    pid = worker_pid(calculator)
    calculator.close()
    assert not alive(pid)
    assert calculator.call("2 * 4") == "8.0"
    calculator.close()


def test_time_limit_must_be_positive() -> None:
    with pytest.raises(ValueError, match="time_limit=0"):
        Calculator(time_limit=0)


PROGRAM = """
    import os, sys
    from swirl_fast.tools.calculator import Calculator
    calculator = Calculator()  # at module level and unguarded: multiprocessing's spawn would run this again
    assert calculator.call("48 / 2") == "24.0"
    if "--fork" in sys.argv:
        child = os.fork()
        results = [calculator.call(f"{i} + {os.getpid() * 0}") for i in range(50)]
        assert results == [f"{i}.0" for i in range(50)], results
        if child == 0:
            calculator.close()
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
    sys.stdout.write(f"pid {calculator._worker.pid}\\n")
    sys.stdout.flush()
    if "--wait" in sys.argv:
        sys.stdin.read()
    if "--leak" in sys.argv:  # a child that outlives us and holds our end of the pipe open
        if os.fork() == 0:
            os.close(1)
            os.close(2)
            import time
            time.sleep(6)
            os._exit(0)
        os._exit(0)
"""


@pytest.fixture
def program(tmp_path: Path) -> Path:
    path = tmp_path / "program_of_the_test.py"
    path.write_text(textwrap.dedent(PROGRAM))
    return path


def environment(program: Path) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{program.parent}", "OMP_NUM_THREADS": "1"}


@pytest.mark.parametrize(
    "launcher",
    [
        ["-m", "program_of_the_test"],
        ["-m", "program_of_the_test", "--fork"],
        ["-m", "program_of_the_test", "--leak"],
        ["-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "program_of_the_test"],
    ],
    ids=["python -m", "fork", "leak", "torchrun"],
)
def test_works_however_the_parent_is_started(program: Path, launcher: list[str], tmp_path: Path) -> None:
    with open(tmp_path / "errors", "w+") as errors:  # a pipe would make run() wait for the worker, which inherits it
        done = subprocess.run(
            [sys.executable, *launcher], env=environment(program), stdout=subprocess.PIPE, stderr=errors, timeout=120
        )
        errors.seek(0)
        assert done.returncode == 0, errors.read()
    pids = [int(pid) for pid in re.findall(rb"pid (\d+)", done.stdout)]
    assert len(pids) == (2 if "torch.distributed.run" in launcher else 1)
    assert all(wait_until(lambda pid=pid: not alive(pid), 4) for pid in pids)


def test_the_worker_dies_with_a_parent_that_is_killed(program: Path) -> None:
    parent = subprocess.Popen(
        [sys.executable, str(program), "--wait"],
        env=environment(program),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert parent.stdout is not None
    pid = int(parent.stdout.readline().split()[1])
    assert alive(pid)
    with parent:
        parent.kill()
    assert wait_until(lambda: not alive(pid))
