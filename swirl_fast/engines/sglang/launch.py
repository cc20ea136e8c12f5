"""SGLang servers as child processes: started with a log file, waited for, and ended together with exactly their own children."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import os
import re
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any

import yaml

from swirl_fast.config import LaunchConfig
from swirl_fast.engines.engine import EngineError

# Linux ends the server when this process dies in whatever way; SGLang's own children then end themselves.
_DIE_WITH_PARENT = (
    "import ctypes, os, sys; ctypes.CDLL(None).prctl(1, 9); os.getppid() == int(sys.argv[1]) or sys.exit(1); "
    "os.execvp(sys.argv[2], sys.argv[2:])"
)
STOP_SECONDS = 5.0  # for a server to end itself when asked to
_LOG_TAIL = 2000  # characters of the log shown when a server does not come up


def claim_port(first: int, host: str) -> tuple[int, IO[str]]:
    """The first port from `first` on that nobody listens on and no server is about to: one that starts listens seconds later. The port is
    claimed, among this user's commands on this machine, until the file is closed or the process ends. Raises EngineError where none is
    free, or the folder of the claims is another user's."""
    folder = private_folder()
    for port in range(first, 65536):
        claim = open(folder / str(port), "a", opener=_private, encoding="utf-8")
        try:
            fcntl.flock(claim, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with socket.socket() as probe:
                probe.bind((host, port))
        except OSError:
            claim.close()
            continue
        return port, claim
    raise EngineError(f"engine.launch.port={first}: no port from there on is free on {host}")


def private_folder() -> Path:
    """This user's folder for claims of ports and keys of servers, which nobody else can read or prepare. Raises EngineError for one that is
    a link or another user's: everybody may write where it lies."""
    folder = Path(tempfile.gettempdir()) / f"swirl_fast-ports-{os.getuid()}"
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
        raise EngineError(
            f"{folder} is a link, a file or another user's folder, and this command would write there: remove it, or set TMPDIR to "
            "a folder of your own"
        )
    if stat.S_IMODE(found.st_mode) & 0o077:  # of an earlier version
        folder.chmod(0o700)
    return folder


def _private(path: str, flags: int) -> int:
    """For `open`: a file that only this user reads, and no link to another."""
    try:
        return os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise EngineError(f"{path}: {error.strerror}; it must be a file of this user, and no link: remove it") from None


class ServerProcess:
    """One server, started again as often as needed on the same port. number: its place among this node's servers. key: that it asks for;
    it is given in a file, which is gone when the server is up. claim: on the port, kept as long as this object lives."""

    def __init__(
        self,
        config: LaunchConfig,
        number: int,
        port: int,
        dtype: str,
        max_sequences: int,
        seed: int,
        key: str,
        log: Path,
        claim: IO[str] | None = None,
    ) -> None:
        self._claim = claim
        self.config, self.number, self.port, self.log = config, number, port, log
        self.dtype, self.max_sequences, self.seed, self.key = dtype, max_sequences, seed, key
        self._process: subprocess.Popen[bytes] | None = None
        self._hidden = 0  # bytes of the log from its beginning that hold no key
        self._ending = threading.Lock()

    @property
    def url(self) -> str:
        host = "127.0.0.1" if self.config.host in ("0.0.0.0", "127.0.0.1") else self.config.host
        return f"http://{host}:{self.port}"

    @property
    def pid(self) -> int | None:
        return None if self._process is None else self._process.pid

    @property
    def alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def command(self, model: str, weight_version: str) -> list[str]:
        import torch

        c = self.config
        cpu = not torch.cuda.is_available()
        backend = c.attention_backend or ("torch_native" if cpu else "")
        line = [c.python or sys.executable, "-m", "sglang.launch_server"]
        line += ["--model-path", model, "--weight-version", weight_version, "--dtype", self.dtype]
        line += ["--host", c.host, "--port", str(self.port), "--tp-size", str(c.gpus_per_server)]
        line += ["--mem-fraction-static", str(c.memory_fraction), "--max-running-requests", str(self.max_sequences)]
        line += ["--random-seed", str(self.seed + self.number), "--enable-cache-report", "--sleep-on-idle"]
        if backend:
            line += ["--attention-backend", backend]
        if cpu:
            line += ["--device", "cpu", "--sampling-backend", "pytorch", "--grammar-backend", "none"]
        return [*line, *_without_config(_words(c.flags)), "--config", str(self._settings)]

    @property
    def _settings(self) -> Path:
        return private_folder() / f"{self.port}.yaml"

    def _write_settings(self) -> None:
        """Everybody sees a process's arguments, so the key is not among them. SGLang reads one such file: what the user's says is in it."""
        settings = _config_of(_words(self.config.flags)) | ({"api-key": self.key} if self.key else {})
        self._settings.unlink(missing_ok=True)
        with open(self._settings, "x", opener=_private, encoding="utf-8") as file:
            json.dump(settings, file)  # which is YAML too

    def _hide_key(self) -> None:
        """SGLang writes all of its settings into its log when it starts. The key in it is overwritten, with as many letters."""
        key = self.key.encode()
        if not key or not self.log.is_file():
            return
        with self.log.open("r+b") as log:
            log.seek(self._hidden)
            text = log.read()
            at = text.find(key)
            while at >= 0:
                log.seek(self._hidden + at)
                log.write(b"*" * len(key))
                at = text.find(key, at + len(key))
            self._hidden += max(0, len(text) - len(key))  # the rest may hold its beginning

    def environment(self) -> dict[str, str]:
        import torch

        c = self.config
        # torchrun's variables would make the server join the trainer's process group
        own = {
            name: value
            for name, value in os.environ.items()
            if name not in _TORCHRUN and not name.startswith("TORCHELASTIC_")
        }
        if torch.cuda.is_available():
            visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
            first = self.number * c.gpus_per_server
            numbers = (c.gpus or range(first + c.gpus_per_server))[first : first + c.gpus_per_server]
            names = visible.split(",") if visible else None
            if names and max(numbers) >= len(names):
                raise EngineError(
                    f"CUDA_VISIBLE_DEVICES={visible} shows {len(names)} GPUs, and server {self.number} needs number {max(numbers)} of "
                    f"them, counted from 0 (engine.launch.servers={c.servers}, gpus_per_server={c.gpus_per_server}, gpus={c.gpus}): "
                    "start fewer servers, or show more GPUs"
                )
            own["CUDA_VISIBLE_DEVICES"] = ",".join(names[n] if names else str(n) for n in numbers)
        else:
            own |= {"SGLANG_USE_CPU_ENGINE": "1", "TORCHDYNAMO_DISABLE": "1"}
        return own | c.environment

    def start(self, model: str, weight_version: str) -> None:
        self.log.parent.mkdir(parents=True, exist_ok=True)
        line = self.command(model, weight_version)
        self._write_settings()
        with open(self.log, "ab", opener=lambda path, flags: os.open(path, flags, 0o600)) as log:
            log.write(f"\n# {time.strftime('%Y-%m-%d %H:%M:%S')} {' '.join(line)}\n".encode())
            log.flush()
            wrapper = [sys.executable, "-c", _DIE_WITH_PARENT, str(os.getpid())] if sys.platform == "linux" else []
            try:
                self._process = subprocess.Popen(
                    [*wrapper, *line],
                    env=self.environment(),
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,  # a group of its own: stop() ends it whole, and Ctrl-C does not reach it
                )
            except OSError as error:
                raise EngineError(f"engine.launch.python={self.config.python!r}: {error}") from None

    async def wait(self, healthy: Callable[[], object], progress: Callable[[float], None]) -> None:
        """Until `healthy()` (a coroutine function) is true. progress: called with the seconds waited so far. Raises EngineError with the
        end of the log."""
        start = time.monotonic()
        while True:
            up = await healthy()  # type: ignore[misc]
            self._hide_key()
            if up:
                self._settings.unlink(missing_ok=True)
                return
            waited = time.monotonic() - start
            if not self.alive:
                assert self._process is not None
                what = f"ended with code {self._process.returncode} while starting"
                hint = ""
                if re.search(r"No module named '?sglang\b", self.tail()):
                    hint = " Install SGLang, or name the interpreter that has it in engine.launch.python."
                raise EngineError(f"SGLang server {self.number} {what}.{hint} The end of {self.log}:\n{self.tail()}")
            if waited > self.config.startup_timeout:
                self.stop()
                raise EngineError(
                    f"SGLang server {self.number} did not answer in engine.launch.startup_timeout={self.config.startup_timeout:g} s. "
                    f"The end of {self.log}:\n{self.tail()}"
                )
            progress(waited)
            await asyncio.sleep(0.5)

    def stop(self) -> None:
        """Ends the server and the processes it started, and no others: with SIGTERM, and after 5 seconds with SIGKILL.

        Of two calls at a time both return when it is done: until then its port is taken.
        """
        with self._ending:
            process, self._process = self._process, None
            if process is None:
                return
            for number, patience in ((signal.SIGTERM, STOP_SECONDS), (signal.SIGKILL, 10.0)):
                if process.poll() is None:
                    _signal_group(process.pid, number)
                    try:
                        process.wait(patience)
                    except subprocess.TimeoutExpired:
                        continue
            # its children too, which outlive it for a moment, or for good where it was killed
            _signal_group(process.pid, signal.SIGKILL)
            self._hide_key()
            self._settings.unlink(missing_ok=True)

    def tail(self) -> str:
        self._hide_key()
        return self.log.read_text(encoding="utf-8", errors="replace")[-_LOG_TAIL:] if self.log.is_file() else ""


def _words(flags: Sequence[str]) -> list[str]:
    """With `--config=FILE` as the two words that argparse makes of it."""
    return [word for flag in flags for word in (flag.split("=", 1) if flag.startswith("--config=") else [flag])]


def _config_of(flags: Sequence[str]) -> dict[str, Any]:
    """What the YAML file holds that --config names among engine.launch.flags. Raises EngineError for one that is none."""
    if "--config" not in flags:
        return {}
    path = "".join(flags[flags.index("--config") + 1 :][:1])
    try:
        settings = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise EngineError(
            f"engine.launch.flags: --config {path}: {error}; give a YAML file of SGLang's settings"
        ) from None
    if not isinstance(settings, dict):
        raise EngineError(f"engine.launch.flags: --config {path} holds no table of SGLang's settings")
    return {name: value for name, value in settings.items() if str(name).replace("_", "-") != "api-key"}


def _without_config(flags: Sequence[str]) -> list[str]:
    return [flag for before, flag in zip(["", *flags], flags, strict=False) if "--config" not in (before, flag)]


def _signal_group(group: int, number: signal.Signals) -> None:
    try:
        os.killpg(group, number)
    except (ProcessLookupError, PermissionError):  # nobody left of it
        pass


_TORCHRUN = {
    "RANK",
    "LOCAL_RANK",
    "GROUP_RANK",
    "ROLE_RANK",
    "ROLE_NAME",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "GROUP_WORLD_SIZE",
    "ROLE_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
}
