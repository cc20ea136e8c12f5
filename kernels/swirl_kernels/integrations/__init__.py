"""The package inside other libraries' trainers, under those libraries' own names and signatures.

    head        head_of: what a transformers model does between its last hidden state and its logits, checked by numbers
    trl         linear_logprob in place of TRL's fused language-model head (GRPO, RLOO)
    verl        policy_loss under the signature of verl's registry of policy losses
    openrlhf    OpenRLHF's PolicyLoss

None is imported by swirl_kernels itself; each imports its library when it is used, and head needs torch alone.
"""

from swirl_kernels.integrations.head import OutputHead, head_of

__all__ = ["OutputHead", "head_of"]
