"""The local engine's tree of prefixes, its pool of keys and values, and the order in which rows read them."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from swirl_fast.engines.local.attention import arrange
from swirl_fast.engines.local.prefix_cache import PrefixCache


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.lists(st.integers(0, 2), max_size=12)), max_size=25), st.integers(0, 30))
def test_the_tree_gives_every_prefix_its_own_slots(operations, cache_tokens):
    """Each slot is written with the hash of its whole prefix; whatever the tree calls known must read back the same."""
    cache = PrefixCache(cache_tokens, torch.device("cpu"))
    cache.advance([])
    for new_round, prompt in operations:
        if new_round:
            cache.trim()
            assert len(cache) <= cache_tokens
            cache.advance([])
        path = np.array(prompt, np.int64)
        node, slots, known = cache.insert(path)
        assert len(slots) == len(path) and len(set(slots.tolist())) == len(path) and 0 <= known <= len(path)
        marks = torch.tensor([float(hash(tuple(prompt[: i + 1])) % 2**20) for i in range(len(prompt))])
        if known < len(path):
            new = torch.as_tensor(slots[known:])
            cache.write(0, new, marks[None, known:, None], -marks[None, known:, None])
        if len(path):
            keys, values = cache.read(0, cache.locate(slots))
            assert torch.equal(keys[0, :, 0], marks) and torch.equal(values, -keys)
            again = cache.insert(path)
            assert again[0] is node and again[2] == len(path) and (again[1] == slots).all()
        held = sum(len(n.slots) for n in cache._nodes())
        assert held == len(cache), "slots are lost or doubled"


def test_the_least_recently_used_leaves_first_and_what_is_in_use_stays():
    cache = PrefixCache(10, torch.device("cpu"))

    def insert(prompt: list[int], grow: bool = True) -> tuple[int, int]:
        cache.advance([])
        _, slots, known = cache.insert(np.array(prompt), grow)
        return known, len(slots)

    assert insert([1, 2, 3, 4]) == (0, 4)
    assert insert([1, 2, 5]) == (2, 3)
    assert insert([7, 8, 9]) == (0, 3)
    assert insert([1, 2, 3, 4]) == (4, 4)
    assert insert([6, 6, 6]) == (0, 3)  # 8 held, room for 2: the 5 leaves
    assert insert([1, 2, 5], grow=False) == (2, 3)  # and comes back for the 9
    assert insert([7, 8, 9], grow=False)[0] == 2
    node, slots, _ = cache.insert(np.array([7, 8, 9]))
    cache.advance([node])
    assert len(cache.insert(np.arange(100, 120), grow=False)[1]) == 10 - 3
    assert (cache.insert(np.array([7, 8, 9]))[1] == slots).all()
    cache.insert(np.arange(200, 220))  # the round's own tokens stay as well: the pool grows
    assert len(cache) == 3 + 7 + 20
    cache.trim()
    assert len(cache) == 10


def test_a_growing_pool_keeps_what_it_holds():
    cache = PrefixCache(3000, torch.device("cpu"))
    cache.advance([])
    written = {}
    for first, length in ((1, 400), (2, 300), (3, 1500), (4, 700)):
        path = np.full(length, first)
        slots = cache.insert(path)[1]
        written[first] = slots
        mark = torch.full((2, length, 1), float(first))
        cache.write(0, torch.as_tensor(slots), mark, -mark)
        assert cache.keys[0].shape[1] <= 3000
    for first, slots in written.items():
        keys, values = cache.read(0, cache.locate(slots))
        assert (keys == first).all() and (values == -first).all() and keys.shape == (2, len(slots), 1)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.integers(0, 2), max_size=8), min_size=1, max_size=10), st.integers(1, 12))
def test_an_arrangement_reads_every_key_of_a_row_once(prompts, block_tokens):
    cache = PrefixCache(1000, torch.device("cpu"))
    paths = [cache.insert(np.array(prompt, np.int64))[1] for prompt in sorted(prompts)]
    blocks, rest = arrange(paths, block_tokens)
    depths = [own.tolist() for own in rest]
    columns: list[list[int]] = [[] for _ in paths]
    for block in blocks:
        for row in range(block.lo, block.hi):
            assert (paths[row][block.depths] == paths[block.lo][block.depths]).all()
            depths[row] += block.depths.tolist()
            columns[row] += range(block.column, block.column + len(block.depths))
    for row, path in enumerate(paths):
        assert sorted(depths[row]) == list(range(len(path)))
        assert len(columns[row]) == len(set(columns[row])), "two blocks of a row write the same scores"
