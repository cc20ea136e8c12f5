from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from swirl_fast.config import Config
from swirl_fast.engines.engine import Engine

if TYPE_CHECKING:
    import torch

    from swirl_fast.ranks import Ranks


def load_engine(
    config: Config, device: torch.device | str, weights: str | None = None, ranks: Ranks | None = None
) -> Engine:
    """The engine of `engine.kind`, with the weights of `model.path` or of the Hugging Face folder `weights`.

    ranks: those that call this together. The first rank of each node starts its node's SGLang servers; the first of all leads
    attached ones.
    """
    e = config.engine
    if config.training.replay_routing:
        e = replace(e, return_routed_experts=True)
    speaks = ranks is None or ranks.main
    if e.kind == "local" and e.own_process:
        from swirl_fast.engines.process import ProcessEngine

        return ProcessEngine(_local, config, device, weights, speaks, threads=e.threads)
    if e.kind == "local":
        return _local(config, device, weights, speaks)
    from swirl_fast.engines.sglang.engine import SGLangEngine
    from swirl_fast.models.load import local_folder, weights_hash
    from swirl_fast.seeds import seed_of

    folder = Path(weights) if weights else local_folder(config.model)
    # only of this run and these weights, so that servers that somebody else uses too are noticed, not mixed up
    label = f"{config.run.name}-{seed_of(config.folder.absolute(), weights_hash(folder)) % 16**8:08x}"
    logs = config.folder / "engine"
    if ranks is not None:
        label = ranks.gather(label)[0]  # a node may have its folders elsewhere
    if ranks is None or not ranks.distributed:
        return SGLangEngine(e, folder.absolute(), logs, label=label, seed=config.run.seed)
    node = os.environ.get("GROUP_RANK", "0")
    leads = ranks.main if e.urls else os.environ["LOCAL_RANK"] == "0"
    engine = None
    if leads:
        # several nodes may share their folders
        if not e.urls and ranks.size > int(os.environ["LOCAL_WORLD_SIZE"]):
            logs = logs / f"node-{node}"
            shared = e.weight_sync.folder
            e = replace(e, weight_sync=replace(e.weight_sync, folder=shared and f"{shared}/node-{node}"))
        engine = SGLangEngine(e, folder.absolute(), logs, label=label, seed=config.run.seed + ranks.rank)
    by_node = ranks.gather((node, engine.urls if engine is not None else [], engine.key if engine is not None else ""))
    if engine is None:
        found = [(urls, key) for where, urls, key in by_node if urls and (e.urls or where == node)]
        urls = [url for started, _ in found for url in started]
        key = found[0][1] if found else ""  # the servers of a node have one
        engine = SGLangEngine(e, folder.absolute(), logs, label=label, leader=False, urls=urls, key=key)
    return engine


def _local(config: Config, device: torch.device | str, weights: str | None, speaks: bool) -> Engine:
    from swirl_fast.engines.local.engine import LocalEngine
    from swirl_fast.models.load import load_model

    e = config.engine
    engine = LocalEngine(
        load_model(config.model, e.dtype, weights),
        max_sequences=e.max_sequences,
        cache_tokens=e.cache_tokens,
        device=device,
        prefix_cache=e.prefix_cache,
    )
    if engine.uncached is not None and speaks:
        print(
            f"engine: no prefix cache for this model: {engine.uncached}. Every prompt is computed anew; engine.kind=sglang is faster"
        )
    return engine
