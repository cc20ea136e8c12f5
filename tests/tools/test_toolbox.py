"""Calls of tools: beside each other, with a time limit, and whatever goes wrong is a result that says so."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from swirl_fast.config import ConfigError, ToolsConfig
from swirl_fast.tools.tool import text_tool
from swirl_fast.tools.toolbox import HUNG, Toolbox, ToolCall


def box(tools: dict[str, Any], **settings: Any) -> Toolbox:
    return Toolbox([text_tool(name, name, "x", "") for name in tools], tools, ToolsConfig(**settings))


def results(tool: Any, given: Sequence[Any] = ("1",), **settings: Any) -> list[str]:
    with box({"tool": tool}, **settings) as opened:
        return opened.call([ToolCall("t", "tool", {"x": one}) for one in given])


@pytest.mark.parametrize(
    ("result", "text"),
    [
        ("as it is", "as it is"),
        ("", ""),
        (3, "3"),
        (2.5, "2.5"),
        (True, "true"),
        (["a", 1], '["a", 1]'),
        ({"é": None}, '{"é": null}'),
        (np.float32(0.5), "0.5"),
        (np.int64(7), "7"),
        ("x" * 10_000_000, "x" * 50 + " …"),
        (None, "ERROR: the tool gave nothing instead of text"),
        (b"bytes", "ERROR: the tool gave bytes instead of text"),
        (object(), "ERROR: the tool gave object instead of text"),
        ("half \ud800 a pair", "half \ufffd a pair"),
    ],
)
def test_results_become_text(result: Any, text: str) -> None:
    assert results(lambda x: result, result_chars=50) == [text]


def test_an_exception_is_an_observation_and_counted() -> None:
    def tool(x: str) -> str:
        if x == "exit":
            raise SystemExit("gone")
        return str(1 / int(x))

    with box({"tool": tool}) as opened:
        assert opened.call([ToolCall("t", "tool", {"x": x}) for x in ("4", "0", "exit")]) == [
            "0.25",
            "ERROR: ZeroDivisionError: division by zero",
            "ERROR: SystemExit: gone",
        ]
        counts = opened.counts["tool"]
        assert (counts.calls, counts.errors, counts.hung) == (3, 2, 0)
        assert (
            "ZeroDivisionError: division by zero (" in counts.first_error
            and "test_toolbox.py, line" in counts.first_error
        )


def test_calls_run_beside_each_other_and_results_keep_their_order() -> None:
    together = threading.Barrier(4)

    def tool(x: int) -> int:
        together.wait(30)  # passes only when four calls are under way
        return x

    assert results(tool, range(8), concurrency=4) == [str(x) for x in range(8)]


def test_no_more_calls_than_allowed_are_under_way() -> None:
    under_way, most, lock = 0, 0, threading.Lock()

    def tool(x: int) -> str:
        nonlocal under_way, most
        with lock:
            under_way += 1
            most = max(most, under_way)
        threading.Event().wait(0.01)
        with lock:
            under_way -= 1
        return ""

    results(tool, range(12), concurrency=3)
    assert most <= 3


def test_a_call_that_hangs_costs_itself() -> None:
    release = threading.Event()

    def tool(x: str) -> str:
        if x == "hang":
            release.wait()
        return x

    try:
        assert results(tool, ["hang", "a", "hang", "b", "c"], concurrency=2, timeout=0.3) == [
            "ERROR: tool took longer than 0.3 seconds", "a", "ERROR: tool took longer than 0.3 seconds", "b", "c",
        ]  # fmt: skip
    finally:
        release.set()


def test_a_tool_that_always_hangs_stops_the_run() -> None:
    release = threading.Event()
    try:
        with pytest.raises(
            RuntimeError, match=f"tool came back from none of {HUNG} calls within tools.timeout=0.05 seconds"
        ):
            results(lambda x: release.wait(), range(HUNG), timeout=0.05)
    finally:
        release.set()


def test_async_tools() -> None:
    async def tool(x: str) -> str:
        await asyncio.sleep(0 if x != "hang" else 60)
        return x.upper()

    assert results(tool, ["a", "hang", "b"], timeout=0.5) == ["A", "ERROR: tool took longer than 0.5 seconds", "B"]


class Counter:
    """A tool with state of one question."""

    made = 0
    ended: list[str] = []

    def __init__(self) -> None:
        type(self).made += 1

    def begin(self, question: str) -> None:
        self.question, self.count = question, 0

    def call(self, x: str) -> str:
        if x == "hang":
            threading.Event().wait(5)
        self.count += 1
        return f"{self.question} {self.count}"

    def end(self) -> None:
        self.ended.append(self.question)


def test_state_of_a_question_is_its_own() -> None:
    Counter.made, Counter.ended = 0, []
    with box({"tool": Counter}, timeout=0.5) as opened:
        for key in ("a", "b"):
            opened.begin(key, f"question {key}")
        calls = [ToolCall(key, "tool", {"x": ""}) for key in ("a", "b", "a")]
        assert [opened.call([call])[0] for call in calls] == ["question a 1", "question b 1", "question a 2"]
        opened.end("a")
        assert opened.call([ToolCall("b", "tool", {"x": "hang"})]) == ["ERROR: tool took longer than 0.5 seconds"]
        assert opened.call([ToolCall("b", "tool", {"x": ""})]) == ["ERROR: tool has not come back from an earlier call"]
    assert Counter.made == 2 and Counter.ended == ["question a"], "one that hangs is not ended"


def test_a_trajectory_that_was_broken_off_has_its_calls_made_again() -> None:
    with box({"tool": Counter}) as opened:
        opened.begin("a", "q", [("tool", {"x": ""}, "q 1"), ("tool", {"x": ""}, "q 2")])
        assert opened.call([ToolCall("a", "tool", {"x": ""})]) == ["q 3"]
        with pytest.warns(
            UserWarning, match="continue trajectory b, gave 'q 1' and 'another' before: its state is not"
        ):
            opened.begin("b", "q", [("tool", {"x": ""}, "another")])


def test_a_tool_that_cannot_begin_costs_its_calls_and_not_the_run() -> None:
    class Fussy(Counter):
        def begin(self, question: str) -> None:
            if question == "hang":
                threading.Event().wait(5)
            raise LookupError(f"no {question}")

    with box({"tool": Fussy}, timeout=0.3) as opened:
        for key in ("door", "hang"):
            opened.begin(key, key)
        assert opened.call([ToolCall("door", "tool", {"x": ""})]) == [
            "ERROR: tool could not begin: LookupError: no door"
        ]
        assert opened.call([ToolCall("hang", "tool", {"x": ""})]) == ["ERROR: tool could not begin within 0.3 seconds"]
    assert opened.counts["tool"].first_error.startswith("LookupError: no door (")


def test_a_tool_that_cannot_be_opened_is_named() -> None:
    class Closed:
        def __init__(self) -> None:
            raise OSError("no such server")

        def call(self, x: str) -> str:
            return x

    with pytest.raises(
        ConfigError, match=r"tasks.tools=tool: opening it fails: OSError: no such server \(test_toolbox.py, line"
    ):
        results(Closed)


def test_a_class_is_made_once_and_entered() -> None:
    events = []

    class Tool:
        def __init__(self) -> None:
            events.append("made")

        def __enter__(self) -> Tool:
            events.append("entered")
            return self

        def call(self, x: str) -> str:
            return x

        def __exit__(self, *error: object) -> None:
            events.append("left")

    assert results(Tool, ["a", "b"]) == ["a", "b"] and events == ["made", "entered", "left"]
