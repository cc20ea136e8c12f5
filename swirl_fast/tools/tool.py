"""The protocol of a tool, and the form in which its result becomes the next user turn."""

from __future__ import annotations

from typing import Protocol


class Tool(Protocol):
    name: str  # key of TOOL_TAGS in formats/tags.py
    description: str  # one line for the prompt: what to put into the tag and what comes back

    def call(self, argument: str) -> str:
        """The result as text. Never raises for bad input: the text then says what was wrong, starting with `ERROR:`."""
        ...


def observation(argument: str, result: str) -> str:
    """`QUERY -> RESULT`, the form of an observation (method.md: stage 1)."""
    return f"{argument} -> {result}"
