"""training.refill: states whose rewards are all equal give way to further ones, each rank by itself, and a stop changes nothing; and
training at the states that the shards mark, and no others."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support import small_models
from support.parallel_variants import STEPS, Coin, Watched, config_of, trainer_of, trajectory
from support.torchrun import CPU, Run, read, torchrun

from swirl_fast.config import Config, ConfigError, load
from swirl_fast.data.samples import read_samples
from swirl_fast.data.shards import StepSample, write_shards
from swirl_fast.data.stream import TrajectoryStream
from swirl_fast.engines.engine import Completion
from swirl_fast.formats.tags import Action
from swirl_fast.judges.judge import NO_REPLY
from swirl_fast.ranks import Ranks
from swirl_fast.rollouts.at_states import SampledAction
from swirl_fast.rollouts.refill import states_with_signal, trained_states
from swirl_fast.trajectory import StepView
from swirl_fast.verdict import Judgement, Verdict

ONE = Ranks(0, 1, CPU)
BATCH = 12  # of parallel_variants


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    small_models.build("llama", torch.float32).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def two(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    out, variants = tmp_path_factory.mktemp("two"), ("refilled", "refilled_resumed")
    torchrun(2, out, *(f"{llama}:{variant}" for variant in variants))
    return {variant: read(out, variant) for variant in variants}


def test_every_rank_refills_its_own_share_and_all_go_on_behind_the_busiest(two: dict[str, Run]) -> None:
    seen, _ = two["refilled"]
    position = 0
    for row, *further in zip(seen["metrics"], *seen["further"], strict=True):
        states = sum(trajectory(number).num_steps for number in range(position, position + BATCH))
        assert row["states"] == states and row["states_without_signal"] == 0
        assert row["states_drawn"] > states and row["states_drawn_without_signal"] > 0
        position += BATCH + 2 * max(further)
    assert seen["positions"] == [position] * 2
    assert any(one != other for one, other in zip(*seen["further"], strict=True)), "the ranks needed different numbers"


def test_a_stop_on_two_ranks_changes_nothing(two: dict[str, Run]) -> None:
    (through, parameters), (stopped, found) = two["refilled"], two["refilled_resumed"]
    assert stopped["metrics"] == through["metrics"] and stopped["positions"] == through["positions"]
    assert all(torch.equal(found[name], tensor) for name, tensor in parameters.items())


def run(llama: Path, folder: Path, judge: Coin | None = None, **training: Any) -> tuple[Watched, Config]:
    config = config_of(llama, "refilled")
    config.run.folder, config.training.checkpoint_every = str(folder), 1
    for name, value in training.items():
        setattr(config.training, name, value)
    config.folder.mkdir(parents=True, exist_ok=True)
    trainer = trainer_of(config, ONE, [], judge)
    trainer.restore()
    trainer.run()
    return trainer, config


@pytest.mark.parametrize("lag", [0, 1])
def test_a_stop_changes_nothing_with_and_without_lag(llama: Path, tmp_path: Path, lag: int) -> None:
    """The engine here does not look at the weights, so that what is drawn again after a stop is what was drawn before it."""
    through, config = run(llama, tmp_path / "through", lag=lag)
    run(llama, tmp_path / "stopped", lag=lag, steps=1)
    stopped, again = run(llama, tmp_path / "stopped", lag=lag)
    assert stopped.state()["stream"] == through.state()["stream"] and through.state()["stream"]["position"] > 3 * BATCH
    for one, other in zip(through.policy.parameters(), stopped.policy.parameters(), strict=True):
        assert torch.equal(one, other)
    for step in range(1, STEPS + 1):
        assert list(read_samples(config.folder, step)) == list(read_samples(again.folder, step))


def test_what_others_took_the_place_of_is_kept_and_not_learned_from(llama: Path, tmp_path: Path) -> None:
    """Rewards are means over all that was drawn: leaving equal ones out would hide that a model always succeeds."""
    trainer, config = run(llama, tmp_path)
    row, samples = trainer.rows[0], list(read_samples(config.folder, 1))
    by_state: dict[tuple[int, int], list[Any]] = {}
    for one in samples:
        by_state.setdefault((one.place, one.state), []).append(one)
    left_out = [group for group in by_state.values() if group[0].advantage is None]
    assert len(by_state) == row["states_drawn"] and len(by_state) - len(left_out) == row["states"]
    equal = [group for group in by_state.values() if len({one.reward for one in group}) == 1]
    assert len(equal) == row["states_drawn_without_signal"] > 0 and all(group in left_out for group in equal)
    assert row["reward"] == pytest.approx(np.mean([one.reward for one in samples]))
    assert row["actions"] == len(samples) == 3 * row["states_drawn"]


class Same(Coin):
    """Never tells two actions apart. asked: at how many states, three actions each."""

    judgement, asked = Judgement(Verdict.GOOD, ""), 0

    def judge(self, steps: Sequence[StepView]) -> list[Judgement]:
        self.asked += len(steps) // 3
        return [self.judgement] * len(steps)


def test_refilling_ends_at_its_bound_and_the_batch_stays_whole(llama: Path, tmp_path: Path) -> None:
    judge = Same()
    trainer, _ = run(llama, tmp_path, judge, steps=1, refill_rounds=2)
    row = trainer.rows[0]
    assert row["states"] == row["states_without_signal"] == sum(trajectory(n).num_steps for n in range(BATCH))
    assert row["states_drawn"] == row["states_drawn_without_signal"] == judge.asked >= 3 * row["states"]
    assert row["steps_without_signal"] == 1.0


@pytest.mark.parametrize(
    ("reason", "drawn"), [(f"{NO_REPLY}: refused", 1), ("nothing is recorded", 3)], ids=["silent", "unknown"]
)
def test_states_without_a_verdict_are_replaced_but_a_silent_judge_is_not_asked_more(
    llama: Path, tmp_path: Path, reason: str, drawn: int
) -> None:
    judge = Same()
    judge.judgement = Judgement(Verdict.UNKNOWN, reason)
    with pytest.warns(UserWarning, match="gave no verdict on any"):
        trainer, _ = run(llama, tmp_path, judge, steps=1, refill_rounds=2)
    wanted = sum(trajectory(n).num_steps for n in range(BATCH))
    assert wanted * drawn <= judge.asked < wanted * (drawn + 1)
    assert trainer.rows[0]["states_drawn_without_signal"] == judge.asked


def sampled(*rewards: Sequence[float | None]) -> tuple[list[SampledAction], list[Judgement]]:
    completion, view = Completion(np.array([5], np.int32), [-1.0], "stop", 0), StepView("t", "", (), "")
    actions = [
        SampledAction(0, i, completion, Action("answer", ""), view) for i, group in enumerate(rewards) for _ in group
    ]
    unknown = Judgement(Verdict.UNKNOWN, "")
    return actions, [unknown if one is None else Judgement.graded(one, "") for group in rewards for one in group]


def test_a_state_has_a_signal_where_its_known_rewards_differ() -> None:
    drawn = sampled([1, 1], [0, 1], [None, 1], [None, None], [0.5, 0.5 + 1e-8], [None, 0.25, 0.5])
    assert states_with_signal(*drawn) == [False, True, False, False, False, True]


def test_states_with_a_signal_come_first_and_never_more_than_wanted() -> None:
    assert trained_states([False, True, False, True, True], 2) == {1, 3}
    assert trained_states([False, True, False, False], 2) == {0, 1}
    assert trained_states([False, False], 2) == {0, 1}


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        (["algorithm.name=sft"], "draws no actions"),
        (["algorithm.name=reinforce"], "has no baseline"),
        (["algorithm.name=raft"], "imitates the best of equal rewards"),
        (["algorithm.reward=outcome"], "draws whole trajectories"),
    ],
)
def test_where_nothing_can_be_refilled_it_is_refused(overrides: list[str], reason: str) -> None:
    with pytest.raises(ConfigError, match=f"training.refill=True: .*{reason}"):
        load(None, [*overrides, "training.refill=true"])


# ---- the states that are kept


@pytest.fixture
def masked(tmp_path: Path) -> Iterator[tuple[TrajectoryStream, dict[str, list[bool]]]]:
    """Trajectories of two or three steps, of which one or two are kept; in shards, read ahead."""
    samples = []
    for number in range(2 * BATCH):
        one = trajectory(number)
        kept = [(number + i) % 3 > 0 for i in range(one.num_steps)]
        samples.append(StepSample(one, [Verdict.GOOD] * one.num_steps, kept))
    write_shards(tmp_path / "shards", samples, fingerprint={})
    stream = TrajectoryStream(tmp_path / "shards", global_batch=BATCH, rank=0, world_size=1, seed=0, prefetch=1)
    yield stream, {sample.trajectory.id: sample.kept for sample in samples}
    stream.close()


@pytest.mark.parametrize("variant", ["plain", "refilled", "sft"])
def test_training_is_at_the_states_that_the_shards_mark(
    llama: Path, tmp_path: Path, masked: tuple[TrajectoryStream, dict[str, list[bool]]], variant: str
) -> None:
    stream, kept = masked
    config = config_of(llama, "plain" if variant == "sft" else variant)
    config.run.folder = str(tmp_path)
    config.folder.mkdir(parents=True)
    trainer = trainer_of(config, ONE, [], stream=stream)
    if variant == "sft":
        trainer.rollouts.engine, config.algorithm.name, config.algorithm.kl_coef = None, "sft", 0.0
    places: list[list[tuple[str, int]]] = []
    pack = trainer._pack

    def packed(batch: Any, *rest: Any) -> Any:
        places.append([(batch.trajectories[one.trajectory].id, len(one.view.history)) for one in batch.sampled])
        return pack(batch, *rest)

    trainer._pack = packed  # type: ignore[method-assign]
    rows = [trainer.train_step() for _ in range(2)]
    for row, drawn in zip(rows, places, strict=True):
        assert all(kept[id_][state] for id_, state in drawn), "an action at a state that is not kept"
        each = 1 if variant == "sft" else config.training.group_size
        found = [drawn[i] for i in range(0, len(drawn), each)]
        assert len(drawn) == each * len(found) == row["actions"]
        if variant == "refilled":
            assert row["states"] < row["states_drawn"] == len(found) and row["states_without_signal"] == 0
            continue
        ids = dict.fromkeys(id_ for id_, _ in drawn)
        assert len(ids) == BATCH and row["states"] == len(found) == sum(sum(kept[id_]) for id_ in ids)
        if variant == "sft":
            steps = {id_: trajectory(int(id_[1:])).steps for id_ in ids}
            assert len(found) < sum(map(len, steps.values()))


def test_the_actions_at_a_state_do_not_depend_on_what_else_is_kept(
    llama: Path, masked: tuple[TrajectoryStream, dict[str, list[bool]]]
) -> None:
    """Of the same trajectories with all states kept, the same actions are drawn at those that are marked."""
    stream, _ = masked
    trainer = trainer_of(config_of(llama, "plain"), ONE, [], stream=stream)
    some = trainer.rollouts.take()
    stream.load_state_dict({**stream.state_dict(), "position": 0})
    next_batch = stream.next_batch

    def whole() -> list[StepSample]:
        return [StepSample(one.trajectory, one.verdicts) for one in next_batch()]

    stream.next_batch = whole  # type: ignore[method-assign]
    every = trainer.rollouts.take()

    def drawn(batch: Any) -> dict[tuple[int, int], list[list[int]]]:
        found: dict[tuple[int, int], list[list[int]]] = {}
        for one in batch.sampled:
            found.setdefault((one.trajectory, len(one.view.history)), []).append(one.completion.tokens.tolist())
        return found

    assert drawn(some).items() < drawn(every).items()
