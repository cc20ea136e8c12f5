"""Training is the same on any number of ranks, sharded in any way, with any micro-batches, checkpointed or compiled; weights are read and
written without any rank holding the whole model."""

from __future__ import annotations

import copy
import json
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support import small_models
from support.model_families import COMMON, FAMILIES, build, build_unshared, trees
from support.parallel_variants import train
from support.runs import free_port
from support.torchrun import CPU, Run, assert_same_run, read, torchrun
from transformers import AutoModelForCausalLM, PreTrainedModel

from swirl_fast import cli
from swirl_fast.comb.tree import SampledState, Trunk, pack
from swirl_fast.config import ConfigError, EngineConfig, ModelConfig, TrainingConfig
from swirl_fast.data.samples import sample_steps, samples_file
from swirl_fast.models.policy import DeviceComb, Policy
from swirl_fast.ranks import TIMEOUT, Ranks, start, stop
from swirl_fast.training import fsdp, layers
from swirl_fast.training.fsdp import decoder_layers
from swirl_fast.training.sharded_weights import Unsharded, empty_model, find_weights

ONE, TWO, FOUR = (
    ["plain", "unchecked", "accumulated", "full", "selective", "compiled", "rows", "lora"],
    [
        "plain",
        "accumulated",
        "accumulated_sharded",
        "offloaded",
        "resumed",
        "everything",
        "rows_accumulated_resumed",
        "lora_resumed",
        "turns_resumed",
    ],
    ["plain", "selective", "hsdp", "hsdp_accumulated", "hsdp_accumulated_sharded"],
)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A vocabulary of 97 and other sizes that do not divide evenly by two or four."""
    folder = tmp_path_factory.mktemp("llama")
    small_models.build("llama", torch.float32).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Every family as a folder: tied and untied, one file and several, float32 and bfloat16; experts, which transformers converts."""
    base = tmp_path_factory.mktemp("families")
    for name in FAMILIES:
        dtype = torch.bfloat16 if name in ("qwen3", "gemma2") else torch.float32
        model = build(name, torch.float32).to(dtype)
        model.generation_config.max_new_tokens = 5
        model.save_pretrained(base / name, max_shard_size="20KB" if name in ("qwen3", "gemma3") else "5GB")
    torch.manual_seed(0)
    experts = {**COMMON, "num_local_experts": 2, "num_experts_per_tok": 1}
    transformers.MixtralForCausalLM(transformers.MixtralConfig(**experts)).save_pretrained(base / "mixtral")
    return {folder.name: folder for folder in sorted(base.iterdir())}


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Layers with a state and layers with attention."""
    folder = tmp_path_factory.mktemp("hybrid")
    build_unshared("qwen3_5").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def two_ranks(
    llama: Path, hybrid: Path, families: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, str]:
    out = tmp_path_factory.mktemp("two")
    variants = [f"{llama}:{variant}" for variant in (*TWO, "bfloat16")] + [f"{hybrid}:padded_accumulated_resumed"]
    return out, torchrun(2, out, *variants, *(f"{folder}:load" for folder in families.values()))


@pytest.fixture(scope="module")
def runs(
    llama: Path, two_ranks: tuple[Path, str], tmp_path_factory: pytest.TempPathFactory
) -> dict[tuple[int, str], Run]:
    """By ranks and variant; those of one rank are one process without torchrun."""
    four = tmp_path_factory.mktemp("four")
    found = {(1, variant): train(llama, variant, Ranks(0, 1, CPU), four) for variant in ONE}
    found |= {(2, variant): read(two_ranks[0], variant) for variant in (*TWO, "bfloat16")}
    torchrun(4, four, *(f"{llama}:{variant}" for variant in FOUR))
    return found | {(4, variant): read(four, variant) for variant in FOUR}


EQUAL = [*((1, v) for v in ONE[1:]), *((2, v) for v in TWO), *((4, v) for v in FOUR)]


@pytest.mark.parametrize(("ranks", "variant"), EQUAL, ids=[f"{ranks} ranks {v}" for ranks, v in EQUAL])
def test_three_steps_are_the_same(ranks: int, variant: str, llama: Path, runs: dict[tuple[int, str], Run]) -> None:
    """Loss, gradient norm and parameters against one process that takes each batch whole."""
    lora = variant.startswith("lora")
    micro_batches = "accumulated" in variant or variant in ("everything", "lora_resumed")
    assert_same_run(runs[1, "lora" if lora else "plain"], runs[ranks, variant], llama, micro_batches, lora)


def test_padded_rows_are_the_same_on_two_ranks_and_resumed(
    hybrid: Path, two_ranks: tuple[Path, str], tmp_path: Path
) -> None:
    one, two = train(hybrid, "padded", Ranks(0, 1, CPU), tmp_path), read(two_ranks[0], "padded_accumulated_resumed")
    assert_same_run(one, two, hybrid, micro_batches=True, rel=3e-5)
    for seen, _ in (one, two):
        assert seen["checked"]["model_check_logprob"] < 1e-5


def test_ranks_wait_longer_than_a_servers_restart_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A request that hangs, and a restart of its server, by the settings' own defaults."""
    for name, value in (
        ("WORLD_SIZE", "1"),
        ("RANK", "0"),
        ("MASTER_ADDR", "127.0.0.1"),
        ("MASTER_PORT", str(free_port())),
    ):
        monkeypatch.setenv(name, value)
    start()
    try:
        backend = torch.distributed.group.WORLD._get_backend(CPU)
        waits, engine = backend.options._timeout.total_seconds(), EngineConfig()
        assert waits == TIMEOUT.total_seconds() > engine.timeout + engine.launch.startup_timeout
    finally:
        stop()


def test_gradients_are_reduced_once_an_update(runs: dict[tuple[int, str], Run]) -> None:
    """A reduction for each of two layers and the root, however many micro-batches; between replicas as often."""
    groups, numbers = 3, 2  # numbers: all_reduce of the gap to the engine, and of whether all is finite
    for ranks, variant in ((2, "plain"), (2, "accumulated"), (4, "hsdp"), (4, "hsdp_accumulated")):
        seen = runs[ranks, variant][0]
        assert seen["reduce_scatter"] == groups, variant
        assert seen["all_reduce"] == numbers + (groups if "hsdp" in variant else 0), variant
    for ranks, variant in ((2, "accumulated_sharded"), (4, "hsdp_accumulated_sharded")):
        seen = runs[ranks, variant][0]
        assert seen["reduce_scatter"] == groups * seen["micro_batches"], variant
        assert seen["all_reduce"] == numbers + (groups if "hsdp" in variant else 0), variant


def test_the_model_is_checked_at_the_start_and_nothing_is_changed_by_it(runs: dict[tuple[int, str], Run]) -> None:
    """However it is sharded, checkpointed or compiled; without the check every number is the same, bit for bit."""
    for (ranks, variant), (seen, _) in runs.items():
        if variant != "unchecked":
            limits = (0.1, 0.3) if variant == "bfloat16" else (1e-5, 1e-4)
            logprob, gradient = seen["checked"]["model_check_logprob"], seen["checked"]["model_check_gradient"]
            assert 0 < logprob < limits[0] and 0 < gradient < limits[1], (ranks, variant)
    (plain, parameters), (unchecked, same) = runs[1, "plain"], runs[1, "unchecked"]
    assert unchecked["checked"] == {} and unchecked["metrics"] == plain["metrics"]
    assert all(torch.equal(same[name], tensor) for name, tensor in parameters.items())


def test_a_copy_is_shared_by_neighbours(runs: dict[tuple[int, str], Run]) -> None:
    assert runs[4, "hsdp"][0]["mesh"] == [[0, 1], [2, 3]] and runs[4, "plain"][0]["mesh"] == [0, 1, 2, 3]


def test_bfloat16_computes_and_float32_learns(runs: dict[tuple[int, str], Run]) -> None:
    """Close to float32, and in the first step exactly the reference's log-probs, although that one is stored in bfloat16."""
    wanted, found = runs[1, "plain"][0]["metrics"], runs[2, "bfloat16"][0]["metrics"]
    assert found[0]["kl"] == 0
    assert found[0]["grad_norm"] != wanted[0]["grad_norm"]
    for one, other in zip(wanted, found, strict=True):
        assert other["grad_norm"] == pytest.approx(one["grad_norm"], rel=0.1)
    learned, close = runs[1, "plain"][1], runs[2, "bfloat16"][1]
    assert all(
        (learned[name] - close[name]).abs().max() < 6.1e-4 for name in learned
    )  # both have moved by 3e-4 at most
    assert any((tensor != tensor.bfloat16().float()).any() for tensor in close.values()), "stored in bfloat16"


def test_the_samples_of_two_ranks_are_those_of_one(llama: Path, two_ranks: tuple[Path, str], tmp_path: Path) -> None:
    """Byte for byte; both trainings stop after a step and go on."""
    train(llama, "resumed", Ranks(0, 1, CPU), tmp_path)
    one, two = tmp_path / "run", two_ranks[0] / "runs" / "resumed" / "run"
    assert sample_steps(one) == sample_steps(two) == [1, 2, 3]
    for step in sample_steps(one):
        assert samples_file(two, step).read_bytes() == samples_file(one, step).read_bytes()


# ---- reading and writing weights


def loaded(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@pytest.mark.parametrize("family", [*FAMILIES, "mixtral"])
def test_shards_hold_what_from_pretrained_loads(
    family: str, families: dict[str, Path], two_ranks: tuple[Path, str]
) -> None:
    """Every parameter and every buffer, bit for bit; and a rank reads only its own half of the rows."""
    out, printed = two_ranks
    reads, tensors = read(out, family)
    model = loaded(families[family])
    wanted = dict(model.named_parameters()) | {f"buffer {name}": buffer for name, buffer in model.named_buffers()}
    assert tensors.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(tensors[name], tensor), name
    if family == "mixtral":
        assert (
            reads == [{}, {}]
            and f"{families[family]}: transformers converts the weights of model type mixtral" in printed
        )
        return
    assert str(families[family]) not in printed, "loaded whole"
    for name, parameter in model.named_parameters():
        rows = parameter.shape[0]
        shares = [one[name] * rows // parameter.numel() for one in reads]
        assert shares == [(rows + 1) // 2, rows // 2], name
    assert all(one.keys() == dict(model.named_parameters()).keys() for one in reads)


@pytest.mark.parametrize("family", [*FAMILIES, "mixtral"])
def test_exported_folder_loads(family: str, families: dict[str, Path], two_ranks: tuple[Path, str]) -> None:
    folder = two_ranks[0] / family
    original, model = loaded(families[family]), loaded(folder)
    for (name, wanted), (other, found) in zip(original.named_parameters(), model.named_parameters(), strict=True):
        assert name == other and torch.equal(wanted, found), name
    assert json.loads((folder / "config.json").read_text(encoding="utf-8"))["architectures"] == [
        type(original).__name__
    ]
    assert (folder / "tokenizer.json").is_file() and not folder.with_name(f"{family}.tmp").exists()
    if family == "mixtral":  # written by save_pretrained
        return
    assert model.generation_config.max_new_tokens == 5
    files = sorted(folder.glob("*.safetensors"))
    assert len(files) > 1
    largest = max(parameter.numel() * 4 for parameter in original.parameters())
    names = []
    for file in files:
        with safe_open(file, "pt") as opened:
            names += opened.keys()
        assert file.stat().st_size < max(20_000, largest) + 8_000, "a header comes on top"
    assert sorted(names) == sorted(dict(original.named_parameters())), "tied weights are written once"


def refused(folder: Path) -> str:
    config = ModelConfig(path=str(folder))
    with pytest.raises(Unsharded) as error:
        find_weights(config, empty_model(config, "float32"))
    return str(error.value)


def test_weights_that_the_files_do_not_hold_as_they_are(llama: Path, tmp_path: Path) -> None:
    """Each is a reason to load the whole model the usual way, never a parameter without values."""
    for file in llama.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights, original = (
        load_file(llama / "model.safetensors"),
        json.loads((llama / "config.json").read_text(encoding="utf-8")),
    )
    norm, table = "model.norm.weight", "model.embed_tokens.weight"

    def write(changed: dict[str, torch.Tensor], **config: object) -> None:
        save_file(changed, tmp_path / "model.safetensors", {"format": "pt"})
        (tmp_path / "config.json").write_text(json.dumps(original | config), encoding="utf-8")

    write({name: tensor for name, tensor in weights.items() if name != norm})
    assert refused(tmp_path) == f"no file holds {norm}"
    write({**weights, norm: torch.ones(33)})
    assert refused(tmp_path) == f"{norm} has another shape in the file"
    write({**weights, norm: torch.ones(32, dtype=torch.int8)})
    assert refused(tmp_path) == f"{norm} is I8 in the file"
    write({**weights, "lm_head.weight": weights[table] + 1})
    assert refused(tmp_path) == f"{table} and lm_head.weight are tied in config.json, but differ in the files"
    write(weights, quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True})
    assert refused(tmp_path) == "its weights are quantised"
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "config.json").write_text(json.dumps(original), encoding="utf-8")
    assert refused(tmp_path) == "it has no safetensors files"
    (tmp_path / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {norm: "part.safetensors"}}), encoding="utf-8"
    )
    assert "part.safetensors, which is missing" in refused(tmp_path)
    (tmp_path / "model.safetensors.index.json").unlink()
    write({**weights, "lm_head.weight": weights[table].clone()})  # the same under both names is no reason
    config = ModelConfig(path=str(tmp_path))
    assert find_weights(config, empty_model(config, "float32")).file_of.keys() == weights.keys()


# ---- layers


@pytest.mark.parametrize(("mode", "forwards"), [("none", [1, 1]), ("full", [2, 2]), ("selective", [2, 1])])
def test_which_layers_run_again_in_the_backward(mode: str, forwards: list[int]) -> None:
    policy = Policy(build("llama", torch.float32))
    frozen = copy.deepcopy(policy).requires_grad_(False)
    seen = [0, 0]
    for one in (policy, frozen):
        layers.prepare(one, TrainingConfig(activation_checkpointing=mode))
    for i, layer in enumerate(decoder_layers(policy)):
        layer.mlp.register_forward_pre_hook(lambda *_, i=i: seen.__setitem__(i, seen[i] + 1))
    row = DeviceComb.of(pack(trees()[0]))
    policy(row).sum().backward()
    assert seen == forwards
    assert not frozen.model.training and policy.model.training == (mode != "none")


def test_layers_are_compiled_one_by_one() -> None:
    policy = Policy(build("llama", torch.float32))
    layers.prepare(policy, TrainingConfig(compile=True))
    assert all(layer._compiled_call_impl is not None for layer in decoder_layers(policy))
    assert policy._compiled_call_impl is None


def test_settings_that_the_ranks_or_the_machine_cannot_follow(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match="training.shard_size=3: does not divide the 4 ranks"):
        fsdp.check_sharding(TrainingConfig(shard_size=3), Ranks(0, 4, CPU))
    fsdp.check_sharding(TrainingConfig(shard_size=2), Ranks(0, 4, CPU))
    with pytest.raises(ConfigError, match="reference_offload=true: without a GPU"):
        fsdp.check_sharding(TrainingConfig(reference_offload=True), Ranks(0, 4, CPU))
    with pytest.raises(ConfigError, match="reference_offload=true: one process without torchrun"):
        fsdp.check_sharding(TrainingConfig(reference_offload=True), Ranks(0, 1, torch.device("cuda")))
    assert cli.main(["train", "training.shards=file:///nowhere", "training.shard_size=2"]) == 2
    assert "training.shard_size=2: does not divide the 1 ranks" in capsys.readouterr().err


def test_liger_replaces_norm_rotary_embedding_and_mlp_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its kernels need a GPU; a stand-in takes down what it is asked for."""
    training, cuda = TrainingConfig(liger=True), torch.device("cuda")
    config = build("llama", torch.float32).config
    with pytest.raises(ConfigError, match="training.liger=true: .* need a GPU"):
        layers.check_layers(training, config, CPU)
    find_spec = layers.importlib.util.find_spec
    spec: object = None
    monkeypatch.setattr(
        layers.importlib.util, "find_spec", lambda name, *a: spec if name == "liger_kernel" else find_spec(name, *a)
    )
    with pytest.raises(ConfigError, match="training.liger=true: the package is missing"):
        layers.check_layers(training, config, cuda)

    asked: dict[str, object] = {}
    package = types.ModuleType("liger_kernel.transformers")
    patches = types.ModuleType("liger_kernel.transformers.monkey_patch")
    patches.MODEL_TYPE_TO_APPLY_LIGER_FN = {"llama": None}  # type: ignore[attr-defined]
    package._apply_liger_kernel_to_instance = lambda **named: asked.update(named)  # type: ignore[attr-defined]
    for module in (types.ModuleType("liger_kernel"), package, patches):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    spec = object()
    monkeypatch.setattr("transformers.integrations.liger.is_liger_kernel_available", lambda: True)
    layers.check_layers(training, config, cuda)
    with pytest.raises(ConfigError, match="does not know model type gemma3_text"):
        layers.check_layers(training, build("gemma3", torch.float32).config, cuda)
    policy = Policy(build("llama", torch.float32))
    layers.prepare(policy, training)
    assert asked.pop("model") is policy.model
    assert {name for name, wanted in asked.items() if wanted} == {"rope", "rms_norm", "swiglu", "geglu"}
    assert {name for name, wanted in asked.items() if not wanted} >= {"cross_entropy", "fused_linear_cross_entropy"}


def varlen(q, k, v, ends, ends_k, longest, longest_k, *, softmax_scale, causal, window_size, softcap):  # type: ignore[no-untyped-def]
    """What flash-attn's documentation says of flash_attn_varlen_func, one row at a time: [T, H, D], softcap 0 for none, a window of
    `left` keys before the query."""
    assert causal and torch.equal(ends, ends_k) and longest == longest_k == int(ends.diff().max())
    assert ends.dtype == torch.int32 and ends[0] == 0 and ends[-1] == len(q)
    assert q.shape[-1] == k.shape[-1] == v.shape[-1]
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    rows = []
    for a, b in zip(ends[:-1].tolist(), ends[1:].tolist(), strict=True):
        groups = q.shape[1] // k.shape[1]
        keys, values = (x[a:b].repeat_interleave(groups, 1) for x in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q[a:b], keys) * scale
        scores = softcap * torch.tanh(scores / softcap) if softcap else scores
        gap = torch.arange(b - a)[:, None] - torch.arange(b - a)[None]
        hidden = (gap < 0) | ((gap > window_size[0]) if window_size[0] >= 0 else False)
        rows.append(torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden, -torch.inf).softmax(-1), values))
    return torch.cat(rows)


@pytest.mark.parametrize("kind", ["llama", "gemma2", "deepseek_v3"])
def test_flash_attention_is_asked_for_the_same_on_rows_without_branches(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its kernels need a GPU; a stand-in does what its documentation says. Gemma-2: soft-cap, window and a scale of its own;
    DeepSeek: values narrower than keys."""
    package = types.ModuleType("flash_attn")
    package.flash_attn_varlen_func = varlen  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    draw = np.random.default_rng(0)
    rows = [draw.integers(1, 97, n, dtype=np.int32) for n in (12, 5, 9)]
    rows[1][0], rows[2][0] = (rows[0][0] + 1) % 97, (rows[0][0] + 2) % 97
    straight = pack([Trunk(row, (SampledState(3, (row[3:],), (i,)),)) for i, row in enumerate(rows)])
    other = np.array([*rows[0][3:5], (rows[0][5] + 1) % 97, 1, 2], np.int32)
    branched = pack([Trunk(rows[0], (SampledState(3, (rows[0][3:], other), (0, 1)),))])
    policy = Policy(build(kind, torch.float64))
    found = []
    for flash in (False, True):
        packed = DeviceComb.of(straight, flash=flash)
        assert (packed.row_ends is not None) == flash
        logp_N = policy(packed)
        logp_N.sum().backward()
        found.append(
            (logp_N.detach(), {name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None})
        )
        policy.zero_grad()
    assert torch.allclose(found[0][0], found[1][0], atol=1e-12)
    assert all(torch.allclose(found[0][1][name], grad, atol=1e-10) for name, grad in found[1][1].items())
    assert DeviceComb.of(branched, flash=True).row_ends is None, "tree attention"


def test_flash_attention_needs_a_gpu_its_package_and_half_precision(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = small_models.build("llama", torch.float32).config
    with pytest.raises(ConfigError, match="training.flash_attention=true: flash-attn needs a GPU"):
        layers.check_layers(TrainingConfig(flash_attention=True), config, CPU)
    with pytest.raises(
        ConfigError, match="training.flash_attention=true: .*no attention sinks.*gpt_oss needs; leave it false"
    ):
        layers.check_layers(TrainingConfig(flash_attention=True), transformers.GptOssConfig(), CPU)
    monkeypatch.setattr(layers.importlib.util, "find_spec", lambda *_: None)
    with pytest.raises(ConfigError, match="training.flash_attention=true: the package is missing"):
        layers.check_layers(TrainingConfig(flash_attention=True), config, torch.device("cuda"))
    assert cli.main(["train", "training.shards=file:///nowhere", "training.flash_attention=true"]) == 2
    assert "set model.dtype=bfloat16" in capsys.readouterr().err
