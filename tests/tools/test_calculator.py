"""The calculator's worker process: what it survives, that it is replaced, and that it ends with its parent."""

import os
import re
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.paths import ROOT

from swirl_fast.tools import calculator as calculator_module
from swirl_fast.tools import calculator_worker
from swirl_fast.tools.arithmetic import CalculationError, evaluate, render_value
from swirl_fast.tools.calculator import Calculator
from swirl_fast.tools.numerals import numbers

PATIENT = 60.0  # seconds a call: a loaded machine must not end what is under test


@pytest.fixture(scope="module")
def calculator():
    with Calculator(PATIENT) as calculator:
        yield calculator


def worker_pid(calculator: Calculator) -> int:
    assert calculator._worker is not None
    return calculator._worker.pid


def alive(pid: int) -> bool:
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


def wait_for_end(pid: int) -> None:
    """Returns as soon as the process has ended, which is within a second unless the machine is loaded."""
    for _ in range(6_000):
        if not alive(pid):
            return
        time.sleep(0.02)
    raise AssertionError(f"process {pid} does not end")


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
        expected = render_value(evaluate(text))
    except CalculationError as error:
        expected = f"ERROR: {error}"
    assert _shared.call(text) == expected


_shared = Calculator(PATIENT)  # hypothesis wants no fixture of function scope; its worker starts at the first call


def teardown_module() -> None:
    _shared.close()


def test_a_worker_that_hangs_is_replaced() -> None:
    with Calculator(PATIENT) as calculator:
        calculator.call("1")
        pid = worker_pid(calculator)
        os.kill(pid, signal.SIGSTOP)
        calculator.time_limit = 0.3
        assert calculator.call("1 + 1").startswith("ERROR: The calculation took longer than 0.3 seconds")
        assert not alive(pid)
        calculator.time_limit = PATIENT
        assert calculator.call("1 + 1") == "2.0"
        assert worker_pid(calculator) != pid


def test_a_worker_that_was_killed_is_replaced_unnoticed() -> None:
    with Calculator(PATIENT) as calculator:
        calculator.call("1")
        pid = worker_pid(calculator)
        os.kill(pid, signal.SIGKILL)
        wait_for_end(pid)
        assert calculator.call("1 + 1") == "2.0"


def worker_that_dies(folder: Path, starts: int, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The first `starts` workers kill themselves before they are ready. Gives a file with a line for each of these."""
    died = folder / "died"
    script = f"""
        import os, runpy, signal
        died = {str(died)!r}
        if not os.path.exists(died) or len(open(died).readlines()) < {starts}:
            with open(died, "a") as file:
                file.write("x\\n")
            os.kill(os.getpid(), signal.SIGKILL)
        runpy.run_path({calculator_worker.__file__!r}, run_name="__main__")
    """
    (folder / "worker.py").write_text(textwrap.dedent(script), encoding="utf-8")
    monkeypatch.setattr(calculator_worker, "__file__", str(folder / "worker.py"))
    return died


def test_a_worker_killed_while_it_starts_is_started_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    died = worker_that_dies(tmp_path, 1, monkeypatch)
    with Calculator(PATIENT) as calculator:
        assert calculator.call("1 + 1") == "2.0"
    assert died.read_text() == "x\n"


def test_a_worker_that_never_starts_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    died = worker_that_dies(tmp_path, 100, monkeypatch)
    with Calculator(PATIENT) as calculator:
        with pytest.raises(RuntimeError, match=r"did not start in 2 tries: .*worker\.py"):
            calculator.call("1 + 1")
        assert died.read_text() == "x\nx\n"
        assert calculator._worker is None


def test_an_interrupted_call_leaves_no_answer_for_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    with Calculator(PATIENT) as calculator:
        calculator.call("1")
        pid = worker_pid(calculator)
        os.kill(pid, signal.SIGSTOP)

        def interrupt(*_: object) -> bytes:
            os.kill(pid, signal.SIGCONT)  # the old worker could answer from now on
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(calculator_module, "_read_line", interrupt)
            with pytest.raises(KeyboardInterrupt):
                calculator.call("1 + 1")
        assert calculator.call("3 + 3") == "6.0"


def test_an_interrupted_start_leaves_no_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its `ready` would be taken for an answer."""

    def interrupted(*_: object) -> str:
        raise KeyboardInterrupt  # as SIGINT does, which a shell's background jobs ignore

    with Calculator(PATIENT) as calculator:
        with monkeypatch.context() as patch:
            patch.setattr(calculator_module, "_read_line", interrupted)
            with pytest.raises(KeyboardInterrupt):
                calculator.call("1 + 1")
        assert calculator._worker is None
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
    calculator = Calculator(PATIENT)
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
    calculator = Calculator(60.0)  # at module level and unguarded: multiprocessing's spawn would run this again
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
            while not os.path.exists(os.environ["RELEASE"]):
                time.sleep(0.05)
            os._exit(0)
        os._exit(0)
"""


@pytest.fixture
def program(tmp_path: Path) -> Path:
    path = tmp_path / "program_of_the_test.py"
    path.write_text(textwrap.dedent(PROGRAM), encoding="utf-8")
    return path


def environment(program: Path) -> dict[str, str]:
    search = f"{ROOT}{os.pathsep}{program.parent}"
    return {**os.environ, "PYTHONPATH": search, "OMP_NUM_THREADS": "1", "RELEASE": str(program.parent / "release")}


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
    for pid in pids:
        wait_for_end(pid)
    (tmp_path / "release").touch()  # the child of `--leak` holds the pipe open until here


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
    wait_for_end(pid)
