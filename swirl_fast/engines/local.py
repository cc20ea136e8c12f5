"""The embedded engine: a transformers model in this process, every shared prefix computed once.

    prefill   all prompts of a round go into one radix tree first (prefix_cache.py); only tokens the tree does not know are
              computed, packed into one row, each run of them against the keys of its own path.
    decode    one row a sequence. Keys that several sequences share are read once for all of them, and only the rest is
              read per sequence:

        prompts   ┌──────── shared by all ────────┬── rest of 1 ──┐ sampled so far 1        scores of one head:
                  │                               ├── rest of 2 ──┤ sampled so far 2          [rows, shared] one product
                  └───────────────────────────────┴── rest of 3 ──┘ sampled so far 3          [row, rest], [row, sampled]

The last prompt token is fed by the first decode step, never by the prefill: a fully cached prompt then needs no special case,
and the prefill no logits. Finished rows are replaced when the work wasted on them has cost as much as a new arrangement.
Left out: CUDA graphs, paging, speculation; for real serving there is the SGLang engine.

Shapes: B sequences decoded together, T packed prompt tokens, V vocabulary, Hq query and Hkv key/value heads, g = Hq / Hkv,
D head dimension, S keys.
"""

from __future__ import annotations

import copy
import math
import platform
import time
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch.backends import mkldnn
from transformers import AttentionInterface, PreTrainedConfig, PreTrainedModel

from swirl_fast.engines.engine import Completion, EngineStats, Request, Sampling
from swirl_fast.engines.prefix_cache import Node, PrefixCache, Where, common_length

ATTENTION = "swirl_engine"
PREFILL_TOKENS = 512  # a pass: 190 GFLOP/s on 2 Zen 4 cores in fp32; 160 at 1,024, 131 at 64
BLOCK_TOKENS = 256  # reading so many keys costs as much as the calls of one more block (25 us a layer, 0.1 us a key)


# ------------------------------------------------------------------------------------------------------------------ attention


def _attention(module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any,
               scaling: float | None = None, softcap: float | None = None, sliding_window: int | None = None,
               swirl: _Prefill | _Decode | None = None, s_aux: torch.Tensor | None = None,
               **__: Any) -> tuple[torch.Tensor, None]:  # fmt: skip
    """What transformers calls in every layer: query [1, Hq, T, D], key and value [1, Hkv, T, D] -> [1, T, Hq, D]."""
    if swirl is None:
        raise RuntimeError(
            "this model belongs to a LocalEngine: run another copy of it, or this one through the engine"
        )
    if s_aux is not None:
        raise ValueError(f"{type(module).__name__} uses attention sinks, which LocalEngine does not implement")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    out = swirl.attend(int(module.layer_idx), query[0], key[0], value[0], scale, softcap, sliding_window)  # type: ignore[arg-type]
    return out.unsqueeze(0), None


AttentionInterface.register(ATTENTION, _attention)


class _Prefill:
    """One pass over prompt tokens that nobody has computed: `pieces` of (path slots up to the piece's end, its first depth)."""

    def __init__(self, cache: PrefixCache, pieces: Sequence[tuple[np.ndarray, int]]) -> None:
        self.cache = cache
        self.paths = pieces
        self.new = torch.as_tensor(np.concatenate([path[start:] for path, start in pieces]), device=cache.device)
        self.plans: dict[int | None, list[tuple[slice, Where, torch.Tensor]]] = {}

    def plan(self, window: int | None, dtype: torch.dtype) -> list[tuple[slice, Where, torch.Tensor]]:
        """Per piece: its rows, the keys it may see, and which of them each row sees, [rows, keys] of 0 and -inf."""
        if window not in self.plans:
            plan, row = [], 0
            for path, start in self.paths:
                first = 0 if window is None else max(0, start + 1 - window)
                query = torch.arange(start, len(path), device=self.cache.device)[:, None]
                depth = torch.arange(first, len(path), device=self.cache.device)
                hidden = depth > query
                if window is not None:
                    hidden |= depth <= query - window
                mask = torch.zeros(hidden.shape, dtype=dtype, device=self.cache.device).masked_fill_(hidden, -math.inf)
                rows = slice(row, row + len(path) - start)
                plan.append((rows, self.cache.locate(path[first:]), mask))
                row = rows.stop
            self.plans[window] = plan
        return self.plans[window]

    def attend(self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float,
               softcap: float | None, window: int | None) -> torch.Tensor:  # fmt: skip
        self.cache.write(layer, self.new, key, value)
        q = query.unflatten(0, (key.shape[0], -1))  # [Hkv, g, T, D]
        out = query.new_empty(query.shape[1], query.shape[0], value.shape[2])
        for rows, where, mask in self.plan(window, query.dtype):
            keys, values = (x[:, None].expand(-1, q.shape[1], -1, -1) for x in self.cache.read(layer, where))
            if softcap is None:
                piece = F.scaled_dot_product_attention(q[:, :, rows], keys, values, attn_mask=mask, scale=scale)
            else:
                scores = (q[:, :, rows] @ keys.transpose(2, 3)).float()
                scores = scores.mul_(scale / softcap).tanh_().mul_(softcap).add_(mask)
                piece = scores.softmax(-1).to(values.dtype) @ values
            out[rows] = piece.flatten(0, 1).transpose(0, 1)
        return out


@dataclass
class _Block:
    """Keys read once for rows lo..hi of the batch; their scores stand in columns from `column` on."""

    lo: int
    hi: int
    column: int
    depths: np.ndarray
    slots: np.ndarray


def _arrange(paths: Sequence[np.ndarray]) -> tuple[list[_Block], list[list[tuple[int, int]]]]:
    """Which keys to read once for neighbouring rows, and which row by row.

    paths: the slots of every row's context, rows in the order of their tokens, so that equal prefixes are neighbours.
    Returns the blocks and, for every row, the spans of depths that are left.
    """
    rows = len(paths)
    shared = [common_length(paths[i], paths[i + 1]) for i in range(rows - 1)]
    rest: list[list[tuple[int, int]]] = [[] for _ in range(rows)]
    used = [0] * rows  # score columns taken by each row
    blocks = []

    def add(lo: int, hi: int, depths: np.ndarray) -> None:
        blocks.append(_Block(lo, hi, used[lo], depths, paths[lo][depths]))
        used[lo:hi] = [used[lo] + len(depths)] * (hi - lo)

    groups = [(0, rows, 0)]  # rows lo..hi agree up to this depth, and that far they are arranged
    while groups:
        lo, hi, depth = groups.pop()
        end = len(paths[lo]) if hi - lo == 1 else min(shared[lo : hi - 1])
        if (hi - lo - 1) * (end - depth) >= BLOCK_TOKENS:
            add(lo, hi, np.arange(depth, end))
        elif end > depth:
            for row in range(lo, hi):
                rest[row].append((depth, end))
        if hi - lo > 1:
            cuts = [lo, *(i + 1 for i in range(lo, hi - 1) if shared[i] == end), hi]
            groups.extend((a, b, end) for a, b in zip(cuts, cuts[1:], strict=False))
    # What is left is padded to the longest row: rows much longer than the others become blocks of their own.
    lengths = [sum(b - a for a, b in spans) for spans in rest]
    order = sorted(range(rows), key=lambda row: -lengths[row])
    alone = min(range(rows), key=lambda k: BLOCK_TOKENS * k + rows * lengths[order[k]])
    for row in order[:alone]:
        add(row, row + 1, np.concatenate([np.arange(a, b) for a, b in rest[row]]))
        rest[row] = []
    return blocks, rest


def _products(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """q [N, R, D] times k [N, S, D] -> [N, R, S]. Few rows against many keys: in bfloat16 on a CPU the other order is twice as
    fast (100 against 214 us for 192 x 3 x 32), in float32 it is slower (174 against 119)."""
    if q.dtype == torch.bfloat16 and q.device.type == "cpu":
        return torch.bmm(k, q.transpose(1, 2)).transpose(1, 2)
    return torch.bmm(q, k.transpose(1, 2))


class _Decode:
    """Rows that are decoded together, arranged for reading shared keys once.

    The keys of what the rows sample stand in tails [Hkv, B, columns, D], aligned at the right: every row writes column
    `at` in the same step, rows that began earlier own earlier columns too.
    """

    def __init__(self, rows: list[_Sequence], cache: PrefixCache, previous: _Decode | None) -> None:
        self.rows = rows
        device = cache.device
        contexts = [row.prompt.slots for row in rows]
        sampled = np.array([len(row.tokens) for row in rows])
        self.at = int(sampled.max())
        self.first = self.at - sampled  # column of a row's first tail token
        self.steps = max(row.max_tokens - len(row.tokens) for row in rows)  # until the last row ends
        self.positions = torch.as_tensor([len(c) for c in contexts] + sampled, device=device)
        self.inputs = torch.tensor(
            [row.tokens[-1] if row.tokens else row.prompt.tokens[-1] for row in rows], device=device
        )
        blocks, rest = _arrange(contexts)
        where = [cache.locate(block.slots) for block in blocks]
        self.blocks = [(slice(b.lo, b.hi), slice(b.column, b.column + len(b.slots))) for b in blocks]
        width = max((b.column + len(b.slots) for b in blocks), default=0)
        padded = max(sum(b - a for a, b in spans) for spans in rest)
        self.rest = slice(width, width + padded)
        index = np.zeros((len(rows), padded), np.int64)
        columns = self.at + self.steps
        depths = np.full(
            (len(rows), width + padded + columns), -1
        )  # of every score column; -1: nothing of this row there
        for b in blocks:
            depths[b.lo : b.hi, b.column : b.column + len(b.slots)] = b.depths
        for row, spans in enumerate(rest):
            own = np.concatenate([np.arange(a, b) for a, b in spans]) if spans else np.empty(0, np.int64)
            index[row, : len(own)] = contexts[row][own]
            depths[row, width : width + len(own)] = own
            depths[row, width + padded + self.first[row] :] = len(contexts[row]) + np.arange(columns - self.first[row])
        self.depths = torch.as_tensor(depths, device=device)
        self.biases: dict[int | None, torch.Tensor] = {}
        self.hidden = torch.zeros(self.depths.shape, device=device).masked_fill_(self.depths < 0, -math.inf)
        self.scores: dict[tuple[int, int], torch.Tensor] = {}
        # Keys that do not change any more, per layer: blocks [Hkv, S, D] and the rest [Hkv * B, padded, D].
        flat = torch.as_tensor(index.reshape(-1), device=device)
        self.block_kv = {layer: [cache.read(layer, w) for w in where] for layer in cache.keys} if where else {}
        self.rest_kv: dict[int, tuple[torch.Tensor, ...]] = {}
        if padded:
            for layer in cache.keys:
                self.rest_kv[layer] = tuple(x.unflatten(1, index.shape).flatten(0, 1) for x in cache.read(layer, flat))
        self.tails: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._columns = columns
        if self.at:
            assert previous is not None, "rows that have sampled come from an earlier arrangement"
            place = {id(row): i for i, row in enumerate(previous.rows)}
            old = [(new, place[id(row)]) for new, row in enumerate(rows) if row.tokens]
            to, source = (torch.tensor(x, device=device) for x in zip(*old, strict=True))
            for layer, tail in previous.tails.items():
                self.tails[layer] = tuple(self._moved(x, to, source, previous.at) for x in tail)  # type: ignore[assignment]

    def _moved(self, tail: torch.Tensor, to: torch.Tensor, source: torch.Tensor, end: int) -> torch.Tensor:
        moved = tail.new_zeros(tail.shape[0], len(self.rows), self._columns, tail.shape[3])
        moved[:, to, : self.at] = tail[:, source, end - self.at : end]
        return moved

    def bias(self, window: int | None) -> torch.Tensor:
        """[1, B, 1, columns so far]: 0 where the row sees the column's key, -inf where not."""
        if window not in self.biases:
            columns = self.rest.stop + self.at + 1
            bias = self.hidden[:, :columns]
            if window is not None:
                bias = bias.masked_fill(self.depths[:, :columns] <= self.positions[:, None] - window, -math.inf)
            self.biases[window] = bias[None, :, None]
        return self.biases[window]

    def attend(self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float,
               softcap: float | None, window: int | None) -> torch.Tensor:  # fmt: skip
        heads, rows, group = key.shape[0], key.shape[1], query.shape[0] // key.shape[0]
        if layer not in self.tails:  # zeros, not empty: hidden columns are multiplied by a probability of 0
            self.tails[layer] = tuple(x.new_zeros(heads, rows, self._columns, x.shape[2]) for x in (key, value))  # type: ignore[assignment]
        tail_k, tail_v = self.tails[layer]
        tail_k[:, :, self.at], tail_v[:, :, self.at] = key, value
        tail_k, tail_v = (x.flatten(0, 1)[:, : self.at + 1] for x in (tail_k, tail_v))
        q = query.unflatten(0, (heads, group)).transpose(1, 2).flatten(1, 2).contiguous()  # [Hkv, B * g, D]
        per_row = q.view(heads * rows, group, -1)
        scores = self.scores.get((heads, group))
        if scores is None:  # zeros, not empty: columns without a key get -inf from the bias, and stay there
            scores = q.new_zeros(heads, rows * group, self.rest.stop + self.at + 1, dtype=torch.float32)
            self.scores[heads, group] = scores
        blocks = self.block_kv.get(layer, ())
        for (span, columns), (keys, _) in zip(self.blocks, blocks, strict=True):
            span = slice(span.start * group, span.stop * group)
            scores[:, span, columns] = torch.bmm(q[:, span], keys.transpose(1, 2))
        each = scores.view(heads * rows, group, -1)
        if layer in self.rest_kv:
            each[:, :, self.rest] = _products(per_row, self.rest_kv[layer][0])
        each[:, :, self.rest.stop :] = _products(per_row, tail_k)

        by_row = scores.view(heads, rows, group, -1)
        if softcap is None:
            torch.add(self.bias(window), by_row, alpha=scale, out=by_row)
        else:
            by_row.mul_(scale / softcap).tanh_().mul_(softcap).add_(self.bias(window))
        weights = scores.softmax(-1).to(value.dtype)
        each = weights.view(heads * rows, group, -1)

        out = torch.bmm(each[:, :, self.rest.stop :], tail_v).float().view(heads, rows * group, -1)
        if layer in self.rest_kv:
            out += torch.bmm(each[:, :, self.rest], self.rest_kv[layer][1]).view_as(out)
        for (span, columns), (_, values) in zip(self.blocks, blocks, strict=True):
            span = slice(span.start * group, span.stop * group)
            out[:, span] += torch.bmm(weights[:, span, columns], values)
        return out.to(value.dtype).unflatten(1, (rows, group)).transpose(0, 1).flatten(1, 2)  # [B, Hq, D]

    def advance(self, tokens: torch.Tensor, max_context: int) -> None:
        """The next step feeds `tokens` [B]."""
        self.inputs = tokens
        self.positions = (self.positions + 1).clamp_(max=max_context - 1)  # rows that have ended run along
        self.at += 1
        self.scores.clear()
        self.biases.clear()


# ------------------------------------------------------------------------------------------------------------------- sampling


def sample(
    logits: torch.Tensor, temperature: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor, uniform: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """One token a row by inversion of the distribution function at `uniform`.

    logits: float32 [B, V], overwritten. temperature: float32 [B], 0 is greedy. top_k: int64 [B], 0 keeps all. top_p: float32
    [B], of what top_k left, the smallest set of most probable tokens with at least this mass. uniform: float32 [B] in [0, 1).
    Returns tokens int64 [B] and their log-probabilities float32 [B] under softmax(logits / temperature) before both cuts; greedy:
    of the plain softmax. Raises RuntimeError when logits are not finite.
    """
    greedy = temperature == 0
    cut = ((top_k > 0) | (top_p < 1)) & ~greedy
    tokens = logits.argmax(-1) if greedy.any() else torch.zeros_like(top_k)
    scale = torch.where(greedy, 1.0, temperature)
    probs = (logits.div_(scale[:, None]) if (scale != 1).any() else logits).softmax(-1)
    if not (greedy | cut).all():
        mass = probs.cumsum(-1)
        # uniform < 1 and right=True: the token found has a positive probability
        drawn = torch.searchsorted(mass, (uniform * mass[:, -1])[:, None], right=True)[:, 0]
        tokens = torch.where(greedy | cut, tokens, drawn.clamp_(max=logits.shape[1] - 1))
    if cut.any():
        tokens[cut] = _sample_cut(probs[cut], top_k[cut], top_p[cut], uniform[cut])
    logprobs = probs.gather(1, tokens[:, None])[:, 0].log()
    if not torch.isfinite(logprobs).all():
        raise RuntimeError("the model's logits are not finite: its weights are broken, or its dtype overflows")
    return tokens, logprobs


def _sample_cut(probs: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """As `sample`, on probabilities [B, V]. Only candidates are sorted: all tokens below (1 - top_p) / V together weigh less than
    1 - top_p, so none of them can be in the set."""
    vocabulary = probs.shape[1]
    kept = torch.where(top_k > 0, top_k, vocabulary).clamp(max=vocabulary)
    above = torch.where(top_p < 1, (probs >= ((1 - top_p) / vocabulary)[:, None]).sum(-1), vocabulary)
    probs, ids = probs.topk(int(torch.minimum(kept, above).max().clamp(min=1)), dim=-1)
    probs = probs * (torch.arange(probs.shape[1], device=probs.device) < kept[:, None])
    before = probs.cumsum(-1) - probs
    mass = (probs * (before < (top_p * probs.sum(-1))[:, None])).cumsum(-1)
    drawn = torch.searchsorted(mass, uniform[:, None] * mass[:, -1:], right=True)
    return ids.gather(1, drawn.clamp_(max=ids.shape[1] - 1))[:, 0]


# --------------------------------------------------------------------------------------------------------------------- engine


@dataclass(eq=False)
class _Prompt:
    """A request under way. Its context is all but the last token: what the prefill computes."""

    request: Request
    rank: int  # place in the order of tokens, so that neighbours share the most
    tokens: np.ndarray
    slots: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))
    node: Node | None = None
    cached: int | None = None  # None until the first of its sequences is admitted


@dataclass(eq=False)
class _Sequence:
    """One completion under way."""

    prompt: _Prompt
    index: int
    uniforms: np.ndarray
    max_tokens: int
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish: Literal["stop", "length"] | None = None


class LocalEngine:
    """A rollout engine on a transformers causal language model, on the CPU or one GPU.

    model: a copy nobody else uses: its weights are overwritten by `update_weights`, its attention is replaced.
    max_sequences: sequences decoded at a time; the others wait. cache_tokens: tokens whose keys and values are kept between calls
    (2 * layers * Hkv * D numbers each: 46 KB for a 135M model in float32); a call takes more while its own prompts need more.
    Raises ValueError for a model that cannot run on cached keys of single tokens, by name and reason.
    """

    def __init__(self, model: PreTrainedModel, *, max_sequences: int, cache_tokens: int,
                 device: torch.device | str | None = None) -> None:  # fmt: skip
        if max_sequences < 1 or cache_tokens < 0:
            raise ValueError(
                f"max_sequences={max_sequences} must be at least 1, cache_tokens={cache_tokens} at least 0"
            )
        _refuse(model)
        self._model = model.eval().requires_grad_(False)
        if device is not None:
            self._model.to(torch.device(device))  # type: ignore[arg-type]
        # Models built from one configuration object share it; the attention is switched on a copy.
        memo: dict[int, Any] = {}
        for module in self._model.modules():
            if isinstance(getattr(module, "config", None), PreTrainedConfig):
                module.config = copy.deepcopy(module.config, memo)
        text = self._model.config.get_text_config()
        self.max_context = int(text.max_position_embeddings)
        self.max_sequences = max_sequences
        self._vocabulary = int(self._model.get_input_embeddings().weight.shape[0])
        self._device = self._model.device
        self._cache = PrefixCache(cache_tokens, self._device)
        self._version = 0
        self._stats = EngineStats()
        self._packed = (
            self._device.type == "cpu" and platform.machine() in ("x86_64", "AMD64") and mkldnn.is_available()
        )
        if self._packed:
            _pack(self._model)
        self._check_model()

    # ----------------------------------------------------------------------------------------------------------- the protocol

    @torch.inference_mode()
    def generate(self, requests: Sequence[Request]) -> list[list[Completion]]:
        """One list of `request.n` completions a request, in order. What a completion draws depends on its request's seed and its
        own index alone, not on the requests around it. Raises ValueError for an empty prompt, one that leaves no room for
        `max_new_tokens`, a token outside the vocabulary, or impossible sampling settings; then nothing was computed."""
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

        named_tensors: names as in `model.state_dict()`, every parameter once (of tied parameters one name is enough), any dtype
        or device. Raises KeyError for unknown or missing names, ValueError for a wrong shape; then nothing has changed.
        """
        own = self._model.state_dict()
        new = dict(named_tensors)
        unknown = sorted(new.keys() - own.keys())
        if unknown:
            raise KeyError(
                f"weights that this model does not have: {_some(unknown)}; its names are like {next(iter(own))}"
            )
        given = {own[name].data_ptr() for name in new}
        missing = [name for name, parameter in self._model.named_parameters() if parameter.data_ptr() not in given]
        if missing:
            raise KeyError(f"{len(missing)} weights are missing: {_some(missing)}; send every parameter of the model")
        for name, tensor in new.items():
            if tensor.shape != own[name].shape:
                raise ValueError(f"{name} has shape {tuple(tensor.shape)}, the model's is {tuple(own[name].shape)}")
        for name, tensor in new.items():
            own[name].copy_(tensor)
        if self._packed:
            _pack(self._model)
        self._cache.clear()
        self._version = version

    def stats(self) -> EngineStats:
        """A snapshot of the totals."""
        return copy.deepcopy(self._stats)

    def close(self) -> None:
        """Gives the cache's memory back."""
        self._cache.clear()

    # -------------------------------------------------------------------------------------------------------------- generation

    def _generate(self, requests: Sequence[Request]) -> list[list[Completion]]:
        order = sorted(range(len(requests)), key=lambda i: list(requests[i].tokens))
        prompts = [_Prompt(requests[i], rank, np.array(requests[i].tokens, np.int64)) for rank, i in enumerate(order)]
        sequences = [[_begin(prompt, index) for index in range(prompt.request.n)] for prompt in prompts]
        queue = deque(sequence for siblings in sequences for sequence in siblings)
        rows: list[_Sequence] = []
        batch: _Decode | None = None
        while queue or rows:
            began = time.perf_counter()
            admitted = [queue.popleft() for _ in range(min(len(queue), self.max_sequences - len(rows)))]
            self._cache.advance(row.prompt.node for row in rows if row.prompt.node is not None)
            self._prefill(admitted)
            self._stats.prefill_seconds += self._since(began)
            began = time.perf_counter()
            rows = sorted(rows + admitted, key=lambda row: row.prompt.rank)
            batch = _Decode(rows, self._cache, batch)
            self._decode(batch)
            self._keep(batch)
            rows = [row for row in rows if row.finish is None]
            self._stats.decode_seconds += self._since(began)
        self._cache.trim()
        results: list[list[Completion]] = [[] for _ in requests]
        for i, siblings in zip(order, sequences, strict=True):
            results[i] = [self._completion(sequence) for sequence in siblings]
            self._stats.requests += 1
            self._stats.prompt_tokens += len(requests[i].tokens)
            self._stats.cached_tokens += results[i][0].cached_tokens
            self._stats.generated_tokens += sum(len(completion.tokens) for completion in results[i])
        return results

    def _prefill(self, admitted: Sequence[_Sequence]) -> None:
        """Puts the contexts of these sequences into the tree and computes what was not there."""
        prompts = list({id(sequence.prompt): sequence.prompt for sequence in admitted}.values())
        for prompt in prompts:
            self._cache.touch(prompt.tokens[:-1])  # before any of them makes room for itself
        missing: list[tuple[_Prompt, int, int]] = []
        for prompt in prompts:
            prompt.node, prompt.slots, known = self._cache.insert(prompt.tokens[:-1])
            prompt.cached = known if prompt.cached is None else min(prompt.cached, known)
            missing += [(prompt, a, min(a + PREFILL_TOKENS, len(prompt.slots)))
                        for a in range(known, len(prompt.slots), PREFILL_TOKENS)]  # fmt: skip
        while missing:
            pieces, room = [], PREFILL_TOKENS
            while missing and room:
                prompt, start, end = missing.pop(0)
                stop = min(end, start + room)
                pieces.append((prompt, start, stop))
                room -= stop - start
                if stop < end:
                    missing.insert(0, (prompt, stop, end))
            tokens = np.concatenate([prompt.tokens[a:b] for prompt, a, b in pieces])
            positions = np.concatenate([np.arange(a, b) for _, a, b in pieces])
            swirl = _Prefill(self._cache, [(prompt.slots[:b], a) for prompt, a, b in pieces])
            self._forward(self._model.base_model, torch.as_tensor(tokens), torch.as_tensor(positions), swirl)

    def _decode(self, batch: _Decode) -> None:
        """Samples until what was wasted on rows that have ended is worth a new arrangement (half a step, measured)."""
        rows = batch.rows
        settings = [row.prompt.request.sampling for row in rows]
        temperature = torch.tensor([s.temperature for s in settings], device=self._device)
        top_k = torch.tensor([s.top_k for s in settings], device=self._device)
        top_p = torch.tensor([s.top_p for s in settings], dtype=torch.float32, device=self._device)
        uniform = np.full((batch.steps, len(rows)), 0.5, np.float32)
        for i, row in enumerate(rows):
            uniform[: row.max_tokens - len(row.tokens), i] = row.uniforms[len(row.tokens) :]
        uniforms = torch.as_tensor(uniform, device=self._device)
        ended = wasted = 0
        for step in range(batch.steps):
            logits = self._forward(self._model, batch.inputs, batch.positions, batch).logits[0].float()
            tokens, logprobs = sample(logits, temperature, top_k, top_p, uniforms[step])
            batch.advance(tokens, self.max_context)
            for row, token, logprob in zip(rows, tokens.tolist(), logprobs.tolist(), strict=True):
                if row.finish is None:
                    row.tokens.append(token)
                    row.logprobs.append(logprob)
                    if token in row.prompt.request.stop_ids:
                        row.finish = "stop"
                    elif len(row.tokens) == row.max_tokens:
                        row.finish = "length"
                    ended += row.finish is not None
            wasted += ended
            if ended == len(rows) or 2 * wasted >= len(rows):
                return

    def _keep(self, batch: _Decode) -> None:
        """Puts the keys of what ended rows sampled into the cache: the next state of a trajectory starts with them."""
        rows, columns, slots = [], [], []
        for i, row in enumerate(batch.rows):
            if row.finish is None:
                continue
            context = len(row.prompt.slots)
            path = np.concatenate([row.prompt.tokens, np.array(row.tokens[:-1], np.int64)])
            _, taken, known = self._cache.insert(path, grow=False)
            assert known >= context, "the context of a row under way was evicted"
            new = np.arange(known, len(taken))
            rows.append(np.full(len(new), i))
            columns.append(batch.first[i] + new - context)
            slots.append(taken[known:])
        if sum(map(len, slots)):
            row_index, column_index, where = (
                torch.as_tensor(np.concatenate(x), device=self._device) for x in (rows, columns, slots)
            )
            for layer, (keys, values) in batch.tails.items():
                self._cache.write(layer, where, keys[:, row_index, column_index], values[:, row_index, column_index])

    def _forward(self, model: Any, tokens: torch.Tensor, positions: torch.Tensor, swirl: _Prefill | _Decode) -> Any:
        return model(
            input_ids=tokens[None].to(self._device),
            position_ids=positions[None].to(self._device),
            use_cache=False,
            swirl=swirl,
        )

    def _completion(self, sequence: _Sequence) -> Completion:
        assert sequence.finish is not None and sequence.prompt.cached is not None, "a sequence was left unfinished"
        return Completion(
            sequence.tokens, sequence.logprobs, sequence.finish, self._version, cached_tokens=sequence.prompt.cached
        )

    def _since(self, began: float) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter() - began

    # ------------------------------------------------------------------------------------------------------------------ checks

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
                f"request {i}: {len(tokens)} prompt tokens and max_new_tokens={sampling.max_new_tokens} exceed the model's context "
                f"of {self.max_context}; shorten the prompt or ask for at most {max(0, self.max_context - len(tokens))} tokens"
            )
        if min(tokens) < 0 or max(tokens) >= self._vocabulary:
            bad = next(token for token in tokens if not 0 <= token < self._vocabulary)
            raise ValueError(
                f"request {i}: token id {bad} is outside the vocabulary of {self._vocabulary}; is the tokenizer another model's?"
            )
        if not (0 <= sampling.temperature < math.inf and 0 < sampling.top_p <= 1 and sampling.top_k >= 0):
            raise ValueError(
                f"request {i}: temperature={sampling.temperature} must be at least 0, top_p={sampling.top_p} in (0, 1], "
                f"top_k={sampling.top_k} at least 0 (0: off)"
            )

    @torch.inference_mode()
    def _check_model(self) -> None:
        """Four greedy tokens must have the log-probs of a plain forward pass: catches what no configuration tells."""
        name = type(self._model).__name__
        self._model.set_attn_implementation(ATTENTION)
        prompt = [7 * i % self._vocabulary for i in range(5)]
        try:
            (completion,) = self.generate([Request(prompt, Sampling(max_new_tokens=4, temperature=0.0))])[0]
        except Exception as error:
            raise ValueError(f"LocalEngine cannot run {name}: {error}") from error
        self._model.set_attn_implementation("eager")  # the definition; "sdpa" drops Gemma 2's soft-cap
        tokens = torch.tensor([prompt + completion.tokens], device=self._device)
        logits = self._model(input_ids=tokens, use_cache=False).logits[0, len(prompt) - 1 : -1].float()
        self._model.set_attn_implementation(ATTENTION)
        plain = logits.log_softmax(-1).gather(1, tokens[0, len(prompt) :, None])[:, 0].cpu()
        gap = (plain - torch.tensor(completion.logprobs)).abs().max().item()
        # bfloat16 has 8 bits: a gap of some hundredths is rounding, a model that needs more than keys and values is far off
        if gap > (1e-3 if self._model.dtype == torch.float32 else 0.25):
            raise ValueError(
                f"LocalEngine cannot run {name}: decoding from cached keys and a plain forward pass differ by {gap:.2g} in "
                "log-probability, so the model keeps state that is neither keys nor values; serve it with the SGLang engine"
            )
        self._cache.clear()
        self._stats = EngineStats()


def _pack(model: torch.nn.Module) -> None:
    """Gives every linear layer a second copy of its weight in oneDNN's blocked layout, for inference on a CPU: 16 rows take 0.55
    of the time, 64 rows 0.65 and 512 rows 0.86 (135M model, float32); in bfloat16 0.6, 0.8 and 0.85. To be called again when
    weights change."""
    supported = {torch.float32} | ({torch.bfloat16} if torch.ops.mkldnn._is_mkldnn_bf16_supported() else set())
    for module in model.modules():
        if type(module) is torch.nn.Linear and module.weight.dtype in supported:
            packed = torch.ops.mkldnn._reorder_linear_weight(module.weight.detach(), PREFILL_TOKENS)
            module.forward = partial(_packed_linear, packed, module.bias)  # type: ignore[method-assign]


def _packed_linear(weight: torch.Tensor, bias: torch.Tensor | None, x: torch.Tensor) -> torch.Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def _begin(prompt: _Prompt, index: int) -> _Sequence:
    count = prompt.request.sampling.max_new_tokens
    source = np.random.default_rng([prompt.request.seed % 2**64, index])
    return _Sequence(prompt, index, source.random(count, dtype=np.float32), count)


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _refuse(model: PreTrainedModel) -> None:
    """Raises ValueError, naming model and reason, when the configuration says that cached keys of single tokens cannot work."""
    text = model.config.get_text_config()
    layers = set(getattr(text, "layer_types", None) or ()) - {"full_attention", "sliding_attention", "attention"}
    rope = getattr(text, "rope_parameters", None) or {}
    ropes = {d.get("rope_type") for d in (rope, *rope.values()) if isinstance(d, dict)} & {"dynamic", "longrope"}
    if model.config.is_encoder_decoder:
        reason = "it is an encoder-decoder"
    elif model._is_stateful or layers:
        reason = (
            f"it has layers whose state is not keys and values ({', '.join(sorted(layers)) or 'a state-space model'})"
        )
    elif ropes:
        reason = f"its rope_type {ropes.pop()!r} changes old keys when a sequence grows"
    elif not model._supports_attention_backend:
        reason = "its attention does not go through transformers' attention interface"
    elif not getattr(text, "max_position_embeddings", None):
        reason = "its configuration does not state max_position_embeddings"
    else:
        return
    raise ValueError(f"LocalEngine cannot run {type(model).__name__}: {reason}; serve it with the SGLang engine")
