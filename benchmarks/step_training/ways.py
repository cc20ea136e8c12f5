"""The three ways of benchmarks.step_training: the same trajectory, actions, weights and loss, laid out differently.

    padded   K x G rows in micro-batches, right-padded to the longest of each: what a Hugging Face style trainer does
    packed   the same rows one after the other, no padding, no sharing: block-diagonal causal attention, fused log-probs
    comb     swirl_fast.models.policy over swirl_fast.comb.tree: every prefix once

`packed` runs the same fused log-probs as `comb`, without the sharing. Each way is a module that maps its inputs to log-probs and
a function that cuts a case into micro-batches; the loss is `-(weights_N * logp_N).sum()` over all micro-batches.

Legend: K states, G actions drawn at each, A = K G actions, B rows of a micro-batch, T tokens, P positions with logits, N log-probs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, AutoModelForCausalLM, LlamaConfig, PreTrainedModel, Qwen2Config

from swirl_fast.comb.micro_batches import micro_batches
from swirl_fast.comb.tree import Ints, SampledState, Trunk, pack
from swirl_fast.models.policy import DeviceComb, Policy
from swirl_kernels.linear_logprob import linear_logprob

VARLEN = "benchmark_varlen"


@dataclass(frozen=True)
class Shape:
    """Tokens of a trajectory: state k (from 1) is the prompt and k - 1 actions with their results."""

    prompt: int
    action: int
    result: int

    def state(self, k: int) -> int:
        return self.prompt + (k - 1) * (self.action + self.result)


SHAPES = {
    "search_qa": Shape(prompt=400, action=120, result=600),
    # calculator sums: lengths chosen so that K=5, G=8 has 5.3 effective tokens a computed one
    "math": Shape(prompt=200, action=80, result=32),
}

MODELS = {
    "smollm2-135m": LlamaConfig(
        num_hidden_layers=30,
        hidden_size=576,
        num_attention_heads=9,
        num_key_value_heads=3,
        intermediate_size=1536,
        vocab_size=49152,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
    ),
    "qwen2.5-1.5b": Qwen2Config(
        num_hidden_layers=28,
        hidden_size=1536,
        num_attention_heads=12,
        num_key_value_heads=2,
        intermediate_size=8960,
        vocab_size=151936,
        max_position_embeddings=32768,
        tie_word_embeddings=True,
    ),
    "tiny": LlamaConfig(  # for tests
        num_hidden_layers=2,
        hidden_size=32,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=64,
        vocab_size=256,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
    ),
}


def build(name: str, layers: int | None, device: str) -> tuple[PreTrainedModel, str]:
    """The model with random float32 weights (the same on every call), and its name with what was cut.

    layers: only so many. The vocabulary is cut by the same factor, so that the output layer keeps its share of the work.
    """
    shape = MODELS[name]
    config = type(shape).from_dict(shape.to_dict())
    called = name
    if layers is not None and layers < shape.num_hidden_layers:
        config.num_hidden_layers = layers
        config.vocab_size = max(64, round(shape.vocab_size * layers / shape.num_hidden_layers / 64) * 64)
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[:layers]
        called += (
            f" cut to {layers} of {shape.num_hidden_layers} layers, {config.vocab_size} of {shape.vocab_size} tokens"
        )
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return model, called


@dataclass(frozen=True)
class Case:
    """Trajectories with their sampled actions. weight_A: float32, what each token of an action weighs in the loss."""

    branches: tuple[Trunk, ...]
    weight_A: Tensor

    def rows(self) -> Iterator[tuple[Ints, Ints, int]]:
        """(state, action, the action's number), states in order."""
        for branch in self.branches:
            for state in branch.states:
                for action, index in zip(state.actions, state.indices, strict=True):
                    yield branch.tokens[: state.length], action, index

    @property
    def effective_tokens(self) -> int:
        return sum(len(state) + len(action) for state, action, _ in self.rows())


def make_case(shape: Shape, states: int, samples: int, vocab: int) -> Case:
    """Random token ids (0 is left for padding), the same on every call.

    The actions of a state differ in their first token, from each other and from the recorded action, so that the comb can share
    states alone. Advantages are uniform in [-0.5, 1.5]: of both signs, and a loss far from zero, to which errors are compared.
    """
    draw = np.random.default_rng(0)
    trunk = draw.integers(1, vocab, shape.state(states), dtype=np.int32)
    sampled = []
    for k in range(1, states + 1):
        length = shape.state(k)
        taken = trunk[length : length + 1]
        first = draw.choice(np.setdiff1d(np.arange(1, vocab, dtype=np.int32), taken), samples, replace=False)
        rest = draw.integers(1, vocab, (samples, shape.action - 1), dtype=np.int32)
        actions = tuple(np.concatenate([first[:, None], rest], axis=1))
        sampled.append(SampledState(length, actions, tuple(range((k - 1) * samples, k * samples))))
    advantages = draw.uniform(-0.5, 1.5, states * samples).astype(np.float32)
    return Case((Trunk(trunk, tuple(sampled)),), torch.from_numpy(advantages) / (states * samples * shape.action))


def recorded_case(folder: Path, trajectories: int, samples: int, vocab: int, longest: int) -> tuple[Case, int]:
    """The first trajectories of a shard folder at the states that are kept and whose paths have at most `longest` tokens, with random
    actions as long as the recorded ones; and the number of states. Ids beyond the vocabulary, which --layers cuts, begin again from 1.
    Raises ValueError for shards that are damaged or hold no such state."""
    from swirl_fast.data.mds import Reader
    from swirl_fast.data.shards import decode_sample, verify_shards

    verify_shards(folder)
    reader = Reader(folder)
    draw = np.random.default_rng(0)
    branches: list[Trunk] = []
    number = tokens = 0
    for place in range(len(reader)):
        if len(branches) == trajectories:
            break
        sample = decode_sample(reader[place])
        recorded = sample.trajectory
        trunk = (1 + (recorded.tokens - 1) % (vocab - 1)).astype(np.int32)
        states = []
        for step, kept in zip(recorded.steps, sample.kept, strict=True):
            length = step.end - step.start
            if step.end > longest or length == 0 or not kept:
                continue
            actions = tuple(draw.integers(1, vocab, (samples, length), dtype=np.int32))
            states.append(SampledState(step.start, actions, tuple(range(number, number + samples))))
            number, tokens = number + samples, tokens + samples * length
        if states:
            branches.append(Trunk(trunk[: max(state.length for state in states)], tuple(states)))
    if not branches:
        raise ValueError(
            f"--shards {folder}: no state with its action has at most {longest} tokens; raise --token-budget"
        )
    advantages = draw.uniform(-0.5, 1.5, number).astype(np.float32)
    case = Case(tuple(branches), torch.from_numpy(advantages) / tokens)
    return case, sum(len(branch.states) for branch in branches)


@dataclass(frozen=True)
class MicroBatch:
    """inputs: what the way's module takes. weights_N: of each log-prob that it returns. tokens: computed, padding too."""

    inputs: Any
    weights_N: Tensor
    tokens: int


@dataclass(frozen=True)
class PaddedInputs:
    """tokens_BT, mask_BT int64 (None without padding); keep_P: positions that get logits; targets_BP: the token after each, 0 where
    none is wanted."""

    tokens_BT: Tensor
    mask_BT: Tensor | None
    keep_P: Tensor
    targets_BP: Tensor


class PaddedPolicy(nn.Module):
    """transformers' sdpa attention, with its mask where there is padding, full logits at the kept positions, log_softmax and gather."""

    def __init__(self, model: PreTrainedModel, autocast: torch.dtype | None) -> None:
        super().__init__()
        model.set_attn_implementation("sdpa")
        self.model = model
        self.autocast = autocast

    def forward(self, inputs: PaddedInputs) -> Tensor:
        device = inputs.tokens_BT.device.type
        with torch.autocast(device, dtype=self.autocast or torch.bfloat16, enabled=self.autocast is not None):
            logits_BPV = self.model(
                input_ids=inputs.tokens_BT,
                attention_mask=inputs.mask_BT,
                logits_to_keep=inputs.keep_P,
                use_cache=False,
            ).logits
        return logits_BPV.float().log_softmax(-1).gather(-1, inputs.targets_BP[..., None]).flatten()


def padded_batches(case: Case, budget: int, max_rows: int, device: str) -> list[MicroBatch]:
    """At most `max_rows` rows each, fewer where their padded tokens exceed the budget; the longest row of each sets its width.

    Rows of one state are neighbours, so that padding is rare: where a micro-batch holds one state only, its logits are those of the
    action tokens; else every row gets logits wherever one of them needs them, since logits_to_keep is common to a micro-batch.
    """
    groups: list[list[tuple[Ints, Ints, int]]] = [[]]
    for row in case.rows():
        longest = max(len(state) + len(action) for state, action, _ in (*groups[-1], row))
        if len(groups[-1]) == max_rows or longest * (len(groups[-1]) + 1) > budget:
            groups.append([])
        groups[-1].append(row)
    batches = []
    for part in groups:
        longest = max(len(state) + len(action) for state, action, _ in part)
        tokens, mask, targets = (torch.zeros(len(part), longest, dtype=torch.int64) for _ in range(3))
        weights = torch.zeros(len(part), longest)
        for b, (state, action, index) in enumerate(part):
            n = len(state) + len(action)
            tokens[b, :n] = torch.from_numpy(np.concatenate([state, action]))
            mask[b, :n] = 1
            predicting = slice(len(state) - 1, n - 1)
            targets[b, predicting] = torch.from_numpy(action).long()
            weights[b, predicting] = case.weight_A[index]
        keep = weights.ne(0).any(0).nonzero()[:, 0]
        padding = None if mask.all() else mask.to(device)
        inputs = PaddedInputs(tokens.to(device), padding, keep.to(device), targets[:, keep].to(device))
        batches.append(MicroBatch(inputs, weights[:, keep].flatten().to(device), tokens.numel()))
    return batches


@dataclass(frozen=True)
class PackedInputs:
    """tokens_1T, positions_1T, rows_N, targets_N int64; lengths: of the rows, whose cumulative sums are starts (int32)."""

    tokens_1T: Tensor
    positions_1T: Tensor
    rows_N: Tensor
    targets_N: Tensor
    lengths: tuple[int, ...]
    starts: Tensor


def _varlen_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    packed: PackedInputs | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Causal within each row: torch's varlen FlashAttention on CUDA in 16 bits, else one causal SDPA call for neighbours of one
    length."""
    assert packed is not None and attention_mask is None, "the packed way runs without a mask, over PackedInputs"
    if torch.is_autocast_enabled(query.device.type):
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    if query.is_cuda:  # SDPA on a CPU reads grouped heads in place; on CUDA not every kernel does
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    if query.is_cuda and query.dtype != torch.float32:
        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
        longest = max(packed.lengths)
        out = varlen_attn(q, k, v, packed.starts, packed.starts, longest, longest, scale=scaling, window_size=(-1, 0))
        assert isinstance(out, Tensor), "varlen_attn was asked for its output only"
        return out[None], None
    runs = [(length, len(list(same))) for length, same in groupby(packed.lengths)]
    parts = zip(*(x[0].split([length * rows for length, rows in runs], 1) for x in (query, key, value)), strict=True)
    calls = []
    for (length, rows), part in zip(runs, parts, strict=True):
        q, k, v = (x.unflatten(1, (rows, length)).transpose(0, 1) for x in part)  # [rows, heads, length, D]
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=True)
        calls.append(out.transpose(1, 2).flatten(0, 1))
    return torch.cat(calls)[None], None


AttentionInterface.register(VARLEN, _varlen_attention)


class PackedPolicy(nn.Module):
    """Policy's twin over rows that share nothing."""

    def __init__(self, model: PreTrainedModel, autocast: torch.dtype | None) -> None:
        super().__init__()
        model.set_attn_implementation(VARLEN)
        self.model = model
        self.autocast = autocast

    def forward(self, inputs: PackedInputs) -> Tensor:
        device = inputs.tokens_1T.device.type
        with torch.autocast(device, dtype=self.autocast or torch.bfloat16, enabled=self.autocast is not None):
            hidden_1TH = self.model.base_model(
                input_ids=inputs.tokens_1T, position_ids=inputs.positions_1T, use_cache=False, packed=inputs
            ).last_hidden_state
            head = self.model.get_output_embeddings()
            return linear_logprob(hidden_1TH[0].index_select(0, inputs.rows_N), head.weight, inputs.targets_N)


def packed_batches(case: Case, budget: int, max_rows: int, device: str) -> list[MicroBatch]:
    """Rows in order, as many to a micro-batch as the budget allows."""
    groups: list[list[tuple[Ints, Ints, int]]] = []
    used = budget
    for row in case.rows():
        n = len(row[0]) + len(row[1])
        if used + n > budget:
            groups.append([])
            used = 0
        groups[-1].append(row)
        used += n
    batches = []
    for group in groups:
        lengths = tuple(len(state) + len(action) for state, action, _ in group)
        starts = np.cumsum([0, *lengths])
        predicting = [
            np.arange(at + len(state) - 1, at + len(state) + len(action) - 1)
            for at, (state, action, _) in zip(starts, group, strict=False)
        ]
        inputs = PackedInputs(
            tokens_1T=_int64(np.concatenate([part for state, action, _ in group for part in (state, action)]), device)[
                None
            ],
            positions_1T=_int64(np.concatenate([np.arange(n) for n in lengths]), device)[None],
            rows_N=_int64(np.concatenate(predicting), device),
            targets_N=_int64(np.concatenate([action for _, action, _ in group]), device),
            lengths=lengths,
            starts=torch.from_numpy(starts).int().to(device),
        )
        numbers = _int64(np.concatenate([np.full(len(action), index) for _, action, index in group]), "cpu")
        batches.append(MicroBatch(inputs, case.weight_A[numbers].to(device), sum(lengths)))
    return batches


def comb_batches(case: Case, budget: int, max_rows: int, device: str) -> list[MicroBatch]:
    batches = []
    for group in micro_batches(list(case.branches), budget):
        comb = pack(group.trunks)
        numbers = _int64(np.repeat(comb.indices_A, np.diff(comb.offsets)), "cpu")
        weights = case.weight_A[numbers].to(device)
        batches.append(MicroBatch(DeviceComb.of(comb, device), weights, comb.computed_tokens))
    return batches


def _int64(array: np.ndarray, device: str) -> Tensor:
    return torch.from_numpy(array).long().to(device)


@dataclass(frozen=True)
class Way:
    """policy(model, autocast) turns the model's attention to this way; batches(case, token budget, most rows, device)."""

    policy: Callable[[PreTrainedModel, torch.dtype | None], nn.Module]
    batches: Callable[[Case, int, int, str], list[MicroBatch]]


WAYS = {
    "padded": Way(PaddedPolicy, padded_batches),
    "packed": Way(PackedPolicy, packed_batches),
    "comb": Way(lambda model, autocast: Policy(model, autocast=autocast), comb_batches),
}
