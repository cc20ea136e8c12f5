"""One GPU for the rollout engine and the trainer in turns (engine.share_gpu): what lies in its memory, phase after phase.

    sample   the servers' weights and key/value cache                        trainer in CPU memory
    train    parameters, optimizer, reference, gradients, activations        servers' memory released, without their weights
    sync     parameters and the servers' weights, a bucket at a time         then the parameters leave, and the cache comes back

A training begins and ends in the phase `train`: checkpoints are read from the GPU, and where no step follows nothing is sent.
"""

from __future__ import annotations

from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.optim import Optimizer

from swirl_fast.engines.engine import SharedEngine
from swirl_fast.metrics import PhaseTimer
from swirl_fast.models.policy import Policy
from swirl_fast.ranks import Ranks
from swirl_fast.training import weight_sync
from swirl_fast.training.offload import Offload


def lend(engine: SharedEngine, ranks: Ranks) -> None:
    """Has the engine release its memory, when all ranks are done with it. Collective; ranks may share servers."""
    ranks.barrier()
    engine.release_memory()
    ranks.barrier()


class Turns:
    """Its methods are collective and alternate, `sample` first. Between two steps there are no gradients."""

    def __init__(
        self, engine: SharedEngine, policy: Policy, reference: Policy | None, optimizer: Optimizer, ranks: Ranks
    ) -> None:
        self._engine, self._policy, self._reference, self._optimizer = engine, policy, reference, optimizer
        self._ranks = ranks
        self._states, self._parameters = Offload(ranks.device), Offload(ranks.device)
        self._frozen = Offload(ranks.device, constant=True)

    def sample(self, version: int, timer: PhaseTimer) -> None:
        """From training to sampling: the engine gets the policy's weights, and all of the memory."""
        with timer.phase("share_gpu"):
            for module in (self._policy, self._reference):
                if module is not None:
                    _reshard(module)
            self._states.out(value for state in self._optimizer.state.values() for value in state.values())
            if self._reference is not None:
                self._frozen.out(self._reference.parameters())
            with timer.phase("weight_sync"):
                weight_sync.sync(self._policy, self._engine, version, self._ranks)
            self._parameters.out(self._policy.parameters())
            self._ranks.barrier()
            self._engine.resume_memory()
            self._ranks.barrier()

    def train(self, timer: PhaseTimer) -> None:
        """From sampling to training."""
        with timer.phase("share_gpu"):
            lend(self._engine, self._ranks)
            for part in (self._parameters, self._frozen, self._states):
                part.back()


def _reshard(module: nn.Module) -> None:
    """Frees parameters that FSDP2 has left gathered: the root's, after a forward without a backward."""
    for one in module.modules():
        if isinstance(one, FSDPModule):
            one.reshard()
