"""Small models in the local engine, and requests for them."""

from __future__ import annotations

import copy
import random

import torch
import transformers

from swirl_fast.engines.engine import Request, Sampling
from swirl_fast.engines.local.engine import LocalEngine

V = 97


SHAPE = dict(
    vocab_size=V, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, head_dim=8,
    num_key_value_heads=2, max_position_embeddings=256, initializer_range=0.3, pad_token_id=0, bos_token_id=1,
    eos_token_id=2,
)  # fmt: skip


MODELS = {
    "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPE)),
    "qwen3": lambda: transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**SHAPE)),
    "gemma2": lambda: transformers.Gemma2ForCausalLM(
        transformers.Gemma2Config(
            **SHAPE, sliding_window=7, query_pre_attn_scalar=8, attn_logit_softcapping=5.0, final_logit_softcapping=10.0
        )
    ),
    # one key/value head a query head, tied weights
    "mha": lambda: transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**{**SHAPE, "num_key_value_heads": 4}, tie_word_embeddings=True)
    ),
}
RARE = {
    # sinks, and windows in every second layer
    "gpt_oss": lambda: transformers.GptOssForCausalLM(
        transformers.GptOssConfig(**SHAPE, sliding_window=7, num_local_experts=4, num_experts_per_tok=2)
    ),
    # values of another width than keys
    "deepseek_v3": lambda: transformers.DeepseekV3ForCausalLM(
        transformers.DeepseekV3Config(
            **{**SHAPE, "num_key_value_heads": 4}, q_lora_rank=16, kv_lora_rank=12, qk_nope_head_dim=8, qk_rope_head_dim=8,
            v_head_dim=6, first_k_dense_replace=2,
        )
    ),
    # chunks in the first layer
    "llama4": lambda: transformers.Llama4ForCausalLM(
        transformers.Llama4TextConfig(
            **SHAPE, no_rope_layers=[1, 0], attention_chunk_size=7, attn_temperature_tuning=False, moe_layers=[]
        )
    ),
}  # fmt: skip


def make(kind: str = "llama", seed: int = 0) -> transformers.PreTrainedModel:
    torch.manual_seed(seed)
    model = (MODELS | RARE)[kind]().eval()
    model.set_attn_implementation("eager")  # "sdpa" leaves Gemma 2's soft-cap out
    return model


def engine_of(
    model: transformers.PreTrainedModel, max_sequences: int = 64, cache_tokens: int = 4096, prefix_cache: bool = True
) -> LocalEngine:
    return LocalEngine(
        copy.deepcopy(model), max_sequences=max_sequences, cache_tokens=cache_tokens, prefix_cache=prefix_cache
    )


def tokens(count: int, seed: int) -> list[int]:
    return [random.Random(seed).randrange(5, V) for _ in range(count)] if count == 1 else random.Random(seed).choices(
        range(5, V), k=count
    )  # fmt: skip


def mixed_requests(seed: int) -> list[Request]:
    """Nested states of one trajectory, siblings, one prompt twice, prompts that share nothing, one of a single token."""
    shot = tokens(30, 1)
    trunk = shot + tokens(70, 2)
    prompts = [trunk[:40], trunk[:41], trunk[:75], trunk, shot + tokens(9, 3), shot + tokens(4, 4), shot, shot]
    prompts += [tokens(60, 5), [6], tokens(2, 7)]
    choose = random.Random(seed)
    return [
        Request(
            prompt,
            Sampling(choose.randrange(1, 20), choose.choice([0.0, 0.7, 1.0]), choose.choice([1.0, 0.8]), choose.choice([0, 5])),
            n=choose.randrange(1, 4),
            stop_ids=(3, 11, 12),
            seed=i,
        )
        for i, prompt in enumerate(prompts)
    ]  # fmt: skip


def build() -> LocalEngine:
    return engine_of(make())
