"""`train` before there is anything to train on: at once, without torch, with the commands that come first."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from support.collected import collected

from swirl_fast import cli

CODE = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        assert name not in ("torch", "transformers"), name
sys.meta_path.insert(0, Refuse())
from swirl_fast import cli
sys.exit(cli.main(sys.argv[1:]))
"""


def test_the_first_command_of_all_is_answered_without_torch(tmp_path: Path) -> None:
    stage = ["train", f"run.folder={tmp_path}", "run.name=r"]
    done = subprocess.run([sys.executable, "-c", CODE, *stage], capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("swirl-fast train: run.name=r: ") and done.stderr.count("\n") == 1
    assert "has no collection yet: run collect, judge and filter first" in done.stderr
    assert not (tmp_path / "r").exists()


def test_a_collection_without_shards_names_what_is_left(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = collected(tmp_path)
    assert cli.main(["train", *run]) == 2
    assert "shards holds no shards yet: run judge and filter first, in this order" in capsys.readouterr().err
    assert cli.main(["train", *run, f"training.shards={tmp_path / 'none'}"]) == 2
    assert "manifest.json does not exist; give a folder that filter wrote" in capsys.readouterr().err
