"""A small random model of any model type: its configuration class's defaults with small sizes, weights that make every part matter."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

WINDOW = 6
_SIZES: dict[int, str] = {
    96: "vocab_size",
    64: "max_position_embeddings n_positions n_ctx max_seq_len original_max_position_embeddings",
    48: "intermediate_size ffn_dim decoder_ffn_dim encoder_ffn_dim n_inner ffn_hidden_size expert_ffn_hidden_size dff dim_ff "
    "feed_forward_size dense_intermediate_size prefix_dense_intermediate_size intermediate_size_mlp",
    32: "hidden_size d_model n_embd dim emb_dim embedding_size word_embed_proj_dim hidden_size_per_layer_input",
    16: "moe_intermediate_size shared_expert_intermediate_size shared_intermediate_size moe_shared_expert_intermediate_size q_lora_rank "
    "kv_lora_rank qk_nope_head_dim v_head_dim laurel_rank",
    8: "head_dim global_head_dim kv_channels d_head dim_head qk_rope_head_dim rotary_dim attention_head_size",
    4: "num_attention_heads n_head n_heads num_heads decoder_attention_heads encoder_attention_heads num_decoder_attention_heads "
    "num_encoder_attention_heads num_experts num_local_experts n_routed_experts moe_num_experts",
    2: "num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers num_decoder_layers num_encoder_layers "
    "num_key_value_heads num_kv_heads num_global_key_value_heads num_experts_per_tok moe_topk moe_k top_k_experts eos_token_id",
    1: "n_group topk_group bos_token_id first_k_dense_replace num_dense_layers",
    0: "pad_token_id num_nextn_predict_layers num_kv_shared_layers",
}
_SETTINGS: dict[str, Any] = {name: size for size, names in _SIZES.items() for name in names.split()} | {
    "is_decoder": True,  # of encoders that can be decoders
    "logits_scaling": 3.0,
    "vocab_size_per_layer_input": 96,
}
_ATTENTION = {"full_attention", "sliding_attention"}


def small_config(model_type: str, window: bool = True) -> PreTrainedConfig:
    """One layer of each kind that the default configuration has, at least two; nothing is dropped at random. window: give it a sliding
    window of 6 tokens, where it can have one."""
    made = CONFIG_MAPPING[model_type]
    default = made()
    fields = {field.name for field in dataclasses.fields(made)}
    settings = {name: value for name, value in _SETTINGS.items() if name in fields}
    settings |= {
        name: 0.0
        for name in fields
        if any(part in name for part in ("drop", "jitter")) and isinstance(getattr(default, name, None), float)
    }
    if "kv_lora_rank" in fields:  # latent attention has a key head for each query head
        settings["num_key_value_heads"] = settings["num_attention_heads"]
    kinds = sorted(set(getattr(default, "layer_types", None) or ()))
    if "sliding_window" in fields:
        settings["sliding_window"] = WINDOW if window else None
        if set(kinds) <= _ATTENTION and kinds:
            kinds = ["sliding_attention", "full_attention"] if window else ["full_attention"] * 2
        if "use_sliding_window" in fields:
            settings["use_sliding_window"] = window
    if kinds and "layer_types" in fields:
        kinds = kinds * 2 if len(kinds) == 1 else kinds
        settings |= {"layer_types": kinds, "num_hidden_layers": len(kinds)}
    return made(**{**settings, **_OWN.get(model_type, {})})


def small_model(config: PreTrainedConfig) -> PreTrainedModel:
    """In float32 and evaluation mode. Weights are large enough that attention is far from uniform; norms, biases and scales are moved from
    where they start. The process's random numbers stay as they are."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager")
        for parameter in model.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.2)
            else:
                parameter.data.add_(torch.randn_like(parameter), alpha=0.3)
    return model.eval()


# What a model type needs besides; of those whose defaults no released model has, what these have.
_OWN: dict[str, dict[str, Any]] = {
    "bamba": {"mamba_n_heads": 8},
    "dbrx": {
        "attn_config": {"rope_theta": 1e4, "kv_n_heads": 2, "clip_qkv": 8},
        "ffn_config": {"hidden_size": 32, "ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "dots1": {"n_shared_experts": 1},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": WINDOW},
    "granitemoehybrid": {"mamba_n_heads": 8, "layer_types": ["mamba", "attention"]},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "llama4_text": {"attention_chunk_size": WINDOW, "attn_temperature_tuning": False},
    "mamba2": {"num_heads": 8},
    "zamba": {"num_hidden_layers": 6},
    "zamba2": {"layers_block_type": ["mamba", "hybrid"]},
}
