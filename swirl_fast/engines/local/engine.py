"""The embedded engine: a transformers model in this process, every shared prefix computed once.

    prefill   all prompts that begin together go into one radix tree first (prefix_cache.py), so that what they share is
              computed once, and what an earlier call computed not at all.
    decode    one row a sequence, n rows a request; keys that rows share are read once for all of them.

The last prompt token is fed by the first decode step, never by the prefill: a fully cached prompt is then not a special
case, and the prefill needs no logits. Rows that have ended are replaced by waiting sequences as soon as the work wasted
on them has cost as much as a new arrangement. Left out: CUDA graphs, paging, speculation; large models have SGLang.

Shapes: B sequences decoded together, T tokens in one pass, V vocabulary, Hq query and Hkv key/value heads, D head size.
"""

from __future__ import annotations

import copy
import itertools
import time
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedConfig, PreTrainedModel

from swirl_fast.engines.engine import Completion, EngineStats, Request, Sampling, check_request, whole
from swirl_fast.engines.local.attention import ATTENTION, DecodePass, PrefillPass
from swirl_fast.engines.local.linear import can_pack_linear_layers, pack_linear_layers
from swirl_fast.engines.local.plain import complete
from swirl_fast.engines.local.prefix_cache import PrefixCache
from swirl_fast.engines.local.sampling import sample_tokens
from swirl_fast.engines.local.sequences import Generation, Prompt, begin_generation
from swirl_fast.models.exact import context_of, own_attention, ropes_by_length, why_not_causal, why_not_shared
from swirl_fast.models.routing import RoutingReader
from swirl_fast.models.windows import lost_window
from swirl_fast.prefixes import common_prefix

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
    A model whose prefixes cannot be shared is decoded by its own `generate` (plain.py), every prompt for itself. Raises ValueError, with
    name and reason, for a model that cannot be decoded exactly. uncached: why nothing is shared, as half a sentence, or None.
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
        _refuse_model(model)
        self._model: Any = model.eval().requires_grad_(False)
        if device is not None:
            self._model.to(device)
        # Models built from one configuration object share it: the attention is switched on a copy.
        memo: dict[int, Any] = {}
        for module in self._model.modules():
            if isinstance(getattr(module, "config", None), PreTrainedConfig):
                module.config = copy.deepcopy(module.config, memo)
        self.max_context = context_of(self._model.config)
        self.uncached = why_not_shared(model.config, type(model))
        self._own_attention = own_attention(model)
        self.max_sequences = max_sequences
        self.prefix_cache = prefix_cache
        self._vocabulary = int(self._model.get_input_embeddings().weight.shape[0])
        self._device = self._model.device
        self._cache = PrefixCache(cache_tokens, self._device)
        self._version = 0
        self._stats = EngineStats()
        self._packs = can_pack_linear_layers(self._device)
        if self._packs:
            pack_linear_layers(self._model, PREFILL_TOKENS["cpu"])
        self._reader: RoutingReader | None = None  # once it is asked for
        self._check_model()

    @torch.inference_mode()
    def generate(self, requests: Sequence[Request]) -> list[list[Completion]]:
        """One list of `request.n` completions a request, in order. The random numbers of a completion come from its
        request's seed and its own index only, not from the requests around it.

        Raises ValueError for an empty prompt, one that leaves no room for `max_new_tokens`, a token outside the
        vocabulary and impossible sampling settings, before anything is computed; RuntimeError for logits that are not
        finite.
        """
        for i, request in enumerate(requests):
            check_request(i, request, self.max_context, self._vocabulary)
        if self._reader is None and any(request.routed_experts for request in requests):
            self._reader = RoutingReader(self._model)
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
            pack_linear_layers(self._model, PREFILL_TOKENS["cpu"])
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
        tokens = [np.array(request.tokens, np.int64) for request in requests]
        order = sorted(range(len(requests)), key=lambda i: tokens[i].tolist())
        prompts = [Prompt(requests[i], rank, tokens[i]) for rank, i in enumerate(order)]
        self._stats.cacheable_tokens += self._cacheable(prompts)
        # Without the cache every sequence has a prompt of its own, under tokens that nothing else in the tree has.
        salts = itertools.count(self._vocabulary, self._vocabulary)
        sequences = [
            [
                begin_generation(prompt if self.prefix_cache else replace(prompt, salt=next(salts)), i)
                for i in range(prompt.request.n)
            ]
            for prompt in prompts
        ]
        queue = [sequence for siblings in sequences for sequence in siblings]
        if self.uncached is None:
            self._generate_from_cache(deque(queue))
        else:
            prefill, decode = complete(self._model, queue, self.max_sequences)
            self._stats.prefill_seconds += prefill
            self._stats.decode_seconds += decode
        results: list[list[Completion]] = [[] for _ in requests]
        for i, siblings in zip(order, sequences, strict=True):
            results[i] = [sequence.completion(self._version) for sequence in siblings]
            self._stats.requests += 1
            self._stats.prompt_tokens += len(requests[i].tokens)
            self._stats.cached_tokens += results[i][0].cached_tokens
            self._stats.generated_tokens += sum(len(completion.tokens) for completion in results[i])
        return results

    def _generate_from_cache(self, queue: deque[Generation]) -> None:
        """Samples all sequences to their ends."""
        rows: list[Generation] = []
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

    def _cacheable(self, prompts: Sequence[Prompt]) -> int:
        """As `stats` says; prompts in the order of their tokens, where a prefix that came before is one of the neighbour
        before."""
        total, before = 0, np.empty(0, np.int64)
        for prompt in prompts:
            context = prompt.tokens[:-1]
            total += max(self._cache.known(context), common_prefix(before, context))
            before = context
        return total

    def _prefill(self, admitted: Sequence[Generation]) -> None:
        """Puts the contexts of these sequences into the tree and computes what was not there."""
        prompts = list({id(sequence.prompt): sequence.prompt for sequence in admitted}.values())
        for prompt in prompts:
            self._cache.touch(prompt.path)  # before any of them makes room for itself
        pieces: list[tuple[Prompt, int, int]] = []  # of one pass: prompt and the depths that are new
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

    def _compute(self, pieces: Sequence[tuple[Prompt, int, int]]) -> None:
        tokens = np.concatenate([prompt.tokens[start:stop] for prompt, start, stop in pieces])
        positions = np.concatenate([np.arange(start, stop) for _, start, stop in pieces])
        swirl = PrefillPass(self._cache, [(prompt.slots[:stop], start) for prompt, start, stop in pieces])
        self._forward(self._model.base_model, torch.as_tensor(tokens), torch.as_tensor(positions), swirl)

    def _decode(self, rows: Sequence[Generation], decode: DecodePass) -> None:
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
            inputs, logprobs = sample_tokens(logits, temperature, top_k, top_p, uniform)
            decode.advance(self.max_context - 1)
            routed = self._reader.last().numpy() if self._reader is not None else None
            for i, (row, token, logprob) in enumerate(zip(rows, inputs.tolist(), logprobs.tolist(), strict=True)):
                if row.finish is None:
                    if routed is not None and row.prompt.request.routed_experts:
                        row.routed.append(routed[i])
                    ended += row.append(token, logprob)
            wasted += ended
            if ended == len(rows) or 2 * wasted >= len(rows):
                return

    def _keep(self, rows: Sequence[Generation], decode: DecodePass) -> None:
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

    @torch.inference_mode()
    def _check_model(self) -> None:
        """Four greedy tokens must have the log-probs of a plain forward pass: catches what no configuration tells."""
        name = type(self._model).__name__
        prompt = np.arange(5, dtype=np.int32) * 7 % self._vocabulary
        attention = ATTENTION if self.uncached is None else self._own_attention
        self._model.set_attn_implementation(attention)
        try:
            (completion,) = self.generate([Request(prompt, Sampling(max_new_tokens=4, temperature=0.0))])[0]
        except Exception as error:
            raise ValueError(f"LocalEngine cannot run {name}: {error}; serve it with SGLang") from error
        if self.uncached is None:
            self.uncached = lost_window(self._model.config, self._cache.told, self.max_context)
            if self.uncached is not None:
                return self._check_model()
            self._model.set_attn_implementation("eager")  # the definition; "sdpa" leaves Gemma 2's soft-cap out
        tokens = torch.tensor([[*prompt, *completion.tokens.tolist()]], device=self._device)
        logits = self._model(input_ids=tokens, use_cache=False).logits[0, len(prompt) - 1 : -1].float()
        self._model.set_attn_implementation(attention)
        plain = logits.log_softmax(-1).gather(1, tokens[0, len(prompt) :, None])[:, 0].cpu()
        gap = (plain - torch.tensor(completion.logprobs)).abs().max().item()
        # In bfloat16 rounding makes a gap of some hundredths; a model with other state is far off.
        if gap > (1e-3 if self._model.dtype == torch.float32 else 0.25):
            raise ValueError(
                f"LocalEngine cannot run {name}: decoding token by token differs by {gap:.2g} in log-probability from a plain forward "
                "pass, so the model keeps other state; serve it with SGLang"
            )
        self._cache.clear()
        self._stats = EngineStats()


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _refuse_model(model: PreTrainedModel) -> None:
    """Raises ValueError when the configuration already tells that the model cannot be decoded token by token."""
    reason = why_not_causal(model.config)
    if reason is None and (ropes := ropes_by_length(model.config)):
        reason = f"its rope_type {next(iter(ropes))!r} changes the keys of old tokens when a sequence grows"
    if reason is not None:
        raise ValueError(f"LocalEngine cannot run {type(model).__name__}: {reason}; serve it with SGLang")
