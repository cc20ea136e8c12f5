"""Keeps what training samples: every action of a step with its verdict, reward and advantage, in runs/NAME/samples (data/samples.py)."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from torch import Tensor

from swirl_fast.data.samples import (
    FOLDER,
    Sample,
    drop_samples,
    full_from,
    mark_full,
    samples_bytes,
    unmark_full,
    write_samples,
)
from swirl_fast.ranks import Ranks
from swirl_fast.rollouts.pipeline import SampledBatch


class SampleLog:
    """Writes a file a step, on rank 0, as long as all of them together have at most `limit_mb` MB (1e6 bytes). The first step that does not
    fit ends it, also when the training is stopped and goes on, until that step would fit, with a higher limit or fewer files. 0: nothing
    is written. Files of later steps than `step`, left by a run that died after its last checkpoint, are removed first. Collective.
    """

    def __init__(self, folder: Path, step: int, ranks: Ranks, limit_mb: float) -> None:
        self._folder, self._ranks, self._limit_mb = folder, ranks, limit_mb
        self._bytes, self._open = 0, limit_mb > 0
        if ranks.main:
            drop_samples(folder, step)
            self._bytes, full = samples_bytes(folder), full_from(folder)
            if full is not None and full[0] <= step and not self._fits(full[1]):
                self._open = False
            elif self._open:
                unmark_full(folder)
        self._bytes, self._open = ranks.gather((self._bytes, self._open))[0]

    def write(self, step: int, batch: SampledBatch, advantage_A: Tensor, valid_A: Tensor) -> None:
        """One step's samples, those of all ranks. advantage_A, valid_A: as `objective.advantages`, of this rank's actions."""
        if not self._open or batch.judgements is None:
            return
        mine = samples_of(step, batch, advantage_A, valid_A, self._ranks)
        keyed = [((one.place, one.state, one.sample), one.line) for one in mine]
        lines = [line for _, line in sorted(pair for rank in self._ranks.gather(keyed) for pair in rank)]
        size = sum(len(line.encode()) for line in lines)
        self._open = self._fits(size)
        self._bytes += size if self._open else 0
        if not self._ranks.main:
            return
        if self._open:
            write_samples(self._folder, step, lines)
        else:
            mark_full(self._folder, step, size)
            print(
                f"train: {self._folder / FOLDER} has {self._bytes / 1e6:.1f} MB: the samples of step {step} ({size / 1e6:.1f} MB) and of "
                f"later ones are not kept (training.samples_mb={self._limit_mb:g})"
            )

    def _fits(self, size: int) -> bool:
        return self._bytes + size <= self._limit_mb * 1e6


def samples_of(step: int, batch: SampledBatch, advantage_A: Tensor, valid_A: Tensor, ranks: Ranks) -> list[Sample]:
    """This rank's. Ranks take turns in the order of recorded trajectories (data/stream.py), so places do not depend on their number."""
    assert batch.judgements is not None, "imitated actions are not sampled"
    places = _places(batch, ranks)
    drawn: Counter[int] = Counter()
    samples = []
    rows = zip(batch.sampled, batch.judgements, advantage_A.numpy(), valid_A.tolist(), strict=True)
    for sample, judgement, advantage, valid in rows:
        trajectory, state, action = batch.trajectories[sample.trajectory], len(sample.view.history), sample.action
        samples.append(
            Sample(
                step=step,
                place=places[sample.trajectory],
                trajectory=trajectory.id,
                question_id=trajectory.question_id,
                task=trajectory.task,
                question=trajectory.question,
                state=state,
                sample=drawn[sample.state],
                text=sample.view.action_text,
                kind=action.kind,
                tool=action.tool,
                argument=action.argument,
                error=action.error,
                tokens=len(sample.completion.tokens),
                cut_off=action.cut_off,
                policy_version=sample.completion.policy_version,
                observation=None if batch.questions is None else trajectory.steps[state].observation,
                verdict=judgement.verdict.value,
                reward=judgement.reward,
                reason=judgement.reason,
                advantage=float(str(advantage)) if valid else None,  # the shortest digits of the float32
            )
        )
        drawn[sample.state] += 1
    return samples


def _places(batch: SampledBatch, ranks: Ranks) -> list[int]:
    """The place of each of this rank's trajectories among those of all ranks."""
    if batch.questions is None:
        return [number * ranks.size + ranks.rank for number in range(len(batch.trajectories))]
    group = batch.questions.count(0)  # every question has as many
    return [
        (question * ranks.size + ranks.rank) * group + number % group for number, question in enumerate(batch.questions)
    ]
