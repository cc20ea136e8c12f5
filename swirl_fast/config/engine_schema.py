"""The settings of the engine, as in schema.py."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from swirl_fast.config.fields import setting

Precision = Literal["float32", "bfloat16"]


@dataclass
class LaunchConfig:
    """SGLang servers started here, under torchrun on every node, and ended with the command."""

    servers: int = setting(1, minimum=1)
    """Servers on each node."""
    gpus_per_server: int = setting(1, minimum=1)
    """Devices of one server, which splits every layer over them (tensor parallelism)."""
    gpus: list[int] = setting([], minimum=0)
    """Numbers of the devices to take, in order; empty: 0, 1, 2, …"""
    python: str = setting("", reads="place")
    """The interpreter that has sglang, where that is in an environment of its own; empty: this one."""
    host: str = "127.0.0.1"
    """The address that the servers listen on. Another node reaches them only at one of this node's own."""
    port: int = setting(30000, minimum=1, maximum=65535)
    """Of the first server; each takes the next free one."""
    memory_fraction: float = setting(0.8, above=0, below=1)
    """Share of a device's memory for weights and key/value cache."""
    attention_backend: str = ""
    """SGLang's --attention-backend; empty: SGLang's choice."""
    flags: list[str] = field(default_factory=list)
    """More arguments of `python -m sglang.launch_server`, such as [--kv-cache-dtype, fp8_e5m2]."""
    environment: dict[str, str] = field(default_factory=dict)
    """More environment variables for the servers, as {NAME: value}."""
    startup_timeout: float = setting(900.0, above=0, endless=True)
    """Seconds until a server must answer."""


@dataclass
class WeightSyncConfig:
    """How the servers get the weights after an update."""

    method: Literal["disk", "tensor", "distributed"] = "disk"
    """disk: a folder that the servers read. tensor: shared memory, on the same node. distributed: broadcast."""
    bucket_mb: float = setting(512.0, above=0, endless=True)
    """Weights gathered and sent at a time, in MB; a larger tensor goes by itself."""
    folder: str = ""
    """Where the current weights are kept; empty: runs/NAME/engine/weights. With `disk`, servers on other machines must see it."""
    snapshot: bool = True
    """tensor, distributed: keep the weights in engine.weight_sync.folder too. Without, a restarted server waits for the next update."""
    address: str = "127.0.0.1"
    """distributed: the address at which the servers reach the trainer's first process."""
    timeout: float = setting(600.0, above=0, endless=True)
    """Seconds for one transfer."""


@dataclass
class EngineConfig:
    """What generates: transformers in this process, or SGLang servers."""

    kind: Literal["local", "sglang"] = "local"
    """local: transformers in this process. sglang: SGLang servers, started here or running already."""
    dtype: Precision = "float32"
    """Of the engine's copy of the weights."""
    max_sequences: int = setting(64, minimum=1)
    """Sequences decoded at a time; sglang: of each server, by each process that asks it."""
    share_gpu: bool = False
    """sglang: in training, servers and trainer have the same GPUs in turns. The servers release their memory while the trainer works, and
    it waits in CPU memory while they sample."""
    return_routed_experts: bool = False
    """Of models with experts: actions come with the experts that their tokens were routed to, for the metric routing_gap."""
    own_process: bool = False
    """local: generate in a process of its own, beside the training (for training.lag=1)."""
    threads: int = setting(0, minimum=0)
    """local with engine.own_process: CPU threads of that process; 0: torch's choice."""
    urls: list[str] = field(default_factory=list)
    """sglang: addresses of servers that run already; empty: engine.launch starts some."""
    api_key_env: str = "SGLANG_API_KEY"
    """The environment variable that holds the servers' key; where it is not set, servers started here get a random one."""
    timeout: float = setting(600.0, above=0, endless=True)
    """Seconds until a request counts as hung."""
    retries: int = setting(3, minimum=0)
    """Further tries of a request after a failure, on other servers where there are some."""
    max_restarts: int = setting(3, minimum=0)
    """Restarts of a launched server between two updates of weights, before it is given up."""
    warm_prefixes: bool = True
    """sglang: compute what prompts share before they are sent. false: send them all at once."""
    launch: LaunchConfig = field(default_factory=LaunchConfig)
    weight_sync: WeightSyncConfig = field(default_factory=WeightSyncConfig)
    cache_tokens: int = setting(16384, minimum=1)
    """Key/value cache kept between calls, in tokens; the prefixes that were not used for longest leave first."""
    prefix_cache: bool = True
    """local: false computes the whole prompt of every completion and keeps nothing, as a measure of what the cache saves."""
