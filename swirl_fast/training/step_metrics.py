"""What a rank adds up in a training step, how the ranks put it together, and the step's metrics (swirl_fast/metrics.py)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from swirl_fast.formats.format import Format
from swirl_fast.metrics import METRICS, OVER_RANKS, largest, summed, values
from swirl_fast.objective import Actions, LossSums, state_rewards, trajectory_rewards
from swirl_fast.ranks import Ranks
from swirl_fast.rollouts.gaming import GamingSigns
from swirl_fast.rollouts.pipeline import SampledBatch
from swirl_fast.tasks.task import SHOWN_TASKS
from swirl_fast.training.utilization import utilization
from swirl_fast.verdict import Verdict

NO_SIGNAL = 1e-6  # an advantage up to this is rounding: rewards are in [0, 1]


@dataclass
class StepSums:
    """The sums of one rank. Those of sampling are in rollouts.pipeline.RolloutCounts, those of signs of gaming in
    rollouts.gaming.GamingSigns."""

    # the batch
    rewards: float = summed()
    rewarded: float = summed()  # actions with a verdict, or trajectories
    process_label: float = summed()  # mean rewards of states
    judged_states: float = summed()
    states: float = summed()
    without_signal: float = summed()  # states
    drawn: float = summed()  # states, those that others took the place of included
    drawn_without_signal: float = summed()
    actions: float = summed()
    unknown: float = summed()
    malformed: float = summed()
    surprisal: float = summed()  # of all sampled tokens
    # the first update
    computed_tokens: float = summed()
    effective_tokens: float = summed()
    flops: float = summed()  # of one update, by comb.flops
    flops_of_rank: float = largest()  # the same
    loss: float = summed()
    nll: float = summed()
    tokens: float = summed()
    kl: float = summed()
    gap: float = summed()
    gap_max: float = largest()
    routed: float = summed()  # choices of experts, one a token and layer
    routed_otherwise: float = summed()
    truncated: float = summed()
    # all updates on the batch
    clipped: float = summed()
    clip_tokens: float = summed()
    ratio_max: float = largest()
    # the whole step
    seconds: float = largest()
    busy_seconds: float = largest()  # forward and backward
    memory_gib: float = largest()

    def add_batch(self, batch: SampledBatch, actions: Actions) -> None:
        self.actions = len(batch.sampled)
        self.malformed = sum(sample.action.kind == "malformed" for sample in batch.sampled)
        self.surprisal = -sum(sum(sample.completion.logprobs) for sample in batch.sampled)
        if batch.judgements is None:  # imitated: nothing was rewarded, and no engine drew it
            self.states = len(actions.states.unique())
            self.gap = self.gap_max = math.nan
            return
        known = int(actions.known.sum())
        self.unknown = len(batch.sampled) - known
        self.states = len(actions.states[actions.known & trained(batch)].unique())
        self.drawn = len(actions.states.unique())
        if batch.questions is not None:
            rewards = trajectory_rewards(actions)
            self.rewards, self.rewarded = float(rewards.double().sum()), len(rewards)
            return
        self.rewards, self.rewarded = float(actions.rewards[actions.known].double().sum()), known
        means = state_rewards(actions)
        self.process_label, self.judged_states = float(means.double().sum()), len(means)

    def add_signal(self, batch: SampledBatch, actions: Actions, advantage_A: Tensor) -> None:
        """advantage_A: [A] float32, of all actions of the batch."""
        told = actions.known & (advantage_A.abs() > NO_SIGNAL)
        self.without_signal = self.states - len(actions.states[told & trained(batch)].unique())
        self.drawn_without_signal = self.drawn - len(actions.states[told].unique())

    def add_work(self, computed_tokens: int, effective_tokens: int, flops: float) -> None:
        """Adds the work of one micro-batch."""
        self.computed_tokens += computed_tokens
        self.effective_tokens += effective_tokens
        self.flops += flops
        self.flops_of_rank += flops

    def add_loss(self, sums: LossSums, first: bool) -> None:
        """Adds the loss and metrics of one update; first: whether it is the batch's first."""
        if first:
            self.tokens += sums.tokens
            self.kl += sums.kl
            self.truncated += sums.truncated
        self.clip_tokens += sums.tokens
        self.clipped += sums.clipped
        self.ratio_max = max(self.ratio_max, sums.ratio_max)


def trained(batch: SampledBatch) -> Tensor:
    """[A] bool: whether the state of an action is trained on; with training.refill some are only drawn at."""
    chosen = [True] * len(batch.sampled) if batch.trained is None else batch.trained
    return torch.tensor(chosen, dtype=torch.bool)


def gaming_signs(batch: SampledBatch, form: Format) -> GamingSigns:
    """Imitated actions count as GOOD. form: how actions are written."""
    signs = GamingSigns()
    verdicts = [Verdict.GOOD] * len(batch.sampled)
    if batch.judgements is not None:
        verdicts = [judgement.verdict for judgement in batch.judgements]
    for sample, verdict in zip(batch.sampled, verdicts, strict=True):
        steps = batch.trajectories[sample.trajectory].steps[: len(sample.view.history)]
        earlier = [step.action for step in steps]
        tokens = len(sample.completion.tokens)
        signs.observe(sample.view.action_text, sample.action, tokens, verdict, earlier, form)
    return signs


def rewards_by_task(ranks: Ranks, batch: SampledBatch, tasks: Sequence[str]) -> dict[str, float]:
    """The mean reward of the samples of each task, where there are several, and not too many to be shown; of trajectories with
    algorithm.reward=outcome. Collective."""
    if not 1 < len(tasks) <= SHOWN_TASKS or batch.judgements is None:
        return {}
    sums = torch.zeros(len(tasks), 2, dtype=torch.float64)
    seen: set[int] = set()
    for sample, judgement in zip(batch.sampled, batch.judgements, strict=True):
        counted = batch.questions is None or sample.trajectory not in seen
        seen.add(sample.trajectory)
        if counted and judgement.reward is not None:
            sums[tasks.index(sample.view.task)] += torch.tensor([judgement.reward, 1.0], dtype=torch.float64)
    together = ranks.sum(sums).tolist()
    return {
        f"reward/{task}": total / count if count else math.nan
        for task, (total, count) in zip(tasks, together, strict=True)
    }


def over_ranks(ranks: Ranks, *parts: Any) -> dict[str, float]:
    """The declared sums of dataclasses, by field, put together over ranks. Collective; the parts have no field name in common."""
    local: dict[str, dict[str, float]] = {"sum": {}, "max": {}}
    for part in parts:
        for field in dataclasses.fields(part):
            if OVER_RANKS in field.metadata:
                local[field.metadata[OVER_RANKS]][field.name] = float(getattr(part, field.name))
    together = {"sum": ranks.sum, "max": ranks.max}
    result: dict[str, float] = {}
    for how, sums in local.items():
        reduced = together[how](torch.tensor(list(sums.values()), dtype=torch.float64))
        result |= zip(sums, reduced.tolist(), strict=True)
    return result


def step_metrics(
    sums: Mapping[str, float], given: Mapping[str, float], updates: int, peak: float | None, ranks: int
) -> dict[str, float]:
    """The step's metrics. sums: of all ranks. given: those that the trainer knows by name. updates: begun on the batch. peak: FLOP/s of one
    rank, None where that is not known."""
    work, busy, seconds = sums["flops"] * updates, sums["busy_seconds"], sums["seconds"]
    computed = {
        "rank_imbalance": sums["flops_of_rank"] * ranks / sums["flops"] if sums["flops"] else 1.0,
        "tflops": work / busy / 1e12 if busy else 0.0,
        **utilization(work, busy, seconds, peak, ranks),
    }
    if sums["routed"]:
        computed["routing_gap"] = sums["routed_otherwise"] / sums["routed"]
    return values(METRICS, {**sums, "rank_seconds": seconds * ranks}, {**given, **computed})
