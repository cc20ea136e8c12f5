"""Invariant 1: comb == packed == padded == one row at a time, loss and every gradient."""

from __future__ import annotations

import copy
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from naive.rows import padded_rows, separate_rows, side_by_side
from small_models import SHAPE, build

from swirl_fast.comb import Branch, Comb, SampledState, micro_batches, pack
from swirl_fast.policy import PackedRow, Policy

V = SHAPE["vocab_size"]


def branches_of(seed: int, vocab: int = V, longest: int = 14, allow_empty: bool = True) -> list[Branch]:
    """Random trajectories that share prefixes: a small alphabet at the front makes their trunks a tree."""
    draw = random.Random(seed)
    root = [draw.randrange(1, vocab) for _ in range(draw.randint(1, longest))]
    branches, number = [], 0
    for _ in range(draw.randint(1, 4)):
        kept = root[: draw.randint(0, len(root))]
        trunk = np.array(
            [*kept, *(draw.randrange(1, vocab) for _ in range(draw.randint(0 if kept else 1, longest)))], np.int32
        )
        states = []
        for length in sorted({draw.randint(1, len(trunk)) for _ in range(draw.randint(1, 3))}):
            sizes = [draw.randint(0 if allow_empty else 1, 5) for _ in range(draw.randint(0, 3))]
            actions = tuple(np.array([draw.randrange(1, vocab) for _ in range(n)], np.int32) for n in sizes)
            states.append(SampledState(length, actions, tuple(range(number, number + len(actions)))))
            number += len(actions)
        branches.append(Branch(trunk, tuple(states)))
    return branches


def expected(branches: list[Branch]) -> dict[int, tuple[list[int], list[int]]]:
    return {
        index: (branch.trunk[: state.length].tolist(), action.tolist())
        for branch in branches
        for state in branch.states
        for action, index in zip(state.actions, state.indices, strict=True)
    }


def check_walk(comb: Comb, wanted: dict[int, tuple[list[int], list[int]]]) -> None:
    """Every predicted token sees exactly its own state and action, at the right positions."""
    for a, index in enumerate(comb.indices_A):
        state, action = wanted[int(index)]
        rows = comb.rows_N[comb.offsets[a] : comb.offsets[a + 1]]
        assert comb.targets_N[comb.offsets[a] : comb.offsets[a + 1]].tolist() == action
        for k, row in enumerate(rows):
            path = [j for j in range(row + 1) if row < comb.subtree_end_T[j]]
            assert comb.tokens_T[path].tolist() == state + action[:k]
            assert comb.depth_T[path].tolist() == list(range(len(path)))


@given(st.integers(0, 10**9))
@settings(max_examples=150, deadline=None)
def test_every_prediction_sees_exactly_its_own_path(seed: int) -> None:
    branches = branches_of(seed, vocab=3)
    comb = pack(branches)
    wanted = expected(branches)
    assert comb.indices_A.tolist() == sorted(wanted)
    assert comb.effective_tokens == sum(len(state) + len(action) for state, action in wanted.values())
    check_walk(comb, wanted)


@given(st.integers(0, 10**9), st.integers(20, 40))
@settings(max_examples=150, deadline=None)
def test_micro_batches_keep_every_action_and_the_budget(seed: int, budget: int) -> None:
    branches = branches_of(seed, vocab=3)
    wanted = expected(branches)
    seen: list[int] = []
    for group in micro_batches(branches, max(budget, 33)):
        comb = pack(group)
        assert comb.computed_tokens <= max(budget, 33)
        check_walk(comb, wanted)
        seen += comb.indices_A.tolist()
    assert sorted(seen) == sorted(wanted)


def test_order_of_branches_does_not_matter() -> None:
    branches = branches_of(5)
    one, other = pack(branches), pack(branches[::-1])
    for name in vars(one):
        assert np.array_equal(getattr(one, name), getattr(other, name)), name


def test_budget_too_small_and_state_outside_its_trunk() -> None:
    tokens = np.arange(1, 9, dtype=np.int32)
    branch = Branch(tokens, (SampledState(8, (tokens[:3],), (0,)),))
    with pytest.raises(ValueError, match="at least 11"):
        micro_batches([branch], 10)
    with pytest.raises(ValueError, match="9 tokens does not lie on its trunk of 8"):
        pack([Branch(tokens, (SampledState(9, (tokens[:1],), (0,)),))])


def losses(logprobs: dict[int, torch.Tensor]) -> torch.Tensor:
    """A loss in which every token has a weight of its own."""
    return sum(
        (logp * torch.linspace(0.5 + index, 1.5 - index, len(logp), dtype=logp.dtype).sin()).sum()
        for index, logp in logprobs.items()
    )


def by_action(comb: Comb, logp_N: torch.Tensor) -> dict[int, torch.Tensor]:
    return {int(i): logp_N[comb.offsets[a] : comb.offsets[a + 1]] for a, i in enumerate(comb.indices_A)}


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma2"])
@pytest.mark.parametrize("way", ["comb", "packed", "padded", "one_at_a_time", "micro_batches"])
def test_loss_and_every_gradient_equal_separate_rows(kind: str, way: str) -> None:
    naive = build(kind)
    model = copy.deepcopy(naive)
    naive.set_attn_implementation("naive")
    policy = Policy(model, temperature=0.8)
    for seed in range(4):
        branches = branches_of(seed, allow_empty=False)
        if not expected(branches):
            continue
        naive.zero_grad()
        model.zero_grad()
        wanted = separate_rows(naive, branches, 0.8)
        wanted_loss = losses(wanted)
        wanted_loss.backward()
        if way == "padded":
            model.set_attn_implementation("naive")
            found = padded_rows(model, branches, 0.8)
        else:
            groups = micro_batches(branches, 34) if way == "micro_batches" else [branches]
            combs = [pack(group) for group in groups]
            if way in ("packed", "one_at_a_time"):
                combs = [
                    pack([Branch(branch.trunk, (SampledState(state.length, (action,), (index,)),))])
                    for branch in branches
                    for state in branch.states
                    for action, index in zip(state.actions, state.indices, strict=True)
                ]
            if way == "packed":
                combs = [side_by_side(combs)]
            found = {}
            for comb in combs:
                found.update(by_action(comb, policy(PackedRow.of(comb))))
        loss = losses(found)
        loss.backward()
        assert found.keys() == wanted.keys()
        for index in wanted:
            torch.testing.assert_close(found[index], wanted[index], rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(loss, wanted_loss, rtol=1e-10, atol=1e-10)
        for (name, parameter), other in zip(naive.named_parameters(), model.parameters(), strict=True):
            gap = (parameter.grad - other.grad).norm() / parameter.grad.norm().clamp(min=1e-12)
            assert gap < 1e-9, f"{name}: relative gradient difference {gap:.1e}"


def test_fp32_and_tokens_saved() -> None:
    """The shape the comb is for: one trunk, several states, several samples of each."""
    draw = np.random.default_rng(0)
    trunk = draw.integers(1, V, 120).astype(np.int32)
    states = tuple(
        SampledState(
            40 * (i + 1),
            tuple(draw.integers(1, V, 12).astype(np.int32) for _ in range(4)),
            tuple(range(4 * i, 4 * i + 4)),
        )
        for i in range(3)
    )
    branches = [Branch(trunk, states)]
    naive = build("llama", torch.float32)
    model = copy.deepcopy(naive)
    naive.set_attn_implementation("naive")
    comb = pack(branches)
    assert comb.computed_tokens == 120 + 12 * 12
    assert comb.effective_tokens == 4 * (40 + 80 + 120) + 12 * 12
    losses(separate_rows(naive, branches)).backward()
    losses(by_action(comb, Policy(model)(PackedRow.of(comb)))).backward()
    for (name, parameter), other in zip(naive.named_parameters(), model.parameters(), strict=True):
        gap = (parameter.grad - other.grad).norm() / parameter.grad.norm()
        assert gap < 1e-5, f"{name}: relative gradient difference {gap:.1e}"


def test_gradient_checkpointing_changes_nothing() -> None:
    branches = branches_of(3, allow_empty=False)
    comb = pack(branches)
    gradients = []
    for checkpointing in (False, True):
        model = build("gemma2")
        policy = Policy(model)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            model.train()
        losses(by_action(comb, policy(PackedRow.of(comb)))).backward()
        gradients.append([p.grad for p in model.parameters()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_models_that_cannot_be_exact_are_refused_by_name() -> None:
    from swirl_fast.config import ConfigError

    model = build("llama")
    model.config.attention_dropout = 0.1
    with pytest.raises(ConfigError, match="llama.*attention_dropout=0.1"):
        Policy(model)
    model.config.attention_dropout = 0.0
    model.config.layer_types = ["full_attention", "linear_attention"]
    with pytest.raises(ConfigError, match="linear_attention"):
        Policy(model)
