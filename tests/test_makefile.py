"""The rules of the Makefile that a newcomer meets, with stand-ins for python and pip: nothing is installed."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from support.paths import ROOT

PYTHON = """#!/bin/sh
[ "$1" = -c ] && exit 0
echo "$@" >> calls
mkdir -p "$3/bin" && touch "$3/bin/python" && chmod +x "$3/bin/python"
[ -e no-pip ] && { echo "ensurepip is not available" >&2; exit 1; }
printf '#!/bin/sh\\necho pip "$@" >> calls\\n' > "$3/bin/pip" && chmod +x "$3/bin/pip"
"""


def make(target: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["make", target, "PYTHON=./system-python"], capture_output=True, text=True)


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
@pytest.mark.parametrize(
    ("folder", "needs"), [(".venv", "setup.py"), (".venv-sglang", "tests/sglang/requirements.txt")]
)
def test_an_environment_that_was_left_without_pip_is_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: str, needs: str
) -> None:
    """As on Debian, before its package python3-venv is installed."""
    for name in ("Makefile", "constraints.txt", "setup.py", "kernels/pyproject.toml", "tests/sglang/requirements.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    Path("system-python").write_text(PYTHON)
    Path("system-python").chmod(0o755)
    Path("no-pip").touch()
    first = make(f"{folder}/installed")
    assert first.returncode != 0 and "ensurepip is not available" in first.stderr
    assert Path(folder, "bin", "python").exists()
    Path("no-pip").unlink()
    second = make(f"{folder}/installed")
    assert second.returncode == 0, second.stderr
    calls = Path("calls").read_text().splitlines()
    assert calls[:2] == [f"-m venv {folder}"] * 2 and calls[2].startswith("pip install")
    Path(needs).touch()  # newer than what is installed: the environment itself stays
    assert make(f"{folder}/installed").returncode == 0
    assert Path("calls").read_text().count("-m venv") == 2
