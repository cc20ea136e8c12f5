"""A pytest plugin: our losses in the place of verl's own, for verl's own tests."""

from verl.trainer.ppo import core_algos

from swirl_kernels.integrations.verl import MODES, register

register("")
assert all(core_algos.get_policy_loss_fn(mode).func.__module__.startswith("swirl_kernels") for mode in MODES)
