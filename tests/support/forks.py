"""Python programs in processes of their own that need not import torch and transformers first, which takes longer than most of them.

They are forks of a server that has imported them (fork_server.py) and has done nothing else; each is a process like any other, with its
own signals, files and end. What is not as after `python …`: the environment is read after the imports, and /proc/PID/cmdline is the
server's.
"""

from __future__ import annotations

import atexit
import functools
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path


@functools.cache
def server(path: str) -> socket.socket:
    """One for each PYTHONPATH and process; it ends with this process."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    command = [sys.executable, str(Path(__file__).with_name("fork_server.py")), str(theirs.fileno())]
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    subprocess.Popen(command, env=environment, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL)
    theirs.close()
    atexit.register(ours.close)
    return ours


class Fork:
    """`python ARGUMENTS` (-m MODULE, -c CODE, or a file), started. Much like subprocess.Popen with pipes and text."""

    def __init__(self, arguments: Sequence[str], env: Mapping[str, str], *, new_session: bool = False) -> None:
        self.args = list(arguments)
        self.returncode: int | None = None
        self._out, self._errors = tempfile.TemporaryFile(), tempfile.TemporaryFile()
        request = {"arguments": self.args, "environment": dict(env), "folder": os.getcwd(), "new_session": new_session}
        self._status, theirs = os.pipe()
        files = [self._out.fileno(), self._errors.fileno(), theirs]
        socket.send_fds(server(env.get("PYTHONPATH", "")), [json.dumps(request).encode()], files)
        os.close(theirs)
        self._said = b""
        self.pid = int(self._line(None) or b"0")
        assert self.pid, "the server of forks has ended; its standard error says why"

    def _line(self, timeout: float | None) -> bytes | None:
        """The next line of the status pipe; None after `timeout` seconds."""
        while b"\n" not in self._said:
            if not select.select([self._status], [], [], timeout)[0]:
                return None
            data = os.read(self._status, 100)
            if not data:
                return b""
            self._said += data
        line, _, self._said = self._said.partition(b"\n")
        return line

    def poll(self) -> int | None:
        return self._ended(0)

    def _ended(self, timeout: float | None) -> int | None:
        if self.returncode is None:
            line = self._line(timeout)
            if line is not None:
                self.returncode = int(line)
                os.close(self._status)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        code = self._ended(timeout)
        if code is None:
            raise subprocess.TimeoutExpired(self.args, timeout or 0)
        return code

    def kill(self) -> None:
        """With SIGKILL, if it has not ended."""
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)
            self.wait()

    def printed(self) -> tuple[str, str]:
        """Standard output and standard error so far."""
        return _text(self._out.fileno()), _text(self._errors.fileno())


def _text(file: int) -> str:
    return os.pread(file, os.fstat(file).st_size, 0).decode()


def run(
    arguments: Sequence[str], env: Mapping[str, str], *, timeout: float, new_session: bool = False
) -> subprocess.CompletedProcess[str]:
    """Waits until it has ended; kills it and raises TimeoutExpired after `timeout` seconds."""
    fork = Fork(arguments, env, new_session=new_session)
    try:
        fork.wait(timeout)
    finally:
        fork.kill()
    return subprocess.CompletedProcess(fork.args, fork.wait(), *fork.printed())


def run_all(
    arguments: Sequence[str], envs: Sequence[Mapping[str, str]], *, timeout: float
) -> subprocess.CompletedProcess[str]:
    """One in each environment, at once. The first exit code that is not 0, and what all of them printed, in order."""
    forks = [Fork(arguments, env) for env in envs]
    deadline = time.monotonic() + timeout
    try:
        while any(fork.poll() is None for fork in forks) and all(not fork.poll() for fork in forks):
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(forks[0].args, timeout)
            time.sleep(0.01)
        code = next((fork.returncode for fork in forks if fork.returncode), 0)
    finally:  # as torchrun ends the others when one fails
        for fork in forks:
            fork.kill()
    printed = [fork.printed() for fork in forks]
    return subprocess.CompletedProcess(
        forks[0].args, code, "".join(out for out, _ in printed), "".join(errors for _, errors in printed)
    )


def ranks_of(size: int, env: Mapping[str, str], port: int) -> list[dict[str, str]]:
    """The part of the environments that torchrun gives `size` ranks on one machine which torch.distributed reads."""
    shared = {**env, "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [
        {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(size)} for rank in range(size)
    ]
