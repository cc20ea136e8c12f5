"""How many tokens a second does the trainer learn from, and what share of the GPUs' arithmetic is that?

    python -m benchmarks.train_throughput --quick --out FILE
    torchrun --nproc-per-node 8 -m benchmarks.train_throughput --shape 8b --compute-dtype bfloat16 --out FILE

What is measured is the learning half of swirl_fast.training.trainer as it is: gather, advantages, packing, forward, backward, FSDP,
clipping, AdamW. Weights are random, rollouts and verdicts are made up and ready before a step begins: neither sampling nor judging nor
the transfer of weights to an engine is in any number here (benchmarks.rollouts, benchmarks.overlap). Two ways:

    comb   trajectories with their sampled actions, every prefix once
    rows   the same trainer over one row a sampled action, with a first token of its own so that nothing is shared: plain packing

Every rank brings --trajectories a step: with more ranks there is more work (weak scaling). --append adds the run to those of other
numbers of ranks in FILE. Effective tokens are what separate rows compute. Seconds by phase are those of rank 0; memory is that of the
rank with most: allocated by tensors on a GPU, resident on a CPU (Python and libraries too), both over the whole way, warm-up included.
--quick is the 135m shape cut to 2 layers and 2,048 tokens of vocabulary, seconds on a CPU.

Read with care: random tokens share less than real ones, and all trajectories have the same lengths, so that the ranks' work is even.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.environment import environment
from benchmarks.step_training.measure import PeakMemory
from benchmarks.step_training.ways import SHAPES
from benchmarks.train_throughput.setup import MODELS, llama, make_batch, make_trainer
from swirl_fast.config import Config, load
from swirl_fast.config.schema import CHECKPOINTING
from swirl_fast.files import write_text
from swirl_fast.ranks import Ranks, start, stop
from swirl_fast.training import fsdp, layers
from swirl_fast.training.utilization import peak_flops

WAYS = ("comb", "rows")
QUICK = {"layers": 2, "vocab": 2048, "trajectory": "math", "states": 3, "samples": 3, "steps": 2}
FULL = {"layers": 0, "vocab": 0, "trajectory": "search_qa", "states": 5, "samples": 8, "steps": 5}
PER_SECOND = ("tokens_computed_per_second", "tokens_effective_per_second")


def options_of(arguments: Sequence[str] | None, ranks: int) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="smaller where options are unset")
    parser.add_argument("--shape", choices=MODELS, default="135m", help="of the model")
    parser.add_argument("--layers", type=int, help="cut the model to so many")
    parser.add_argument("--vocab", type=int, help="cut the vocabulary to so many tokens")
    parser.add_argument("--trajectory", choices=SHAPES, help="lengths of prompt, action and result")
    parser.add_argument("--states", type=int, help="K, of a trajectory")
    parser.add_argument("--samples", type=int, help="G, actions drawn at a state")
    parser.add_argument("--trajectories", type=int, default=1, help="of each rank a step")
    parser.add_argument("--ways", default=",".join(WAYS))
    parser.add_argument("--steps", type=int, help="measured; their median counts")
    parser.add_argument("--warm-up", type=int, default=1, help="steps before; with --compile rather 3")
    parser.add_argument("--token-budget", type=int, default=8192, help="computed tokens of a micro-batch")
    parser.add_argument("--compute-dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--shard-size", type=int, default=0, help="ranks that share one copy of the parameters; 0: all")
    parser.add_argument("--shard-accumulated-gradients", action="store_true")
    parser.add_argument("--checkpointing", choices=CHECKPOINTING, default="none")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--liger", action="store_true")
    parser.add_argument("--reference", action="store_true", help="with a reference model and the KL to it")
    parser.add_argument(
        "--peak-tflops", type=float, default=0.0, help="of one rank's device, where its name is unknown"
    )
    parser.add_argument("--append", action="store_true", help="keep the runs on other numbers of ranks in FILE")
    parser.add_argument("--out", type=Path, required=True, help="JSON")
    options = parser.parse_args(arguments)
    for name, value in (QUICK if options.quick else FULL).items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    model = MODELS[options.shape]
    for name, most in (("layers", model.layers), ("vocab", model.vocab)):
        value = getattr(options, name)
        if not 0 <= value <= most:
            parser.error(f"--{name} {value}: --shape {options.shape} has {most}; give 1 to {most}")
        setattr(options, name, value or most)
    for name in ("states", "samples", "trajectories", "steps"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} {getattr(options, name)}: must be at least 1")
    if options.warm_up < 0:
        parser.error(f"--warm-up {options.warm_up}: must not be negative")
    chosen = options.ways.split(",")
    if strange := set(chosen) - set(WAYS):
        parser.error(f"--ways {options.ways}: {', '.join(sorted(strange))} is none of {', '.join(WAYS)}")
    options.ways = [way for way in WAYS if way in chosen]
    actions = ranks * options.trajectories * options.states * options.samples
    if options.vocab <= actions:
        parser.error(f"--vocab {options.vocab}: {actions} rows a step need first tokens of their own; give more")
    shape = SHAPES[options.trajectory]
    if options.token_budget < (longest := shape.state(options.states) + shape.action):
        parser.error(f"--token-budget {options.token_budget}: the longest row has {longest} tokens; give at least that")
    if not options.out.absolute().parent.is_dir():
        parser.error(f"--out {options.out}: the folder {options.out.absolute().parent} does not exist; make it first")
    return options


def config_of(options: argparse.Namespace, ranks: int) -> Config:
    """The trainer's settings. One sample a state has no siblings to be compared with: its reward is its advantage."""
    settings = {
        "model.dtype": options.compute_dtype,
        "algorithm.name": "rloo" if options.samples > 1 else "reinforce",
        "algorithm.kl_coef": 0.01 if options.reference else 0.0,
        "training.steps": options.warm_up + options.steps,
        "training.trajectories_per_step": options.trajectories * ranks,
        "training.group_size": options.samples,
        "training.token_budget": options.token_budget,
        "training.max_engine_gap": 0,  # the log-probs of made-up rollouts are made up
        "training.shard_size": options.shard_size,
        "training.shard_accumulated_gradients": options.shard_accumulated_gradients,
        "training.activation_checkpointing": options.checkpointing,
        "training.compile": options.compile,
        "training.liger": options.liger,
        "training.peak_tflops": options.peak_tflops,
    }
    return load(None, [f"{key}={value}" for key, value in settings.items()])


def measure(options: argparse.Namespace, config: Config, ranks: Ranks, way: str) -> dict[str, Any]:
    """One way: medians over the measured steps."""
    memory = PeakMemory(ranks.device.type)  # forgets the peak of the way before
    shape = SHAPES[options.trajectory]
    cut = MODELS[options.shape]._replace(layers=options.layers, vocab=options.vocab)
    total = options.warm_up + options.steps
    batches = [
        make_batch(
            shape, options.states, options.samples, options.trajectories, cut.vocab, ranks, step, rows=way == "rows"
        )
        for step in range(total)
    ]
    trainer, parameters = make_trainer(config, ranks, llama(cut, shape.state(options.states) + shape.action), batches)
    measured = []
    cpu_began = 0.0
    for step in range(total):
        if step == options.warm_up:
            cpu_began = time.process_time()
        ranks.barrier()
        metrics = trainer.train_step()
        if ranks.main:
            kind = "warm-up" if step < options.warm_up else "step"
            rate = metrics["tokens_computed_per_second"]
            print(f"{way} {kind} {step + 1}/{total}: {metrics['seconds']:.2f} s, {rate:,.0f} tok/s", file=sys.stderr)
        measured.append(metrics)
    del trainer, batches
    gc.collect()
    measured = measured[options.warm_up :]
    median = {key: statistics.median(row[key] for row in measured) for key in measured[0]}
    phases = {key.removeprefix("seconds_"): value for key, value in median.items() if key.startswith("seconds_")}
    return {
        "ranks": ranks.size,
        "way": way,
        "parameters": parameters,
        "tokens_computed": median["tokens_computed"],
        "tokens_effective": median["tokens_effective"],
        "seconds": median["seconds"],
        **{key: median[key] for key in PER_SECOND},
        **{f"{key}_per_rank": median[key] / ranks.size for key in PER_SECOND},
        "tflops": median["tflops"],
        "mfu": median.get("mfu"),
        "mfu_step": median.get("mfu_step"),
        "memory_gib": None if memory.before is None else measured[-1]["memory_gib"],
        "seconds_by_phase": {name: value for name, value in phases.items() if name != "hidden"},
        "seconds_of_each_step": [row["seconds"] for row in measured],
        "seconds_cpu": time.process_time() - cpu_began,  # of all measured steps and all threads of rank 0
        "load_average": os.getloadavg()[0],  # of the last minute; above ranks times threads others ran beside
        "loss": measured[0]["loss"],
        "grad_norm": measured[0]["grad_norm"],
    }


def summarize(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The run on most ranks, of the comb where it was measured. comb_vs_rows: seconds of a step, comb_vs_rows_cpu: of CPU time,
    to which on a CPU it matters less what else is running; None where a way is missing."""
    ranks = max(row["ranks"] for row in rows)
    ways = {row["way"]: row for row in rows if row["ranks"] == ranks}
    first = ways.get("comb") or ways["rows"]
    both = len(ways) == 2
    return {
        "ranks": ranks,
        "way": first["way"],
        "tokens_per_second_per_rank": first["tokens_computed_per_second_per_rank"],
        "effective_tokens_per_second_per_rank": first["tokens_effective_per_second_per_rank"],
        "tflops_per_rank": first["tflops"] / ranks,
        "mfu": first["mfu"],
        "memory_gib": first["memory_gib"],
        "comb_vs_rows": ways["rows"]["seconds"] / ways["comb"]["seconds"] if both else None,
        "comb_vs_rows_cpu": ways["rows"]["seconds_cpu"] / ways["comb"]["seconds_cpu"] if both else None,
        "token_ratio": ways["rows"]["tokens_computed"] / ways["comb"]["tokens_computed"] if both else None,
        "tokens_per_second_per_rank_by_ranks": {
            str(row["ranks"]): row["tokens_computed_per_second_per_rank"] for row in rows if row["way"] == first["way"]
        },
    }


def earlier(path: Path, result: dict[str, Any], ranks: int) -> list[dict[str, Any]]:
    """The rows of other numbers of ranks in a file that --append adds to; raises ValueError where they cannot be compared."""
    if not path.is_file():
        return []
    before = json.loads(path.read_text(encoding="utf-8"))
    for part, what in (("settings", "other settings"), ("environment", "another environment")):
        keys = {*before[part], *result[part]} - {"date"}
        if names := sorted(key for key in keys if before[part].get(key) != result[part].get(key)):
            raise ValueError(f"--append: {path} was measured with {what} ({', '.join(names)}); give another --out")
    return [row for row in before["results"] if row["ranks"] != ranks]


def table(rows: Sequence[dict[str, Any]]) -> str:
    lines = []
    for row in rows:
        mfu = "MFU not known" if row["mfu"] is None else f"MFU {row['mfu']:.1%} ({row['mfu_step']:.1%} of the step)"
        memory = "" if row["memory_gib"] is None else f", {row['memory_gib']:.2f} GiB"
        lines.append(
            f"{row['ranks']} ranks, {row['way']}: {row['seconds']:.3f} s a step, a rank {row[PER_SECOND[0] + '_per_rank']:,.0f} "
            f"computed and {row[PER_SECOND[1] + '_per_rank']:,.0f} effective tok/s, {row['tflops']:.3g} TFLOP/s, {mfu}{memory}"
        )
        for name, seconds in row["seconds_by_phase"].items():
            lines.append(f"{name:>20}{seconds:>10.3f} s{seconds / row['seconds']:>8.1%}")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    size = int(os.environ.get("WORLD_SIZE", 1))
    options = options_of(arguments, size)
    config = config_of(options, size)
    cut = MODELS[options.shape]._replace(layers=options.layers, vocab=options.vocab)
    shape = SHAPES[options.trajectory]
    ranks = start()
    try:
        fsdp.check_sharding(config.training, ranks)
        layers.check_layers(config.training, llama(cut, shape.state(options.states)), ranks.device)
        named = {key: value for key, value in vars(options).items() if key not in ("out", "append", "quick")}
        named |= {"model": cut._asdict(), "lengths": vars(shape), "peak_tflops": _tflops(options, ranks)}
        result: dict[str, Any] = {"environment": environment(), "settings": named}
        rows = earlier(options.out, result, size) if options.append else []
        for way in options.ways:
            rows.append(measure(options, config, ranks, way))
        if ranks.main:
            _write(options.out, result, rows)
    finally:
        stop()


def _tflops(options: argparse.Namespace, ranks: Ranks) -> float | None:
    """The peak that MFU is measured against."""
    dtype = torch.bfloat16 if options.compute_dtype == "bfloat16" else torch.float32
    peak = peak_flops(options.peak_tflops, ranks.device, dtype)
    return None if peak is None else peak / 1e12


def _write(path: Path, result: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    rows.sort(key=lambda row: row["ranks"])
    result |= {"summary": summarize(rows), "results": rows}
    write_text(path, json.dumps(result, indent=1, allow_nan=False) + "\n")
    print(table(rows))
    print(json.dumps(result["summary"], indent=1))
