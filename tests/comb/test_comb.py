"""The prefix tree without a model: what is packed, how it is cut into micro-batches, and how these are dealt to ranks."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from naive.rows import all_actions, shuffled, visible
from support.random_trees import random_trunks

from swirl_fast.comb import tree as module
from swirl_fast.comb.flops import ModelSize, flops
from swirl_fast.comb.micro_batches import MicroBatchPlan, Walk, micro_batches, split_off, splits
from swirl_fast.comb.transfers import rank_groups, relieving, transfers
from swirl_fast.comb.tree import Comb, SampledState, Trunk, pack

SIZE = ModelSize(linear=1000.0, attention=((8, None), (8, 5), (4, 5)), output=300)
seeds = st.integers(0, 10**9)


def ints(text: str) -> np.ndarray:
    return np.array([ord(letter) - ord("a") + 1 for letter in text], np.int32)


def one_state(trunk: str, *actions: str) -> Trunk:
    return Trunk(ints(trunk), (SampledState(len(trunk), tuple(map(ints, actions)), tuple(range(len(actions)))),))


def prefixes(branches: list[Trunk]) -> set[tuple[int, ...]]:
    """Every token that must be computed, as the path that ends in it."""
    rows = [state + action[:-1] for state, action in all_actions(branches).values() if action]
    return {tuple(row[:n]) for row in rows for n in range(1, len(row) + 1)}


def check_walk(comb: Comb, wanted: dict[int, tuple[list[int], list[int]]]) -> None:
    """Every predicted token sees exactly its own state and action, at the right positions."""
    for a, index in enumerate(comb.indices_A):
        state, action = wanted[int(index)]
        edges = comb.edge_N[comb.offsets[a] : comb.offsets[a + 1]]
        assert comb.targets_E[edges].tolist() == action
        for k, row in enumerate(comb.rows_E[edges]):
            path = [j for j in range(row + 1) if row < comb.subtree_end_T[j]]
            assert comb.tokens_T[path].tolist() == state + action[:k]
            assert comb.depth_T[path].tolist() == list(range(len(path)))


def assert_same(one: Comb, other: Comb) -> None:
    for name in vars(one):
        assert np.array_equal(getattr(one, name), getattr(other, name)), name


def test_the_drawing_in_the_module() -> None:
    trunk = ints("abc")
    at_a = SampledState(1, (ints("xy"), ints("xz"), ints("bc")), (0, 1, 2))
    comb = pack([Trunk(trunk, (at_a, SampledState(3, (ints("d"),), (3,))))])
    assert comb.tokens_T.tolist() == ints("axbc").tolist()
    assert comb.depth_T.tolist() == [0, 1, 1, 2]
    assert comb.subtree_end_T.tolist() == [4, 2, 4, 4]
    assert comb.rows_E[comb.edge_N].tolist() == [0, 1, 0, 1, 0, 2, 3]
    assert comb.edge_N.tolist() == [1, 2, 1, 3, 0, 4, 5]
    assert comb.targets_E.tolist() == ints("bxyzcd").tolist()
    assert comb.offsets.tolist() == [0, 2, 4, 6, 7]
    assert (comb.computed_tokens, comb.effective_tokens) == (4, 3 * 3 + 4)
    assert comb.visible_pairs() == 1 + 2 + 2 + 3 and comb.visible_pairs(2) == 1 + 2 + 2 + 2


@given(seeds)
@settings(max_examples=150, deadline=None)
def test_every_prediction_sees_exactly_its_own_path(seed: int) -> None:
    branches = random_trunks(seed)
    comb = pack(branches)
    wanted = all_actions(branches)
    assert comb.indices_A.tolist() == sorted(wanted)
    assert comb.effective_tokens == sum(len(state) + len(action) for state, action in wanted.values() if action)
    check_walk(comb, wanted)


@given(seeds)
@settings(max_examples=150, deadline=None)
def test_nothing_is_computed_twice_and_nothing_in_vain(seed: int) -> None:
    branches = random_trunks(seed)
    comb = pack(branches)
    assert comb.computed_tokens == len(prefixes(branches))
    edges = {
        (*state, *action[:k], -target)
        for state, action in all_actions(branches).values()
        for k, target in enumerate(action)
    }
    assert len(comb.rows_E) == len(edges)
    assert (np.diff(comb.rows_E) >= 0).all()
    assert comb.visible_pairs() == visible(comb).sum()
    near = comb.depth_T[:, None] - comb.depth_T[None, :] < 3
    assert comb.visible_pairs(3) == (visible(comb) & near).sum()


@given(seeds)
@settings(max_examples=60, deadline=None)
def test_order_of_input_does_not_matter(seed: int) -> None:
    branches = random_trunks(seed)
    mixed = shuffled(branches, seed + 1)
    assert_same(pack(branches), pack(mixed))
    for allowed in (None, lambda fewest: fewest + 2):
        groups, others = (micro_batches(b, 40, None, SIZE, allowed) for b in (branches, mixed))
        assert [(g.tokens, g.flops) for g in groups] == [(g.tokens, g.flops) for g in others]
        for group, other in zip(groups, others, strict=True):
            assert_same(pack(group.trunks), pack(other.trunks))


@given(seeds, st.integers(33, 60), st.integers(0, 4))
@settings(max_examples=150, deadline=None)
def test_micro_batches_keep_every_action_and_the_budget(seed: int, budget: int, more: int) -> None:
    branches = random_trunks(seed)
    wanted = all_actions(branches)
    seen: list[int] = []
    fewest = len(micro_batches(branches, budget))
    groups = micro_batches(branches, budget, None, SIZE, lambda asked: asked + more)
    assert fewest <= len(groups) <= fewest + more
    for group in groups:
        comb = pack(group.trunks)
        assert comb.computed_tokens == group.tokens <= budget
        check_walk(comb, wanted)
        seen += comb.indices_A.tolist()
    assert sorted(seen) == sorted(index for index, (_, action) in wanted.items() if action)


def partitions(n: int) -> list[list[tuple[int, int]]]:
    cuts = [c for k in range(n) for c in itertools.combinations(range(1, n), k)]
    return [list(zip((0, *c), (*c, n), strict=True)) for c in cuts]


@pytest.mark.parametrize("seed", range(25))
def test_cuts_are_few_and_repeat_little(seed: int) -> None:
    """Against all ways to cut the actions in the order of the walk."""
    branches = random_trunks(seed, most=9)
    together = micro_batches(branches, 10**6)
    if not together:
        return
    ordered = walk_order(together[0])
    tokens = {
        (a, b): len(prefixes([only(branches, index) for index in ordered[a:b]]))
        for a in range(len(ordered))
        for b in range(a + 1, len(ordered) + 1)
    }
    budget = max(tokens[a, a + 1] for a in range(len(ordered))) + 4
    groups = micro_batches(branches, budget)
    best = min(
        (len(parts), sum(tokens[part] for part in parts))
        for parts in partitions(len(ordered))
        if all(tokens[part] <= budget for part in parts)
    )
    assert (len(groups), sum(group.tokens for group in groups)) == best


def walk_order(group: MicroBatchPlan) -> list[int]:
    """The actions by the packed place of their last computed token, shorter paths and lower numbers first."""
    comb = pack(group.trunks)
    last = comb.rows_E[comb.edge_N[comb.offsets[1:] - 1]]
    return [int(comb.indices_A[a]) for a in np.lexsort((comb.indices_A, last))]


def only(branches: list[Trunk], wanted: int) -> Trunk:
    state, action = all_actions(branches)[wanted]
    return Trunk(np.array(state, np.int32), (SampledState(len(state), (np.array(action, np.int32),), (wanted,)),))


def test_a_tree_above_the_budget_is_cut_along_the_trunk() -> None:
    """Two states of three actions in 8 tokens: the actions of a state stay together, and each group repeats only what it needs."""
    near = SampledState(2, tuple(map(ints, ("lmn", "opq", "rst"))), (0, 1, 2))
    far = SampledState(4, tuple(map(ints, ("uv", "wx", "yz"))), (3, 4, 5))
    groups = micro_batches([Trunk(ints("abcd"), (far, near))], 8)
    assert [sorted(i for b in g.trunks for s in b.states for i in s.indices) for g in groups] == [
        [0, 1, 2],
        [3, 4, 5],
    ]
    assert [group.tokens for group in groups] == [2 + 3 * 2, 4 + 3 * 1]


def test_too_long_for_the_budget_or_the_path() -> None:
    branch = one_state("abcdefgh", "ijk")
    assert micro_batches([branch], 10, 11)[0].tokens == 10
    with pytest.raises(ValueError, match="training.token_budget=9; set it to at least 10"):
        micro_batches([branch], 9)
    with pytest.raises(ValueError, match="8 tokens with an action of 3 .*max_path_tokens=10 .*at least 11"):
        micro_batches([branch], 100, 10)


def test_bad_branches_are_refused() -> None:
    tokens = ints("abcdefgh")
    with pytest.raises(ValueError, match="9 tokens does not lie on its trunk of 8"):
        pack([Trunk(tokens, (SampledState(9, (tokens[:1],), (0,)),))])
    with pytest.raises(ValueError, match="0 tokens does not lie"):
        pack([Trunk(tokens, (SampledState(0, (tokens[:1],), (0,)),))])
    with pytest.raises(ValueError, match="two actions carry the number 0"):
        pack([one_state("ab", "c"), one_state("ab", "d")])


def test_without_actions_there_is_nothing() -> None:
    nothing = [one_state("ab", ""), Trunk(ints("cd"), ())]
    assert micro_batches(nothing, 8) == [] == micro_batches([], 8, allowed=lambda fewest: fewest + 3)
    assert split_off(nothing, [1.0, 2.0]) == ([], [[], []])
    comb = pack(nothing)
    assert (comb.computed_tokens, len(comb.edge_N), comb.offsets.tolist()) == (0, 0, [0, 0])


def test_renumbered() -> None:
    assert list(all_actions([one_state("ab", "c", "d").renumbered([7, 5])])) == [7, 5]


def test_flops_are_those_of_the_matrix_products() -> None:
    """Counted pair by pair on a path of 7 tokens with 3 edges."""
    comb = pack([one_state("abcde", "fgh")])
    pairs = {window: sum(min(i + 1, window or 99) for i in range(7)) for window in (None, 5)}
    forward = 2 * 1000 * 7 + 2 * 300 * 3 + 4 * (8 * pairs[None] + (8 + 4) * pairs[5])
    assert comb.flops(SIZE) == 3 * forward
    assert micro_batches([one_state("abcde", "fgh")], 100, None, SIZE)[0].flops == 3 * forward
    assert flops(ModelSize(2.0), 5.0, 9.0, lambda window: 0.0) == 6 * 2 * 5


@pytest.mark.parametrize("seed", range(10))
def test_estimates_before_packing_are_close(seed: int) -> None:
    for group in micro_batches(random_trunks(seed), 60, None, SIZE):
        assert group.flops == pytest.approx(pack(group.trunks).flops(SIZE), rel=0.15)


def search_branches(trajectories: int, states: int, samples: int, scale: int = 1) -> list[Trunk]:
    """The shape of search questions: prompt 400, action 120, result 600 tokens, all divided by `scale`. Half of a state's samples begin
    alike."""
    draw = np.random.default_rng(0)
    prompt, action, result = 400 // scale, 120 // scale, 600 // scale
    branches: list[Trunk] = []
    for t in range(trajectories):
        trunk = draw.integers(1, 1000, prompt + (states - 1) * (action + result)).astype(np.int32)
        at = []
        for i in range(states):
            actions = draw.integers(1, 1000, (samples, action)).astype(np.int32)
            actions[::2, : action // 3] = actions[0, : action // 3]
            first = (t * states + i) * samples
            at.append(
                SampledState(prompt + i * (action + result), tuple(actions), tuple(range(first, first + samples)))
            )
        branches.append(Trunk(trunk, tuple(at)))
    return branches


@pytest.mark.parametrize("sharing", [True, False])
@given(seeds, st.lists(st.floats(0, 1), max_size=3))
@settings(max_examples=100, deadline=None)
def test_what_is_cut_off_and_what_is_kept_are_all(sharing: bool, seed: int, shares: list[float]) -> None:
    branches = random_trunks(seed)
    wanted = {index: both for index, both in all_actions(branches).items() if both[1]}
    whole = Walk.of(branches, SIZE, sharing)
    total = whole.flops(0, len(whole.actions))
    kept, given = split_off(branches, [share * total for share in shares], SIZE, sharing)
    found: dict[int, tuple[list[int], list[int]]] = {}
    for part in (kept, *given):
        assert not found.keys() & all_actions(part).keys()
        found |= all_actions(part)
    assert found == wanted and len(given) == len(shares)


@pytest.mark.parametrize(("trajectories", "ranks"), [(4, 2), (24, 4), (48, 3)])
def test_ranks_get_equal_work(trajectories: int, ranks: int) -> None:
    """The first ranks have trajectories of one state, the last those of five."""
    branches = search_branches(trajectories, 5, 4, scale=10)
    each = trajectories // ranks
    of_ranks = [
        [
            Trunk(branch.tokens, branch.states[: 1 + 4 * rank // (ranks - 1)])
            for branch in branches[rank * each :][:each]
        ]
        for rank in range(ranks)
    ]

    before = works(of_ranks)
    after = works(shared_out(of_ranks, rounds=1))
    largest = max(group.flops for branch in branches for group in micro_batches([branch], 10**6, None, SIZE))
    assert max(before) > 1.3 * np.mean(before) and max(after) < np.mean(after) + largest / 2
    assert sum(after) < 1.1 * sum(before), "hardly a path is computed twice"


def works(of_ranks: list[list[Trunk]]) -> list[float]:
    return [sum(group.flops for group in micro_batches(own, 10**6, None, SIZE)) for own in of_ranks]


def shared_out(of_ranks: list[list[Trunk]], rounds: int) -> list[list[Trunk]]:
    of_ranks = list(of_ranks)
    for _ in range(rounds):
        planned = transfers(works(of_ranks))
        for giver in {one.giver for one in planned}:
            own = [one for one in planned if one.giver == giver]
            of_ranks[giver], given = split_off(of_ranks[giver], [one.work for one in own], SIZE)
            for one, part in zip(own, given, strict=True):
                of_ranks[one.taker] = of_ranks[one.taker] + part
    return of_ranks


def test_one_tree_is_cut_for_ranks_that_would_idle() -> None:
    """Four ranks share what fits into one micro-batch; what keeps them from a quarter is the trunk, which each needs."""
    branches = search_branches(1, 5, 16, scale=10)
    (whole,) = micro_batches(branches, 2048, None, SIZE)
    parts = shared_out([branches, [], [], []], rounds=2)
    tokens = [micro_batches(part, 2048, None, SIZE)[0].tokens for part in parts]
    assert len(branches[0].tokens) < min(tokens) and max(tokens) < 0.7 * whole.tokens


@given(st.lists(st.floats(0, 100), max_size=40))
@settings(max_examples=150, deadline=None)
def test_transfers_even_out(work: list[float]) -> None:
    planned = transfers(work, slack=0.0)
    after = list(work)
    for giver, taker, moved in planned:
        assert moved > 0 and work[giver] > work[taker]
        after[giver] -= moved
        after[taker] += moved
    assert len(planned) < max(1, len(work))
    assert after == pytest.approx([sum(work) / max(1, len(work))] * len(work), abs=1e-9)


def test_small_transfers_are_left_out() -> None:
    assert transfers([100.0, 101.5, 98.5]) == []
    assert transfers([1.0, 3.0], [5, 9]) == [(9, 5, 1.0)]
    assert transfers([110.0, 100.0, 90.0]) == [(0, 2, pytest.approx(10.0))]
    assert transfers([]) == transfers([0.0, 0.0]) == []


def test_those_with_too_much_are_relieved_by_those_with_little_others_in_every_turn() -> None:
    work, ranks = [110.0, 100.0, 106.0, 90.0, 103.0, 91.0, 95.0], [7, 6, 5, 4, 3, 2, 1]
    assert relieving(work, ranks, 100.0, 0) == [(7, 4, 10.0), (5, 2, 6.0)], "103 is not too much"
    assert relieving(work, ranks, 100.0, 1) == [(7, 1, 5.0), (5, 4, 6.0)]
    assert relieving([*work, 92.0], [*ranks, 0], 100.0, 1) == [(7, 1, 5.0), (5, 4, 6.0)]
    for takers in range(1, 10):
        asked = {
            relieving([110.0, *[90.0] * takers], range(takers + 1), 100.0, turn)[0].taker for turn in range(takers)
        }
        assert asked == set(range(1, takers + 1)), "in the end all are asked"
    assert relieving([100.0, 101.0], [0, 1], 100.0, 0) == relieving([120.0], [0], 100.0, 0) == []


@given(seeds, st.floats(0.05, 0.9))
@settings(max_examples=50, deadline=None)
def test_every_way_to_split_keeps_all_actions(seed: int, share: float) -> None:
    branches = random_trunks(seed)
    whole = Walk.of(branches, SIZE)
    wanted = {index: both for index, both in all_actions(branches).items() if both[1]}
    work = share * whole.flops(0, len(whole.actions))
    ways = [(all_actions(kept), all_actions(part)) for kept, part in splits(branches, work, SIZE)]
    assert all(kept | part == wanted and not kept.keys() & part.keys() and part for kept, part in ways)
    assert len({frozenset(part) for _, part in ways}) == len(ways), "no way comes twice"
    if ways:
        kept, (given,) = split_off(branches, [work], SIZE)
        assert (all_actions(kept), all_actions(given)) == ways[0]


@pytest.mark.parametrize(("ranks", "sizes"), [(1, [1]), (256, [256]), (384, [192, 2]), (4096, [256, 16]), (509, [509])])
def test_rank_groups(ranks: int, sizes: list[int]) -> None:
    """Every rank is in one group of each partition, and a number reaches everybody over the groups."""
    found = rank_groups(ranks)
    assert [len(groups[0]) for groups in found] == sizes
    reached = {0}
    for groups in found:
        assert sorted(rank for group in groups for rank in group) == list(range(ranks))
        reached |= {rank for group in groups if reached & set(group) for rank in group}
    assert len(reached) == ranks


def test_a_stretch_from_the_middle_costs_nothing_twice() -> None:
    """Of three trajectories without a common beginning the second is a third of the work: it leaves whole."""
    branches = [one_state(f"{prompt}bcde", *(f"{prompt}{tooth}xy" for tooth in "pqr")) for prompt in "klm"]
    numbered = [branch.renumbered(range(3 * i, 3 * i + 3)) for i, branch in enumerate(branches)]
    total = sum(group.flops for group in micro_batches(numbered, 1000, None, SIZE))
    kept, (given,) = split_off(numbered, [total / 3], SIZE)
    assert len(given) == 1 and len(kept) == 2
    assert sum(works([kept, given])) == pytest.approx(total)


def test_packing_reads_every_token_a_few_times(monkeypatch: pytest.MonkeyPatch) -> None:
    """Work, not time: tokens compared and calls made stay proportional to trunks and teeth, not to states times samples times length."""
    branches = search_branches(4, 10, 16)
    calls, compared = 0, 0
    original = module.common_prefix

    def counting(a: np.ndarray, b: np.ndarray) -> int:
        nonlocal calls, compared
        calls += 1
        compared += min(len(a), len(b))
        return original(a, b)

    monkeypatch.setattr(module, "common_prefix", counting)
    comb = pack(branches)
    tokens = sum(len(branch.tokens) + sum(len(a) for s in branch.states for a in s.actions) for branch in branches)
    assert comb.effective_tokens > 20 * tokens
    assert compared < tokens
    assert calls < 4 * len(all_actions(branches))
