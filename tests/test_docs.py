"""Every file that README and docs/ name is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from support.paths import ROOT

PAGES = [ROOT / "README.md", ROOT / "kernels" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES += sorted((ROOT / "examples").glob("*/README.md"))
PAGES += [ROOT / name for name in ("CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md")]
OURS = "https://github.com/swirl-fast/swirl-fast/blob/main/"  # where a page is also read elsewhere, as on PyPI
NAMED = re.compile(
    r"\]\(([^)#\s]+)|(?<![\w/])((?:swirl_fast|tests|benchmarks|kernels|configs)/[\w./-]+\.(?:py|yaml|md|json))"
)


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_named_files_exist(page: Path) -> None:
    named = {link or path for link, path in NAMED.findall(page.read_text(encoding="utf-8"))}
    named = {str(ROOT / name.removeprefix(OURS)) if name.startswith(OURS) else name for name in named}
    local = {name for name in named if not name.startswith(("http:", "https:"))}
    assert [name for name in sorted(local) if not (page.parent / name).exists() and not (ROOT / name).exists()] == []


def test_the_readme_of_the_kernels_has_links_that_work_on_pypi() -> None:
    assert re.findall(r"\]\((?!https:|#)[^)]*", (ROOT / "kernels" / "README.md").read_text(encoding="utf-8")) == []


def test_the_map_names_files_that_are_there() -> None:
    """The paths of docs/architecture.md, which are written from swirl_fast/ on: `data/store.py: Store.record`."""
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    named = re.findall(r"(?<![\w/])((?:\w+/)*\w+\.py)(?:: `?((?:\w+\.)?\w+))?", text)
    assert len(named) > 40
    for path, name in named:
        file = next((root / path for root in (ROOT / "swirl_fast", ROOT) if (root / path).is_file()), None)
        if file is None and "/" in path:
            pytest.fail(f"docs/architecture.md names {path}, which is not there")
        if file is not None and name:
            for part in name.split("."):
                defined = rf"\b(?:def|class) {part}\b|^\s*{part}\b.*="
                assert re.search(defined, file.read_text(encoding="utf-8"), re.MULTILINE), f"{path} has no {part}"
