"""The SGLang servers of one process: started or attached, chosen for a trajectory, watched, started again or dropped.

All coroutines run in the engine's own event loop, so that nothing here needs a lock.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import sys
import time
import warnings
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

from swirl_fast.config import EngineConfig, LaunchConfig
from swirl_fast.engines.engine import EngineError
from swirl_fast.engines.sglang import memory
from swirl_fast.engines.sglang.client import Client, ServerFailure, ServerInfo, StaleWeights
from swirl_fast.engines.sglang.launch import ServerProcess, claim_port

T = TypeVar("T")

MONITOR_SECONDS = 2.0  # between two looks at the processes of launched servers
HEALTH_SECONDS = 30.0  # until a server without a sign of life counts as hung; SGLang itself takes up to 20 to tell
REMEMBERED = 8192  # trajectories whose server is kept in mind


class Slots:
    """Room for so many sequences at a time."""

    def __init__(self, count: int) -> None:
        self._free = self._count = count
        self._changed = asyncio.Condition()

    async def take(self, count: int) -> int:
        """Waits for room; a request for more than there is gets all of it. Returns what is to be given back."""
        count = min(count, self._count)
        async with self._changed:
            await self._changed.wait_for(lambda: self._free >= count)
            self._free -= count
        return count

    async def give(self, count: int) -> None:
        async with self._changed:
            self._free += count
            self._changed.notify_all()


@dataclass(eq=False)
class Server:
    client: Client
    slots: Slots
    process: ServerProcess | None = None  # where this process started it
    info: ServerInfo | None = None
    out: str | None = None  # why it is not asked; None: it is
    restarts: int = 0
    in_a_row: int = 0  # of these restarts, those since it last took an update of weights
    mending: asyncio.Task[None] | None = field(default=None, repr=False)
    load: int = 0  # tokens of the trajectories it was given lately

    @property
    def url(self) -> str:
        return self.client.url


class Servers:
    """weights: the folder or name that the servers serve now, None where they are in no folder; tag: the name of these weights.
    Whoever changes the servers' weights sets both. urls: of servers that run already; leader and
    key: as in SGLangEngine."""

    def __init__(
        self,
        config: EngineConfig,
        folder: Path,
        weights: str,
        tag: str,
        seed: int,
        leader: bool,
        urls: Sequence[str],
        key: str = "",
    ) -> None:
        self.config, self.leader = config, leader
        self.weights: str | None = weights
        self.tag = tag
        self._first_weights = weights
        self._home: OrderedDict[str, Server] = OrderedDict()  # trajectory -> its server
        self._watching: asyncio.Task[None] | None = None
        self.asleep = False  # their memory is released, or on its way back
        self._under_way: asyncio.Future[None] | None = None  # of a change of that
        self._turn = int(os.environ.get("LOCAL_RANK", "0"))  # processes that share servers begin with different ones
        key = key or os.environ.get(config.api_key_env, "").strip()
        if not urls:  # a server takes commands from whoever may ask it, on a machine of many users too
            key = key or secrets.token_urlsafe(32)
        self.key = key
        self.all: list[Server] = []
        direct = not config.urls  # started by a command of ours, on this node
        if urls:
            self.all = [Server(Client(url, key, config.timeout, direct), Slots(config.max_sequences)) for url in urls]
        else:
            port = config.launch.port
            launch = _with_flags(config)
            for number in range(config.launch.servers):
                port, claim = claim_port(port, config.launch.host)
                log = folder / f"server-{number}.log"
                process = ServerProcess(launch, number, port, config.dtype, config.max_sequences, seed, key, log, claim)
                client = Client(process.url, key, config.timeout, direct)
                self.all.append(Server(client, Slots(config.max_sequences), process))
                port += 1

    @property
    def up(self) -> list[Server]:
        return [server for server in self.all if server.out is None]

    async def open(self) -> None:
        """Until all of them can be asked. Raises EngineError, with the end of its log, when one cannot."""
        for server in self.all:
            if server.process is not None:
                server.process.start(self._first_weights, self.tag)
        await gather(self._first_contact(server) for server in self.all)
        self._watching = asyncio.create_task(self._watch())

    async def close(self) -> None:
        if self._watching is not None:
            self._watching.cancel()
        for server in self.all:
            if server.mending is not None:
                server.mending.cancel()
            if server.process is not None:
                await asyncio.to_thread(server.process.stop)
            await server.client.close()

    async def home(self, key: str, avoid: Server | None = None) -> Server:
        """A trajectory's own server, else the one with the least to do; waits while all are being started again."""
        while True:
            if (home := self._home.get(key)) is not None and home.out is None and home is not avoid:
                self._home.move_to_end(key)
                return home
            up = [server for server in self.up if server is not avoid] or self.up
            if up:
                turn = self._turn
                home = min(up, key=lambda server: (server.load, (self.all.index(server) - turn) % len(self.all)))
                self._home[key] = home
                if len(self._home) > REMEMBERED:
                    self._home.popitem(last=False)
                return home
            pending = [
                server.mending for server in self.all if server.mending is not None and not server.mending.done()
            ]
            if not pending:
                raise EngineError(
                    f"no SGLang server is left:\n{self.reasons()}\nStart the command again when they run; it goes on from what is stored"
                )
            await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)

    def forget(self) -> None:
        """With new weights all caches are empty, and the trajectories that come are best spread again."""
        self._home = OrderedDict()

    async def attempt(self, work: Callable[[Server], Awaitable[T]], key: str, sequences: int) -> T:
        """Does `work` on the trajectory's server, after a failure on another one if there is one. Raises EngineError after
        `engine.retries` further tries."""
        failures: list[str] = []
        failed: Server | None = None
        while True:
            server = await self.home(key, failed)
            taken = await server.slots.take(sequences)
            try:
                if server.out is None:
                    return await work(server)
            except ServerFailure as error:
                failures.append(str(error))
                failed = server
                await self._suspect(server, error)
                if len(failures) > self.config.retries:
                    listed = "\n".join(f"  {failure}" for failure in failures)
                    raise EngineError(
                        f"a request failed {len(failures)} times (engine.retries={self.config.retries}):\n{listed}\n"
                        "Start the command again when the servers are well; it goes on from what is stored"
                    ) from None
                await asyncio.sleep(min(0.1 * 2 ** len(failures), 5.0))
            finally:
                await server.slots.give(taken)

    async def each(self, servers: Sequence[Server], work: Callable[[Server], Awaitable[None]]) -> list[Server]:
        """Does `work` on all of them at once and takes out those that fail. Returns the others."""
        done = await asyncio.gather(*(work(server) for server in servers), return_exceptions=True)
        good = []
        for server, result in zip(servers, done, strict=True):
            if result is None:
                good.append(server)
            elif isinstance(result, ServerFailure | EngineError | ValueError):
                self._take_out(server, str(result))
            else:
                raise result
        return good

    async def rejoin(self, took: Sequence[Server], load: Callable[[Server], Awaitable[None]]) -> None:
        """After an update of weights, which the servers `took`: the others get them by a new start or by `load`. Raises EngineError when
        no server is left."""
        for server in self.all:
            if server in took:
                server.in_a_row = 0
                continue
            self._take_out(server, server.out or "it was started again during an update of the weights")
            if server.process is not None:
                if server.mending is not None:
                    server.mending.cancel()  # it would come up with the weights before
                    server.mending = None
                self.mend(server, str(server.out))
            elif self.weights is not None and await self._answers(server):
                server.out = None
                await self.each([server], load)
        if not self.up and not any(self._comes_back(server) for server in self.all):
            raise EngineError(f"no SGLang server took the new weights:\n{self.reasons()}")

    async def revive(self) -> None:
        """Before an update that leaves no folder: servers that are out come back, to be given the weights with the others."""
        if self.weights is None:
            out = [server for server in self.all if server.out is not None]
            await gather(
                self._restart(server, server.out or "", self._first_weights, self.tag)
                for server in out
                if server.process
            )
            for server in out:
                if server.process is None and await self._answers(server):
                    server.out = None

    def mend(self, server: Server, reason: str) -> None:
        """Takes a server out, and begins to start it again where that is this process's to do and the weights are at hand."""
        if server.in_a_row > self.config.max_restarts:
            return  # it is given up
        self._take_out(server, reason)
        if self.asleep or (server.mending is not None and not server.mending.done()):
            return  # where the memory is lent it could not start: `resume` sees to it
        loop = asyncio.get_running_loop()
        if server.process is not None and self.weights is not None:
            warnings.warn(f"SGLang server {server.url} is started again: {reason}", stacklevel=2)
            server.mending = loop.create_task(self._restart(server, reason, self.weights, self.tag))
        elif server.process is not None:
            server.out = f"{reason}; it waits for the next update, since engine.weight_sync.snapshot is false"
        elif not self.leader and not self.config.urls:
            server.mending = loop.create_task(self._await_leader(server, reason))
        else:
            warnings.warn(f"SGLang server {server.url} is dropped: {reason}", stacklevel=2)

    async def mend_all(self) -> None:
        """Begins to start again whatever was taken out without it."""
        for server in self.all:
            if server.out is not None and server.process is not None:
                self.mend(server, server.out)

    async def release(self) -> None:
        """All of them release their memory. One that is being started again is waited for; one of ours that cannot is ended, and comes
        back with `resume`. Raises EngineError for one that is not ours and keeps its memory."""
        self.asleep = True
        await self._undivided(self._release())

    async def resume(self, parts: tuple[str, ...]) -> None:
        """They take these parts again (memory.py); with the cache, the last, those of ours that died meanwhile are started again."""
        await self._undivided(self._resume(parts))

    async def give_back(self, load: Callable[[Server, str, str], Awaitable[None]]) -> None:
        """Servers that are not ours must not be left without their memory: they get it, and the weights before, or at least those that
        they were started with. load: makes a server read a folder, and names what it read."""
        if self._under_way is not None:
            await asyncio.wait([self._under_way])
        own = memory.bare(self.tag)

        async def restore(server: Server) -> None:
            if server.process is not None or not await memory.resume(
                server.client, memory.ALL, self.config.weight_sync.timeout
            ):
                return
            try:
                await load(server, str(self.weights), own)
            except (ServerFailure, EngineError, ValueError):
                assert server.info is not None
                await load(server, server.info.model_path, "default")

        for server in self.all:
            try:
                await restore(server)
            except (ServerFailure, EngineError, ValueError) as error:
                warnings.warn(
                    f"SGLang server {server.url} may be left without weights ({error}): start it again", stacklevel=2
                )

    async def _undivided(self, work: Awaitable[None]) -> None:
        """To its end, even where the caller is interrupted: nobody could tell what a server lacks then."""
        self._under_way = asyncio.ensure_future(work)
        await asyncio.shield(self._under_way)

    async def _release(self) -> None:
        if starting := [server.mending for server in self.all if server.mending and not server.mending.done()]:
            await asyncio.wait(starting)
        timeout = self.config.weight_sync.timeout
        asked = self.up
        did = await self.each(asked, lambda server: memory.release(server.client, self.tag, timeout))
        for server in asked:
            if server in did:
                continue
            if server.process is not None:
                await asyncio.to_thread(server.process.stop)
            elif await self._answers(server):
                raise EngineError(
                    f"engine.share_gpu: {server.url} does not release its memory: {server.out}. Start it again, with --enable-memory-saver"
                )
        self.tag = memory.lacking(self.tag, memory.ALL)

    async def _resume(self, parts: tuple[str, ...]) -> None:
        timeout = self.config.weight_sync.timeout

        async def one(server: Server) -> None:
            await memory.resume(server.client, parts, timeout)

        await self.each(self.up, one)
        name, lacks = memory.bare(self.tag), memory.parts_lacking(self.tag)
        rest = tuple(part for part in lacks if part not in parts)
        self.tag = memory.lacking(name, rest)
        if not rest:
            self.asleep = False
            await self.mend_all()

    def _comes_back(self, server: Server) -> bool:
        """Whether one that is out is being started again, or will be when the memory is there."""
        due = self.asleep and server.process is not None and server.in_a_row <= self.config.max_restarts
        return due or server.mending is not None

    def reasons(self) -> str:
        return "\n".join(f"  {server.url}: {server.out}" for server in self.all)

    def _take_out(self, server: Server, reason: str) -> None:
        server.out = reason
        for key in [key for key, home in self._home.items() if home is server]:
            self._home.pop(key, None)

    async def _first_contact(self, server: Server) -> None:
        if server.process is not None:
            await self._await_up(server, self.tag)
        try:
            server.info = await server.client.info()
        except ServerFailure as error:
            raise EngineError(f"engine.urls: {error}. Is an SGLang server running there?") from None

    async def _await_up(self, server: Server, tag: str) -> None:
        """tag: of the weights it was started with. Another command may have taken the port meanwhile, and its server answers there."""
        process = server.process
        assert process is not None
        shown = sys.stderr.isatty()

        def progress(seconds: float) -> None:
            if shown:
                print(
                    f"\rstarting SGLang on port {process.port}: {seconds:.0f} s ", end="", file=sys.stderr, flush=True
                )

        async def ours() -> bool:
            if not await server.client.healthy(10.0):
                return False
            try:
                return (await server.client.info()).weight_version == tag
            except (ServerFailure, ValueError):
                return False

        await process.wait(ours, progress)
        if shown:
            print("\r" + " " * 50 + "\r", end="", file=sys.stderr, flush=True)

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(MONITOR_SECONDS)
            for server in self.up:
                if server.process is not None and not server.process.alive:
                    self.mend(server, "its process ended")

    async def _suspect(self, server: Server, error: ServerFailure) -> None:
        """After a failed request: is it the server?"""
        if server.out is not None:
            return
        if isinstance(error, StaleWeights) or (server.process is not None and not server.process.alive):
            self.mend(server, str(error))
        elif not await server.client.healthy(HEALTH_SECONDS) and server.out is None:
            self.mend(server, f"{error}; and it gives no sign of health")

    async def _restart(self, server: Server, reason: str, weights: str, tag: str) -> None:
        """Until it is up. A start that fails counts as a restart too: a device's memory may not be free yet."""
        process = server.process
        assert process is not None
        while True:
            server.restarts += 1
            server.in_a_row += 1
            tail = process.tail()
            await asyncio.to_thread(process.stop)
            if server.in_a_row > self.config.max_restarts:
                limit = self.config.max_restarts
                server.out = f"{reason}; engine.max_restarts={limit} are used up. The end of {process.log}:\n{tail}"
                warnings.warn(f"SGLang server {server.url} is given up: {server.out}", stacklevel=2)
                return
            try:
                process.start(weights, tag)
                await self._await_up(server, tag)
            except EngineError as error:
                reason = str(error).partition(" The end of ")[0]
            else:
                server.out = None
                return

    async def _answers(self, server: Server) -> bool:
        """Whether it can be given weights. It may be paused, and then its check of health, which generates, fails."""
        try:
            await server.client.info(HEALTH_SECONDS)
        except (ServerFailure, EngineError, ValueError):
            return False
        return True

    async def _await_leader(self, server: Server, reason: str) -> None:
        """The process that leads this node starts the server again; until then this process asks it which weights it serves."""
        end = time.monotonic() + self.config.launch.startup_timeout
        while time.monotonic() < end:
            await asyncio.sleep(1.0)
            try:
                if (await server.client.info()).weight_version == self.tag:
                    server.out = None
                    return
            except (ServerFailure, EngineError):
                continue
        server.out = f"{reason}; not up again in engine.launch.startup_timeout={self.config.launch.startup_timeout:g} s"


def _with_flags(config: EngineConfig) -> LaunchConfig:
    """How to start a server that can do what the settings ask of it."""
    flags = [
        ("--enable-memory-saver", config.share_gpu),
        ("--enable-return-routed-experts", config.return_routed_experts),
    ]
    return replace(config.launch, flags=[*config.launch.flags, *(flag for flag, wanted in flags if wanted)])


async def gather(work: Iterable[Awaitable[T]]) -> list[T]:
    """Results in order; the first failure cancels the others."""
    tasks = [asyncio.ensure_future(one) for one in work]
    try:
        return list(await asyncio.gather(*tasks))
    except BaseException:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        raise
