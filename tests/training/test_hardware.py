import os

import pytest
import torch

from swirl_fast.ranks import Ranks
from swirl_fast.training.hardware import hardware


@pytest.mark.parametrize("size, of_a_node, nodes", [(1, None, 1), (16, "8", 2), (3, "2", 2)])
def test_ranks_and_nodes_are_those_of_torchrun(
    size: int, of_a_node: str | None, nodes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    if of_a_node:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", of_a_node)
    found = hardware(Ranks(0, size, torch.device("cpu")))
    assert found.pop("processor") and found == {"cores": os.cpu_count(), "ranks": size, "nodes": nodes}
