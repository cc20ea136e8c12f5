"""Whether two ways to compute a loss over actions agree: log-probs, loss and the gradient of every parameter."""

from __future__ import annotations

import torch
from naive.rows import all_actions, separate_rows
from torch import Tensor, nn
from transformers import PreTrainedModel

from swirl_fast.comb.tree import Comb, Trunk, pack
from swirl_fast.models.policy import DeviceComb, Policy

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}


def losses(logprobs: dict[int, Tensor]) -> Tensor:
    """A loss in which every token has a weight of its own, in [0.5, 1.5]: nothing cancels that would make differences look large."""
    weight = {
        index: 1 + 0.5 * torch.linspace(0.5 + index, 1.5 - index, len(logp), dtype=logp.dtype).sin()
        for index, logp in logprobs.items()
    }
    return torch.stack([(logp * weight[index]).sum() for index, logp in logprobs.items()]).sum()


def by_action(comb: Comb, logp_N: Tensor) -> dict[int, Tensor]:
    return {int(i): logp_N[comb.offsets[a] : comb.offsets[a + 1]] for a, i in enumerate(comb.indices_A)}


def assert_same_gradients(wanted: nn.Module, found: nn.Module, tolerance: float, rounding: float = 0.0) -> None:
    """Of each trained parameter, relative to its own gradient. rounding: how far those of queries and keys may be off, relative to the
    gradient of all parameters (see `rounding_of`)."""
    both = zip(wanted.named_parameters(), found.parameters(), strict=True)
    pairs = [(one, other) for one, other in both if one[1].requires_grad or other.requires_grad]
    whole = torch.stack([parameter.grad.norm() for (_, parameter), _ in pairs]).norm()
    for (name, parameter), other in pairs:
        own, gap = parameter.grad.norm(), (parameter.grad - other.grad).norm()
        noise = rounding * whole if ".q_" in name or ".k_" in name else 0.0
        assert gap <= max(tolerance * own, noise), f"{name}: gradients differ by {gap:.1e}, their norm is {own:.1e}"


def rounding_of(branches: list[Trunk], dtype: torch.dtype) -> float:
    """0, unless nearly all predictions (7 of 8) have seen one token only, once or repeated.

    There all values are alike, so the output does not depend on the scores: the gradients of queries and keys are 0, and what is
    computed is the rounding of what cancelled. Then two units of rounding are allowed, relative to the gradient of all parameters.
    """
    seen = [len({*state, *action[:i]}) for state, action in all_actions(branches).values() for i in range(len(action))]
    return 2 * torch.finfo(dtype).eps if sum(n > 1 for n in seen) <= len(seen) / 8 else 0.0


def assert_equal_to_rows(
    naive: PreTrainedModel, policy: Policy, branches: list[Trunk], tolerance: float, comb: Comb | None = None
) -> None:
    """The branches as one comb, or as the one that is given, against one row per action."""
    naive.zero_grad()
    policy.zero_grad()
    wanted = separate_rows(naive, branches, policy.temperature)
    comb = comb or pack(branches)
    found = by_action(comb, policy(DeviceComb.of(comb)))
    assert found.keys() == wanted.keys()
    for index, logp in wanted.items():
        assert (found[index] - logp).norm() <= tolerance * logp.norm(), f"action {index}"
    wanted_loss, loss = losses(wanted), losses(found)
    scale = sum(float(logp.detach().abs().sum()) for logp in wanted.values())
    assert abs(loss - wanted_loss) <= tolerance * scale
    wanted_loss.backward()
    loss.backward()
    assert_same_gradients(naive, policy.model, tolerance, rounding_of(branches, loss.dtype))
