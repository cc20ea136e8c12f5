"""What the engine works on: requests and their completions while they are under way."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from swirl_fast.engines.engine import Completion, Request
from swirl_fast.engines.local.prefix_cache import CacheNode


@dataclass(eq=False)
class Prompt:
    """A request under way. Its context is all but its last token: what the prefill computes."""

    request: Request
    rank: int  # place in the order of tokens, in which neighbours share the most
    tokens: np.ndarray
    salt: int = 0  # added to the tokens under which the tree knows the prompt
    slots: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))  # of the context
    node: CacheNode | None = None
    cached: int | None = None  # None until the first of its sequences is admitted

    @property
    def path(self) -> np.ndarray:
        """The context as the tree knows it."""
        return self.tokens[:-1] + self.salt


@dataclass(eq=False)
class Generation:
    """A completion under way."""

    prompt: Prompt
    uniforms: np.ndarray  # float32 [max_new_tokens], one for every token it may sample
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish: Literal["stop", "length"] | None = None
    routed: list[np.ndarray] = field(default_factory=list)  # where asked for, of every token [layers, experts]

    @property
    def left(self) -> int:
        """How many tokens it may still sample."""
        return len(self.uniforms) - len(self.tokens)

    def append(self, token: int, logprob: float) -> bool:
        """Whether the sequence ended with this token."""
        self.tokens.append(token)
        self.logprobs.append(logprob)
        if token in self.prompt.request.stop_ids:
            self.finish = "stop"
        elif not self.left:
            self.finish = "length"
        return self.finish is not None

    def completion(self, version: int) -> Completion:
        assert self.finish is not None and self.prompt.cached is not None, "a sequence was left unfinished"
        routed = np.stack(self.routed) if self.routed else None
        return Completion(
            np.array(self.tokens, np.int32), self.logprobs, self.finish, version, self.prompt.cached, routed
        )


def begin_generation(prompt: Prompt, index: int) -> Generation:
    """The completion number `index` of the prompt's request, with random numbers that depend on its seed and index only."""
    source = np.random.default_rng([prompt.request.seed % 2**64, index])
    return Generation(prompt, source.random(prompt.request.sampling.max_new_tokens, dtype=np.float32))
