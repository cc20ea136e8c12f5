"""The process in which the calculator calculates: calculator.py runs this file as a script, with `-I -S` (30 ms to start).

    python -I -S calculator_worker.py PARENT TIME_LIMIT

One JSON string a line comes in, one goes out, until the input ends or the process PARENT has gone. A line that takes more than TIME_LIMIT
and a second ends the process. Nothing but the standard library and arithmetic.py beside it is imported.
"""

from __future__ import annotations

import json
import os
import select
import signal
import sys

MEMORY_LIMIT = 512 * 2**20  # bytes of address space


def serve(parent: int, time_limit: float) -> None:
    import resource

    # Ctrl-C reaches the whole group; the parent decides when the worker ends
    signal.signal(signal.SIGINT, signal.SIG_IGN)
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
            # SIGALRM ends the worker even if the parent has gone by then
            signal.setitimer(signal.ITIMER_REAL, time_limit + 1)
            answer = _answer(json.loads(line))
            signal.setitimer(signal.ITIMER_REAL, 0)
            os.write(1, json.dumps(answer).encode() + b"\n")


def _answer(expression: str) -> str:
    try:
        return arithmetic.render_value(arithmetic.evaluate(expression))
    except arithmetic.CalculationError as error:
        return f"ERROR: {error}"
    except MemoryError:
        return "ERROR: The calculation needs too much memory; write a simpler expression."


if __name__ == "__main__":
    # -I leaves the script's folder out; behind the standard library, so that nothing here takes the place of one of its modules
    sys.path.append(os.path.dirname(os.path.abspath(__file__)))
    import arithmetic  # not swirl_fast.tools.arithmetic, whose packages import more

    serve(int(sys.argv[1]), float(sys.argv[2]))
