"""The protocol of a rollout engine: token ids in, token ids and log-probs out, never text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch.distributed.tensor import DTensor


class EngineError(RuntimeError):
    """The rollout engine cannot go on; the message names what failed and the remedy. What was stored before is intact."""


@dataclass(frozen=True)
class Sampling:
    """temperature 0 is greedy. top_p = 1 and top_k = 0 switch those cuts off."""

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0


@dataclass(frozen=True)
class Request:
    """n continuations of one token sequence.

    seed: with the same weights, the same batch and the same machine, the same seed gives the same tokens; the n completions
    of one request differ from each other.
    cache_key: the trajectory's id; requests with one key share prefixes and should meet the same server.
    """

    tokens: Sequence[int]
    sampling: Sampling
    n: int = 1
    stop_ids: tuple[int, ...] = ()
    seed: int = 0
    cache_key: str = ""


@dataclass(frozen=True)
class Completion:
    """tokens: sampled ids, the stop token included when it was sampled.

    logprobs: natural log-probability of every token under softmax(logits / temperature), before top-p and top-k (temperature 0:
    of the plain softmax); same length as tokens.
    cached_tokens: how many of the request's tokens were not computed for this completion's request.
    """

    tokens: list[int]
    logprobs: list[float]
    finish: Literal["stop", "length"]
    policy_version: int
    cached_tokens: int = 0


@dataclass
class EngineStats:
    """StepSums since the engine started."""

    requests: int = 0
    prompt_tokens: int = 0  # tokens in all requests
    cached_tokens: int = 0  # of these, not computed again
    cacheable_tokens: int = 0  # of prompt_tokens, what an ideal prefix cache would not have computed again
    generated_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0


def whole(tensor: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """The tensor in `dtype` (None: its own), gathered where it is sharded: then a collective of all its ranks."""
    tensor = tensor.detach().to(dtype or tensor.dtype)  # cast first: less to send
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


class Engine(Protocol):
    max_context: int  # prompt and completion together, in tokens

    def generate(self, requests: Sequence[Request]) -> list[list[Completion]]:
        """One list of `request.n` completions a request, in order. Raises ValueError for an empty prompt or one that leaves
        no room for `max_new_tokens`."""
        ...

    def update_weights(self, named_tensors: Iterable[tuple[str, torch.Tensor]], version: int) -> None:
        """After it no completion comes from older weights, nor from a stale cache. Tensors may be sharded (DTensor): then all ranks call
        this, and gather in the order of names. Raises KeyError for unknown or missing names, ValueError for a wrong shape; then
        nothing has changed."""
        ...

    def stats(self) -> EngineStats: ...

    def close(self) -> None: ...
