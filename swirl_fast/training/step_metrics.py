"""What a rank adds up in a training step, before it is summed over ranks and shown."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from swirl_fast.objective import LossSums
from swirl_fast.rollouts.gaming import GamingSigns


@dataclass
class StepSums(GamingSigns):
    """What one rank adds up over its micro-batches; summed (or, where named so, maximised) over ranks before it is shown."""

    loss: float = 0.0
    tokens: float = 0.0
    kl: float = 0.0
    clipped: float = 0.0
    clip_tokens: float = 0.0  # over all updates on the batch; the other sums are those of the first
    surprisal: float = 0.0  # of all sampled tokens: its mean is an unbiased estimate of the policy's entropy
    gap: float = 0.0
    gap_max: float = 0.0
    ratio_max: float = 0.0
    truncated: float = 0.0  # tokens whose importance weight was cut at algorithm.importance_cap
    nll: float = 0.0  # of the trained tokens, under the policy before the update
    rewards: float = 0.0
    rewarded: float = 0.0  # actions with a verdict, or trajectories
    actions: float = 0.0
    known: float = 0.0
    malformed: float = 0.0
    states: float = 0.0
    judged_states: float = 0.0
    process_label: float = 0.0
    computed_tokens: float = 0.0
    flops: float = 0.0  # of one update, by comb.flops
    effective_tokens: float = 0.0
    prompt_tokens: float = 0.0
    cached_tokens: float = 0.0
    cacheable_tokens: float = 0.0
    judge_prompt_tokens: float = 0.0
    judge_cached_tokens: float = 0.0
    generated_tokens: float = 0.0
    updates: int = 0  # begun, the same on all ranks
    seconds: dict[str, float] = field(default_factory=dict)

    def add(self, sums: LossSums, first: bool) -> None:
        if first:
            self.tokens += sums.tokens
            self.kl += sums.kl
            self.truncated += sums.truncated
        self.clip_tokens += sums.tokens
        self.clipped += sums.clipped
        self.ratio_max = max(self.ratio_max, sums.ratio_max)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """A phase inside another one is no part of the outer one's seconds."""
        start, so_far = time.perf_counter(), sum(self.seconds.values())
        yield
        inside = sum(self.seconds.values()) - so_far
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start - inside
