"""The tools of a task, by their names, ready for calls."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence

from swirl_fast.config import SearchConfig
from swirl_fast.tools.tool import Tool


@contextlib.contextmanager
def open_tools(
    offered: Sequence[str], search: SearchConfig, passages: Sequence[tuple[str, str]]
) -> Iterator[Mapping[str, Tool]]:
    """offered: names. passages: (title, text), what a search engine searches in."""
    from swirl_fast.tools.calculator import Calculator

    with contextlib.ExitStack() as stack:
        tools: dict[str, Tool] = {}
        if "calculator" in offered:
            tools["calculator"] = stack.enter_context(Calculator())
        if "search" in offered:
            from swirl_fast.tools.search import load_search

            tools["search"] = load_search(search, passages)
        yield tools
