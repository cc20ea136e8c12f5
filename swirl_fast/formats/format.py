"""What one model turn does, and the protocol of a way to write it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from swirl_fast.tools.tool import ToolSpec, observation

CUT_OFF = "The turn was too long and was cut off."


@dataclass(frozen=True)
class Call:
    """A call of a tool. argument: the text of the call, as judges and people see it: the text that the tool takes, or its arguments as
    JSON. arguments: what that says, by name; None for a call that was stored."""

    tool: str
    argument: str
    arguments: Mapping[str, Any] | None = field(default=None, compare=False)


@dataclass(frozen=True)
class Action:
    """kind "tool": `tool`, `argument` and `arguments` are those of its first call (see Call), `further` are the others of the turn;
    "answer": `argument` is the answer; "malformed": `error` says why, in a sentence addressed to the model."""

    kind: Literal["tool", "answer", "malformed"]
    tool: str | None = None
    argument: str = ""
    error: str = ""
    arguments: Mapping[str, Any] | None = field(default=None, compare=False)
    further: tuple[Call, ...] = ()

    @property
    def cut_off(self) -> bool:
        """Whether the turn hit the length limit."""
        return self.error.startswith(CUT_OFF)

    @property
    def calls(self) -> tuple[Call, ...]:
        """All calls of the turn, in order; none of an answer or a malformed action."""
        if self.kind != "tool":
            return ()
        return (Call(self.tool or "", self.argument, self.arguments), *self.further)

    @classmethod
    def of_table(cls, table: Mapping[str, Any]) -> Action:
        """What dataclasses.asdict made of an action, also after JSON."""
        return cls(**{**table, "further": tuple(Call(**call) for call in table["further"])})

    @classmethod
    def of_calls(cls, calls: Collection[Call]) -> Action:
        first, *further = calls
        return cls("tool", first.tool, first.argument, arguments=first.arguments, further=tuple(further))


class Format(Protocol):
    """identity: names the format in fingerprints and in the ids of judges; empty for the default one. native: calls are written as the
    model's chat template writes them, which is told the tools."""

    identity: str
    native: bool
    answer: Literal["tag", "message"]

    def parse(self, text: str, tools: Collection[ToolSpec], truncated: bool = False) -> Action:
        """The action in one model turn. Never raises, whatever the text; linear in its length.

        tools: those on offer. truncated: the turn hit the length limit before it ended.
        """
        ...

    def outside(self, text: str, action: Action) -> int:
        """Characters of a well-formed turn that belong neither to a call or an answer nor to a thought."""
        ...


def malformed(error: str) -> Action:
    return Action("malformed", error=error)


def without_thoughts(text: str) -> str:
    """A turn without what stands between <think> and </think>. A chat template may have opened the first thought already, so all before
    the first </think> is one."""
    head, closed, rest = text.partition("</think>")
    if not closed:
        return text
    return (head.split("<think>", 1)[0] if "<think>" in head else "") + blocks(rest, "<think>", "</think>")[1]


def blocks(text: str, opening: str, closing: str) -> tuple[list[str], str]:
    """(the texts between two marks, the text around them). Linear in the length: a pattern looks for its end from every beginning."""
    inside, around, at = [], [], 0
    while (start := text.find(opening, at)) >= 0 and (end := text.find(closing, start)) >= 0:
        inside.append(text[start + len(opening) : end])
        around.append(text[at:start])
        at = end + len(closing)
    return inside, "".join([*around, text[at:]])


def observation_of(calls: Collection[Call], results: Collection[str]) -> str:
    """The observation of a turn: `QUERY -> RESULT` for each call."""
    return "\n".join(observation(call.argument, result) for call, result in zip(calls, results, strict=True))


def results_in(calls: Collection[Call], seen: str) -> list[str] | None:
    """The results that `observation_of` has joined; None for an observation of anything else."""
    results: list[str] = []
    for i, call in enumerate(calls):
        head = observation(call.argument, "")
        if i and not (found := seen.find(f"\n{head}")) < 0:
            results.append(seen[:found])
            seen = seen[found + 1 :]
        elif i:
            return None
        if not seen.startswith(head):
            return None
        seen = seen[len(head) :]
    return [*results, seen]
