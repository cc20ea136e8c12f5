"""engine.return_routed_experts: what a server of a model with experts sends with its tokens."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from support.fake_sglang import ROUTED, routed
from support.sglang_cases import MANY, assert_from, original, request
from support.small_models import SHAPE

from swirl_fast.config import ConfigError, load
from swirl_fast.engines import load_engine
from swirl_fast.engines.sglang.client import AnswerError

RETURNED = {"return_routed_experts": True}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("experts")
    config = transformers.MixtralConfig(**SHAPE, num_local_experts=8, num_experts_per_tok=2)
    transformers.MixtralForCausalLM(config).to(torch.float32).save_pretrained(folder)
    return folder


def test_completions_have_the_experts_that_drew_their_tokens(serve, attach, model: Path) -> None:
    server = serve(routes=2)
    engine = attach(server, **RETURNED)
    asked = [replace(one, routed_experts=i > 0) for i, one in enumerate(MANY)]
    results = engine.generate(asked)
    assert_from(results, asked, original(model), 0)
    for one, completions in zip(asked, results, strict=True):
        for completion in completions:
            if not one.routed_experts:
                assert completion.routed_experts is None
                continue
            tokens = completion.tokens.tolist()
            wanted = np.array(routed(tokens, 2, len(tokens)), np.uint8).reshape(len(tokens), 2, 2)
            assert completion.routed_experts.dtype == np.uint8 and np.array_equal(completion.routed_experts, wanted)
    starts = {
        e["body"].get("routed_experts_start_len")
        for e in server.fake.of("/generate")
        if e["body"]["sampling_params"]["max_new_tokens"]
    }
    assert starts == {None, len(MANY[1].tokens) - 1}, "from the prompt's last token on"


@pytest.mark.parametrize("how", ROUTED)
def test_an_answer_with_other_experts_is_an_error(serve, attach, how: str) -> None:
    server = serve(routes=2)
    engine = attach(server, **RETURNED)
    one = request(3)
    server.fake.misbehave("/generate", how)
    with pytest.raises(AnswerError, match="routed_experts is"):
        engine.generate([replace(one, routed_experts=True)])


def test_what_cannot_return_them_is_refused(serve, attach, model: Path, tmp_path: Path) -> None:
    server = serve()
    with pytest.raises(ConfigError, match=f"{server.url} runs without --enable-return-routed-experts"):
        attach(server, **RETURNED)
    engine = attach(server)
    one = request()
    with pytest.raises(ValueError, match="request 0 asks for routed experts: set engine.return_routed_experts=true"):
        engine.generate([replace(one, routed_experts=True)])
    settings = ["engine.kind=sglang", f"engine.urls=[{server.url}]", f"model.path={model}", f"run.folder={tmp_path}"]
    with pytest.raises(ConfigError, match="runs without --enable-return-routed-experts"):
        load_engine(load(None, [*settings, "training.replay_routing=true"]), "cpu")
