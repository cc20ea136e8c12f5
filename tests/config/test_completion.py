"""The completion scripts: what a shell offers after a beginning."""

from __future__ import annotations

import contextlib
import io
import shutil
import subprocess

import pytest

from swirl_fast import cli

ASK = """
COMP_WORDS=({words}); COMP_CWORD={last}
_swirl_fast
printf '%s\\n' "${{COMPREPLY[@]}}"
"""


def script(shell: str) -> str:
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert cli.main(["completion", shell]) == 0
    return out.getvalue()


@pytest.fixture(scope="module")
def bash() -> str:
    return script("bash")


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        ("swirl-fast tra", {"train"}),
        ("swirl-fast run --config quick", {"quickstart"}),
        ("swirl-fast run training.learning_r", {"training.learning_rate="}),
        ("swirl-fast train engine.kind = s", {"sglang"}),  # as bash splits it at COMP_WORDBREAKS
        ("swirl-fast train engine.kind=", {"engine.kind=local", "engine.kind=sglang"}),  # as zsh leaves it
        ("swirl-fast evaluate training.liger = t", {"true"}),
        ("swirl-fast dataset --k", {"--kept"}),
        ("swirl-fast experiment qui", {"quick"}),
        ("swirl-fast completion z", {"zsh"}),
        ("swirl-fast doctor --con", {"--config"}),
    ],
)
def test_bash(bash: str, words: str, offered: set[str]) -> None:
    ask = ASK.format(words=words, last=len(words.split()) - 1)
    done = subprocess.run(["bash", "--norc", "-c", bash + ask], capture_output=True, text=True, cwd="/")
    assert set(done.stdout.split()) == offered and not done.stderr, done.stderr


def test_the_other_shells() -> None:
    assert script("zsh").splitlines()[0] == "autoload -U +X bashcompinit && bashcompinit"
    fish = script("fish")
    assert "complete -c swirl-fast -a 'engine.kind=local engine.kind=sglang'" in fish
    for shell in ("zsh", "fish"):
        if shutil.which(shell):
            subprocess.run([shell, "-n", "/dev/stdin"], input=script(shell), text=True, check=True)
