"""A transformers causal language model over a comb: hidden states by tree attention, log-probs of the teeth alone.

Everything happens inside one forward, so that FSDP has the output layer's weight gathered when `linear_logprob` needs it. The
model's own code is untouched: attention is reached through transformers' attention interface, which hands the packing's extra
arguments through to every layer.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from swirl_fast.comb import Comb
from swirl_fast.config import ConfigError
from swirl_fast.model import refuse_inexact
from swirl_kernels.linear_logprob import linear_logprob
from swirl_kernels.tree_attention import TreePlan, tree_attention, tree_plan

ATTENTION = "swirl_tree"


@dataclass(frozen=True)
class PackedRow:
    """A comb on a device. tokens_1T, depth_1T int64 [1, T]; subtree_end_T int32; rows_N, targets_N int64.

    plans: what tree attention derives from the packing, by sliding window; made when a layer first asks.
    """

    tokens_1T: Tensor
    depth_1T: Tensor
    subtree_end_T: Tensor
    rows_N: Tensor
    targets_N: Tensor
    plans: dict[int | None, TreePlan] = field(default_factory=dict)

    @classmethod
    def of(cls, comb: Comb, device: torch.device | str = "cpu") -> PackedRow:
        return cls(
            tokens_1T=torch.from_numpy(comb.tokens_T).long().to(device)[None],
            depth_1T=torch.from_numpy(comb.depth_T).long().to(device)[None],
            subtree_end_T=torch.from_numpy(comb.subtree_end_T).to(device),
            rows_N=torch.from_numpy(comb.rows_N).long().to(device),
            targets_N=torch.from_numpy(comb.targets_N).long().to(device),
        )

    def plan(self, window: int | None) -> TreePlan:
        if window not in self.plans:
            self.plans[window] = tree_plan(self.subtree_end_T, depth=self.depth_1T[0], window=window)
        return self.plans[window]


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    packed: PackedRow | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: query [1, Hq, T, D], key and value [1, Hkv, T, D] -> [1, T, Hq, D]."""
    assert packed is not None, "the model was called without a packed row; call Policy.forward"
    assert dropout == 0.0, "attention dropout cannot be exact over shared prefixes"
    plan = packed.plan(sliding_window)
    out = tree_attention(
        query[0], key[0], value[0], None, scale=scaling, softcap=softcap, window=sliding_window, plan=plan
    )
    return out.transpose(0, 1)[None], None


AttentionInterface.register(ATTENTION, _attention)


class Policy(nn.Module):
    """model: a causal language model whose layers are all attention. temperature: of the log-probs.

    autocast: compute type of matrix products, None for the weights' own. Raises ConfigError, naming the model type, for
    architectures that would not be exact.
    """

    def __init__(self, model: PreTrainedModel, temperature: float = 1.0, autocast: torch.dtype | None = None) -> None:
        super().__init__()
        refuse_inexact(model.config)
        text = model.config.get_text_config()
        for key in ("logit_scale", "logits_scaling"):
            if getattr(text, key, 1.0) not in (None, 1.0):
                raise ConfigError(
                    f"model type {text.model_type}: {key}={getattr(text, key)} is not supported by the fused log-probs"
                )
        model.set_attn_implementation(ATTENTION)
        self.model = model
        self.temperature = temperature
        self.autocast = autocast
        self.softcap = getattr(text, "final_logit_softcapping", None)

    def forward(self, packed: PackedRow) -> Tensor:
        """Log-probs [N] float32 of `targets_N`."""
        device = packed.tokens_1T.device.type
        with torch.autocast(device, dtype=self.autocast or torch.bfloat16, enabled=self.autocast is not None):
            hidden_1TH = self.model.base_model(
                input_ids=packed.tokens_1T,
                position_ids=packed.depth_1T,
                use_cache=False,
                packed=packed,
            ).last_hidden_state
            head = self.model.get_output_embeddings()
            return linear_logprob(
                hidden_1TH[0, packed.rows_N],
                head.weight,
                packed.targets_N,
                bias=head.bias,
                temperature=self.temperature,
                softcap=self.softcap,
            )
