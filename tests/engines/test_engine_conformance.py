"""The embedded engine owes what every engine owes (engine_conformance.py); what only it promises is in test_local_engine.py."""

from __future__ import annotations

import copy

import pytest
import torch
from support.engine_conformance import EngineConformance
from support.small_models import build
from transformers import PreTrainedModel

from swirl_fast.engines.local.engine import LocalEngine


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return build("llama", torch.float32)


@pytest.fixture(scope="module")
def engine(model: PreTrainedModel) -> LocalEngine:
    return LocalEngine(copy.deepcopy(model), max_sequences=16, cache_tokens=8192)


class TestLocalEngine(EngineConformance):
    pass


def test_closing_twice_is_fine() -> None:
    engine = LocalEngine(build("llama", torch.float32), max_sequences=2, cache_tokens=64)
    engine.close()
    engine.close()
