"""Which server a request goes to, and in what order, so that the prefix cache is used."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
from support.sglang_cases import (
    MANY,
    ask,
    assert_from,
    changed,
    nested,
    original,
    prompt,
    request,
    until,
)

from swirl_fast.engines.engine import Request, Sampling


def test_states_of_a_trajectory_meet_one_server_the_longest_first_and_alone(serve, attach, model: Path) -> None:
    servers = [serve(), serve()]
    engine = attach(*servers)
    requests = [one for states in zip(*(nested(t) for t in range(6)), strict=True) for one in states]  # mixed
    assert_from(engine.generate(requests), requests, original(model), 0)
    seen = {}
    for server in servers:
        for entry in server.fake.of("/generate"):
            trajectory = next(t for t in range(6) if entry["body"]["input_ids"][:40] == prompt(t, 40))
            seen.setdefault(trajectory, []).append((server.url, entry))
    assert len(seen) == 6
    for entries in seen.values():
        assert len({url for url, _ in entries}) == 1 and len(entries) == 6
        first, *others = sorted((entry for _, entry in entries), key=lambda entry: entry["start"])
        assert len(first["body"]["input_ids"]) == 200 and first["body"]["sampling_params"]["max_new_tokens"] == 0
        assert all(entry["start"] >= first["end"] for entry in others)
    owners = [entries[0][0] for entries in seen.values()]
    assert [owners.count(server.url) for server in servers] == [3, 3], "spread evenly"


def test_every_token_that_can_be_cached_is(serve, attach, model: Path) -> None:
    servers = [serve(), serve()]
    engine = attach(*servers)
    requests = [one for t in range(5) for one in nested(t)]
    results = engine.generate(requests)
    stats = engine.stats()
    ideal = sum(len(one.tokens) - 1 for one in requests if len(one.tokens) < 200)
    assert stats.cached_tokens == stats.cacheable_tokens == ideal
    assert stats.requests == len(requests) and stats.prompt_tokens == sum(len(one.tokens) for one in requests)
    assert stats.generated_tokens == sum(len(c.tokens) for completions in results for c in completions)
    assert stats.cached_tokens == sum(completions[0].cached_tokens for completions in results)
    again = engine.generate(requests)
    now = engine.stats()
    assert now.cached_tokens - stats.cached_tokens == sum(len(one.tokens) - 1 for one in requests)
    assert now.cacheable_tokens - stats.cacheable_tokens == sum(len(one.tokens) - 1 for one in requests)
    assert [[c.tokens.tolist() for c in row] for row in again] == [[c.tokens.tolist() for c in row] for row in results]


def test_the_same_states_without_the_order_share_little(serve, attach, model: Path) -> None:
    """The fake server is as strict as the real one: together, nested states find nothing of each other."""
    server = serve(delay=0.1)
    states = nested(1, n=1)
    threads = [
        threading.Thread(
            target=ask,
            args=(
                server.url,
                "/generate",
                {"input_ids": list(one.tokens), "sampling_params": {"max_new_tokens": 2, "temperature": 1.0}},
            ),
        )
        for one in states
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    answer = ask(
        server.url,
        "/generate",
        {"input_ids": list(states[-1].tokens), "sampling_params": {"max_new_tokens": 2, "temperature": 1.0}},
    )
    assert answer["meta_info"]["cached_tokens"] == 199
    engine = attach(server)
    engine.generate(states)
    assert engine.stats().cached_tokens == engine.stats().cacheable_tokens


def test_rounds_of_collecting_need_no_warming(serve, attach, model: Path) -> None:
    """A prompt that grew by its answer and an observation finds all of both but the last token."""
    servers = [serve(), serve()]
    engine = attach(*servers)
    rows = {t: prompt(t, 60) for t in range(6)}
    homes: dict[int, set[str]] = {t: set() for t in rows}
    known: dict[int, int] = {}
    for turn in range(3):
        before = [len(server.fake.of("/generate")) for server in servers]
        requests = [Request(row, Sampling(8), cache_key=str(t)) for t, row in rows.items()]
        for (t, row), (completion,) in zip(rows.items(), engine.generate(requests), strict=True):
            if turn:
                assert completion.cached_tokens == known[t]
            row += [*completion.tokens.tolist(), *prompt(t + turn, 40)]
        known = {t: len(row) - 41 for t, row in rows.items()}
        for server, n in zip(servers, before, strict=True):
            for entry in server.fake.of("/generate")[n:]:
                assert entry["body"]["sampling_params"]["max_new_tokens"] == 8
                homes[next(t for t in rows if entry["body"]["input_ids"][:60] == rows[t][:60])].add(server.url)
    assert all(len(home) == 1 for home in homes.values())
    stats = engine.stats()
    assert stats.cached_tokens == stats.cacheable_tokens > 0


def test_one_question_for_many_trajectories_is_computed_once(serve, attach) -> None:
    server = serve()
    engine = attach(server)
    engine.generate([Request(prompt(1, 64), Sampling(4), cache_key=f"k{i}") for i in range(4)])
    assert engine.stats().cached_tokens == engine.stats().cacheable_tokens == 3 * 63


@pytest.mark.parametrize("n", [1, 2, 8])
def test_so_many_sequences_at_a_time_and_no_more(serve, attach, n: int) -> None:
    server = serve(delay=0.05)
    engine = attach(server, max_sequences=4)
    requests = [request(number, n=n) for number in range(12)]
    engine.generate(requests)
    assert server.fake.peak == max(4, n)  # a request of 8 goes alone


def test_calls_exclude_each_other(serve, attach, model: Path) -> None:
    server = serve(delay=0.2)
    engine = attach(server)
    new = changed(model, 2.0)
    thread = threading.Thread(target=engine.update_weights, args=(new, 1))
    results = []
    other = threading.Thread(target=lambda: results.append(engine.generate(MANY)))
    other.start()
    until(lambda: server.fake.of("/generate"), "generation begins")
    thread.start()
    for one in (other, thread):
        one.join()
    assert_from(results[0], MANY, original(model), 0)
    last = max(entry["end"] for entry in server.fake.of("/generate"))
    assert all(entry["start"] >= last for entry in server.fake.of("/pause_generation"))
