"""Rows that share nothing: what they hold, how they are cut, and that loss and gradients are those of the comb."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from naive.agreement import TOLERANCE, assert_equal_to_rows, assert_same_gradients, by_action, losses
from naive.rows import all_actions
from support.random_trees import random_trunks
from support.small_models import build

from swirl_fast.comb.rows import pack_rows, row_batches
from swirl_fast.comb.tree import SampledState, Trunk, pack
from swirl_fast.models.policy import DeviceComb, Policy, model_size
from swirl_fast.models.rows import RowsPolicy

SIZE = model_size(build("llama"))


@pytest.mark.parametrize("padded", [False, True])
@given(st.integers(0, 10**9))
def test_a_row_is_a_state_and_its_action(padded: bool, seed: int) -> None:
    trunks = random_trunks(seed)
    wanted = all_actions(trunks)
    comb = pack_rows(trunks, padded)
    assert comb.indices_A.tolist() == sorted(wanted)
    rows = {index: [*state, *action[:-1]] for index, (state, action) in sorted(wanted.items()) if action}
    longest = max(map(len, rows.values()), default=0)
    widths = [longest if padded else len(row) for row in rows.values()]
    filled = [[*row, *[0] * (width - len(row))] for row, width in zip(rows.values(), widths, strict=True)]
    assert comb.tokens_T.tolist() == sum(filled, [])
    assert comb.depth_T.tolist() == [depth for width in widths for depth in range(width)]
    assert comb.subtree_end_T.tolist() == np.repeat(np.cumsum(widths, dtype=int), widths).tolist()
    assert comb.effective_tokens == sum(len(row) + 1 for row in rows.values())
    for index, start in zip(rows, np.cumsum([0, *widths])[:-1] if widths else [], strict=True):
        state, action = wanted[index]
        a = comb.indices_A.tolist().index(index)
        edges = comb.edge_N[comb.offsets[a] : comb.offsets[a + 1]]
        assert comb.targets_E[edges].tolist() == action
        assert comb.rows_E[edges].tolist() == [start + len(state) - 1 + i for i in range(len(action))]
    assert len(np.unique(comb.edge_N)) == comb.offsets[-1], "no edge belongs to two actions"


@pytest.mark.parametrize("padded", [False, True])
@given(st.integers(0, 10**9), st.sampled_from([35, 60, 200]), st.sampled_from([1, 2, 3]))
def test_cuts_hold_every_row_once_and_keep_to_the_budget(padded: bool, seed: int, budget: int, ranks: int) -> None:
    trunks = random_trunks(seed)
    wanted = {index: both for index, both in all_actions(trunks).items() if both[1]}
    allowed = None if ranks == 1 else lambda fewest: -(-fewest // ranks) * ranks
    plans = row_batches(trunks, budget, None, SIZE, allowed, padded)
    reversed_ = row_batches(trunks[::-1], budget, None, SIZE, allowed, padded)
    assert [list(all_actions(list(p.trunks))) for p in plans] == [list(all_actions(list(p.trunks))) for p in reversed_]
    found: dict[int, tuple[list[int], list[int]]] = {}
    for plan in plans:
        comb = pack_rows(plan.trunks, padded)
        assert plan.tokens == comb.computed_tokens <= budget
        assert plan.flops == pytest.approx(comb.flops(SIZE))
        assert not found.keys() & all_actions(list(plan.trunks)).keys()
        found |= all_actions(list(plan.trunks))
    assert found == wanted


def test_rows_of_unlike_lengths_are_not_padded_to_the_longest() -> None:
    """Two micro-batches compute 8,100 tokens; one would compute twice as many."""
    lengths = (8000, 50, 50)
    trunks = [
        Trunk(np.ones(length, np.int32), (SampledState(length, (np.ones(1, np.int32),), (i,)),))
        for i, length in enumerate(lengths)
    ]
    assert [plan.tokens for plan in row_batches(trunks, 32_000, padded=True)] == [8000, 100]
    assert [plan.tokens for plan in row_batches(trunks, 32_000)] == [8100]
    for padded in (False, True):
        plans = row_batches(
            [*trunks[1:], *(trunk.renumbered([2, 3, 4]) for trunk in trunks[1:])],
            32_000,
            allowed=lambda _: 2,
            padded=padded,
        )
        assert [plan.tokens for plan in plans] == [100, 100], "no rank is idle"


def test_a_row_longer_than_the_budget_is_refused_with_its_numbers() -> None:
    trunk = Trunk(np.ones(30, np.int32), (SampledState(30, (np.ones(4, np.int32),), (0,)),))
    with pytest.raises(
        ValueError, match="state of 30 tokens with an action of 4 exceeds training.token_budget=32.* at least 33"
    ):
        row_batches([trunk], 32)
    with pytest.raises(ValueError, match="max_path_tokens=33"):
        row_batches([trunk], 64, 33)
    twice = Trunk(trunk.tokens, (*trunk.states, *trunk.states))
    with pytest.raises(ValueError, match="same number"):
        pack_rows([twice])


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_rows_equal_the_comb(dtype: torch.dtype) -> None:
    """Packed, padded and shared: log-probs, loss and every gradient of one model."""
    naive = build("llama", dtype)
    policies = [Policy(copy.deepcopy(naive), 0.8), Policy(copy.deepcopy(naive), 0.8, sharing=False)]
    policies.append(RowsPolicy(copy.deepcopy(naive), 0.8))
    naive.set_attn_implementation("naive")
    for policy in policies:
        policy.model.set_attn_implementation("naive" if policy.padded and dtype == torch.float64 else policy.attention)
    for seed in range(3):
        trunks = random_trunks(seed, vocab=97)
        combs = [pack(trunks), pack_rows(trunks), pack_rows(trunks, padded=True)]
        for policy, comb in zip(policies, combs, strict=True):
            assert_equal_to_rows(naive, policy, trunks, TOLERANCE[dtype], comb)
        for policy in policies[1:]:
            assert_same_gradients(policies[0].model, policy.model, 2 * TOLERANCE[dtype], 1e-6)


def test_micro_batches_of_rows_add_up() -> None:
    whole, parts = Policy(build("llama"), sharing=False), RowsPolicy(build("llama"))
    parts.model.set_attn_implementation("naive")
    trunks = random_trunks(3, vocab=97)
    comb = pack_rows(trunks)
    losses(by_action(comb, whole(DeviceComb.of(comb)))).backward()
    plans = row_batches(trunks, 30, padded=True)
    assert len(plans) > 2
    for plan in plans:
        comb = pack_rows(plan.trunks, padded=True)
        losses(by_action(comb, parts(DeviceComb.of(comb)))).backward()
    assert_same_gradients(whole.model, parts.model, 1e-10, 1e-13)
