"""Machines of their own on this one: Linux network namespaces, joined by a cable (a veth pair)."""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from support.processes import runs
from support.runs import environment

CARD = "veth0"  # of each node
_numbers = itertools.count()


def ip(*words: str) -> str:
    done = subprocess.run(["ip", *words], capture_output=True, text=True, timeout=60)
    if done.returncode:
        raise OSError(f"ip {' '.join(words)}: {done.stderr.strip()}")
    return done.stdout


def why_not() -> str:
    """Why there can be no namespaces here; empty where there can."""
    if sys.platform != "linux" or os.geteuid() != 0 or not shutil.which("ip"):
        return "network namespaces need Linux, root and iproute2"
    try:
        with nodes(Path()):
            return ""
    except OSError as error:
        return str(error)


class Node:
    """One end of the cable, with a disk of its own: the folder in which its commands start."""

    def __init__(self, name: str, address: str, folder: Path) -> None:
        self.name, self.address, self.folder = name, address, folder
        self._started: list[subprocess.Popen[bytes]] = []

    def start(self, command: Sequence[str], log: Path) -> subprocess.Popen[bytes]:
        """What it prints goes to `log`."""
        self.folder.mkdir(exist_ok=True)
        env = {**environment(), "GLOO_SOCKET_IFNAME": CARD}
        with log.open("wb") as file:
            process = subprocess.Popen(
                ["ip", "netns", "exec", self.name, *command],
                cwd=self.folder,
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
            )
        self._started.append(process)
        return process

    def torchrun(self, ranks: int, endpoint: Node, *script: str, log: Path) -> subprocess.Popen[bytes]:
        """`ranks` processes of two nodes' group, which meets at `endpoint`."""
        line = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", str(ranks)]
        line += ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"{endpoint.address}:29500", "--rdzv-id", "nodes"]
        # all nodes have this machine's name, by which torchrun would tell who is who
        line += ["--local-addr", self.address, "--rdzv-conf", f"is_host={str(self is endpoint).lower()}"]
        return self.start([*line, *script], log)

    def processes(self) -> list[int]:
        """Ids of all that run on this node."""
        return [int(word) for word in ip("netns", "pids", self.name).split()]

    def cut_off(self) -> None:
        ip("-n", self.name, "link", "set", CARD, "down")

    def end(self) -> None:
        """Kills what runs on the node, and takes it away."""
        deadline = time.monotonic() + 60
        with contextlib.suppress(OSError):  # of a name that is not there
            while (left := self.processes()) and time.monotonic() < deadline:
                for process in left:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(process, signal.SIGKILL)
                time.sleep(0.05)
            ip("netns", "del", self.name)
        for process in self._started:
            process.wait()


@contextlib.contextmanager
def nodes(base: Path) -> Iterator[tuple[Node, Node]]:
    """Two of them; their names hold this process's id. Those of a process that was killed are taken away first. Raises OSError where this
    machine allows none."""
    for name, process in re.findall(r"^(swirl-(\d+)-\S+)", ip("netns", "list"), re.MULTILINE):
        if not runs(int(process)):
            Node(name, "", base).end()
    number = f"{os.getpid()}-{next(_numbers)}"
    made = [Node(f"swirl-{number}-{i}", f"10.231.7.{i + 1}", base / f"node{i}") for i in range(2)]
    try:
        for node in made:
            ip("netns", "add", node.name)
        ip("link", "add", CARD, "netns", made[0].name, "type", "veth", "peer", "name", CARD, "netns", made[1].name)
        for node in made:
            ip("-n", node.name, "addr", "add", f"{node.address}/24", "dev", CARD)
            for card in ("lo", CARD):
                ip("-n", node.name, "link", "set", card, "up")
        yield made[0], made[1]
    finally:
        for node in made:
            node.end()
