"""The local engine in a process of its own: same results, same errors, and an end that is told."""

from __future__ import annotations

import os
import signal

import pytest
import torch
from test_local_engine import engine_of, make, mixed_requests

from swirl_fast.engines import process
from swirl_fast.engines.engine import EngineError
from swirl_fast.engines.local import LocalEngine
from swirl_fast.engines.process import ProcessEngine


def build() -> LocalEngine:
    return engine_of(make())


def fail() -> LocalEngine:
    raise ValueError("no such model")


@pytest.fixture(scope="module")
def engine():
    one = ProcessEngine(build, threads=1)
    yield one
    one.close()


def test_it_gives_what_the_engine_gives_here(engine):
    here = build()
    for round_ in range(2):
        requests = mixed_requests(round_)
        found, wanted = engine.generate(requests), here.generate(requests)
        assert [[c.tokens for c in one] for one in found] == [[c.tokens for c in one] for one in wanted]
    assert engine.max_context == here.max_context
    assert engine.stats().cached_tokens == here.stats().cached_tokens > 0


def test_weights_arrive_in_pieces_and_stay_the_trainers_own(engine, monkeypatch):
    monkeypatch.setattr(process, "BUCKET_BYTES", 4096)
    model = make(seed=1)
    engine.update_weights(model.named_parameters(), 7)
    requests = mixed_requests(0)
    found, wanted = engine.generate(requests), engine_of(model).generate(requests)
    assert [[c.tokens for c in one] for one in found] == [[c.tokens for c in one] for one in wanted]
    assert {c.policy_version for one in found for c in one} == {7}
    assert not any(parameter.is_shared() for parameter in model.parameters())


def test_a_refused_update_changes_nothing_and_leaves_it_usable(engine, monkeypatch):
    monkeypatch.setattr(process, "BUCKET_BYTES", 4096)
    requests = mixed_requests(0)
    before = engine.generate(requests)
    weights = dict(make(seed=2).named_parameters())
    first = next(iter(weights))
    with pytest.raises(KeyError, match="missing"):
        engine.update_weights(list(weights.items())[1:], 8)
    with pytest.raises(KeyError, match="unknown.weight"):
        engine.update_weights({"unknown.weight": torch.zeros(1), **weights}.items(), 8)
    with pytest.raises(ValueError, match="shape"):
        engine.update_weights({**weights, first: torch.zeros(1)}.items(), 8)

    def broken():
        yield first, weights[first]
        raise RuntimeError("the gather failed")

    with pytest.raises((RuntimeError, KeyError)):
        engine.update_weights(broken(), 8)
    with pytest.raises(ValueError, match="empty prompt"):
        engine.generate([type(requests[0])([], requests[0].sampling)])
    after = engine.generate(requests)
    assert [[c.tokens for c in one] for one in after] == [[c.tokens for c in one] for one in before]


def test_what_building_it_raises_is_raised_here():
    with pytest.raises(ValueError, match="no such model"):
        ProcessEngine(fail)


def test_a_killed_process_is_told():
    one = ProcessEngine(build, threads=1)
    os.kill(one.pid, signal.SIGKILL)
    with pytest.raises(EngineError, match="code -9"):
        one.generate(mixed_requests(0))
    one.close()
    one.close()
