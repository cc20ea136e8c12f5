"""Linear layers in oneDNN's blocked layout: faster on x86 CPUs, at the price of a second copy of their weights."""

from __future__ import annotations

import platform
from functools import partial

import torch
from torch.backends import mkldnn


def can_pack_linear_layers(device: torch.device) -> bool:
    return device.type == "cpu" and platform.machine() in ("x86_64", "AMD64") and mkldnn.is_available()


def pack_linear_layers(model: torch.nn.Module, rows: int) -> None:
    """Gives every linear layer a copy of its weight in oneDNN's blocked layout, to be renewed when weights change.

    rows: how many input rows the layout is chosen for. The layers of a 135M model (no head, 2 Zen 4 cores) take 0.55 of the
    time with 16 rows, 0.71 with 64 and 0.88 with 512; in bfloat16 0.63, 0.78 and 0.93.
    """
    supported = {torch.float32} | ({torch.bfloat16} if torch.ops.mkldnn._is_mkldnn_bf16_supported() else set())
    for module in model.modules():
        if type(module) is torch.nn.Linear and module.weight.dtype in supported:
            packed = torch.ops.mkldnn._reorder_linear_weight(module.weight.detach(), rows)
            module.forward = partial(_packed_linear, packed, module.bias)  # type: ignore[method-assign]


def _packed_linear(weight: torch.Tensor, bias: torch.Tensor | None, x: torch.Tensor) -> torch.Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
