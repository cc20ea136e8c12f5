"""The tools of a task, ready for calls: some at a time, with a time limit, and whatever goes wrong in one is a result that says so.

A call runs in a thread of its own, which is left to itself when it does not come back in time. A tool with `begin` and `end` has an
object for every trajectory; after one of its calls hung it is not called again.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import json
import threading
import time
import traceback
import warnings
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Self

from swirl_fast.config import ToolsConfig
from swirl_fast.config.references import running
from swirl_fast.tools.characters import whole_characters
from swirl_fast.tools.tool import ToolSpec

MAX_ERROR_CHARS = 500
HUNG = 8  # calls of a tool that hung, none having come back, after which it is given up


@dataclass(frozen=True)
class ToolCall:
    """key: of the trajectory. arguments: by name, as the tool's schema wants them."""

    key: str
    tool: str
    arguments: Mapping[str, Any]


@dataclass
class ToolCounts:
    """errors: calls that raised, hung or gave no text. first_error: with its place."""

    calls: int = 0
    errors: int = 0
    hung: int = 0
    first_error: str = ""


@dataclass
class _Session:
    """The objects of one trajectory. broken: why one is not called any more."""

    objects: dict[str, Any] = field(default_factory=dict)
    broken: dict[str, str] = field(default_factory=dict)


class Toolbox:
    """tools: name -> function, object, or the class of a tool with state. A context manager: enters those that are context managers."""

    def __init__(self, specs: Sequence[ToolSpec], tools: Mapping[str, Any], config: ToolsConfig) -> None:
        self.specs = tuple(specs)
        self.counts = {spec.name: ToolCounts() for spec in specs}
        self._config = config
        self._stack = contextlib.ExitStack()
        self._tools = dict(tools)
        self._stateful = {name for name, tool in tools.items() if inspect.isclass(tool) and hasattr(tool, "begin")}
        self._sessions: dict[str, _Session] = {}
        self._loop: asyncio.AbstractEventLoop | None = None

    def __enter__(self) -> Self:
        for name, tool in self._tools.items():
            if name in self._stateful:
                continue
            with running("tasks.tools", name, "opening it"):
                if inspect.isclass(tool):
                    tool = tool()
                self._tools[name] = self._stack.enter_context(tool) if hasattr(tool, "__exit__") else tool
        return self

    def __exit__(self, *error: Any) -> None:
        for key in list(self._sessions):
            self.end(key)
        self._stack.close()
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._loop.stop)

    # ---- state of one question

    def begin(self, key: str, question: Any, earlier: Sequence[tuple[str, Mapping[str, Any], str]] = ()) -> None:
        """Before the first call of a trajectory.

        earlier: (tool, arguments, result) of the calls that it made before it was broken off: they are made again where a tool has state,
        and a result that differs is warned of.
        """
        if not self._stateful or key in self._sessions:
            return
        session = self._sessions[key] = _Session()
        for name in self._stateful:
            (outcome,) = _run([partial(_begun, self._tools[name], question)], 1, self._config.timeout)
            if isinstance(outcome, BaseException):
                self._note(name, outcome)
                hung = isinstance(outcome, _Hung)
                why = f" within {self._config.timeout:g} seconds" if hung else f": {type(outcome).__name__}: {outcome}"
                session.broken[name] = f"{name} could not begin{why}"
            else:
                session.objects[name] = outcome
        for name, arguments, result in earlier:
            if name in self._stateful:
                (again,) = self.call([ToolCall(key, name, arguments)])
                if again != result:
                    warnings.warn(
                        f"{name}: a call that was made again, to continue trajectory {key}, gave {again[:100]!r} and "
                        f"{result[:100]!r} before: its state is not what it was",
                        stacklevel=2,
                    )

    def end(self, key: str) -> None:
        """After the last call of a trajectory."""
        session = self._sessions.pop(key, None)
        for name, tool in session.objects.items() if session else ():
            if name not in session.broken:  # type: ignore[union-attr]
                (outcome,) = _run([tool.end], 1, self._config.timeout)
                if isinstance(outcome, BaseException):
                    self._note(name, outcome)

    # ---- calls

    def call(self, calls: Sequence[ToolCall]) -> list[str]:
        """One result a call, in order. Never raises for what a tool does, except RuntimeError for one that hangs in every call."""
        jobs = [partial(self._outcome, call) for call in calls]
        outcomes = _run(jobs, self._config.concurrency, self._config.timeout)
        return [self._result(call, outcome) for call, outcome in zip(calls, outcomes, strict=True)]

    def _outcome(self, call: ToolCall) -> Any:
        tool = self._tools[call.tool]
        if call.tool in self._stateful:
            session = self._sessions[call.key]
            if call.tool in session.broken:
                raise ToolError(session.broken[call.tool])
            tool = session.objects[call.tool]
        function = tool if inspect.isroutine(tool) else tool.call
        result = function(**call.arguments)
        if inspect.isawaitable(result):
            waiting = asyncio.run_coroutine_threadsafe(_awaited(result), self._event_loop())
            try:
                result = waiting.result(self._config.timeout)
            except TimeoutError:
                waiting.cancel()
                raise _Hung from None
        return as_text(result, self._config.result_chars)

    def _result(self, call: ToolCall, outcome: Any) -> str:
        counts = self.counts[call.tool]
        counts.calls += 1
        if isinstance(outcome, _Hung):
            counts.hung += 1
            if call.tool in self._stateful:
                self._sessions[call.key].broken[call.tool] = f"{call.tool} has not come back from an earlier call"
            if counts.hung == counts.calls >= HUNG:
                raise RuntimeError(
                    f"the tool {call.tool} came back from none of {counts.calls} calls within tools.timeout={self._config.timeout:g} "
                    "seconds: raise tools.timeout, or see what it waits for"
                )
            outcome = ToolError(f"{call.tool} took longer than {self._config.timeout:g} seconds")
        if isinstance(outcome, BaseException):
            self._note(call.tool, outcome)
            text = str(outcome) if isinstance(outcome, ToolError) else f"{type(outcome).__name__}: {outcome}"
            return f"ERROR: {as_text(text, MAX_ERROR_CHARS)}"
        return str(outcome)

    def _note(self, name: str, error: BaseException) -> None:
        counts = self.counts[name]
        counts.errors += 1
        if not counts.first_error:
            frames = traceback.extract_tb(error.__traceback__)
            place = (
                f" ({frames[-1].filename}, line {frames[-1].lineno})"
                if frames and not isinstance(error, ToolError)
                else ""
            )
            counts.first_error = f"{traceback.format_exception_only(error)[-1].strip()[:MAX_ERROR_CHARS]}{place}"

    def _event_loop(self) -> asyncio.AbstractEventLoop:
        with _LOOP_LOCK:
            if self._loop is None:
                runner = asyncio.Runner(loop_factory=asyncio.new_event_loop)
                self._loop = runner.get_loop()
                threading.Thread(target=_serve, args=(runner,), name="tools", daemon=True).start()
            return self._loop


_LOOP_LOCK = threading.Lock()


class ToolError(Exception):
    """What a tool did wrong, in words for the model."""


class _Hung(Exception):
    """Took longer than the time limit."""


def _begun(made: Any, question: Any) -> Any:
    tool = made()
    tool.begin(question)
    return tool


async def _awaited(result: Any) -> Any:
    return await result


def _serve(runner: asyncio.Runner) -> None:
    with runner:  # at the end it cancels what still runs
        runner.get_loop().run_forever()


def as_text(result: Any, limit: int) -> str:
    """A result as the model reads it, cut after `limit` characters. Numbers, lists and tables become JSON.

    Raises ToolError for anything else.
    """
    if hasattr(result, "item") and not isinstance(result, str | bytes):
        with contextlib.suppress(Exception):  # numpy's and torch's numbers
            result = result.item()
    if not isinstance(result, str):
        if result is None or isinstance(result, bytes | bytearray):
            raise ToolError(f"the tool gave {'nothing' if result is None else type(result).__name__} instead of text")
        try:
            result = json.dumps(result, ensure_ascii=False)
        except (TypeError, ValueError, RecursionError):
            raise ToolError(f"the tool gave {type(result).__name__} instead of text") from None
    if len(result) > limit:
        result = f"{result[:limit]} …"
    return whole_characters(result)  # no tokenizer takes half of a surrogate pair


def _run(jobs: Sequence[Callable[[], Any]], concurrency: int, timeout: float) -> list[Any]:
    """What each job returns or raises, _Hung for one that takes longer than `timeout` seconds; `concurrency` at a time, each in a daemon
    thread: one that hangs keeps neither the others nor the end of the process waiting."""
    outcomes: list[Any] = [None] * len(jobs)
    done: set[int] = set()
    started: dict[int, float] = {}
    waiting = deque(range(len(jobs)))
    changed = threading.Condition()

    def work() -> None:
        while True:
            with changed:
                if not waiting:
                    return
                i = waiting.popleft()
                started[i] = time.monotonic()
                changed.notify()
            try:
                outcome = jobs[i]()
            except BaseException as error:  # SystemExit, too: it would end this thread only, without a word
                outcome = error
            with changed:
                if i in done:  # too late: another thread has taken this one's place
                    return
                outcomes[i] = outcome
                done.add(i)
                changed.notify()

    def start() -> None:
        threading.Thread(target=work, name="tool", daemon=True).start()

    for _ in range(min(concurrency, len(jobs))):
        start()
    try:
        with changed:
            while True:
                now = time.monotonic()
                for i, began in started.items():
                    if i not in done and now - began >= timeout:
                        outcomes[i] = _Hung()
                        done.add(i)
                        start()
                if len(done) == len(jobs):
                    break
                running = [began for i, began in started.items() if i not in done]
                changed.wait(min(min(running) + timeout - now, 3600.0) if running else None)
    finally:
        waiting.clear()
    return outcomes
