"""Models whose prefixes cannot be shared, over separate rows: against one row at a time, and what is said of those that still cannot."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from naive.agreement import assert_equal_to_rows
from support.model_families import COMMON, UNSHARED, build, build_unshared, trees

from swirl_fast.comb.rows import pack_rows
from swirl_fast.config import ConfigError, load
from swirl_fast.models.check import compare
from swirl_fast.models.exact import context_of, refuse_inexact
from swirl_fast.models.policy import Policy, model_size
from swirl_fast.models.rows import RowsPolicy, open_policy, packs_rows
from swirl_fast.training.layers import check_layers
from swirl_fast.training.memory import estimate


@pytest.mark.parametrize("family", UNSHARED)
def test_padded_rows_equal_one_row_at_a_time(family: str) -> None:
    """Log-probs, loss and every gradient, by the model's own attention; the logits' soft-cap too. Without the switch it is named."""
    naive = build_unshared(family)
    with pytest.raises(ConfigError, match="training.sharing=false"):
        Policy(copy.deepcopy(naive))
    policy = open_policy(copy.deepcopy(naive), 0.8, sharing=False)
    assert isinstance(policy, RowsPolicy)
    branches = trees()[0]
    assert_equal_to_rows(naive, policy, branches, 1e-4, pack_rows(branches, padded=True))
    policy.zero_grad()
    agreement = compare(policy)
    assert agreement.logprob_gap < 1e-5 and agreement.gradient_gap < 1e-4
    assert all(parameter.grad is None for parameter in policy.parameters())


@pytest.mark.parametrize(
    "settings", [{"layer_types": ["sliding_attention", "full_attention"]}, {}], ids=["window", "full"]
)
def test_rows_are_packed_where_attention_is_told_its_windows(settings: dict[str, object]) -> None:
    """LFM2 keeps a window in the mask; a Llama and a Mistral hide nothing."""
    window = {"sliding_window": 6, "layer_types": ["full_attention"] * 2, **settings}
    assert packs_rows(transformers.Lfm2Config(**{**COMMON, **window})) == (not settings)
    for family in ("llama", "mistral", "gemma2"):
        policy = open_policy(build(family, torch.float32), 1.0, sharing=False)
        assert type(policy) is Policy and not policy.padded


def test_windows_in_a_mask_are_right_over_padded_rows() -> None:
    torch.manual_seed(0)
    kinds = {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]}
    naive = transformers.Lfm2ForCausalLM(transformers.Lfm2Config(**{**COMMON, **kinds})).eval()
    policy = open_policy(copy.deepcopy(naive), 1.0, sharing=False)
    assert policy.padded
    assert_equal_to_rows(naive, policy, trees()[0], 1e-5, pack_rows(trees()[0], padded=True))


def test_what_is_refused_with_and_without_sharing() -> None:
    t5, dropping = transformers.T5GemmaConfig(), transformers.LlamaConfig(attention_dropout=0.1)
    both_ways = transformers.Gemma3TextConfig(use_bidirectional_attention=True)
    for config, message in ((t5, "encoder"), (dropping, "attention_dropout=0.1.*random"), (both_ways, "not causal")):
        with pytest.raises(ConfigError, match=message):
            refuse_inexact(config, sharing=False)
    hybrid = transformers.Qwen3_5Config()  # of the whole model, images too: transformers loads its text model alone
    refuse_inexact(hybrid, sharing=False)
    with pytest.raises(ConfigError, match="qwen3_5_text.*linear_attention.*training.sharing=false"):
        refuse_inexact(hybrid)
    with pytest.raises(ConfigError, match="more than text"):
        refuse_inexact(transformers.Gemma3Config(), sharing=False)


def test_flash_attention_is_for_packed_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    from swirl_fast.training import layers

    monkeypatch.setattr(layers.importlib.util, "find_spec", lambda *_: object())
    config = load(None, ["training.sharing=false", "training.flash_attention=true", "model.dtype=bfloat16"])
    check_layers(config.training, build("llama", torch.float32).config, torch.device("cuda"))
    with pytest.raises(ConfigError, match="qwen3_5_text go through transformers' own attention"):
        check_layers(config.training, build_unshared("qwen3_5").config, torch.device("cuda"))


def test_work_and_memory_of_a_model_with_a_state() -> None:
    """Attention counts where there is any; the estimate says what it does not know, and of packed rows it is that of combs."""
    assert model_size(build_unshared("qwen3_5")).attention == ((32, None),)
    assert model_size(build_unshared("llama4")).attention == ((32, 6), (32, None))
    assert model_size(build_unshared("deepseek_v3")).attention == ((44, None), (44, None))
    mamba = transformers.FalconMambaForCausalLM(
        transformers.FalconMambaConfig(hidden_size=32, num_hidden_layers=1, vocab_size=97)
    )
    assert model_size(mamba).attention == () and context_of(mamba.config) > 10**9
    rows, combs = load(None, ["training.sharing=false"]), load(None, [])
    for family in UNSHARED:
        found = estimate(build_unshared(family).config, rows)
        assert "activations" not in found.step and "activations, which are not known for model type" in str(found)
        assert found.kept["optimizer"] == 8 * sum(p.numel() for p in build_unshared(family).parameters())
    llama = build("llama", torch.float32).config
    assert estimate(llama, rows) == estimate(llama, combs)
