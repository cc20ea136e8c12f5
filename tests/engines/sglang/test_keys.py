"""Servers started here: who may ask them, and what other users of the machine can see or prepare."""

from __future__ import annotations

import os
import stat
import sys
import tempfile
import urllib.error
from pathlib import Path

import pytest
from support.sglang_cases import FAKE, MANY, ask, assert_from, free_port, original, pids_of

from swirl_fast.config import EngineConfig, LaunchConfig
from swirl_fast.engines.engine import EngineError
from swirl_fast.engines.sglang import launch as sglang_launch
from swirl_fast.engines.sglang.engine import SGLangEngine
from swirl_fast.engines.sglang.launch import claim_port, private_folder


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory for temporary files; the folder of the claims in it is made by the test."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder / f"swirl_fast-ports-{os.getuid()}"


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_claims_are_in_a_folder_of_this_user_alone(temporary: Path) -> None:
    port, claim = claim_port(free_port(), "127.0.0.1")
    assert mode(temporary) == 0o700 and mode(temporary / str(port)) == 0o600
    with claim:
        other, second = claim_port(port, "127.0.0.1")
        second.close()
        assert other > port
    again, claim = claim_port(port, "127.0.0.1")
    claim.close()
    assert again == port, "a claim ends with its file"
    temporary.chmod(0o777)
    assert mode(private_folder()) == 0o700, "an earlier version left it open"


@pytest.mark.parametrize("link", ["of a claim", "of the folder", "a file"])
def test_a_link_that_somebody_prepared_is_not_followed(temporary: Path, tmp_path: Path, link: str) -> None:
    precious = tmp_path / "precious"
    port = free_port()
    if link == "of a claim":
        precious.write_text("all of my work", encoding="utf-8")
        temporary.mkdir(mode=0o700)
        (temporary / str(port)).symlink_to(precious)
    elif link == "of the folder":
        precious.mkdir()
        (precious / str(port)).write_text("all of my work", encoding="utf-8")
        temporary.symlink_to(precious)
    else:
        temporary.write_text("all of my work", encoding="utf-8")
    with pytest.raises(EngineError, match="remove it"):
        claim_port(port, "127.0.0.1")
    kept = {"of a claim": precious, "of the folder": precious / str(port), "a file": temporary}[link]
    assert kept.read_text(encoding="utf-8") == "all of my work"


def test_a_claim_keeps_what_is_in_its_file(temporary: Path) -> None:
    port = free_port()
    private_folder()
    (temporary / str(port)).write_text("text", encoding="utf-8")
    claim_port(port, "127.0.0.1")[1].close()
    assert (temporary / str(port)).read_text(encoding="utf-8") == "text"


def test_a_folder_of_another_user_is_refused(temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uid = os.getuid()
    temporary.with_name(f"swirl_fast-ports-{uid + 1}").mkdir(mode=0o700)
    monkeypatch.setattr(os, "getuid", lambda: uid + 1)  # the folder is uid's
    with pytest.raises(EngineError, match="another user's folder.*remove it, or set TMPDIR"):
        claim_port(30000, "127.0.0.1")


def test_every_launch_has_a_random_key_that_nobody_else_sees(
    launch, model: Path, tmp_path: Path, temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SGLANG_API_KEY", raising=False)
    script = f'env > "{tmp_path}/env"; ls -l "{temporary}" > "{tmp_path}/files"; exec {sys.executable} {FAKE} "$@"'
    engine = launch(script)
    key = engine.key
    assert len(key) >= 32
    assert_from(engine.generate(MANY), MANY, original(model), 0)
    for url in engine.urls:
        for wrong in ("", "guessed"):
            with pytest.raises(urllib.error.HTTPError, match="401"):
                ask(url, "/model_info", key=wrong)
        assert ask(url, "/model_info", key=key)
    for pid in pids_of(engine):
        assert key.encode() not in Path(f"/proc/{pid}/cmdline").read_bytes()
    listed = (tmp_path / "files").read_text(encoding="utf-8").splitlines()[1:]
    assert any(".yaml" in line for line in listed) and all(line.startswith("-rw-------") for line in listed)
    assert not list(temporary.glob("*.yaml")), "the file is gone when the server has read it"
    logs = list((tmp_path / "engine").glob("*.log"))
    assert len(logs) == 2
    for log in logs:
        assert mode(log) == 0o600 and "api_key='****" in log.read_text(encoding="utf-8")
    for path in tmp_path.rglob("*"):
        assert not path.is_file() or key.encode() not in path.read_bytes(), path
    assert launch(script).key != key


def test_a_server_that_does_not_start_shows_no_key(launch, temporary: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("SGLANG_API_KEY", "very-secret")
    with pytest.raises(EngineError, match="ended with code 3") as error:
        launch('while [ "$1" != --config ]; do shift; done; cat "$2"; exit 3', launch={"servers": 1})
    assert "very-secret" not in str(error.value) and "*" * 11 in str(error.value)
    assert b"very-secret" not in (tmp_path / "engine" / "server-0.log").read_bytes()
    assert not list(temporary.glob("*.yaml"))


def test_a_process_that_does_not_lead_asks_with_the_leaders_key(launch, model: Path, tmp_path: Path) -> None:
    leader = launch()
    config = EngineConfig(kind="sglang", timeout=5.0)
    urls, folder = leader.urls, tmp_path / "follower"
    follower = SGLangEngine(config, model, folder, leader=False, urls=urls, key=leader.key)
    try:
        assert_from(follower.generate(MANY), MANY, original(model), 0)
    finally:
        follower.close()


@pytest.mark.parametrize("form", ["--config {}", "--config={}"])
def test_a_file_of_settings_among_the_flags_is_read_with_the_key(form: str, tmp_path: Path, temporary: Path) -> None:
    more = tmp_path / "more.yaml"
    more.write_text("kv-cache-dtype: fp8_e5m2\napi_key: theirs\n", encoding="utf-8")
    config = LaunchConfig(flags=["--a", "1", *form.format(more).split(), "--b"])
    process = sglang_launch.ServerProcess(config, 0, 7, "float32", 1, 0, "ours", tmp_path / "log")
    line = process.command("m", "v")
    assert line[-5:] == ["--a", "1", "--b", "--config", str(temporary / "7.yaml")] and line.count("--config") == 1
    process._write_settings()
    assert (temporary / "7.yaml").read_text(encoding="utf-8") == '{"kv-cache-dtype": "fp8_e5m2", "api-key": "ours"}'
    more.write_text("- 1", encoding="utf-8")
    with pytest.raises(EngineError, match="--config .*more.yaml holds no table"):
        process._write_settings()
