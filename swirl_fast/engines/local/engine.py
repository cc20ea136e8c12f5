"""The embedded engine: a transformers model in this process, every shared prefix computed once.

    prefill   all prompts that begin together go into one radix tree first (prefix_cache.py), so that what they share is
              computed once, and what an earlier call computed not at all.
    decode    one row a sequence, n rows a request; keys that rows share are read once for all of them.

The last prompt token is fed by the first decode step, never by the prefill: a fully cached prompt then is no special
case, and the prefill needs no logits. Rows that have ended are replaced by waiting sequences as soon as the work wasted
on them has cost as much as a new arrangement. Left out: CUDA graphs, paging, speculation; large models have SGLang.

Shapes: B sequences decoded together, T tokens in one pass, V vocabulary, Hq query and Hkv key/value heads, D head size.
"""

from __future__ import annotations

import copy
import itertools
import math
import platform
import time
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from torch.backends import mkldnn
from transformers import AttentionInterface, PreTrainedConfig, PreTrainedModel

from swirl_fast.engines.engine import Completion, EngineStats, Request, Sampling, whole
from swirl_fast.engines.local.prefix_cache import DecodePass, Node, PrefillPass, PrefixCache
from swirl_fast.prefixes import common_prefix

ATTENTION = "swirl_engine"
# In one pass. CPU: plain linear layers reach 190 GFLOP/s (2 Zen 4 cores, float32); 1,024: 160, 64: 131.
PREFILL_TOKENS = {"cpu": 512, "cuda": 4096}


class LocalEngine:
    """A rollout engine on a transformers causal language model, on the CPU or one GPU. Not thread-safe.

    model: a copy nobody else uses: `update_weights` overwrites its weights, and its attention is replaced. On an x86
    CPU the weights of linear layers are kept a second time, in a faster layout.
    max_sequences: sequences decoded at a time; the others wait.
    cache_tokens: tokens whose keys and values are kept between calls, 2 * layers * Hkv * D numbers each (46 KB for a
    135M model in float32). A call takes more while its own sequences need more.
    device: where to move the model; None leaves it.
    prefix_cache: False computes every completion's prompt for itself and keeps nothing, as a server without such a
    cache does: for comparisons, and for telling whether the cache is to blame. Results are the same up to rounding.
    Raises ValueError, with name and reason, for a model that cannot be decoded from cached keys and values.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        max_sequences: int,
        cache_tokens: int,
        device: torch.device | str | None = None,
        prefix_cache: bool = True,
    ) -> None:
        if max_sequences < 1 or cache_tokens < 0:
            raise ValueError(
                f"max_sequences={max_sequences} must be at least 1, cache_tokens={cache_tokens} at least 0"
            )
        _refuse(model)
        self._model: Any = model.eval().requires_grad_(False)
        if device is not None:
            self._model.to(device)
        # Models built from one configuration object share it: the attention is switched on a copy.
        memo: dict[int, Any] = {}
        for module in self._model.modules():
            if isinstance(getattr(module, "config", None), PreTrainedConfig):
                module.config = copy.deepcopy(module.config, memo)
        self.max_context = int(self._model.config.get_text_config().max_position_embeddings)
        self.max_sequences = max_sequences
        self.prefix_cache = prefix_cache
        self._vocabulary = int(self._model.get_input_embeddings().weight.shape[0])
        self._device = self._model.device
        self._cache = PrefixCache(cache_tokens, self._device)
        self._version = 0
        self._stats = EngineStats()
        self._packs = self._device.type == "cpu" and platform.machine() in ("x86_64", "AMD64") and mkldnn.is_available()
        if self._packs:
            _pack(self._model)
        self._check_model()

    @torch.inference_mode()
    def generate(self, requests: Sequence[Request]) -> list[list[Completion]]:
        """One list of `request.n` completions a request, in order. The random numbers of a completion come from its
        request's seed and its own index alone, not from the requests around it.

        Raises ValueError for an empty prompt, one that leaves no room for `max_new_tokens`, a token outside the
        vocabulary and impossible sampling settings, before anything is computed; RuntimeError for logits that are not
        finite.
        """
        for i, request in enumerate(requests):
            self._check_request(i, request)
        try:
            return self._generate(requests)
        except BaseException:
            self._cache.clear()  # the tree may hold tokens whose keys were never computed
            raise

    @torch.no_grad()
    def update_weights(self, named_tensors: Iterable[tuple[str, torch.Tensor]], version: int) -> None:
        """Copies new weights into the model, drops the cache and sets the version of later completions.

        named_tensors: names as in `model.state_dict()`, every parameter once (of tied parameters one name is enough),
        any dtype, any device; sharded ones (DTensor) are gathered one at a time, by all their ranks. Raises KeyError for
        unknown or missing names, ValueError for a wrong shape; then nothing has changed.
        """
        own = self._model.state_dict(keep_vars=True)
        new = dict(named_tensors)
        unknown = sorted(new.keys() - own.keys())
        if unknown:
            raise KeyError(f"the model has no weights named {_some(unknown)}; its names are like {next(iter(own))}")
        given = {id(own[name]) for name in new}
        missing = [name for name, parameter in self._model.named_parameters() if id(parameter) not in given]
        if missing:
            raise KeyError(f"{len(missing)} weights are missing: {_some(missing)}; send every parameter of the model")
        for name, tensor in new.items():
            if tensor.shape != own[name].shape:
                raise ValueError(f"{name} has shape {tuple(tensor.shape)}, the model's is {tuple(own[name].shape)}")
        self._cache.clear()
        for name, tensor in new.items():
            own[name].copy_(whole(tensor, own[name].dtype))
        if self._packs:
            _pack(self._model)
        self._version = version

    def stats(self) -> EngineStats:
        """A snapshot of the totals. cacheable_tokens: of every call `cacheable` of its prompts, plus how many of their
        distinct prefixes the cache held when the call began. What earlier calls computed and the cache has evicted
        since is not counted, nor is what the call itself samples before it gets to a prompt that begins with it: by
        that cached_tokens may be a little more."""
        return copy.deepcopy(self._stats)

    def close(self) -> None:
        """Gives the cache's memory back."""
        self._cache.clear()

    def _generate(self, requests: Sequence[Request]) -> list[list[Completion]]:
        order = sorted(range(len(requests)), key=lambda i: list(requests[i].tokens))
        prompts = [_Prompt(requests[i], rank, np.array(requests[i].tokens, np.int64)) for rank, i in enumerate(order)]
        self._stats.cacheable_tokens += self._cacheable(prompts)
        # Without the cache every sequence has a prompt of its own, under tokens that nothing else in the tree has.
        salts = itertools.count(self._vocabulary, self._vocabulary)
        sequences = [
            [
                _begin(prompt if self.prefix_cache else replace(prompt, salt=next(salts)), i)
                for i in range(prompt.request.n)
            ]
            for prompt in prompts
        ]
        queue = deque(sequence for siblings in sequences for sequence in siblings)
        rows: list[_Sequence] = []
        place: dict[int, int] = {}  # id of a sequence -> its row in the arrangement before
        decode: DecodePass | None = None
        while queue or rows:
            began = time.perf_counter()
            admitted = [queue.popleft() for _ in range(min(len(queue), self.max_sequences - len(rows)))]
            self._cache.advance(row.prompt.node for row in rows if row.prompt.node is not None)
            self._prefill(admitted)
            self._stats.prefill_seconds += self._since(began)
            began = time.perf_counter()
            rows = sorted(rows + admitted, key=lambda row: row.prompt.rank)
            decode = DecodePass(
                self._cache,
                contexts=[row.prompt.slots for row in rows],
                sampled=[len(row.tokens) for row in rows],
                steps=max(row.left for row in rows),
                previous=decode,
                source=[place.get(id(row), 0) for row in rows],
            )
            place = {id(row): i for i, row in enumerate(rows)}
            self._decode(rows, decode)
            self._keep(rows, decode)
            rows = [row for row in rows if row.finish is None]
            self._stats.decode_seconds += self._since(began)
        if self.prefix_cache:
            self._cache.trim()
        else:
            self._cache.clear()
        results: list[list[Completion]] = [[] for _ in requests]
        for i, siblings in zip(order, sequences, strict=True):
            results[i] = [sequence.completion(self._version) for sequence in siblings]
            self._stats.requests += 1
            self._stats.prompt_tokens += len(requests[i].tokens)
            self._stats.cached_tokens += results[i][0].cached_tokens
            self._stats.generated_tokens += sum(len(completion.tokens) for completion in results[i])
        return results

    def _cacheable(self, prompts: Sequence[_Prompt]) -> int:
        """As `stats` says; prompts in the order of their tokens, where a prefix that came before is one of the neighbour
        before."""
        total, before = 0, np.empty(0, np.int64)
        for prompt in prompts:
            context = prompt.tokens[:-1]
            total += max(self._cache.known(context), common_prefix(before, context))
            before = context
        return total

    def _prefill(self, admitted: Sequence[_Sequence]) -> None:
        """Puts the contexts of these sequences into the tree and computes what was not there."""
        prompts = list({id(sequence.prompt): sequence.prompt for sequence in admitted}.values())
        for prompt in prompts:
            self._cache.touch(prompt.path)  # before any of them makes room for itself
        pieces: list[tuple[_Prompt, int, int]] = []  # of one pass: prompt and the depths that are new
        room = PREFILL_TOKENS[self._device.type]
        for prompt in prompts:
            prompt.node, prompt.slots, known = self._cache.insert(prompt.path)
            prompt.cached = known if prompt.cached is None else min(known, prompt.cached)
            start = known
            while start < len(prompt.slots):
                stop = min(start + room, len(prompt.slots))
                pieces.append((prompt, start, stop))
                room -= stop - start
                start = stop
                if not room:
                    self._compute(pieces)
                    pieces, room = [], PREFILL_TOKENS[self._device.type]
        if pieces:
            self._compute(pieces)

    def _compute(self, pieces: Sequence[tuple[_Prompt, int, int]]) -> None:
        tokens = np.concatenate([prompt.tokens[start:stop] for prompt, start, stop in pieces])
        positions = np.concatenate([np.arange(start, stop) for _, start, stop in pieces])
        swirl = PrefillPass(self._cache, [(prompt.slots[:stop], start) for prompt, start, stop in pieces])
        self._forward(self._model.base_model, torch.as_tensor(tokens), torch.as_tensor(positions), swirl)

    def _decode(self, rows: Sequence[_Sequence], decode: DecodePass) -> None:
        """Samples until the work wasted on rows that have ended is worth a new arrangement: half a step of all, by estimate."""
        settings = [row.prompt.request.sampling for row in rows]
        temperature = torch.tensor([s.temperature for s in settings], dtype=torch.float32, device=self._device)
        top_k = torch.tensor([s.top_k for s in settings], device=self._device)
        top_p = torch.tensor([s.top_p for s in settings], dtype=torch.float32, device=self._device)
        uniforms = np.full((max(row.left for row in rows), len(rows)), 0.5, np.float32)
        for i, row in enumerate(rows):
            uniforms[: row.left, i] = row.uniforms[len(row.tokens) :]
        inputs = torch.tensor([row.tokens[-1] if row.tokens else int(row.prompt.tokens[-1]) for row in rows])
        ended = wasted = 0
        for uniform in torch.as_tensor(uniforms, device=self._device):
            logits = self._forward(self._model, inputs, decode.positions, decode).logits[0].float()
            inputs, logprobs = sample(logits, temperature, top_k, top_p, uniform)
            decode.advance(self.max_context - 1)
            for row, token, logprob in zip(rows, inputs.tolist(), logprobs.tolist(), strict=True):
                if row.finish is None:
                    ended += row.append(token, logprob)
            wasted += ended
            if ended == len(rows) or 2 * wasted >= len(rows):
                return

    def _keep(self, rows: Sequence[_Sequence], decode: DecodePass) -> None:
        """Puts what ended rows sampled into the cache: the next state of a trajectory starts with it."""
        if not self.prefix_cache:
            return
        ended = []
        for i, row in enumerate(rows):
            if row.finish is not None:
                path = np.append(row.prompt.tokens, np.array(row.tokens[:-1], np.int64))
                _, slots, known = self._cache.insert(path, grow=False)
                assert known >= len(row.prompt.slots), "the context of a sequence under way was evicted"
                ended.append((i, known, slots[known:]))
        decode.store(ended)

    def _forward(
        self, model: Any, tokens: torch.Tensor, positions: torch.Tensor, swirl: PrefillPass | DecodePass
    ) -> Any:
        tokens, positions = tokens.to(self._device), positions.to(self._device)
        return model(input_ids=tokens[None], position_ids=positions[None], use_cache=False, swirl=swirl)

    def _since(self, began: float) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter() - began

    def _check_request(self, i: int, request: Request) -> None:
        tokens, sampling = request.tokens, request.sampling
        if len(tokens) == 0:
            raise ValueError(f"request {i} has an empty prompt; give at least one token, such as the model's BOS")
        if request.n < 1 or sampling.max_new_tokens < 1:
            raise ValueError(
                f"request {i}: n={request.n} and max_new_tokens={sampling.max_new_tokens} must be at least 1"
            )
        if len(tokens) + sampling.max_new_tokens > self.max_context:
            raise ValueError(
                f"request {i}: {len(tokens)} prompt tokens and max_new_tokens={sampling.max_new_tokens} exceed the "
                f"context of {self.max_context} tokens; shorten the prompt"
                + (f" or ask for at most {self.max_context - len(tokens)}" if len(tokens) < self.max_context else "")
            )
        bad = [token for token in (min(tokens), max(tokens)) if not 0 <= token < self._vocabulary]
        if bad:
            raise ValueError(
                f"request {i}: token id {bad[0]} is outside the vocabulary of {self._vocabulary}; "
                "use the tokenizer that belongs to the model"
            )
        if not (0 <= sampling.temperature < math.inf and 0 < sampling.top_p <= 1 and sampling.top_k >= 0):
            raise ValueError(
                f"request {i}: temperature={sampling.temperature} must be finite and at least 0, "
                f"top_p={sampling.top_p} in (0, 1], top_k={sampling.top_k} at least 0 (0: off)"
            )

    @torch.inference_mode()
    def _check_model(self) -> None:
        """Four greedy tokens must have the log-probs of a plain forward pass: catches what no configuration tells."""
        name = type(self._model).__name__
        prompt = [7 * i % self._vocabulary for i in range(5)]
        self._model.set_attn_implementation(ATTENTION)
        try:
            (completion,) = self.generate([Request(prompt, Sampling(max_new_tokens=4, temperature=0.0))])[0]
        except Exception as error:
            raise ValueError(f"LocalEngine cannot run {name}: {error}") from error
        self._model.set_attn_implementation("eager")  # the definition; "sdpa" leaves Gemma 2's soft-cap out
        tokens = torch.tensor([prompt + completion.tokens], device=self._device)
        logits = self._model(input_ids=tokens, use_cache=False).logits[0, len(prompt) - 1 : -1].float()
        self._model.set_attn_implementation(ATTENTION)
        plain = logits.log_softmax(-1).gather(1, tokens[0, len(prompt) :, None])[:, 0].cpu()
        gap = (plain - torch.tensor(completion.logprobs)).abs().max().item()
        # In bfloat16 rounding alone makes a gap of some hundredths; a model with other state is far off.
        if gap > (1e-3 if self._model.dtype == torch.float32 else 0.25):
            raise ValueError(
                f"LocalEngine cannot run {name}: decoding from cached keys and values differs by {gap:.2g} in "
                "log-probability from a plain forward pass, so the model keeps other state; serve it with SGLang"
            )
        self._cache.clear()
        self._stats = EngineStats()


@dataclass(eq=False)
class _Prompt:
    """A request under way. Its context is all but its last token: what the prefill computes."""

    request: Request
    rank: int  # place in the order of tokens, in which neighbours share the most
    tokens: np.ndarray
    salt: int = 0  # added to the tokens under which the tree knows the prompt
    slots: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))  # of the context
    node: Node | None = None
    cached: int | None = None  # None until the first of its sequences is admitted

    @property
    def path(self) -> np.ndarray:
        """The context as the tree knows it."""
        return self.tokens[:-1] + self.salt


@dataclass(eq=False)
class _Sequence:
    """One completion under way."""

    prompt: _Prompt
    uniforms: np.ndarray  # float32 [max_new_tokens], one for every token it may sample
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish: Literal["stop", "length"] | None = None

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
        return Completion(self.tokens, self.logprobs, self.finish, version, cached_tokens=self.prompt.cached)


def _begin(prompt: _Prompt, index: int) -> _Sequence:
    source = np.random.default_rng([prompt.request.seed % 2**64, index])
    return _Sequence(prompt, source.random(prompt.request.sampling.max_new_tokens, dtype=np.float32))


def sample(
    logits: torch.Tensor, temperature: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor, uniform: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """One token a row, by inversion of the distribution function at `uniform`.

    logits: float32 [B, V], overwritten. temperature: float32 [B], 0 is greedy. top_k: int64 [B], 0 keeps all. top_p:
    float32 [B]; of what top_k left, the smallest set of most probable tokens with at least this mass. uniform: float32
    [B] in [0, 1), a multiple of 2^-24.
    Returns the tokens, int64 [B], and their log-probabilities, float32 [B], under softmax(logits / temperature) before
    both cuts (greedy: of the plain softmax). Raises RuntimeError when logits are not finite.
    """
    greedy = temperature == 0
    cut = ((top_k > 0) | (top_p < 1)) & ~greedy
    tokens = logits.argmax(-1) if greedy.any() else torch.zeros_like(top_k)
    scale = torch.where(greedy, 1.0, temperature)
    probs = (logits.div_(scale[:, None]) if (scale != 1).any() else logits).softmax(-1)
    if not (greedy | cut).all():
        mass = probs.cumsum(-1)
        # uniform * mass is below the last mass, and right=True passes over masses equal to it: a positive probability
        drawn = torch.searchsorted(mass, (uniform * mass[:, -1])[:, None], right=True)[:, 0]
        tokens = torch.where(greedy | cut, tokens, drawn.clamp_(max=logits.shape[1] - 1))
    if cut.any():
        tokens[cut] = _sample_cut(probs[cut], top_k[cut], top_p[cut], uniform[cut])
    logprobs = probs.gather(1, tokens[:, None])[:, 0].log()
    if not torch.isfinite(logprobs).all():
        raise RuntimeError("the model's logits are not finite: its weights are broken, or its dtype overflows")
    return tokens, logprobs


def _sample_cut(probs: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """As `sample`, on probabilities [B, V]. Only candidates are sorted: all tokens below (1 - top_p) / V together weigh
    less than 1 - top_p, so none of them can be in the set."""
    vocabulary = probs.shape[1]
    above = torch.where(top_p < 1, (probs >= ((1 - top_p) / vocabulary)[:, None]).sum(-1), vocabulary)
    kept = torch.where(top_k > 0, top_k.clamp(max=vocabulary), above.clamp(min=1))
    probs, ids = probs.topk(int(kept.max()), dim=-1)
    probs = probs * (torch.arange(probs.shape[1], device=probs.device) < kept[:, None])
    total = torch.where(top_k > 0, probs.sum(-1), 1.0)
    before = probs.cumsum(-1) - probs
    mass = (probs * (before < (top_p * total)[:, None])).cumsum(-1)
    drawn = torch.searchsorted(mass, uniform[:, None] * mass[:, -1:], right=True)
    return ids.gather(1, drawn.clamp_(max=ids.shape[1] - 1))[:, 0]


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *_: Any,
    scaling: float | None = None,
    softcap: float | None = None,
    sliding_window: int | None = None,
    s_aux: torch.Tensor | None = None,
    swirl: PrefillPass | DecodePass | None = None,
    **__: Any,
) -> tuple[torch.Tensor, None]:
    """What transformers calls in every layer: query [1, Hq, T, D], key and value [1, Hkv, T, D] -> [1, T, Hq, D]."""
    if swirl is None:
        raise RuntimeError("this model belongs to a LocalEngine: run another copy, or run it through the engine")
    if s_aux is not None:
        raise ValueError(f"{type(module).__name__} has attention sinks, which are not implemented")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    layer: Any = module.layer_idx
    return swirl.attend(layer, query[0], key[0], value[0], scale, softcap, sliding_window)[None], None


AttentionInterface.register(ATTENTION, _attention)


def _pack(model: torch.nn.Module) -> None:
    """Gives every linear layer a copy of its weight in oneDNN's blocked layout, to be renewed when weights change. The
    layers of a 135M model (no head, 2 Zen 4 cores) take 0.55 of the time with 16 rows, 0.71 with 64 and 0.88 with 512;
    in bfloat16 0.63, 0.78 and 0.93."""
    supported = {torch.float32} | ({torch.bfloat16} if torch.ops.mkldnn._is_mkldnn_bf16_supported() else set())
    for module in model.modules():
        if type(module) is torch.nn.Linear and module.weight.dtype in supported:
            packed = torch.ops.mkldnn._reorder_linear_weight(module.weight.detach(), PREFILL_TOKENS["cpu"])
            module.forward = partial(_packed_linear, packed, module.bias)  # type: ignore[method-assign]


def _packed_linear(weight: torch.Tensor, bias: torch.Tensor | None, x: torch.Tensor) -> torch.Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _refuse(model: PreTrainedModel) -> None:
    """Raises ValueError when the configuration already tells that keys and values of single tokens do not suffice."""
    text = model.config.get_text_config()
    layers = set(getattr(text, "layer_types", None) or ()) - {"full_attention", "sliding_attention", "attention"}
    rope = getattr(text, "rope_parameters", None) or {}
    ropes = {d.get("rope_type") for d in (rope, *rope.values()) if isinstance(d, dict)} & {"dynamic", "longrope"}
    if model.config.is_encoder_decoder:
        reason = "it is an encoder-decoder"
    elif model._is_stateful or layers:
        reason = f"it has layers with other state than keys and values ({', '.join(sorted(layers)) or 'state-space'})"
    elif ropes:
        reason = f"its rope_type {ropes.pop()!r} changes the keys of old tokens when a sequence grows"
    elif not model._supports_attention_backend:
        reason = "its attention does not go through transformers' attention interface"
    elif not getattr(text, "max_position_embeddings", None):
        reason = "its configuration has no max_position_embeddings"
    else:
        return
    raise ValueError(f"LocalEngine cannot run {type(model).__name__}: {reason}; serve it with SGLang")
