"""How much memory a rank needs, in bytes, from settings and shapes: no weights are read.

    python -m swirl_fast.training.memory --config FILE [--ranks N] [--longest-path GIB] key=value …     (N of torchrun, on all machines)

Legend: P parameters of the model, L of its largest decoder layer, R of everything outside the layers (embeddings, output layer);
S ranks that share one copy; c bytes of the compute type, r of the residual stream; T tokens of a micro-batch; H, Q, KV, I widths of
the hidden state, of all query heads, of all key/value heads, of the gated MLP. With model.lora only the adapters have gradients and
moments, and the reference is the policy itself.

Not in it: the allocator's fragmentation, CUDA's context (about 1 GiB), nccl's buffers; and what compiled layers or liger-kernel
save; activations of models that are trained over padded rows. Experts count as many as a token visits. SGLang's servers are other
processes: on a GPU that one shares with the trainer it takes engine.launch.memory_fraction of what is free when it starts, and some GiB for
its own work. With engine.share_gpu it has that while it samples, and the trainer what is said here while it trains.
"""

from __future__ import annotations

import argparse
import bisect
import copy
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from swirl_fast.config import Config, ConfigError, TrainingConfig, load
from swirl_fast.models.exact import context_of, why_not_shared
from swirl_fast.models.load import DTYPES, load_config
from swirl_fast.models.lora import frozen_in_compute_type, linear_layers, target_layers
from swirl_fast.models.policy import head_widths
from swirl_fast.models.workspace import LEAST_MB
from swirl_fast.training.fsdp import layers_of
from swirl_fast.training.utilization import GIB


@dataclass(frozen=True)
class Estimate:
    """Bytes of one rank. kept: all the time; step: at the height of a forward and backward, on top. With engine.share_gpu both are of the
    phase of training; sampling, sync: of the phases that have the GPU in turn with it. host: in CPU memory, at its height."""

    kept: dict[str, float]
    step: dict[str, float]
    sampling: dict[str, float] = field(default_factory=dict)
    sync: dict[str, float] = field(default_factory=dict)
    host: dict[str, float] = field(default_factory=dict)
    unknown: str = ""  # what is not in it, and why

    @property
    def peak(self) -> float:
        return sum(self.kept.values()) + sum(self.step.values())

    def __str__(self) -> str:
        text = f"{self.peak / GIB:.1f} GiB a rank: {_listed(self.kept | self.step)}"
        if self.unknown:
            text += f", and {self.unknown}"
        if self.sampling:
            text += f"; while the servers sample: {_listed(self.sampling)}, and their cache; in the sync: {_listed(self.sync)}"
        return text + (f"; in CPU memory: {_listed(self.host)}" if self.host else "")


def _listed(parts: dict[str, float]) -> str:
    # a reference of 0 is worth saying: it is the policy with its adapters off
    return ", ".join(f"{name} {size / GIB:.1f}" for name, size in parts.items() if size or name == "reference")


def estimate(
    model_config: PreTrainedConfig, config: Config, ranks: int = 0, model: PreTrainedModel | None = None
) -> Estimate:
    """The need of training with `config` on GPUs. ranks: of torchrun; 0: one process without it, which shards nothing and casts weights
    to the compute type in every matrix product. model: made by `shapes` of model_config, where there is one already."""
    training, distributed = config.training, ranks > 0
    model = model or shapes(model_config)
    layers = layers_of(model)
    count = sum(parameter.numel() for parameter in model.parameters())
    in_layers = [sum(parameter.numel() for parameter in layer.parameters()) for layer in layers]
    layer, root = max(in_layers), count - sum(in_layers)
    in_layer, in_root, products = layer, root, 0.0  # numbers that have gradients; products of adapters a token
    trained = _trained(model, config)
    if (rank := config.model.lora.rank) is not None:
        adapted = target_layers(model, config.model.lora.targets)
        in_layer, in_root, products = trained / len(layers), 0, rank * len(adapted)
    shared = (training.shard_size or ranks) if distributed else 1
    c = DTYPES[config.model.dtype].itemsize
    r = c if distributed else 4
    engine = DTYPES[config.engine.dtype].itemsize

    stored = 4.0 * count
    if rank is not None:
        stored = 4.0 * (trained + count) - (4 - c) * _frozen_in_compute_type(model, model_config, config, distributed)
    kept = {"parameters": stored / shared, "gradients": 4.0 * trained / shared, "optimizer": 8.0 * trained / shared}
    if config.algorithm.kl_coef > 0 and not training.reference_offload:
        kept["reference"] = float((c if distributed else 4) * count) / shared if rank is None else 0.0
    text = model_config.get_text_config()
    own = why_not_shared(model_config) is not None  # layers of other shapes
    if config.engine.kind == "local" and config.algorithm.name != "sft":  # which samples nothing
        kept["rollout weights"] = float(engine * count)
    if "rollout weights" in kept and not own:
        heads = text.num_attention_heads
        kv = (getattr(text, "num_key_value_heads", None) or heads) * sum(head_widths(text))
        kept["rollout cache"] = 1.0 * len(layers) * kv * engine * config.engine.cache_tokens

    step = {}
    if distributed:
        step["gathered layers"] = float(c * (2 * layer + root))  # the one at work and the next; the root all the time
        step["reduction"] = float((c + 4) * max(in_layer, in_root))
        if not training.shard_accumulated_gradients:
            step["accumulated gradients"] = 4.0 * trained
    elif c != 4:
        step["cast weights"] = float(c * (count - _frozen_in_compute_type(model, model_config, config, distributed)))
    if own:
        return Estimate(
            kept, step, unknown=f"activations, which are not known for model type {model_config.model_type}"
        )
    tokens = training.token_budget
    saved, working, moved = _activations(model_config, layers, c, r, training)
    # of its own accord the workspace takes more only where a tenth of what is free is more
    workspace = (training.logprob_workspace_mb or LEAST_MB) * 2**20
    log_probs = min(workspace / tokens, 4 * text.vocab_size) + 3 * 4 * text.hidden_size
    step["activations"] = float(tokens * (saved + c * products))
    step["working memory"] = float(tokens * max(working, log_probs))  # log-probs come before the first layer's backward
    apart = _in_turns(config, kept, float(engine * count)) if config.engine.share_gpu else ({}, {}, {})
    if moved:
        apart[2]["activations"] = float(tokens * moved)
    return Estimate(kept, step, *apart)


def on_disk(model_config: PreTrainedConfig, config: Config, model: PreTrainedModel) -> float:
    """Bytes of what training leaves in the run's folder, and of one checkpoint more while it is written: of a checkpoint weights and two
    moments in float32 of what is trained, and a tied weight twice; of the model at the end. model: made by `shapes` of model_config."""
    numbers, text = 12.0 * _trained(model, config), model_config.get_text_config()
    if config.model.lora.rank is None and getattr(text, "tie_word_embeddings", False):
        numbers += 4.0 * text.vocab_size * text.hidden_size
    kept = config.training.keep_checkpoints + 1 + bool(config.training.keep_best)
    exported = config.training.export_dtype
    dtype = model_config.dtype if exported == "source" else getattr(torch, exported)
    size = dtype.itemsize if isinstance(dtype, torch.dtype) else 4
    return numbers * kept + size * float(sum(one.numel() for one in model.parameters()))


def _trained(model: PreTrainedModel, config: Config) -> int:
    """Numbers that have gradients."""
    if (rank := config.model.lora.rank) is None:
        return sum(parameter.numel() for parameter in model.parameters())
    adapted = target_layers(model, config.model.lora.targets)
    return rank * sum(sum(module.weight.shape) for module in adapted.values())


def shapes(model_config: PreTrainedConfig) -> PreTrainedModel:
    """The model without its numbers."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(copy.deepcopy(model_config), dtype=torch.float32)


def _in_turns(
    config: Config, kept: dict[str, float], weights: float
) -> tuple[dict[str, float], dict[str, float], dict[str, float]]:
    """The phases of engine.share_gpu (training/turns.py): sampling, sync, and what waits in CPU memory. weights: of the engine."""
    engine = config.engine
    served = {"rollout weights": weights / engine.launch.gpus_per_server}
    sync = {"parameters": kept["parameters"], **served, "bucket": engine.weight_sync.bucket_mb * 2**20}
    waits = {name: size for name, size in kept.items() if name in ("parameters", "optimizer", "reference")}
    return served, sync, waits


def longest_path(model_config: PreTrainedConfig, config: Config, ranks: int, memory: float) -> tuple[int, Estimate]:
    """Tokens of the longest path, alone in its micro-batch, that training has room for, and the need then; at most the model's context.

    memory: of a GPU, bytes. Raises ConfigError where there is no room for any."""
    model = shapes(model_config)

    def need(tokens: int) -> Estimate:
        training = replace(config.training, token_budget=tokens)
        return estimate(model_config, replace(config, training=training), ranks, model)

    if unknown := need(1).unknown:
        raise ConfigError(
            f"the longest path is not known: the estimate leaves out {unknown}. Try a step with the longest row that you have"
        )
    if need(1).peak > memory:
        raise ConfigError(
            f"{memory / GIB:g} GiB: before the first token training needs {need(1)}; share it among more ranks (--ranks), or set "
            "model.dtype=bfloat16, training.reference_offload=true or algorithm.kl_coef=0"
        )
    context = context_of(model_config)
    tokens = bisect.bisect_right(range(1, context + 1), memory, key=lambda length: need(length).peak)
    return tokens, need(tokens)


def _frozen_in_compute_type(
    model: PreTrainedModel, model_config: PreTrainedConfig, config: Config, distributed: bool
) -> int:
    """Parameters that adapters leave as they are and that are stored in the type in which they are multiplied, as `make_policy` does."""
    if not frozen_in_compute_type(config.model, model_config):
        return 0
    if distributed:
        return sum(parameter.numel() for parameter in model.parameters())
    return sum(parameter.numel() for layer in linear_layers(model).values() for parameter in layer.parameters())


def _activations(
    model_config: PreTrainedConfig, layers: torch.nn.ModuleList, c: int, r: int, training: TrainingConfig
) -> tuple[float, float, float]:
    """Bytes a token: what transformers' eager layers keep for the backward; what one layer's backward works with, at its height; and what
    waits in CPU memory."""
    mode = training.activation_checkpointing
    text = model_config.get_text_config()
    hidden, heads = text.hidden_size, text.num_attention_heads
    keys, values = head_widths(text)
    kv_heads = getattr(text, "num_key_value_heads", None) or heads
    query, kv = heads * keys, kv_heads * keys
    inner = text.intermediate_size
    if visited := getattr(text, "num_experts_per_tok", None):
        inner = visited * (getattr(text, "moe_intermediate_size", None) or inner)
    widths = [
        {"q_norm": query, "k_norm": kv}.get(name.rpartition(".")[2], hidden)
        for name, module in layers[0].named_modules()
        if "Norm" in type(module).__name__
    ]
    # a norm: its input and its normalised input in float32, and its output, which the next product keeps (cast, under autocast)
    norms = (4 + 4 + r + (c if r != c else 0)) * sum(widths)
    # q, k, v, the result in two layouts, log-sum-exp
    attention = c * (query + kv + (kv_heads + 2 * heads) * values) + 4 * heads
    mlp = 4 * c * inner  # gate, its activation, up, their product
    whole = norms + attention + mlp
    working = 3 * c * inner + 4 * r * hidden
    kinds = [mode == "full" or (mode == "selective" and i % 2 == 0) for i in range(len(layers))]
    saved = sum(r * hidden if checkpointed else whole for checkpointed in kinds)
    moved = 0.0
    if training.offload_activations:
        moved = float(r * hidden * sum(kinds))
        saved += 2 * r * hidden - moved  # one on its way out while the next one is made
    # the backward begins with the last layer: that one runs again while the others are still kept
    return saved, working + (whole if kinds[-1] else 0), moved


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the estimate. Exit codes as the stages have them: 2 for a config that cannot work."""
    parser = argparse.ArgumentParser(
        "swirl_fast.training.memory", description="Estimated memory of training, in GiB a rank."
    )
    parser.add_argument("--config")
    parser.add_argument("--ranks", type=int, default=0, help="of torchrun, on all machines; 0: one process without it")
    parser.add_argument(
        "--longest-path",
        type=float,
        metavar="GIB",
        help="print the longest path, in tokens, that this much memory of a GPU takes",
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    options = parser.parse_intermixed_args(arguments)
    if options.ranks < 0:
        parser.error(f"--ranks {options.ranks}: must be at least 1, or 0 for one process without torchrun")
    if options.longest_path is not None and not 0 < options.longest_path < math.inf:
        parser.error(f"--longest-path {options.longest_path:g}: must be a number of GiB above 0")
    try:
        config = load(options.config, options.overrides, files=False)  # none is read
        model_config = load_config(config.model)
        if options.longest_path is None:
            print(estimate(model_config, config, options.ranks))
        else:
            tokens, needed = longest_path(model_config, config, options.ranks, options.longest_path * GIB)
            print(f"{tokens} tokens in {options.longest_path:g} GiB, with training.token_budget={tokens}: {needed}")
    except ConfigError as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
