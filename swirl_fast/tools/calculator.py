"""The calculator: exact arithmetic as a tool, in a worker process of its own.

What arithmetic.py computes is safe in any process. The tool runs it in one worker all the same, under a memory limit and a time
limit: whatever was overlooked there then costs one call, not the run. The worker is calculator_worker.py run as a script, never the
caller's `__main__` as multiprocessing would, so it starts alike under pytest, torchrun and `python -m`.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import threading
import time
from types import TracebackType

from swirl_fast.tools import calculator_worker
from swirl_fast.tools.arithmetic import MAX_CHARS

TIME_LIMIT = 2.0  # seconds a call
START_LIMIT = 60.0  # seconds the worker may take to start: a loaded machine is no fault of the model's
STARTS = 2  # tries: a worker that was killed while it started is replaced once


class Calculator:
    """The tool. One worker process, started at the first call; a context manager.

    A call that takes longer than `time_limit` seconds kills the worker (by its pid) and answers with an error; the
    next call starts another (about 0.03 s, which the limit does not count). Raises RuntimeError when no worker starts
    in two tries. The worker ends with its parent: at the end of its input, and at the latest a second after the parent has
    gone. Threads may share one calculator; a forked child gets a worker of its own.
    """

    def __init__(self, time_limit: float = TIME_LIMIT) -> None:
        if not time_limit > 0:
            raise ValueError(f"time_limit={time_limit}: must be above 0 seconds")
        self.time_limit = time_limit
        self._worker: subprocess.Popen[bytes] | None = None
        self._owner = os.getpid()
        self._lock = threading.Lock()

    def call(self, expression: str) -> str:
        """The value as `render_value` writes it, or `ERROR: ` and the reason. Never raises for what the text contains."""
        if len(expression) > MAX_CHARS:  # not worth sending
            return f"ERROR: The expression has {len(expression)} characters; at most {MAX_CHARS} are allowed."
        if os.getpid() != self._owner:  # forked: the worker belongs to the parent, and its lock may be held there
            self._worker, self._owner, self._lock = None, os.getpid(), threading.Lock()
        with self._lock:
            request = json.dumps(expression).encode() + b"\n"
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
        command = [sys.executable, "-I", "-S", calculator_worker.__file__, str(os.getpid()), str(self.time_limit)]
        for _ in range(STARTS):
            self._worker = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0)
            try:
                if _read_line(self._worker, START_LIMIT):
                    return
            except TimeoutError:
                pass
            except BaseException:  # interrupted: its first line must not be taken for an answer
                self._stop()
                raise
            self._stop()
        raise RuntimeError(f"the calculator's worker did not start in {STARTS} tries: {' '.join(command)}")

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
