"""training.logprob_workspace_mb: from the settings to linear_logprob, and what it is of its own accord."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.small_models import build

from swirl_fast.comb.tree import SampledState, Trunk, pack
from swirl_fast.config import load
from swirl_fast.models import policy as module
from swirl_fast.models.policy import DeviceComb
from swirl_fast.models.workspace import logprob_workspace
from swirl_fast.ranks import Ranks
from swirl_fast.training.build import make_policy


@pytest.mark.parametrize("setting, given", [("0", None), ("0.01", 0.01)])
def test_the_setting_reaches_the_logprobs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, setting: str, given: float | None
) -> None:
    build("llama", torch.float32).save_pretrained(tmp_path)
    config = load(None, [f"model.path={tmp_path}", f"training.logprob_workspace_mb={setting}"])
    whole, seen = module.linear_logprob, []

    def watched(*arguments: Any, **options: Any) -> Any:
        seen.append(options["workspace_mb"])
        return whole(*arguments, **options)

    monkeypatch.setattr(module, "linear_logprob", watched)
    tokens = np.arange(1, 10, dtype=np.int32)
    comb = DeviceComb.of(pack([Trunk(tokens, (SampledState(6, (tokens[:3],), (0,)),))]))
    make_policy(config, Ranks(0, 1, torch.device("cpu")))(comb).sum().backward()
    assert seen == [given]


@pytest.mark.parametrize(
    "free_gib, expected", [(0, 256), (2.4, 256), (5, 512), (9.9, 512), (10, 1024), (80, 8192), (120, 8192)]
)
def test_a_tenth_of_what_is_free_cut_to_a_power_of_two(free_gib: float, expected: float) -> None:
    assert logprob_workspace(int(free_gib * 2**30)) == expected
