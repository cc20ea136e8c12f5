"""Whether two ways to compute a loss over actions agree: log-probs, loss and the gradient of every parameter."""

from __future__ import annotations

import torch
from naive.rows import separate_rows
from torch import Tensor, nn
from transformers import PreTrainedModel

from swirl_fast.comb import Branch, Comb, pack
from swirl_fast.policy import PackedRow, Policy

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


def assert_same_gradients(wanted: nn.Module, found: nn.Module, tolerance: float) -> None:
    """Of each parameter, relative to its own gradient, or to a tenth of the whole where that is smaller: what cancels to almost
    nothing (query weights on paths of equal tokens) keeps the rounding of what cancelled."""
    pairs = list(zip(wanted.named_parameters(), found.parameters(), strict=True))
    whole = torch.stack([parameter.grad.norm() for (_, parameter), _ in pairs]).norm()
    for (name, parameter), other in pairs:
        gap = (parameter.grad - other.grad).norm() / max(parameter.grad.norm(), 0.1 * whole)
        assert gap <= tolerance, f"{name}: relative gradient difference {gap:.1e}"


def assert_equal_to_rows(naive: PreTrainedModel, policy: Policy, branches: list[Branch], tolerance: float) -> None:
    """The branches as one comb against one row per action."""
    naive.zero_grad()
    policy.zero_grad()
    wanted = separate_rows(naive, branches, policy.temperature)
    comb = pack(branches)
    found = by_action(comb, policy(PackedRow.of(comb)))
    assert found.keys() == wanted.keys()
    for index, logp in wanted.items():
        assert (found[index] - logp).norm() <= tolerance * logp.norm(), f"action {index}"
    wanted_loss, loss = losses(wanted), losses(found)
    scale = sum(float(logp.detach().abs().sum()) for logp in wanted.values())
    assert abs(loss - wanted_loss) <= tolerance * scale
    wanted_loss.backward()
    loss.backward()
    assert_same_gradients(naive, policy.model, tolerance)
