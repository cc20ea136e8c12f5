"""The sampling half of a training step, beside the learning half when asked to: next trajectories, fresh actions, their verdicts.

    training.lag=0    sample t | learn t | weights | sample t + 1 | learn t + 1 | …
    training.lag=1    learn t beside sample t + 1 | weights | learn t + 1 beside sample t + 2 | …

States are recorded and tools never called, so the next batch needs nothing of this step but its weights: with lag=1 its actions are
drawn by the policy one update before, which algorithm.importance_cap corrects for (training.on_policy_batches: from when on). Sampling
makes no collective call, so that a thread may do it while the ranks train.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from swirl_fast.config import Config
from swirl_fast.data.shards import StepSample
from swirl_fast.data.stream import TrajectoryStream
from swirl_fast.engines.engine import Engine, EngineStats
from swirl_fast.formats.format import Format
from swirl_fast.formats.tags import TAGS
from swirl_fast.judges.judge import NO_REPLY, Judge
from swirl_fast.metrics import PhaseTimer, summed
from swirl_fast.ranks import Ranks
from swirl_fast.rendering import Renderer
from swirl_fast.rollouts.at_states import SampledAction, asked_about, judge_sampled, recorded_actions, sample_actions
from swirl_fast.rollouts.refill import states_with_signal, trained_states
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
    trajectories are rewarded, and not actions, the number of the question that each answers. trained: with training.refill, whether an
    action's state is trained on, one an action; None: all are. further: trajectories that it took from the stream beyond the batch."""

    trajectories: list[Trajectory]
    sampled: list[SampledAction]
    judgements: list[Judgement] | None
    counts: RolloutCounts
    seconds: float
    questions: list[int] | None = None
    trained: list[bool] | None = None
    further: int = 0


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
        """The next batch; sampled now, unless it was begun before: then by the policy one update before (`lagged`). Collective with
        training.refill."""
        coming, self._coming = self._coming, None
        self.lagged = coming is not None
        batch = self._sample() if coming is None else coming.result()
        if self._config.training.refill:
            busiest = self._ranks.max(torch.tensor([batch.further]))
            self._stream.pass_over(int(busiest.item()))
        return batch

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
        start, timer = self._clock(), PhaseTimer(clock=self._clock)
        with timer.phase("data"):
            drawn = self._drawn(*self._next())
        if self.engine is None:
            sampled = recorded_actions(drawn.trajectories, self._renderer.stop_ids, drawn.kept)
            counts = RolloutCounts(seconds=timer.seconds)
            return SampledBatch(drawn.trajectories, sampled, None, counts, self._clock() - start)
        of_engine, of_judge = self.engine.stats(), self._judge.stats()
        questions, trained, further = None, None, 0
        if self._whole is not None:
            questions = self._roll_out(drawn, self._whole, timer)
        else:
            self._act(drawn, timer)
            if self._config.training.refill:
                trained, further = self._refill(drawn, timer)
        counts = RolloutCounts.between((of_engine, self.engine.stats()), (of_judge, self._judge.stats()), timer.seconds)
        seconds = self._clock() - start
        return SampledBatch(
            drawn.trajectories, drawn.sampled, drawn.judgements, counts, seconds, questions, trained, further
        )

    def _next(self) -> tuple[list[StepSample], list[int]]:
        """This rank's share of the next batch, and the place of each in the endless order of trajectories."""
        first = self._stream.position + self._ranks.rank
        samples = self._stream.next_batch()
        return samples, [first + n * self._ranks.size for n in range(len(samples))]

    def _drawn(self, samples: Sequence[StepSample], places: Sequence[int]) -> _Drawn:
        # by the place: independent of ranks and resuming, new in every epoch
        seeds = [seed_of(self._config.run.seed, "train", place) for place in places]
        return _Drawn([sample.trajectory for sample in samples], [sample.kept for sample in samples], seeds)

    def _act(self, drawn: _Drawn, timer: PhaseTimer) -> None:
        """Fresh actions at the states that are kept, and their verdicts."""
        assert self.engine is not None, "without an engine nothing is drawn"
        with timer.phase("rollout"):
            drawn.sampled = sample_actions(
                drawn.trajectories,
                self.engine,
                self._renderer,
                self._tools,
                self._config.training,
                drawn.seeds,
                drawn.kept,
                self.form,
                self._config.engine.return_routed_experts or self._config.training.replay_routing,
            )
        with timer.phase("judge"):
            drawn.judgements = judge_sampled(drawn.sampled, self._judge)

    def _roll_out(self, drawn: _Drawn, whole: WholeRollouts, timer: PhaseTimer) -> list[int]:
        """Whole fresh trajectories, and their rewards. Returns the number of the question that each answers."""
        with timer.phase("rollout"):
            drawn.trajectories, questions = whole.roll_out(drawn.trajectories, drawn.seeds)
            drawn.sampled = recorded_actions(drawn.trajectories, self._renderer.stop_ids)
        with timer.phase("judge"):
            drawn.judgements = whole.judgements(drawn.trajectories)
        return questions

    def _refill(self, drawn: _Drawn, timer: PhaseTimer) -> tuple[list[bool], int]:
        """Adds what was drawn at further states until as many as were in the batch have a signal, or training.refill_rounds is reached;
        each round draws at as many states as are missing, or a few more of the last trajectory. Returns which actions are trained on, and
        how many trajectories this rank took from the stream.

        A rank does so by itself, and no collective call is made; `take` has all ranks go on behind what the busiest one took.
        """
        rounds, further, position = 0, 0, self._stream.position
        signal = states_with_signal(drawn.sampled, drawn.judgements)
        wanted = len(signal)
        # A judge that does not reply is not asked more: the trainer stops a run where that goes on.
        asked = asked_about(drawn.sampled, drawn.judgements)
        silent = bool(asked) and all(judgement.reason.startswith(NO_REPLY) for judgement in asked)
        while not silent and rounds < self._config.training.refill_rounds and (missing := wanted - sum(signal)) > 0:
            samples: list[StepSample] = []
            places: list[int] = []
            with timer.phase("data"):
                while sum(sample.kept.count(True) for sample in samples) < missing:
                    places.append(position + self._ranks.rank)
                    more, position = self._stream.further(position, 1)
                    samples += more
            of_round = self._drawn(samples, places)
            self._act(of_round, timer)
            drawn.add(of_round)
            signal = states_with_signal(drawn.sampled, drawn.judgements)
            rounds, further = rounds + 1, further + len(samples)
        trained = trained_states(signal, wanted)
        return [sample.state in trained for sample in drawn.sampled], further


@dataclass
class _Drawn:
    """What a batch is made of, one a trajectory or one an action."""

    trajectories: list[Trajectory]
    kept: list[list[bool]]
    seeds: list[int]
    sampled: list[SampledAction] = field(default_factory=list)
    judgements: list[Judgement] = field(default_factory=list)

    def add(self, other: _Drawn) -> None:
        """Another part of the batch; its trajectories and states are numbered after those here."""
        trajectories, states = len(self.trajectories), 1 + max((sample.state for sample in self.sampled), default=-1)
        self.sampled += [
            replace(sample, trajectory=sample.trajectory + trajectories, state=sample.state + states)
            for sample in other.sampled
        ]
        self.judgements += other.judgements
        self.trajectories += other.trajectories
        self.kept += other.kept
        self.seeds += other.seeds
