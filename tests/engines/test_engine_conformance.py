"""The embedded engine owes what every engine owes (engine_conformance.py); what only it promises is in test_local_engine.py."""

from __future__ import annotations

import copy

import pytest
import torch
from support.engine_conformance import EngineConformance
from support.model_families import build_unshared
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


class TestLocalEngineWithoutItsCache(EngineConformance):
    """A model with a state: convolutions and attention in turns. Left out is what takes longest without a cache, and is tested for several
    such models in test_local_engine.py."""

    test_logprobs_are_those_of_a_plain_forward_pass = None  # type: ignore[assignment]
    test_states_of_a_trajectory_share_what_they_can = None  # type: ignore[assignment]

    @pytest.fixture(scope="class")
    def model(self) -> PreTrainedModel:
        return build_unshared("lfm2")

    @pytest.fixture(scope="class")
    def engine(self, model: PreTrainedModel) -> LocalEngine:
        return LocalEngine(copy.deepcopy(model), max_sequences=16, cache_tokens=8192)


def test_closing_twice_is_fine() -> None:
    engine = LocalEngine(build("llama", torch.float32), max_sequences=2, cache_tokens=64)
    engine.close()
    engine.close()
