"""From sampled actions to packed micro-batches, across ranks.

    every rank: SampledBatch -> Actions -> RankActions ── gather ──> all ranks cut the same micro-batches and deal them out

So that every rank has the same work, whichever rank sampled an action. Legend: A actions, N predicted tokens of a micro-batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from swirl_fast.comb.flops import ModelSize
from swirl_fast.comb.micro_batches import balance, micro_batches
from swirl_fast.comb.rows import pack_rows, row_batches
from swirl_fast.comb.tree import Comb, SampledState, Trunk, pack
from swirl_fast.config import Config
from swirl_fast.models.policy import DeviceComb
from swirl_fast.models.routing import Routing
from swirl_fast.objective import Actions
from swirl_fast.ranks import Ranks
from swirl_fast.rollouts.at_states import SampledAction
from swirl_fast.trajectory import Trajectory
from swirl_fast.verdict import Judgement


@dataclass(frozen=True)
class RankActions:
    """What one rank contributes to a step: every rank gets it, so that any rank can train on any action.

    trunks: the actions that are trained on, numbered from 0 on every rank. advantage_A, weight_A: float32 [A]. rollout_logp: the engine's
    log-probs of each action's tokens, float32. routed: the experts that drew them (Completion.routed_experts), None where not known.
    """

    trunks: list[Trunk]
    advantage_A: NDArray[np.float32]
    weight_A: NDArray[np.float32]
    rollout_logp: list[NDArray[np.float32]]
    routed: list[NDArray[Any] | None]


@dataclass
class MicroBatch:
    """A packed comb and, for its N predicted tokens, what the loss needs; float32 [N] on the policy's device. offsets_A: int64 [A + 1],
    where its actions begin and end. computed_tokens, effective_tokens, flops: its work; 0 where it only keeps ranks in step."""

    row: DeviceComb
    advantage_N: Tensor
    weight_N: Tensor
    rollout_logp_N: Tensor
    offsets_A: Tensor
    ref_logp_N: Tensor | None = None
    old_logp_N: Tensor | None = None
    computed_tokens: int = 0
    effective_tokens: int = 0
    flops: float = 0.0


def to_actions(sampled: Sequence[SampledAction], judgements: Sequence[Judgement] | None) -> Actions:
    """judgements: one an action; None: no action has a reward. UNKNOWN is not known."""
    rewards = [None] * len(sampled) if judgements is None else [judgement.reward for judgement in judgements]
    return Actions(
        rewards=torch.tensor([reward or 0.0 for reward in rewards], dtype=torch.float32),
        known=torch.tensor([reward is not None for reward in rewards], dtype=torch.bool),
        states=torch.tensor([sample.state for sample in sampled], dtype=torch.int64),
        trajectories=torch.tensor([sample.trajectory for sample in sampled], dtype=torch.int64),
        lengths=torch.tensor([len(sample.completion.tokens) for sample in sampled], dtype=torch.int64),
    )


def to_trunks(
    trajectories: Sequence[Trajectory], sampled: Sequence[SampledAction], used: Sequence[bool]
) -> list[Trunk]:
    """One trunk a trajectory; an action's number is its place in `sampled`; actions that are not used are left out."""
    grouped: dict[int, dict[int, list[int]]] = {}
    for number, sample in enumerate(sampled):
        if used[number]:
            grouped.setdefault(sample.trajectory, {}).setdefault(sample.state, []).append(number)
    trunks = []
    for t, by_state in grouped.items():
        trajectory = trajectories[t]
        states = []
        for numbers in by_state.values():
            step = len(sampled[numbers[0]].view.history)
            actions = tuple(np.asarray(sampled[n].completion.tokens, np.int32) for n in numbers)
            states.append(SampledState(trajectory.steps[step].start, actions, tuple(numbers)))
        trunks.append(Trunk(np.asarray(trajectory.tokens, np.int32), tuple(states)))
    return trunks


def routed_tokens(comb: Comb, routed: Sequence[NDArray[Any] | None]) -> NDArray[np.int16] | None:
    """The experts of the comb's tokens, int16 [T, layers, experts a token visits], -1 where nothing is recorded; None where nothing is at
    all. routed: of its actions in order, as Completion.routed_experts.

    A token that several actions have, or that is in the state of another, has one choice: that of the first action that recorded it.
    """
    shape = next((one.shape[1:] for one in routed if one is not None), None)
    if shape is None:
        return None
    found_TLK = np.full((comb.computed_tokens, *shape), -1, np.int16)
    for a in reversed(range(len(routed))):
        if (own := routed[a]) is not None:
            edges = comb.edge_N[comb.offsets[a] : comb.offsets[a + 1]]
            found_TLK[comb.rows_E[edges]] = own
    return found_TLK


class Packer:
    """Cuts what all ranks sampled into micro-batches of at most `training.token_budget` tokens.

    size: of the model, for the estimate of work. max_context: longest state with its action where training.max_path_tokens is 0.
    padded: how rows are laid out with training.sharing=false.
    """

    def __init__(self, config: Config, ranks: Ranks, size: ModelSize, max_context: int, padded: bool = False) -> None:
        self._training, self._ranks, self._size = config.training, ranks, size
        self._max_path = config.training.max_path_tokens or max_context
        # Without a KL term an action whose advantage is 0 has loss and gradient 0: it need not be computed.
        self._skip_zero = config.algorithm.kl_coef == 0
        self._padded = padded
        self._windows = {} if padded else dict.fromkeys(window for _, window in size.attention)

    def rank_actions(
        self,
        trajectories: Sequence[Trajectory],
        sampled: Sequence[SampledAction],
        advantage_A: Tensor,
        weight_A: Tensor,
    ) -> RankActions:
        """What this rank contributes."""
        used_A = weight_A != 0
        if self._skip_zero:
            used_A &= advantage_A != 0
        return RankActions(
            to_trunks(trajectories, sampled, used_A.tolist()),
            advantage_A.numpy(),
            weight_A.numpy(),
            [np.asarray(sample.completion.logprobs, np.float32) for sample in sampled],
            [sample.completion.routed_experts for sample in sampled],
        )

    def micro_batches(self, of_ranks: Sequence[RankActions]) -> list[MicroBatch]:
        """This rank's micro-batches: all ranks cut the same ones and deal them out by estimated work. Every rank gets as many as the
        busiest one: FSDP's collectives must match, so others run empty ones.

        of_ranks: of all ranks, in their order. Raises ValueError for an action that fits no micro-batch.
        """
        training, ranks = self._training, self._ranks
        offsets = np.cumsum([0, *(len(actions.weight_A) for actions in of_ranks)])
        trunks = [
            trunk.renumbered(int(offset)) if offset else trunk
            for actions, offset in zip(of_ranks, offsets, strict=False)
            for trunk in actions.trunks
        ]
        everything = RankActions(
            trunks,
            np.concatenate([actions.advantage_A for actions in of_ranks]),
            np.concatenate([actions.weight_A for actions in of_ranks]),
            [logp for actions in of_ranks for logp in actions.rollout_logp],
            [routed for actions in of_ranks for routed in actions.routed],
        )
        wanted = (trunks, training.token_budget, self._max_path, ranks.size, self._size)
        plans = micro_batches(*wanted) if training.sharing else row_batches(*wanted, self._padded)
        jobs = balance([plan.flops for plan in plans], ranks.size)
        batches = [self._packed(self._comb(plans[job].trunks), everything) for job in jobs[ranks.rank]]
        return batches + [self._empty() for _ in range(max(map(len, jobs)) - len(batches))]

    def _comb(self, trunks: Sequence[Trunk]) -> Comb:
        return pack(trunks) if self._training.sharing else pack_rows(trunks, self._padded)

    def _packed(self, comb: Comb, actions: RankActions) -> MicroBatch:
        device = self._ranks.device
        numbers_N = np.repeat(comb.indices_A, np.diff(comb.offsets))
        rollout_logp_N = np.concatenate([actions.rollout_logp[a] for a in comb.indices_A])
        row = self._on_device(comb)
        experts_TLK = routed_tokens(comb, [actions.routed[a] for a in comb.indices_A])
        if experts_TLK is not None:
            row.routing = Routing(torch.from_numpy(experts_TLK).to(device))
        return MicroBatch(
            row,
            torch.from_numpy(actions.advantage_A[numbers_N]).to(device),
            torch.from_numpy(actions.weight_A[numbers_N]).to(device),
            torch.from_numpy(rollout_logp_N).to(device),
            torch.from_numpy(comb.offsets.astype(np.int64)).to(device),
            computed_tokens=comb.computed_tokens,
            effective_tokens=comb.effective_tokens,
            flops=comb.flops(self._size),
        )

    def _empty(self) -> MicroBatch:
        """One state and one token, of weight 0."""
        token = np.zeros(1, np.int32)
        comb = pack([Trunk(token, (SampledState(1, (token,), (0,)),))])
        zero = torch.zeros(1, device=self._ranks.device)
        return MicroBatch(self._on_device(comb), zero, zero, zero, torch.tensor([0, 1], device=self._ranks.device))

    def _on_device(self, comb: Comb) -> DeviceComb:
        return DeviceComb.of(comb, self._ranks.device, self._windows, self._training.flash_attention)
