"""SGLang servers as child processes: started with a log file, waited for, and ended together with exactly their own children."""

from __future__ import annotations

import asyncio
import fcntl
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO

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
    claimed, among this user's commands on this machine, until the file is closed or the process ends."""
    folder = Path(tempfile.gettempdir()) / f"swirl_fast-ports-{os.getuid()}"
    folder.mkdir(exist_ok=True)
    for port in range(first, 65536):
        claim = open(folder / str(port), "w")
        try:
            fcntl.flock(claim, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with socket.socket() as probe:
                probe.bind((host, port))
        except OSError:
            claim.close()
            continue
        return port, claim
    raise EngineError(f"engine.launch.port={first}: no port from there on is free on {host}")


class ServerProcess:
    """One server, started again as often as needed on the same port. number: its place among this node's servers. claim: on the port, kept
    as long as this object lives."""

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
        if self.key:
            line += ["--api-key", self.key]
        return line + c.flags

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
        shown = ["…" if before == "--api-key" else word for before, word in zip(["", *line], line, strict=False)]
        with self.log.open("ab") as log:
            log.write(f"\n# {time.strftime('%Y-%m-%d %H:%M:%S')} {' '.join(shown)}\n".encode())
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
            if await healthy():  # type: ignore[misc]
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

    def tail(self) -> str:
        return self.log.read_text(errors="replace")[-_LOG_TAIL:] if self.log.is_file() else ""


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
