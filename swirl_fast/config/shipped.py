"""Files that come with the package and go by a bare name in any folder: `--config quickstart`, `model.chat_template=chatml`.

In a checkout they lie in configs/ and examples/, in a wheel in swirl_fast/shipped, where setup.py puts the same files.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal

from swirl_fast.files import is_file

Kind = Literal["config", "experiment", "template"]

_PACKAGE = Path(__file__).parents[1]
_WHERE: dict[Kind, tuple[str, ...]] = {
    "config": ("configs/*.yaml", "examples/*/*.yaml"),
    "experiment": ("configs/experiments/*.yaml",),
    "template": ("configs/chat_templates/*.jinja",),
}


def shipped(kind: Kind) -> dict[str, Path]:
    """Name -> file, in the order of names."""
    root = _PACKAGE / "shipped"
    root = root if root.is_dir() else _PACKAGE.parent
    found = [path for pattern in _WHERE[kind] for path in sorted(root.glob(pattern))]
    return {path.stem: path for path in found}


def find(kind: Kind, given: str | Path) -> Path:
    """`given`, or the shipped file of this name where it is a bare name and there is no such file."""
    if is_file(given) or not re.fullmatch(r"[\w.-]+", str(given)):
        return Path(given)
    return shipped(kind).get(str(given), Path(given))


def ready(kind: Kind) -> str:
    """The end of a message about a file that is not there."""
    return f"ready ones go by their names: {', '.join(shipped(kind))}"


def listing() -> str:
    """All of them, each with its first line: what it says of itself."""
    titles: dict[Kind, str] = {
        "config": "runs: swirl-fast run --config NAME key=value …",
        "experiment": "grids of runs: swirl-fast experiment NAME",
        "template": "chat templates: model.chat_template=NAME",
    }
    lines = []
    for kind, title in titles.items():
        lines += [title, ""]
        for name, path in shipped(kind).items():
            lines += [f"  {name}", *(f"      {line}" for line in (*_about(path), path))]
        lines.append("")
    return "\n".join(lines).rstrip()


def _about(path: Path) -> list[str]:
    """The sentence that a file begins with, as far as it is on the first line; none where that is no comment."""
    first = path.read_text(encoding="utf-8").partition("\n")[0]
    return [re.split(r"[.:](?: |$)", first.strip("#{}- "))[0]] if first.startswith(("# ", "{#")) else []
