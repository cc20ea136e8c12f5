"""training.refill: states whose rewards are all equal give no gradient; further ones of the stream take their place."""

from __future__ import annotations

from collections.abc import Sequence

from swirl_fast.rollouts.at_states import SampledAction
from swirl_fast.verdict import Judgement

EQUAL = 1e-6  # rewards in [0, 1] that differ by less are equal but for rounding


def states_with_signal(sampled: Sequence[SampledAction], judgements: Sequence[Judgement]) -> list[bool]:
    """Of each state, in the order of their numbers from 0 on, whether the known rewards of its actions differ. UNKNOWN is no reward, and a
    state without two that are known has no signal."""
    rewards: dict[int, list[float]] = {}
    for sample, judgement in zip(sampled, judgements, strict=True):
        known = rewards.setdefault(sample.state, [])
        if judgement.reward is not None:
            known.append(judgement.reward)
    return [bool(rewards[state]) and max(rewards[state]) - min(rewards[state]) > EQUAL for state in range(len(rewards))]


def trained_states(signal: Sequence[bool], wanted: int) -> set[int]:
    """The numbers of the `wanted` states that are trained on: those with a signal first, each kind in the order in which they were drawn.
    signal: of every state drawn, at least `wanted`."""
    return set(sorted(range(len(signal)), key=lambda state: not signal[state])[:wanted])
