"""linear_logprob as the language-model head of TRL's trainers (1.16 and later).

TRL patches its models so that `model(..., labels=labels, fused_lm_head=True)` returns log-probabilities and entropies of the labels
instead of logits (trl.trainer.utils.add_fused_lm_head), and calls them through whatever wraps them: accelerate's autocast, DDP,
FSDP. `use_linear_logprob` exchanges that one method. Batch sizes, masks, losses and metrics stay TRL's.

Left out: DeepSpeed ZeRO-3 (TRL gathers the head a second time in its own backward), the extra outputs of SFTTrainer (top-1 accuracy
and the like).
"""

from __future__ import annotations

import functools
import types
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from swirl_kernels.integrations.head import OutputHead, head_of
from swirl_kernels.linear_logprob import linear_logprob

IGNORED = -100


def use_linear_logprob(trainer: Any, *, workspace_mb: float | None = None) -> None:
    """Call it on a GRPOTrainer or RLOOTrainer between its construction and `train()`.

        trainer = GRPOTrainer(...)
        use_linear_logprob(trainer)
        trainer.train()

    Policy and reference model (where the trainer has one) compute their log-probabilities by linear_logprob, at the trainer's temperature
    and with its cast_lm_head_to_fp32. workspace_mb: see linear_logprob.

    Raises ValueError for another trainer, under DeepSpeed ZeRO-3, and for models that head_of refuses.
    """
    from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
    from trl import GRPOTrainer, RLOOTrainer

    if not isinstance(trainer, GRPOTrainer | RLOOTrainer):
        raise ValueError(
            f"{type(trainer).__name__} is no GRPOTrainer or RLOOTrainer; see add_linear_logprob_head for a model alone"
        )
    if is_deepspeed_zero3_enabled():
        raise ValueError(
            "DeepSpeed ZeRO-3 shards the output layer's weight between forward and backward; use FSDP2 or ZeRO-2"
        )
    for model, entropy in ((trainer.model, True), (trainer.ref_model, False)):
        if model is not None:
            add_linear_logprob_head(
                trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=True),
                temperature=trainer.temperature,
                entropy=entropy,
                cast_lm_head_to_fp32=getattr(trainer.args, "cast_lm_head_to_fp32", False),
                workspace_mb=workspace_mb,
            )


def add_linear_logprob_head(
    model: Any,
    *,
    temperature: float = 1.0,
    entropy: bool = False,
    cast_lm_head_to_fp32: bool = False,
    workspace_mb: float | None = None,
) -> OutputHead:
    """In place of trl.trainer.utils.add_fused_lm_head, before the model is wrapped: the same call, the same FusedCausalLMOutput with loss,
    log_probs, label_mask, aux_loss and, where asked for, entropy. Returns what head_of found."""
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    head = head_of(model)
    original = model.forward
    compute = functools.partial(
        _fused,
        softcap=head.softcap,
        logit_scale=head.logit_scale,
        temperature=temperature,
        entropy=entropy,
        cast=cast_lm_head_to_fp32,
        workspace_mb=workspace_mb,
    )

    @functools.wraps(type(model).forward)  # `generate` checks its arguments against this signature
    def forward(self: Any, *args: Any, fused_lm_head: bool = False, **kwargs: Any) -> Any:
        return compute(self, *args, **kwargs) if fused_lm_head else original(*args, **kwargs)

    model.forward = types.MethodType(forward, model)
    return head


def _fused(
    model: Any,
    *args: Any,
    softcap: float | None,
    logit_scale: float,
    temperature: float,
    entropy: bool,
    cast: bool,
    workspace_mb: float | None,
    labels: Tensor | None = None,
    shift_labels: Tensor | None = None,
    num_items_in_batch: Any = None,
    **kwargs: Any,
) -> Any:
    from trl.trainer.utils import FusedCausalLMOutput

    config = model.config.get_text_config()
    if getattr(config, "output_router_logits", False):
        kwargs.setdefault("output_router_logits", True)
    out = model.base_model(*args, **(kwargs | {"use_cache": False}))
    layer = model.get_output_embeddings()  # here, since FSDP replaces its parameters
    weight, bias = _whole(layer.weight), _whole(layer.bias)
    hidden = out.last_hidden_state.to(weight.device)  # [B, T, H]
    if shift_labels is None:
        assert labels is not None, "called with fused_lm_head=True and without labels"
        targets = F.pad(labels[:, 1:], (0, 1), value=IGNORED)
    else:
        targets = shift_labels
    targets = targets.to(weight.device)
    exact = torch.autocast(hidden.device.type, enabled=False) if cast else nullcontext()
    with exact:
        found = linear_logprob(  # type: ignore[call-overload]
            (hidden.float() if cast else hidden).flatten(0, 1),
            weight.float() if cast else weight,
            targets.flatten(),
            bias=bias.float() if cast and bias is not None else bias,
            temperature=temperature,
            softcap=softcap,
            logit_scale=logit_scale,
            entropy=entropy,
            workspace_mb=workspace_mb,
        )
    last = targets.shape[1] if shift_labels is not None else targets.shape[1] - 1
    per_token = [x.view_as(targets)[:, :last] for x in (found if isinstance(found, tuple) else (found,))]
    used = (targets != IGNORED)[:, :last]
    loss = -per_token[0].sum() / (used.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch)
    aux_loss = _balance(out, config, kwargs) if kwargs.get("output_router_logits") else None
    if aux_loss is not None:
        loss = loss + getattr(config, "router_aux_loss_coef", 0.0) * aux_loss
    return FusedCausalLMOutput(
        loss=loss,
        log_probs=per_token[0],
        entropy=per_token[1] if entropy else None,
        label_mask=used,
        aux_loss=aux_loss,
    )


def _whole(parameter: Any) -> Any:
    """FSDP2's shards gathered; the gradient goes back into them."""
    return parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter


def _balance(out: Any, config: Any, kwargs: dict[str, Any]) -> Any:
    """The load-balancing loss of a mixture of experts, as TRL takes it."""
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    experts = getattr(config, "num_experts", None) or config.num_local_experts
    return load_balancing_loss_func(
        out.router_logits, experts, config.num_experts_per_tok, kwargs.get("attention_mask")
    )
