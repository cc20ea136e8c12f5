"""How the local engine draws tokens from logits."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.engine_conformance import check, plain_logprobs
from support.local_engines import engine_of, make, tokens

from swirl_fast.engines.engine import Request, Sampling
from swirl_fast.engines.local.sampling import sample_tokens


def test_top_k_and_top_p_hold_in_the_engine():
    model = make()
    engine = engine_of(model)
    requests = [
        Request(tokens(9, 1), Sampling(20, temperature=2.0, top_k=3), n=8),
        Request(tokens(9, 2), Sampling(20, temperature=2.0, top_p=0.5), n=8),
        Request(tokens(9, 3), Sampling(20, temperature=2.0, top_p=0.5, top_k=4), n=8),
    ]
    results = engine.generate(requests)
    check(model, requests, results)
    for request, completions in zip(requests, results, strict=True):
        seen = set()
        for completion in completions:
            logprobs = plain_logprobs(model, request, completion)
            allowed = naive_allowed(logprobs.exp(), request.sampling.top_k, request.sampling.top_p)
            rows = np.arange(len(completion.tokens))
            assert allowed[rows, completion.tokens].all()
            ranks = (logprobs > logprobs[rows, completion.tokens][:, None]).sum(-1)
            seen.update(ranks.tolist())
        assert len(seen) > 1, "never anything but the most probable token"


def naive_allowed(probs: torch.Tensor, top_k: int, top_p: float) -> torch.Tensor:
    """[rows, V] bool: top_k, then the smallest set with mass top_p of what is left."""
    allowed = torch.zeros_like(probs, dtype=torch.bool)
    for row, p in enumerate(probs.double()):
        order = p.argsort(descending=True)[: top_k or None]
        mass = 0.0
        for token in order.tolist():
            if top_p < 1 and mass >= top_p * float(p[order].sum()):
                break
            mass += float(p[token])
            allowed[row, token] = True
    return allowed


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 10**6), st.integers(2, 40), st.sampled_from([0, 1, 3, 100]), st.sampled_from([1.0, 0.9, 0.5, 1e-6]),
    st.sampled_from([0.5, 1.0, 3.0]),
)  # fmt: skip
def test_sample_draws_from_the_cut_distribution(seed, vocabulary, top_k, top_p, temperature):
    """A grid of uniforms hits every token as often as its probability says, to one grid point at either end."""
    grid = 4096
    torch.manual_seed(seed)
    logits = torch.randn(vocabulary) * 3
    uniform = (torch.arange(grid) + 0.5) / grid
    drawn, logprobs = sample_tokens(
        logits.repeat(grid, 1), torch.full((grid,), temperature), torch.full((grid,), top_k),
        torch.full((grid,), top_p), uniform,
    )  # fmt: skip
    probs = (logits / temperature).softmax(-1)
    assert torch.allclose(logprobs, probs.log()[drawn], atol=1e-5)
    allowed = naive_allowed(probs[None], top_k, top_p)[0]
    expected = torch.where(allowed, probs, 0.0)
    counts = torch.bincount(drawn, minlength=vocabulary)
    assert (counts / grid - expected / expected.sum()).abs().max() <= 1.5 / grid
    assert not counts[~allowed].any()


def test_sample_handles_rows_of_every_kind_and_extreme_uniforms():
    logits = torch.tensor([[-math.inf, 0.0, 5.0, 1.0, -math.inf]]).repeat(6, 1)
    last = 1 - 2.0**-24
    drawn, logprobs = sample_tokens(
        logits,
        temperature=torch.tensor([0.0, 1.0, 1.0, 1.0, 0.0, 1e-4]),
        top_k=torch.tensor([0, 0, 0, 2, 1, 0]),
        top_p=torch.tensor([0.1, 1.0, 1.0, 1.0, 1.0, 1.0]),
        uniform=torch.tensor([0.9, 0.0, last, last, 0.0, 0.5]),
    )
    assert drawn.tolist() == [2, 1, 3, 3, 2, 2]
    plain = torch.tensor([0.0, 5.0, 1.0]).log_softmax(-1)
    assert torch.allclose(logprobs, torch.tensor([plain[1], plain[0], plain[2], plain[2], plain[1], 0.0]), atol=1e-6)
    with pytest.raises(RuntimeError, match="not finite"):
        sample_tokens(
            torch.full((1, 4), math.nan), torch.ones(1), torch.zeros(1, dtype=torch.long), torch.ones(1), torch.zeros(1)
        )
