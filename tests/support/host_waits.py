"""What makes the host wait for a device, seen on a CPU, where nothing waits."""

from __future__ import annotations

from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
# Their results' sizes, or numbers of Python, are made of what tensors hold.
READING = (
    aten._local_scalar_dense,
    aten.nonzero,
    aten.masked_select,
    aten.equal,
    aten._unique2,
    aten.unique_consecutive,
)
METHODS = (
    Tensor.tolist,
    Tensor.item,
    Tensor.numpy,
    Tensor.cpu,
    Tensor.__bool__,
    Tensor.__int__,
    Tensor.__float__,
    Tensor.__index__,
)


class Inside(TorchDispatchMode):
    """A dispatch mode that sees what the operators of torch.library do, too, of which torch shows a mode the call alone."""

    def seen(self, func: Any, args: tuple[Any, ...], out: Any) -> None:
        raise NotImplementedError

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        operator = OPDEFS.get(func._schema.name)
        if operator is not None:
            with self, torch.no_grad():
                return operator._init_fn(*args, **kwargs)
        out = func(*args, **kwargs)
        self.seen(func, args, out)
        return out


class _Reads(Inside):
    def __init__(self, found: list[str]) -> None:
        super().__init__()
        self.found = found

    def seen(self, func: Any, args: tuple[Any, ...], out: Any) -> None:
        by_mask = func.overloadpacket in (aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_) and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        )
        if func.overloadpacket in READING or by_mask:
            self.found.append(str(func))


class _Calls(TorchFunctionMode):
    def __init__(self, found: list[str]) -> None:
        super().__init__()
        self.found = found

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in METHODS:
            self.found.append(func.__name__)
        return func(*args, **(kwargs or {}))


class HostWaits:
    """`with HostWaits() as waits: …` lists in waits.found what would wait for a GPU: values of tensors read by Python, results whose
    size hangs on values. Copies between devices do not show."""

    def __init__(self) -> None:
        self.found: list[str] = []
        self._modes = _Reads(self.found), _Calls(self.found)

    def __enter__(self) -> HostWaits:
        for mode in self._modes:
            mode.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for mode in reversed(self._modes):
            mode.__exit__(kind, error, trace)
