"""One small model of each family, and trees for it."""

from __future__ import annotations

from types import MethodType

import numpy as np
import torch
import transformers
from support.small_models import SHAPE, _norm, _norm_gemma
from torch import nn
from transformers import PreTrainedModel

from swirl_fast.comb.tree import SampledState, Trunk

WINDOW = {"sliding_window": 6}


GEMMA_ROPES = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
    "full_attention": {"rope_type": "linear", "rope_theta": 1_000_000.0, "factor": 8.0},
}
COMMON = {**SHAPE, "initializer_range": 0.3}


FAMILIES: dict[str, tuple[str, dict[str, object]]] = {
    "llama": ("Llama", {}),
    "qwen2": ("Qwen2", {"use_sliding_window": True, "max_window_layers": 1, **WINDOW}),
    "qwen3": ("Qwen3", {}),
    "mistral": ("Mistral", WINDOW),
    "gemma2": (
        "Gemma2",
        {"attn_logit_softcapping": 5.0, "final_logit_softcapping": 4.0, "query_pre_attn_scalar": 8, **WINDOW},
    ),
    "gemma3": (
        "Gemma3",
        {
            "num_hidden_layers": 3,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
            "rope_parameters": GEMMA_ROPES,
            "final_logit_softcapping": 4.0,
            "query_pre_attn_scalar": 8,
            **WINDOW,
        },
    ),
}


_EXPERTS = {"num_local_experts": 2, "num_experts_per_tok": 1}
LATENT = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 12,
    "q_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "head_dim": 8,
    "v_head_dim": 6,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "n_group": 1,
    "topk_group": 1,
}
# Of attention of another shape.
RARE: dict[str, tuple[str, dict[str, object]]] = {
    "gpt_oss": (
        "GptOss",
        {"num_local_experts": 4, "num_experts_per_tok": 2, "initializer_range": 0.2, "attention_bias": False, **WINDOW},
    ),
    "deepseek_v3": ("DeepseekV3", {**LATENT, "first_k_dense_replace": 2}),
}
# They compute parts in float32 whatever the type of the weights.
SINGLE_PRECISION: dict[str, tuple[str, dict[str, object]]] = {
    "deepseek_v2": ("DeepseekV2", {**LATENT, "first_k_dense_replace": 1}),
    "deepseek_v3 experts": ("DeepseekV3", {**LATENT, "first_k_dense_replace": 1}),
    "glm4_moe_lite": ("Glm4MoeLite", {**LATENT, "mlp_layer_types": ["dense", "sparse"]}),
    "llama4": (
        "Llama4",
        {
            "num_hidden_layers": 3,
            "no_rope_layers": [1, 1, 0],
            "attention_chunk_size": 6,
            "attn_temperature_tuning": False,
            "moe_layers": [1],
            "num_local_experts": 4,
            "intermediate_size_mlp": 48,
        },
    ),
}


# whose prefixes cannot be shared, each for another reason
UNSHARED: dict[str, tuple[str, dict[str, object]]] = {
    "qwen3_5": (
        "Qwen3_5",
        {
            "layer_types": ["linear_attention", "full_attention"],
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
        },
    ),
    "lfm2": ("Lfm2", {"layer_types": ["conv", "full_attention"]}),
    "falcon_mamba": ("FalconMamba", {"state_size": 8}),
    "llama4": (
        "Llama4",
        {
            **_EXPERTS,
            "attention_chunk_size": 6,
            "intermediate_size_mlp": 32,
            "layer_types": ["chunked_attention", "full_attention"],
            "no_rope_layers": [1, 0],
        },
    ),
    "recurrent_gemma": (
        "RecurrentGemma",
        {
            "block_types": ["recurrent", "attention"],
            "attention_window_size": 6,
            "lru_width": 32,
            "logits_soft_cap": 4.0,
        },
    ),
}


def build_unshared(family: str, **more: object) -> PreTrainedModel:
    """In float32."""
    name, settings = (UNSHARED | RARE)[family]
    torch.manual_seed(0)
    text = "TextConfig" if name in ("Qwen3_5", "Llama4") else "Config"
    config = getattr(transformers, name + text)(**{**COMMON, **settings, **more})
    return getattr(transformers, f"{name}ForCausalLM")(config).eval()


def build(family: str, dtype: torch.dtype) -> PreTrainedModel:
    name, settings = (SINGLE_PRECISION | RARE | FAMILIES)[family]
    config_name = f"{name}TextConfig" if name in ("Gemma3", "Llama4") else f"{name}Config"
    torch.manual_seed(0)
    config = getattr(transformers, config_name)(**{**COMMON, **settings})
    model = getattr(transformers, f"{name}ForCausalLM")(config)
    for parameter in model.parameters():
        if parameter.dim() == 1:  # norms and biases that do something
            nn.init.normal_(parameter, 0.3 if "gemma" in family else 1.0, 0.3)
    if dtype == torch.float64:
        model.set_experts_implementation("eager")  # the grouped product takes no float64
        for module in model.modules():  # they round to float32 inside
            if type(module).__name__.endswith("RMSNorm"):
                module.forward = MethodType(_norm_gemma if "gemma" in family else _norm, module)
    return model.to(dtype).eval()


def trees() -> list[list[Trunk]]:
    """Two combs of different lengths, paths far longer than the windows: trajectories of one prompt, and teeth that begin alike."""
    out = []
    for seed, trajectories in enumerate([(3, 1), (2, 2, 1)]):
        draw = np.random.default_rng(seed)
        prompt, number, branches = draw.integers(1, SHAPE["vocab_size"], 6), 0, []
        for steps in trajectories:
            trunk = np.concatenate([prompt, draw.integers(1, SHAPE["vocab_size"], 9 * steps)]).astype(np.int32)
            states = []
            for i in range(steps):
                length = 6 + 9 * i
                teeth = [draw.integers(1, SHAPE["vocab_size"], n).astype(np.int32) for n in (4, 1, 7)]
                teeth += [np.concatenate([teeth[2][:5], teeth[0]]), trunk[length : length + 4], teeth[0]]
                states.append(SampledState(length, tuple(teeth), tuple(range(number, number + len(teeth)))))
                number += len(teeth)
            branches.append(Trunk(trunk, tuple(states)))
        out.append(branches)
    return out
