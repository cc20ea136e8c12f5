"""Draws one token a row from logits. Shapes: B rows, V vocabulary."""

from __future__ import annotations

import torch


def sample_tokens(
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
        tokens[cut] = _sample_tokens_cut(probs[cut], top_k[cut], top_p[cut], uniform[cut])
    logprobs = probs.gather(1, tokens[:, None])[:, 0].log()
    if not torch.isfinite(logprobs).all():
        raise RuntimeError("the model's logits are not finite: its weights are broken, or its dtype overflows")
    return tokens, logprobs


def _sample_tokens_cut(
    probs: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor, uniform: torch.Tensor
) -> torch.Tensor:
    """As `sample_tokens`, on probabilities [B, V]. Only candidates are sorted: all tokens below (1 - top_p) / V together weigh
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
