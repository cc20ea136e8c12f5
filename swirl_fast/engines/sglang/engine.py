"""Rollouts by SGLang servers, started here or attached by URL, on one node or many.

    order     all states of a trajectory go to one server, the longest first and by itself, so that its radix cache holds the trunk when the
              others arrive (prefixes.py)
    versions  every set of weights has a name; completions of any other are refused, and the cache is keyed by it besides being flushed
    faults    a server that dies or hangs is started again with the current weights, or dropped where it is not ours; its requests are
              tried elsewhere; what cannot be mended stops the command, with the reason (servers.py)

Under torchrun one process of every node leads: it starts its node's servers, sends them weights and starts them again. The
others only ask them. Calls of `generate` and `update_weights` exclude each other.
"""

from __future__ import annotations

import asyncio
import copy
import threading
import time
from collections import OrderedDict
from collections.abc import Coroutine, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from torch import Tensor
from transformers import AutoConfig

from swirl_fast.config import ConfigError, EngineConfig
from swirl_fast.engines.engine import Completion, EngineError, EngineStats, Request, check_request, whole
from swirl_fast.engines.sglang import memory
from swirl_fast.engines.sglang.client import Experts, ServerFailure
from swirl_fast.engines.sglang.servers import REMEMBERED, Server, Servers, gather
from swirl_fast.engines.sglang.update import WeightUpdater
from swirl_fast.engines.sglang.weights import vocabulary_of
from swirl_fast.models.load import DTYPES
from swirl_fast.models.routing import experts_of, routed_shape
from swirl_fast.prefixes import WarmGroup, cacheable, common_prefix, warm_order

T = TypeVar("T")
Start = tuple[Server, int]  # a server, and how often it was started again: each time its cache is empty


class SGLangEngine:
    """weights: the Hugging Face folder of version 0. folder: for the servers' logs and for snapshots of weights. label: names this
    run's weights; two runs that share servers need two labels.

    leader: whether this process starts servers and updates weights. urls: of the servers of a process that does not lead; empty:
    those of the config, or some are started. key: of these servers; empty: the one in the variable of config.api_key_env. Servers that are
    started without one get a key by chance. seed: of the servers' own random numbers. SGLang takes a request's seed only
    under --enable-deterministic-inference; without it the same seeds give other tokens every time.

    Raises EngineError when a server does not come up, with the end of its log, or cannot be reached.
    """

    def __init__(
        self,
        config: EngineConfig,
        weights: Path,
        folder: Path,
        *,
        label: str = "swirl",
        seed: int = 0,
        leader: bool = True,
        urls: Sequence[str] = (),
        key: str = "",
    ) -> None:
        self._label, self._warms = label, config.warm_prefixes
        self._dtype = DTYPES[config.dtype]
        self._version = 0
        self._vocabulary = vocabulary_of(weights)
        self._experts = _experts(weights) if config.return_routed_experts else None
        self._stats = EngineStats()
        self._lock = threading.Lock()
        # of trajectories: in whose cache, and what; only of this version
        self._rows: OrderedDict[str, tuple[Start | None, np.ndarray]] = OrderedDict()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="sglang-engine", daemon=True)
        self._thread.start()
        self._closed = False
        self._updater: WeightUpdater | None = None
        urls = list(urls) or config.urls
        self._servers = Servers(config, folder, str(weights), self._tag(), seed, leader, urls, key)
        try:
            self._run(self._servers.open())
            self._check_servers(config)
            if leader:
                self._updater = WeightUpdater(
                    self._servers,
                    config.weight_sync,
                    weights,
                    self._dtype,
                    Path(config.weight_sync.folder or folder / "weights").expanduser(),
                    self._start,
                )
                if urls:
                    self._own_weights(weights)
        except BaseException:
            self.close()
            raise
        self.max_context = min(server.info.max_context for server in self._servers.all if server.info)

    @property
    def urls(self) -> list[str]:
        return [server.url for server in self._servers.all]

    @property
    def key(self) -> str:
        return self._servers.key

    def generate(self, requests: Sequence[Request]) -> list[list[Completion]]:
        """As in the protocol. Where the model ends its turn with a token that is none of `stop_ids`, the completion ends there, with
        `length` as reason. Raises EngineError when servers fail for good: what the caller stored before is intact."""
        for i, request in enumerate(requests):
            check_request(i, request, self.max_context, self._vocabulary)
            if request.routed_experts and self._experts is None:
                raise ValueError(f"request {i} asks for routed experts: set engine.return_routed_experts=true")
        with self._lock:
            start = time.perf_counter()
            results = self._run(self._generate(requests)) if requests else []
            self._stats.decode_seconds += time.perf_counter() - start
            return results

    def update_weights(self, named_tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        """As in the protocol; sharded tensors are gathered bucket by bucket, so that only `weight_sync.bucket_mb` are held at a time. A
        process that does not lead takes part in gathering and sends nothing.

        A server that fails meanwhile is mended or dropped as in `generate`; EngineError when none is left.
        """
        with self._lock:
            self._rows.clear()
            self._servers.forget()
            if self._updater is None:
                for _, tensor in named_tensors:
                    whole(tensor, self._dtype)
                self._servers.tag = self._tag(version)
            else:
                tag = self._tag(version)
                if self._servers.asleep:
                    self._run(self._servers.resume(memory.WEIGHTS))
                    tag = memory.lacking(tag, memory.CACHE)
                self._updater.update(named_tensors, version, tag)
            self._version = version

    def release_memory(self) -> None:
        """As in the protocol. A server that fails is started again or dropped when the memory is taken back."""
        with self._lock:
            if self._updater is not None:
                self._run(self._servers.release())

    def resume_memory(self) -> None:
        """As in the protocol."""
        with self._lock:
            if self._updater is not None:
                self._run(self._servers.resume(memory.CACHE))

    def flush_cache(self) -> None:
        """Empties the servers' prefix caches: for measurements."""
        with self._lock:
            self._rows.clear()
            self._run(gather(server.client.control("/flush_cache", {}, 60.0) for server in self._servers.up))

    def stats(self) -> EngineStats:
        """decode_seconds holds all the time spent in `generate`: a server does both at once."""
        return copy.deepcopy(self._stats)

    def close(self) -> None:
        """Ends the servers started here, and no others."""
        if self._closed:
            return
        self._closed = True
        try:
            try:
                if self._updater is not None:
                    self._updater.close()
                    if self._servers.asleep:
                        self._run(self._servers.give_back(self._updater.load))
            finally:
                self._run(self._servers.close())
        finally:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()

    def _start(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        future = self._start(work)
        try:
            return future.result()
        except BaseException:  # an interrupt, for one
            future.cancel()
            raise

    def _tag(self, version: int | None = None) -> str:
        """The name that these weights have on the servers."""
        return f"{self._label}:{self._version if version is None else version}"

    def _check_servers(self, config: EngineConfig) -> None:
        """Raises ConfigError where a server was started without what the settings ask of it."""
        for server in self._servers.all:
            assert server.info is not None
            for key, flag, able in (
                ("share_gpu", "--enable-memory-saver", server.info.memory_saver),
                ("return_routed_experts", "--enable-return-routed-experts", server.info.routed_experts),
            ):
                if getattr(config, key) and not able:
                    raise ConfigError(
                        f"engine.{key}=true: the SGLang server at {server.url} runs without {flag}; start it again with that flag, or set "
                        f"engine.{key}=false"
                    )

    def _own_weights(self, weights: Path) -> None:
        """Attached servers may hold anybody's weights, or those of the run before it was stopped: they are given ours, unless they were
        started with them and are untouched."""
        updater, servers = self._updater, self._servers.all
        assert updater is not None
        ours = self._run(gather(self._holds(server, str(weights)) for server in servers))
        others = [server for server, own in zip(servers, ours, strict=True) if not own]
        if not others:
            return
        if updater.pushes:
            took = updater.give(self._tag())
        else:
            took = self._run(self._servers.each(others, lambda server: updater.load(server, str(weights), self._tag())))
        for server in others:
            if server not in took:
                assert server.info is not None
                way = "" if updater.pushes else ", or make the folder visible to it"
                raise EngineError(
                    f"{server.url} serves {server.info.model_path} (weights {server.info.weight_version!r}) and cannot take those of "
                    f"{weights}: {server.out}. Start it with that --model-path{way}"
                )

    async def _holds(self, server: Server, weights: str) -> bool:
        """Whether the server has our weights; then also under our name, and it answers."""
        info, control = server.info, server.client.control
        assert info is not None
        try:
            if memory.parts_lacking(info.weight_version):  # of a command that was killed
                await memory.resume(server.client, memory.ALL, self._servers.config.weight_sync.timeout)
                return False
            if info.weight_version == "default" and info.model_path == weights:
                await control("/update_weight_version", {"new_version": self._tag(), "abort_all_requests": False}, 60.0)
            elif info.weight_version == self._tag():
                await control("/continue_generation", {}, 60.0)  # it is paused where the command before was killed
            else:
                return False
        except (ServerFailure, ValueError) as error:
            raise EngineError(f"engine.urls: {error}. Start the server again, or leave it out") from None
        return True

    async def _generate(self, requests: Sequence[Request]) -> list[list[Completion]]:
        prompts = [np.asarray(request.tokens, np.int64) for request in requests]
        # without a key: a trajectory of its own
        keys = [request.cache_key or f"\0{i}" for i, request in enumerate(requests)]
        results: dict[int, list[Completion]] = {}
        answered: dict[int, Start | None] = {}
        computed = [0] * len(requests)  # tokens of each prompt
        ideal = self._cacheable(keys, prompts)
        for server in self._servers.all:
            server.load = 0
        of_server: dict[Server, list[int]] = {}
        for i, key in enumerate(keys):
            server = await self._servers.home(key)
            server.load += len(prompts[i]) + requests[i].n * requests[i].sampling.max_new_tokens
            of_server.setdefault(server, []).append(i)

        async def send(i: int, known: int, where: Start | None) -> None:
            results[i], answered[i] = await self._sample(requests[i], keys[i])
            if answered[i] != where:  # one that was started again meanwhile, or another
                known = 0
            cached = min(completion.cached_tokens for completion in results[i])
            # For n > 1 SGLang computes the prompt before it counts: what nobody computed before was computed then.
            computed[i] += len(prompts[i]) - (min(cached, known) if requests[i].n > 1 else cached)

        async def serve(group: WarmGroup, numbers: list[int], where: Start | None) -> None:
            """where: whose cache holds what the group counts on."""
            if group.warm is not None:
                i = numbers[group.warm]
                tokens, warmed = await self._warm(requests[i], keys[i])
                computed[i] += tokens
                where = where if warmed == where else None
            now = [send(numbers[i], known, where) for i, known in group.ready]
            await gather([*now, *(serve(later, numbers, where) for later in group.later)])

        work = []
        for server, numbers in of_server.items():
            known = [self._known(server, keys[i], prompts[i]) for i in numbers]
            if self._warms:
                groups = warm_order([prompts[i] for i in numbers], [requests[i].n for i in numbers], known)
            else:
                groups = [WarmGroup(None, list(enumerate(known)))]
            work += [serve(group, numbers, (server, server.restarts)) for group in groups]
        await gather(work)

        found = []
        for i, request in enumerate(requests):
            cached = max(len(prompts[i]) - computed[i], 0)
            found.append([replace(completion, cached_tokens=cached) for completion in results[i]])
            self._stats.requests += 1
            self._stats.prompt_tokens += len(prompts[i])
            self._stats.cached_tokens += cached
            self._stats.generated_tokens += sum(len(completion.tokens) for completion in results[i])
            if request.cache_key:
                self._remember(request.cache_key, answered[i], prompts[i], results[i])
        self._stats.cacheable_tokens += ideal
        return found

    async def _sample(self, request: Request, key: str) -> tuple[list[Completion], Start | None]:
        """The completions, and where they come from; None: from more than one server or start."""
        seeded = all(server.info is not None and server.info.deterministic for server in self._servers.all)
        if seeded and request.n > 1:  # SGLang gives one seed to all n samples: each is a request of its own
            seeds = [(request.seed + index * 0x9E3779B1) % 2**31 for index in range(request.n)]
            ones = [self._sample(replace(request, n=1, seed=seed), key) for seed in seeds]
            found = await gather(ones)
            starts = {start for _, start in found}
            return [completion for (completion,), _ in found], starts.pop() if len(starts) == 1 else None
        version, tag, seed = self._version, self._tag(), request.seed % 2**31 if seeded else None

        async def work(server: Server) -> tuple[list[Completion], Start]:
            start = server, server.restarts
            return await server.client.generate(request, version, tag, seed, self._experts), start

        return await self._servers.attempt(work, key, request.n)

    async def _warm(self, request: Request, key: str) -> tuple[int, Start]:
        """Returns how many tokens of the prompt were computed, and where."""
        tokens, tag = request.tokens, self._tag()

        async def work(server: Server) -> tuple[int, Start]:
            start = server, server.restarts
            return len(tokens) - await server.client.warm(tokens, tag), start

        return await self._servers.attempt(work, key, 1)

    def _known(self, server: Server, key: str, prompt: np.ndarray) -> int:
        """How many tokens of the prompt this server has seen from the same trajectory."""
        where, row = self._rows.get(key, (None, prompt[:0]))
        return common_prefix(row, prompt) if where == (server, server.restarts) else 0

    def _remember(self, key: str, where: Start | None, prompt: np.ndarray, completions: Sequence[Completion]) -> None:
        row = np.concatenate([prompt, completions[0].tokens[:-1]])
        old = self._rows.get(key)
        if old is None or old[0] != where or len(row) >= len(old[1]):
            self._rows[key] = (where, row)
            self._rows.move_to_end(key)
            if len(self._rows) > REMEMBERED:
                self._rows.popitem(last=False)

    def _cacheable(self, keys: Sequence[str], prompts: Sequence[np.ndarray]) -> int:
        """What one ideal cache would not compute again of these prompts, after the rows of their own trajectories."""
        before = [np.append(self._rows[key][1], -1) for key in dict.fromkeys(keys) if key in self._rows]
        return cacheable([*before, *prompts]) - cacheable(before)


def _experts(weights: Path) -> Experts:
    """Of the model in a folder. Raises ConfigError where it has none."""
    model_config = AutoConfig.from_pretrained(weights, trust_remote_code=False)
    experts = experts_of(model_config)
    if experts is None:
        raise ConfigError(
            f"engine.return_routed_experts=true: model type {model_config.model_type} has no experts; leave it false"
        )
    return Experts(experts[0], *routed_shape(model_config))
