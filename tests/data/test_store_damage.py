"""Single flipped bits in a store: each is found and named, or changes nothing of what is read."""

from __future__ import annotations

import random
import sqlite3
from pathlib import Path

import pytest
from support.stores import make_question, make_trajectory

from swirl_fast.data.store import Store
from swirl_fast.trajectory import Finish
from swirl_fast.verdict import Judgement, Verdict

FLIPS = 40


@pytest.fixture
def written(tmp_path: Path) -> Path:
    questions = [make_question(number) for number in range(6)]
    trajectories = [make_trajectory(question, k, 1 + k, Finish.ANSWER) for question in questions for k in range(3)]
    path = tmp_path / "trajectories.db"
    with Store(path) as store:
        store.add_questions(questions)
        store.record(trajectories)
        store.set_meta("collection", {"model": "tiny"})
        for trajectory in trajectories:
            store.add_verdicts(
                "rules", {key: Judgement(Verdict.GOOD, "well said") for key in trajectory.content_hashes()}
            )
    return path


def contents(path: Path) -> list[object]:
    with Store(path, writable=False) as store:
        store.check()
        trajectories = list(store.trajectories())
        hashes = [key for trajectory in trajectories for key in trajectory.content_hashes()]
        return [store.meta(), store.questions(), trajectories, store.verdicts("rules", hashes)]


def test_a_flipped_bit_anywhere_is_found_or_harmless(written: Path, tmp_path: Path) -> None:
    whole, before = written.read_bytes(), contents(written)
    rng, copy, found = random.Random(0), tmp_path / "copy.db", 0
    for _ in range(5 * FLIPS):
        flipped = bytearray(whole)
        flipped[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
        copy.write_bytes(flipped)
        try:
            assert contents(copy) == before
        except ValueError as error:
            assert "copy.db" in str(error) and "use another run.name" in str(error), str(error)
            found += 1
    assert found > FLIPS


def test_a_flipped_bit_in_a_row_is_named_with_its_row(written: Path, tmp_path: Path) -> None:
    """In a text or a token, which SQLite has no means to notice."""
    whole = written.read_bytes()
    rng, copy = random.Random(1), tmp_path / "copy.db"
    for text, table in (
        (b"well said", "verdicts"),
        (b"What is 3 + 3?", "questions"),
        (b"step 0 ", "steps"),
        (b"tiny", "meta"),
    ):
        places = [at for at in range(len(whole)) if whole.startswith(text, at)]
        for _ in range(FLIPS // 4):
            flipped = bytearray(whole)
            flipped[rng.choice(places) + rng.randrange(len(text))] ^= 1 << rng.randrange(8)
            copy.write_bytes(flipped)
            with pytest.raises(ValueError, match=f"copy.db, table {table}, .*damaged or changed: copy the file again"):
                contents(copy)
            with pytest.raises(ValueError, match=f"copy.db, table {table}, "):
                Store(copy)


@pytest.mark.parametrize(
    "statement",
    [
        "DELETE FROM steps WHERE trajectory = 3 AND i = 2",  # the last of a finished one
        "DELETE FROM steps WHERE trajectory = 3 AND i = 0",
        "UPDATE steps SET i = 7 WHERE trajectory = 3 AND i = 2",
        "UPDATE steps SET tokens = zeroblob(length(tokens)) WHERE trajectory = 3 AND i = 1",
        "UPDATE trajectories SET finish = NULL WHERE number = 3",
        "UPDATE trajectories SET number = 99 WHERE number = 3",
        "UPDATE questions SET position = 99 WHERE position = 3",
        "UPDATE verdicts SET verdict = 'BAD', reward = 0 WHERE content_hash = (SELECT min(content_hash) FROM verdicts)",
    ],
)
def test_a_row_that_was_changed_moved_or_lost_is_found(written: Path, statement: str) -> None:
    with sqlite3.connect(written) as db:
        db.execute(statement)
    db.close()
    with pytest.raises(ValueError, match="trajectories.db, table .* do not match their hash"):
        contents(written)
