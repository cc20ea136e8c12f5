"""The sampling half of a training step, beside the learning half when asked to: next trajectories, fresh actions, their verdicts.

    training.lag=0    sample t | learn t | weights | sample t + 1 | learn t + 1 | …
    training.lag=1    learn t beside sample t + 1 | weights | learn t + 1 beside sample t + 2 | …

States are recorded and tools never called, so the next batch needs nothing of this step but its weights: with lag=1 its actions are
drawn by the policy one update before, which algorithm.importance_cap corrects for (training.on_policy_batches: from when on). No collective
call is made here, so that a thread may do it while the ranks train.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch

from swirl_fast.config import Config
from swirl_fast.data.stream import TrajectoryStream
from swirl_fast.engines.engine import Engine, EngineStats
from swirl_fast.formats.format import Format
from swirl_fast.formats.tags import TAGS
from swirl_fast.judges.judge import Judge
from swirl_fast.metrics import PhaseTimer, summed
from swirl_fast.ranks import Ranks
from swirl_fast.rendering import Renderer
from swirl_fast.rollouts.at_states import SampledAction, judge_sampled, recorded_actions, sample_actions
from swirl_fast.rollouts.whole import WholeRollouts
from swirl_fast.seeds import seed_of
from swirl_fast.tasks import ToolsByTask
from swirl_fast.trajectory import Trajectory
from swirl_fast.verdict import Judgement, JudgeStats


@dataclass(frozen=True)
class RolloutCounts:
    """Tokens that sampling and judging a batch took on this rank, as engine and endpoint count them, and the seconds of its phases."""

    prompt_tokens: float = summed()
    cached_tokens: float = summed()
    cacheable_tokens: float = summed()
    generated_tokens: float = summed()
    judge_prompt_tokens: float = summed()
    judge_cached_tokens: float = summed()
    seconds: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def between(
        cls,
        engine: tuple[EngineStats, EngineStats],
        judge: tuple[JudgeStats, JudgeStats],
        seconds: Mapping[str, float],
    ) -> RolloutCounts:
        """engine, judge: what they had counted before and after."""
        return cls(
            prompt_tokens=engine[1].prompt_tokens - engine[0].prompt_tokens,
            cached_tokens=engine[1].cached_tokens - engine[0].cached_tokens,
            cacheable_tokens=engine[1].cacheable_tokens - engine[0].cacheable_tokens,
            generated_tokens=engine[1].generated_tokens - engine[0].generated_tokens,
            judge_prompt_tokens=judge[1].prompt_tokens - judge[0].prompt_tokens,
            judge_cached_tokens=judge[1].cached_tokens - judge[0].cached_tokens,
            seconds=seconds,
        )


@dataclass(frozen=True)
class SampledBatch:
    """judgements: one an action; None for recorded actions that are imitated (algorithm.name=sft). seconds: in all. questions: where
    trajectories are rewarded, and not actions, the number of the question that each answers."""

    trajectories: list[Trajectory]
    sampled: list[SampledAction]
    judgements: list[Judgement] | None
    counts: RolloutCounts
    seconds: float
    questions: list[int] | None = None


class RolloutPipeline:
    """take() gives batches in the stream's order; begin_next() and wait() enclose what runs beside the training.

    engine: None for algorithm.name=sft. whole: for algorithm.reward=outcome. clock: in seconds.
    """

    def __init__(
        self,
        config: Config,
        ranks: Ranks,
        engine: Engine | None,
        judge: Judge,
        renderer: Renderer,
        tools: ToolsByTask,
        stream: TrajectoryStream,
        whole: WholeRollouts | None = None,
        form: Format = TAGS,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.engine, self.judge_id, self.form = engine, judge.id, form
        self.lagged = False  # the batch taken last; the same on all ranks
        self._config, self._ranks = config, ranks
        self._judge, self._renderer, self._tools = judge, renderer, tools
        self._stream, self._whole, self._clock = stream, whole, clock
        self._coming: Future[SampledBatch] | None = None
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
        start = self._clock()
        if self._coming.exception() is not None:
            return 0.0
        return max(0.0, self._coming.result().seconds - (self._clock() - start))

    @property
    def tasks(self) -> list[str]:
        """The names of the tasks, the same on all ranks."""
        return list(self._tools)

    @property
    def skipped_samples(self) -> int:
        """Recorded trajectories that are left out, their shards being damaged."""
        return self._stream.skipped_samples

    def state_dict(self) -> dict[str, Any]:
        """The stream's state after the batches taken: one that is coming is sampled again after a restart."""
        return self._stream.state_dict() if self._coming is None else self._before

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Before the first batch."""
        self._stream.load_state_dict(state)

    def close(self) -> None:
        """Waits for a batch that is coming."""
        self._thread.shutdown(cancel_futures=True)

    def _sample(self) -> SampledBatch:
        start, timer, config = self._clock(), PhaseTimer(clock=self._clock), self._config
        with timer.phase("data"):
            first = self._stream.position + self._ranks.rank
            samples = self._stream.next_batch()
            # by the place in the endless order of trajectories: independent of ranks and resuming, new in every epoch
            seeds = [seed_of(config.run.seed, "train", first + n * self._ranks.size) for n in range(len(samples))]
        trajectories = [sample.trajectory for sample in samples]
        if self.engine is None:
            sampled = recorded_actions(trajectories, self._renderer.stop_ids)
            return SampledBatch(
                trajectories, sampled, None, RolloutCounts(seconds=timer.seconds), self._clock() - start
            )
        questions = None
        of_engine, of_judge = self.engine.stats(), self._judge.stats()
        with timer.phase("rollout"):
            if self._whole is not None:
                trajectories, questions = self._whole.roll_out(trajectories, seeds)
                sampled = recorded_actions(trajectories, self._renderer.stop_ids)
            else:
                sampled = sample_actions(
                    trajectories, self.engine, self._renderer, self._tools, config.training, seeds, self.form
                )
            drawn = self.engine.stats()
        with timer.phase("judge"):
            if self._whole is not None:
                judgements = self._whole.judgements(trajectories)
            else:
                judgements = judge_sampled(sampled, self._judge)
        counts = RolloutCounts.between((of_engine, drawn), (of_judge, self._judge.stats()), timer.seconds)
        return SampledBatch(trajectories, sampled, judgements, counts, self._clock() - start, questions)
