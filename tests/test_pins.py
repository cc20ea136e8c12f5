"""constraints.txt pins all that setup.py names, within its bounds, and hashes.txt speaks of the same versions."""

from __future__ import annotations

import re

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from support.paths import ROOT


def lines(name: str) -> list[str]:
    return [
        line for line in (ROOT / name).read_text(encoding="utf-8").splitlines() if line and not line.startswith("#")
    ]


PINS = {
    canonicalize_name(name): version for name, _, version in (line.partition("==") for line in lines("constraints.txt"))
}


def test_every_requirement_is_pinned_within_its_bounds() -> None:
    text = (
        (ROOT / "setup.py").read_text(encoding="utf-8").partition('"gpu"')[0]
    )  # those of a GPU are not installed here
    named = re.findall(r'"([A-Za-z][A-Za-z0-9_.-]*[<>=][^"]*)"', text)
    assert len(named) > 15
    for one in map(Requirement, named):
        assert PINS[canonicalize_name(one.name)] in one.specifier, one


def test_hashes_are_of_the_pinned_versions() -> None:
    found = [re.fullmatch(r"(\S+)==(\S+) --hash=sha256:[0-9a-f]{64}", line) for line in lines("hashes.txt")]
    assert len(found) > 50 and all(found)
    assert all(PINS[canonicalize_name(match[1])] == match[2] for match in found if match)
