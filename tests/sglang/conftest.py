"""Real SGLang servers on the CPU, with a small model made here. Only with the interpreter that has SGLang in $SGLANG_PYTHON, as
`make test-sglang` sets it; elsewhere these tests are skipped."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.real_servers import CONTEXT, HERE, PYTHON, launched, start_engine

from swirl_fast.engines.sglang.engine import SGLangEngine

if PYTHON:  # other processes attach to the servers, and a judge asks one of them
    os.environ["SGLANG_API_KEY"] = os.environ["OPENAI_API_KEY"] = "of-these-tests-only"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if PYTHON:
        return
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.skip(reason="needs a real SGLang: run `make test-sglang`"))


@pytest.fixture(scope="session")
def served_model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with a longer context."""
    folder = tmp_path_factory.mktemp("served_model")
    shutil.copytree(tiny_model, folder, dirs_exist_ok=True)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": CONTEXT}))
    return folder


@pytest.fixture(scope="session")
def server_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """run/engine/server-0.log in it is the server's log."""
    return tmp_path_factory.mktemp("server")


@pytest.fixture(scope="session")
def server(served_model: Path, server_folder: Path) -> Iterator[SGLangEngine]:
    """One server for all tests that do not break theirs; they attach to its URL, and each brings its own weights."""
    engine = start_engine(server_folder, served_model, *launched())
    yield engine
    engine.close()
    engine.close()
