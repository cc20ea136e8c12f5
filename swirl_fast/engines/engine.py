"""The protocol of a rollout engine: token ids in, token ids and log-probs out, never text."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch.distributed.tensor import DTensor

from swirl_fast.models.lora import Merged

Tokens = Sequence[int] | NDArray[np.integer]


class EngineError(RuntimeError):
    """The rollout engine cannot go on; the message names what failed and the remedy. What was stored before is intact."""


@dataclass(frozen=True)
class Sampling:
    """temperature 0 is greedy. top_p = 1 and top_k = 0 switch those cuts off."""

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0


@dataclass(frozen=True, eq=False)
class Request:
    """n continuations of one token sequence.

    tokens: ids of the prompt, best as an int32 array [tokens]; any sequence of integers will do.
    seed: with the same weights, the same batch and the same machine, the same seed gives the same tokens; the n completions
    of one request differ from each other.
    cache_key: the trajectory's id; requests with one key share prefixes and should meet the same server.
    routed_experts: whether the completions shall have theirs, of a model with experts.
    """

    tokens: Tokens
    sampling: Sampling
    n: int = 1
    stop_ids: tuple[int, ...] = ()
    seed: int = 0
    cache_key: str = ""
    routed_experts: bool = False


@dataclass(frozen=True, eq=False)
class Completion:
    """tokens: sampled ids, int32 [tokens], the stop token included when it was sampled.

    logprobs: natural log-probability of every token under softmax(logits / temperature), before top-p and top-k (temperature 0:
    of the plain softmax); same length as tokens.
    cached_tokens: how many of the request's tokens were not computed for this completion's request.
    routed_experts: where asked for: the experts that drew each token, [tokens, decoder layers, experts a token visits], uint8, or int16 for
    more than 256 experts; 0 in layers without experts. They are those of the token before it, whose pass gave its log-prob: the first
    row is of the prompt's last token, and there is none of the last token, which was not computed.
    """

    tokens: NDArray[np.int32]
    logprobs: list[float]
    finish: Literal["stop", "length"]
    policy_version: int
    cached_tokens: int = 0
    routed_experts: NDArray[np.uint8] | NDArray[np.int16] | None = None

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Completion):
            return NotImplemented
        routed, others = self.routed_experts, other.routed_experts
        same = routed is others if routed is None or others is None else np.array_equal(routed, others)
        return (
            same
            and np.array_equal(self.tokens, other.tokens)
            and (
                (self.logprobs, self.finish, self.policy_version, self.cached_tokens)
                == (other.logprobs, other.finish, other.policy_version, other.cached_tokens)
            )
        )


def check_request(i: int, request: Request, max_context: int, vocabulary: int | None) -> None:
    """Raises ValueError, naming request number `i`, for what no engine can answer.

    max_context: tokens of prompt and completion together. vocabulary: how many token ids there are; None: not known.
    """
    tokens, sampling = np.asarray(request.tokens), request.sampling
    if len(tokens) == 0:
        raise ValueError(f"request {i} has an empty prompt; give at least one token, such as the model's BOS")
    if request.n < 1 or sampling.max_new_tokens < 1:
        raise ValueError(f"request {i}: n={request.n} and max_new_tokens={sampling.max_new_tokens} must be at least 1")
    if len(tokens) + sampling.max_new_tokens > max_context:
        raise ValueError(
            f"request {i}: {len(tokens)} prompt tokens and max_new_tokens={sampling.max_new_tokens} exceed the "
            f"context of {max_context} tokens; shorten the prompt"
            + (f" or ask for at most {max_context - len(tokens)}" if len(tokens) < max_context else "")
        )
    bad = [token for token in (int(tokens.min()), int(tokens.max())) if not 0 <= token < (vocabulary or math.inf)]
    if bad:
        of = "no token" if vocabulary is None else f"outside the vocabulary of {vocabulary}"
        raise ValueError(f"request {i}: token id {bad[0]} is {of}; use the tokenizer that belongs to the model")
    if not (0 <= sampling.temperature < math.inf and 0 < sampling.top_p <= 1 and sampling.top_k >= 0):
        raise ValueError(
            f"request {i}: temperature={sampling.temperature} must be finite and at least 0, "
            f"top_p={sampling.top_p} in (0, 1], top_k={sampling.top_k} at least 0 (0: off)"
        )


@dataclass
class EngineStats:
    """Sums since the engine started."""

    requests: int = 0
    prompt_tokens: int = 0  # tokens in all requests
    cached_tokens: int = 0  # of these, not computed again
    cacheable_tokens: int = 0  # of prompt_tokens, what an ideal prefix cache would not have computed again
    generated_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0


def whole(tensor: torch.Tensor | Merged, dtype: torch.dtype | None = None) -> torch.Tensor:
    """The tensor in `dtype` (None: its own), gathered where it is sharded: then a collective of all its ranks."""
    if isinstance(tensor, Merged):
        return tensor.whole().to(dtype or tensor.dtype)
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
        this, and gather in the order of names. Or promises of one (Merged), which `whole` makes as well. Raises KeyError for unknown or
        missing names, ValueError for a wrong shape; then nothing has changed."""
        ...

    def stats(self) -> EngineStats: ...

    def close(self) -> None: ...


class SharedEngine(Engine, Protocol):
    """An engine that lends the memory of its GPUs to the trainer (engine.share_gpu). The order is release_memory, update_weights,
    resume_memory, and only then `generate`: after a release the engine is without weights."""

    def release_memory(self) -> None:
        """Gives the memory of weights and key/value cache back to the device."""
        ...

    def resume_memory(self) -> None:
        """Takes it again, as far as `update_weights` has not."""
        ...
