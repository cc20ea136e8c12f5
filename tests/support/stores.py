"""Questions, trajectories and samples for tests of the store and the shards."""

from __future__ import annotations

import copy
import random
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from swirl_fast.data.mds import Reader
from swirl_fast.data.shards import StepSample, decode_sample, verify_shards
from swirl_fast.data.store import Store
from swirl_fast.data.stream import TrajectoryStream
from swirl_fast.formats.format import Action
from swirl_fast.tasks.task import Question
from swirl_fast.trajectory import Finish, Step, Trajectory
from swirl_fast.verdict import Verdict

TEXTS = ["2 + 3", "", "naïve – 雨", "line\nbreak\0nul", "\ud83d lone surrogate", "'; DROP TABLE steps; --", "x" * 5000]


def make_question(number: int) -> Question:
    return Question(f"q{number}", "gsm8k", f"What is {number} + {number}?", (str(2 * number), f"{2 * number}.0"))


def make_trajectory(question: Question, index: int, num_steps: int, finish: Finish | None, seed: int = 0) -> Trajectory:
    """A trajectory whose numbers and texts are all different; between two steps lie observation tokens."""
    rng = random.Random(f"{seed}/{question.id}/{index}")
    tokens = [rng.randrange(50_000) for _ in range(rng.randint(1, 9))]
    seed, prompt_length, steps = rng.randrange(2**70), len(tokens), []
    for i in range(num_steps):
        tokens += [rng.randrange(50_000) for _ in range(rng.randint(0, 2))]  # header of the turn
        start, length = len(tokens), rng.randint(1, 7)
        tokens += [rng.randrange(50_000) for _ in range(length)]
        logprobs = [float(np.float32(-rng.expovariate(1.0))) for _ in range(length)]
        last = i == num_steps - 1 and finish is Finish.ANSWER
        if last:
            action = Action("answer", argument=rng.choice(TEXTS))
        elif rng.random() < 0.3:
            action = Action("malformed", error=rng.choice(TEXTS))
        else:
            action = Action("tool", tool="calculator", argument=rng.choice(TEXTS))
        observation = None if last else rng.choice(TEXTS)
        text = f"step {i} {rng.choice(TEXTS)}"
        steps.append(Step(start, start + length, text, action, logprobs, rng.randrange(9), observation))
        if not last:
            tokens += [rng.randrange(50_000) for _ in range(rng.randint(0, 5))]
    id_ = f"{question.id}-{index}"
    return Trajectory(
        id_, question.id, question.task, question.text, seed, prompt_length, np.array(tokens, np.int32), steps, finish
    )


def prefix(trajectory: Trajectory, num_steps: int) -> Trajectory:
    """The trajectory as it was after num_steps steps, not finished."""
    part = copy.deepcopy(trajectory)
    if num_steps < trajectory.num_steps:
        part.finish = None
        part.steps = part.steps[:num_steps]
        # Tokens of the header of the next turn may or may not be there yet: here they are.
        part.tokens = part.tokens[: trajectory.steps[num_steps].start if num_steps else trajectory.prompt_length]
    return part


FINGERPRINT = {"model": "tiny", "filter": {"kind": "process"}}


def make_samples(count: int, seed: int = 0) -> list[StepSample]:
    samples = []
    for number in range(count):
        trajectory = make_trajectory(make_question(number), number, 1 + number % 4, Finish.ANSWER, seed)
        verdicts = [list(Verdict)[(number + i) % 3] for i in range(trajectory.num_steps)]
        samples.append(StepSample(trajectory, verdicts))
    return samples


def ids(samples: list[StepSample]) -> list[str]:
    return [sample.trajectory.id for sample in samples]


def read_samples(folder: Path) -> Iterator[StepSample]:
    """Every sample of a shard folder, in the order written, after the folder was verified."""
    verify_shards(folder)
    reader = Reader(folder)
    for i in range(len(reader)):
        yield decode_sample(reader[i])


def count_rows(store: Store, table: str, where: str = "true") -> int:
    """Rows of a table of a store: questions, trajectories, steps, verdicts."""
    return store._value(f"SELECT count(*) FROM {table} WHERE {where}")


def open_stream(folder: Path, batch: int, rank: int = 0, world: int = 1, seed: int = 5, **more) -> TrajectoryStream:
    return TrajectoryStream(folder, global_batch=batch, rank=rank, world_size=world, seed=seed, **more)


def rows(path: Path, table: str) -> list[tuple[Any, ...]]:
    db = sqlite3.connect(path)
    db.text_factory = lambda data: data.decode("utf-8", "surrogatepass")
    try:
        return db.execute(f"SELECT * FROM {table} ORDER BY 1, 2").fetchall()
    finally:
        db.close()


def assert_same_store(found: Path, wanted: Path) -> None:
    """Row for row; log-probs, which sums over other batches round otherwise, as closely as float32 allows."""
    for table in ("questions", "trajectories", "steps", "verdicts"):
        ours, theirs = rows(found, table), rows(wanted, table)
        if table == "steps":
            given, expected = (
                np.concatenate([np.frombuffer(row[-2], "<f4") for row in each]) for each in (ours, theirs)
            )
            np.testing.assert_allclose(given, expected, atol=1e-4)
        cut = {"steps": -2, "trajectories": -1}.get(table)  # their hashes cover the log-probs
        assert [row[:cut] for row in ours] == [row[:cut] for row in theirs], table
    with Store(found, writable=False) as one, Store(wanted, writable=False) as other:
        assert {**one.meta(), "seconds": 0} == {**other.meta(), "seconds": 0}
