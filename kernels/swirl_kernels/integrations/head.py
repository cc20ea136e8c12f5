"""What stands between a causal language model's last hidden state and its logits: weight, bias, scale and soft-cap.

Legend: N rows, H hidden size, V vocabulary.

    logits = cap(logit_scale (hidden weight^T + bias)),    cap(x) = softcap tanh(x / softcap), or x

transformers has no common name for these: they stand in the forward of each family. Here every name known from a config is a candidate,
and the model itself decides: it is run once on hidden states made here, small and large, in place of its own, and a candidate must
give the logits that come out. A family that does something else is refused, not computed wrongly.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from swirl_kernels.linear_logprob import linear_logprob

# Granite divides by what HyperCLOVA multiplies by: of each number its reciprocal is a candidate too.
SCALES = (
    "logit_scale",
    "logits_scaling",
    "lm_head_multiplier",
    "output_multiplier",
)  # Cohere; Granite; Falcon-H1; Muse
SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap")  # Gemma, nanochat; RecurrentGemma
SIZES = (
    1.0,
    30.0,
    1000.0,
)  # largest |hidden weight^T| of the rows: a cap of 50 bends the second by 10 % and ends the third
TOLERANCE = {
    torch.float64: 1e-5,
    torch.float32: 1e-4,
    torch.float16: 1e-2,
    torch.bfloat16: 4e-2,
}  # of the largest logit


@dataclass(frozen=True)
class OutputHead:
    """weight: [V, H], bias: [V] or None, the model's own parameters. softcap, logit_scale: as linear_logprob takes them."""

    weight: Tensor
    bias: Tensor | None
    softcap: float | None
    logit_scale: float

    def logprob(self, hidden: Tensor, targets: Tensor, **options: Any) -> Any:
        """linear_logprob(hidden, …) through this head; options are its own (temperature, entropy, …)."""
        return linear_logprob(
            hidden,
            self.weight,
            targets,
            bias=self.bias,
            softcap=self.softcap,
            logit_scale=self.logit_scale,
            **options,
        )


def head_of(model: Any) -> OutputHead:
    """The output head of a transformers model for causal language modelling, PEFT's wrapper or not.

    Runs the model once on three tokens without gradients, in evaluation mode, and leaves it as it was. Call it before the model is
    sharded (FSDP, ZeRO-3, tensor parallelism): it reads whole weights.

    Raises ValueError (what was found, and what to do) for a model without a plain linear output layer, for one whose adapter changes
    that layer, for sharded or unloaded weights, and for logits that are anything else than the formula above.
    """
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    name = type(model).__name__
    layer = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if not isinstance(layer, nn.Linear):
        raise ValueError(
            f"{name} has {'no output layer' if layer is None else f'{type(layer).__name__} as its output layer'}; head_of needs a plain "
            "linear one (an adapter on it must be merged first)"
        )
    weight, bias = layer.weight, layer.bias
    backbone = model.base_model
    if weight.dim() != 2 or type(weight.data) is not Tensor or weight.is_meta or not weight.is_floating_point():
        raise ValueError(
            f"{name}: the output layer's weight is {type(weight.data).__name__} of shape {tuple(weight.shape)}, {weight.dtype} on "
            f"{weight.device}; call head_of before the model is sharded or quantised, and after it is loaded"
        )
    if backbone is model:
        raise ValueError(f"{name} has no backbone beside its output layer (base_model is the model itself)")
    probe, logits = _probe(model, backbone, weight, bias)
    plain = F.linear(probe, weight.detach(), None if bias is None else bias.detach()).float()
    if logits.shape != plain.shape:
        raise ValueError(f"{name}: logits of shape {tuple(logits.shape)} from a weight of shape {tuple(weight.shape)}")
    scales, softcaps = _named(model.config, SCALES), _named(model.config, SOFTCAPS)
    candidates = itertools.product(dict.fromkeys((1.0, *scales, *(1 / s for s in scales))), (None, *softcaps))
    errors = {candidate: _error(plain, logits, *candidate) for candidate in candidates}
    (scale, softcap), error = min(errors.items(), key=lambda item: item[1])
    if not error <= TOLERANCE.get(weight.dtype, 1e-4):
        ratio = float((logits[0].double() * plain[0]).sum() / plain[0].double().square().sum())
        raise ValueError(
            f"{name}: its logits are not scale * (hidden weight^T + bias) under a soft-cap with any number of its config (closest: "
            f"scale {scale:g}, soft-cap {softcap}, off by {error:.1e} of the largest logit; small logits are {ratio:.5g} times the "
            "product). Use the model's own logits with selective_logprob"
        )
    return OutputHead(weight, bias, softcap, scale)


def _named(config: Any, names: tuple[str, ...]) -> list[float]:
    """The positive numbers under these names in the config of the text model."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    found = [getattr(text, name, None) for name in names]
    return [float(x) for x in found if isinstance(x, int | float) and not isinstance(x, bool) and x > 0]


def _error(plain: Tensor, logits: Tensor, scale: float, softcap: float | None) -> float:
    """Largest difference in a row over the row's largest logit, of all rows the largest; inf where something is not finite."""
    expected = scale * plain
    if softcap is not None:
        expected = softcap * torch.tanh(expected / softcap)
    error = (expected - logits).abs().amax(1) / expected.abs().amax(1)
    return float(error.nan_to_num(nan=torch.inf, posinf=torch.inf).amax())


def _probe(model: nn.Module, backbone: nn.Module, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Hidden states [3, H] in the weight's dtype, of SIZES, and the model's logits [3, V] of them in fp32."""
    noise = torch.randn(len(SIZES), weight.shape[1], generator=torch.Generator().manual_seed(0)).to(weight.device)
    tops = F.linear(noise.to(weight.dtype), weight.detach()).abs().amax(1, keepdim=True).float()
    if not (tops > 0).all():
        raise ValueError(
            f"{type(model).__name__}: the output layer's weight is zero or not finite; load the weights first"
        )
    probe = (noise / tops * torch.tensor(SIZES, device=weight.device)[:, None]).to(weight.dtype)
    replaced = []

    def replace(_module: nn.Module, _inputs: Any, output: Any) -> Any:
        replaced.append(True)
        states = output[0]
        new = probe.to(states.device, states.dtype)[None]
        if isinstance(output, tuple):
            return (new, *output[1:])
        output["last_hidden_state"] = new
        return output

    tokens = torch.arange(1, len(SIZES) + 1, device=model.get_input_embeddings().weight.device)[None]  # type: ignore[operator]
    # accelerate lays its mixed precision around the forward and keeps the one that it found.
    forward = getattr(model, "_original_forward", model)
    with _evaluation(model), torch.no_grad(), torch.autocast(weight.device.type, enabled=False):
        hook = backbone.register_forward_hook(replace)
        try:
            logits = forward(input_ids=tokens % weight.shape[0], use_cache=False).logits
        finally:
            hook.remove()
    if len(replaced) != 1:
        raise ValueError(
            f"{type(model).__name__} called its base_model {len(replaced)} times in a forward; head_of knows models that take their "
            "logits from one call of it"
        )
    return probe, logits[0].to(weight.device).float()


@contextmanager
def _evaluation(model: nn.Module) -> Iterator[None]:
    """In evaluation mode, every module back in its own afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
