"""How fast do trajectories reach the trainer, how soon does the first batch come, and how soon does an interrupted run go on?

    python -m benchmarks.shards --quick --out benchmarks/results/DATE-shards.json

The stream of the trainer against a plain torch Dataset with a DataLoader on the same trajectories. Every way hands out the same
batches of whole, decoded trajectories, shuffled by a seed, in one process (one rank):

    stream            shards in a folder, prefetch=0: what reading and decoding cost
    stream_ahead      the same with prefetch=2, as the trainer has it
    stream_remote     the same from file://, copied into a cache that is empty at the start
    jsonl, pickle     Dataset on one file of JSON lines or pickles, offsets beside it, num_workers=0; it verifies nothing
    jsonl_2, pickle_2 the same with two worker processes

First batch: opening and reading one batch; the stream in a folder hashes all shards in this time (`seconds_verify`). Resume: the same in
the middle of an epoch, by the stream's state or by a sampler that begins there. Share of a step: what waiting for the next batch takes
of a step and that wait together.

Read with care: all files lie in the page cache, file:// stands for an object store, and its bandwidth is that of this machine's disk. Not
measured: several ranks on one disk.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import pickle
import random
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler
from tqdm import tqdm

from benchmarks.environment import environment
from swirl_fast.data.shard_source import ShardCache
from swirl_fast.data.shards import StepSample, verify_shards, write_shards
from swirl_fast.data.stream import TrajectoryStream
from swirl_fast.files import write_json
from swirl_fast.formats.format import Action
from swirl_fast.trajectory import Finish, Step, Trajectory
from swirl_fast.verdict import Verdict

Batches = Iterator[list[StepSample]]

SEED = 0
PROMPT, ACTION, RESULT = 400, 120, 600  # tokens, the search shape
QUICKSTART = Path(__file__).parent / "results" / "2026-11-22-quickstart.json"


# ---- the data


def make_samples(count: int, steps: int, seed: int = SEED) -> Iterator[StepSample]:
    """Random tokens of real lengths, four characters of text a token."""
    words = ["".join(random.Random(n).choices("abcdefghijklmnopqrstuvwxyz", k=2 + n % 9)) for n in range(2000)]
    draw, numbers = random.Random(seed), np.random.default_rng(seed)

    def text(tokens: int) -> str:
        return " ".join(draw.choices(words, k=tokens * 4 // 7))

    for number in range(count):
        tokens = numbers.integers(0, 49_152, PROMPT + steps * ACTION + (steps - 1) * RESULT).astype(np.int32)
        spans = [PROMPT + i * (ACTION + RESULT) for i in range(steps)]
        trajectory = Trajectory(
            f"q{number}-0", f"q{number}", "search", text(20), number, PROMPT, tokens, finish=Finish.ANSWER
        )
        for i, start in enumerate(spans):
            last = i == steps - 1
            action = Action("answer", argument=text(5)) if last else Action("tool", tool="search", argument=text(12))
            logprobs = np.log(numbers.uniform(0.05, 1, ACTION).astype(np.float32)).tolist()
            observation = None if last else text(RESULT)
            trajectory.steps.append(Step(start, start + ACTION, text(ACTION), action, logprobs, 0, observation))
        yield StepSample(trajectory, [draw.choice(list(Verdict)) for _ in range(steps)])


def write_data(folder: Path, count: int, steps: int) -> None:
    """folder/shards, folder/jsonl, folder/pickle, and the offsets of the latter two."""
    offsets: dict[str, list[int]] = {"jsonl": [0], "pickle": [0]}
    with open(folder / "jsonl", "wb") as lines, open(folder / "pickle", "wb") as pickles:

        def written() -> Iterator[StepSample]:
            for sample in make_samples(count, steps):
                lines.write(json.dumps(dataclasses.asdict(sample), default=np.ndarray.tolist).encode() + b"\n")
                pickles.write(pickle.dumps(sample, protocol=5))
                offsets["jsonl"].append(lines.tell())
                offsets["pickle"].append(pickles.tell())
                yield sample

        samples = tqdm(written(), "trajectories", count, disable=None, leave=False)
        write_shards(folder / "shards", samples, fingerprint={"benchmark": "shards", "seed": SEED})
    for name, places in offsets.items():
        np.save(folder / f"{name}.npy", np.array(places))


# ---- the ways


class PlainDataset(Dataset):
    def __init__(self, folder: Path, kind: str) -> None:
        self.kind, self.path = kind, folder / kind
        self.offsets = np.load(folder / f"{kind}.npy")
        self.file: Any = None  # opened in the process that reads

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, i: int) -> StepSample:
        if self.file is None:
            self.file = open(self.path, "rb")  # noqa: SIM115
        self.file.seek(self.offsets[i])
        data = self.file.read(self.offsets[i + 1] - self.offsets[i])
        return pickle.loads(data) if self.kind == "pickle" else _from_json(json.loads(data))


class SeededSampler(Sampler):
    """Permutations of (seed, epoch), from a position on, without end."""

    def __init__(self, count: int, position: int) -> None:
        self.count, self.position = count, position

    def __iter__(self) -> Iterator[int]:
        epoch, at = divmod(self.position, self.count)
        while True:
            order = torch.randperm(self.count, generator=torch.Generator().manual_seed(SEED * 1_000_003 + epoch))
            yield from order[at:].tolist()
            epoch, at = epoch + 1, 0


def _from_json(value: dict[str, Any]) -> StepSample:
    trajectory = value["trajectory"]
    steps = [Step(**{**step, "action": Action.of_table(step["action"])}) for step in trajectory["steps"]]
    read = {"steps": steps, "finish": Finish(trajectory["finish"]), "other_answers": tuple(trajectory["other_answers"])}
    return StepSample(
        Trajectory(**{**trajectory, **read}),
        [Verdict(verdict) for verdict in value["verdicts"]],
    )


def plain(folder: Path, batch: int, position: int, kind: str, workers: int) -> Batches:
    dataset = PlainDataset(folder, kind)
    sampler = SeededSampler(len(dataset), position)
    yield from DataLoader(dataset, batch, sampler=sampler, num_workers=workers, collate_fn=list)


def stream(folder: Path, batch: int, position: int, prefetch: int, remote: bool = False) -> Batches:
    cache = folder / "cache"
    shutil.rmtree(cache, ignore_errors=True)
    shards = ShardCache(f"file://{folder.absolute() / 'shards'}", cache) if remote else folder / "shards"
    one = TrajectoryStream(shards, global_batch=batch, rank=0, world_size=1, seed=SEED, prefetch=prefetch)
    try:
        if position:
            one.load_state_dict({**one.state_dict(), "position": position})
        while True:
            yield one.next_batch()
    finally:
        one.close()


WAYS: dict[str, Callable[[Path, int, int], Batches]] = {
    "stream": lambda folder, batch, position: stream(folder, batch, position, prefetch=0),
    "stream_ahead": lambda folder, batch, position: stream(folder, batch, position, prefetch=2),
    "stream_remote": lambda folder, batch, position: stream(folder, batch, position, prefetch=2, remote=True),
    "jsonl": lambda folder, batch, position: plain(folder, batch, position, "jsonl", 0),
    "pickle": lambda folder, batch, position: plain(folder, batch, position, "pickle", 0),
    "jsonl_2": lambda folder, batch, position: plain(folder, batch, position, "jsonl", 2),
    "pickle_2": lambda folder, batch, position: plain(folder, batch, position, "pickle", 2),
}


# ---- measuring


def first_batch(way: str, folder: Path, batch: int, position: int) -> float:
    """Seconds from opening the data to the batch at `position`."""
    start = time.perf_counter()
    batches = WAYS[way](folder, batch, position)
    next(batches)
    seconds = time.perf_counter() - start
    batches.close()  # type: ignore[attr-defined]
    return seconds


def read_rate(way: str, folder: Path, batch: int, count: int) -> float:
    """Trajectories a second after the first batch."""
    batches = WAYS[way](folder, batch, 0)
    next(batches)
    start = time.perf_counter()
    read = sum(map(len, itertools.islice(batches, max(1, count // batch - 1))))
    seconds = time.perf_counter() - start
    batches.close()  # type: ignore[attr-defined]
    return read / seconds


def waiting(way: str, folder: Path, batch: int, steps: int, seconds_step: float) -> list[float]:
    """Seconds of each next_batch after the first, between steps that keep all of torch's threads at matrix products."""
    matrix = torch.randn(512, 512)
    batches = WAYS[way](folder, batch, 0)
    next(batches)
    waits = []
    for _ in range(steps):
        until = time.perf_counter() + seconds_step
        while time.perf_counter() < until:
            matrix @ matrix
        start = time.perf_counter()
        next(batches)
        waits.append(time.perf_counter() - start)
    batches.close()  # type: ignore[attr-defined]
    return waits


def measure(way: str, folder: Path, options: argparse.Namespace) -> dict[str, float]:
    repeat = range(options.repeats)
    middle = options.trajectories // 2
    rate = statistics.median(read_rate(way, folder, options.batch, options.trajectories) for _ in repeat)
    waits = waiting(way, folder, options.batch, options.waits, options.step_seconds)
    return {
        "trajectories_per_second": rate,
        "tokens_per_second": rate * options.tokens,
        "first_batch_seconds": statistics.median(first_batch(way, folder, options.batch, 0) for _ in repeat),
        "resume_seconds": statistics.median(first_batch(way, folder, options.batch, middle) for _ in repeat),
        "wait_seconds_mean": statistics.mean(waits),
        "wait_seconds_max": max(waits),
        "share_of_step": statistics.mean(waits) / (statistics.mean(waits) + options.step_seconds),
    }


def summarize(results: dict[str, dict[str, float]], quickstart: dict[str, Any] | None) -> dict[str, Any]:
    """Of each way the figures that were asked for; the share of a step of the quickstart is of its mean and of its quickest step."""
    keys = ("trajectories_per_second", "first_batch_seconds", "resume_seconds", "share_of_step")
    summary: dict[str, Any] = {way: {key: row[key] for key in keys} for way, row in results.items()}
    seconds = [row["seconds"] for row in quickstart["steps"]] if quickstart else []
    if "stream" in results and seconds:
        wait = results["stream"]["wait_seconds_mean"]
        summary["share_of_quickstart_step"] = {
            "mean": wait / (wait + statistics.mean(seconds)),
            "quickest": wait / (wait + min(seconds)),
        }
    return summary


def options_of(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="400 trajectories, one repeat, where these are unset")
    parser.add_argument("--trajectories", type=int, help="default 5000")
    parser.add_argument("--steps", type=int, default=5, help="actions of a trajectory, 1 to 10")
    parser.add_argument("--batch", type=int, default=8, help="trajectories a training step")
    parser.add_argument("--repeats", type=int, help="of which the median is taken, default 3")
    parser.add_argument(
        "--step-seconds", type=float, default=0.25, help="of the step between batches; a quick one on a GPU"
    )
    parser.add_argument("--waits", type=int, help="steps over which waiting is measured, default 40")
    parser.add_argument("--ways", default=",".join(WAYS))
    parser.add_argument("--out", type=Path, required=True, help="JSON, rewritten after every way")
    options = parser.parse_args(arguments)
    for name, quick, full in (("trajectories", 400, 5000), ("repeats", 1, 3), ("waits", 8, 40)):
        if getattr(options, name) is None:
            setattr(options, name, quick if options.quick else full)
    for name in ("trajectories", "steps", "batch", "repeats", "waits", "step_seconds"):
        if (value := getattr(options, name)) <= 0:
            parser.error(f"--{name.replace('_', '-')} {value}: must be above 0")
    if options.steps > 10:
        parser.error(f"--steps {options.steps}: give 1 to 10")
    chosen = options.ways.split(",")
    if strange := set(chosen) - set(WAYS):
        parser.error(f"--ways {options.ways}: {', '.join(sorted(strange))} is none of {', '.join(WAYS)}")
    options.ways = [way for way in WAYS if way in chosen]
    if not options.out.absolute().parent.is_dir():
        parser.error(f"{options.out}: the folder {options.out.absolute().parent} does not exist; make it first")
    options.tokens = PROMPT + options.steps * ACTION + (options.steps - 1) * RESULT
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    options = options_of(arguments)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_data(folder, options.trajectories, options.steps)
        start = time.perf_counter()
        verify_shards(folder / "shards")
        result: dict[str, Any] = {
            "environment": environment(),
            "settings": {key: value for key, value in vars(options).items() if key != "out"},
            "bytes": {
                "shards": sum(path.stat().st_size for path in (folder / "shards").iterdir()),
                **{name: (folder / name).stat().st_size for name in ("jsonl", "pickle")},
            },
            "shards": len(list((folder / "shards").glob("*.mds"))),
            "seconds_verify": time.perf_counter() - start,
        }
        quickstart = json.loads(QUICKSTART.read_text(encoding="utf-8")) if QUICKSTART.is_file() else None
        print(
            f"{options.trajectories} trajectories of {options.tokens} tokens, {result['bytes']['shards']:,} B of shards"
        )
        print(
            f"{'':>14}{'a second':>10}{'first batch':>13}{'resume':>10}{'share of a step of':>20} {options.step_seconds} s"
        )
        results: dict[str, dict[str, float]] = {}
        for way in tqdm(options.ways, disable=None, leave=False):
            row = results[way] = measure(way, folder, options)
            result["summary"], result["results"] = summarize(results, quickstart), results
            write_json(options.out, result)
            tqdm.write(
                f"{way:>14}{row['trajectories_per_second']:>10,.0f}{row['first_batch_seconds']:>11.3f} s"
                f"{row['resume_seconds']:>8.3f} s{row['share_of_step']:>20.3%}"
            )
    for name, share in result["summary"].get("share_of_quickstart_step", {}).items():
        print(f"waiting for data without prefetching would be {share:.3%} of the quickstart's {name} step")
    print(options.out)


if __name__ == "__main__":
    main()
