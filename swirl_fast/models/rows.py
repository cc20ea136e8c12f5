"""Models over separate rows (training.sharing=false): which of them tree attention can run, packed, and the policy of the others.

    packed   Policy over rows that lie one after the other: models whose layers are all full or sliding-window attention
    padded   RowsPolicy: the plain transformers model over a rectangle of rows. Layers that keep a state (Qwen3.5, Mamba), and attention
             with more to it than keys and values (Llama 4 with scaled queries, DeepSeek V3.2), are its own

The rectangle is one call, so that all ranks gather the same layers as often, whatever rows they have. No mask is given: what is padding
lies behind every token that predicts, and the model looks backwards only.
"""

from __future__ import annotations

import copy
import sys
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from swirl_fast.models.exact import own_attention, why_not_shared
from swirl_fast.models.policy import DeviceComb, Policy, decoder_of
from swirl_fast.models.windows import layer_windows, lost_window

_PROBE = "swirl_probe"


class RowsPolicy(Policy):
    """model: any causal language model. Its combs are rectangles of padded rows (comb/rows.py)."""

    padded = True

    def __init__(self, model: PreTrainedModel, temperature: float = 1.0, autocast: torch.dtype | None = None) -> None:
        super().__init__(model, temperature, autocast, sharing=False)

    def _attention(self) -> str:
        return own_attention(self.model)

    def _hidden(self, packed: DeviceComb) -> Tensor:
        rows_RT = packed.tokens_1T.view(-1, packed.longest_path)
        return decoder_of(self.model)(input_ids=rows_RT, use_cache=False).last_hidden_state.flatten(0, 1)


def open_policy(
    model: PreTrainedModel, temperature: float, autocast: torch.dtype | None = None, sharing: bool = True
) -> Policy:
    """The policy over combs, or over the rows that the model takes. Raises ConfigError for a model that cannot be trained so."""
    if sharing or packs_rows(model.config):
        return Policy(model, temperature, autocast, sharing)
    return RowsPolicy(model, temperature, autocast)


def packs_rows(model_config: PreTrainedConfig) -> bool:
    """Whether tree attention can run the model over packed rows. No weights are needed."""
    return why_not_shared(model_config) is None and not _hides_windows(model_config)


def _hides_windows(model_config: PreTrainedConfig) -> bool:
    """Whether a sliding window is kept from the attention, in a mask that tree attention does not see, as some model types do. Found by a
    forward that computes nothing; a model that cannot run without numbers, as some with experts, counts as one that does."""
    if not any(layer_windows(model_config)):
        return False
    told: dict[int, int | None] = {}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(copy.deepcopy(model_config), attn_implementation=_PROBE)
        try:
            model.base_model(input_ids=torch.zeros(1, 2, dtype=torch.int64), use_cache=False, told=told)
        except (RuntimeError, NotImplementedError):
            return True
    return lost_window(model_config, told, sys.maxsize) is not None


def _probe(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *_: Any, told: dict[int, int | None], **others: Any
) -> tuple[Tensor, None]:
    """transformers' attention interface; what it returns has the right shape only."""
    told[module.layer_idx] = others.get("sliding_window")  # type: ignore[index,assignment]
    return value.new_zeros(query.shape[0], query.shape[2], query.shape[1], value.shape[3]), None


AttentionInterface.register(_PROBE, _probe)
