"""Keys and values of token prefixes, kept between calls.

    tree     root ── [few-shot prefix] ─┬─ [question 1] ── [a_1 o_1] ── [a_2 o_2]      a node: a run of tokens and,
                                        └─ [question 2] ── [a_1 o_1]                   for each of them, its slot
    pool     keys[layer]   [Hkv, slots, D]      one row a token; what a node's slots hold depends on the whole
             values[layer] [Hkv, slots, D]      path from the root: equal prefixes share slots, nothing else does

Matching is token by token (no pages), so nested prompts, siblings and sampled actions share all they have in common.
The least recently used leaves leave first, from their ends.

Nothing here is thread-safe: a cache belongs to one engine.

Shapes: S keys, Hkv key/value heads, D head size.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch

from swirl_fast.prefixes import common_prefix

Where = slice | torch.Tensor  # slots of one read: a slice when they follow one another, an index otherwise


@dataclass(eq=False)
class CacheNode:
    """tokens, slots: int64 arrays of the same length. used: the round in which the node was last needed."""

    tokens: np.ndarray
    slots: np.ndarray
    parent: CacheNode | None
    used: int
    children: dict[int, CacheNode] = field(default_factory=dict)


class PrefixCache:
    """cache_tokens: how many tokens `trim` keeps; between two trims the pool grows to what one round needs.

    A round (`advance`) protects the paths in use: what is inserted or touched in it is not evicted before the next.
    """

    def __init__(self, cache_tokens: int, device: torch.device) -> None:
        self.cache_tokens = cache_tokens
        self.device = device
        self.told: dict[int, int | None] = {}  # layer -> the sliding window that its attention was told
        self.clear()

    def clear(self) -> None:
        """Forgets everything, storage included, so that not even padding reads a stale value."""
        self.keys: dict[int, torch.Tensor] = {}
        self.values: dict[int, torch.Tensor] = {}
        self._capacity = min(self.cache_tokens, 512)  # doubles up to cache_tokens with use: memory is taken when needed
        self._free = np.arange(self._capacity)[::-1]  # taken from the end: ascending, so that a run is mostly a slice
        self._round = 0
        self._root = CacheNode(np.empty(0, np.int64), np.empty(0, np.int64), None, used=0)

    def __len__(self) -> int:
        """Tokens held."""
        return self._capacity - len(self._free)

    def advance(self, in_use: Iterable[CacheNode]) -> None:
        """Starts a round: from now on only the paths of `in_use`, and what the round adds or touches, are safe."""
        self._round += 1
        for node in in_use:
            self._touch(node)

    def touch(self, tokens: np.ndarray) -> None:
        """Protects the longest known prefix of `tokens` in this round."""
        node, _, _ = self._match(tokens)
        self._touch(node)

    def known(self, tokens: np.ndarray) -> int:
        """How many leading tokens are held."""
        return self._match(tokens)[2]

    def insert(self, tokens: np.ndarray, grow: bool = True) -> tuple[CacheNode, np.ndarray, int]:
        """The path of `tokens`: its last node, the slot of every token, and how many of them were known before; the
        caller computes and writes the others. Room is made by evicting what this round does not need, then by a larger
        pool (grow) or by taking in fewer tokens, so that `slots` is shorter than `tokens`."""
        node, parts, known = self._match(tokens)
        inside = len(parts[-1]) if parts else 0  # tokens matched in the last node
        if known < len(tokens) and inside < len(node.slots):
            node = self._split(node, inside)
        self._touch(node)
        missing = len(tokens) - known
        if missing:
            slots = self._take(missing, grow)
            if len(slots):
                child = CacheNode(tokens[known : known + len(slots)].copy(), slots, node, self._round)
                node.children[int(child.tokens[0])] = child
                node = child
                parts.append(slots)
        return node, np.concatenate(parts) if parts else np.empty(0, np.int64), known

    def trim(self) -> None:
        """Evicts down to `cache_tokens` and gives back what a large call took."""
        self._round += 1
        self._evict(len(self) - self.cache_tokens)
        if self._capacity > self.cache_tokens:
            self._resize(self.cache_tokens)

    def _match(self, tokens: np.ndarray) -> tuple[CacheNode, list[np.ndarray], int]:
        node, parts, depth = self._root, [], 0
        while depth < len(tokens) and (child := node.children.get(int(tokens[depth]))) is not None:
            same = common_prefix(child.tokens, tokens[depth:])
            node, depth = child, depth + same
            parts.append(child.slots[:same])
            if same < len(child.tokens):
                break
        return node, parts, depth

    def _split(self, node: CacheNode, at: int) -> CacheNode:
        """Cuts a node in two and returns the upper half. The object itself becomes the lower half, so that whoever holds
        it still holds the end of its own path."""
        assert node.parent is not None and 0 < at < len(node.tokens), "only a part of a node can be split off"
        upper = CacheNode(node.tokens[:at], node.slots[:at], node.parent, node.used, {int(node.tokens[at]): node})
        node.parent.children[int(node.tokens[0])] = upper
        node.tokens, node.slots, node.parent = node.tokens[at:], node.slots[at:], upper
        return upper

    def _touch(self, node: CacheNode | None) -> None:
        while node is not None and node.used < self._round:
            node.used = self._round
            node = node.parent

    def _nodes(self) -> Iterator[CacheNode]:
        stack = list(self._root.children.values())
        while stack:
            node = stack.pop()
            yield node
            stack.extend(node.children.values())

    def _evict(self, tokens: int) -> None:
        """Frees so many slots, or as many as this round does not need."""
        if tokens <= 0:
            return
        heap = [(node.used, id(node), node) for node in self._nodes() if not node.children and node.used < self._round]
        heapq.heapify(heap)
        freed = [self._free]
        while tokens > 0 and heap:
            _, _, node = heapq.heappop(heap)
            cut = min(tokens, len(node.slots))
            tokens -= cut
            freed.append(node.slots[len(node.slots) - cut :])
            if cut < len(node.slots):
                node.tokens, node.slots = node.tokens[:-cut], node.slots[:-cut]
                continue
            parent = node.parent
            assert parent is not None, "the root is never a leaf of the heap"
            del parent.children[int(node.tokens[0])]
            if parent is not self._root and not parent.children and parent.used < self._round:
                heapq.heappush(heap, (parent.used, id(parent), parent))
        self._free = np.concatenate(freed)

    def _take(self, count: int, grow: bool) -> np.ndarray:
        needed = len(self) + count
        if needed > self._capacity < self.cache_tokens:
            self._resize(min(self.cache_tokens, max(needed, 2 * self._capacity)))
        if needed > self._capacity:
            # a sixteenth of the pool at a time: the walk over the tree is the cost, not the slots
            self._evict(max(needed - self._capacity, self._capacity // 16))
        if grow and count > len(self._free):
            self._resize(max(len(self) + count, self._capacity * 5 // 4))
        count = min(count, len(self._free))
        taken = np.sort(self._free[len(self._free) - count :])
        self._free = self._free[: len(self._free) - count]
        return taken

    def _resize(self, capacity: int) -> None:
        """A pool of another size. A larger one keeps every slot; a smaller one renumbers, so nobody may hold slots."""
        if capacity >= self._capacity:
            old = new = torch.arange(self._capacity, device=self.device)
            self._free = np.concatenate([np.arange(self._capacity, capacity)[::-1], self._free])
        else:
            moved = 0
            kept = []
            for node in self._nodes():
                kept.append(node.slots)
                node.slots = np.arange(moved, moved + len(node.slots))
                moved += len(node.slots)
            old = torch.as_tensor(np.concatenate(kept) if kept else np.empty(0, np.int64), device=self.device)
            new = torch.arange(moved, device=self.device)
            self._free = np.arange(moved, capacity)[::-1]
        self._capacity = capacity
        for store in (self.keys, self.values):
            for layer, pool in store.items():
                resized = pool.new_zeros(pool.shape[0], capacity, pool.shape[2])
                store[layer] = resized.index_copy_(1, new, pool.index_select(1, old))

    def locate(self, slots: np.ndarray) -> Where:
        """How to read these slots: a slice costs no copy."""
        if len(slots) and slots[-1] - slots[0] == len(slots) - 1 and (np.diff(slots) == 1).all():
            return slice(int(slots[0]), int(slots[-1]) + 1)
        return torch.as_tensor(slots, device=self.device)

    def read(self, layer: int, where: Where) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [Hkv, len(where), D] of one layer."""
        if isinstance(where, slice):
            return self.keys[layer][:, where], self.values[layer][:, where]
        return self.keys[layer].index_select(1, where), self.values[layer].index_select(1, where)

    def write(self, layer: int, where: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Stores keys and values [Hkv, len(where), D]; the layer's pool is made when its shape is first seen."""
        for store, new in ((self.keys, keys), (self.values, values)):
            if layer not in store:  # zeros, not empty: padding may read a slot that nobody wrote
                store[layer] = new.new_zeros(new.shape[0], self._capacity, new.shape[2])
            store[layer].index_copy_(1, where, new)
