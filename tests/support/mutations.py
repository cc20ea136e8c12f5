"""Strategies for texts that were changed at random: JSON with other values, and bytes that were flipped, lost or put in."""

from __future__ import annotations

import copy
import json
import re
from typing import Any

from hypothesis import strategies as st

_ODD = st.sampled_from(
    [0, -1, 1.0, True, None, "", "0", "../x", "/etc/passwd", "a\0b", "\ud83d", "x" * 5000, 10**400, 1 << 63, -0.0, [], {}, [[]], {"": 0}]
    + [float("nan"), float("inf"), "GOOD", "VERDICT: GOOD", {"bytes": 1}, {"type": "stop"}]
)  # fmt: skip
_DEEP = "lists in lists: "
_VALUES = (
    _ODD
    | st.integers(20, 3000).map(lambda depth: f"{_DEEP}{depth}")
    | st.integers()
    | st.floats()
    | st.text(max_size=20)
)
VALUES = _VALUES.map(copy.deepcopy)


def written(value: Any) -> bytes:
    """As JSON. Lists in lists, as deep as no program of ours can write them, stand in `VALUES` as texts that name their depth."""
    return re.sub(
        rf'"{_DEEP}(\d+)"', lambda found: "[" * int(found[1]) + "]" * int(found[1]), json.dumps(value)
    ).encode()


def _places(value: Any) -> list[tuple[Any, Any]]:
    """(container, key) of everything below a JSON value."""
    keys = list(value) if isinstance(value, dict) else list(range(len(value))) if isinstance(value, list) else []
    return [(value, key) for key in keys] + [place for key in keys for place in _places(value[key])]


@st.composite
def changed(draw: st.DrawFn, value: Any) -> Any:
    """A JSON value with one to three places replaced, removed, renamed, or given what stands elsewhere."""
    value = copy.deepcopy(value)
    for _ in range(draw(st.integers(1, 3))):
        if not (places := _places(value)):
            break
        container, key = draw(st.sampled_from(places))
        change = draw(st.sampled_from(["replace", "remove", "add", "exchange"]))
        if change == "replace":
            container[key] = draw(VALUES)
        elif change == "exchange":
            other, its = draw(st.sampled_from(places))
            container[key] = copy.deepcopy(other[its])
        elif change == "remove":
            del container[key]
        elif isinstance(container, list):
            container.insert(key, draw(VALUES))
        else:
            container[draw(st.text(max_size=5) | st.sampled_from(list(container)))] = draw(VALUES)
    return value


@st.composite
def damaged(draw: st.DrawFn, data: bytes) -> bytes:
    """Bytes with one to four bits flipped, pieces lost, doubled or put in, or the end cut off."""
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(data)))
        change = draw(st.sampled_from(["flip", "lose", "double", "put in", "cut off"]))
        more = draw(st.integers(1, 20))
        if change == "flip" and at < len(data):
            data = data[:at] + bytes([data[at] ^ 1 << draw(st.integers(0, 7))]) + data[at + 1 :]
        elif change == "lose":
            data = data[:at] + data[at + more :]
        elif change == "double":
            data = data[: at + more] + data[at:]
        elif change == "put in":
            data = data[:at] + draw(st.binary(min_size=1, max_size=8)) + data[at:]
        elif change == "cut off":
            data = data[:at]
    return data
