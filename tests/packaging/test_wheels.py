"""What a wheel carries, and that it works by names from any folder."""

from __future__ import annotations

import email
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from support.paths import ROOT

from swirl_fast import __version__

BUILD = "import sys; from setuptools.build_meta import build_wheel; build_wheel(sys.argv[1])"


def built(source: Path, to: Path, names: list[str]) -> Path:
    """The unpacked wheel of a copy of a source tree, so that nothing is left in the tree itself."""
    for name in names:
        if (source / name).is_dir():
            shutil.copytree(source / name, to / "source" / name, ignore=shutil.ignore_patterns("__pycache__", "data"))
        else:
            shutil.copy(source / name, to / "source" / name)
    command = [sys.executable, "-c", BUILD, str(to)]
    subprocess.run(command, cwd=to / "source", check=True, capture_output=True)
    (wheel,) = to.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(to / "wheel")
    return to / "wheel"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    to = tmp_path_factory.mktemp("built")
    (to / "source").mkdir()
    return built(ROOT, to, ["swirl_fast", "configs", "examples", "setup.py", "pyproject.toml", "README.md", "LICENSE"])


def run(wheel: Path, folder: Path, *code: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(wheel), str(ROOT / "kernels")])}
    return subprocess.run([sys.executable, *code], cwd=folder, env=environment, capture_output=True, text=True)


def test_everything_that_goes_by_a_name_is_inside(wheel: Path, tmp_path: Path) -> None:
    kinds = ("config", "experiment", "template")
    code = f"import json; from swirl_fast.config.shipped import shipped; print(json.dumps([sorted(shipped(k)) for k in {kinds}]))"
    names = json.loads(run(wheel, tmp_path, "-c", code).stdout)
    configs = {path.stem for path in (ROOT / "configs").glob("*.yaml")} | {"sql", "own_data"}
    assert names == [
        sorted(configs),
        ["quick"],
        sorted(path.stem for path in (ROOT / "configs" / "chat_templates").glob("*.jinja")),
    ]
    listed = run(wheel, tmp_path, "-m", "swirl_fast", "configs")
    assert listed.returncode == 0, listed.stderr
    assert str(wheel) in listed.stdout and str(ROOT / "configs") not in listed.stdout
    assert {line.strip() for line in listed.stdout.splitlines() if line.startswith("  ")} >= {
        *configs,
        "quick",
        "chatml",
    }


def test_names_work_from_any_folder(wheel: Path, tmp_path: Path) -> None:
    shown = run(wheel, tmp_path, "-m", "swirl_fast", "config", "--config", "quickstart", "run.name", "training.steps")
    assert shown.returncode == 0 and shown.stdout.startswith("run.name=quickstart\n"), shown.stderr
    code = (
        "from swirl_fast.config import load\n"
        "from swirl_fast.experiments.grid import read_experiment\n"
        "for name in ('sql', 'own_data', 'warm_up'): load(name)\n"
        "print(load(None, ['model.chat_template=chatml']).model.chat_template, len(read_experiment('quick').cells))"
    )
    done = run(wheel, tmp_path, "-c", code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{wheel}/swirl_fast/shipped/configs/chat_templates/chatml.jinja ")
    assert not list(tmp_path.iterdir())


def test_the_licence_is_inside(wheel: Path, tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    names = ["swirl_kernels", "pyproject.toml", "README.md", "LICENSE"]
    for one in (wheel, built(ROOT / "kernels", tmp_path, names)):
        (text,) = one.glob("*.dist-info/licenses/LICENSE")
        assert text.read_bytes() == (ROOT / "LICENSE").read_bytes()


def test_metadata_and_what_lies_beside_it(wheel: Path) -> None:
    (folder,) = wheel.glob("*.dist-info")
    about = email.message_from_string((folder / "METADATA").read_text(encoding="utf-8"))
    assert about["Version"] == __version__ and about["License-Expression"] == "Apache-2.0"
    required = about.get_all("Requires-Dist", [])
    assert f"swirl-kernels=={__version__}" in required and not any("streaming" in one for one in required)
    assert "Typing :: Typed" in about.get_all("Classifier", []) and len(about.get_all("Project-URL", [])) >= 4
    links = re.findall(r"\]\(([^)\s]+)", about.get_payload())
    assert links and [link for link in links if not link.startswith(("https://", "#", "mailto:"))] == []
    assert (wheel / "swirl_fast" / "py.typed").is_file()
    shipped = wheel / "swirl_fast" / "shipped"
    for name in (
        "examples/python_api.ipynb",
        "examples/sql/orders.py",
        "examples/own_data/questions.csv",
        "configs/slurm.sbatch",
    ):
        assert (shipped / name).read_bytes() == (ROOT / name).read_bytes()


def test_both_packages_have_one_version() -> None:
    kernels = (ROOT / "kernels" / "swirl_kernels" / "__init__.py").read_text(encoding="utf-8")
    assert f'__version__ = "{__version__}"' in kernels
    for name in ("CITATION.cff", "CHANGELOG.md"):
        assert __version__ in (ROOT / name).read_text(encoding="utf-8"), name
