"""The tools of a task: what they are (describe), and ready for calls (open_tools)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from swirl_fast.config import ConfigError, SearchConfig, ToolsConfig
from swirl_fast.tools.tool import BUILT_IN, ToolSpec
from swirl_fast.tools.toolbox import Toolbox


def describe_tools(names: Sequence[str]) -> tuple[ToolSpec, ...]:
    """names: built-in ones, or references to a user's own. Opens nothing. Raises ConfigError for a tool that forgets something, and for
    two of one name."""
    from swirl_fast.tools.own import own_spec

    specs: dict[str, ToolSpec] = {}
    for name in names:
        spec = BUILT_IN[name] if name in BUILT_IN else own_spec(name)
        if spec.name in specs:
            raise ConfigError(
                f"tasks.tools: {specs[spec.name].source} and {name} are both called {spec.name}; rename one"
            )
        specs[spec.name] = spec
    return tuple(specs.values())


@contextlib.contextmanager
def open_tools(
    specs: Sequence[ToolSpec], config: ToolsConfig, search: SearchConfig, passages: Sequence[tuple[str, str]]
) -> Iterator[Toolbox]:
    """passages: (title, text), what a search engine searches in."""
    with Toolbox(specs, {spec.name: _tool(spec, search, passages) for spec in specs}, config) as toolbox:
        yield toolbox


def _tool(spec: ToolSpec, search: SearchConfig, passages: Sequence[tuple[str, str]]) -> Any:
    if spec.source == "calculator":
        from swirl_fast.tools.calculator import Calculator

        return Calculator()
    if spec.source == "search":
        from swirl_fast.tools.search import load_search

        return load_search(search, passages)
    from swirl_fast.tools.own import own_tool

    return own_tool(spec.source)
