"""One update of all servers' weights: checked, in buckets, as one transaction, and back to the weights before where it breaks off."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Coroutine, Iterable
from concurrent.futures import Future, wait
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from swirl_fast.config import WeightSyncConfig
from swirl_fast.engines.engine import EngineError
from swirl_fast.engines.sglang.client import CONTROL_TIMEOUT, ServerFailure, StaleWeights
from swirl_fast.engines.sglang.launch import claim_port
from swirl_fast.engines.sglang.servers import Server, Servers
from swirl_fast.engines.sglang.weights import (
    Broadcast,
    Bucket,
    Snapshot,
    buckets,
    match_weights,
    pickle_handles,
    read_weights,
    shapes_of,
    tied_names,
)

Submit = Callable[[Coroutine[Any, Any, Any]], "Future[Any]"]


class WeightUpdater:
    """source: the model's Hugging Face folder, which says what its weights are called. folder: of snapshots. submit: begins a
    coroutine in the servers' event loop. Its methods block, and are called from another thread than the loop's: reading the
    tensors may be a collective call."""

    def __init__(
        self, servers: Servers, config: WeightSyncConfig, source: Path, dtype: torch.dtype, folder: Path, submit: Submit
    ) -> None:
        self._servers, self._config, self._submit = servers, config, submit
        self._source, self._folder = source, folder.absolute()
        self._dtype, self._shapes, self._tied = dtype, shapes_of(source), tied_names(source)
        self._group: Broadcast | None = None
        self._group_of = ""  # the servers in it
        self._groups = 0

    def update(self, named_tensors: Iterable[tuple[str, Tensor]], version: int, tag: str) -> None:
        """Raises KeyError and ValueError as the protocol says; EngineError when no server took the weights."""
        servers, config = self._servers, self._config
        tensors = match_weights(named_tensors, self._shapes, self._tied)
        stream = buckets(tensors, int(config.bucket_mb * 2**20), self._dtype)
        keeps = config.method == "disk" or config.snapshot
        snapshot = Snapshot(self._folder, f"v{version}", self._source) if keeps else None
        if config.method == "disk":
            assert snapshot is not None
            for bucket in stream:
                snapshot.add(bucket)
            path = str(snapshot.finish())
            took = self._run(servers.each(servers.up, lambda server: self.load(server, path, tag)))
        else:
            self._run(servers.revive())
            took = self._push(stream, tag, snapshot)
        servers.weights, servers.tag = str(snapshot.target) if snapshot is not None else None, tag
        self._run(servers.rejoin(took, lambda server: self._reload(server, str(servers.weights), tag)))
        if snapshot is not None:
            snapshot.prune()

    @property
    def pushes(self) -> bool:
        """Whether weights are sent to the servers, which then need not see any folder of ours."""
        return self._config.method != "disk" and bool(self._shapes)

    def give(self, tag: str) -> list[Server]:
        """Sends the weights of the model's own folder to all servers. Returns those that took them; EngineError as `update`."""
        stream = buckets(read_weights(self._source), int(self._config.bucket_mb * 2**20), self._dtype)
        return self._push(stream, tag, None)

    async def load(self, server: Server, path: str, tag: str) -> None:
        """Makes a server read a folder, and looks that it did. A server that cannot goes on with the weights it has."""
        control, timeout = server.client.control, self._config.timeout
        try:
            await control("/pause_generation", {"mode": "retract"}, timeout)
            body = {"model_path": path, "weight_version": tag, "flush_cache": True}
            await control("/update_weights_from_disk", body, timeout)
        except BaseException:
            with contextlib.suppress(ServerFailure, EngineError, ValueError):
                await control("/continue_generation", {}, min(timeout, CONTROL_TIMEOUT))
            raise
        await control("/continue_generation", {}, timeout)
        await self._verify(server, tag)

    def close(self) -> None:
        if self._group is not None:
            group, self._group = self._group, None

            async def leave(server: Server) -> None:
                await server.client.control(
                    "/destroy_weights_update_group", {"group_name": group.name}, CONTROL_TIMEOUT
                )

            self._run(self._servers.each(self._servers.up, leave))
            group.leave()

    def _run(self, work: Coroutine[Any, Any, Any]) -> Any:
        return self._submit(work).result()

    def _push(self, stream: Iterable[Bucket], tag: str, snapshot: Snapshot | None) -> list[Server]:
        """Returns the servers that took it all."""
        up = self._servers.up
        try:
            up = self._run(self._servers.each(up, self._begin))
            if self._config.method == "distributed" and up:
                self._join(up)
            for bucket in stream:
                if snapshot is not None:
                    snapshot.add(bucket)
                if self._config.method == "tensor":
                    up = self._run(self._servers.each(up, partial(self._hand_over, bucket)))
                elif up:
                    up = self._broadcast(up, bucket, snapshot is not None)
            if snapshot is not None:
                snapshot.finish()
            return self._run(self._servers.each(up, lambda server: self._end(server, tag)))
        except BaseException:
            self.close()
            self._run(self._servers.each(self._servers.up, self._undo))
            self._run(self._servers.mend_all())
            raise

    async def _begin(self, server: Server) -> None:
        """From here on the server has a name that nobody asks for: half an update must never pass for the weights before, not even when
        this command is killed and started again."""
        timeout = self._config.timeout
        await server.client.control("/pause_generation", {"mode": "retract"}, timeout)
        try:
            await server.client.exists("/begin_weight_update", {}, timeout)  # from 0.5.21 on
        except ServerFailure:
            await self._abandon(server)
            await server.client.exists("/begin_weight_update", {}, timeout)
        await self._rename(server, f"{self._servers.tag}, being updated")

    async def _end(self, server: Server, tag: str) -> None:
        timeout = self._config.timeout
        await server.client.exists("/end_weight_update", {}, timeout)
        await server.client.control("/flush_cache", {}, timeout)
        await self._rename(server, tag)
        await server.client.control("/continue_generation", {}, timeout)
        await self._verify(server, tag)

    async def _rename(self, server: Server, tag: str) -> None:
        body = {"new_version": tag, "abort_all_requests": False}
        await server.client.control("/update_weight_version", body, self._config.timeout)

    async def _undo(self, server: Server) -> None:
        """Nobody knows what a server holds after half an update: it reads the weights before, or is taken out."""
        if self._servers.weights is None:
            raise ServerFailure("an update of its weights broke off, and those before are in no folder")
        await self._reload(server, self._servers.weights, self._servers.tag)

    async def _reload(self, server: Server, path: str, tag: str) -> None:
        await self._abandon(server)
        await self.load(server, path, tag)

    async def _abandon(self, server: Server) -> None:
        """Ends an update that broke off, else the server refuses the next one. It refuses this where none is open."""
        try:
            await server.client.exists("/end_weight_update", {}, self._config.timeout)
        except ServerFailure:
            pass

    async def _verify(self, server: Server, tag: str) -> None:
        info = await server.client.get("/model_info")
        served = info.get("weight_version") if isinstance(info, dict) else None
        if served != tag:
            raise StaleWeights(
                f"{server.url} says that it serves weights {server.client.shown(served)!r} after an update to {tag!r}"
            )

    async def _hand_over(self, bucket: Bucket, server: Server) -> None:
        assert server.info is not None
        body = {"serialized_named_tensors": pickle_handles(bucket, server.info.tensor_parallel), "flush_cache": False}
        await server.client.control("/update_weights_from_tensor", body, self._config.timeout)

    def _broadcast(self, up: list[Server], bucket: Bucket, snapshot: bool) -> list[Server]:
        """Returns the servers that took it: all or none, since when one of them does not, the others wait in vain. They then get the
        weights from the snapshot; without one this raises EngineError."""
        group = self._group
        assert group is not None
        body = {
            "names": [name for name, _ in bucket],
            "dtypes": [str(tensor.dtype).removeprefix("torch.") for _, tensor in bucket],
            "shapes": [list(tensor.shape) for _, tensor in bucket],
            "group_name": group.name,
            "flush_cache": False,
        }
        calls = self._ask(up, "/update_weights_from_distributed", lambda i: body)
        device = "cuda" if group.backend == "nccl" else "cpu"
        try:
            group.send([(name, tensor.to(device)) for name, tensor in bucket], lambda: _failure(calls))
            _wait(calls, "an update of weights was refused")
        except EngineError as error:
            self._group = None
            # it waits for the broadcasts that were begun, until the time-out
            threading.Thread(target=group.leave, daemon=True).start()
            if not snapshot:
                raise
            for server in up:
                server.out = str(error)
            return []
        return up

    def _join(self, up: list[Server]) -> None:
        """A group of this process and these servers; made again when they differ from before."""
        members = " ".join(f"{server.url} {server.restarts}" for server in up)
        if self._group is not None and self._group_of == members:
            return
        self.close()
        self._groups += 1
        sizes = [server.info.tensor_parallel for server in up if server.info is not None]
        port, self._claim = claim_port(29600, "")
        group = Broadcast(
            name=f"swirl-{os.getpid()}-{self._groups}",
            address=self._config.address,
            port=port,
            world_size=1 + sum(sizes),
            backend="nccl" if torch.cuda.is_available() else "gloo",
            timeout=self._config.timeout,
        )
        calls = self._ask(
            up,
            "/init_weights_update_group",
            lambda i: {
                "master_address": group.address,
                "master_port": group.port,
                "rank_offset": 1 + sum(sizes[:i]),
                "world_size": group.world_size,
                "group_name": group.name,
                "backend": group.backend,
            },
        )
        joined: Future[None] = Future()

        def join() -> None:
            try:
                group.join()
                joined.set_result(None)
            except BaseException as error:
                joined.set_exception(error)

        # no thread of a pool: where servers do not come it waits for the time-out, and the end of the command must not
        threading.Thread(target=join, name="weight-update", daemon=True).start()
        while not wait([joined], timeout=0.05).done:
            if (reason := _failure(calls)) is not None:
                raise EngineError(f"engine.weight_sync.method=distributed: {reason}")
        joined.result()
        _wait(calls, "engine.weight_sync.method=distributed")
        self._group, self._group_of = group, members

    def _ask(self, up: list[Server], path: str, body: Callable[[int], dict[str, Any]]) -> list[Future[None]]:
        return [self._submit(server.client.control(path, body(i), self._config.timeout)) for i, server in enumerate(up)]


def _failure(calls: list[Future[None]]) -> str | None:
    return next((str(call.exception()) for call in calls if call.done() and call.exception() is not None), None)


def _wait(calls: list[Future[None]], what: str) -> None:
    for call in calls:
        try:
            call.result()
        except (ServerFailure, ValueError) as error:
            raise EngineError(f"{what}: {error}") from None
