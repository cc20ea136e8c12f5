"""The sampling half of a training step, beside the learning half when asked to: next trajectories, fresh actions, their verdicts.

    training.lag=0    sample t | learn t | weights | sample t + 1 | learn t + 1 | …
    training.lag=1    learn t beside sample t + 1 | weights | learn t + 1 beside sample t + 2 | …

States are recorded and tools never called, so the next batch needs nothing of this step but its weights: with lag=1 its actions are
drawn by the policy one update before, which algorithm.importance_cap corrects for (training.on_policy_batches: from when on). No collective
call is made here, so that a thread may do it while the ranks train.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch

from swirl_fast.config import Config
from swirl_fast.data.stream import TrajectoryStream
from swirl_fast.engines.engine import Engine
from swirl_fast.judges.judge import Judge
from swirl_fast.ranks import Ranks
from swirl_fast.rendering import Renderer
from swirl_fast.rollouts.at_states import SampledAction, judge_sampled, recorded_actions, sample_actions
from swirl_fast.rollouts.whole import WholeRollouts
from swirl_fast.seeds import seed_of
from swirl_fast.training.step_metrics import StepSums
from swirl_fast.trajectory import Trajectory
from swirl_fast.verdict import Judgement, Verdict


@dataclass(frozen=True)
class SampledBatch:
    """judgements: one an action. totals: what sampling counted and how long its phases took. seconds: in all. questions: where
    trajectories are rewarded, and not actions, the number of the question that each answers."""

    trajectories: list[Trajectory]
    sampled: list[SampledAction]
    judgements: list[Judgement]
    totals: StepSums
    seconds: float
    questions: list[int] | None = None


class RolloutPipeline:
    """take() gives batches in the stream's order; begin_next() and wait() enclose what runs beside the training.

    engine: None for algorithm.name=sft. outcomes: for algorithm.reward=outcome.
    """

    def __init__(
        self,
        config: Config,
        ranks: Ranks,
        engine: Engine | None,
        judge: Judge,
        renderer: Renderer,
        tools: Sequence[str],
        stream: TrajectoryStream,
        outcomes: WholeRollouts | None = None,
    ) -> None:
        self._config, self._ranks = config, ranks
        self._engine, self._judge, self._renderer, self._tools = engine, judge, renderer, tools
        self._stream, self._outcomes = stream, outcomes
        self._coming: Future[SampledBatch] | None = None
        self.lagged = False  # the batch taken last; the same on all ranks
        self._before: dict[str, Any] = {}  # the stream's state before the batch that is coming
        device = ranks.device
        set_device = (torch.cuda.set_device, (device,)) if device.type == "cuda" else (None, ())  # it is a thread's own
        self._thread = ThreadPoolExecutor(1, "sampler", *set_device)

    def take(self) -> SampledBatch:
        """The next batch; sampled now, unless it was begun before: then by the policy one update before (`lagged`)."""
        coming, self._coming = self._coming, None
        self.lagged = coming is not None
        return self._sample() if coming is None else coming.result()

    def begin_next(self) -> None:
        """Until `wait` the engine's weights must stay as they are."""
        self._before = self._stream.state_dict()
        self._coming = self._thread.submit(self._sample)

    def wait(self) -> float:
        """Until the engine and the judge are idle. Returns how many of the coming batch's seconds ran beside the training.

        What went wrong with that batch is raised when it is taken: the update that ran beside it counts.
        """
        if self._coming is None:
            return 0.0
        start = time.perf_counter()
        if self._coming.exception() is not None:
            return 0.0
        return max(0.0, self._coming.result().seconds - (time.perf_counter() - start))

    def state_dict(self) -> dict[str, Any]:
        """The stream's state behind the batches taken: one that is coming is sampled again after a restart."""
        return self._stream.state_dict() if self._coming is None else self._before

    def close(self) -> None:
        """Waits for a batch that is coming."""
        self._thread.shutdown(cancel_futures=True)

    def _sample(self) -> SampledBatch:
        start = time.perf_counter()
        config, totals = self._config, StepSums()
        with totals.phase("data"):
            first = self._stream.position + self._ranks.rank
            samples = self._stream.next_batch()
            # by the place in the endless order of trajectories: independent of ranks and resuming, new in every epoch
            seeds = [seed_of(config.run.seed, "train", first + n * self._ranks.size) for n in range(len(samples))]
        trajectories = [sample.trajectory for sample in samples]
        if self._engine is None:
            sampled = recorded_actions(trajectories, self._renderer.stop_id)
            imitated = [Judgement(Verdict.GOOD, "imitated")] * len(sampled)
            return SampledBatch(trajectories, sampled, imitated, totals, time.perf_counter() - start)
        questions = None
        with totals.phase("rollout"):
            before = self._engine.stats()
            if self._outcomes is not None:
                trajectories, questions = self._outcomes.roll_out(trajectories, seeds)
                sampled = recorded_actions(trajectories, self._renderer.stop_id)
            else:
                sampled = sample_actions(
                    trajectories, self._engine, self._renderer, self._tools, config.training, seeds
                )
            after = self._engine.stats()
            for name in ("prompt_tokens", "cached_tokens", "cacheable_tokens", "generated_tokens"):
                setattr(totals, name, float(getattr(after, name) - getattr(before, name)))
        with totals.phase("judge"):
            if self._outcomes is not None:
                judgements = self._outcomes.judgements(trajectories)
            else:
                told = self._judge.stats()
                judgements = judge_sampled(sampled, self._judge)
                totals.judge_prompt_tokens = self._judge.stats().prompt_tokens - told.prompt_tokens
                totals.judge_cached_tokens = self._judge.stats().cached_tokens - told.cached_tokens
        return SampledBatch(trajectories, sampled, judgements, totals, time.perf_counter() - start, questions)
