"""Adapters: exact over shared prefixes, off in the reference, merged into copies for the engine and the export, refused where they cannot
work."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
import transformers
from naive.agreement import TOLERANCE, assert_equal_to_rows, by_action, losses
from naive.rows import separate_rows
from peft import PeftModel
from support.model_families import COMMON, build, trees
from support.small_models import train_tokenizer
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from swirl_fast import cli
from swirl_fast.comb.tree import SampledState, Trunk, pack
from swirl_fast.config import ConfigError, LoraConfig, ModelConfig, load
from swirl_fast.engines.engine import Request, Sampling
from swirl_fast.engines.local.engine import LocalEngine
from swirl_fast.engines.sglang.weights import buckets, match_weights, shapes_of, tied_names
from swirl_fast.models.load import check_weights_folder, load_config, load_model, resolve
from swirl_fast.models.lora import (
    Merged,
    WithoutAdapters,
    adapted_layers,
    adapter_config,
    add_adapters,
    check_lora,
    linear_layers,
    named_weights,
)
from swirl_fast.models.policy import DeviceComb, Policy, model_size
from swirl_fast.ranks import Ranks
from swirl_fast.training.build import make_policy
from swirl_fast.training.export import export, export_adapter
from swirl_fast.training.weight_sync import sync

ONE = Ranks(0, 1, torch.device("cpu"))
LORA = LoraConfig(rank=3, alpha=6.0)


def adapted(family: str, dtype: torch.dtype, lora: LoraConfig = LORA) -> PreTrainedModel:
    """As after some training: B is no longer 0."""
    model = build(family, dtype)
    add_adapters(model, lora, seed=1)
    moved(model)
    return model


def moved(model: PreTrainedModel) -> None:
    draw = torch.Generator().manual_seed(2)
    for layer in adapted_layers(model).values():
        b = layer.lora_B["default"].weight
        b.data.copy_(0.2 * torch.randn(b.shape, generator=draw))


def merged(model: PreTrainedModel) -> dict[str, Tensor]:
    return {name: w.whole() if isinstance(w, Merged) else w.clone() for name, w in named_weights(model)}


# ---- exactness


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_comb_equals_separate_rows(family: str) -> None:
    """Log-probs, and the gradients of A and B, with the same adapters on both sides."""
    naive = adapted(family, torch.float64)
    policy = Policy(copy.deepcopy(naive), temperature=0.8)
    naive.set_attn_implementation("naive")
    assert_equal_to_rows(naive, policy, trees()[0], TOLERANCE[torch.float64])
    assert {name.split(".")[-3] for name, p in policy.named_parameters() if p.grad is not None} == {"lora_A", "lora_B"}


def test_gradients_are_those_of_the_merged_weights() -> None:
    """Rows through the plain model with W + scale B A in it: dA = scale B' dW, dB = scale dW A'."""
    model = adapted("llama", torch.float64)
    plain = build("llama", torch.float64)
    weights = merged(model)
    assert weights.keys() == dict(plain.named_parameters()).keys()
    plain.load_state_dict(weights, strict=False)  # the output layer is tied
    plain.set_attn_implementation("naive")
    policy, branches = Policy(model), trees()[0]
    comb = pack(branches)
    losses(by_action(comb, policy(DeviceComb.of(comb)))).backward()
    losses(separate_rows(plain, branches)).backward()
    layers = adapted_layers(model)
    assert len(layers) == 7 * 2 and not any("lm_head" in name for name in layers)
    for name, layer in layers.items():
        a, b, change = layer.lora_A["default"].weight, layer.lora_B["default"].weight, plain.get_submodule(name).weight
        assert change.grad is not None and layer.scaling["default"] == 2.0
        torch.testing.assert_close(a.grad, 2 * b.T @ change.grad, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(b.grad, 2 * change.grad @ a.T, rtol=1e-9, atol=1e-12)


def test_the_start_is_the_plain_model_the_same_for_a_seed_and_another_for_another() -> None:
    comb = DeviceComb.of(pack(trees()[0]))
    plain = Policy(build("llama", torch.float32))(comb)
    values = []
    for seed in (1, 1, 2):
        torch.manual_seed(len(values))  # nothing depends on the process's own generator
        model = build("llama", torch.float32)
        add_adapters(model, LORA, seed)
        values.append(torch.cat([layer.lora_A["default"].weight.flatten() for layer in adapted_layers(model).values()]))
        assert torch.equal(Policy(model)(comb), plain)
    assert torch.equal(values[0], values[1]) and not torch.equal(values[0], values[2])
    bound = 32**-0.5  # most inputs have 32 numbers: uniform in ± 1 / sqrt(32)
    assert 0.9 * bound < values[0].abs().max() <= bound


def test_the_reference_is_the_policy_without_its_adapters_and_leaves_them_on() -> None:
    comb = DeviceComb.of(pack(trees()[0]))
    policy = Policy(adapted("llama", torch.float32))
    reference, before = WithoutAdapters(policy), policy(comb)
    with torch.no_grad():
        found = reference(comb)
    assert torch.equal(found, Policy(build("llama", torch.float32))(comb))
    after = policy(comb)
    assert torch.equal(after, before) and not torch.allclose(after, found, atol=1e-2)
    after.sum().backward()
    assert all((p.grad is not None) == ("lora_" in name) for name, p in policy.named_parameters())


def test_work_counts_no_gradient_of_frozen_weights() -> None:
    """4 operations a frozen weight, 6 a trained one, as ModelSize counts 6 each."""
    plain, own = model_size(build("llama", torch.float32)), model_size(adapted("llama", torch.float32))
    adapters = sum(p.numel() for p in adapted("llama", torch.float32).parameters() if p.requires_grad)
    assert own.linear == pytest.approx(plain.linear * 2 / 3 + adapters)
    assert own.output == round(plain.output * 2 / 3) and own.attention == plain.attention


# ---- the engine


def test_after_a_sync_the_engine_has_the_policys_log_probs_and_the_policy_its_weights() -> None:
    policy = Policy(adapted("llama", torch.float32))
    before = {name: p.clone() for name, p in policy.named_parameters()}
    engine = LocalEngine(build("llama", torch.float32), max_sequences=8, cache_tokens=512)
    trunk = torch.arange(3, 15, dtype=torch.int32).numpy()
    request = Request(trunk, Sampling(12), n=4)
    gaps = []
    for version in range(3):
        if version:
            sync(policy, engine, version, ONE)
        (completions,) = engine.generate([request])
        assert {one.policy_version for one in completions} == {version}
        comb = pack(
            [Trunk(trunk, (SampledState(len(trunk), tuple(one.tokens for one in completions), tuple(range(4))),))]
        )
        found = by_action(comb, policy(DeviceComb.of(comb)).detach())
        gaps.append(max((found[i] - torch.tensor(one.logprobs)).abs().max() for i, one in enumerate(completions)))
    assert gaps[0] > 0.05 and max(gaps[1:]) < 1e-5
    assert all(torch.equal(p, before[name]) for name, p in policy.named_parameters())


def test_servers_get_a_bucket_at_a_time_by_the_names_of_the_models_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build("llama", torch.float32).save_pretrained(tmp_path)
    model = adapted("llama", torch.float32)
    made = []
    make = Merged.whole
    monkeypatch.setattr(Merged, "whole", lambda self: made.append(1) or make(self))
    tensors = match_weights(named_weights(model), shapes_of(tmp_path), tied_names(tmp_path))
    sent: dict[str, Tensor] = {}
    for bucket in buckets(tensors, 20_000, torch.bfloat16):
        assert len(made) <= len(sent) + len(bucket) + 1, "no more is made than what is sent next"
        sent |= dict(bucket)
    monkeypatch.undo()
    assert sent.keys() == shapes_of(tmp_path).keys()
    assert all(torch.equal(sent[name], tensor.to(torch.bfloat16)) for name, tensor in merged(model).items())


# ---- files


def written(folder: Path, family: str) -> tuple[Policy, Path, Path]:
    """A policy with adapters, the folder with its base model, and one to export to."""
    build(family, torch.float32).save_pretrained(folder / "base")
    return Policy(adapted(family, torch.float32)), folder / "base", folder / "out"


@pytest.mark.parametrize("family", ["llama", "qwen3", "mixtral"])
def test_the_merged_folder_and_the_adapters_on_the_base_model_are_the_policy(family: str, tmp_path: Path) -> None:
    if family == "mixtral":  # whose experts transformers converts, and no adapter is at
        torch.manual_seed(0)
        plain = transformers.MixtralForCausalLM(
            transformers.MixtralConfig(**COMMON, num_local_experts=2, num_experts_per_tok=1)
        ).eval()
        plain.save_pretrained(tmp_path / "base")
        model = copy.deepcopy(plain)
        add_adapters(model, LORA, seed=1)
        moved(model)
        policy, base, out = Policy(model), tmp_path / "base", tmp_path / "out"
    else:
        policy, base, out = written(tmp_path, family)
    tokenizer = train_tokenizer(["1 + 2"])
    export(out / "merged", policy, tokenizer, ONE)
    export_adapter(out / "adapter", policy, LORA, str(base), tokenizer, ONE)
    shape = json.loads((out / "adapter" / "adapter_config.json").read_text(encoding="utf-8"))
    assert (shape["r"], shape["lora_alpha"], shape["base_model_name_or_path"]) == (3, 6, str(base))
    assert all("." not in name for name in shape["target_modules"])
    whole = AutoModelForCausalLM.from_pretrained(out / "merged")
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), out / "adapter")
    expected = merged(policy.model)
    assert dict(whole.named_parameters()).keys() == expected.keys()
    for name, tensor in whole.named_parameters():
        assert torch.equal(tensor, expected[name]), name
    for name, tensor in loaded.merge_and_unload().named_parameters():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=1e-6)


def test_frozen_weights_are_kept_in_their_own_type_which_changes_no_number(tmp_path: Path) -> None:
    """Of a bfloat16 model the linear layers, which autocast casts anyway; what is exported is as before."""
    build("qwen3", torch.float32).to(torch.bfloat16).save_pretrained(tmp_path)
    config = load(None, [f"model.path={tmp_path}", "model.dtype=bfloat16", "model.lora.rank=3", "run.seed=4"])
    policy = make_policy(config, ONE)
    other = load_model(config.model, "float32")
    add_adapters(other, config.model.lora, seed=4)
    for model in (policy.model, other):
        moved(model)
    kept = {name: p.dtype for name, p in policy.model.named_parameters()}
    halves = {name for name, dtype in kept.items() if dtype == torch.bfloat16}
    assert halves == {name for name in kept if name.endswith("base_layer.weight")}
    comb = DeviceComb.of(pack(trees()[0]))
    logp, wanted = (one(comb) for one in (policy, Policy(other, autocast=torch.bfloat16)))
    assert torch.equal(logp, wanted)
    logp.sum().backward(), wanted.sum().backward()
    for (name, one), two in zip(policy.model.named_parameters(), other.parameters(), strict=True):
        assert one.grad is None is two.grad or torch.equal(one.grad, two.grad), name
    assert all(torch.equal(tensor, merged(other)[name]) for name, tensor in merged(policy.model).items())


def test_adapters_that_peft_would_read_as_those_of_experts_are_not_written(tmp_path: Path) -> None:
    """The layers of a dense MLP are called as those of the experts once were."""
    experts = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16}
    config = transformers.Qwen3MoeConfig(**COMMON, **experts, mlp_only_layers=[0])
    for lora in (LORA, LoraConfig(rank=2, targets=["up_proj"]), LoraConfig(rank=2, targets=["q_proj", "o_proj"])):
        model = transformers.Qwen3MoeForCausalLM(config)
        add_adapters(model, lora, seed=0)
        if lora.targets == ["q_proj", "o_proj"]:
            assert adapter_config(model, lora, "base").target_modules == {"q_proj", "o_proj"}
        else:
            with pytest.raises(ConfigError, match="--adapter: .* qwen3_moe peft takes .*up_proj.*use --merged"):
                export_adapter(tmp_path / "out", Policy(model), lora, "base", None, ONE)
    assert not list(tmp_path.iterdir())


# ---- what is refused


def test_targets(tmp_path: Path) -> None:
    some = adapted("llama", torch.float32, LoraConfig(rank=2, targets=["q_proj", "layers.1.mlp.up_proj"]))
    ends = ["layers.0.self_attn.q_proj", "layers.1.self_attn.q_proj", "layers.1.mlp.up_proj"]
    assert sorted(adapted_layers(some)) == sorted(f"model.{end}" for end in ends)
    there = "there are q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj"
    config = build("qwen3", torch.float32).config  # its output layer is not tied
    for wrong in ("query", "lm_head", "embed_tokens", "self_attn", "proj", ""):
        with pytest.raises(ConfigError, match=f"model.lora.targets=.*no linear layer {wrong} .*{there}$"):
            check_lora(ModelConfig(lora=LoraConfig(rank=2, targets=["q_proj", wrong])), config)


def test_layers_that_share_a_weight_have_no_adapter() -> None:
    model = build("llama", torch.float32)
    model.model.layers[1].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight
    assert len(linear_layers(model)) == 7 * 2 - 2


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.lora.rank=0"], "model.lora.rank=0: must be a whole number or null, at least 1"),
        (["model.lora.rank=x"], "model.lora.rank=x: must be a whole number or null, at least 1"),
        (["model.lora.alpha=8"], "model.lora.alpha=8.0: without model.lora.rank nothing has an adapter: set it"),
        (["model.lora.rank=4", "model.lora.dropout=0.1"], "model.lora.dropout=0.1: .* not be exact; use 0"),
        (["model.lora.rank=4", "model.lora.alpha=0"], "model.lora.alpha=0.0: must be above 0"),
        (["model.lora.rank=4", "training.reference_offload=true"], "training.reference_offload=True: with model.lora"),
    ],
)
def test_settings_that_cannot_work(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(None, overrides)
    assert load(None, ["model.lora.rank=null"]).model.lora == LoraConfig()


def test_quantised_weights_and_adapter_folders_are_refused_before_they_are_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = build("llama", torch.float32).config
    config.quantization_config = {"quant_method": "fp8"}
    with pytest.raises(
        ConfigError, match="model.lora.rank=2: the weights of model.path=m are quantised, .*before it was"
    ):
        check_lora(ModelConfig(path="m", lora=LoraConfig(rank=2)), config)
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "org/base"}', encoding="utf-8")
    message = r"holds adapters \(adapter_config.json\) of org/base, .*swirl-fast export --merged"
    with pytest.raises(ConfigError, match=f"model.path={tmp_path}: {message}"):
        resolve(str(tmp_path))
    with pytest.raises(ConfigError, match=f"--of {tmp_path}: {message}"):
        check_weights_folder(ModelConfig(), str(tmp_path))
    hub = tmp_path / "hub" / "models--org--adapter"
    (hub / "refs").mkdir(parents=True)
    (hub / "refs" / "main").write_text("abc", encoding="utf-8")
    (hub / "snapshots" / "abc").mkdir(parents=True)
    (tmp_path / "adapter_config.json").rename(hub / "snapshots" / "abc" / "adapter_config.json")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    with pytest.raises(ConfigError, match=f"model.path=org/adapter: {message}"):
        load_config(ModelConfig(path="org/adapter"))
    assert cli.main(["export", "--adapter", f"run.folder={tmp_path}"]) == 2
    assert "--adapter: without model.lora.rank all weights were trained" in capsys.readouterr().err
