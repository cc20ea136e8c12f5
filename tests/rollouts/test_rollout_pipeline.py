"""Sampling beside the training: same batches, one set of weights for each, nothing lost when it is interrupted."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch

from swirl_fast.config import Config
from swirl_fast.engines.engine import EngineStats
from swirl_fast.ranks import Ranks
from swirl_fast.rollouts import pipeline as pipeline_module
from swirl_fast.rollouts.pipeline import RolloutPipeline, SampledBatch
from swirl_fast.verdict import Judgement, JudgeStats, Verdict


class Stream:
    """Trajectories 0, 1, 2, … in batches of two."""

    position = 0

    def next_batch(self) -> list[SimpleNamespace]:
        batch = [SimpleNamespace(trajectory=self.position + i, kept=[True]) for i in range(2)]
        self.position += 2
        return batch

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}


class Clock:
    """Seconds of each thread by itself: what a thread waits for does not move it, it is moved by hand."""

    def __init__(self) -> None:
        self.now: dict[str, float] = {"main": 0.0, "sampler": 0.0}

    def __call__(self) -> float:
        return self.now[self.name()]

    def pass_by(self, seconds: float) -> None:
        self.now[self.name()] += seconds

    @staticmethod
    def name() -> str:
        return "main" if threading.current_thread() is threading.main_thread() else "sampler"


class Engine:
    """Takes 4 seconds for a batch, and fails the test when its weights change meanwhile. drawing: set when it has begun beside the
    training; it goes on when `go_on` is set."""

    version = 0
    fails = False

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.threads: list[threading.Thread] = []
        self.drawing, self.go_on = threading.Event(), threading.Event()

    def draw(self, trajectories: list[int]) -> list[tuple[int, int]]:
        self.threads.append(threading.current_thread())
        before = self.version
        if self.clock.name() == "sampler":
            self.drawing.set()
            assert self.go_on.wait(60)
        self.clock.pass_by(4.0)
        if self.fails:
            raise OSError("the server is gone")
        assert self.version == before, "the weights changed while a batch was sampled"
        return [(trajectory, before) for trajectory in trajectories]

    def stats(self) -> EngineStats:
        return EngineStats(prompt_tokens=len(self.threads))


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[RolloutPipeline, Engine, Clock]]:
    clock, stream = Clock(), Stream()
    engine = Engine(clock)
    monkeypatch.setattr(
        pipeline_module, "sample_actions", lambda trajectories, engine, *rest: engine.draw(trajectories)
    )
    monkeypatch.setattr(
        pipeline_module, "judge_sampled", lambda sampled, judge: [Judgement(Verdict.GOOD, "")] * len(sampled)
    )
    judge = SimpleNamespace(id="judge", stats=JudgeStats)
    ranks = Ranks(0, 1, torch.device("cpu"))
    pipeline = RolloutPipeline(Config(), ranks, engine, judge, None, {}, stream, clock=clock)  # type: ignore[arg-type]
    yield pipeline, engine, clock
    engine.go_on.set()
    pipeline.close()


def test_without_lag_every_batch_is_sampled_when_it_is_taken(made: tuple[RolloutPipeline, Engine, Clock]) -> None:
    pipeline, engine, _ = made
    for version in range(3):
        engine.version = version
        batch = pipeline.take()
        assert batch.sampled == [(2 * version, version), (2 * version + 1, version)]
        assert pipeline.wait() == 0.0 and pipeline.state_dict() == {"position": 2 * version + 2}
        assert batch.counts.prompt_tokens == 1 and len(batch.judgements or ()) == 2
        assert batch.seconds == 4.0 and batch.counts.seconds == {"data": 0.0, "rollout": 4.0, "judge": 0.0}
    assert set(engine.threads) == {threading.main_thread()}


def test_with_lag_the_same_batches_come_from_the_weights_before(made: tuple[RolloutPipeline, Engine, Clock]) -> None:
    pipeline, engine, clock = made
    engine.go_on.set()
    drawn = []
    for version in range(4):
        batch = pipeline.take()
        drawn += batch.sampled
        assert pipeline.lagged == (version > 0)
        pipeline.begin_next()
        assert pipeline.state_dict() == {"position": 2 * version + 2}, (
            "a batch that is coming is sampled again after a restart"
        )
        clock.pass_by(10.0)  # the training
        assert pipeline.wait() == 4.0, "all of it ran beside the training"
        engine.version = version + 1
    assert drawn == [(0, 0), (1, 0), (2, 0), (3, 0), (4, 1), (5, 1), (6, 2), (7, 2)]
    assert threading.main_thread() not in engine.threads[1:]


def test_a_batch_is_drawn_while_the_training_goes_on(made: tuple[RolloutPipeline, Engine, Clock]) -> None:
    pipeline, engine, _ = made
    pipeline.take()
    pipeline.begin_next()
    assert engine.drawing.wait(60), "drawn although nobody waits for it"
    engine.go_on.set()
    pipeline.wait()
    assert pipeline.take().sampled == [(2, 0), (3, 0)] and pipeline.lagged


def test_what_the_training_waits_for_is_not_hidden(
    made: tuple[RolloutPipeline, Engine, Clock], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sampling takes 4 seconds; the training waits for 3 of them."""
    pipeline, engine, clock = made
    engine.go_on.set()
    pipeline.take()
    pipeline.begin_next()
    coming = pipeline._coming
    assert coming is not None
    result = coming.result

    def waited() -> SampledBatch:
        clock.pass_by(3.0)
        return result()

    monkeypatch.setattr(coming, "result", waited)
    assert pipeline.wait() == 1.0


def test_a_failure_beside_the_training_is_raised_when_its_batch_is_taken(
    made: tuple[RolloutPipeline, Engine, Clock],
) -> None:
    """The update that ran beside it is not lost, and the batch is sampled again after a restart."""
    pipeline, engine, _ = made
    pipeline.take()
    engine.fails = True
    engine.go_on.set()
    pipeline.begin_next()
    assert pipeline.wait() == 0.0 and pipeline.state_dict() == {"position": 2}
    with pytest.raises(OSError, match="the server is gone"):
        pipeline.take()
