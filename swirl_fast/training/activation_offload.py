"""The inputs of checkpointed layers wait in CPU memory for their backward (training.offload_activations).

Of a checkpointed layer only its input is kept, which for long paths is most of what is kept at all: 2 or 4 bytes * hidden size a token and
layer. It is copied out while its layer computes, and back when the backward reaches it. The numbers are the same, bit for bit. Left out:
to fetch the input of the next layer ahead, so that the backward waits for each copy (8 KiB a token at a hidden size of 4096 in bfloat16).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint


class OffloadedCheckpoint:
    """`torch.utils.checkpoint.checkpoint` without re-entry, for transformers' layers, which hand it their input by position. What the layer
    is called with by name (positions, the packing) belongs to all layers alike and stays."""

    def __init__(self) -> None:
        self._stream: torch.cuda.Stream | None = None  # for copies out

    def __call__(self, layer: Callable[..., Any], *inputs: Any) -> Any:
        with saved_tensors_hooks(
            self._out, self._back
        ):  # of the inputs; inside the layer checkpoint has hooks of its own
            return checkpoint(layer, *inputs, use_reentrant=False)

    def _out(self, tensor: Tensor) -> tuple[torch.device, Tensor]:
        if tensor.device.type != "cuda":
            return tensor.device, tensor.clone()
        if self._stream is None:
            self._stream = torch.cuda.Stream(tensor.device)
        self._stream.wait_stream(torch.cuda.current_stream(tensor.device))
        with torch.cuda.stream(self._stream):
            copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            copy.copy_(tensor, non_blocking=True)
        tensor.record_stream(self._stream)  # its memory is not given to others before the copy is done
        return tensor.device, copy

    def _back(self, packed: tuple[torch.device, Tensor]) -> Tensor:
        device, copy = packed
        if self._stream is not None:
            torch.cuda.current_stream(device).wait_stream(self._stream)
        return copy.to(device, non_blocking=True)
