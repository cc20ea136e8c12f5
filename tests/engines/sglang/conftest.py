"""Fake servers (fake_sglang.py), and engines that attach to them or start them."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from support.fake_sglang import Fake, FakeServer
from support.sglang_cases import (
    free_port,
    interpreter,
)
from support.small_models import build

from swirl_fast.config import EngineConfig, LaunchConfig, WeightSyncConfig
from swirl_fast.engines.sglang import launch as sglang_launch
from swirl_fast.engines.sglang import servers as sglang_servers
from swirl_fast.engines.sglang.engine import SGLangEngine


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sglang_servers, "HEALTH_SECONDS", 1.0)
    monkeypatch.setattr(sglang_servers, "MONITOR_SECONDS", 0.1)
    monkeypatch.setattr(sglang_launch, "STOP_SECONDS", 1.0)
    warnings.filterwarnings("ignore", message="SGLang server .* is (dropped|started again|given up)")


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("served")
    build("llama", torch.float32).save_pretrained(folder)
    return folder


@pytest.fixture
def serve(model: Path) -> Iterator[Callable[..., FakeServer]]:
    """Starts fake servers in this process."""
    servers: list[FakeServer] = []

    def start(**options: object) -> FakeServer:
        server = FakeServer(Fake(**{"model_path": str(model), **options}))
        threading.Thread(target=lambda: server.serve_forever(poll_interval=0.01), daemon=True).start()
        servers.append(server)
        return server

    yield start
    for server in servers:
        server.fake.closing.set()
        server.shutdown()
        server.server_close()


@pytest.fixture
def attach(model: Path, tmp_path: Path) -> Iterator[Callable[..., SGLangEngine]]:
    """Engines of servers that run already."""
    engines: list[SGLangEngine] = []

    def make(*servers: FakeServer | str, sync: dict | None = None, engine: dict | None = None, **settings: object):
        urls = [server if isinstance(server, str) else server.url for server in servers]
        config = EngineConfig(
            kind="sglang",
            urls=urls,
            weight_sync=WeightSyncConfig(**{"timeout": 2.0, **(sync or {})}),
            **{"timeout": 2.0, "retries": 2, **settings},
        )
        engines.append(SGLangEngine(config, model, tmp_path / "engine", **(engine or {})))
        return engines[-1]

    yield make
    for one in engines:
        one.close()


@pytest.fixture
def launch(model: Path, tmp_path: Path) -> Iterator[Callable[..., SGLangEngine]]:
    """Engines that start fake servers themselves."""
    engines: list[SGLangEngine] = []

    def make(
        script: str = "", sync: dict | None = None, engine: dict | None = None, launch: dict | None = None, **settings
    ) -> SGLangEngine:
        config = EngineConfig(
            kind="sglang",
            weight_sync=WeightSyncConfig(**{"timeout": 5.0, **(sync or {})}),
            launch=LaunchConfig(
                **{
                    "servers": 2,
                    "port": free_port(),
                    "python": str(interpreter(tmp_path / "python", script)),
                    "startup_timeout": 120.0,
                    **(launch or {}),
                }
            ),
            **{"timeout": 5.0, "retries": 3, "dtype": "float32", **settings},
        )
        engines.append(SGLangEngine(config, model, tmp_path / "engine", **(engine or {})))
        return engines[-1]

    yield make
    for one in engines:
        one.close()
