"""The tests' own surroundings (conftest.py): what a test draws depends on nothing but the test."""

from __future__ import annotations

import importlib
import random
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

fixed = pytest.mark.skipif(settings.get_current_profile_name() != "fixed", reason="draws anew each time")


def examples() -> list[tuple[int, str]]:
    """Of a property test that has settings of its own."""
    drawn: list[tuple[int, str]] = []

    @given(st.integers(), st.text())
    @settings(max_examples=200)
    def example(number: int, text: str) -> None:
        drawn.append((number, text))

    example()
    return drawn


@fixed
def test_property_tests_draw_the_same_examples_whatever_is_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hypothesis likes to draw numbers that occur in the project's modules, of which more are imported as tests run."""
    before = examples()
    (tmp_path / "numerous.py").write_text(f"NUMBERS = {list(range(10**6, 10**6 + 1000))}", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    importlib.import_module("numerous")
    assert len(before) == 200 and examples() == before


def test_what_has_no_seed_of_its_own_draws_by_the_name_of_the_test(request: pytest.FixtureRequest) -> None:
    seed = zlib.crc32(request.node.nodeid.encode())
    assert random.random() == random.Random(seed).random()
    assert np.random.random() == np.random.RandomState(seed).random()
    assert torch.rand(()) == torch.rand((), generator=torch.Generator().manual_seed(seed))
