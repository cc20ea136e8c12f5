"""Invariant 1 for every model family that is trained, through transformers' own model code; the families that are refused; and the
comb under activation checkpointing, FSDP2 and torch.compile."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Iterator, Sequence

import numpy as np
import pytest
import torch
import torch.distributed as dist
import transformers
from naive.agreement import TOLERANCE, assert_equal_to_rows, assert_same_gradients, by_action, losses
from naive.rows import separate_rows
from support.model_families import COMMON, FAMILIES, RARE, SINGLE_PRECISION, build, trees
from support.random_trees import random_trunks
from torch import nn
from torch._dynamo.utils import counters
from torch.distributed.tensor import DTensor
from transformers import PreTrainedConfig, PreTrainedModel

from swirl_fast.comb.tree import SampledState, Trunk, pack
from swirl_fast.config import ConfigError
from swirl_fast.models import policy as policy_module
from swirl_fast.models.exact import refuse_inexact
from swirl_fast.models.policy import DeviceComb, Policy, model_size
from swirl_fast.ranks import Ranks
from swirl_fast.training.fsdp import decoder_layers, shard
from swirl_kernels.tree_attention import TreePlan, tree_plan


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("family", [*FAMILIES, *RARE])
def test_comb_equals_separate_rows(family: str, dtype: torch.dtype) -> None:
    """In float32 the rows go through the family's own attention and masks; in float64 through a dense one that does not round."""
    naive = build(family, dtype)
    policy = Policy(copy.deepcopy(naive), temperature=0.8)
    naive.set_attn_implementation("naive" if dtype == torch.float64 else "eager")
    for branches in trees():
        assert_equal_to_rows(naive, policy, branches, TOLERANCE[dtype])


@pytest.mark.parametrize("family", SINGLE_PRECISION)
def test_comb_equals_separate_rows_in_single_precision(family: str) -> None:
    """Families that round to float32 inside."""
    naive = build(family, torch.float32)
    policy = Policy(copy.deepcopy(naive), temperature=0.8)
    naive.set_attn_implementation("eager")
    for branches in trees():
        assert_equal_to_rows(naive, policy, branches, 1e-5)


@pytest.mark.parametrize("family", ["qwen2", "mistral", "gemma2", "gemma3"])
def test_windows_matter_here(family: str) -> None:
    """Without its window the model computes something else, so that the test above sees whether the comb has it."""
    model = build(family, torch.float32).eval()
    wide = copy.deepcopy(model)
    for module in [wide, *wide.modules()]:
        if hasattr(module, "sliding_window"):
            module.sliding_window = None
        if hasattr(module, "config"):
            module.config.sliding_window = None
    for one in (model, wide):
        one.set_attn_implementation("naive")
    found, wanted = (separate_rows(one, trees()[0]) for one in (wide, model))
    assert max(float((found[index] - wanted[index]).detach().abs().max()) for index in wanted) > 0.01


def test_model_size_of_windows_and_experts() -> None:
    assert model_size(build("gemma3", torch.float32)).attention == ((32, 6), (32, 6), (32, None))
    assert model_size(build("mistral", torch.float32)).attention == ((32, 6), (32, 6))
    assert model_size(build("qwen2", torch.float32)).attention == ((32, None), (32, 6))
    assert model_size(build("deepseek_v3", torch.float32)).attention == ((4 * (16 + 6) // 2, None),) * 2
    settings = {**COMMON, "num_local_experts": 4, "num_experts_per_tok": 2}
    mixtral = transformers.MixtralForCausalLM(transformers.MixtralConfig(**settings))
    attention = 2 * 32 * 32 + 2 * 32 * 16
    assert model_size(mixtral).linear == 2 * (attention + 32 * 4 + 2 * 3 * 32 * 48)


# ---- what is refused


def config(name: str, **settings: object) -> PreTrainedConfig:
    return getattr(transformers, f"{name}Config")(**settings)


PHI3_LONG = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0] * 48,
    "long_factor": [2.0] * 48,
    "original_max_position_embeddings": 4096,
}
REFUSED: dict[str, tuple[str, dict[str, object], str]] = {
    "linear attention": ("Qwen3Next", {}, "qwen3_next.*linear_attention"),
    "linear attention (MiniMax)": ("MiniMax", {}, "minimax.*linear_attention"),
    "gated delta net": ("Qwen3_5Text", {}, "qwen3_5_text.*linear_attention"),
    "state space": ("Mamba2", {}, "mamba2.*kind mamba"),
    "state space and attention": ("Jamba", {}, "jamba.*kind mamba"),
    "state space (Bamba)": ("Bamba", {}, "bamba.*kind mamba"),
    "state space in parallel": ("FalconH1", {}, "falcon_h1.*kind hybrid"),
    "recurrent": ("RecurrentGemma", {}, "recurrent_gemma.*kind recurrent"),
    "recurrent (RWKV)": ("Rwkv", {}, "rwkv.*state from token to token"),
    "recurrent (xLSTM)": ("xLSTM", {}, "xlstm.*state from token to token"),
    "convolution": ("Lfm2", {"layer_types": ["conv", "full_attention"], "num_hidden_layers": 2}, "lfm2.*kind conv"),
    "scales by the place in the row": ("Llama4Text", {}, "llama4_text.*attn_temperature_tuning=true.*floor_scale=8192"),
    "sparse attention": ("DeepseekV32", {}, "deepseek_v32.*deepseek_sparse_attention"),
    "attention dropout": ("Llama", {"attention_dropout": 0.1}, "llama.*attention_dropout=0.1.*set it to 0"),
    "residual dropout": ("GPT2", {}, "gpt2.*_pdrop=0.1"),
    "router noise": ("Phimoe", {}, "phimoe.*router_jitter_noise=0.01"),
    "auxiliary loss of experts": ("Mixtral", {"output_router_logits": True}, "mixtral.*auxiliary loss"),
    "auxiliary loss of experts (Qwen)": ("Qwen3Moe", {"output_router_logits": True}, "qwen3_moe.*auxiliary loss"),
    "heads for several tokens": (
        "Glm4Moe",
        {"num_nextn_predict_layers": 1},
        "glm4_moe.*num_nextn_predict_layers=1",
    ),
    "prefix mask of images": ("Gemma3", {}, "gemma3.*more than text"),
    "images (Qwen)": ("Qwen2_5_VL", {}, "qwen2_5_vl.*more than text"),
    "both directions": ("Gemma3Text", {"use_bidirectional_attention": True}, "gemma3_text.*not causal"),
    "encoder and decoder": ("T5Gemma", {}, "t5gemma.*encoder"),
    "alibi": ("Bloom", {"hidden_dropout": 0.0, "attention_dropout": 0.0}, "bloom.*no way to replace its attention"),
    "attention of two halves": ("DiffLlama", {}, "diffllama.*no way to replace its attention"),
    "rotary factors by length": (
        "Phi3",
        {"rope_parameters": PHI3_LONG, "max_position_embeddings": 131072},
        "phi3.*longrope.*position 4096",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_inexact_architectures_are_refused_by_name(what: str) -> None:
    name, settings, message = REFUSED[what]
    with pytest.raises(ConfigError, match=f"model type {message}"):
        refuse_inexact(config(name, **settings))


@pytest.mark.parametrize(
    "name",
    [
        "Llama",
        "Qwen2",
        "Qwen3",
        "Mistral",
        "Gemma2",
        "Gemma3Text",
        "Mixtral",
        "Qwen3Moe",
        "Phi3",
        "Olmo2",
        "SmolLM3",
        "GptOss",
        "DeepseekV2",
        "DeepseekV3",
    ],
)
def test_exact_architectures_are_not_refused(name: str) -> None:
    refuse_inexact(config(name))


def test_what_only_the_model_shows_is_refused() -> None:
    model = build("llama", torch.float32)
    model.model.layers[0].mlp.drop = nn.Dropout(0.1)
    with pytest.raises(ConfigError, match="llama.*layers.0.mlp.drop drops"):
        Policy(model)
    model = build("llama", torch.float32)
    model.model.layers[1].self_attn.is_causal = False
    with pytest.raises(ConfigError, match="layers.1.self_attn is not causal"):
        Policy(model)
    model = build("llama", torch.float32)
    model.medusa = nn.Linear(32, 97)
    with pytest.raises(ConfigError, match="medusa.weight.*beside"):
        Policy(model)
    kinds = {"layer_types": ["full_attention", "sliding_attention"], "bos_token_id": 1, "eos_token_id": 2}
    settings = {key: value for key, value in COMMON.items() if key != "head_dim"} | kinds
    head = transformers.ModernBertDecoderForCausalLM(transformers.ModernBertDecoderConfig(**settings))
    with pytest.raises(ConfigError, match="modernbert-decoder.*lm_head.dense.weight"):
        Policy(head)


def test_what_only_the_forward_shows_is_refused() -> None:
    """A mask, or an argument of the attention that is not known here, raises instead of being dropped."""
    row = DeviceComb.of(pack(trees()[0]))
    policy = Policy(build("llama", torch.float32))
    attention = policy.model.model.layers[0].self_attn
    original = attention.forward
    for extra in ({"head_mask": torch.zeros(4)}, {"attention_mask": torch.zeros(1)}, {"is_causal": False}):
        attention.forward = lambda *a, extra=extra, **k: original(*a, **{**k, **extra})
        with pytest.raises(ConfigError, match=next(iter(extra))):
            policy(row)


def test_a_path_that_changes_the_rotary_embedding_of_all_others_is_refused() -> None:
    """Dynamic NTK: one path of 33 tokens, and a tooth at its start would be turned as if it were as long."""
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    torch.manual_seed(0)
    settings = {**COMMON, "max_position_embeddings": 32, "rope_parameters": rope}
    naive = transformers.LlamaForCausalLM(transformers.LlamaConfig(**settings)).eval()
    policy = Policy(copy.deepcopy(naive))
    naive.set_attn_implementation("naive")
    trunk = np.arange(1, 32, dtype=np.int32)

    def branches(length: int) -> list[Trunk]:
        """The longest path has `length` tokens in front of the last, which is predicted and not computed."""
        teeth = (
            SampledState(3, (trunk[4:9],), (0,)),
            SampledState(30, (np.arange(1, length - 28, dtype=np.int32),), (1,)),
        )
        return [Trunk(trunk, teeth)]

    assert_equal_to_rows(naive, policy, branches(31), 1e-5)
    assert torch.isfinite(policy(DeviceComb.of(pack(branches(32))))).all()
    with pytest.raises(ValueError, match="llama: the longest path has 33 tokens.*max_path_tokens to at most 32"):
        policy(DeviceComb.of(pack(branches(33))))
    assert Policy(build("llama", torch.float32)).longest_path is None


# ---- other ways to run the same model


def step(policy: Policy, branches: list[Trunk]) -> tuple[float, nn.Module]:
    """The loss, and a module that holds whole gradients."""
    policy.zero_grad()
    comb = pack(branches)
    loss = losses(by_action(comb, policy(DeviceComb.of(comb))))
    loss.backward()
    holder = nn.Module()
    for i, (_, gradient) in enumerate(full_gradients(policy)):
        whole = nn.Parameter(torch.zeros_like(gradient))
        whole.grad = gradient
        holder.register_parameter(str(i), whole)
    return float(loss.detach()), holder


def full_gradients(policy: Policy) -> Iterator[tuple[str, torch.Tensor]]:
    for name, parameter in policy.named_parameters():
        gradient = parameter.grad
        assert gradient is not None, name
        yield name, (gradient.full_tensor() if isinstance(gradient, DTensor) else gradient).clone()


def assert_same_steps(policy: Policy, family: str, of: Sequence[list[Trunk]] = ()) -> None:
    """Every comb of `of` (or both trees), as a plain policy of the same weights computes it."""
    plain = Policy(build(family, torch.float32))
    for branches in of or trees():
        wanted, of_plain = step(plain, branches)
        found, gradients = step(policy, branches)
        assert found == pytest.approx(wanted, rel=1e-5)
        assert_same_gradients(of_plain, gradients, 1e-5)


def checkpointed(model: PreTrainedModel) -> PreTrainedModel:
    model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.train()  # transformers checkpoints in training mode only


@pytest.mark.parametrize("family", FAMILIES)
def test_activation_checkpointing_changes_nothing(family: str) -> None:
    assert_same_steps(Policy(checkpointed(build(family, torch.float32))), family)


@pytest.fixture
def one_rank() -> Iterator[Ranks]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield Ranks(0, 1, torch.device("cpu"))
    dist.destroy_process_group()


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt_oss"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointed"])
def test_fsdp2_changes_nothing(family: str, checkpointing: bool, one_rank: Ranks) -> None:
    model = build(family, torch.float32)
    policy = shard(Policy(checkpointed(model) if checkpointing else model), one_rank)
    assert all(isinstance(parameter, DTensor) for parameter in policy.parameters())
    assert_same_steps(policy, family)


def test_a_packing_is_planned_once_for_all_layers(one_rank: Ranks, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once for each of two windows, also where FSDP rebuilds what it hands to a layer and layers run again in the backward."""
    windows = []

    def counting(*arguments: object, window: int | None, **named: object) -> TreePlan:
        windows.append(window)
        return tree_plan(*arguments, window=window, **named)

    monkeypatch.setattr(policy_module, "tree_plan", counting)
    step(shard(Policy(checkpointed(build("gemma3", torch.float32))), one_rank), trees()[0])
    assert sorted(windows, key=str) == [1, 6, None], "1: the check of the comb on the CPU"


@pytest.mark.parametrize("family", [*FAMILIES, "gpt_oss"])
def test_plans_made_with_the_row_are_those_that_the_layers_ask_for(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = Policy(build(family, torch.float32))
    row = DeviceComb.of(pack(trees()[0]), windows=[window for _, window in model_size(policy.model).attention])
    monkeypatch.setattr(policy_module, "tree_plan", None)
    policy(row).sum().backward()


def test_model_size_of_a_sharded_model(one_rank: Ranks) -> None:
    plain = model_size(build("gemma3", torch.float32))
    assert model_size(shard(Policy(build("gemma3", torch.float32)), one_rank).model) == plain


def test_compiled_layers_change_nothing() -> None:
    """Graphs break nowhere, and combs of ever new lengths need no new graphs."""
    torch._dynamo.reset()
    counters.clear()
    policy = Policy(build("gemma3", torch.float32))
    for layer in decoder_layers(policy):
        layer.compile(backend="aot_eager")
    assert_same_steps(policy, "gemma3")
    assert not counters["graph_break"]
    graphs = counters["stats"]["unique_graphs"]
    assert_same_steps(policy, "gemma3", [random_trunks(seed) for seed in (1, 2, 3)])
    assert counters["stats"]["unique_graphs"] == graphs


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor compiles C++")
def test_layers_compiled_by_inductor_change_nothing() -> None:
    torch._dynamo.reset()
    policy = Policy(build("llama", torch.float32))
    for layer in decoder_layers(policy):
        layer.compile()
    assert_same_steps(policy, "llama", trees()[:1])


def test_compiled_checkpointed_and_sharded_at_once(one_rank: Ranks) -> None:
    torch._dynamo.reset()
    policy = Policy(checkpointed(build("llama", torch.float32)))
    for layer in decoder_layers(policy):
        layer.compile(backend="aot_eager")
    assert_same_steps(shard(policy, one_rank), "llama")
