"""Routing replay: the trainer's tokens go to the experts that the engine chose, weighed by the trainer's own scores."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import transformers
from support.model_families import trees
from support.small_models import SHAPE
from transformers import PreTrainedModel

from swirl_fast.comb.tree import Comb, SampledState, Trunk, pack
from swirl_fast.config import ConfigError, TrainingConfig, load
from swirl_fast.engines.engine import Request, Sampling
from swirl_fast.engines.local.engine import LocalEngine
from swirl_fast.models.policy import DeviceComb, Policy
from swirl_fast.models.routing import Replay, Routing, RoutingReader, about_experts, refuse_routing
from swirl_fast.ranks import Ranks
from swirl_fast.training import layers
from swirl_fast.training.batch import routed_tokens
from swirl_fast.training.fsdp import shard

COMMON = {**SHAPE, "initializer_range": 0.3}
FAMILIES: dict[str, dict[str, Any]] = {
    "Mixtral": {"num_local_experts": 6},
    "Qwen3Moe": {"num_experts": 6, "moe_intermediate_size": 24, "mlp_only_layers": [0], "num_hidden_layers": 3},
    "Qwen2Moe": {"num_experts": 6, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 24},
    "Olmoe": {"num_experts": 6},
    "MiniMaxM2": {"num_local_experts": 6},
}


@pytest.fixture
def one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def build(family: str = "Mixtral") -> PreTrainedModel:
    torch.manual_seed(0)
    settings = {**COMMON, "num_experts_per_tok": 2, **FAMILIES[family]}
    config = getattr(transformers, f"{family}Config")(**settings)
    return getattr(transformers, f"{family}ForCausalLM")(config).eval()


def policy_of(model: PreTrainedModel, replay: bool | None = True, mode: str = "none") -> Policy:
    policy = Policy(copy.deepcopy(model))
    if replay is not None:
        Replay(policy.model, replay)
    layers.prepare(policy, TrainingConfig(activation_checkpointing=mode))
    return policy


def paths(comb: Comb) -> list[tuple[int, ...]]:
    """The path to every token of the comb, itself included."""
    found: list[tuple[int, ...]] = []
    for i, depth in enumerate(comb.depth_T.tolist()):
        parent = next((found[j] for j in reversed(range(i)) if comb.depth_T[j] == depth - 1), ())
        found.append((*parent, int(comb.tokens_T[i])))
    return found


def experts_at(path: tuple[int, ...], count: int) -> np.ndarray:
    """What an engine might have chosen: two of six experts for each layer, of the path alone, so that combs and rows agree."""
    draw = np.random.default_rng(path)
    return np.array([draw.permutation(6)[:2] for _ in range(count)], np.int16)


def routed(comb: Comb, recorded: set[tuple[int, ...]], count: int) -> Routing:
    empty = np.full((count, 2), -1, np.int16)
    rows = [experts_at(path, count) if path in recorded else empty for path in paths(comb)]
    return Routing(torch.from_numpy(np.stack(rows)))


def run(policy: Policy, combs: list[Comb], recorded: set[tuple[int, ...]] | None) -> tuple[dict, dict, list[Routing]]:
    """Log-probs by action, and the gradients of a sum over all that weighs each token differently."""
    policy.zero_grad()
    logp, seen = {}, []
    for comb in combs:
        row = DeviceComb.of(comb)
        if recorded is not None:
            row.routing = routed(comb, recorded, policy.model.config.num_hidden_layers)
            seen.append(row.routing)
        values = policy(row)
        parts = [values[a:b] for a, b in zip(comb.offsets, comb.offsets[1:], strict=False)]
        weights = [
            torch.linspace(1, 2, len(part)) * (1 + index % 3) for index, part in zip(comb.indices_A, parts, strict=True)
        ]
        torch.stack([(w * part).sum() for w, part in zip(weights, parts, strict=True)]).sum().backward()
        logp |= {int(index): part.detach() for index, part in zip(comb.indices_A, parts, strict=True)}
    gradients = {n: p.grad.clone() for n, p in policy.named_parameters() if p.grad is not None}
    return logp, gradients, seen


def rows_of(trunks: list[Trunk]) -> list[Comb]:
    """One row an action."""
    return [
        pack([Trunk(trunk.tokens, (SampledState(state.length, (action,), (index,)),))])
        for trunk in trunks
        for state in trunk.states
        for action, index in zip(state.actions, state.indices, strict=True)
    ]


def recorded_in(comb: Comb) -> set[tuple[int, ...]]:
    there = paths(comb)
    return {there[row] for row in comb.rows_E}


def largest(one: dict, other: dict) -> float:
    """Difference, relative to the largest number of its tensor."""
    assert one.keys() == other.keys()
    return max(
        float((one[key] - other[key]).abs().max() / (1 + other[key].abs().max())) for key in one if one[key].numel()
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_a_comb_with_a_replayed_choice_equals_rows_with_it(family: str) -> None:
    model = build(family)
    policy, trunks = policy_of(model), trees()[0]
    comb = pack(trunks)
    recorded = recorded_in(comb)
    logp, gradients, (seen,) = run(policy, [comb], recorded)
    rows = run(policy, rows_of(trunks), recorded)
    assert largest(logp, rows[0]) < 1e-5 and largest(gradients, rows[1]) < 1e-5
    own = run(policy_of(model, None), [comb], None)
    assert largest(logp, own[0]) > 0.1, "the recorded choice is another one"
    assert largest(run(policy, [comb], set())[0], own[0]) == 0, "where nothing is recorded, nothing is replayed"
    different, compared = seen.compared()
    experts = sum(hasattr(layer.mlp, "experts") for layer in policy.model.model.layers)
    assert compared == experts * len(recorded) and 0.5 < different / compared < 1
    assert any("gate.weight" in name and gradient.abs().max() > 0 for name, gradient in gradients.items())


def test_shards_replay_too(one_rank: None) -> None:
    """FSDP2 calls layers with its own hooks, and again in the backward pass."""
    model, comb = build(), pack(trees()[0])
    recorded = recorded_in(comb)
    plain, policy = policy_of(model), policy_of(model, True, "full")
    shard(policy, Ranks(0, 1, torch.device("cpu")))
    (wanted, _, _), (found, _, (seen,)) = (run(one, [comb], recorded) for one in (plain, policy))
    assert largest(wanted, found) < 1e-6 and seen.compared()[0] > 0
    for one, other in zip(plain.parameters(), policy.parameters(), strict=True):
        assert one.grad is not None and other.grad is not None
        torch.testing.assert_close(other.grad.full_tensor(), one.grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mode", ["full", "selective"])
def test_a_layer_that_runs_again_makes_the_same_choice(mode: str) -> None:
    model, comb = build(), pack(trees()[0])
    recorded = recorded_in(comb)
    wanted, found = (run(policy_of(model, True, how), [comb], recorded) for how in ("none", mode))
    assert largest(wanted[0], found[0]) == 0 and largest(wanted[1], found[1]) == 0
    assert wanted[2][0].compared() == found[2][0].compared()


def test_to_compare_changes_nothing() -> None:
    model, comb = build(), pack(trees()[0])
    own, compared = run(policy_of(model, None), [comb], None), run(policy_of(model, False), [comb], recorded_in(comb))
    assert largest(own[0], compared[0]) == 0 and largest(own[1], compared[1]) == 0
    assert compared[2][0].compared()[0] > 0


def test_the_engines_own_choice_changes_nothing_and_that_of_other_weights_does() -> None:
    """What the embedded engine returns is where the plain model sends these tokens; the trainer replays it."""
    model = build("Qwen3Moe")
    engine = LocalEngine(copy.deepcopy(model), max_sequences=8, cache_tokens=512)
    prompts = [[5, 6, 7, 8], [5, 6, 9], [11]]
    requests = [Request(tokens, Sampling(6), n=2, routed_experts=i != 1) for i, tokens in enumerate(prompts)]
    results = engine.generate(requests)
    assert all(completion.routed_experts is None for completion in results[1])
    reader = RoutingReader(plain := copy.deepcopy(model))
    for tokens, completions in zip(prompts, results, strict=True):
        for completion in completions:
            if completion.routed_experts is None:
                continue
            with torch.no_grad():
                plain(torch.tensor([[*tokens, *completion.tokens[:-1].tolist()]]))
            wanted = reader.last()[len(tokens) - 1 :].numpy()
            assert completion.routed_experts.dtype == np.uint8
            assert completion.routed_experts.shape == (len(completion.tokens), 3, 2)
            assert np.array_equal(np.sort(completion.routed_experts, -1), np.sort(wanted, -1))
    states = [
        Trunk(
            np.array(tokens, np.int32), (SampledState(len(tokens), tuple(c.tokens for c in done), (2 * i, 2 * i + 1)),)
        )
        for i, (tokens, done) in enumerate(zip(prompts, results, strict=True))
    ]
    comb = pack(states)
    row = DeviceComb.of(comb)
    experts = routed_tokens(comb, [completion.routed_experts for done in results for completion in done])
    assert experts is not None and experts.shape == (comb.computed_tokens, 3, 2)
    row.routing = Routing(torch.from_numpy(experts))
    with torch.no_grad():
        policy = policy_of(model)
        assert torch.equal(policy(row), policy_of(model, None)(row))
        different, compared = row.routing.compared()
        recorded = int((experts[:, 0, 0] >= 0).sum())
        assert (different, compared) == (0, 2 * recorded) and 0 < recorded < comb.computed_tokens
        for name, parameter in policy.named_parameters():
            if "gate.weight" in name:
                parameter.add_(torch.randn_like(parameter))
        policy(row)
        assert row.routing.compared()[0] > 0


def test_of_several_records_of_one_token_the_first_counts() -> None:
    trunk = Trunk(
        np.array([1, 2, 3], np.int32), (SampledState(3, tuple(np.array([t], np.int32) for t in (7, 8, 9)), (4, 5, 6)),)
    )
    comb = pack([trunk])
    records = [None, np.full((1, 1, 2), 3, np.uint8), np.full((1, 1, 2), 5, np.uint8)]
    assert routed_tokens(comb, records).tolist() == [[[-1, -1]], [[-1, -1]], [[3, 3]]]  # type: ignore[union-attr]
    assert routed_tokens(comb, [None, None, None]) is None


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("Llama", {}, "training.x=true: model type llama has no experts; leave it false"),
        ("DeepseekV3", {}, "deepseek_v3 chooses its experts outside of a router with one torch.topk"),
        ("Glm4Moe", {}, "glm4_moe chooses its experts outside"),
        ("Phimoe", {}, "phimoe chooses its experts outside"),
        ("Mixtral", {}, ""),
        ("Gemma4Text", {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2}, ""),
        ("GptOss", {}, ""),
    ],
)
def test_models_whose_choice_cannot_be_replaced_are_refused_by_name(name: str, settings: dict, message: str) -> None:
    model_config = getattr(transformers, f"{name}Config")(**settings)
    if not message:
        return refuse_routing(model_config, "training.x")
    with pytest.raises(ConfigError, match=message):
        refuse_routing(model_config, "training.x")


def test_settings_and_what_is_said_at_the_start() -> None:
    for settings, message in (
        (["algorithm.reward=outcome"], "replay_routing=True: algorithm.reward=outcome draws whole trajectories"),
        (["algorithm.name=sft"], "replay_routing=True: algorithm.name=sft imitates"),
        (["training.compile=true"], "training.compile=True: training.replay_routing steps into the routers"),
    ):
        with pytest.raises(ConfigError, match=message):
            load(None, ["training.replay_routing=true", *settings])
    mixtral, llama = transformers.MixtralConfig(), transformers.LlamaConfig()
    assert about_experts(llama, load(None, [])) == ""
    said = about_experts(mixtral, load(None, []))
    assert said.startswith("mixtral sends each token to 2 of 8 experts.") and "no expert parallelism" in said
    assert "training.replay_routing=true takes the engine's choice" in said
    assert "routing_gap how often" in about_experts(mixtral, load(None, ["engine.return_routed_experts=true"]))
    assert "go where the engine sent them" in about_experts(mixtral, load(None, ["training.replay_routing=true"]))
    assert "replay" not in about_experts(transformers.Glm4MoeConfig(), load(None, []))
