from __future__ import annotations

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from swirl_fast.config import AlgorithmConfig
from swirl_fast.objective import Actions, LossSums, advantages, counts, policy_loss, trajectory_advantages, weights


def actions_of(seed: int, states: int = 6, unknown: float = 0.3) -> Actions:
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.randint(1, 5, (states,), generator=generator)
    of_state = torch.repeat_interleave(torch.arange(states), sizes)
    n = len(of_state)
    return Actions(
        rewards=torch.randint(0, 2, (n,), generator=generator).float(),
        known=torch.rand(n, generator=generator) >= unknown,
        states=of_state,
        trajectories=of_state // 2,
        lengths=torch.randint(1, 7, (n,), generator=generator),
    )


def select(actions: Actions, mask: torch.Tensor) -> Actions:
    return Actions(**{name: value[mask] for name, value in vars(actions).items()})


def test_advantages_by_hand() -> None:
    actions = Actions(
        rewards=torch.tensor([1.0, 0.0, 0.0, 1.0, 1.0]),
        known=torch.tensor([True, True, True, True, False]),
        states=torch.tensor([0, 0, 0, 1, 1]),
        trajectories=torch.tensor([0, 0, 0, 0, 0]),
        lengths=torch.tensor([2, 2, 2, 2, 2]),
    )
    advantage, valid = advantages(actions, "rloo")
    torch.testing.assert_close(advantage, torch.tensor([1.0, -0.5, -0.5, 0.0, 0.0]))
    assert valid.tolist() == [True, True, True, False, False]  # one known sample has no siblings to compare with
    advantage, _ = advantages(actions, "grpo")
    deviation = torch.tensor([1.0, 0.0, 0.0]).std()
    torch.testing.assert_close(advantage[:3], (torch.tensor([1.0, 0.0, 0.0]) - 1 / 3) / (deviation + 1e-4))
    advantage, valid = advantages(actions, "reinforce")
    assert advantage.tolist() == [1.0, 0.0, 0.0, 1.0, 0.0] and valid.tolist() == [True, True, True, True, False]


@pytest.mark.parametrize("name", ["rloo", "grpo", "ppo"])
@pytest.mark.parametrize("group", [2, 3, 5, 6, 7, 8, 16])
def test_equal_rewards_have_no_advantage_at_all(name: str, group: int) -> None:
    """A rounding error in place of 0 would be an update of full size: Adam divides by the size of the gradients."""
    rewards = torch.tensor([0.1, 0.3, 0.7, 0.9, 1 / 3, 2 / 3, 1e-3, 1.0]).repeat_interleave(group)
    states = torch.arange(8).repeat_interleave(group)
    known = torch.ones(len(states), dtype=torch.bool)
    actions = Actions(rewards, known, states, torch.arange(len(states)), torch.ones_like(states))
    advantage, valid = advantages(actions, name)
    assert valid.all() and advantage.dtype == torch.float32 and (advantage == 0).all()
    whole, valid = trajectory_advantages(actions, states, name)
    assert valid.all() and (whole == 0).all()
    rewards[0] += 0.25
    assert (advantages(actions, name)[0][:group] != 0).all()


def test_raft_imitates_the_best_of_each_state() -> None:
    """State 0: one is best. 1: two are. 2: none is worth anything. 3: the best is not known."""
    rewards = torch.tensor([0.2, 0.8, 0.5, 1.0, 1.0, 0.0, 0.0, 0.3, 9.0])
    actions = Actions(
        rewards, rewards <= 1, torch.tensor([0, 0, 0, 1, 1, 2, 2, 3, 3]), torch.zeros(9).long(), torch.ones(9).long()
    )
    advantage, valid = advantages(actions, "raft")
    assert valid.tolist() == [False, True, False, True, True, False, False, True, False]
    assert advantage.tolist() == valid.float().tolist()
    weight = weights(actions, valid, "state", counts(actions, valid))
    torch.testing.assert_close(weight, torch.tensor([0, 2, 0, 1, 1, 0, 0, 2, 0]) / 6)  # each state alike


@pytest.mark.parametrize("name", ["reinforce", "rloo", "grpo", "ppo", "raft"])
@pytest.mark.parametrize("weighting", ["state", "token", "trajectory"])
@given(seed=st.integers(0, 10_000))
@settings(max_examples=25, deadline=None)
def test_unknown_verdicts_change_neither_baseline_nor_loss(name: str, weighting: str, seed: int) -> None:
    """Invariant 7: everything is as if those actions had never been drawn, whatever reward stands beside them."""
    actions = actions_of(seed)
    poisoned = copy.deepcopy(actions)
    poisoned.rewards[~actions.known] = float("nan")
    without = select(actions, actions.known)
    results = []
    for one in (poisoned, without):
        advantage, valid = advantages(one, name)
        weight = weights(one, valid, weighting, counts(one, valid))
        results.append((advantage, weight))
    (advantage, weight), (wanted_advantage, wanted_weight) = results
    torch.testing.assert_close(advantage[actions.known], wanted_advantage)
    torch.testing.assert_close(weight[actions.known], wanted_weight)
    assert (advantage[~actions.known] == 0).all() and (weight[~actions.known] == 0).all()


@pytest.mark.parametrize("weighting", ["state", "token", "trajectory"])
def test_what_the_weighting_promises(weighting: str) -> None:
    actions = actions_of(3, unknown=0.0)
    _, valid = advantages(actions, "reinforce")
    weight = weights(actions, valid, weighting, counts(actions, valid)).double()
    if weighting == "token":
        torch.testing.assert_close((weight * actions.lengths).sum(), torch.tensor(1.0, dtype=torch.float64))
        assert weight.unique().numel() == 1
        return
    groups = actions.states if weighting == "state" else actions.trajectories
    sums = torch.zeros(int(groups.max()) + 1, dtype=torch.float64).index_add(0, groups, weight)
    torch.testing.assert_close(sums, torch.full_like(sums, 1 / len(sums)), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("weighting", ["state", "token", "trajectory"])
def test_two_ranks_weigh_as_one(weighting: str) -> None:
    """Invariant 2: with summed counts each rank's weights are those of the whole batch."""
    actions = actions_of(7)
    _, valid = advantages(actions, "rloo")
    whole = weights(actions, valid, weighting, counts(actions, valid))
    halves = [actions.trajectories < 2, actions.trajectories >= 2]
    parts = [select(actions, half) for half in halves]
    totals = sum(counts(part, valid[half]) for part, half in zip(parts, halves, strict=True))
    for part, half in zip(parts, halves, strict=True):
        torch.testing.assert_close(weights(part, valid[half], weighting, totals), whole[half])


@pytest.mark.parametrize("name", ["reinforce", "rloo", "grpo", "ppo", "raft"])
@pytest.mark.parametrize("kl_coef", [0.0, 0.3])
def test_loss_and_gradient_by_the_formula(name: str, kl_coef: float) -> None:
    torch.manual_seed(0)
    n = 552
    logp = torch.randn(n, dtype=torch.float64).sub(2).requires_grad_()
    old, ref = (logp.detach() + 0.3 * torch.randn(n, dtype=torch.float64) for _ in range(2))
    advantage, weight = torch.randn(n, dtype=torch.float64), torch.rand(n, dtype=torch.float64)
    algorithm = AlgorithmConfig(name=name, kl_coef=kl_coef, clip_low=0.1, clip_high=0.2)
    loss, metrics = policy_loss(logp, old, advantage, weight, algorithm, ref if kl_coef else None)
    sums = LossSums.of(metrics)
    expected, kl, clipped = 0.0, 0.0, 0
    gradient = torch.zeros(n, dtype=torch.float64)
    now = logp.detach()
    for t in range(n):
        ratio = float((now[t] - old[t]).exp())
        term, slope = ratio * float(advantage[t]), ratio * float(advantage[t])
        if name == "ppo":
            bounded = min(max(ratio, 0.9), 1.2) * float(advantage[t])
            if bounded < term:
                term, slope, clipped = bounded, 0.0, clipped + 1
        gap = float(ref[t] - now[t])
        k3 = math.exp(gap) - gap - 1 if kl_coef else 0.0
        expected += float(weight[t]) * (-term + kl_coef * k3)
        gradient[t] = float(weight[t]) * (-slope + (kl_coef * (1 - math.exp(gap)) if kl_coef else 0.0))
        kl += k3
    loss.backward()
    torch.testing.assert_close(float(loss.detach()), expected, rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(logp.grad, gradient, rtol=1e-11, atol=1e-13)
    assert sums.clipped == clipped and sums.tokens == n and bool(clipped) == (name == "ppo")
    torch.testing.assert_close(sums.kl, kl, rtol=1e-11, atol=1e-12)
    assert sums.ratio_max == pytest.approx(float((now - old).exp().max()), rel=1e-12)


@pytest.mark.parametrize("name", ["reinforce", "rloo", "grpo", "ppo", "raft"])
@pytest.mark.parametrize("level", ["token", "action"])
@pytest.mark.parametrize("cap", [0.0, 0.8, 2.0])
def test_importance_weights_by_the_formula(name: str, cap: float, level: str) -> None:
    """min(trainer's / engine's probability, cap), of the token or its action, on the policy term alone, and no gradient through it;
    cap 0: all 1."""
    torch.manual_seed(0)
    n = 296
    logp = torch.randn(n, dtype=torch.float64).sub(2).requires_grad_()
    old, ref, engine = (logp.detach() + 0.6 * torch.randn(n, dtype=torch.float64) for _ in range(3))
    advantage, weight = torch.randn(n, dtype=torch.float64), torch.rand(n, dtype=torch.float64)
    weight[:5] = 0
    algorithm = AlgorithmConfig(
        name=name, kl_coef=0.3, clip_low=0.1, clip_high=0.2, importance_cap=cap, importance_level=level
    )
    ends = [5, *range(6, n, 3), n]
    loss, metrics = policy_loss(logp, old, advantage, weight, algorithm, ref, engine, torch.tensor([0, *ends]))
    expected, truncated = 0.0, 0
    gaps = old - engine
    if level == "action":
        gaps = torch.cat([gaps[a:b].sum().expand(b - a) for a, b in zip([0, *ends], ends, strict=False)])
    gradient = torch.zeros(n, dtype=torch.float64)
    now = logp.detach()
    for t in range(n):
        importance = min(math.exp(gaps[t]), cap) if cap else 1.0
        truncated += bool(cap and weight[t] and math.exp(gaps[t]) > cap)
        ratio = float((now[t] - old[t]).exp())
        term, slope = ratio * float(advantage[t]), ratio * float(advantage[t])
        if name == "ppo" and (bounded := min(max(ratio, 0.9), 1.2) * float(advantage[t])) < term:
            term, slope = bounded, 0.0
        gap = float(ref[t] - now[t])
        expected += float(weight[t]) * (-importance * term + 0.3 * (math.exp(gap) - gap - 1))
        gradient[t] = float(weight[t]) * (-importance * slope + 0.3 * (1 - math.exp(gap)))
    loss.backward()
    torch.testing.assert_close(float(loss.detach()), expected, rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(logp.grad, gradient, rtol=1e-11, atol=1e-13)
    assert LossSums.of(metrics).truncated == truncated and bool(truncated) == bool(cap)


def test_tokens_of_weight_zero_contribute_nothing_even_when_poisoned() -> None:
    logp = torch.tensor([-1.0, float("nan"), -2.0]).requires_grad_()
    weight = torch.tensor([0.5, 0.0, 0.5])
    loss, _ = policy_loss(
        logp, torch.tensor([-1.0, float("inf"), -2.0]), torch.ones(3), weight, AlgorithmConfig(), torch.full((3,), -1.5)
    )
    loss.backward()
    assert loss.isfinite() and logp.grad[1] == 0 and logp.grad.isfinite().all()


@pytest.mark.parametrize("name", ["rloo", "ppo"])
def test_loss_and_sums_add_up_over_micro_batches(name: str) -> None:
    """Wherever the batch is cut, an empty part among them."""
    torch.manual_seed(0)
    logp, advantage = torch.randn(2, 700)
    old, ref = logp + 0.3 * torch.randn(700), logp + 0.3 * torch.randn(700)
    weight = torch.rand(700) * (torch.rand(700) > 0.3)
    algorithm = AlgorithmConfig(name=name, kl_coef=0.1)
    whole, metrics = policy_loss(logp, old, advantage, weight, algorithm, ref)
    for cut in (0, 1, 256, 300, 699):
        halves = [
            policy_loss(*(x[part] for x in (logp, old, advantage, weight)), algorithm, ref[part])
            for part in (slice(cut), slice(cut, None))
        ]
        torch.testing.assert_close(halves[0][0] + halves[1][0], whole)
        sums, wanted = LossSums.of(halves[0][1] + halves[1][1]), LossSums.of(metrics)
        assert sums.tokens == wanted.tokens == int((weight != 0).sum()) and sums.clipped == wanted.clipped
        assert sums.ratio_max == wanted.ratio_max and sums.kl == pytest.approx(wanted.kl, rel=1e-6)


def test_on_policy_gradient_is_reinforce() -> None:
    logp = torch.tensor([-1.0, -3.0]).requires_grad_()
    advantage, weight = torch.tensor([2.0, -1.0]), torch.tensor([0.25, 0.5])
    loss, _ = policy_loss(logp, logp.detach(), advantage, weight, AlgorithmConfig(name="rloo"))
    loss.backward()
    torch.testing.assert_close(logp.grad, -(weight * advantage))
