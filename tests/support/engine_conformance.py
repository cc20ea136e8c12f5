"""What every rollout engine owes the trainer, as one suite: tests/engines/test_engine_conformance.py runs it on the embedded engine,
tests/sglang/test_conformance.py on a real SGLang server.

A test class inherits `EngineConformance` and gives two fixtures:

    model    a transformers model in float32, on the CPU
    engine   an engine with the same weights; it may serve all tests of the class, since an update of weights changes `model` too
"""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from swirl_fast.engines.engine import Completion, Engine, Request, Sampling
from swirl_fast.prefixes import cacheable

TOLERANCE = 1e-4  # of a log-prob, in float32
EOS = 2  # the models' end-of-sequence token, which ends a turn on SGLang even where it is no stop id
GREEDY = Sampling(12, temperature=0.0)


def prompt(length: int, seed: int, model: PreTrainedModel) -> list[int]:
    """Random ids; prompts of two seeds below 90 share nothing, for the first id is the seed's own."""
    return [3 + seed, *random.Random(seed).choices(range(3, model.config.vocab_size), k=length - 1)]


@torch.no_grad()
def plain_logprobs(model: PreTrainedModel, request: Request, completion: Completion) -> torch.Tensor:
    """Float32 [tokens, vocabulary]: of softmax(logits / temperature) in one forward pass over prompt and completion."""
    row = torch.tensor([[*request.tokens, *completion.tokens.tolist()]])
    logits = model(row, use_cache=False).logits[0, len(request.tokens) - 1 : -1].float()
    return (logits / (request.sampling.temperature or 1.0)).log_softmax(-1)


def check(model: PreTrainedModel, requests: Sequence[Request], results: Sequence[Sequence[Completion]]) -> None:
    """Every completion is one of its own request, by these weights and no others."""
    assert [len(completions) for completions in results] == [request.n for request in requests]
    for request, completions in zip(requests, results, strict=True):
        for completion in completions:
            assert completion.tokens.dtype == np.int32 and completion.tokens.ndim == 1
            assert 0 < len(completion.tokens) <= request.sampling.max_new_tokens
            assert len(completion.logprobs) == len(completion.tokens)
            logprobs = plain_logprobs(model, request, completion)
            chosen = logprobs.gather(1, torch.from_numpy(completion.tokens).long()[:, None])[:, 0]
            gaps = (chosen - torch.tensor(completion.logprobs)).abs()
            assert gaps.max() < TOLERANCE, f"log-probs of {completion} are off by {gaps.tolist()}"
            if request.sampling.temperature == 0 or request.sampling.top_k == 1:
                assert (logprobs.max(-1).values - chosen).max() < TOLERANCE, "a greedy token is not the most probable"
            if completion.finish == "stop":
                assert completion.tokens[-1] in request.stop_ids
            else:
                assert len(completion.tokens) == request.sampling.max_new_tokens
            assert not set(completion.tokens[:-1]) & set(request.stop_ids), "something stands behind a stop token"


def update(engine: Engine, model: PreTrainedModel, seed: int) -> int:
    """Gives the engine, and `model`, clearly other weights. Returns their version."""
    source = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=source)
            parameter.add_(0.3 * parameter.std().nan_to_num(0.1) * noise)
    version = version_of(engine) + 1
    engine.update_weights(model.named_parameters(), version)
    return version


def assert_hits(cached: int, possible: int, engine: Engine | None = None) -> None:
    """possible: tokens that an ideal cache would not compute again. A little more is possible too: a sampled token, which stays in the
    cache, may happen to be the next one of a longer prompt. An engine that says it has none computes all."""
    if getattr(engine, "uncached", None) is not None:
        assert cached == 0
        return
    assert 0.95 * possible <= cached <= 1.01 * possible, (
        f"{cached} tokens came from the cache, possible were {possible}"
    )


def version_of(engine: Engine) -> int:
    return engine.generate([Request([5, 6, 7], Sampling(1))])[0][0].policy_version


class EngineConformance:
    @pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
    def test_logprobs_are_those_of_a_plain_forward_pass(
        self, engine: Engine, model: PreTrainedModel, temperature: float
    ) -> None:
        """Whatever cuts the sampling has; also cold and warm, alone and beside others, of one token and of many."""
        sampled = Sampling(20, temperature)
        trunk = prompt(120, 1, model)
        requests = [
            Request(trunk[:50], sampled, n=3, cache_key="a"),
            Request(trunk, replace(sampled, top_p=0.6), n=2, cache_key="a"),
            Request(trunk[:90], replace(sampled, top_k=3), n=2, cache_key="a"),
            Request(trunk[:60] + prompt(9, 2, model), replace(sampled, top_k=1, max_new_tokens=4), cache_key="b"),
            Request([7], replace(sampled, max_new_tokens=60)),
            Request(prompt(2, 3, model), replace(sampled, max_new_tokens=1), n=2),
            Request(trunk[:50], replace(sampled, max_new_tokens=7), n=2, stop_ids=(EOS, 4, 5, 6, 7, 8, 9, 10)),
        ]
        check(model, requests, engine.generate(requests))
        check(model, requests, engine.generate(requests))
        for request in requests:
            check(model, [request], engine.generate([request]))

    def test_top_k_and_top_p_cut_what_is_sampled(self, engine: Engine, model: PreTrainedModel) -> None:
        hot = Sampling(20, temperature=2.0)
        requests = [
            Request(prompt(40, 4, model), replace(hot, top_k=3), n=8),
            Request(prompt(40, 4, model), replace(hot, top_p=0.5), n=8),
            Request(prompt(40, 4, model), hot, n=8),
        ]
        results = engine.generate(requests)
        check(model, requests, results)
        ranks: list[list[int]] = [[], [], []]
        for request, completions, own in zip(requests, results, ranks, strict=True):
            for completion in completions:
                probs = plain_logprobs(model, request, completion).exp()
                chosen = probs.gather(1, torch.from_numpy(completion.tokens).long()[:, None])
                above = probs > chosen + 1e-6
                own += above.sum(-1).tolist()
                if request.sampling.top_p < 1:
                    assert (probs * above).sum(-1).max() < 0.5 + 1e-3, "a token lies outside the most probable half"
        assert max(ranks[0]) == 2, "of the three most probable tokens each is drawn now and then, and no other"
        assert max(ranks[1]) > 0 and max(ranks[2]) > max(ranks[1]) and max(ranks[2]) > 2

    def test_samples_of_one_request_differ_and_are_random(self, engine: Engine, model: PreTrainedModel) -> None:
        # hot, for at temperature 1 a model that was taught something may well say the same twice
        request = Request(prompt(30, 5, model), Sampling(40, temperature=2.0), n=8, seed=1)
        first, second = engine.generate([request, replace(request, seed=2)])
        assert len({tuple(completion.tokens.tolist()) for completion in (*first, *second)}) == 16

    def test_results_come_in_the_order_of_requests(self, engine: Engine, model: PreTrainedModel) -> None:
        """Long before short, with a copy of one and no request without its own prompt: only the log-probs tell them apart."""
        prompts = [prompt(length, 83 + i, model) for i, length in enumerate((200, 3, 90, 41, 150))]
        prompts += [prompts[2], prompts[0][:100]]
        requests = [Request(tokens, replace(GREEDY, max_new_tokens=3 + i)) for i, tokens in enumerate(prompts)]
        results = engine.generate(requests)
        check(model, requests, results)
        assert [len(completion.tokens) for (completion,) in results] == [3, 4, 5, 6, 7, 8, 9]
        assert results[5][0].tokens[:5].tolist() == results[2][0].tokens.tolist()
        assert engine.generate([]) == []

    def test_a_stop_token_ends_a_completion_and_is_its_last(self, engine: Engine, model: PreTrainedModel) -> None:
        greedy = Request(prompt(30, 6, model), replace(GREEDY, max_new_tokens=30))
        ((whole,),) = engine.generate([greedy])
        assert whole.finish == "length", "without stop ids nothing stops it"
        free = whole.tokens.tolist()
        stop = next((token for i, token in enumerate(free) if i >= 1 and token not in free[:i]), None)
        assert stop is not None, "this model repeats one token for ever: nothing is tested"
        ids = (model.config.vocab_size - 1, stop, EOS)
        wanted = free[: 1 + min(i for i, token in enumerate(free) if token in ids)]
        for limit in (30, len(wanted)):  # also where the stop token is the last one that there was room for
            ((stopped,),) = engine.generate(
                [replace(greedy, sampling=replace(GREEDY, max_new_tokens=limit), stop_ids=ids)]
            )
            assert (stopped.tokens.tolist(), stopped.finish) == (wanted, "stop")
            assert stopped.logprobs == pytest.approx(whole.logprobs[: len(wanted)], abs=TOLERANCE)

    def test_nothing_of_a_long_prompt_is_cut_off(self, engine: Engine, model: PreTrainedModel) -> None:
        tokens = prompt(engine.max_context - 20, 7, model)
        requests = [Request(tokens, Sampling(20), n=2), Request(tokens[:100], Sampling(150))]
        results = engine.generate(requests)
        check(model, requests, results)
        assert [len(completions[0].tokens) for completions in results] == [20, 150]

    @pytest.mark.parametrize(
        "change, message",
        [
            (dict(tokens=[]), "request 1 has an empty prompt"),
            (dict(tokens=[5, 10**6]), "request 1: token id 1000000 is outside"),
            (dict(tokens=[5, -1]), "request 1: token id -1 is outside"),
            (dict(n=0), "request 1: n=0"),
            (dict(sampling=Sampling(0)), "max_new_tokens=0"),
            (dict(sampling=Sampling(3, temperature=-1.0)), "temperature=-1.0"),
            (dict(sampling=Sampling(3, temperature=math.nan)), "temperature=nan"),
            (dict(sampling=Sampling(3, top_p=0.0)), "top_p=0.0"),
            (dict(sampling=Sampling(3, top_p=1.1)), "top_p=1.1"),
            (dict(sampling=Sampling(3, top_k=-1)), "top_k=-1"),
            (dict(sampling=Sampling(10**6)), "request 1: 2 prompt tokens and .*exceed the context of"),
        ],
    )
    def test_an_impossible_request_is_refused_before_anything_is_computed(
        self, engine: Engine, change: dict[str, object], message: str
    ) -> None:
        before = engine.stats()
        with pytest.raises(ValueError, match=message):
            engine.generate([Request([5, 6], Sampling(2)), replace(Request([5, 6], Sampling(2)), **change)])
        assert engine.stats() == before

    def test_a_prompt_that_leaves_no_room_is_refused(self, engine: Engine, model: PreTrainedModel) -> None:
        before = engine.stats()
        for length in (engine.max_context - 1, engine.max_context, engine.max_context + 30):
            with pytest.raises(ValueError, match=f"{length} prompt tokens and .*exceed the context of"):
                engine.generate([Request(prompt(length, 8, model), Sampling(2))])
        assert engine.stats() == before

    def test_statistics_add_up(self, engine: Engine, model: PreTrainedModel) -> None:
        before = engine.stats()
        trunk = prompt(200, 20, model)
        requests = [Request(trunk[:k], Sampling(9), n=n, cache_key="s") for k, n in ((80, 1), (200, 3), (140, 2))]
        results = engine.generate(requests)
        after = engine.stats()
        assert after.requests - before.requests == 3
        assert after.prompt_tokens - before.prompt_tokens == 420
        assert after.generated_tokens - before.generated_tokens == sum(len(c.tokens) for cs in results for c in cs)
        cached = [{completion.cached_tokens for completion in completions} for completions in results]
        assert all(len(of_request) == 1 for of_request in cached), "samples of one request share one prompt"
        assert after.cached_tokens - before.cached_tokens == sum(of_request.pop() for of_request in cached)
        seconds = after.prefill_seconds + after.decode_seconds
        assert seconds > before.prefill_seconds + before.decode_seconds

    @pytest.mark.parametrize("samples", [1, 8])
    def test_states_of_a_trajectory_share_what_they_can(
        self, engine: Engine, model: PreTrainedModel, samples: int
    ) -> None:
        """At least 95 % of what an ideal cache saves, when they come together, and more when they come again; never more than it."""
        trunk = prompt(400, 30 + samples, model)
        states = [trunk[:k] for k in (90, 160, 240, 310, 400)]
        requests = [Request(state, Sampling(8), n=samples, cache_key=f"t{samples}") for state in states]
        for possible in (cacheable(states), sum(len(state) - 1 for state in states)):
            results = engine.generate(requests)
            cached = sum(completions[0].cached_tokens for completions in results)
            assert_hits(cached, possible, engine)
            check(model, requests, results)

    def test_several_trajectories_of_one_question_share_its_prompt(
        self, engine: Engine, model: PreTrainedModel
    ) -> None:
        question = prompt(150, 40, model)
        rows = [question + prompt(150, 41 + i, model) for i in range(3)]
        states = [row[:k] for row in rows for k in (150, 220, 300)]
        requests = [Request(state, Sampling(4), n=2, cache_key="q") for state in states]
        results = engine.generate(requests)
        cached = sum(completions[0].cached_tokens for completions in results)
        assert_hits(cached, cacheable(states), engine)
        check(model, requests, results)

    def test_a_growing_trajectory_is_never_computed_again(self, engine: Engine, model: PreTrainedModel) -> None:
        """As rollouts go: the next state is this one, the action that was sampled, and an observation."""
        state = prompt(100, 50, model)
        cached = possible = known = 0
        for turn in range(5):
            request = Request(state, Sampling(20), cache_key="growing")
            ((completion,),) = engine.generate([request])
            check(model, [request], [[completion]])
            cached += completion.cached_tokens
            possible += known
            known = len(state) + len(completion.tokens) - 1  # the last token was sampled, never read
            state = [*state, *completion.tokens.tolist(), *prompt(20, 51 + turn, model)]
        assert_hits(cached, possible, engine)

    def test_after_an_update_nothing_comes_from_the_old_weights(self, engine: Engine, model: PreTrainedModel) -> None:
        """The same prompts before and after: outputs, version, and no key of the old weights in the cache."""
        trunk = prompt(200, 60, model)
        requests = [Request(trunk[:k], replace(GREEDY, max_new_tokens=20), cache_key="u") for k in (80, 140, 200)]
        old = copy.deepcopy(model)
        before = engine.generate(requests)
        check(old, requests, before)
        for seed in (1, 2):
            version = update(engine, model, seed)
            assert version > before[0][0].policy_version
            ((alone,),) = engine.generate([Request(trunk, GREEDY, cache_key="u")])
            assert (alone.cached_tokens, alone.policy_version) == (0, version)
            after = engine.generate(requests)
            check(model, requests, after)
            with pytest.raises(AssertionError):
                check(old, requests, after)
            assert {completion.policy_version for completions in after for completion in completions} == {version}

    def test_a_refused_update_changes_nothing(self, engine: Engine, model: PreTrainedModel) -> None:
        request = Request(prompt(60, 70, model), GREEDY)
        ((before,),) = engine.generate([request])
        state = {name: parameter + 1 for name, parameter in model.named_parameters()}
        name = next(name for name in reversed(state) if name.endswith(("up_proj.weight", ".w1.weight")))
        shape = tuple(state[name].shape)
        with pytest.raises(KeyError, match="no weights named spam"):
            engine.update_weights([*state.items(), ("spam", torch.zeros(1))], before.policy_version + 1)
        with pytest.raises(KeyError, match=f"1 weights are missing: {name}"):
            engine.update_weights([(k, v) for k, v in state.items() if k != name], before.policy_version + 1)
        with pytest.raises(ValueError, match=rf"{name} has shape \({shape[1]}, {shape[0]}\), the model's is "):
            engine.update_weights({**state, name: state[name].T}.items(), before.policy_version + 1)
        ((after,),) = engine.generate([request])
        check(model, [request], [[after]])
        assert (after.tokens.tolist(), after.policy_version) == (before.tokens.tolist(), before.policy_version)

    def test_weights_come_in_any_type_and_order(self, engine: Engine, model: PreTrainedModel) -> None:
        version = version_of(engine) + 1
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.01)
        parameters = list(model.named_parameters())[::-1]
        engine.update_weights(((name, parameter.double()) for name, parameter in parameters), version)
        requests = [Request(prompt(60, 80, model), Sampling(10), n=2)]
        results = engine.generate(requests)
        check(model, requests, results)
        assert results[0][0].policy_version == version
