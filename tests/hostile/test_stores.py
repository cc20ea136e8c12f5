"""A database from somebody else: its statements do not run, and values of other types are refused by name."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest
from support.collected import collected
from support.stores import make_question, make_trajectory

from swirl_fast import cli
from swirl_fast.data.store import Store
from swirl_fast.data.store_tables import columns, row_hash
from swirl_fast.trajectory import Finish
from swirl_fast.verdict import Judgement, Verdict

STATEMENTS = {
    "trigger": "CREATE TRIGGER t AFTER INSERT ON verdicts BEGIN DELETE FROM trajectories; END",
    "view": "CREATE VIEW v AS SELECT * FROM steps",
    "table": "CREATE TABLE more (x)",
    "generated": "ALTER TABLE meta ADD COLUMN more TEXT AS (upper(value))",
    "column": "ALTER TABLE steps ADD COLUMN more TEXT DEFAULT 'x'",
    "index": "CREATE INDEX i ON steps (text)",
    "expression": "CREATE INDEX i ON steps (upper(text))",
    "renamed": "ALTER TABLE verdicts RENAME TO others",
}


@pytest.fixture
def store(tmp_path: Path) -> Path:
    question = make_question(1)
    with Store(tmp_path / "t.db") as written:
        written.add_questions([question])
        written.record([make_trajectory(question, 0, 2, Finish.ANSWER)])
        written.add_verdicts("rules", {"h": Judgement(Verdict.GOOD, "good")})
        written.set_meta("collection", {"a": 1})
    return tmp_path / "t.db"


def change(path: Path, *statements: str) -> None:
    db = sqlite3.connect(path)
    for statement in statements:
        db.execute(statement)
    db.commit()
    db.close()


@pytest.mark.parametrize("kind", STATEMENTS)
def test_anything_but_our_tables_is_refused_before_it_is_used(store: Path, kind: str) -> None:
    change(store, STATEMENTS[kind])
    before = store.read_bytes()
    for writable in (True, False):
        with pytest.raises(
            ValueError, match=r"t\.db: .*(it holds the|is missing|not declared as).*Nothing was read from it"
        ):
            Store(store, writable=writable)
    assert store.read_bytes() == before


def test_a_view_in_the_place_of_a_table_is_refused(store: Path) -> None:
    change(store, "ALTER TABLE verdicts RENAME TO others", "CREATE VIEW verdicts AS SELECT * FROM others")
    with pytest.raises(ValueError, match="it holds the view verdicts, which swirl-fast does not make"):
        Store(store, writable=False)


def test_a_trigger_in_a_run_or_an_evaluation_does_not_fire(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = [*collected(tmp_path), "judge.kind=rules"]
    change(tmp_path / "r" / "trajectories.db", STATEMENTS["trigger"])
    for stage in ("judge", "filter", "collect"):
        assert cli.main([stage, *run]) == 1
        assert "trajectories.db: it holds the trigger t, which" in capsys.readouterr().err
    db = sqlite3.connect(tmp_path / "r" / "trajectories.db")
    assert db.execute("SELECT count(*) FROM trajectories").fetchone() == (4,)
    db.close()


WITH_ROWID = ("questions", "trajectories", "steps")
VALUES = [
    ("questions", "text", "x'c328'", "text is bytes and should be text"),
    ("questions", "text", "CAST(x'c328' AS TEXT)", "text is bytes and should be text in UTF-8"),
    ("questions", "answers", "'[1]'", "answers is not a list of texts"),
    ("questions", "answers", "'{'", "no JSON"),
    ("questions", "answers", f"'{'[' * 100_000}'", "no JSON"),
    ("trajectories", "id", "x'00'", "id is (bytes|not a text)"),
    ("trajectories", "seed", "'many'", "invalid literal"),
    ("trajectories", "seed", f"'{'9' * 5000}'", "Exceeds the limit"),
    ("trajectories", "finish", "'never'", "'never' is not a valid Finish"),
    ("trajectories", "prompt", "'text'", "prompt is text in UTF-8 and should be bytes"),
    ("trajectories", "prompt", "x'00'", "buffer size must be a multiple"),
    ("trajectories", "prompt", "x'" + "ff" * 20 + "'", "a token is negative"),
    ("steps", "start", "'x'", "start is text in UTF-8 and should be an integer"),
    ("steps", "stop", "1.5", "stop is a number and should be an integer"),
    ("steps", "kind", "'other'", "kind, tokens or logprobs cannot be read"),
    ("steps", "observation", "x'00'", "observation is bytes and should be text in UTF-8 or NULL"),
    ("steps", "tokens", "x'000000'", "kind, tokens or logprobs cannot be read"),
    ("steps", "logprobs", "'0000'", "logprobs is text"),
    ("verdicts", "verdict", "'FINE'", "'FINE' is not a valid Verdict"),
    ("verdicts", "reward", "7", "must be a number in"),
    ("verdicts", "reward", "'much'", "reward is text in UTF-8 and should be a number or NULL"),
    ("meta", "value", "'{'", "no JSON"),
    ("meta", "value", "x'00'", "value is bytes"),
]


def seal(path: Path) -> None:
    """Makes the hashes fit again, as somebody who changes rows on purpose does."""
    db = sqlite3.connect(path)
    db.text_factory = bytes
    ends: dict[object, bytes] = {}

    def rows(table: str) -> list[list[object]]:
        found = db.execute(f"SELECT {columns(table)} FROM {table}").fetchall()
        texts = db.execute(
            f"SELECT {', '.join(f'typeof({c})' for c in columns(table).split(', '))} FROM {table}"
        ).fetchall()
        pairs = zip(found, texts, strict=True)
        decode = lambda v, t: v.decode("utf-8", "replace") if t == b"text" else v  # noqa: E731
        return [[decode(v, t) for v, t in zip(row, kinds, strict=True)] for row, kinds in pairs]

    def write(table: str, row: list[object], found: bytes) -> None:
        first, second = columns(table).split(", ")[:2]
        db.execute(f"UPDATE {table} SET hash = ? WHERE {first} IS ? AND {second} IS ?", (found, row[0], row[1]))

    for row in rows("steps"):
        last = ends.get(row[0], (0, b""))
        found = row_hash(*row[:-1], last[1])
        ends[row[0]] = (last[0] + 1, found)
        write("steps", row, found)
    for row in rows("trajectories"):
        steps, last = ends[row[0]]
        write("trajectories", row, row_hash(*row[:-1], b"%d " % steps + last))
    for table in ("meta", "questions", "verdicts"):
        for row in rows(table):
            write(table, row, row_hash(*row[:-1], b""))
    db.commit()
    db.close()


def test_sealing_again_changes_nothing(store: Path) -> None:
    with Store(store, writable=False) as before:
        wanted = list(before.trajectories())
    seal(store)
    with Store(store, writable=False) as after:
        after.check()
        assert list(after.trajectories()) == wanted


@pytest.mark.parametrize(("table", "column", "value", "problem"), VALUES)
def test_values_of_other_types_are_refused_with_file_table_and_row(
    store: Path, table: str, column: str, value: str, problem: str
) -> None:
    change(store, f"UPDATE {table} SET {column} = {value}" + (" WHERE rowid = 1" if table in WITH_ROWID else ""))
    seal(store)
    with Store(store, writable=False) as opened, pytest.raises(ValueError, match=rf"t\.db, table {table}, .*{problem}"):
        opened.check()


def test_a_span_outside_the_tokens_is_refused_with_its_trajectory(store: Path) -> None:
    change(store, "UPDATE steps SET start = -5 WHERE i = 0")
    seal(store)
    with (
        Store(store, writable=False) as opened,
        pytest.raises(ValueError, match=r"t\.db, table trajectories, .*spans \[-5"),
    ):
        opened.check()
