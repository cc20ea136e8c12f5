"""Who may import whom in swirl_fast: the arrows of docs/architecture.md as a table. Any other import, and any cycle of packages, fails."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.paths import ROOT

# Package, or module at the root -> what it may import besides itself. Top to bottom; only downward.
MAY_IMPORT: dict[str, set[str]] = {
    "__main__": {"cli"},
    "cli": {"api", "config", "doctor", "exits", "experiments", "outputs", "stages"},
    "doctor": {"config", "files", "http_client"},
    "api": {"config", "outputs", "stages"},
    "experiments": {
        "config", "data", "files", "intervals", "metrics", "models", "report", "stages", "tools",
    },
    "stages": {
        "config", "data", "engines", "files", "formats", "intervals", "judges", "metrics", "models", "outputs", "ranks", "rendering",
        "report", "rollouts", "seeds", "tasks", "tools", "training", "trajectory", "verdict",
    },
    "training": {
        "comb", "config", "data", "engines", "exits", "files", "formats", "judges", "metrics", "models", "objective", "ranks",
        "rendering", "rollouts", "tasks", "tools", "trajectory", "verdict",
    },
    "rollouts": {
        "config", "data", "engines", "formats", "judges", "metrics", "models", "ranks", "rendering", "seeds", "tasks", "tools",
        "trajectory", "verdict",
    },
    "report": {"data", "files", "intervals", "metrics", "models", "outputs", "trajectory", "verdict"},
    "outputs": {"config", "data", "files", "judges", "metrics", "tasks", "trajectory", "verdict"},
    "judges": {
        "config", "data", "files", "formats", "http_client", "intervals", "prefixes", "tasks", "tools", "trajectory", "verdict",
    },
    "data": {"config", "files", "formats", "tasks", "trajectory", "verdict"},
    "rendering": {"config", "formats", "models", "tasks", "tools"},
    "engines": {"config", "http_client", "models", "prefixes", "ranks", "seeds"},
    "models": {"comb", "config", "files", "seeds"},
    "objective": {"config"},
    "tasks": {"config", "files", "formats", "tools"},
    "trajectory": {"formats"},
    "formats": {"tools"},
    "tools": {"config", "files"},
    "comb": {"prefixes"},
    "config": {"files", "http_client"},
    "exits": set(),
    "files": set(),
    "http_client": set(),
    "intervals": set(),
    "metrics": set(),
    "prefixes": set(),
    "ranks": set(),
    "seeds": set(),
    "verdict": set(),
}  # fmt: skip
AT_ROOT = 14  # modules at the root at most, __init__ and __main__ aside


def imports(package: Path) -> Iterator[tuple[str, int, str, str]]:
    """(file, line, the part it belongs to, the part it imports), also of imports inside functions and under TYPE_CHECKING."""
    for path in sorted(package.rglob("*.py")):
        relative = path.relative_to(package)
        part = relative.parts[0].removesuffix(".py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names: list[str] = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                assert not node.level, f"{relative}:{node.lineno}: imports are absolute in this project"
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            for name in names:
                root, *rest = name.split(".")
                if root == "swirl_fast" and rest and rest[0] != "__version__" and rest[0] != part:
                    yield str(relative), node.lineno, part, rest[0]


def wrong_imports(package: Path) -> list[str]:
    return [
        f"{file}:{line}: {part} may not import {other}"
        for file, line, part, other in imports(package)
        if part != "__init__" and other not in MAY_IMPORT[part]
    ]


def test_imports_follow_the_table() -> None:
    package = ROOT / "swirl_fast"
    parts = {
        path.name.removesuffix(".py")
        for path in package.iterdir()
        if path.suffix == ".py" or (path / "__init__.py").is_file()
    }
    assert parts - {"__init__"} == MAY_IMPORT.keys(), "the table names every part of the package, and nothing else"
    assert wrong_imports(package) == []


def test_the_table_allows_no_cycle() -> None:
    rank = {part: number for number, part in enumerate(MAY_IMPORT)}
    assert [(part, other) for part, others in MAY_IMPORT.items() for other in others if rank[other] <= rank[part]] == []


def test_the_table_allows_nothing_that_is_not_used() -> None:
    used = {(part, other) for _, _, part, other in imports(ROOT / "swirl_fast")}
    assert {(part, other) for part, others in MAY_IMPORT.items() for other in others} - used == set()


@pytest.mark.parametrize("file", sorted(path.name for path in (ROOT / "swirl_fast" / "data").glob("*.py")))
def test_a_backward_import_is_found(file: str, tmp_path: Path) -> None:
    """In any of the files that hold the layer."""
    text = (ROOT / "swirl_fast" / "data" / file).read_text(encoding="utf-8")
    folder = tmp_path / "swirl_fast" / "data"
    folder.mkdir(parents=True)
    (folder / file).write_text(f"{text}\nfrom swirl_fast.training import trainer\n", encoding="utf-8")
    (found,) = wrong_imports(folder.parent)
    assert found.startswith(f"data/{file}:") and found.endswith("data may not import training")


def test_the_root_has_few_modules() -> None:
    modules = sorted(path.stem for path in (ROOT / "swirl_fast").glob("*.py") if not path.stem.startswith("__"))
    assert len(modules) <= AT_ROOT, modules
