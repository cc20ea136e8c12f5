"""Sampling beside the training: same batches, one set of weights for each, nothing lost when it is interrupted."""

from __future__ import annotations

import threading
import time
from types import SimpleNamespace

import pytest
import torch

from swirl_fast.config import Config
from swirl_fast.engines.engine import EngineStats
from swirl_fast.ranks import Ranks
from swirl_fast.rollouts import pipeline as sampler_module
from swirl_fast.rollouts.pipeline import RolloutPipeline
from swirl_fast.verdict import Judgement, JudgeStats, Verdict


class Stream:
    """Trajectories 0, 1, 2, … in batches of two."""

    position = 0

    def next_batch(self) -> list[SimpleNamespace]:
        batch = [SimpleNamespace(trajectory=self.position + i) for i in range(2)]
        self.position += 2
        return batch

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}


class Engine:
    """Takes `seconds` for a batch, and fails the test when its weights change meanwhile."""

    seconds = 0.1
    version = 0
    fails = False

    def __init__(self) -> None:
        self.threads: list[threading.Thread] = []

    def draw(self, trajectories: list[int]) -> list[tuple[int, int]]:
        self.threads.append(threading.current_thread())
        before = self.version
        time.sleep(self.seconds)
        if self.fails:
            raise OSError("the server is gone")
        assert self.version == before, "the weights changed while a batch was sampled"
        return [(trajectory, before) for trajectory in trajectories]

    def stats(self) -> EngineStats:
        return EngineStats(prompt_tokens=len(self.threads))


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch):
    engine, stream = Engine(), Stream()
    monkeypatch.setattr(sampler_module, "sample_actions", lambda trajectories, engine, *rest: engine.draw(trajectories))
    monkeypatch.setattr(
        sampler_module, "judge_sampled", lambda sampled, judge: [Judgement(Verdict.GOOD, "")] * len(sampled)
    )
    judge = SimpleNamespace(stats=JudgeStats)
    one = RolloutPipeline(Config(), Ranks(0, 1, torch.device("cpu")), engine, judge, None, (), stream)  # type: ignore[arg-type]
    yield one, engine, stream
    one.close()


def test_without_lag_every_batch_is_sampled_when_it_is_taken(made) -> None:
    sampler, engine, stream = made
    for version in range(3):
        engine.version = version
        batch = sampler.take()
        assert batch.sampled == [(2 * version, version), (2 * version + 1, version)]
        assert sampler.wait() == 0.0 and sampler.state_dict() == {"position": 2 * version + 2}
        assert batch.totals.prompt_tokens == 1 and len(batch.judgements) == 2
    assert set(engine.threads) == {threading.main_thread()}


def test_with_lag_the_same_batches_come_from_the_weights_before(made) -> None:
    sampler, engine, stream = made
    drawn = []
    for version in range(4):
        batch = sampler.take()
        drawn += batch.sampled
        sampler.begin_next()
        assert sampler.state_dict() == {"position": 2 * version + 2}, (
            "a batch that is coming is sampled again after a restart"
        )
        time.sleep(0.15)  # the training
        hidden = sampler.wait()
        assert 0.09 < hidden < 0.3, "all of it ran beside the training"
        engine.version = version + 1
    assert drawn == [(0, 0), (1, 0), (2, 0), (3, 0), (4, 1), (5, 1), (6, 2), (7, 2)]
    assert threading.main_thread() not in engine.threads[1:]


def test_what_the_training_waits_for_is_not_hidden(made) -> None:
    sampler, engine, _ = made
    sampler.take()
    engine.seconds = 0.4
    sampler.begin_next()
    time.sleep(0.1)
    assert 0.05 < sampler.wait() < 0.3


def test_a_failure_beside_the_training_is_raised_when_its_batch_is_taken(made) -> None:
    """The update that ran beside it is not lost, and the batch is sampled again after a restart."""
    sampler, engine, stream = made
    sampler.take()
    engine.fails = True
    sampler.begin_next()
    assert sampler.wait() == 0.0 and sampler.state_dict() == {"position": 2}
    with pytest.raises(OSError, match="the server is gone"):
        sampler.take()
