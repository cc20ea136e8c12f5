"""Floating-point operations of a forward and backward over a comb."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from numpy.typing import NDArray

Number = TypeVar("Number", float, NDArray)


@dataclass(frozen=True)
class ModelSize:
    """What an estimate of work needs to know of a model.

    linear: weights that one token is multiplied with: all matrices but the embedding table and the output layer.
    attention: one entry a layer: (query heads * head size, sliding window or None). output: hidden size * vocabulary.
    """

    linear: float
    attention: tuple[tuple[int, int | None], ...] = ()
    output: int = 0


ONLY_TOKENS = ModelSize(linear=1.0)  # work is the number of tokens


def flops(size: ModelSize, tokens: Number, edges: Number, visible_pairs: Callable[[int | None], Number]) -> Number:
    """Floating-point operations of one forward and backward, multiplications and additions counted apart:

        6 linear tokens + Σ_layers 12 width visible_pairs(window) + 6 output edges

    (2 forward and 4 backward a weight; attention has two products, each of 2 width a pair). Nothing is counted for what a kernel or
    activation checkpointing computes again, norms, softmax, or the step of a layer that keeps a state from one to the next. Numbers or
    numpy arrays of them.
    """
    total = 6.0 * size.linear * tokens + 6.0 * size.output * edges
    # no set: its order, and with it the rounding, changes by process
    windows = dict.fromkeys(window for _, window in size.attention)
    for window in windows:
        width = sum(width for width, of_layer in size.attention if of_layer == window)
        total = total + 12.0 * width * visible_pairs(window)
    return total
