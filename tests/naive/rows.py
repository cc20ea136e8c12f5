"""One row per action through transformers' own model and attention: the slow, obvious reference of the comb."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from transformers import AttentionInterface, PreTrainedModel

from swirl_fast.comb.tree import Comb, SampledState, Trunk


def _dense_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: None,
    scaling: float,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention with a dense mask, in the type of its inputs (transformers' own takes its softmax in float32)."""
    groups = query.shape[1] // key.shape[1]
    scores = query @ key.repeat_interleave(groups, 1).transpose(-1, -2) * scaling
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    i = torch.arange(scores.shape[-1])
    visible = i[:, None] >= i[None, :]
    if sliding_window is not None:
        visible &= i[:, None] - i[None, :] < sliding_window
    kinds = getattr(module.config, "layer_types", None)
    if kinds and kinds[module.layer_idx] == "chunked_attention":
        chunk = i // module.config.attention_chunk_size
        visible &= chunk[:, None] == chunk[None, :]
    scores = scores.masked_fill(~visible, float("-inf"))
    if s_aux is not None:
        scores = torch.cat([scores, s_aux[None, :, None, None].expand(*scores.shape[:3], 1)], -1)
    probabilities = scores.softmax(-1)[..., : len(i)]
    return (probabilities @ value.repeat_interleave(groups, 1)).transpose(1, 2).contiguous(), None


AttentionInterface.register("naive", _dense_attention)


def all_actions(branches: list[Trunk]) -> dict[int, tuple[list[int], list[int]]]:
    """Number of an action -> its state and its tokens."""
    return {
        index: (branch.tokens[: state.length].tolist(), action.tolist())
        for branch in branches
        for state in branch.states
        for action, index in zip(state.actions, state.indices, strict=True)
    }


def shuffled(branches: list[Trunk], seed: int) -> list[Trunk]:
    """The same actions in another order of branches, states and samples."""
    draw = random.Random(seed)

    def mixed(things: Sequence[Any]) -> list[Any]:
        return draw.sample(list(things), len(things))

    out = []
    for branch in mixed(branches):
        states = []
        for state in mixed(branch.states):
            pairs = mixed(list(zip(state.actions, state.indices, strict=True)))
            states.append(SampledState(state.length, tuple(a for a, _ in pairs), tuple(i for _, i in pairs)))
        out.append(Trunk(branch.tokens, tuple(states)))
    return out


def visible(comb: Comb) -> np.ndarray:
    """[T, T] bool: which key (column) each query sees."""
    i = np.arange(comb.computed_tokens)
    return (i[None, :] <= i[:, None]) & (i[:, None] < comb.subtree_end_T[None, :])


def separate_rows(model: PreTrainedModel, branches: list[Trunk], temperature: float = 1.0) -> dict[int, torch.Tensor]:
    """Number of an action -> log-probs of its tokens, each from a row of its own: state, then action."""
    logprobs = {}
    for index, (state, action) in all_actions(branches).items():
        tokens = torch.tensor(state + action)
        logits = model(input_ids=tokens[None], use_cache=False).logits[0, len(state) - 1 : -1] / temperature
        logprobs[index] = logits.log_softmax(-1).gather(1, tokens[len(state) :, None])[:, 0]
    return logprobs


def padded_rows(model: PreTrainedModel, branches: list[Trunk], temperature: float = 1.0) -> dict[int, torch.Tensor]:
    """The same in one right-padded batch, as a Hugging Face style trainer does it."""
    rows, places = [], []  # padding stands behind every token that counts, so the causal mask hides it
    for index, (state, action) in all_actions(branches).items():
        rows.append(torch.tensor(state + action))
        places.append((index, len(state), len(action)))
    batch = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=0)
    logp = (model(input_ids=batch, use_cache=False).logits / temperature).log_softmax(-1)
    return {
        index: logp[i, length - 1 : length - 1 + n].gather(1, rows[i][length : length + n, None])[:, 0]
        for i, (index, length, n) in enumerate(places)
    }


def side_by_side(combs: list[Comb]) -> Comb:
    """One packed row of whole combs that share nothing: a forest."""
    starts = np.cumsum([0, *(comb.computed_tokens for comb in combs)])[:-1].astype(np.int32)
    edges = np.cumsum([0, *(len(comb.rows_E) for comb in combs)])[:-1].astype(np.int32)
    return Comb(
        tokens_T=np.concatenate([comb.tokens_T for comb in combs]),
        depth_T=np.concatenate([comb.depth_T for comb in combs]),
        subtree_end_T=np.concatenate([comb.subtree_end_T + at for comb, at in zip(combs, starts, strict=True)]),
        rows_E=np.concatenate([comb.rows_E + at for comb, at in zip(combs, starts, strict=True)]),
        targets_E=np.concatenate([comb.targets_E for comb in combs]),
        edge_N=np.concatenate([comb.edge_N + at for comb, at in zip(combs, edges, strict=True)]),
        offsets=np.cumsum([0, *(n for comb in combs for n in np.diff(comb.offsets))]).astype(np.int32),
        indices_A=np.concatenate([comb.indices_A for comb in combs]),
        effective_tokens=sum(comb.effective_tokens for comb in combs),
    )
