"""report/: the pages that report.html leads to, each a file like report.html itself. No more than one of them is held at a time."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from swirl_fast.files import write_parts
from swirl_fast.report.markup import escape
from swirl_fast.report.page import page

FOLDER = "report"
PAGE_CHARS = 1_000_000  # of HTML; a block is never cut
_OURS = re.compile(r"(samples-\d+|collected|evaluations)-\d+\.html(\.\w+\.tmp)?")


@dataclass(frozen=True)
class Page:
    """file: relative to report.html. first, last: the numbers of its blocks, from 1."""

    file: str
    first: int
    last: int


class Pages:
    """Writes pages into the folder `report` of a run, and then removes those of earlier reports."""

    def __init__(self, run_folder: Path) -> None:
        self._folder, self._run = run_folder / FOLDER, run_folder.resolve().name
        self._written: set[str] = set()

    def write(
        self, stem: str, title: str, what: str, total: int, blocks: Iterable[str], form: Callable[[Sequence[str]], str]
    ) -> list[Page]:
        """Pages STEM-0001.html, … of `blocks`, taken one by one. total: how many there are. title: of the pages. what: the blocks are, as
        text. form: the HTML above the blocks, given these."""
        pages: list[Page] = []
        for first, some in _batches(blocks):
            number, last = len(pages) + 1, first + len(some) - 1
            links = ['<a href="../report.html">the report</a>']
            if number > 1:
                links.append(
                    f'<a href="{stem}-{number - 1:04d}.html" rel="prev">before: {pages[-1].first:,} to {first - 1:,}</a>'
                )
            if last < total:
                links.append(f'<a href="{stem}-{number + 1:04d}.html" rel="next">after: from {last + 1:,} on</a>')
            head = (
                f'<p class="lede">{what.capitalize()} {first:,} to {last:,} of {total:,}.</p>\n'
                f'<nav class="pages" aria-label="Pages">{"".join(links)}</nav>\n'
            )
            name = f"{stem}-{number:04d}.html"
            parts = [form(some), f"<h3>{escape(title)}</h3>\n", *some]
            write_parts(self._folder / name, page(f"{self._run}: {title}", head, {"Contents": parts}))
            self._written.add(name)
            pages.append(Page(f"{FOLDER}/{name}", first, last))
        return pages

    def remove_others(self) -> None:
        """Those that an earlier report has written, and this one has not."""
        if not self._folder.is_dir():
            return
        for path in self._folder.iterdir():
            if _OURS.fullmatch(path.name) and path.name not in self._written:
                path.unlink()
        if not any(self._folder.iterdir()):
            self._folder.rmdir()


def _batches(blocks: Iterable[str]) -> Iterator[tuple[int, list[str]]]:
    """(number of the first block, blocks of PAGE_CHARS together or a bit more)"""
    first, size, some = 1, 0, list[str]()
    for block in blocks:
        some.append(block)
        size += len(block)
        if size >= PAGE_CHARS:
            yield first, some
            first, size, some = first + len(some), 0, []
    if some:
        yield first, some


def links(pages: Iterable[Page], label: str) -> str:
    """Navigation to the pages, by the numbers of their blocks."""
    items = "".join(f'<a href="{page.file}">{page.first:,}–{page.last:,}</a>' for page in pages)
    return f'<nav class="pages" aria-label="{escape(label)}">{items}</nav>\n'
