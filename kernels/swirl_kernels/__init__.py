"""Operations that reinforcement learning on language models needs and torch lacks; see README.md."""

from swirl_kernels.linear_logprob import linear_logprob, naive_linear_logprob
from swirl_kernels.policy_loss import naive_policy_loss, policy_loss
from swirl_kernels.policy_loss.presets import (
    PRESETS,
    PolicyLossPreset,
    loss_counts,
    loss_weights,
    openrlhf_preset,
    trl_preset,
    verl_preset,
)
from swirl_kernels.policy_loss.spec import PolicyLossMetrics, PolicyLossSpec
from swirl_kernels.segment_reduce import naive_segment_reduce, segment_reduce
from swirl_kernels.selective_logprob import naive_selective_logprob, selective_logprob
from swirl_kernels.tree_attention import naive_tree_attention, tree_attention
from swirl_kernels.tree_attention.plan import TreePlan, tree_plan

__version__ = "0.1.0"
__all__ = [
    "__version__",
    "PRESETS",
    "PolicyLossMetrics",
    "PolicyLossPreset",
    "PolicyLossSpec",
    "TreePlan",
    "linear_logprob",
    "loss_counts",
    "loss_weights",
    "naive_linear_logprob",
    "naive_policy_loss",
    "naive_segment_reduce",
    "naive_selective_logprob",
    "naive_tree_attention",
    "openrlhf_preset",
    "policy_loss",
    "segment_reduce",
    "selective_logprob",
    "tree_attention",
    "tree_plan",
    "trl_preset",
    "verl_preset",
]
