"""Ranks that say nothing any more, and those that have left; what the stages of several ranks do is in tests/stages/test_parts.py."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
import torch.distributed as dist
from support.runs import free_port

from swirl_fast.ranks import Liveness


def until(true: Callable[[], object], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_rank_without_a_sign_of_life_ends_this_one_and_one_that_left_does_not(
    capfd: pytest.CaptureFixture[str],
) -> None:
    store = dist.TCPStore("127.0.0.1", free_port(), 1, True)
    ended: list[int] = []
    one = Liveness(dist.PrefixStore("x", store), 0, 3, 2.0, end=ended.append)
    try:
        store.set("x/swirl_fast/alive/2", "left")
        for number in range(60):  # twice as long
            store.set("x/swirl_fast/alive/1", str(number))
            time.sleep(0.1)
        assert not ended
        until(lambda: ended)
    finally:
        one.stop()
    assert ended == [1]
    assert "rank 0: rank 1 has given no sign of life for 2 seconds, so this rank ends" in capfd.readouterr().err
    assert store.get("x/swirl_fast/alive/0") == b"left"


def test_a_store_that_is_gone_ends_a_rank(capfd: pytest.CaptureFixture[str]) -> None:
    store = dist.TCPStore("127.0.0.1", free_port(), 1, True)
    ended: list[int] = []
    one = Liveness(store, 1, 2, 1.0, end=ended.append)
    try:
        store.set("swirl_fast/alive/0", "1")
        del store
        until(lambda: ended)
    finally:
        one.stop()
    assert ended == [1] and "rank 1: the store that the ranks share" in capfd.readouterr().err
