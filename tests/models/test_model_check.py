"""What is never silently wrong: windows that a layer's attention is not told, scales of logits, and the check of a model at the start."""

from __future__ import annotations

import copy
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers
from support.model_families import COMMON, build
from transformers import PreTrainedModel
from transformers.masking_utils import create_sliding_window_causal_mask
from transformers.models.llama import modeling_llama

from swirl_fast.comb.tree import SampledState, Trunk, pack
from swirl_fast.config import ConfigError
from swirl_fast.config.schema import LoraConfig
from swirl_fast.engines.engine import Request, Sampling
from swirl_fast.engines.local.engine import LocalEngine
from swirl_fast.models.check import LIMITS, Agreement, compare, refuse_disagreement, refuse_untold_windows, small_tree
from swirl_fast.models.exact import refuse_inexact
from swirl_fast.models.lora import add_adapters, keep_frozen_in
from swirl_fast.models.policy import ATTENTION, DeviceComb, Policy

SMALL = {key: value for key, value in COMMON.items() if key != "head_dim"} | {"pad_token_id": 0, "eos_token_id": 2}
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
SLIDING = {"layer_types": ["sliding_attention"] * 2, "sliding_window": 6}
PHIMOE = {"router_jitter_noise": 0.0, "input_jitter_noise": 0.0, "num_local_experts": 4}


def model(name: str, **settings: object) -> PreTrainedModel:
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**{**SMALL, **settings})
    return getattr(transformers, f"{name}ForCausalLM")(config).eval()


# ---- windows


LOST = {
    "in the mask only": (
        "Qwen2Moe",
        {**EXPERTS, **SLIDING, "use_sliding_window": True},
        "layer 0 has a sliding window of 6",
    ),
    "in the mask only (Phi)": ("Phimoe", {**PHIMOE, "sliding_window": 6}, "layer 0 has a sliding window of 6"),
    "a convolution instead": (
        "Lfm2",
        {"layer_types": ["sliding_attention"] * 2},
        "layer 0, of kind sliding_attention, calls no attention",
    ),
    "a convolution instead (experts)": (
        "Lfm2Moe",
        {**EXPERTS, **SLIDING, "layer_types": ["full_attention", "sliding_attention"], "num_dense_layers": 1},
        "layer 1, of kind sliding_attention, calls no attention",
    ),
}


@pytest.mark.parametrize("what", LOST)
def test_a_window_that_attention_is_not_told_is_refused(what: str) -> None:
    name, settings, message = LOST[what]
    if name.startswith("Lfm2"):  # its own generate fails
        with pytest.raises(ValueError, match="LocalEngine cannot run.*SGLang"):
            LocalEngine(model(name, **settings), max_sequences=2, cache_tokens=64)
    else:
        engine = LocalEngine(model(name, **settings), max_sequences=2, cache_tokens=64)
        assert re.search(message, engine.uncached or ""), "decoded by its own generate"
    policy = Policy(model(name, **settings))
    for call in (lambda: policy(DeviceComb.of(pack([small_tree(policy)]))), lambda: refuse_untold_windows(policy)):
        with pytest.raises(ConfigError, match=f"model type .*{message}.*training.sharing=false"):
            call()


def test_what_only_the_check_sees_is_refused() -> None:
    """MiniMax gives a mask to layers of full attention alone; those of another kind see what follows them."""
    kinds = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 6}
    with pytest.raises(ConfigError, match="model type minimax.*nats a token"):
        refuse_disagreement(compare(Policy(model("MiniMax", **EXPERTS, **kinds))), "minimax", torch.float32)


def test_a_window_beyond_every_path_is_accepted() -> None:
    """The small tree has paths of 16 tokens, as a training would whose longest path fits into the window."""
    policy = Policy(model("Phimoe", **PHIMOE, sliding_window=1000))
    assert compare(policy).logprob_gap < 1e-5
    assert compare(policy, longest_path=1000).logprob_gap < 1e-5
    refuse_untold_windows(policy, longest_path=1000)
    with pytest.raises(
        ConfigError, match="window of 1000 tokens.*may have 1001 tokens.*sharing=false .*max_path_tokens"
    ):
        compare(policy, longest_path=1001)
    with pytest.raises(ConfigError, match="window of 1000 tokens.*may have 1001 tokens"):
        refuse_untold_windows(policy, longest_path=1001)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("MiniMax", {**EXPERTS, "layer_types": ["full_attention"] * 2, "sliding_window": 6}),
        ("MiniMax", {**EXPERTS, "layer_types": ["full_attention"] * 2}),
        ("Qwen2Moe", EXPERTS),
    ],
)
def test_exact_models_with_and_without_windows_are_accepted(name: str, settings: dict[str, object]) -> None:
    agreement = compare(Policy(model(name, **settings)))
    assert agreement.logprob_gap < 1e-5 and agreement.parameter_gap < 1e-4, agreement


# ---- scales of logits

SCALED = {
    "Granite": {"logits_scaling": 3.0},
    "GraniteMoe": {"logits_scaling": 3.0, "num_local_experts": 4},
    "GraniteMoeShared": {"logits_scaling": 3.0, "num_local_experts": 4, "shared_intermediate_size": 16},
    "Cohere": {"logit_scale": 0.3},
    "Cohere2": {"logit_scale": 0.3, **SLIDING},
    "HyperCLOVAX": {"logits_scaling": 0.3},
    "GraniteMoeHybrid": {  # Granite 4 without a hybrid's layers
        "logits_scaling": 3.0,
        "layer_types": ["attention"] * 2,
        "num_local_experts": 0,
        "shared_intermediate_size": 16,
        "mamba_n_heads": 8,
    },
}


@pytest.mark.parametrize("name", SCALED)
def test_scales_of_logits(name: str) -> None:
    policy = Policy(model(name, **SCALED[name]), temperature=0.8)
    agreement = compare(policy)
    assert agreement.logprob_gap < 1e-5 and agreement.parameter_gap < 1e-4, agreement
    policy.logit_scale = 1.0
    assert compare(policy).logprob_gap > 0.01


@pytest.mark.parametrize("name", ["Granite", "Cohere", "GraniteMoeHybrid"])
def test_the_embedded_engine_scales_logits(name: str) -> None:
    """What it samples has the log-probs that the policy gives it."""
    settings = SCALED[name]
    engine = LocalEngine(model(name, **settings), max_sequences=2, cache_tokens=64)
    prompt = np.arange(1, 6, dtype=np.int32)
    completions = engine.generate([Request(prompt, Sampling(max_new_tokens=4, temperature=0.8), n=2)])[0]
    actions = tuple(np.asarray(completion.tokens, np.int32) for completion in completions)
    found = Policy(model(name, **settings), 0.8)(
        DeviceComb.of(pack([Trunk(prompt, (SampledState(5, actions, (0, 1)),))]))
    )
    torch.testing.assert_close(
        found, torch.tensor([logp for c in completions for logp in c.logprobs]), atol=1e-5, rtol=0
    )


def test_an_unknown_scale_of_logits_is_refused() -> None:
    llama = build("llama", torch.float32)
    llama.config.logit_scale = 0.5
    with pytest.raises(ConfigError, match="llama: logit_scale=0.5"):
        Policy(llama)


def test_dropout_of_heads_that_are_not_used_is_accepted() -> None:
    rates = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    refuse_inexact(transformers.GPT2Config(**rates))
    with pytest.raises(ConfigError, match="gpt2.*attn_pdrop=0.1"):
        refuse_inexact(transformers.GPT2Config(**rates | {"attn_pdrop": 0.1}))


# ---- the check itself


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3"])
def test_an_exact_model_passes_and_is_left_as_it_was(family: str) -> None:
    policy = Policy(build(family, torch.float32), temperature=0.7)
    torch.manual_seed(3)
    before, weights = torch.get_rng_state(), [p.detach().clone() for p in policy.parameters()]
    agreement = compare(policy)
    assert agreement.logprob_gap < 1e-5 and agreement.gradient_gap < 1e-4, agreement
    assert torch.equal(torch.get_rng_state(), before)
    assert all(p.grad is None for p in policy.parameters())
    assert all(torch.equal(p, w) for p, w in zip(policy.parameters(), weights, strict=True))
    assert policy.model.config._attn_implementation == ATTENTION


def test_a_family_that_drops_its_window_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """One whose configuration has no word for its window, which is in its mask only: what is computed shows it."""
    policy = Policy(build("llama", torch.float32))

    def windowed(config: transformers.PreTrainedConfig, **arguments: object) -> object:
        config = copy.copy(config)
        config.sliding_window = 6
        return create_sliding_window_causal_mask(config, **arguments)

    monkeypatch.setattr(modeling_llama, "create_causal_mask", windowed)
    with pytest.raises(ConfigError, match="model type llama.*nats a token.*sharing=false.*check_model=false"):
        refuse_disagreement(compare(policy), "llama", torch.bfloat16)


def test_a_gradient_that_is_lost_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """Although every log-prob is right."""
    policy = Policy(build("llama", torch.float32))
    forward = policy.forward
    monkeypatch.setattr(policy, "forward", lambda packed: forward(packed).detach() + 0 * forward(packed))
    agreement = compare(policy)
    assert agreement.logprob_gap < 1e-5
    with pytest.raises(ConfigError, match="its gradient by .* of its norm"):
        refuse_disagreement(agreement, "llama", torch.float32)


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
def test_gaps_above_the_limits_are_refused(dtype: torch.dtype) -> None:
    logprob, gradient = LIMITS[dtype]
    fine = Agreement(logprob, gradient, 0.0, "")
    refuse_disagreement(fine, "llama", dtype)
    for worse in ({"logprob_gap": 2 * logprob}, {"gradient_gap": 2 * gradient}, {"logprob_gap": float("nan")}):
        with pytest.raises(ConfigError, match="llama"):
            refuse_disagreement(replace(fine, **worse), "llama", dtype)


@pytest.mark.parametrize("frozen", [torch.float32, torch.bfloat16], ids=str)
def test_adapters_are_checked_beside_weights_of_another_type(frozen: torch.dtype) -> None:
    """The frozen weights may be stored in the type in which autocast multiplies with them."""
    model = build("llama", torch.float32)
    add_adapters(model, LoraConfig(rank=4), seed=0)
    keep_frozen_in(frozen, model)
    agreement = compare(Policy(model, autocast=torch.bfloat16))
    refuse_disagreement(agreement, "llama", frozen)
    assert (agreement.logprob_gap < 1e-5) == (frozen == torch.float32) and agreement.gradient_gap > 0


def test_bfloat16_stays_within_its_limits() -> None:
    model = build("gemma3", torch.float32)
    assert compare(Policy(copy.deepcopy(model), autocast=torch.bfloat16)).logprob_gap < 1e-5, (
        "it is computed as it is stored"
    )
    agreement = compare(Policy(model.to(torch.bfloat16)))
    assert agreement.logprob_gap > 1e-4
    refuse_disagreement(agreement, "gemma3", torch.bfloat16)
