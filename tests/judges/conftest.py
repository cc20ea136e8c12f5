"""No test of a judge sees this machine's keys or proxies, nor waits as long as for a real server."""

import pytest

from swirl_fast.judges.model import endpoint as endpoint_module


@pytest.fixture(autouse=True)
def surroundings(monkeypatch):
    for name in ("NO_PROXY", "no_proxy", "http_proxy"):
        monkeypatch.delenv(name, raising=False)
    # nobody listens there: a server on this machine is asked directly
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setattr(endpoint_module, "BACKOFF", 0.01)
