"""Whether a policy computes over a tree of prefixes what its own model computes over separate rows: tried on a small tree, at the start of
every training (training.check_model).

    trunk   ─────────┬───────┬           T tokens a path, longer than the model's windows where these are short
    branch a         └──────────────     the same rows go through `Policy.plain`: transformers' own attention, masks and logits
    branch b                 └──────

The same weights are used twice, so that nothing is held a second time, and a sharded policy is checked as it is, in the type in which it
gathers its weights; any other in the type of its weights, without autocast where they have one type. Of gradients one copy is held as
well: those of the rows are subtracted from those of the tree. No random number of the process is drawn.

Legend: R rows, T tokens of a row.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from swirl_fast.comb.rows import pack_rows
from swirl_fast.comb.tree import SampledState, Trunk, pack
from swirl_fast.config import ConfigError
from swirl_fast.models.policy import DeviceComb, Policy
from swirl_fast.models.windows import layer_windows, refuse_lost_window

# Nats a token, and share of the gradient's norm, by the type of the matrix products. SmolLM2-135M, whose random tokens cost 12 nats each,
# has 7e-6 and 6e-6 in float32, 0.1 and 0.07 in bfloat16.
LIMITS = {torch.float32: (1e-3, 1e-2), torch.bfloat16: (0.5, 0.3)}
_TOKENS = 16
_LONGEST = 256  # a longer window is compared by what the attention is told, not by its effect


@dataclass(frozen=True)
class Agreement:
    """logprob_gap: mean |difference of a log-prob|, nats a token. gradient_gap: norm of the difference of the gradients of all parameters /
    norm of the gradient. parameter_gap: the largest such share of a parameter's own gradient, and worst: its name."""

    logprob_gap: float
    gradient_gap: float
    parameter_gap: float
    worst: str


def compare(
    policy: Policy, device: torch.device | str = "cpu", longest_path: int = 0, trunk: Trunk | None = None
) -> Agreement:
    """A small tree through the policy and through its own model. Collective for a sharded policy; gradients must be unset, and are so
    afterwards.

    longest_path: tokens of the longest path that there will be; 0: of this tree. trunk: another tree, of equally long paths. Raises
    ConfigError as `Policy.forward` does, and for a window shorter than longest_path that a layer's attention is not told.
    """
    trunk = trunk or small_tree(policy)
    rows_RT = torch.tensor(np.stack(_rows(trunk)), dtype=torch.int64, device=device)
    lengths = [state.length for state in trunk.states for _ in state.actions]
    packed = DeviceComb.of(pack_rows([trunk], padded=True) if policy.padded else pack([trunk]), device)
    # compiled layers would be compiled a second time for another attention
    with torch.compiler.set_stance("force_eager"), torch.enable_grad(), _without_autocast(policy):
        found_N = policy(packed)
        if not policy.padded:
            refuse_lost_window(policy.model.config, packed.told, max(longest_path, packed.longest_path))
        found_N.mean().backward()
        of_tree = _norms(policy)
        with _own_attention(policy):
            wanted = policy.plain(rows_RT)
            wanted_N = torch.cat([row[length - 1 :] for row, length in zip(wanted, lengths, strict=True)])
            (-wanted_N.mean()).backward()
        of_difference = _norms(policy)
    policy.zero_grad(set_to_none=True)
    whole = _together(of_tree)
    # of a gradient that is nothing but rounding, as that of a key's bias, no share is taken
    least = max(1e-3 * whole, 1e-30)
    shares = {name: norm / max(of_tree.get(name, 0.0), least) for name, norm in of_difference.items()}
    worst = max(shares, key=lambda name: shares[name], default="")
    gap = float((found_N - wanted_N).detach().abs().mean())
    return Agreement(gap, _together(of_difference) / max(whole, 1e-30), shares.get(worst, 0.0), worst)


def refuse_untold_windows(policy: Policy, device: torch.device | str = "cpu", longest_path: int = 0) -> None:
    """What a compiled policy cannot see of itself: raises ConfigError for a window shorter than longest_path (0: no path) that a layer's
    attention is not told. One small forward, not compiled; collective for a sharded policy."""
    packed = DeviceComb.of(pack([small_tree(policy)]), device)
    with torch.compiler.set_stance("force_eager"), torch.no_grad():
        policy(packed)
    refuse_lost_window(policy.model.config, packed.told, longest_path)


def refuse_disagreement(agreement: Agreement, model_type: str, dtype: torch.dtype, padded: bool = False) -> None:
    """Raises ConfigError, with the numbers, for gaps above the limits of matrix products in `dtype`. padded: the policy's kind of rows."""
    logprob, gradient = LIMITS[dtype]
    if agreement.logprob_gap <= logprob and agreement.gradient_gap <= gradient:
        return
    over = "separate rows" if padded else "a small tree of shared prefixes"
    rows = "the model itself" if padded else "separate rows"
    remedy = "its logits are more than the output layer of what the layers give. Use another model"
    if not padded:
        remedy = "training over shared prefixes would not be exact. Set training.sharing=false"
    raise ConfigError(
        f"training.check_model: model type {model_type}: over {over} its log-probs differ from those of {rows} by "
        f"{agreement.logprob_gap:.2g} nats a token (limit {logprob:g}), and its gradient by {agreement.gradient_gap:.2g} of its norm "
        f"(limit {gradient:g}), most at {agreement.worst}: {remedy}, or training.check_model=false if you know the reason"
    )


def small_tree(policy: Policy) -> Trunk:
    """A trunk with a branch at a third and one at two thirds of its longest path; always the same for a model."""
    text = policy.model.config.get_text_config()
    short = [w for w in layer_windows(policy.model.config) if w is not None and w + _TOKENS <= _LONGEST]
    limits = [getattr(text, "max_position_embeddings", None), policy.longest_path]
    length = min([_TOKENS + max(short, default=0), *(limit for limit in limits if limit)])
    first, second = max(length // 3, 1), max(2 * length // 3, 1)
    draw = np.random.default_rng(0)
    vocabulary = policy.model.get_input_embeddings().weight.shape[0]
    tokens, a, b = (
        draw.integers(vocabulary, size=n).astype(np.int32) for n in (second, length - first, length - second)
    )
    return Trunk(tokens, (SampledState(first, (a,), (0,)), SampledState(second, (b,), (1,))))


def _rows(trunk: Trunk) -> list[np.ndarray]:
    """Of each action the whole path, all equally long."""
    return [np.concatenate([trunk.tokens[: s.length], action]) for s in trunk.states for action in s.actions]


def stored_alike(policy: Policy) -> bool:
    """Whether all weights have one type, so that matrix products need no autocast. Frozen ones beside adapters may have another."""
    return len({parameter.dtype for parameter in policy.parameters()}) == 1


@contextmanager
def _without_autocast(policy: Policy) -> Iterator[None]:
    """Where it can be done without."""
    kept = policy.autocast
    policy.autocast = None if stored_alike(policy) else kept
    try:
        yield
    finally:
        policy.autocast = kept


@contextmanager
def _own_attention(policy: Policy) -> Iterator[None]:
    """Until after the backward, which runs checkpointed layers again."""
    if policy.padded:  # it is never replaced
        yield
        return
    policy.model.set_attn_implementation("eager")  # the definition; "sdpa" leaves Gemma 2's soft-cap out
    try:
        yield
    finally:
        policy.model.set_attn_implementation(policy.attention)


def _norms(policy: Policy) -> dict[str, float]:
    """Of every gradient."""
    norms: dict[str, Tensor] = {}
    for name, parameter in policy.named_parameters():
        if parameter.grad is not None:
            norm = parameter.grad.norm()
            norms[name] = norm.full_tensor() if isinstance(norm, DTensor) else norm
    return dict(zip(norms, torch.stack(list(norms.values())).tolist(), strict=True)) if norms else {}


def _together(norms: dict[str, float]) -> float:
    return float(np.linalg.norm(list(norms.values())))
