"""The files for containers, Slurm and SkyPilot, as far as a machine without any of these can tell."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest
import yaml
from support.paths import ROOT

from swirl_fast import cli

DOCKERFILE = ROOT / "docker" / "Dockerfile"
SKY = ROOT / "docker" / "skypilot.yaml"
SLURM = ROOT / "configs" / "slurm.sbatch"
# Of SkyPilot's task YAML, those that may stand at the top.
SKY_FIELDS = {"name", "workdir", "num_nodes", "resources", "envs", "secrets", "file_mounts", "setup", "run", "service"}


def instructions() -> list[tuple[str, str]]:
    text = re.sub(r"\\\n\s*", " ", DOCKERFILE.read_text(encoding="utf-8"))
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    return [(word, rest) for word, _, rest in (line.partition(" ") for line in lines)]


def test_the_dockerfile_names_what_is_there() -> None:
    found = instructions()
    assert {word for word, _ in found} <= {"FROM", "RUN", "ARG", "COPY", "ENV", "WORKDIR", "ENTRYPOINT", "CMD"}
    assert found[0][0] == "FROM" and re.search(r":[\d.]+-", found[0][1]), "a base image with a version"
    copied = [source for word, rest in found if word == "COPY" for source in rest.split()[:-1]]
    assert [source for source in copied if not (ROOT / source).exists()] == []
    assert {"swirl_fast", "kernels", "configs", "examples", "constraints.txt", "setup.py", "README.md"} <= set(copied)
    for word, rest in found:
        if word == "RUN":
            subprocess.run(["bash", "-n", "-c", rest], check=True)
            assert "pip install" not in rest or "--no-cache-dir" in rest
            assert "apt-get install" not in rest or "rm -rf /var/lib/apt/lists/*" in rest


def test_one_version_of_sglang_everywhere() -> None:
    named = {
        version
        for file in (DOCKERFILE, SKY, ROOT / "Makefile", ROOT / "swirl_fast" / "doctor.py")
        for version in re.findall(r"sglang==([\d.]+)", file.read_text(encoding="utf-8"))
    }
    assert len(named) == 1


def test_the_skypilot_file() -> None:
    task = yaml.safe_load(SKY.read_text(encoding="utf-8"))
    assert task.keys() <= SKY_FIELDS
    for script in ("setup", "run"):
        subprocess.run(["bash", "-n", "-c", task[script]], check=True)
    (train,) = re.findall(r"-m swirl_fast (.*)", task["run"])
    options = cli._parsed(train.replace('"$CONFIG"', task["envs"]["CONFIG"]).replace("$settings", "a.b=c").split())
    assert options.stage == "train" and options.config == task["envs"]["CONFIG"]


STAND_INS = {
    "scontrol": 'echo "scontrol $*" >> "$CALLS"; [ "$1" = show ] && printf "node1\\nnode2\\n"; exit 0\n',
    "srun": 'echo "srun $*" >> "$CALLS"; [ -n "$AT_ONCE" ] && exit "$AT_ONCE"\n'
    'trap "exit 1" USR1; echo up >> "$CALLS"; while :; do sleep 0.05; done\n',
}


@pytest.mark.parametrize(("at_once", "code"), [("0", 0), ("3", 3), ("", 1)])
def test_the_slurm_script_is_queued_again_only_when_it_was_asked_to_stop(
    tmp_path: Path, at_once: str, code: int
) -> None:
    """With stand-ins for Slurm's commands: a training that is done, one that fails, one at its time limit, which torchrun ends with 1."""
    for name, text in STAND_INS.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}")
        (tmp_path / name).chmod(0o755)
    calls = tmp_path / "calls"
    environment = {
        **os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "CALLS": str(calls), "AT_ONCE": at_once,
        "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_NNODES": "2", "SLURM_JOB_ID": "7",
    }  # fmt: skip
    job = subprocess.Popen(["bash", str(SLURM), "--config", "gsm8k", "run.name=x"], env=environment)
    deadline = time.monotonic() + 60
    if not at_once:
        while "up" not in (calls.read_text().split() if calls.exists() else ()) and time.monotonic() < deadline:
            time.sleep(0.02)
        job.send_signal(signal.SIGUSR1)
    assert job.wait(timeout=60) == code
    said = calls.read_text().splitlines()
    assert "--rdzv-endpoint node1:29500" in said[1] and said[1].endswith(
        "-m swirl_fast train --config gsm8k run.name=x"
    )
    assert ("scontrol requeue 7" in said) is (not at_once)
