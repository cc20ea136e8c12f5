"""Operations that reinforcement learning on language models needs and torch lacks; see README.md."""

from swirl_kernels.linear_logprob import linear_logprob, naive_linear_logprob
from swirl_kernels.tree import TreePlan, tree_plan
from swirl_kernels.tree_attention import naive_tree_attention, tree_attention

__all__ = [
    "TreePlan",
    "linear_logprob",
    "naive_linear_logprob",
    "naive_tree_attention",
    "tree_attention",
    "tree_plan",
]
