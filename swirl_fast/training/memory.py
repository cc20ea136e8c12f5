"""How much memory a rank needs, in bytes, from settings and shapes: no weights are read.

    python -m swirl_fast.training.memory --config FILE [--ranks N] key=value …     (N of torchrun, on all machines)

Legend: P parameters of the model, L of its largest decoder layer, R of everything outside the layers (embeddings, output layer);
S ranks that share one copy; c bytes of the compute type, r of the residual stream; T tokens of a micro-batch; H, Q, KV, I widths of
the hidden state, of all query heads, of all key/value heads, of the gated MLP.

Not in it: the allocator's fragmentation, CUDA's context (about 1 GiB), nccl's buffers; and what compiled layers or liger-kernel
save. Experts count as many as a token visits. SGLang's servers are other processes: on a GPU that one shares with the trainer it takes
engine.launch.memory_fraction of what is free when it starts, and some GiB for its own work.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig

from swirl_fast.config import Config, ConfigError, load
from swirl_fast.models.load import DTYPES, load_config
from swirl_fast.models.policy import head_widths
from swirl_fast.training.fsdp import layers_of
from swirl_fast.training.utilization import GIB

LOGITS_WORKSPACE = 256 << 20  # linear_logprob's default


@dataclass(frozen=True)
class Estimate:
    """Bytes of one rank. kept: all the time; step: at the height of a forward and backward, on top."""

    kept: dict[str, float]
    step: dict[str, float]

    @property
    def peak(self) -> float:
        return sum(self.kept.values()) + sum(self.step.values())

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {size / GIB:.1f}" for name, size in (self.kept | self.step).items() if size)
        return f"{self.peak / GIB:.1f} GiB a rank: {parts}"


def estimate(model_config: PreTrainedConfig, config: Config, ranks: int = 0) -> Estimate:
    """The need of training with `config` on GPUs. ranks: of torchrun; 0: one process without it, which shards nothing and casts weights
    to the compute type in every matrix product."""
    training, distributed = config.training, ranks > 0
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(copy.deepcopy(model_config), dtype=torch.float32)
    layers = layers_of(model)
    count = sum(parameter.numel() for parameter in model.parameters())
    in_layers = [sum(parameter.numel() for parameter in layer.parameters()) for layer in layers]
    layer, root = max(in_layers), count - sum(in_layers)
    shared = (training.shard_size or ranks) if distributed else 1
    c = DTYPES[config.model.dtype].itemsize
    r = c if distributed else 4
    engine = DTYPES[config.engine.dtype].itemsize

    kept = {"parameters": 4.0 * count / shared, "gradients": 4.0 * count / shared, "optimizer": 8.0 * count / shared}
    if config.algorithm.kl_coef > 0 and not training.reference_offload:
        kept["reference"] = float((c if distributed else 4) * count) / shared
    text = model_config.get_text_config()
    if config.engine.kind == "local" and config.algorithm.name != "sft":  # which samples nothing
        heads = text.num_attention_heads
        kv = (getattr(text, "num_key_value_heads", None) or heads) * sum(head_widths(text))
        kept["rollout weights"] = float(engine * count)
        kept["rollout cache"] = 1.0 * len(layers) * kv * engine * config.engine.cache_tokens

    step = {}
    if distributed:
        step["gathered layers"] = float(c * (2 * layer + root))  # the one at work and the next; the root all the time
        step["reduction"] = float((c + 4) * max(layer, root))
        if not training.shard_accumulated_gradients:
            step["accumulated gradients"] = 4.0 * count
    elif c != 4:
        step["cast weights"] = float(c * count)
    tokens = training.token_budget
    saved, working = _activations(model_config, layers, c, r, training.activation_checkpointing)
    log_probs = min(LOGITS_WORKSPACE / tokens, 4 * text.vocab_size) + 3 * 4 * text.hidden_size
    step["activations"] = float(tokens * saved)
    step["working memory"] = float(tokens * max(working, log_probs))  # log-probs come before the first layer's backward
    return Estimate(kept, step)


def _activations(
    model_config: PreTrainedConfig, layers: torch.nn.ModuleList, c: int, r: int, mode: str
) -> tuple[float, float]:
    """Bytes a token: what transformers' eager layers keep for the backward; and what one layer's backward works with, at its height."""
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
    # the backward begins with the last layer: that one runs again while the others are still kept
    return saved, working + (whole if kinds[-1] else 0)


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the estimate. Exit codes as the stages have them: 2 for a config that cannot work."""
    parser = argparse.ArgumentParser(
        "swirl_fast.training.memory", description="Estimated memory of training, in GiB a rank."
    )
    parser.add_argument("--config")
    parser.add_argument("--ranks", type=int, default=0, help="of torchrun, on all machines; 0: one process without it")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    options = parser.parse_intermixed_args(arguments)
    try:
        config = load(options.config, options.overrides, files=False)  # none is read
        print(estimate(load_config(config.model), config, options.ranks))
    except ConfigError as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
