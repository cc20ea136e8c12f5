"""Invariant 1: comb == packed == padded == one row at a time, loss and every gradient; and 2: also when ranks share the work."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from naive.agreement import TOLERANCE, assert_equal_to_rows, assert_same_gradients, by_action, losses
from naive.rows import all_actions, padded_rows, separate_rows, side_by_side
from support.random_trees import random_trunks
from support.small_models import SHAPE, build
from support.thread_ranks import on_ranks
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks.scale import SIZE
from benchmarks.scale import sampled as sampled_actions
from swirl_fast.comb.micro_batches import micro_batches
from swirl_fast.comb.tree import SampledState, Trunk, pack
from swirl_fast.config import ConfigError, load
from swirl_fast.data.shards import Manifest
from swirl_fast.engines.engine import Completion
from swirl_fast.formats.format import Action
from swirl_fast.models import policy as policy_module
from swirl_fast.models.policy import DeviceComb, Policy, model_size
from swirl_fast.objective import policy_loss
from swirl_fast.ranks import Ranks
from swirl_fast.rollouts.at_states import SampledAction
from swirl_fast.training import batch as batch_module
from swirl_fast.training.batch import Aim, MicroBatch, Packer, RankActions
from swirl_fast.training.resume import check_budget
from swirl_fast.trajectory import Step, StepView, Trajectory

V = SHAPE["vocab_size"]


def twins(kind: str, dtype: torch.dtype) -> tuple[PreTrainedModel, Policy]:
    """One model twice: with a dense attention for separate rows, and as a policy."""
    naive = build(kind, dtype)
    policy = Policy(copy.deepcopy(naive), temperature=0.8)
    naive.set_attn_implementation("naive")
    return naive, policy


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_any_tree_equals_separate_rows(kind: str, dtype: torch.dtype) -> None:
    """gemma2: softcaps on scores and logits, and a window of 6 in every other layer, on paths of up to 33 tokens."""
    naive, policy = twins(kind, dtype)

    @given(st.integers(0, 10**9), st.sampled_from([3, 6, V]))
    @settings(max_examples=60, deadline=None, derandomize=True)
    def check(seed: int, vocab: int) -> None:
        branches = random_trunks(seed, vocab)
        if any(action for _, action in all_actions(branches).values()):
            assert_equal_to_rows(naive, policy, branches, TOLERANCE[dtype])

    check()


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_every_offset_of_a_branch(kind: str) -> None:
    """Teeth after 1 to 128 tokens of a trunk that goes on. gemma2: softcaps, one layer with a window of 50 and one without."""
    naive, _ = twins(kind, torch.float32)
    if kind == "gemma2":
        naive.config.sliding_window = naive.model.layers[0].self_attn.sliding_window = 50
    policy = Policy(copy.deepcopy(naive))
    windows = [getattr(layer.self_attn, "sliding_window", None) for layer in policy.model.model.layers]
    assert windows == ([50, None] if kind == "gemma2" else [None, None])
    draw = np.random.default_rng(0)
    trunk = draw.integers(1, V, 131).astype(np.int32)
    for offset in range(128):
        teeth = (draw.integers(1, V, 3).astype(np.int32), draw.integers(1, V, 2).astype(np.int32))
        states = (SampledState(offset + 1, teeth, (0, 1)), SampledState(131, (trunk[:2],), (2,)))
        assert_equal_to_rows(naive, policy, [Trunk(trunk, states)], 1e-5)


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma2"])
@pytest.mark.parametrize("way", ["packed", "padded", "one_at_a_time", "micro_batches"])
def test_every_way_of_packing_is_the_same(kind: str, way: str) -> None:
    naive, policy = twins(kind, torch.float64)
    for seed in range(3):
        branches = random_trunks(seed)
        naive.zero_grad()
        policy.zero_grad()
        wanted = separate_rows(naive, branches, 0.8)
        losses(wanted).backward()
        if way == "padded":
            policy.model.set_attn_implementation("naive")
            found = padded_rows(policy.model, branches, 0.8)
        else:
            if way == "micro_batches":
                combs = [pack(group.trunks) for group in micro_batches(branches, 34)]
            else:
                combs = [
                    pack(
                        [Trunk(np.array(state, np.int32), (SampledState(len(state), (np.array(a, np.int32),), (i,)),))]
                    )
                    for i, (state, a) in all_actions(branches).items()
                    if a or way == "packed"  # alone, an empty action leaves nothing to compute
                ]
            if way == "packed":
                combs = [side_by_side(combs)]
            found = {}
            for comb in combs:
                found.update(by_action(comb, policy(DeviceComb.of(comb))))
        losses(found).backward()
        wanted = {i: logp for i, logp in wanted.items() if i in found or len(logp)}
        assert found.keys() == wanted.keys()
        for index in wanted:
            torch.testing.assert_close(found[index], wanted[index], rtol=1e-10, atol=1e-10)
        assert_same_gradients(naive, policy.model, 1e-10)


def test_shared_tokens_carry_the_gradient_of_all_their_actions() -> None:
    """The same action three times: computed once, with three times the gradient of one."""
    trunk = np.arange(1, 9, dtype=np.int32)
    action = np.array([5, 6, 7], np.int32)
    _, policy = twins("llama", torch.float64)
    gradients = []
    for copies in (1, 3):
        comb = pack([Trunk(trunk, (SampledState(8, (action,) * copies, tuple(range(copies))),))])
        assert (comb.computed_tokens, len(comb.rows_E), len(comb.edge_N)) == (10, 3, 3 * copies)
        policy.zero_grad()
        policy(DeviceComb.of(comb)).sum().backward()
        gradients.append([parameter.grad for parameter in policy.parameters()])
    for one, three in zip(*gradients, strict=True):
        torch.testing.assert_close(3 * one, three, rtol=1e-12, atol=1e-14)


def test_model_size() -> None:
    model = build("gemma2")
    size = model_size(model)
    layer = 32 * 32 + 2 * 32 * 16 + 32 * 32 + 3 * 32 * 48
    assert size.linear == 2 * layer
    assert size.attention == ((32, 6), (32, None)) and size.output == 32 * V
    assert model_size(build("llama")).attention == ((32, None), (32, None))


# ---- ranks share the work


def trajectory(name: str, steps: int, draw: np.random.Generator) -> Trajectory:
    tokens = [3, 4, 5, *draw.integers(1, V, 14 * steps).tolist()]
    made = [Step(3 + 14 * i, 7 + 14 * i, "", Action("answer", ""), [0.0] * 4, 0) for i in range(steps)]
    return Trajectory(name, "q", "t", "", 0, 3, tokens, made)


def sampled_at(trajectories: list[Trajectory], draw: np.random.Generator) -> list[SampledAction]:
    places = [(t, i) for t, one in enumerate(trajectories) for i in range(one.num_steps)]
    return [
        SampledAction(
            t,
            state,
            Completion(draw.integers(1, V, n).astype(np.int32), draw.normal(size=n).tolist(), "stop", 0),
            Action("answer", ""),
            StepView("t", "", (("", ""),) * i, ""),
        )
        for state, (t, i) in enumerate(places)
        for n in draw.integers(1, 6, 3)
    ]


def packer(policy: Policy, ranks: Ranks | None = None, sharing: bool = True) -> Packer:
    config = load(None, ["training.token_budget=90", "algorithm.kl_coef=0", f"training.sharing={sharing}"])
    ranks = ranks or Ranks(0, 1, torch.device("cpu"))
    return Packer(config, ranks, model_size(policy.model), max_context=512)


NOBODY = ([], [], torch.zeros(0), torch.zeros(0))


@pytest.mark.parametrize(("size", "sharing"), [(2, True), (3, True), (5, True), (3, False)])
def test_ranks_together_compute_what_one_computes(size: int, sharing: bool) -> None:
    """Each rank samples on its own, the first more than all others; what they then train on is the same sum, dealt evenly."""
    policy = Policy(build("llama", torch.float64), temperature=0.8, sharing=sharing)
    draw = np.random.default_rng(0)
    shares = []
    for rank in range(size):
        trajectories = [trajectory(f"{rank}{t}", 1 + 3 * (rank == 0), draw) for t in range(2)]
        sampled = sampled_at(trajectories, draw)
        advantage = torch.from_numpy(draw.normal(size=len(sampled))).float()
        advantage[0] = 0.0
        shares.append((trajectories, sampled, advantage, torch.full((len(sampled),), 0.1)))
    merged = ([], [], [], [])
    for trajectories, sampled, advantage, weight in shares:
        shifted = [
            SampledAction(s.trajectory + len(merged[0]), s.state + 100 * len(merged[0]), s.completion, s.action, s.view)
            for s in sampled
        ]
        for whole, part in zip(merged, (trajectories, shifted, advantage.tolist(), weight.tolist()), strict=True):
            whole.extend(part)
    everything = (merged[0], merged[1], torch.tensor(merged[2]), torch.tensor(merged[3]))

    def gradients(batches: list[MicroBatch]) -> list[Tensor]:
        policy.zero_grad()
        for batch in batches:
            logp_N = policy(batch.row)
            # the engine's log-probs enter so that a mix-up of actions shows
            old_N = logp_N.detach() + 0.1 * batch.rollout_logp_N
            loss, _ = policy_loss(logp_N, old_N, batch.advantage_N, batch.weight_N, load(None).algorithm)
            loss.backward()
        return [parameter.grad.clone() for parameter in policy.parameters()]

    def dealt(ranks: Ranks) -> list[MicroBatch]:
        own = packer(policy, ranks, sharing)
        return own.micro_batches(own.shared_out(own.rank_actions(*shares[ranks.rank])))

    alone = packer(policy, sharing=sharing)
    whole = alone.micro_batches(alone.shared_out(alone.rank_actions(*everything)))
    wanted = gradients(whole)
    found, work, effective, counts = [], [], 0, set()
    for batches in on_ranks(size, dealt):
        found.append(gradients(batches))
        work.append(sum(batch.flops for batch in batches))
        effective += sum(batch.effective_tokens for batch in batches)
        counts.add(len(batches))
    assert len(counts) == 1, "FSDP's collectives must match"
    assert effective == sum(batch.effective_tokens for batch in whole)
    assert max(work) < (1.3 if size < 5 else 1.6) * np.mean(work), "five ranks compute the few paths again and again"
    for k, gradient in enumerate(wanted):
        torch.testing.assert_close(sum(rank[k] for rank in found), gradient, rtol=1e-9, atol=1e-12)


def test_ranks_that_still_have_too_much_are_relieved_and_no_action_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the last rounds ranks try parts, and those that get them may refuse."""
    size = 12
    dealt = [sampled_actions(rank, size, trajectories=3, samples=4, seed=2) for rank in range(size)]

    def shared_out(ranks: Ranks) -> RankActions:
        return Packer(load(None), ranks, SIZE, 32_768).shared_out(dealt[ranks.rank])

    def actions(parts: Sequence[RankActions]) -> list[bytes]:
        return sorted(
            tokens.tobytes() + np.float32(part.rollout_logp[index][0]).tobytes()
            for part in parts
            for trunk in part.trunks
            for state in trunk.states
            for tokens, index in zip(state.actions, state.indices, strict=True)
        )

    for rank, part in enumerate(dealt):
        for number, logp in enumerate(part.rollout_logp):
            logp[:] = 1000 * rank + number
    measure = Packer(load(None), Ranks(0, 1, torch.device("cpu")), SIZE, 32_768)
    monkeypatch.setattr(batch_module, "LAST_ROUNDS", 0)
    before = on_ranks(size, shared_out)
    monkeypatch.undo()
    offers = []
    offer, accept = Packer.offer, Packer.accept
    monkeypatch.setattr(Packer, "offer", lambda *given: offers.append(offer(*given)) or offers[-1])
    answers = []
    monkeypatch.setattr(Packer, "accept", lambda *given: answers.append(accept(*given)) or answers[-1])
    after = on_ranks(size, shared_out)
    assert actions(dealt) == actions(before) == actions(after)
    assert len(answers) == len(offers) - offers.count(None) > answers.count(None) > 0 < offers.count(None), (
        "some find no part, some taker no room"
    )
    count = max(measure.load(part)[1] for part in after)
    loads = [[measure.load(part, count)[0] for part in parts] for parts in (before, after)]
    assert max(loads[1]) < max(loads[0]) and sum(loads[1]) < 1.02 * sum(loads[0])


def test_a_part_is_refused_for_its_work_or_its_micro_batches_and_not_for_being_small() -> None:
    own = Packer(load(None), Ranks(0, 1, torch.device("cpu")), SIZE, 32_768)
    mine, part = (sampled_actions(rank, 2, trajectories=8, samples=8, seed=0) for rank in range(2))
    work, needed = own.load(mine.with_others([part]))
    assert needed > 1
    both, found = own.accept(mine, part, 0.0, Aim(work, needed)) or (None, 0.0)
    assert both is not None and len(both.weight_A) == len(mine.weight_A) + len(part.weight_A) and found == work
    assert own.accept(mine, part, 0.0, Aim(work, needed - 1)) is None, "all ranks would need one micro-batch more"
    assert own.accept(mine, part, 0.0, Aim(0.9 * work, needed)) is None, "too much"
    assert own.accept(mine, part, 1.1 * work, Aim(0.9 * work, needed)) is not None, "its giver has still more"
    trunk, state = mine.trunks[0], mine.trunks[0].states[0]
    alone = SampledState(state.length, state.actions[:1], state.indices[:1])
    few = mine.only([Trunk(trunk.tokens[: state.length], (alone,))])
    assert own.accept(few, few, 0.0, Aim(work, 5)) is not None, "two actions make no five micro-batches"


def test_the_plans_are_made_with_the_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """For both windows of the model, so that no layer waits for the device; also those of rows that only keep FSDP in step."""
    _, policy = twins("gemma2", torch.float64)
    draw = np.random.default_rng(0)
    trajectories = [trajectory("a", 2, draw)]
    data = (trajectories, sampled_at(trajectories, draw)[:1], *torch.ones(2, 1))

    def first_row(ranks: Ranks) -> DeviceComb:
        own = packer(policy, ranks)
        return own.micro_batches(own.rank_actions(*(data if ranks.rank == 0 else NOBODY)))[0].row

    rows = on_ranks(2, first_row)
    assert min(len(row.tokens_1T[0]) for row in rows) == 1, "no rank is idle"
    monkeypatch.setattr(policy_module, "tree_plan", None)
    for row in rows:
        policy(row)


def test_idle_ranks_run_empty_micro_batches() -> None:
    _, policy = twins("llama", torch.float64)
    draw = np.random.default_rng(0)
    trajectories = [trajectory("a", 1, draw)]
    sampled = sampled_at(trajectories, draw)[:1]
    data = (trajectories, sampled, torch.ones(1), torch.ones(1))

    def dealt(ranks: Ranks) -> list[MicroBatch]:
        own = packer(policy, ranks)
        return own.micro_batches(own.shared_out(own.rank_actions(*(data if ranks.rank == 0 else NOBODY))))

    for rank, (batch,) in enumerate(on_ranks(2, dealt)):
        assert bool(batch.weight_N.any()) == (rank == 0), "one action is not cut"
        assert (batch.computed_tokens > 0) == (batch.effective_tokens > 0) == (batch.flops > 0) == (rank == 0)
        assert torch.isfinite(policy(batch.row)).all()


def test_settings_that_cannot_hold_the_longest_path_are_refused() -> None:
    """The longest state has 17 tokens; with 8 more the path has 25, of which 24 are computed. A recorded action makes it 30 tokens."""
    longest = {"longest_state": {"id": "long", "tokens": 17}, "longest_path": {"id": "other", "tokens": 30}}
    manifest = Manifest({}, 2, 2, 2, 60, {}, stop_ids=[], files={}, **longest)

    def check(context: int, *overrides: str) -> None:
        check_budget(load(None, ["training.max_action_tokens=8", *overrides]), manifest, context)

    check(25, "training.token_budget=24", "training.max_path_tokens=25")
    check(30, "algorithm.name=sft", "training.token_budget=29", "training.max_path_tokens=30")
    for key, overrides, context in (
        ("training.token_budget=23.*long has a state of 17.*at least 24", ("training.token_budget=23",), 512),
        ("training.max_path_tokens=24.*at least 25", ("training.max_path_tokens=24",), 512),
        ("training.max_action_tokens=8.*context of 24", (), 24),
        (
            "training.token_budget=28.*other has 30 tokens.*at least 29",
            ("algorithm.name=sft", "training.token_budget=28"),
            512,
        ),
        ("tasks.max_steps=.*other has 30 tokens.*context of 29", ("algorithm.name=sft",), 29),
    ):
        with pytest.raises(ConfigError, match=key):
            check(context, *overrides)
