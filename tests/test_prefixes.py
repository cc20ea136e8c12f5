"""The order of prompts, run on a model of SGLang's prefix cache: a prompt can be found when it is done, not before."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from swirl_fast.prefixes import WORTH, WarmGroup, cacheable, warm_order


class Cache:
    """All prefixes of all prompts that are done."""

    def __init__(self) -> None:
        self.prefixes: set[tuple[int, ...]] = set()

    def add(self, prompt: np.ndarray) -> None:
        tokens = tuple(prompt.tolist())
        self.prefixes |= {tokens[:length] for length in range(1, len(tokens) + 1)}

    def match(self, prompt: np.ndarray) -> int:
        tokens = tuple(prompt.tolist())
        return next((length for length in range(len(tokens), 0, -1) if tokens[:length] in self.prefixes), 0)

    def compute(self, together: list[np.ndarray]) -> int:
        """Sends prompts at a time; returns how many tokens were computed."""
        computed = sum(len(prompt) - self.match(prompt) for prompt in together)
        for prompt in together:
            self.add(prompt)
        return computed


def run(groups: list[WarmGroup], prompts: list[np.ndarray], cache: Cache) -> int:
    """All groups side by side, one wave after the other: the prompts to warm, then those that are ready with the next ones."""
    computed = cache.compute([prompts[group.warm] for group in groups if group.warm is not None])
    ready = [(i, known) for group in groups for i, known in group.ready]
    for i, known in ready:
        assert known <= cache.match(prompts[i]), "it is said to be computed by then"
    later = [one for group in groups for one in group.later]
    wave = [prompts[i] for i, _ in ready]
    if later:  # they are sent with the first of the next wave, at the latest
        computed += cache.compute([*wave, *(prompts[group.warm] for group in later if group.warm is not None)])
        return computed + run(later, prompts, cache)
    return computed + cache.compute(wave)


def numbers(groups: list[WarmGroup]) -> list[int]:
    return [i for group in groups for i in [*(i for i, _ in group.ready), *numbers(group.later)]]


def distinct(prompts: list[np.ndarray]) -> int:
    cache = Cache()
    for prompt in prompts:
        cache.add(prompt)
    return len(cache.prefixes)


@st.composite
def forests(draw) -> tuple[list[np.ndarray], list[int]]:
    """Prompts that branch off each other at any place, in any order; lengths and places on both sides of WORTH."""
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    prompts: list[np.ndarray] = []
    for _ in range(draw(st.integers(1, 12))):
        start = np.zeros(0, np.int64)
        if prompts and draw(st.booleans()):
            parent = prompts[draw(st.integers(0, len(prompts) - 1))]
            start = parent[: draw(st.integers(0, len(parent)))]
        new = random.integers(0, 50, draw(st.sampled_from([0, 1, 5, WORTH - 1, WORTH, WORTH + 1, 70])))
        prompt = np.concatenate([start, new])
        prompts.append(prompt if len(prompt) else random.integers(0, 50, 3))
    order = random.permutation(len(prompts))
    samples = [draw(st.sampled_from([1, 2, 8])) for _ in prompts]
    return [prompts[i] for i in order], samples


@given(forests())
@settings(max_examples=200, deadline=None)
def test_what_prompts_share_is_computed_once(forest: tuple[list[np.ndarray], list[int]]) -> None:
    """A prompt is either ready, with less than WORTH left to compute, or warmed, and then what it shares with those of other runs beyond
    what is known of it is less than WORTH: so each but one computes at most WORTH - 1 tokens that others compute too."""
    prompts, samples = forest
    groups = warm_order(prompts, samples, [0] * len(prompts))
    assert sorted(numbers(groups)) == list(range(len(prompts)))
    computed = run(groups, prompts, Cache())
    assert distinct(prompts) <= computed <= distinct(prompts) + (WORTH - 1) * (len(prompts) - 1)


@given(forests(), st.data())
@settings(max_examples=200, deadline=None)
def test_what_is_known_is_not_warmed_again(forest: tuple[list[np.ndarray], list[int]], data: st.DataObject) -> None:
    """With some prompts done before, no more is computed than what is new, and the same bound."""
    prompts, samples = forest
    cache = Cache()
    for prompt in prompts:
        if data.draw(st.booleans()):
            cache.add(prompt[: data.draw(st.integers(0, len(prompt)))])
    known = [cache.match(prompt) for prompt in prompts]
    new = distinct([*prompts]) - len(cache.prefixes)
    groups = warm_order(prompts, samples, known)
    assert sorted(numbers(groups)) == list(range(len(prompts)))
    assert run(groups, prompts, cache) <= new + (WORTH - 1) * (len(prompts) - 1)
    if all(len(prompt) - k < WORTH for prompt, k in zip(prompts, known, strict=True)):
        assert all(group.warm is None and not group.later for group in groups)


def test_nested_states_need_one_warming() -> None:
    trunk = np.arange(1000)
    states = [trunk[:length] for length in (600, 200, 1000, 400, 800)]
    (group,) = warm_order(states, [8] * 5, [0] * 5)
    assert group.warm == 2 and not group.later
    assert sorted(group.ready) == [(0, 600), (1, 200), (2, 1000), (3, 400), (4, 800)]
    cache = Cache()
    assert run([group], states, cache) == 1000 < Cache().compute(states) == 3000


def test_trajectories_of_one_question() -> None:
    """The question is computed once, then each trajectory's own part once, side by side."""
    question = np.arange(300)
    trunks = [np.concatenate([question, np.arange(500) + 1000 * t]) for t in (1, 2, 3)]
    states = [trunk[:length] for trunk in trunks for length in (300, 500, 700)]
    (group,) = warm_order(states, [8] * 9, [0] * 9)
    assert group.warm is not None and len(group.later) == 2 and all(one.warm is not None for one in group.later)
    assert run([group], states, Cache()) == 300 + 3 * 400 < Cache().compute(states) == 3 * 1500


def test_strangers_wait_for_nobody() -> None:
    prompts = [np.arange(100) + 1000 * i for i in range(4)]
    groups = warm_order(prompts, [1] * 4, [0] * 4)
    assert [group.ready for group in groups] == [[(i, 0)] for i in range(4)]
    assert all(group.warm is None and not group.later for group in groups)


@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=6), max_size=8))
@settings(max_examples=200, deadline=None)
def test_cacheable_by_brute_force(prompts: list[list[int]]) -> None:
    """All prefixes without the last token, less the distinct ones: those must be computed once."""
    cut = [tuple(prompt[:-1]) for prompt in prompts]
    once = {one[:length] for one in cut for length in range(1, len(one) + 1)}
    assert cacheable(prompts) == sum(map(len, cut)) - len(once)
    assert cacheable([np.asarray(prompt) for prompt in prompts]) == cacheable(prompts[::-1])
