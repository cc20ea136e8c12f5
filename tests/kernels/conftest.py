"""Every tensor made by torch.empty arrives full of NaN, so that an output or workspace read before it is written
shows. Without a CUDA device Triton's kernels are interpreted."""

import os
from collections.abc import Iterator

import pytest
import torch

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what deterministic algorithms ask of cuBLAS, read once
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # triton reads it when a kernel's module is imported


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    was = torch.are_deterministic_algorithms_enabled()
    filled = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(was)
    torch.utils.deterministic.fill_uninitialized_memory = filled


@pytest.fixture(autouse=True)
def backend_by_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SWIRL_KERNELS_BACKEND", raising=False)
