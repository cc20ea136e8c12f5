"""Trained weights -> rollout engine; from then on its completions carry the new policy version."""

from __future__ import annotations

from swirl_fast.engines.engine import Engine
from swirl_fast.policy import Policy
from swirl_fast.training.parallel import Ranks, full_parameters


def sync(policy: Policy, engine: Engine, version: int, ranks: Ranks) -> None:
    """Collective: every rank gathers each parameter and hands it to its engine; no rank goes on before all engines have them, for
    ranks may share servers."""
    engine.update_weights(full_parameters(policy), version)
    ranks.barrier()
