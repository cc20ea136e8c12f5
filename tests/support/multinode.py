"""What four ranks on two nodes do, one thing after another in one launch of torchrun (tests/multinode):

multinode.py OUT LLAMA URL ADDRESS STAGE [STAGE …]      STAGE: arguments of swirl-fast as JSON

train     three steps of LLAMA with HSDP, as in parallel_variants.py, which writes OUT/hsdp.json and OUT/hsdp.safetensors
weights   the server at URL gets other weights by broadcast from ADDRESS, and every rank asks it: OUT/asked-RANK.json
stages    commands, each in the folder in which torchrun was started
wait      OUT/ready-RANK, then collectives without end, until the network fails
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from support.parallel_variants import train
from support.sglang_cases import MANY, changed

from swirl_fast import cli, ranks
from swirl_fast.config import load
from swirl_fast.engines import load_engine

CUT_OFF = 20.0  # seconds; in place of minutes


def broadcast(model: Path, url: str, address: str, group: ranks.Ranks, out: Path) -> None:
    sync = ["engine.weight_sync.method=distributed", f"engine.weight_sync.address={address}"]
    config = load(
        None,
        [f"model.path={model}", "engine.kind=sglang", f"engine.urls=[{url}]", "run.folder=.", "run.name=served"]
        + [*sync, "engine.dtype=float32", "engine.weight_sync.snapshot=false", "engine.weight_sync.timeout=120"],
    )
    engine = load_engine(config, group.device, ranks=group)
    try:
        engine.update_weights(changed(model, 2.0), 3)
        group.barrier()
        found = [
            [[*completion.tokens.tolist()], completion.logprobs, completion.policy_version]
            for completions in engine.generate(MANY)
            for completion in completions
        ]
        (out / f"asked-{group.rank}.json").write_text(json.dumps(found), encoding="utf-8")
        group.barrier()
    finally:
        engine.close()


def main(out: Path, llama: Path, url: str, address: str, stages: list[list[str]]) -> None:
    ranks.SILENCE = CUT_OFF
    group = ranks.start()
    seen, parameters = train(llama, "hsdp", group, out / "runs")
    if group.main:
        (out / "hsdp.json").write_text(json.dumps(seen), encoding="utf-8")
        save_file(parameters, out / "hsdp.safetensors")
    broadcast(llama, url, address, group, out)
    for stage in stages:
        if code := cli.main(stage):
            sys.exit(code)
    (out / f"ready-{group.rank}").touch()
    while True:
        group.max(torch.zeros(1))
        time.sleep(0.1)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], sys.argv[4], [json.loads(one) for one in sys.argv[5:]])
