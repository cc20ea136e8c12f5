"""Decoding by transformers' own `generate`, for models that need more than the keys and values of a prefix: nothing is shared or kept.

Only what is drawn is the engine's: each step the sampler picks every row's token and leaves it the only one with a probability. Sequences
whose prompts are equally long run together, so that no row is padded; sequences that have ended run along until the last one has.

Shapes: B rows, T tokens of a prompt, V vocabulary.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from transformers import GenerationConfig, LogitsProcessor, PreTrainedModel, StoppingCriteria

from swirl_fast.engines.local.sampling import sample_tokens
from swirl_fast.engines.local.sequences import Generation


def complete(model: PreTrainedModel, sequences: Sequence[Generation], max_sequences: int) -> tuple[float, float]:
    """Samples all sequences to their ends, at most `max_sequences` at a time. Returns the seconds until the first tokens, and after."""
    prefill = decode = 0.0
    generate: Any = model.generate
    model.generation_config = GenerationConfig()  # else that of the model's folder fills in what is not given
    for rows in _batches(sequences, max_sequences):
        for row in rows:
            row.prompt.cached = 0
        sampler = _Sampler(rows, model.device)
        tokens_BT = torch.as_tensor(np.stack([row.prompt.tokens for row in rows]), device=model.device)
        began = time.perf_counter()
        generate(
            tokens_BT,
            attention_mask=torch.ones_like(tokens_BT),
            generation_config=GenerationConfig(max_new_tokens=max(row.left for row in rows), do_sample=False),
            logits_processor=[sampler],
            stopping_criteria=[_Ended(rows)],
        )
        ended = time.perf_counter()
        prefill, decode = prefill + sampler.first - began, decode + ended - sampler.first
    return prefill, decode


def _batches(sequences: Sequence[Generation], max_sequences: int) -> Iterator[list[Generation]]:
    def length(row: Generation) -> int:
        return len(row.prompt.tokens)

    for _, rows in itertools.groupby(sorted(sequences, key=length), length):
        while batch := list(itertools.islice(rows, max_sequences)):
            yield batch


class _Sampler(LogitsProcessor):
    """Draws by each row's own settings and random numbers. first: when the first tokens were drawn."""

    def __init__(self, rows: Sequence[Generation], device: torch.device) -> None:
        settings = [row.prompt.request.sampling for row in rows]
        self.rows = rows
        self.temperature = torch.tensor([s.temperature for s in settings], dtype=torch.float32, device=device)
        self.top_k = torch.tensor([s.top_k for s in settings], device=device)
        self.top_p = torch.tensor([s.top_p for s in settings], dtype=torch.float32, device=device)
        uniforms = np.full((max(row.left for row in rows), len(rows)), 0.5, np.float32)
        for i, row in enumerate(rows):
            uniforms[: row.left, i] = row.uniforms
        self.uniforms = iter(torch.as_tensor(uniforms, device=device))
        self.first = 0.0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """scores: [B, V] float32 logits -> 0 at the tokens that were drawn, else minus infinity."""
        tokens, logprobs = sample_tokens(
            scores.float().clone(), self.temperature, self.top_k, self.top_p, next(self.uniforms)
        )
        for row, token, logprob in zip(self.rows, tokens.tolist(), logprobs.tolist(), strict=True):
            if row.finish is None:
                row.append(token, logprob)
        self.first = self.first or time.perf_counter()
        return torch.full_like(scores, -math.inf).scatter_(1, tokens[:, None], 0.0)


class _Ended(StoppingCriteria):
    def __init__(self, rows: Sequence[Generation]) -> None:
        self.rows = rows

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: object) -> torch.Tensor:
        return torch.tensor([row.finish is not None for row in self.rows], device=input_ids.device)
