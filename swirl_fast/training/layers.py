"""What is done to a policy's layers before they are sharded: activation checkpointing, torch.compile, liger-kernel."""

from __future__ import annotations

import importlib.util

import torch
from transformers import PreTrainedConfig
from transformers.modeling_layers import GradientCheckpointingLayer

from swirl_fast.config import ConfigError, TrainingConfig
from swirl_fast.models.exact import why_not_flash
from swirl_fast.models.policy import Policy
from swirl_fast.models.rows import packs_rows
from swirl_fast.training.activation_offload import OffloadedCheckpoint
from swirl_fast.training.fsdp import decoder_layers


def check_layers(training: TrainingConfig, model_config: PreTrainedConfig, device: torch.device) -> None:
    """Raises ConfigError for flash-attn or liger-kernel without a GPU or without the package, and for a model type that flash-attn lacks
    something for or liger-kernel does not know."""
    if training.flash_attention:
        if lacks := why_not_flash(model_config):
            raise ConfigError(
                f"training.flash_attention=true: {lacks}, which model type {model_config.model_type} needs; leave it false"
            )
        if device.type != "cuda":
            raise ConfigError("training.flash_attention=true: flash-attn needs a GPU; leave it false")
        if importlib.util.find_spec("flash_attn") is None:
            raise ConfigError("training.flash_attention=true: the package is missing; run: pip install flash-attn")
        if not training.sharing and not packs_rows(model_config):
            raise ConfigError(
                f"training.flash_attention=true: rows of model type {model_config.model_type} go through transformers' own attention; "
                "leave it false"
            )
    if training.offload_activations and device.type != "cuda":
        raise ConfigError(
            "training.offload_activations=true: without a GPU activations are in CPU memory already; leave it false"
        )
    if not training.liger:
        return
    if device.type != "cuda":
        raise ConfigError("training.liger=true: liger-kernel's kernels need a GPU; leave it false")
    if importlib.util.find_spec("liger_kernel") is None:
        raise ConfigError("training.liger=true: the package is missing; run: pip install liger-kernel")
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN as known

    if model_config.model_type not in known:
        raise ConfigError(
            f"training.liger=true: liger-kernel does not know model type {model_config.model_type}; leave it false"
        )


def prepare(policy: Policy, training: TrainingConfig) -> None:
    """Checkpoints, compiles and replaces as the settings say. A policy without trainable parameters keeps no activations anyway.

    full: only the input of a layer is kept. selective: of every second layer; the others keep all. Choosing layers rather than
    operations costs a sixth of the step at half the memory, and holds for Triton kernels and compiled layers, whose operations
    torch's selective checkpointing does not see.
    """
    if training.liger:
        _use_liger(policy)
    mode = training.activation_checkpointing
    if mode != "none" and any(parameter.requires_grad for parameter in policy.parameters()):
        policy.model.gradient_checkpointing_enable({"use_reentrant": False})
        policy.model.train()  # transformers checkpoints in training mode only; dropout was refused
        if mode == "selective":
            for i, layer in enumerate(decoder_layers(policy)):
                if not hasattr(layer, "gradient_checkpointing"):
                    raise ConfigError(
                        f"training.activation_checkpointing=selective: layers of model type {policy.model.config.model_type} cannot be "
                        "chosen one by one; use full"
                    )
                layer.gradient_checkpointing = i % 2 == 0
        if training.offload_activations:
            _offload(policy)
    if training.compile:
        # One graph for all layers alike and for rows of any length: lengths are unknown in it, and the numbers of the configuration
        # (scales, epsilons), which would be unknown too, are not.
        torch._dynamo.config.specialize_float = True
        for layer in decoder_layers(policy):
            layer.compile(dynamic=True)


def _offload(policy: Policy) -> None:
    """Raises ConfigError for layers that are not checkpointed one by one by transformers."""
    layers = list(decoder_layers(policy))
    if not all(isinstance(layer, GradientCheckpointingLayer) for layer in layers):
        raise ConfigError(
            f"training.offload_activations=true: layers of model type {policy.model.config.model_type} checkpoint themselves in a way of "
            "their own; leave it false"
        )
    offloaded = OffloadedCheckpoint()
    for layer in layers:
        layer._gradient_checkpointing_func = offloaded  # type: ignore[assignment]


def _use_liger(policy: Policy) -> None:
    """RMSNorm, rotary embedding and gated MLP; log-probs and loss stay our own. The rotary embedding is replaced in transformers'
    module, so for every model of that type in this process."""
    from transformers.integrations.liger import apply_liger_kernel

    wanted = dict.fromkeys(("rope", "rms_norm", "swiglu", "geglu"), True)
    unwanted = dict.fromkeys(("cross_entropy", "fused_linear_cross_entropy", "layer_norm"), False)
    apply_liger_kernel(policy.model, wanted | unwanted)
