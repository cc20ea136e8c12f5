"""From sampled actions to packed micro-batches, across ranks.

    every rank: SampledBatch -> Actions -> RankActions ── some change the rank ──> RankActions -> micro-batches

Ranks tell each other how much work they have and how many micro-batches they need. Those with more than the mean send the rest, whole
actions with their states, to those with less: so every rank has the same work, whichever sampled an action, and what a rank
packs, sends and holds does not grow with the number of ranks (comb/transfers.py). Legend: A actions, N predicted
tokens of a micro-batch.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, overload

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from swirl_fast.comb.flops import ModelSize
from swirl_fast.comb.micro_batches import MicroBatchPlan, micro_batches, split_off, splits
from swirl_fast.comb.rows import pack_rows, row_batches
from swirl_fast.comb.transfers import ABOVE, Transfer, rank_groups, relieving, transfers
from swirl_fast.comb.tree import Comb, SampledState, Trunk, pack
from swirl_fast.config import Config
from swirl_fast.models.policy import DeviceComb
from swirl_fast.models.routing import Routing
from swirl_fast.models.upload import upload
from swirl_fast.objective import Actions
from swirl_fast.ranks import Ranks
from swirl_fast.rollouts.at_states import SampledAction
from swirl_fast.trajectory import Trajectory
from swirl_fast.verdict import Judgement

# Actions are not cut, and how micro-batches can be cut changes with them, so that a part is never quite what was wanted; every further
# round evens out some of the rest.
ROUNDS = 3
# After these the few ranks that still have too much try parts until one leaves them with as much as they should have, and give it to a
# rank that finds that it has room. So often at most, and so many parts.
LAST_ROUNDS, TRIED = 6, 20


@dataclass(frozen=True)
class RankActions:
    """What one rank trains on in a step, or sends to another.

    trunks: the actions that are trained on, by their number in the lists. advantage_A, weight_A: float32 [A]. rollout_logp: the engine's
    log-probs of each action's tokens, float32. routed: the experts that drew them (Completion.routed_experts), None where not known.
    """

    trunks: list[Trunk]
    advantage_A: NDArray[np.float32]
    weight_A: NDArray[np.float32]
    rollout_logp: list[NDArray[np.float32]]
    routed: list[NDArray[Any] | None]

    def only(self, trunks: Sequence[Trunk]) -> RankActions:
        """The actions of some of its trunks, numbered anew."""
        numbers = [index for trunk in trunks for state in trunk.states for index in state.indices]
        new = {old: number for number, old in enumerate(numbers)}
        return RankActions(
            [trunk.renumbered(new) for trunk in trunks],
            self.advantage_A[numbers],
            self.weight_A[numbers],
            [self.rollout_logp[n] for n in numbers],
            [self.routed[n] for n in numbers],
        )

    def with_others(self, others: Sequence[RankActions]) -> RankActions:
        """Its actions, then theirs."""
        if not others:
            return self
        parts = [self, *others]
        starts = np.cumsum([0, *(len(part.weight_A) for part in parts)]).tolist()
        return RankActions(
            [
                trunk.renumbered(range(start, start + len(part.weight_A)))
                for part, start in zip(parts, starts, strict=False)
                for trunk in part.trunks
            ],
            np.concatenate([part.advantage_A for part in parts]),
            np.concatenate([part.weight_A for part in parts]),
            [logp for part in parts for logp in part.rollout_logp],
            [routed for part in parts for routed in part.routed],
        )


class Aim(NamedTuple):
    """What every rank should have: so much estimated work, in so many micro-batches."""

    work: float
    count: int


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


class MicroBatches(Sequence[MicroBatch]):
    """Those of one rank, each laid out when it is first asked for and then kept: while a GPU computes one, the host packs the next."""

    def __init__(self, make: Sequence[Callable[[], MicroBatch]]) -> None:
        self._make = make
        self._made: dict[int, MicroBatch] = {}

    def __len__(self) -> int:
        return len(self._make)

    @overload
    def __getitem__(self, index: int) -> MicroBatch: ...
    @overload
    def __getitem__(self, index: slice) -> list[MicroBatch]: ...
    def __getitem__(self, index: int | slice) -> MicroBatch | list[MicroBatch]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        number = range(len(self))[index]
        if number not in self._made:
            self._made[number] = self._make[number]()
        return self._made[number]


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
    """Shares what all ranks sampled out among them, and cuts each one's part into micro-batches of at most `training.token_budget` tokens.

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
        self._groups = [ranks.group(partition) for partition in rank_groups(ranks.size)]

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

    def shared_out(self, mine: RankActions) -> RankActions:
        """What this rank trains on, after ranks with much work gave some to ranks with little. Every rank calls it."""
        ranks = self._ranks
        if ranks.size == 1:
            return mine
        work, fewest = self.load(mine)
        for turn in range(ROUNDS):
            group = self._groups[turn % len(self._groups)]
            planned = transfers(ranks.numbers(work, group), group.members)
            takers = [one.taker for one in planned if one.giver == ranks.rank]
            givers = [one.giver for one in planned if one.taker == ranks.rank]
            if takers or givers:
                kept, given = self.give(mine, [one.work for one in planned if one.giver == ranks.rank])
                mine = kept.with_others(ranks.exchange(dict(zip(takers, given, strict=True)), givers))
                work, fewest = self.load(mine)
        count = int(ranks.max(torch.tensor([float(fewest)])))
        if fewest < count:
            work, _ = self.load(mine, count)
        group, aim = self._groups[0], Aim(float(ranks.sum(torch.tensor([work]))) / ranks.size, count)
        seen = []
        for turn in range(LAST_ROUNDS):
            told = ranks.numbers(work, group)
            planned = relieving(told, group.members, aim.work, turn)
            if not planned or (told, planned) in seen:  # all of the group see the same
                break
            seen.append((told, planned))
            for one in planned:
                if one.giver == ranks.rank:
                    mine, work = self._relieved(mine, work, one, aim)
                elif one.taker == ranks.rank:
                    mine, work = self._relieving(mine, work, one, aim)
        return mine

    def _relieved(self, mine: RankActions, work: float, one: Transfer, aim: Aim) -> tuple[RankActions, float]:
        """What this rank has, and the work of it, after it offered a part to a taker that may not want it."""
        offer = self.offer(mine, work, one.work, aim)
        self._ranks.exchange({one.taker: offer and (offer[1], work)}, ())
        if offer and self._ranks.exchange({}, [one.taker])[0]:
            mine, _, work = offer
        return mine, work

    def _relieving(self, mine: RankActions, work: float, one: Transfer, aim: Aim) -> tuple[RankActions, float]:
        """The other side of `_relieved`."""
        (offer,) = self._ranks.exchange({}, [one.giver])
        if offer is None:
            return mine, work
        accepted = self.accept(mine, *offer, aim)
        self._ranks.exchange({one.giver: accepted is not None}, ())
        return accepted or (mine, work)

    def offer(
        self, mine: RankActions, work: float, wanted: float, aim: Aim
    ) -> tuple[RankActions, RankActions, float] | None:
        """(what is kept, a part of about `wanted`, the work of what is kept): of the parts that are tried the one that leaves the work
        nearest to what it should be; None where none makes it less."""
        best: tuple[RankActions, list[Trunk], float] | None = None
        for kept, part in itertools.islice(splits(mine.trunks, wanted, self._size, self._training.sharing), TRIED):
            rest = mine.only(kept)
            left, _ = self.load(rest, aim.count)
            if left < work and (best is None or abs(left - aim.work) < abs(best[2] - aim.work)):
                best = rest, part, left
            if abs(left - aim.work) < ABOVE / 2 * aim.work:
                break
        return best and (best[0], mine.only(best[1]), best[2])

    def accept(self, mine: RankActions, part: RankActions, giver: float, aim: Aim) -> tuple[RankActions, float] | None:
        """(both together, their work); None where that is too much: more than ABOVE above the mean, and more than seven tenths of what the
        giver had above the mean; or too many micro-batches. giver: its work, with the part."""
        both = mine.with_others([part])
        work, needed = self.load(both, aim.count)
        room = work - aim.work <= max(ABOVE * aim.work, 0.7 * (giver - aim.work))
        return (both, work) if room and needed <= aim.count else None

    def load(self, actions: RankActions, count: int = 0) -> tuple[float, int]:
        """Floating-point operations of its micro-batches, estimated, and how many there are: as few as can be, or `count`."""
        plans = self._plans(actions, lambda fewest: max(fewest, count))
        return sum(plan.flops for plan in plans), len(plans)

    def give(self, mine: RankActions, works: Sequence[float]) -> tuple[RankActions, list[RankActions]]:
        """(what is kept, a part of about so much estimated work for each of `works`)."""
        if not works:
            return mine, []
        kept, given = split_off(mine.trunks, works, self._size, self._training.sharing)
        return mine.only(kept), [mine.only(trunks) for trunks in given]

    def micro_batches(self, mine: RankActions) -> MicroBatches:
        """Of what this rank trains on, the costliest first. Every rank calls it and gets as many as the one that needs most: FSDP's
        collectives must match, so those that have fewer actions run empty ones.

        Raises ValueError for an action that fits no micro-batch.
        """
        ranks, most = self._ranks, 0

        def allowed(fewest: int) -> int:
            nonlocal most
            most = int(ranks.max(torch.tensor([float(fewest)])))
            return most

        plans = self._plans(mine, allowed if ranks.size > 1 else None)
        plans.sort(key=lambda plan: -plan.flops)  # the k-th of all ranks run at the same time
        packed = [functools.partial(self._packed, plan, mine) for plan in plans]
        return MicroBatches([*packed, *(self._empty for _ in range(most - len(plans)))])

    def _plans(self, actions: RankActions, allowed: Callable[[int], int] | None = None) -> list[MicroBatchPlan]:
        wanted = (actions.trunks, self._training.token_budget, self._max_path, self._size, allowed)
        return micro_batches(*wanted) if self._training.sharing else row_batches(*wanted, self._padded)

    def _packed(self, plan: MicroBatchPlan, actions: RankActions) -> MicroBatch:
        comb = pack(plan.trunks) if self._training.sharing else pack_rows(plan.trunks, self._padded)
        numbers_N = np.repeat(comb.indices_A, np.diff(comb.offsets))
        experts_TLK = routed_tokens(comb, [actions.routed[a] for a in comb.indices_A])
        arrays = [
            actions.advantage_A[numbers_N],
            actions.weight_A[numbers_N],
            np.concatenate([actions.rollout_logp[a] for a in comb.indices_A]),
            comb.offsets.astype(np.int64),
        ]
        moved = upload(arrays if experts_TLK is None else [*arrays, experts_TLK], self._ranks.device)
        row = self._on_device(comb)
        if experts_TLK is not None:
            row.routing = Routing(moved[-1])
        return MicroBatch(
            row,
            *moved[:4],
            computed_tokens=comb.computed_tokens,
            effective_tokens=comb.effective_tokens,
            flops=comb.flops(self._size),
        )

    def _empty(self) -> MicroBatch:
        """One state and one token, of weight 0."""
        token = np.zeros(1, np.int32)
        comb = pack([Trunk(token, (SampledState(1, (token,), (0,)),))])
        zero = np.zeros(1, np.float32)
        moved = upload([zero, zero, zero, np.array([0, 1])], self._ranks.device)
        return MicroBatch(self._on_device(comb), *moved)

    def _on_device(self, comb: Comb) -> DeviceComb:
        return DeviceComb.of(comb, self._ranks.device, self._windows, self._training.flash_attention)
