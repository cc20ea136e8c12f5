"""What does it cost a rank to share a batch out, and how evenly is it shared, with 8 to 4,096 ranks?

    python -m benchmarks.scale --quick --out FILE                              8 and 32 ranks
    python -m benchmarks.scale --out benchmarks/results/DATE-scale.json        8 to 4,096 ranks

One process plays every rank in turn with the trainer's own code (swirl_fast/training/batch.py): each has `--trajectories` trajectories of
1 to 10 states, with G actions of unlike lengths at each, tells its work, gives or takes actions, and cuts what it then has into
micro-batches.
Questions come from a pool that grows with the ranks, two trajectories a question on average, so that some prefixes are shared.

seconds: of a CPU, on one rank for sharing out and cutting, without the network, mean and longest of all ranks. bytes: sent by a rank,
mean, and most of any: pickled actions, and 4 bytes for every rank that it tells its work. imbalance: work of the busiest rank over the
mean's, less 1, before and after. padding: share of the tokens' budget in the micro-batches that all ranks run which holds no token.
repeated_by_budget: tokens computed more than once since a micro-batch holds so many only; repeated_by_moves: those that come on top since
a rank gave actions whose path it needs itself; shared_lost: share of all tokens that one tree over the whole batch would not compute,
since two ranks hold the same question.

Not measured: the network, and laying out the packed arrays, which every rank does for its own micro-batches alone.
"""

from __future__ import annotations

import argparse
import json
import pickle
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.environment import environment
from swirl_fast.comb.flops import ModelSize
from swirl_fast.comb.micro_batches import MicroBatchPlan, Walk, micro_batches
from swirl_fast.comb.transfers import Transfer, rank_groups, relieving, transfers
from swirl_fast.comb.tree import SampledState, Trunk
from swirl_fast.config import load
from swirl_fast.files import write_json
from swirl_fast.ranks import Ranks
from swirl_fast.training.batch import LAST_ROUNDS, ROUNDS, Aim, Packer, RankActions

# Qwen2.5-1.5B
SIZE = ModelSize(linear=1.31e9, attention=((1536, None),) * 28, output=1536 * 151936)
PROMPT, VOCABULARY = (150, 450), 50_000


def sampled(rank: int, ranks: int, trajectories: int, samples: int, seed: int) -> RankActions:
    """What a rank sampled: the same on every call."""
    draw = np.random.default_rng((7, rank, seed))
    trunks, lengths = [], []
    for _ in range(trajectories):
        question = int(draw.integers(0, max(1, ranks * trajectories // 2)))
        of_question = np.random.default_rng((8, question, seed))
        prompt = of_question.integers(1, VOCABULARY, int(of_question.integers(*PROMPT)))
        steps = int(draw.integers(1, 11))
        bounds = len(prompt) + np.cumsum([0, *(draw.integers(80, 700, steps - 1))])
        rest = draw.integers(1, VOCABULARY, int(bounds[-1]) - len(prompt))
        states = []
        for length in bounds:
            sizes = draw.integers(20, 160, samples)
            actions = tuple(draw.integers(1, VOCABULARY, size).astype(np.int32) for size in sizes)
            states.append(SampledState(int(length), actions, tuple(range(len(lengths), len(lengths) + samples))))
            lengths += sizes.tolist()
        trunks.append(Trunk(np.concatenate([prompt, rest]).astype(np.int32), tuple(states)))
    ones = np.ones(len(lengths), np.float32)
    return RankActions(trunks, ones, ones, [np.zeros(n, np.float32) for n in lengths], [None] * len(lengths))


class World:
    """Every rank's part of one batch, in one process."""

    def __init__(self, ranks: int, options: argparse.Namespace, seed: int) -> None:
        self.ranks, self.options, self.seed = ranks, options, seed
        config = load(None, [f"training.token_budget={options.token_budget}"])
        self.packer = Packer(config, Ranks(0, 1, torch.device("cpu")), SIZE, max_context=32_768)

    def of(self, rank: int) -> RankActions:
        return sampled(rank, self.ranks, self.options.trajectories, self.options.samples, self.seed)

    def measure(self) -> dict[str, Any]:
        parts = [self.of(rank) for rank in range(self.ranks)]
        tokens, cut = sum(map(_tokens, parts)), sum(sum(plan.tokens for plan in self._plans(part)) for part in parts)
        self.seconds, self.sent = np.zeros(self.ranks), np.zeros(self.ranks)
        self.told, self.fewest = np.zeros(self.ranks, np.float32), np.zeros(self.ranks, int)
        self._tell(parts, range(self.ranks))
        before, total, groups = self.told.max() / self.told.mean() - 1, float(self.told.sum()), rank_groups(self.ranks)
        moved = sum(self._round(parts, groups[turn % len(groups)]) for turn in range(ROUNDS))
        most = int(self.fewest.max())
        self._tell(parts, np.flatnonzero(self.fewest < most).tolist(), most)
        aim = Aim(float(self.told.sum()) / self.ranks, most)
        moved += sum(self._last_rounds(parts, group, aim) for group in groups[0])
        most = max(len(self._plans(part)) for part in parts)
        plans = []
        for rank, part in enumerate(parts):
            with self._clock(rank):
                plans.append(self._plans(part, most))
        after = [sum(plan.flops for plan in of_rank) for of_rank in plans]
        tokens_after = sum(plan.tokens for of_rank in plans for plan in of_rank)
        return {
            "ranks": self.ranks,
            "seconds_mean": float(self.seconds.mean()),
            "seconds_longest": float(self.seconds.max()),
            "bytes_mean": float(self.sent.mean()),
            "bytes_most": float(self.sent.max()),
            "moved_share": moved / total,
            "imbalance_before": float(before),
            "imbalance": max(after) / float(np.mean(after)) - 1,
            "micro_batches": max(map(len, plans)),
            "padding": 1 - tokens_after / (most * self.ranks * self.options.token_budget),
            "repeated_by_budget": cut / tokens - 1,
            "repeated_by_moves": tokens_after / cut - 1,
            "shared_lost": 1 - self._whole_tree() / tokens if self.ranks <= self.options.whole else None,
        }

    @contextmanager
    def _clock(self, *ranks: int) -> Iterator[None]:
        started = time.process_time()
        yield
        self.seconds[list(ranks)] += time.process_time() - started

    def _tell(self, parts: list[RankActions], ranks: Iterable[int], count: int = 0) -> None:
        """What these ranks have to tell."""
        for rank in ranks:
            with self._clock(rank):
                self.told[rank], self.fewest[rank] = self.packer.load(parts[rank], count)

    def _round(self, parts: list[RankActions], groups: Sequence[Sequence[int]]) -> float:
        """One round of Packer.shared_out for all ranks; returns the work that was to be moved."""
        planned = []
        for group in groups:
            with self._clock(*group):
                planned += transfers(self.told[group].tolist(), group)
            self.sent[group] += 4 * len(group)
        taken: dict[int, list[RankActions]] = defaultdict(list)
        of_giver: dict[int, list[Transfer]] = defaultdict(list)
        for one in planned:
            of_giver[one.giver].append(one)
        for giver, own in of_giver.items():
            with self._clock(giver):
                parts[giver], given = self.packer.give(parts[giver], [one.work for one in own])
                blobs = [pickle.dumps(part, protocol=5) for part in given]
            self.sent[giver] += sum(map(len, blobs))
            for one, blob in zip(own, blobs, strict=True):
                taken[one.taker].append(pickle.loads(blob))
        for taker, others in taken.items():
            with self._clock(taker):
                parts[taker] = parts[taker].with_others(others)
        self._tell(parts, sorted({*of_giver, *taken}))
        return sum(one.work for one in planned)

    def _last_rounds(self, parts: list[RankActions], group: Sequence[int], aim: Aim) -> float:
        """The last rounds of Packer.shared_out for the ranks of a group; returns the work that was moved."""
        moved, seen = 0.0, []
        for turn in range(LAST_ROUNDS):
            self.sent[group] += 4 * len(group)
            told = self.told[group].tolist()
            planned = relieving(told, group, aim.work, turn)
            if not planned or (told, planned) in seen:
                break
            seen.append((told, planned))
            for one in planned:
                with self._clock(one.giver):
                    offer = self.packer.offer(parts[one.giver], self.told[one.giver], one.work, aim)
                    blob = pickle.dumps(offer and (offer[1], float(self.told[one.giver])), protocol=5)
                self.sent[one.giver] += len(blob)
                if offer is None:
                    continue
                with self._clock(one.taker):
                    accepted = self.packer.accept(parts[one.taker], *pickle.loads(blob), aim)
                self.sent[one.taker] += len(pickle.dumps(accepted is not None, protocol=5))
                if accepted is not None:
                    moved += float(self.told[one.giver]) - offer[2]
                    parts[one.giver], _, self.told[one.giver] = offer
                    parts[one.taker], self.told[one.taker] = accepted
        return moved

    def _plans(self, part: RankActions, count: int = 0) -> list[MicroBatchPlan]:
        return micro_batches(part.trunks, self.options.token_budget, None, SIZE, lambda fewest: max(fewest, count))

    def _whole_tree(self) -> int:
        trunks, number = [], 0
        for rank in range(self.ranks):
            mine = self.of(rank)
            trunks += [trunk.renumbered(range(number, number + len(mine.weight_A))) for trunk in mine.trunks]
            number += len(mine.weight_A)
        walk = Walk.of(trunks, SIZE)
        return walk.tokens(0, len(walk.actions))


def _tokens(actions: RankActions) -> int:
    walk = Walk.of(actions.trunks, SIZE)
    return walk.tokens(0, len(walk.actions))


def together(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Of worlds of one size: means, and of what is a most of all ranks the most."""
    most = ("seconds_longest", "bytes_most", "imbalance_before", "imbalance", "micro_batches")
    found: dict[str, Any] = {"ranks": rows[0]["ranks"], "worlds": len(rows)}
    for key in rows[0].keys() - {"ranks"}:
        values = [row[key] for row in rows]
        found[key] = None if None in values else max(values) if key in most else float(np.mean(values))
    return {key: found[key] for key in ("ranks", "worlds", *rows[0])}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="8 and 32 ranks")
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 64, 512, 4096])
    parser.add_argument("--trajectories", type=int, default=8, help="of a rank")
    parser.add_argument("--samples", type=int, default=8, help="G")
    parser.add_argument("--seed", type=int, default=0, help="of the trajectories")
    parser.add_argument("--least", type=int, default=64, help="a world of fewer ranks is measured with several seeds")
    parser.add_argument("--token-budget", type=int, default=16_384)
    parser.add_argument("--whole", type=int, default=512, help="most ranks for which the whole batch's tree is made")
    parser.add_argument("--out", type=Path, required=True, help="JSON, rewritten after every world")
    options = parser.parse_args(arguments)
    if options.quick:
        options.ranks = [8, 32]
    if min(*options.ranks, options.trajectories, options.samples) < 1:
        parser.error("--ranks, --trajectories and --samples: all at least 1")
    if not options.out.absolute().parent.is_dir():
        parser.error(f"--out {options.out}: the folder {options.out.absolute().parent} does not exist; make it first")
    about = {key: value for key, value in vars(options).items() if key != "out"}
    results: list[dict[str, Any]] = []
    for ranks in options.ranks:
        seeds = range(options.seed, options.seed + max(1, options.least // ranks))
        row = together([World(ranks, options, seed).measure() for seed in seeds])
        results.append(row)
        print(json.dumps(row), flush=True)
        first = results[0]
        summary = {
            "seconds": row["seconds_mean"] / first["seconds_mean"],
            "bytes": row["bytes_mean"] / first["bytes_mean"],
            "imbalance": max(one["imbalance"] for one in results),
        }
        write_json(
            options.out,
            {"environment": environment(), "settings": about, "summary": summary, "results": results},
        )
    print(f"from {results[0]['ranks']} to {results[-1]['ranks']} ranks: {summary}")
    print(options.out)


if __name__ == "__main__":
    main()
