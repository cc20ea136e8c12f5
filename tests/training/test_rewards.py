"""A graded reward on its way: judge, judgement, advantage, metric."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from support import small_models
from support.parallel_variants import Coin, config_of, trainer_of

from swirl_fast.engines.engine import Completion
from swirl_fast.formats.format import Action
from swirl_fast.objective import advantages, state_rewards, trajectory_rewards
from swirl_fast.ranks import Ranks
from swirl_fast.rollouts.at_states import SampledAction
from swirl_fast.training.batch import to_actions
from swirl_fast.trajectory import StepView
from swirl_fast.verdict import Judgement, Verdict


def test_a_verdict_has_a_reward_and_a_graded_reward_a_verdict() -> None:
    rewards = {verdict: Judgement(verdict, "").reward for verdict in Verdict}
    assert rewards == {Verdict.GOOD: 1.0, Verdict.BAD: 0.0, Verdict.UNKNOWN: None}
    graded = {reward: Judgement.graded(reward, "why") for reward in (0.0, 0.49, 0.5, 1.0)}
    assert [one.verdict for one in graded.values()] == [Verdict.BAD, Verdict.BAD, Verdict.GOOD, Verdict.GOOD]
    assert [one.reward for one in graded.values()] == list(graded) and graded[0.5].reason == "why"
    assert Judgement.graded(1.0, "") == Judgement(Verdict.GOOD, "")


@pytest.mark.parametrize("reward", [math.nan, math.inf, -math.inf, -0.1, 1.1])
def test_what_is_no_reward_is_refused(reward: float) -> None:
    with pytest.raises(ValueError, match="must be a number in"):
        Judgement.graded(reward, "")
    with pytest.raises(ValueError, match="must be a number in"):
        Judgement(Verdict.GOOD, "", reward)


@pytest.mark.parametrize(("verdict", "reward"), [(Verdict.BAD, 0.5), (Verdict.GOOD, 0.4), (Verdict.UNKNOWN, 0.4)])
def test_a_verdict_and_a_reward_that_contradict_each_other_are_refused(verdict: Verdict, reward: float) -> None:
    with pytest.raises(ValueError, match=f"reward {reward}: contradicts the verdict {verdict.value}"):
        Judgement(verdict, "", reward)


def sampled(states: Sequence[int]) -> list[SampledAction]:
    completion = Completion([5, 6], [-1.0, -1.0], "stop", 0)
    return [SampledAction(0, state, completion, Action("answer", ""), StepView("t", "", (), "")) for state in states]


def test_advantages_are_those_of_the_graded_rewards() -> None:
    judgements = [*(Judgement.graded(reward, "") for reward in (0.25, 0.5, 0.75)), Judgement(Verdict.UNKNOWN, "")]
    actions = to_actions(sampled([0, 0, 0, 0]), judgements)
    assert actions.rewards[:3].tolist() == [0.25, 0.5, 0.75] and actions.known.tolist() == [True, True, True, False]
    advantage, valid = advantages(actions, "rloo")
    assert advantage.tolist() == [-0.375, 0.0, 0.375, 0.0] and valid.tolist() == actions.known.tolist()


def test_imitated_actions_have_no_reward() -> None:
    actions = to_actions(sampled([0, 1]), None)
    assert not actions.known.any() and actions.states.tolist() == [0, 1] and actions.lengths.tolist() == [2, 2]


def test_rewards_of_states_and_of_trajectories() -> None:
    judgements = [Judgement.graded(reward, "") for reward in (0.25, 0.5, 1.0)] + [Judgement(Verdict.UNKNOWN, "")] * 2
    actions = to_actions(sampled([1, 1, 3, 3, 4]), judgements)
    assert state_rewards(actions).tolist() == [0.375, 1.0], "an unknown verdict is as if the action had not been drawn"
    same = to_actions(sampled([1, 1]), [Judgement.graded(0.25, "")] * 2)
    assert trajectory_rewards(same).tolist() == [0.25]


class Grader(Coin):
    """Rewards 0, 1/4, 1/2, 3/4, by the answer's last digit."""

    def judge(self, steps: Sequence[StepView]) -> list[Judgement]:
        return [Judgement.graded(self.reward(step), "") for step in steps]

    def reward(self, step: StepView) -> float:
        return int(step.action_text.removesuffix("</answer>")[-1]) % 4 / 4


def test_a_graded_reward_is_learned_from_and_shown(tmp_path: Path) -> None:
    small_models.build("llama", torch.float32).save_pretrained(tmp_path)
    config, ranks = config_of(tmp_path, "plain"), Ranks(0, 1, torch.device("cpu"))
    row = trainer_of(config, ranks, [], Grader()).train_step()
    trainer = trainer_of(config, ranks, [], Grader())
    batch = trainer.rollouts.take()
    rewards = [Grader().reward(sample.view) for sample in batch.sampled]
    assert len(set(rewards)) == 4
    assert row["reward"] == pytest.approx(sum(rewards) / len(rewards), rel=1e-6)
    rounded = trainer_of(config, ranks, [], Rounded()).train_step()
    assert rounded["actions"] == row["actions"] and abs(rounded["grad_norm"] - row["grad_norm"]) > 1e-3


class Rounded(Grader):
    """The verdicts of the same rewards."""

    def reward(self, step: StepView) -> float:
        return float(super().reward(step) >= 0.5)
