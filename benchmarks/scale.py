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
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.environment import environment
from swirl_fast.comb.flops import ModelSize
from swirl_fast.comb.micro_batches import MicroBatchPlan, Walk, micro_batches
from swirl_fast.comb.transfers import Transfer, rank_groups, transfers
from swirl_fast.comb.tree import SampledState, Trunk
from swirl_fast.config import load
from swirl_fast.files import write_json
from swirl_fast.ranks import Ranks
from swirl_fast.training.batch import ROUNDS, Packer, RankActions

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

    def __init__(self, ranks: int, options: argparse.Namespace) -> None:
        self.ranks, self.options = ranks, options
        config = load(None, [f"training.token_budget={options.token_budget}"])
        self.packer = Packer(config, Ranks(0, 1, torch.device("cpu")), SIZE, max_context=32_768)

    def of(self, rank: int) -> RankActions:
        return sampled(rank, self.ranks, self.options.trajectories, self.options.samples, self.options.seed)

    def measure(self) -> dict[str, Any]:
        parts = [self.of(rank) for rank in range(self.ranks)]
        works = [self.packer.work(part) for part in parts]
        tokens, cut = sum(map(_tokens, parts)), sum(sum(plan.tokens for plan in self._plans(part)) for part in parts)
        seconds, sent, moved = np.zeros(self.ranks), np.zeros(self.ranks), 0.0
        told = np.zeros(self.ranks, np.float32)
        self._tell(parts, range(self.ranks), told, seconds)
        for turn in range(ROUNDS):
            groups = rank_groups(self.ranks)
            moved += self._round(parts, groups[turn % len(groups)], told, seconds, sent) / sum(works)
        plans = []
        for rank, part in enumerate(parts):
            started = time.process_time()
            plans.append(self._plans(part))
            seconds[rank] += time.process_time() - started
        after = [sum(plan.flops for plan in of_rank) for of_rank in plans]
        tokens_after = sum(plan.tokens for of_rank in plans for plan in of_rank)
        most = max(map(len, plans))
        return {
            "ranks": self.ranks,
            "seconds_mean": float(seconds.mean()),
            "seconds_longest": float(seconds.max()),
            "bytes_mean": float(sent.mean()),
            "bytes_most": float(sent.max()),
            "moved_share": moved,
            "imbalance_before": max(works) / float(np.mean(works)) - 1,
            "imbalance": max(after) / float(np.mean(after)) - 1,
            "micro_batches": most,
            "padding": 1 - tokens_after / (most * self.ranks * self.options.token_budget),
            "repeated_by_budget": cut / tokens - 1,
            "repeated_by_moves": tokens_after / cut - 1,
            "shared_lost": 1 - self._whole_tree() / tokens if self.ranks <= self.options.whole else None,
        }

    def _tell(self, parts: list[RankActions], ranks: Iterable[int], told: np.ndarray, seconds: np.ndarray) -> None:
        for rank in ranks:
            started = time.process_time()
            told[rank] = self.packer.work(parts[rank])
            seconds[rank] += time.process_time() - started

    def _round(
        self,
        parts: list[RankActions],
        groups: Sequence[Sequence[int]],
        told: np.ndarray,
        seconds: np.ndarray,
        sent: np.ndarray,
    ) -> float:
        """One round of Packer.shared_out for all ranks, told: their work, before and after; returns the work that was to be moved."""
        planned = []
        for group in groups:
            started = time.process_time()
            planned += transfers(told[group].tolist(), group)
            seconds[group] += time.process_time() - started
            sent[group] += 4 * len(group)
        taken: dict[int, list[RankActions]] = defaultdict(list)
        of_giver: dict[int, list[Transfer]] = defaultdict(list)
        for one in planned:
            of_giver[one.giver].append(one)
        for giver, own in of_giver.items():
            started = time.process_time()
            parts[giver], given = self.packer.give(parts[giver], [one.work for one in own])
            blobs = [pickle.dumps(part, protocol=5) for part in given]
            seconds[giver] += time.process_time() - started
            sent[giver] += sum(map(len, blobs))
            for one, blob in zip(own, blobs, strict=True):
                taken[one.taker].append(pickle.loads(blob))
        for taker, others in taken.items():
            started = time.process_time()
            parts[taker] = parts[taker].with_others(others)
            seconds[taker] += time.process_time() - started
        self._tell(parts, sorted({*of_giver, *taken}), told, seconds)
        return sum(one.work for one in planned)

    def _plans(self, part: RankActions) -> list[MicroBatchPlan]:
        return micro_batches(part.trunks, self.options.token_budget, None, SIZE, lambda fewest: fewest)

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


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="8 and 32 ranks")
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 64, 512, 4096])
    parser.add_argument("--trajectories", type=int, default=8, help="of a rank")
    parser.add_argument("--samples", type=int, default=8, help="G")
    parser.add_argument("--seed", type=int, default=0, help="of the trajectories")
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
        row = World(ranks, options).measure()
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
