"""The frame of a page: a self-contained HTML file that can load and run nothing but itself."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime

from swirl_fast import __version__
from swirl_fast.report.assets import CSS, JS
from swirl_fast.report.markup import escape


def page(name: str, head: str, sections: Mapping[str, Sequence[str]]) -> Iterator[str]:
    """The text of the file, in parts. name: any text. head: HTML. sections: parts of HTML by title; a title is one word, the first one is
    where the skip link leads."""
    links = "".join(f'<a href="#{title.lower()}">{title}</a>' for title in sections)
    digest = base64.b64encode(hashlib.sha256(JS.encode()).digest()).decode()
    policy = (
        f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; "
        "base-uri 'none'; form-action 'none'"
    )
    now = datetime.now(UTC)
    yield f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{escape(name)} – swirl-fast</title>
<link rel="icon" href="data:,">
<style>{CSS}</style>
</head>
<body>
<a class="skip" href="#{next(iter(sections)).lower()}">Skip to the content</a>
<header>
<p class="over">Step-Wise Reinforcement Learning</p>
<h1>{escape(name)}</h1>
{head}<nav aria-label="Sections">{links}</nav>
</header>
<main>
"""
    for title, parts in sections.items():
        yield f'<section aria-labelledby="{title.lower()}"><h2 id="{title.lower()}">{title}</h2>\n'
        yield from parts
        yield "</section>\n"
    yield f"""</main>
<footer><p>Written by swirl-fast {escape(__version__)} on
<time datetime="{now.isoformat(timespec="seconds")}">{now:%d %B %Y, %H:%M} UTC</time>.</p></footer>
<script>{JS}</script>
</body>
</html>
"""
