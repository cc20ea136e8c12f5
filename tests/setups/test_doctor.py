"""`doctor`: what it says of this machine, of endpoints that answer, refuse or are not there, and of what is missing."""

from __future__ import annotations

import importlib.metadata
import socket
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from support.runs import attempt, free_port

from swirl_fast import doctor
from swirl_fast.config import load
from swirl_fast.doctor import Finding, examine


def findings(*overrides: str) -> dict[str, Finding]:
    return {finding.about: finding for finding in examine(load(None, list(overrides), files=False))}


def test_a_machine_that_can_run_the_quickstart() -> None:
    done = attempt(["doctor"])
    assert done.returncode == 0, done.stdout
    lines = done.stdout.splitlines()
    assert all(line[:4] in ("ok  ", "--  ") for line in lines)
    assert any(f"torch {importlib.metadata.version('torch')}" in line for line in lines)
    if not torch.cuda.is_available():
        assert any(line.startswith("--  GPU: none: all works on the CPU") for line in lines)
        assert any("flash-attn: is missing" in line and "pip install flash-attn" in line for line in lines)
    assert not any("judge.model.url" in line for line in lines), "only what a config names"


def test_what_is_missing_or_too_old_is_an_error_with_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = ["torch>=99", "a-package-that-is-not-there>=1", "numpy>=1", "peft>=99; extra == 'lora'"]
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: asked)
    monkeypatch.setattr(doctor, "SCARCE", 1 << 40)
    done = attempt(["doctor"])
    assert done.returncode == 1
    assert "NO  torch: is " in done.stdout and "pip install 'torch>=99'" in done.stdout
    assert (
        "NO  a-package-that-is-not-there: is missing; run: pip install 'a-package-that-is-not-there>=1'" in done.stdout
    )
    assert "NO  disk of the runs" in done.stdout and "ok  packages: numpy " in done.stdout
    assert "NO  peft" not in done.stdout, "an extra that was not asked for"


class Server(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response({"/open/v1/models": 200, "/closed/v1/models": 401}[self.path])
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


def test_endpoints_ports_and_interpreters_of_a_config(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    base, nobody = f"http://127.0.0.1:{server.server_port}", f"http://127.0.0.1:{free_port()}/v1"
    try:
        for url, mark, said in (
            (f"{base}/open/v1", "ok", "answers"),
            (f"{base}/closed/v1", "NO", "refuses to answer without a key in OPENAI_API_KEY"),
            (nobody, "NO", "start the server, or mend the address"),
        ):
            found = findings("judge.kind=model", f"judge.model.url={url}")["judge.model.url"]
            assert found.mark == mark and said in found.said
    finally:
        server.shutdown()
        server.server_close()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        found = findings("engine.kind=sglang", f"engine.launch.port={port}", f"engine.launch.python={sys.executable}")
        assert found[f"port {port}"].mark == "--" and "the next free one is taken" in found[f"port {port}"].said
    assert found["SGLang"].mark == "NO" and "pip install sglang" in found["SGLang"].said
    found = findings("engine.kind=sglang", f"engine.launch.python={tmp_path}/none")
    assert found["SGLang"].mark == "NO" and f"{tmp_path}/none does not run" in found["SGLang"].said
    assert findings()["SGLang"].mark == "--", "nothing needs it"
