"""The two ways in which a model's attention reads keys and values from the prefix cache.

    PrefillPass   tokens that the tree lacks, packed into one row; each run of them reads the keys of its own path.
    DecodePass    one row a sequence. Keys that neighbouring rows share are read once for all of them:

        rows   ┌──────── shared by all ────────┬── rest of 1 ──┐ sampled so far 1
               │                               ├── rest of 2 ──┤ sampled so far 2     one softmax over the three parts
               └───────────────────────────────┴── rest of 3 ──┘ sampled so far 3

Shapes: B rows decoded together, T packed tokens, S keys, Hq query and Hkv key/value heads, g = Hq / Hkv, D head size
(that of values may be another).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from transformers import AttentionInterface

from swirl_fast.engines.local.prefix_cache import PrefixCache, Where
from swirl_fast.models.exact import attention_chunk
from swirl_fast.prefixes import common_prefix

ATTENTION = "swirl_engine"
D = TypeVar("D", int, torch.Tensor)
# Keys worth one more block. CPU: 0.09 us a key and layer (measured), some 25 us of calls (an estimate). A GPU reads a key in a
# nanosecond, and waits for calls as long.
BLOCK_TOKENS = {"cpu": 256, "cuda": 8192}


class Reach(NamedTuple):
    """How far back a token sees: itself and the window - 1 tokens before it, or those of its chunk; None: all."""

    window: int | None
    chunk: int | None

    def first(self, depth: D) -> D | int:
        """Depth of the first token that one at `depth` sees; below 0 where there are not that many."""
        if self.window is not None:
            return depth - self.window + 1
        return 0 if self.chunk is None else depth - depth % self.chunk


def _softmax(scores: torch.Tensor, sink: torch.Tensor | None) -> torch.Tensor:
    """Over the last dimension of scores, which a sink [.., 1] joins for the sum alone."""
    if sink is None:
        return scores.softmax(-1)
    column = sink.to(scores.dtype).expand(*scores.shape[:-1], 1)
    return torch.cat([scores, column], -1).softmax(-1)[..., :-1]


class PrefillPass:
    """One pass over tokens that the tree lacked: per piece the slots of its path, and from which depth on they are new.
    A piece comes after those that its path runs through, in the same pass or in an earlier one."""

    def __init__(self, cache: PrefixCache, pieces: Sequence[tuple[np.ndarray, int]]) -> None:
        self.cache = cache
        self.pieces = pieces
        self.new = torch.as_tensor(np.concatenate([path[start:] for path, start in pieces]), device=cache.device)
        self.plans: dict[Reach, list[tuple[slice, Where, torch.Tensor]]] = {}

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scale: float,
        softcap: float | None,
        reach: Reach,
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:
        """query [Hq, T, D], key and value [Hkv, T, D] of the new tokens -> [T, Hq, D]. softcap: scores are bounded by
        softcap * tanh(score / softcap). sinks: [Hq], logits that join the softmax and no output."""
        self.cache.write(layer, self.new, key, value)
        q = query.unflatten(0, (key.shape[0], -1))  # [Hkv, g, T, D]
        out = query.new_empty(query.shape[1], query.shape[0], value.shape[2])
        sink = None if sinks is None else sinks.view(*q.shape[:2], 1, 1)
        for rows, where, mask in self._plan(reach, query.dtype):
            keys, values = (x[:, None].expand(-1, q.shape[1], -1, -1) for x in self.cache.read(layer, where))
            if softcap is None and sinks is None:
                piece = F.scaled_dot_product_attention(q[:, :, rows], keys, values, attn_mask=mask, scale=scale)
            else:
                scores = (q[:, :, rows] @ keys.transpose(2, 3)).float()
                scores = scores.mul_(scale) if softcap is None else scores.mul_(scale / softcap).tanh_().mul_(softcap)
                piece = _softmax(scores.add_(mask), sink).to(values.dtype) @ values
            out[rows] = piece.flatten(0, 1).transpose(0, 1)
        return out

    def _plan(self, reach: Reach, dtype: torch.dtype) -> list[tuple[slice, Where, torch.Tensor]]:
        """Per piece: its rows, the keys that any of them sees, and the mask [rows, keys] of 0 and -inf."""
        if reach not in self.plans:
            self.plans[reach] = []
            row = 0
            for path, start in self.pieces:
                first = max(0, reach.first(start))
                query = torch.arange(start, len(path), device=self.cache.device)[:, None]
                depth = torch.arange(first, len(path), device=self.cache.device)
                hidden = (depth > query) | (depth < reach.first(query))
                mask = torch.zeros(hidden.shape, dtype=dtype, device=self.cache.device).masked_fill_(hidden, -math.inf)
                rows = slice(row, row + len(path) - start)
                self.plans[reach].append((rows, self.cache.locate(path[first:]), mask))
                row = rows.stop
        return self.plans[reach]


@dataclass(frozen=True)
class Block:
    """Keys that rows lo..hi share at these depths: read once; their scores are in columns from `column` on."""

    lo: int
    hi: int
    column: int
    depths: np.ndarray


def arrange(paths: Sequence[np.ndarray], block_tokens: int) -> tuple[list[Block], list[np.ndarray]]:
    """Which keys to read once for neighbouring rows, and which row by row.

    paths: the slots of every row's context; rows in the order of their tokens, so that equal prefixes are neighbours.
    block_tokens: how many keys must be read less for a block.
    Returns the blocks, and for every row the depths that are in none of them.
    """
    rows = len(paths)
    shared = [common_prefix(paths[i], paths[i + 1]) for i in range(rows - 1)]
    rest = [np.empty(0, np.int64) for _ in range(rows)]
    used = [0] * rows  # score columns that each row's blocks take
    blocks: list[Block] = []

    def add(lo: int, hi: int, depths: np.ndarray) -> None:
        assert len(set(used[lo:hi])) == 1, "rows of one block have the same blocks before it"
        blocks.append(Block(lo, hi, used[lo], depths))
        used[lo:hi] = [used[lo] + len(depths)] * (hi - lo)

    groups = [(0, rows, 0)]  # rows lo..hi agree up to this depth, and are arranged so far
    while groups:
        lo, hi, depth = groups.pop()
        end = len(paths[lo]) if hi - lo == 1 else min(shared[lo : hi - 1])
        if (hi - lo - 1) * (end - depth) >= block_tokens:
            add(lo, hi, np.arange(depth, end))
        elif end > depth:
            for row in range(lo, hi):
                rest[row] = np.append(rest[row], np.arange(depth, end))
        if hi - lo > 1:
            cuts = [lo, *(i + 1 for i in range(lo, hi - 1) if shared[i] == end), hi]
            groups.extend((a, b, end) for a, b in zip(cuts, cuts[1:], strict=False))
    # What is left is padded to the longest row: rows much longer than the others become blocks of their own.
    order = sorted(range(rows), key=lambda row: -len(rest[row]))
    lengths = [*(len(rest[row]) for row in order), 0]
    single = min(range(rows + 1), key=lambda k: block_tokens * k + rows * lengths[k])
    for row in order[:single]:
        if len(rest[row]):
            add(row, row + 1, rest[row])
            rest[row] = rest[row][:0]
    return blocks, rest


def _products(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """q [N, R, D] times k [N, S, D] -> [N, R, S] for few rows and many keys. In bfloat16 on a CPU the other order is
    twice as fast (100 against 214 us for 192 x 3 x 32), in float32 it is slower (174 against 119)."""
    if q.dtype == torch.bfloat16 and q.device.type == "cpu":
        return torch.bmm(k, q.transpose(1, 2)).transpose(1, 2)
    return torch.bmm(q, k.transpose(1, 2))


class DecodePass:
    """Rows that are decoded together, arranged for reading shared keys once; `attend` and `advance` alternate.

    contexts: per row the slots of the tokens before the first one it feeds; rows in the order of their tokens, so that
    equal prefixes are neighbours. sampled: how many tokens each row has fed since; where that is not 0, their keys are
    in row source[i] of `previous`. steps: how many more tokens will be fed at most.

    The keys of fed tokens are in tails [Hkv, B, columns, D], aligned at the right: all rows write column `at` in the
    same step, rows that began earlier own earlier columns too.
    """

    def __init__(
        self,
        cache: PrefixCache,
        contexts: Sequence[np.ndarray],
        sampled: Sequence[int],
        steps: int,
        previous: DecodePass | None = None,
        source: Sequence[int] = (),
    ) -> None:
        device = cache.device
        self.cache = cache
        self.contexts = contexts
        self.at = max(sampled)
        self.columns = self.at + steps
        self.first = [self.at - count for count in sampled]  # column of a row's first fed token
        self.positions = torch.tensor([len(c) + n for c, n in zip(contexts, sampled, strict=True)], device=device)
        blocks, rest = arrange(contexts, BLOCK_TOKENS[device.type])
        width = max((block.column + len(block.depths) for block in blocks), default=0)
        padded = max(map(len, rest))
        self.blocks = [(block.lo, block.hi, slice(block.column, block.column + len(block.depths))) for block in blocks]
        self.rest = slice(width, width + padded)
        # The depth of every score column's key; -1 where a column holds none of this row's.
        depths = np.full((len(contexts), width + padded + self.columns), -1)
        index = np.zeros((len(contexts), padded), np.int64)
        for block in blocks:
            depths[block.lo : block.hi, block.column : block.column + len(block.depths)] = block.depths
        for row, own in enumerate(rest):
            index[row, : len(own)] = contexts[row][own]
            depths[row, width : width + len(own)] = own
            fed = np.arange(self.columns - self.first[row])
            depths[row, width + padded + self.first[row] :] = len(contexts[row]) + fed
        self.depths = torch.as_tensor(depths, device=device)
        self.hidden = torch.zeros(depths.shape, device=device).masked_fill_(self.depths < 0, -math.inf)
        self.biases: dict[Reach, torch.Tensor] = {}
        self.scores: dict[tuple[int, int], torch.Tensor] = {}
        # Keys and values that do not change any more: of blocks [Hkv, S, D], of the rest [Hkv * B, padded, D].
        where = [cache.locate(contexts[block.lo][block.depths]) for block in blocks]
        self.shared_kv = {layer: [cache.read(layer, w) for w in where] for layer in cache.keys}
        self.rest_kv: dict[int, list[torch.Tensor]] = {}
        if padded:
            flat = torch.as_tensor(index.reshape(-1), device=device)
            for layer in cache.keys:
                self.rest_kv[layer] = [x.unflatten(1, index.shape).flatten(0, 1) for x in cache.read(layer, flat)]
        self.tails: dict[int, list[torch.Tensor]] = {}
        if previous is not None and self.at:
            moved = [row for row, count in enumerate(sampled) if count]
            to, come = torch.tensor(moved, device=device), torch.tensor([source[row] for row in moved], device=device)
            for layer, tails in previous.tails.items():
                self.tails[layer] = [x.new_zeros(x.shape[0], len(contexts), self.columns, x.shape[3]) for x in tails]
                for new, old in zip(self.tails[layer], tails, strict=True):
                    new[:, to, : self.at] = old[:, come, previous.at - self.at : previous.at]

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scale: float,
        softcap: float | None,
        reach: Reach,
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:
        """As in PrefillPass, T = B: one token a row."""
        heads, rows, group = key.shape[0], key.shape[1], query.shape[0] // key.shape[0]
        if layer not in self.tails:  # zeros, not empty: hidden columns are multiplied by a probability of 0
            self.tails[layer] = [x.new_zeros(heads, rows, self.columns, x.shape[2]) for x in (key, value)]
        for tail, new in zip(self.tails[layer], (key, value), strict=True):
            tail[:, :, self.at] = new
        tail_keys, tail_values = (tail.flatten(0, 1)[:, : self.at + 1] for tail in self.tails[layer])
        end = self.rest.stop
        q = query.unflatten(0, (heads, group)).transpose(1, 2).flatten(1, 2).contiguous()  # [Hkv, B * g, D]
        q_row = q.view(heads * rows, group, -1)
        scores = self.scores.get((heads, group))
        if scores is None:  # zeros, not empty: columns without a key get -inf from the bias, and keep it
            scores = q.new_zeros(heads, rows * group, end + self.at + 1, dtype=torch.float32)
            self.scores[heads, group] = scores
        by_row = scores.view(heads * rows, group, -1)
        shared = self.shared_kv.get(layer, ())
        for (lo, hi, columns), (keys, _) in zip(self.blocks, shared, strict=True):
            span = slice(lo * group, hi * group)
            scores[:, span, columns] = torch.bmm(q[:, span], keys.transpose(1, 2))
        if layer in self.rest_kv:
            by_row[:, :, self.rest] = _products(q_row, self.rest_kv[layer][0])
        by_row[:, :, end:] = _products(q_row, tail_keys)

        each = scores.view(heads, rows, group, -1)
        if softcap is None:
            torch.add(self._bias(reach), each, alpha=scale, out=each)
        else:
            each.mul_(scale / softcap).tanh_().mul_(softcap).add_(self._bias(reach))
        sink = None if sinks is None else sinks.view(heads, 1, group).repeat(1, rows, 1).view(heads, rows * group, 1)
        weights = _softmax(scores, sink).to(value.dtype)
        by_row = weights.view(heads * rows, group, -1)

        out = torch.bmm(by_row[:, :, end:], tail_values).float().view(heads, rows * group, -1)
        if layer in self.rest_kv:
            out += torch.bmm(by_row[:, :, self.rest], self.rest_kv[layer][1]).view_as(out)
        for (lo, hi, columns), (_, values) in zip(self.blocks, shared, strict=True):
            span = slice(lo * group, hi * group)
            out[:, span] += torch.bmm(weights[:, span, columns], values)
        return out.to(value.dtype).unflatten(1, (rows, group)).transpose(0, 1).flatten(1, 2)

    def advance(self, last_position: int) -> None:
        """Turns to the next token of every row. Rows that have ended run along, at most at `last_position`."""
        self.positions = (self.positions + 1).clamp_(max=last_position)
        self.at += 1
        self.scores.clear()
        self.biases.clear()

    def store(self, ended: Sequence[tuple[int, int, np.ndarray]]) -> None:
        """Writes fed tokens into the cache: of each (row, depth, slots) those from `depth` on."""
        rows = [np.full(len(slots), row) for row, _, slots in ended]
        columns = [
            self.first[row] + depth - len(self.contexts[row]) + np.arange(len(slots)) for row, depth, slots in ended
        ]
        if not sum(map(len, rows)):
            return
        row, column, where = (
            torch.as_tensor(np.concatenate(x), device=self.cache.device)
            for x in (rows, columns, [slots for _, _, slots in ended])
        )
        for layer, (keys, values) in self.tails.items():
            self.cache.write(layer, where, keys[:, row, column], values[:, row, column])

    def _bias(self, reach: Reach) -> torch.Tensor:
        """[1, B, 1, columns so far]: 0 where the row sees the column's key, -inf where not."""
        if reach not in self.biases:
            columns = self.rest.stop + self.at + 1
            bias = self.hidden[:, :columns]
            if reach != (None, None):
                bias = bias.masked_fill(self.depths[:, :columns] < reach.first(self.positions[:, None]), -math.inf)
            self.biases[reach] = bias[None, :, None]
        return self.biases[reach]


def _attend_from_cache(
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
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    layer: Any = module.layer_idx
    swirl.cache.told[layer] = sliding_window
    reach = Reach(sliding_window, attention_chunk(module))
    return swirl.attend(layer, query[0], key[0], value[0], scale, softcap, reach, s_aux)[None], None


AttentionInterface.register(ATTENTION, _attend_from_cache)
