"""Trained weights -> rollout engine; from then on its completions carry the new policy version."""

from __future__ import annotations

from swirl_fast.engines.engine import Engine
from swirl_fast.models.lora import named_weights
from swirl_fast.models.policy import Policy
from swirl_fast.ranks import Ranks


def sync(policy: Policy, engine: Engine, version: int, ranks: Ranks) -> None:
    """Collective: every rank's engine takes all parameters. They are handed over as they are sharded: an engine first looks at names and
    shapes, then gathers some at a time, so that no rank holds the whole model beside its engine's. No rank goes on before all
    engines have them, for ranks may share servers. Adapters are merged into copies, a weight at a time, and the policy stays as it is."""
    engine.update_weights(named_weights(policy.model), version)
    ranks.barrier()
