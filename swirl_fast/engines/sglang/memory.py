"""What a server's memory holds: SGLang gives the parts named here back to the GPU, and takes them again (engine.share_gpu).

Its weights are gone after a release, until an update sends them. A server that lacks something says so in the name of its weights, which
nobody asks for: so whoever comes next, another process too, knows what it has to take again. SGLang itself does not tell, and dies when
it is to take what it has, or to release while it works.
"""

from __future__ import annotations

import re

from swirl_fast.engines.sglang.client import Client

WEIGHTS = ("weights",)
CACHE = ("kv_cache", "cuda_graph")  # with what SGLang recorded to run on it

ALL = WEIGHTS + CACHE

_LACKS = re.compile(rf", without ((?:{'|'.join(ALL)})(?: (?:{'|'.join(ALL)}))*)(?=$|, being updated$)")


def lacking(name: str, parts: tuple[str, ...]) -> str:
    """The name of weights on a server that lacks `parts`."""
    return f"{name}, without {' '.join(parts)}" if parts else name


def parts_lacking(name: str) -> tuple[str, ...]:
    """What a server lacks whose weights are called so."""
    found = _LACKS.search(name)
    return tuple(found[1].split()) if found else ()


def bare(name: str) -> str:
    """The name of the weights themselves."""
    return _LACKS.sub("", name)


async def release(client: Client, name: str, timeout: float) -> None:
    """Everything, of a server whose requests are done; it is paused from then on. name: of its weights."""
    await client.control("/pause_generation", {"mode": "retract"}, timeout)
    await client.control("/flush_cache", {}, timeout)  # refused while something runs
    await _rename(client, lacking(name, ALL), timeout)
    await client.control("/release_memory_occupation", {"tags": list(ALL)}, timeout)


async def resume(client: Client, parts: tuple[str, ...], timeout: float) -> bool:
    """Takes what the server lacks of `parts` again, and says whether that was anything."""
    info = await client.get("/model_info")
    name = str(info.get("weight_version")) if isinstance(info, dict) else ""
    lacks = parts_lacking(name)
    back = [part for part in lacks if part in parts]
    if back:
        rest = tuple(part for part in lacks if part not in parts)
        await client.control("/resume_memory_occupation", {"tags": back}, timeout)
        await _rename(client, lacking(bare(name), rest), timeout)
    return bool(back)


async def _rename(client: Client, name: str, timeout: float) -> None:
    await client.control("/update_weight_version", {"new_version": name, "abort_all_requests": False}, timeout)
