"""Rewards -> advantages -> one weight per action -> loss. Pure functions: no model, no torch.distributed.

J(θ) = E_{s ~ T, a ~ π_θ(·|s)} [R(a|s)] (arXiv 2504.04736, equation 1), every state a contextual bandit: no return, no discount.
The loss is a sum over predicted tokens of `weight * (policy term + kl_coef * k3)`. Every weight is made from GLOBAL counts
that the caller sums over ranks, so that the loss depends neither on micro-batches nor on the number of ranks.

UNKNOWN verdicts: such an action has advantage 0 and weight 0 and is left out of its siblings' baseline and of every count, as
if it had never been drawn.

Legend: A actions, N predicted tokens (action a owns rows offsets[a]:offsets[a+1]).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

import swirl_kernels
from swirl_fast.config import AlgorithmConfig
from swirl_kernels import PolicyLossMetrics, PolicyLossSpec


@dataclass(frozen=True)
class Actions:
    """What the objective knows of a rank's sampled actions; all of shape [A].

    rewards: float32 (any value where unknown). known: bool, whether there is a reward; nowhere for actions that are imitated. states,
    trajectories: int64 numbers of the state and trajectory each action belongs to, local to the rank; all samples of a state lie on one
    rank. lengths: int64 tokens.
    """

    rewards: Tensor
    known: Tensor
    states: Tensor
    trajectories: Tensor
    lengths: Tensor


def advantages(actions: Actions, name: str) -> tuple[Tensor, Tensor]:
    """(advantage [A] float32, valid [A] bool); advantage is 0 where not valid.

    reinforce: the reward itself. rloo, ppo: reward minus the mean of the state's other known rewards (unbiased: the state does not
    depend on the policy). grpo: reward minus the state's mean, over its standard deviation + 1e-4 (DeepSeekMath, equation 3).
    These need two known rewards at a state; with fewer its actions are not valid. Where all known ones are equal they are exactly 0.
    raft: 1 for every action with its state's best known reward, which makes the loss cross-entropy on them; the others, and states at which
    no action is worth anything, are not valid (best-of-G imitation: Dong et al. 2023, arXiv 2304.06767).
    """
    known, rewards = actions.known, known_rewards(actions)
    if name == "raft":
        best = known & (rewards > 0) & (rewards >= _largest_by(rewards, actions.states))
        return best.float(), best
    if name == "reinforce":
        return rewards, known
    # Sums of float32 are exact in float64, so that equal rewards have an advantage of 0 and not a rounding error.
    rewards = rewards.double()
    count = _sum_by(known.double(), actions.states)
    total = _sum_by(rewards, actions.states)
    valid = known & (count >= 2)
    safe = count.clamp(min=2)
    if name in ("rloo", "ppo"):
        advantage = rewards - (total - rewards) / (safe - 1)
    elif name == "grpo":
        centred = torch.where(known, rewards - total / safe, 0.0)
        deviation = (_sum_by(centred**2, actions.states) / (safe - 1)).sqrt()
        advantage = centred / (deviation + 1e-4)
    else:
        raise ValueError(f"unknown algorithm {name!r}")
    return torch.where(valid, advantage, 0.0).float(), valid


def imitation_advantages(actions: Actions) -> tuple[Tensor, Tensor]:
    """As `advantages`, for recorded actions that are imitated (algorithm.name=sft): 1 for every one of them, which makes the loss
    cross-entropy."""
    return torch.ones(len(actions.states)), torch.ones(len(actions.states), dtype=torch.bool)


def trajectory_advantages(actions: Actions, questions: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """As `advantages`, for rewards of whole trajectories: the siblings are the trajectories of one question, each with one reward
    whatever its length, and every action has its trajectory's advantage.

    questions: int64, the question of each trajectory, by its number in `actions.trajectories`. All actions of a trajectory have its reward.
    """
    numbers, first = actions.trajectories.unique(return_inverse=True)
    rewards, known = torch.zeros(len(numbers)), torch.zeros(len(numbers), dtype=torch.bool)
    rewards[first], known[first] = actions.rewards.float(), actions.known
    whole = Actions(rewards, known, questions[numbers], numbers, torch.ones_like(numbers))
    advantage, valid = advantages(whole, name)
    return advantage[first], valid[first]


def counts(actions: Actions, valid: Tensor) -> Tensor:
    """[3] float64: numbers of states, tokens and trajectories with a valid action; summed over ranks they are the `global_counts`."""
    states = actions.states[valid].unique().numel()
    trajectories = actions.trajectories[valid].unique().numel()
    return torch.tensor([states, int(actions.lengths[valid].sum()), trajectories], dtype=torch.float64)


def weights(actions: Actions, valid: Tensor, weighting: str, global_counts: Tensor) -> Tensor:
    """[A] float32: the weight of each token of an action, 0 where not valid. global_counts: `counts`, summed over ranks.

    state: every state weighs 1/#states, its actions alike (the tokens of an action are summed, as the log-probability of the whole
    action is). trajectory: every trajectory 1/#trajectories, its states alike. token: every token 1/#tokens.
    """
    states, tokens, trajectories = global_counts.tolist()
    ones = valid.double()
    if weighting == "token":
        weight = ones / max(tokens, 1)
    else:
        siblings = _sum_by(ones, actions.states).clamp(min=1)
        if weighting == "state":
            weight = ones / siblings / max(states, 1)
        elif weighting == "trajectory":
            states_of = _sum_by(ones / siblings, actions.trajectories).clamp(min=1)
            weight = ones / siblings / states_of / max(trajectories, 1)
        else:
            raise ValueError(f"unknown weighting {weighting!r}")
    return weight.float()


@dataclass(frozen=True)
class LossSums:
    """Sums over tokens, read from the device; added up over micro-batches and ranks they give the metrics."""

    tokens: float
    kl: float
    clipped: float
    ratio_max: float
    truncated: float

    @classmethod
    def of(cls, metrics: PolicyLossMetrics) -> LossSums:
        """Waits for the device once."""
        clipped = metrics.clipped_low + metrics.clipped_high
        return cls(*torch.stack([metrics.tokens, metrics.kl, clipped, metrics.ratio_max, metrics.truncated]).tolist())


def policy_loss(
    logp_N: Tensor,
    old_logp_N: Tensor,
    advantage_N: Tensor,
    weight_N: Tensor,
    algorithm: AlgorithmConfig,
    ref_logp_N: Tensor | None = None,
    rollout_logp_N: Tensor | None = None,
    offsets_A: Tensor | None = None,
) -> tuple[Tensor, PolicyLossMetrics]:
    """Scalar loss (a sum: weights already hold the global normaliser) and its metrics, which add up. Inputs float32 [N], but for
    offsets_A: int64 [A + 1], where the actions begin and end; needed for importance_level=action.

    reinforce, rloo, grpo, raft, sft: -ratio * A with ratio = exp(logp - old_logp); on policy (old = logp detached) its gradient is
    -A * grad logp. ppo: -min(ratio * A, clip(ratio, 1 - clip_low, 1 + clip_high) * A).
    KL: k3 = exp(ref - logp) - (ref - logp) - 1 (Schulman, "Approximating KL divergence"), times algorithm.kl_coef.
    algorithm.importance_cap: the policy term of each token is weighed by min(exp(old_logp - rollout_logp), cap), detached: truncated
    importance sampling (Yao et al., 2025) for an engine whose numbers are not quite the trainer's. importance_level=action: by that
    of the whole action's probabilities.
    Tokens of weight 0 contribute exactly nothing, whatever their log-probs.
    """
    with_kl = ref_logp_N is not None
    spec = PolicyLossSpec(
        ratio="token",
        clip="ppo" if algorithm.name == "ppo" else "none",
        clip_low=algorithm.clip_low,
        clip_high=algorithm.clip_high,
        kl="k3" if with_kl else "none",
        kl_coef=algorithm.kl_coef if with_kl else 0.0,
        correction="tis" if algorithm.importance_cap else "none",
        correction_level="step" if algorithm.importance_level == "action" else "token",
        correction_high=algorithm.importance_cap or 2.0,
    )
    by_action = algorithm.importance_level == "action"
    assert offsets_A is not None or not by_action, "the weight of an action needs to know where it begins and ends"
    return swirl_kernels.policy_loss(
        logp_N,
        old_logp_N,
        advantage_N,
        offsets_A if by_action else None,
        spec,
        ref_logp=ref_logp_N,
        rollout_logp=rollout_logp_N if algorithm.importance_cap else None,
        weight=weight_N,
    )


def known_rewards(actions: Actions) -> Tensor:
    """[A] float32; 0 where the reward is not known."""
    return torch.where(actions.known, actions.rewards.float(), torch.zeros(()))


def state_rewards(actions: Actions) -> Tensor:
    """[K] float32: the mean known reward of each state that has one, in the order of their numbers."""
    known = actions.known
    mean_A = _sum_by(known_rewards(actions), actions.states) / _sum_by(known.float(), actions.states)
    return _each_group(mean_A[known], actions.states[known])


def trajectory_rewards(actions: Actions) -> Tensor:
    """[K] float32: the reward of each trajectory, in the order of their numbers. All actions of a trajectory have its reward."""
    return _each_group(known_rewards(actions), actions.trajectories)


def _each_group(values: Tensor, groups: Tensor) -> Tensor:
    """The value of each group that occurs, in the order of their numbers; `values` are the same at all elements of a group."""
    numbers, place = groups.unique(return_inverse=True)
    return torch.zeros(len(numbers), dtype=values.dtype).index_copy(0, place, values)


def _largest_by(values: Tensor, groups: Tensor) -> Tensor:
    """The largest of `values` over each element's group, at every element; 0 where all are negative."""
    if not len(values):
        return values
    largest = torch.zeros(int(groups.max()) + 1, dtype=values.dtype)
    return largest.index_reduce(0, groups, values, "amax")[groups]


def _sum_by(values: Tensor, groups: Tensor) -> Tensor:
    """The sum of `values` over each element's group, at every element."""
    if not len(values):
        return values
    sums = torch.zeros(int(groups.max()) + 1, dtype=values.dtype)
    return sums.index_add(0, groups, values)[groups]
