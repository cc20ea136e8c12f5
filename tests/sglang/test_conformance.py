"""A real SGLang server owes what every engine owes, with each way of bringing it new weights."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from support.engine_conformance import EngineConformance
from support.real_servers import attached, plain, start_engine
from transformers import PreTrainedModel

from swirl_fast.engines.sglang.engine import SGLangEngine


@pytest.fixture(scope="module", params=["disk", "tensor", "distributed"])
def method(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def model(served_model: Path, method: str) -> PreTrainedModel:
    return plain(served_model)


@pytest.fixture(scope="module")
def engine(
    server: SGLangEngine,
    served_model: Path,
    model: PreTrainedModel,
    method: str,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[SGLangEngine]:
    """Attached anew for each method: the server is made to read the first weights again."""
    folder = tmp_path_factory.mktemp(method)
    engine = start_engine(
        folder, served_model, *attached(*server.urls), f"engine.weight_sync.method={method}", f"run.name={method}"
    )
    yield engine
    engine.close()
    engine.close()


class TestSGLangEngine(EngineConformance):
    pass
