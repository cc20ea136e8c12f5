"""Weights in shared memory, as a server on the same machine reads them; what a server does with them is in tests/sglang."""

from __future__ import annotations

import base64
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from support.paths import ROOT

from swirl_fast.engines.sglang import weights
from swirl_fast.engines.sglang.weights import read_weights, shapes_of, tied_names

TRAINER = """
import torch

from swirl_fast.engines.sglang.weights import pickle_handles
torch.manual_seed(0)
bucket = [("a", torch.randn(3, 5)), ("b", torch.randn(7).bfloat16())]
print(*pickle_handles(bucket, 2), flush=True)
input()
"""


def test_weights_in_shared_memory_are_read_and_the_trainers_output_ends_with_it() -> None:
    """While a server that has read them lives on, torch's keeper of shared files does too; it must not keep pipes open."""
    root = ROOT
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(root), str(root / "kernels")])}
    trainer = subprocess.Popen(
        [sys.executable, "-c", TRAINER],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert trainer.stdout is not None
    payloads = trainer.stdout.readline().split()
    assert len(payloads) == 2
    received = [pickle.loads(base64.b64decode(payload)) for payload in payloads]
    torch.manual_seed(0)
    wanted = {"a": torch.randn(3, 5), "b": torch.randn(7).bfloat16()}
    for bucket in received:
        assert {name: tensor.dtype for name, tensor in bucket} == {"a": torch.float32, "b": torch.bfloat16}
        assert all(torch.equal(tensor, wanted[name]) for name, tensor in bucket)
    trainer.communicate("done\n", timeout=120)
    assert trainer.returncode == 0


def test_a_keeper_that_answers_late_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any other failure is one at once."""
    late, bucket = "Shared memory manager connection has timed out", [("a", torch.ones(2))]
    for failures, word, calls in ((3, late, 4), (99, late, weights.KEEPER_TRIES), (1, "no space", 1)):
        asked = []

        def pickled(bucket: weights.Bucket, failures: int = failures, word: str = word, asked: list = asked) -> bytes:
            asked.append(bucket)
            if len(asked) <= failures:
                raise RuntimeError(word)
            return b"handles"

        monkeypatch.setattr(weights, "_pickled", pickled)
        if failures == 3:
            assert weights.pickle_handles(bucket, 1) == [base64.b64encode(b"handles").decode()]
        else:
            with pytest.raises(RuntimeError, match=word):
                weights.pickle_handles(bucket, 1)
        assert len(asked) == calls


def test_an_output_layer_may_be_left_out_where_it_is_tied_and_only_there(tmp_path: Path) -> None:
    """Llama's own default is untied, and a config.json may leave defaults out: its output layer must come."""
    for tied in (None, False, True):
        config = {"model_type": "llama"} if tied is None else {"model_type": "llama", "tie_word_embeddings": tied}
        (tmp_path / "config.json").write_text(json.dumps(config))
        assert tied_names(tmp_path) == ({"lm_head.weight"} if tied else set()), tied


def test_the_index_names_the_files_that_hold_the_weights(tmp_path: Path) -> None:
    """Mistral's folders hold them a second time, as consolidated.safetensors with other names."""
    for number, name in enumerate(("a", "b"), 1):
        save_file({name: torch.full((number,), 1.0)}, tmp_path / f"model-0000{number}-of-00002.safetensors")
    save_file({"other": torch.zeros(3)}, tmp_path / "consolidated.safetensors")
    files = {name: f"model-0000{number}-of-00002.safetensors" for number, name in enumerate(("a", "b"), 1)}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    assert shapes_of(tmp_path) == {"a": (1,), "b": (2,)} == {name: tuple(x.shape) for name, x in read_weights(tmp_path)}
