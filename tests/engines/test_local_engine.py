"""The embedded engine against a plain forward pass of the same model over prompt and completion, row by row."""

from __future__ import annotations

import copy
import itertools
import math

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from support.engine_conformance import check, plain_logprobs
from support.local_engines import MODELS, RARE, SHAPE, V, engine_of, make, mixed_requests, tokens
from support.model_families import UNSHARED, build_unshared

from swirl_fast.engines.engine import Request, Sampling
from swirl_fast.engines.local import attention
from swirl_fast.engines.local import engine as local
from swirl_fast.engines.local.engine import LocalEngine
from swirl_fast.prefixes import cacheable


@pytest.mark.parametrize(
    "kind, block_tokens, prefill_tokens", [*((x, 256, 512) for x in MODELS), *((x, 1, 16) for x in (*MODELS, *RARE))]
)
def test_logprobs_equal_a_plain_forward_pass(kind, block_tokens, prefill_tokens, monkeypatch):
    monkeypatch.setitem(attention.BLOCK_TOKENS, "cpu", block_tokens)  # 1: every shared run is a block of its own
    monkeypatch.setitem(local.PREFILL_TOKENS, "cpu", prefill_tokens)  # 16: prompts are cut into several passes
    model = make(kind)
    engine = engine_of(model, max_sequences=7)
    for round_ in range(3):  # cold, warm with the same prompts, warm with what was sampled
        requests = mixed_requests(round_)
        results = engine.generate(requests)
        check(model, requests, results)
    follow = [
        Request([*request.tokens, *completion.tokens, 9, 8, 7], Sampling(5), n=2)
        for request, completions in zip(requests, results, strict=True)
        for completion in completions
    ]
    results = engine.generate(follow)
    check(model, follow, results)
    for request, completions in zip(follow, results, strict=True):
        assert completions[0].cached_tokens >= len(request.tokens) - 4, "a sampled action was computed again"


@pytest.mark.parametrize("cache_tokens", [0, 1, 40, 150])
def test_a_tiny_cache_stays_small_and_correct(cache_tokens):
    model = make()
    engine = engine_of(model, max_sequences=3, cache_tokens=cache_tokens)
    for round_ in range(3):
        requests = mixed_requests(round_)
        check(model, requests, engine.generate(requests))
        assert len(engine._cache) <= cache_tokens
        assert all(pool.shape[1] <= cache_tokens for pool in engine._cache.keys.values())


def test_bfloat16_is_close_to_the_plain_pass():
    model = make().to(torch.bfloat16)
    engine = engine_of(model)
    requests = [Request(tokens(20, 1) + tokens(i + 1, i), Sampling(12), n=2, seed=i) for i in range(4)]
    for request, completions in zip(requests, engine.generate(requests), strict=True):
        for completion in completions:
            plain = plain_logprobs(model.float(), request, completion)
            chosen = plain.gather(1, torch.from_numpy(completion.tokens).long()[:, None])[:, 0]
            assert (chosen - torch.tensor(completion.logprobs)).abs().mean() < 0.1
            assert chosen.mean() > -math.log(V), "the tokens look random"


def test_same_seed_same_tokens_whatever_stands_beside():
    engine = engine_of(make(), max_sequences=5)
    request = Request(tokens(30, 1), Sampling(12), n=3, seed=5)
    others = [Request(tokens(30, 1)[:20] + tokens(i, i), Sampling(3 * i), n=i, seed=i) for i in range(1, 6)]
    alone = engine.generate([request])[0]
    again = engine.generate([request])[0]
    among = engine.generate([*others[:3], request, *others[3:]])[3]
    more = engine.generate([Request(request.tokens, Sampling(12), n=5, seed=5)])[0]
    for other in (again, among, more[:3]):
        assert [c.tokens.tolist() for c in other] == [c.tokens.tolist() for c in alone]
        assert np.allclose([c.logprobs for c in other], [c.logprobs for c in alone], atol=1e-4)
    assert len({tuple(c.tokens) for c in more}) == 5, "siblings must differ"
    different = engine.generate([Request(request.tokens, Sampling(12), seed=6)])[0][0]
    assert different.tokens.tolist() not in [c.tokens.tolist() for c in more]


def test_cached_tokens_are_exact():
    engine = engine_of(make())
    state = tokens(30, 1)
    ask = Sampling(6)

    def cached(*prompts: list[int], n: int = 1) -> list[int]:
        return [result[0].cached_tokens for result in engine.generate([Request(p, ask, n=n) for p in prompts])]

    first = engine.generate([Request(state, ask, n=3)])[0]
    assert [c.cached_tokens for c in first] == [0, 0, 0]
    assert cached(state) == [29], "the last token is computed again"
    longer = [*state, *first[1].tokens.tolist(), *tokens(10, 2)]
    assert cached(longer) == [30 + 5], "the last sampled token was never fed"
    assert cached(tokens(12, 3), state[:20] + tokens(3, 4), state[:7]) == [0, 20, 6]
    few = engine_of(make(), max_sequences=2).generate([Request(state, ask, n=5)])[0]
    assert [c.cached_tokens for c in few] == [0] * 5, "siblings that waited share one computation of the prompt"
    trunk = tokens(50, 5)  # one call: the shortest computes its own tokens, each longer one the rest
    assert cached(trunk[:45], trunk[:10], trunk, trunk[:10], n=5) == [9, 0, 44, 9]
    stats = engine.stats()
    assert stats.requests == 10
    assert stats.prompt_tokens == 30 + 30 + 46 + 12 + 23 + 7 + 45 + 10 + 50 + 10
    assert stats.cached_tokens == 29 + 35 + 0 + 20 + 6 + 9 + 0 + 44 + 9
    assert stats.generated_tokens == 6 * (3 + 1 + 1 + 3 + 20)
    assert stats.prefill_seconds > 0 and stats.decode_seconds > 0


prompt_lists = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=8), max_size=8)


def contexts(prompts: list[list[int]]) -> list[tuple[int, ...]]:
    """Every prefix of every prompt without its last token, as often as it comes."""
    return [tuple(prompt[: i + 1]) for prompt in prompts for i in range(len(prompt) - 1)]


@settings(max_examples=300, deadline=None)
@given(prompt_lists)
def test_cacheable_is_what_comes_more_than_once(prompts):
    every = contexts(prompts)
    assert cacheable(prompts) == len(every) - len(set(every))


def test_an_empty_prompt_is_not_cacheable():
    with pytest.raises(ValueError, match="at least one token"):
        cacheable([[5, 6], []])


@settings(max_examples=40, deadline=None)
@given(before=prompt_lists, prompts=prompt_lists)
def test_cacheable_tokens_count_what_was_held_once_more(shared_engine, before, prompts):
    shared_engine.close()
    held = [[5 + token for token in prompt] for prompt in before]
    asked = [[5 + token for token in prompt] for prompt in prompts]
    ask = Sampling(1, temperature=0.0)
    stats = [shared_engine.stats()]
    for call in (held, asked):
        shared_engine.generate([Request(prompt, ask) for prompt in call])
        stats.append(shared_engine.stats())
    cold, warm = (b.cacheable_tokens - a.cacheable_tokens for a, b in itertools.pairwise(stats))
    assert cold == cacheable(held)
    whole = contexts([[*prompt, 0] for prompt in held])  # of a prompt all is held, of one sampled token nothing
    assert warm == cacheable(asked) + len(set(whole) & set(contexts(asked)))
    assert [b.cached_tokens - a.cached_tokens for a, b in itertools.pairwise(stats)] == [cold, warm]


@pytest.mark.parametrize("kind", MODELS)
def test_without_the_prefix_cache_every_row_is_computed_and_nothing_changes(kind, monkeypatch):
    model = make(kind)
    cached, plain = engine_of(model, 7), engine_of(model, 7, prefix_cache=False)
    computed = [0]
    compute = plain._compute

    def counted(pieces):
        computed[0] += sum(stop - start for _, start, stop in pieces)
        compute(pieces)

    monkeypatch.setattr(plain, "_compute", counted)
    requests = mixed_requests(0)
    expected = cached.generate(requests)
    for call in range(1, 3):
        results = plain.generate(requests)
        check(model, requests, results)
        for a, b in zip(expected, results, strict=True):
            assert [c.tokens.tolist() for c in a] == [c.tokens.tolist() for c in b]
            assert all(np.allclose(x.logprobs, y.logprobs, atol=1e-4) for x, y in zip(a, b, strict=True))
            assert [c.cached_tokens for c in b] == [0] * len(b)
        assert computed[0] == call * sum(request.n * (len(request.tokens) - 1) for request in requests)
        assert len(plain._cache) == 0 and not plain._cache.keys, "something was kept"
    stats = plain.stats()
    assert stats.cached_tokens == 0
    assert stats.cacheable_tokens == 2 * cacheable([request.tokens for request in requests])
    plain.update_weights(make(kind, seed=1).state_dict().items(), 1)
    check(make(kind, seed=1), requests, plain.generate(requests))


def test_stop_ids_end_a_completion_with_the_stop_token():
    model = make()
    engine = engine_of(model)
    free = engine.generate([Request(tokens(10, 1), Sampling(30), seed=3)])[0][0]
    ids = free.tokens.tolist()
    stop = ids[4]
    (stopped,) = engine.generate([Request(tokens(10, 1), Sampling(30), seed=3, stop_ids=(stop, 1))])[0]
    assert stopped.tokens.tolist() == ids[: ids.index(stop) + 1]
    assert (stopped.finish, free.finish) == ("stop", "length")
    assert np.allclose(stopped.logprobs, free.logprobs[: len(stopped.tokens)], atol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "mha"])
def test_after_a_weight_update_nothing_comes_from_the_old_weights(kind):
    old, new = make(kind, seed=0), make(kind, seed=1)
    engine, fresh = engine_of(old), engine_of(new)
    requests = mixed_requests(0)
    assert engine.generate(requests)[0][0].policy_version == 0
    engine.update_weights(((name, p.double()) for name, p in new.named_parameters()), version=7)
    results = engine.generate(requests)
    check(new, requests, results)
    for got, expected in zip(results, fresh.generate(requests), strict=True):
        assert [c.tokens.tolist() for c in got] == [c.tokens.tolist() for c in expected]
        assert [c.cached_tokens for c in got] == [c.cached_tokens for c in expected]
        assert {c.policy_version for c in got} == {7}
    engine.update_weights(old.state_dict().items(), version=8)  # tied names twice are fine
    (alone,) = engine.generate([Request(requests[3].tokens, Sampling(2))])[0]
    assert (alone.cached_tokens, alone.policy_version) == (0, 8)
    check(old, requests, engine.generate(requests))


def test_a_refused_weight_update_changes_nothing():
    model, other = make(), make(seed=1)
    engine = engine_of(model)
    request = Request(tokens(20, 1), Sampling(8), n=2)
    before = engine.generate([request])[0]
    state = dict(other.named_parameters())
    name = "model.layers.1.mlp.up_proj.weight"
    with pytest.raises(KeyError, match="no weights named spam"):
        engine.update_weights([*state.items(), ("spam", torch.zeros(1))], 1)
    with pytest.raises(KeyError, match=f"1 weights are missing: {name}"):
        engine.update_weights([(k, v) for k, v in state.items() if k != name], 1)
    with pytest.raises(ValueError, match=rf"{name} has shape \(32, 48\), the model's is \(48, 32\)"):
        engine.update_weights({**state, name: state[name].T}.items(), 1)
    after = engine.generate([request])[0]
    assert [c.tokens.tolist() for c in after] == [c.tokens.tolist() for c in before]
    assert after[0].policy_version == 0 and after[0].cached_tokens == 19


def test_broken_weights_are_an_error_and_leave_no_trace():
    model = make()
    engine = engine_of(model)
    broken = {name: torch.full_like(p, math.nan) for name, p in model.named_parameters()}
    engine.update_weights(broken.items(), 1)
    with pytest.raises(RuntimeError, match="not finite"):
        engine.generate(mixed_requests(0))
    engine.update_weights(model.state_dict().items(), 2)
    check(model, mixed_requests(0), engine.generate(mixed_requests(0)))


def test_a_prompt_does_not_push_out_what_its_neighbour_needs():
    engine = engine_of(make(), cache_tokens=50)
    known, new = sorted([tokens(40, 1), tokens(30, 2)], reverse=True)
    engine.generate([Request(known, Sampling(1))])
    first, second = engine.generate([Request(new, Sampling(1)), Request(known, Sampling(1))])
    assert (first[0].cached_tokens, second[0].cached_tokens) == (0, len(known) - 1)


@pytest.mark.parametrize("at", range(1, 5))
def test_an_interrupted_call_leaves_no_trace(at, monkeypatch):
    """The tree holds a prompt before its keys are computed: stopped in between, it must not be believed."""
    model = make()
    engine = engine_of(model, max_sequences=3)
    monkeypatch.setitem(local.PREFILL_TOKENS, "cpu", 20)
    forward, calls = engine._forward, []

    def interrupted(*arguments):
        calls.append(None)
        if len(calls) == at:
            raise KeyboardInterrupt
        return forward(*arguments)

    monkeypatch.setattr(engine, "_forward", interrupted)
    request = Request(tokens(45, 1), Sampling(5), n=5)
    with pytest.raises(KeyboardInterrupt):
        engine.generate([request])
    check(model, [request], engine.generate([request]))


@pytest.mark.parametrize(
    "request_, message",
    [
        (Request([], Sampling(3)), "request 1 has an empty prompt"),
        (Request(tokens(250, 1), Sampling(7)), "250 prompt tokens and max_new_tokens=7 exceed the context of 256.* at most 6"),
        (Request(tokens(300, 1), Sampling(7)), "300 prompt tokens .* shorten the prompt$"),
        (Request([5, V], Sampling(3)), f"token id {V} is outside the vocabulary of {V}"),
        (Request([5, -1], Sampling(3)), "token id -1 is outside"),
        (Request([5], Sampling(0)), "max_new_tokens=0 must be at least 1"),
        (Request([5], Sampling(3), n=0), "n=0"),
        (Request([5], Sampling(3, temperature=-1.0)), "temperature=-1.0"),
        (Request([5], Sampling(3, temperature=math.nan)), "temperature=nan"),
        (Request([5], Sampling(3, top_p=0.0)), "top_p=0.0"),
        (Request([5], Sampling(3, top_k=-1)), "top_k=-1"),
    ],
)  # fmt: skip
def test_impossible_requests_are_refused_before_any_work(request_, message, shared_engine):
    before = shared_engine.stats()
    with pytest.raises(ValueError, match=message):
        shared_engine.generate([Request([5, 6], Sampling(2)), request_])
    assert shared_engine.stats() == before


@pytest.fixture(scope="module")
def shared_engine() -> LocalEngine:
    return engine_of(make())


def test_the_whole_context_can_be_used_and_nothing_is_nothing(shared_engine):
    model = make()
    requests = [Request(tokens(250, 1), Sampling(6)), Request(tokens(3, 1), Sampling(60), n=2)]
    check(model, requests, shared_engine.generate(requests))
    assert shared_engine.generate([]) == []


def test_models_that_cannot_work_are_refused_by_name():
    dynamic = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    cases = [
        (
            transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPE, rope_parameters=dynamic)),
            "LlamaForCausalLM: its rope_type 'dynamic'",
        ),
        (
            transformers.T5ForConditionalGeneration(transformers.T5Config(vocab_size=V, d_model=16, d_ff=16, num_layers=1)),
            "T5ForConditionalGeneration: it is an encoder-decoder",
        ),
    ]  # fmt: skip
    for model, message in cases:
        with pytest.raises(ValueError, match=message):
            LocalEngine(model, max_sequences=4, cache_tokens=64)


@pytest.mark.parametrize("family", [family for family in UNSHARED if family != "recurrent_gemma"])
def test_models_that_cannot_share_prefixes_are_decoded_by_their_own_generate(family):
    """More sequences than rows, prompts of several lengths, one of a single token; what the folder says of generating is not heard."""
    model = build_unshared(family)
    engine_model = copy.deepcopy(model)
    engine_model.generation_config.update(repetition_penalty=9.0, eos_token_id=list(range(90)), do_sample=True)
    engine = LocalEngine(engine_model, max_sequences=3, cache_tokens=64)
    assert engine.uncached is not None
    shared = tokens(8, 1)
    requests = [
        Request(shared, Sampling(6), n=4, seed=1),
        Request(shared + [9], Sampling(3, 0.0)),
        Request([7], Sampling(9)),
    ]
    results = engine.generate(requests)
    check(model, requests, results)
    for again in (engine.generate(requests), engine.generate(requests[:1])):
        for found, wanted in zip(again, results, strict=False):
            assert [c.tokens.tolist() for c in found] == [c.tokens.tolist() for c in wanted]


def test_a_model_with_hidden_state_is_found_by_its_log_probs(monkeypatch):
    """Attention that looks at what no key holds: here, at the number of tokens in the pass."""
    attend = attention.DecodePass.attend
    monkeypatch.setattr(attention.DecodePass, "attend", lambda self, *a: attend(self, *a) * (1 + 0.1 * self.at))
    with pytest.raises(ValueError, match="LlamaForCausalLM: decoding token by token differs by"):
        engine_of(make())


def test_the_engine_leaves_models_of_the_same_configuration_alone():
    config = transformers.LlamaConfig(**SHAPE)
    torch.manual_seed(0)
    model, owned = transformers.LlamaForCausalLM(config), transformers.LlamaForCausalLM(config)
    before = model(torch.tensor([[5, 6, 7]])).logits
    LocalEngine(owned, max_sequences=2, cache_tokens=16)
    assert torch.equal(model(torch.tensor([[5, 6, 7]])).logits, before)
    with pytest.raises(RuntimeError, match="belongs to a LocalEngine"):
        owned(torch.tensor([[5, 6, 7]]))
