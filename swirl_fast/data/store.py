"""runs/NAME/trajectories.db: questions, trajectories, steps and verdicts, safe against being killed at any moment.

    questions ──< trajectories (prompt tokens, finish) ──< steps (action, log-probs, tokens after the step before)
    verdicts (judge id, hash of what the judge saw)        meta (fingerprints of what produced the rows)

SQLite in WAL mode. Every method writes in one transaction, so a SIGKILL loses at most the call in flight; what is there
already is recognised and not written twice, so a rerun doubles nothing. synchronous=FULL extends the promise to a power
failure: one fsync a round of a batch of trajectories is nothing beside the generation of that round.

What is read comes in batches of trajectories, so that a stage holds no more than it works on, however large the store is.

One process writes, any number read meanwhile. The writer holds a flock on trajectories.db.lock, which the kernel lets
go when the process ends, however it ends. Left out: several writers, and file systems without working locks.
"""

from __future__ import annotations

import json
import os
import re
import sqlite3
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from swirl_fast.files import canonical_json, describe_changes, lock
from swirl_fast.formats.tags import Action
from swirl_fast.tasks.task import Question
from swirl_fast.trajectory import Finish, Step, Trajectory
from swirl_fast.verdict import Judgement, Verdict

SCHEMA = 2
APPLICATION_ID = 0x5357524C  # "SWRL" in the header of the file: tells our databases from others
BATCH = 64  # trajectories read in one transaction

TABLES = (
    "CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID",
    """CREATE TABLE questions (
        position INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, task TEXT NOT NULL, text TEXT NOT NULL,
        answers TEXT NOT NULL -- JSON list
    )""",
    """CREATE TABLE trajectories (
        number INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, question_id TEXT NOT NULL REFERENCES questions(id),
        seed TEXT NOT NULL, -- decimal: Python integers may exceed 64 bits
        prompt BLOB NOT NULL, -- little-endian int32
        finish TEXT
    )""",
    """CREATE TABLE steps (
        trajectory INTEGER NOT NULL REFERENCES trajectories(number), i INTEGER NOT NULL,
        start INTEGER NOT NULL, stop INTEGER NOT NULL, text TEXT NOT NULL,
        kind TEXT NOT NULL, tool TEXT, argument TEXT NOT NULL, error TEXT NOT NULL,
        observation TEXT, policy_version INTEGER NOT NULL,
        tokens BLOB NOT NULL, -- little-endian int32: everything after the step before
        logprobs BLOB NOT NULL, -- little-endian float32
        PRIMARY KEY (trajectory, i)
    )""",
    """CREATE TABLE verdicts (
        judge_id TEXT NOT NULL, content_hash TEXT NOT NULL, verdict TEXT NOT NULL, reason TEXT NOT NULL,
        reward REAL, -- in [0, 1]; NULL where the verdict is UNKNOWN
        PRIMARY KEY (judge_id, content_hash)
    ) WITHOUT ROWID""",
)


def trajectory_ids(questions: Sequence[Question], trajectories_per_question: int) -> list[str]:
    """The ids a collection is made of; a store may hold more, from a time when more were asked for."""
    return [f"{question.id}/{k}" for question in questions for k in range(trajectories_per_question)]


class Store:
    """Opens, or creates, the database at `path`.

    writable: take the one writer's place; False: read only, also while another process writes.

    Raises ValueError when another process writes, when the file is not one of our stores or has another schema, and, for a
    reader, when there is no file; RuntimeError, with the name of the file, for what SQLite fails at later, such as a full disk. Use as a
    context manager, or call `close`. One thread.
    """

    def __init__(self, path: str | Path, *, writable: bool = True) -> None:
        self.path = Path(path)
        self.writable = writable
        self._lock: int | None = None
        if writable:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._lock = lock(self.path)
        elif not self.path.is_file():
            raise ValueError(f"{self.path} does not exist: collect first, or check run.folder and run.name")
        # Autocommit: transactions are opened by hand. A reader's connection is not read-only: it may be the first
        # after a killed writer, and then recovers the log; `_transaction` keeps it from writing anything else.
        self._db = self._connect()
        self._db.text_factory = lambda text: text.decode("utf-8", "surrogatepass")
        try:
            self._open()
        except sqlite3.OperationalError as error:  # no fault of the file's
            self.close()
            self._raise(error)
        except sqlite3.DatabaseError as error:
            self.close()
            raise ValueError(f"{self.path} is not a readable store ({error}): use another run.name") from error
        except BaseException:
            self.close()
            raise

    def _connect(self) -> sqlite3.Connection:
        if self.writable or (os.access(self.path, os.W_OK) and os.access(self.path.parent, os.W_OK)):
            return sqlite3.connect(self.path, isolation_level=None, timeout=60.0)
        # Of somebody else, or on a read-only disk. Beside a writer, whose files are there, SQLite reads on; a file that nobody writes is
        # read as it is, for which SQLite must be promised that it stays so.
        log = self.path.with_name(self.path.name + "-wal")
        how = "mode=ro" if log.is_file() and log.stat().st_size else "immutable=1"
        return sqlite3.connect(f"{self.path.absolute().as_uri()}?{how}", uri=True, isolation_level=None, timeout=60.0)

    def _open(self) -> None:
        db = self._db
        version, application = self._value("PRAGMA user_version"), self._value("PRAGMA application_id")
        empty = not self._value("SELECT count(*) FROM sqlite_master")
        if not empty and application != APPLICATION_ID:
            raise ValueError(f"{self.path} is a database of another program: use another run.name")
        if not empty and version != SCHEMA:
            raise ValueError(
                f"{self.path} has schema {version}, this version of swirl-fast reads and writes schema {SCHEMA}: "
                "use the version that wrote it, or another run.name"
            )
        if empty and not self.writable:
            raise ValueError(f"{self.path} is empty: collect trajectories first")
        db.execute("PRAGMA foreign_keys = ON")
        if not self.writable:
            return
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA synchronous = FULL")
        if empty:
            with self._transaction():
                for table in TABLES:
                    db.execute(table)
                db.execute(f"PRAGMA application_id = {APPLICATION_ID}")
                db.execute(f"PRAGMA user_version = {SCHEMA}")

    def close(self) -> None:
        self._db.close()
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def __enter__(self) -> Store:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self.close()
        if isinstance(error, sqlite3.Error):
            self._raise(error)

    def _raise(self, error: sqlite3.Error) -> NoReturn:
        """Raises the first error of the chain: after a full disk, ROLLBACK fails as well."""
        first = error
        while isinstance(first.__context__, sqlite3.Error):
            first = first.__context__
        raise RuntimeError(
            f"{self.path}: {first}. What was written before is kept: see to the disk and its free space, then start it again"
        ) from first

    # ---- meta

    def meta(self) -> dict[str, Any]:
        return {key: json.loads(value) for key, value in self._db.execute("SELECT key, value FROM meta ORDER BY key")}

    def set_meta(self, key: str, value: Any) -> None:
        """Remembers a JSON value under `key`, in place of the one before."""
        with self._transaction():
            self._db.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (key, canonical_json(value)))

    def check_meta(self, key: str, value: Any) -> None:
        """Remembers a JSON value the first time. Raises ValueError when another one was remembered, naming what
        differs: the rows of this store were made with other settings."""
        stored = self.meta()
        if key not in stored:
            self.set_meta(key, value)
            return
        old, new = stored[key], json.loads(canonical_json(value))
        if old == new:
            return
        raise ValueError(
            f"{self.path} was made with another {key}: {describe_changes(old, new)}. Go back to what it was or use another run.name"
        )

    # ---- questions

    def add_questions(self, questions: Iterable[Question]) -> None:
        """Adds those that are not there yet. Raises ValueError for a question that is there with other contents; then
        nothing is added."""
        with self._transaction():
            for question in questions:
                row = (question.task, question.text, json.dumps(question.answers))
                stored = self._row("SELECT task, text, answers FROM questions WHERE id = ?", question.id)
                if stored is None:
                    self._db.execute(
                        "INSERT INTO questions (id, task, text, answers) VALUES (?, ?, CAST(? AS TEXT), ?)",
                        (question.id, row[0], _utf8(row[1]), row[2]),
                    )
                elif stored != row:
                    raise ValueError(
                        f"{self.path}: question {question.id!r} was {stored} and is {row} now: "
                        "the task's data have changed, use another run.name"
                    )

    def questions(self) -> list[Question]:
        """In the order in which they were added."""
        rows = self._db.execute("SELECT id, task, text, answers FROM questions ORDER BY position")
        return [Question(id_, task, text, tuple(json.loads(answers))) for id_, task, text, answers in rows]

    # ---- trajectories

    def record(self, trajectories: Iterable[Trajectory]) -> None:
        """Writes all that is new in these trajectories in one transaction: themselves, steps, finish.

        Call it with a new trajectory when its prompt is there, and after every round with the trajectories that took a
        step: an action goes in together with its observation's tokens. What was recorded before stays as it is;
        recording the same again writes nothing.

        Raises ValueError, and writes nothing, for a trajectory that is not a continuation of the recorded one, fails
        `Trajectory.check`, has new tokens without a new step, or whose question is not in the store. Log-probs are kept
        as float32, token ids as int32.
        """
        given = list(trajectories)
        with self._transaction():
            for trajectory in given:
                self._record(trajectory)

    def _record(self, trajectory: Trajectory) -> None:
        trajectory.check()
        name = f"{self.path}: trajectory {trajectory.id!r}"
        tokens, steps = trajectory.tokens, trajectory.steps
        prompt = _to_bytes(tokens[: trajectory.prompt_length])
        finish = trajectory.finish.value if trajectory.finish else None
        head = (trajectory.question_id, str(trajectory.seed), prompt)
        question = self._row("SELECT task, text FROM questions WHERE id = ?", trajectory.question_id)
        if question != (trajectory.task, trajectory.question):
            known = "is not in the store" if question is None else f"is {question} in the store"
            raise ValueError(f"{name}: question {trajectory.question_id!r} {known}: add_questions comes first")

        select = "SELECT number, finish, question_id, seed, prompt FROM trajectories WHERE id = ?"
        row = self._row(select, trajectory.id)
        if row is None:
            insert = "INSERT INTO trajectories (id, question_id, seed, prompt) VALUES (?, ?, ?, ?)"
            number, stored_finish = self._db.execute(insert, (trajectory.id, *head)).lastrowid, None
        else:
            number, stored_finish, *stored_head = row
            if tuple(stored_head) != head:
                raise ValueError(f"{name} is recorded with another question, seed or prompt")
        select = "SELECT count(*), ifnull(sum(length(tokens)), 0) FROM steps WHERE trajectory = ?"
        count, size = self._row(select, number)
        at = (len(prompt) + size) // 4  # tokens recorded so far
        if stored_finish is not None and (finish, len(steps)) != (stored_finish, count):
            raise ValueError(f"{name} is finished ({stored_finish}, {count} steps) and cannot change")
        if len(steps) < count or (len(steps) == count and len(tokens) != at):
            raise ValueError(
                f"{name} has {len(steps)} steps and {len(tokens)} tokens, recorded are {count} steps and {at} tokens: "
                "tokens come with a step"
            )
        if count:
            select = "SELECT start, stop, text, observation, tokens FROM steps WHERE trajectory = ? AND i = ?"
            last = self._row(select, number, count - 1)
            step, after = steps[count - 1], _to_bytes(tokens[at - len(last[-1]) // 4 : at])
            if (step.start, step.end, step.text, step.observation, after) != last:
                raise ValueError(f"{name}: step {count - 1} differs from the recorded one")
        if len(steps) > count and steps[count].start < at:
            raise ValueError(f"{name}: step {count} starts at {steps[count].start}, inside the {at} recorded tokens")

        for i in range(count, len(steps)):
            step = steps[i]
            until = steps[i + 1].start if i + 1 < len(steps) else len(tokens)
            action = step.action
            self._db.execute(
                "INSERT INTO steps VALUES (?, ?, ?, ?, CAST(? AS TEXT), "
                "?, ?, CAST(? AS TEXT), CAST(? AS TEXT), CAST(? AS TEXT), ?, ?, ?)",
                (number, i, step.start, step.end, _utf8(step.text))
                + (action.kind, action.tool, _utf8(action.argument), _utf8(action.error))
                + (None if step.observation is None else _utf8(step.observation), step.policy_version)
                + (_to_bytes(tokens[at:until]), np.asarray(step.logprobs, "<f4").tobytes()),
            )
            at = until
        if finish != stored_finish:
            self._db.execute("UPDATE trajectories SET finish = ? WHERE number = ?", (finish, number))

    def ids(self, finished: bool | None = None) -> list[str]:
        """The ids of all, the finished or the unfinished trajectories, in natural order (2 before 10)."""
        where = {None: "", True: " WHERE finish IS NOT NULL", False: " WHERE finish IS NULL"}[finished]
        return sorted((row[0] for row in self._db.execute("SELECT id FROM trajectories" + where)), key=_natural)

    def ids_of(self, question_id: str) -> list[str]:
        """The ids of the trajectories of a question, in natural order."""
        rows = self._db.execute("SELECT id FROM trajectories WHERE question_id = ?", (question_id,))
        return sorted((row[0] for row in rows), key=_natural)

    def trajectories(self, ids: Sequence[str] | None = None) -> Iterator[Trajectory]:
        """Those with these ids, in this order; None: all, in natural order. See `batches`."""
        for batch in self.batches(self.ids() if ids is None else ids):
            yield from batch

    def batches(self, ids: Sequence[str]) -> Iterator[list[Trajectory]]:
        """The trajectories with these ids, in this order, BATCH at a time, each complete. The store may be written to meanwhile.

        Raises ValueError for an id that is not there.
        """
        for at in range(0, len(ids), BATCH):
            yield self._load(ids[at : at + BATCH])

    def _load(self, ids: Sequence[str]) -> list[Trajectory]:
        self._db.execute("BEGIN")  # one snapshot of both tables, should another process write
        try:
            heads = self._db.execute(
                "SELECT t.number, t.id, t.question_id, q.task, q.text, t.seed, t.prompt, t.finish "
                "FROM trajectories t JOIN questions q ON q.id = t.question_id "
                "WHERE t.id IN (SELECT value FROM json_each(?))",
                (json.dumps(ids),),
            ).fetchall()
            rows = self._db.execute(
                "SELECT trajectory, start, stop, text, kind, tool, argument, error, observation, policy_version, tokens, logprobs "
                "FROM steps WHERE trajectory IN (SELECT value FROM json_each(?)) ORDER BY trajectory, i",
                (json.dumps([head[0] for head in heads]),),
            ).fetchall()
        finally:
            self._db.execute("COMMIT")
        steps: dict[int, list[Step]] = {head[0]: [] for head in heads}
        tokens: dict[int, list[bytes]] = {head[0]: [head[6]] for head in heads}
        for number, start, stop, text, kind, tool, argument, error, observation, version, after, logprobs in rows:
            action = Action(kind, tool, argument, error)
            values = np.frombuffer(logprobs, "<f4").tolist()
            steps[number].append(Step(start, stop, text, action, values, version, observation))
            tokens[number].append(after)
        loaded: dict[str, Trajectory] = {}
        for number, id_, question_id, task, question, seed, prompt, finish in heads:
            trunk = np.frombuffer(b"".join(tokens[number]), "<i4")
            loaded[id_] = Trajectory(
                id_,
                question_id,
                task,
                question,
                int(seed),
                len(prompt) // 4,
                trunk,
                steps[number],
                finish and Finish(finish),
            )
        if missing := [id_ for id_ in ids if id_ not in loaded]:
            raise ValueError(f"{self.path} has no trajectory {missing[0]!r}")
        return [loaded[id_] for id_ in ids]

    def count(self, ids: Sequence[str]) -> tuple[int, int]:
        """(steps, tokens) of the trajectories with these ids, prompts included."""
        row = self._row(
            "SELECT ifnull(sum((SELECT count(*) FROM steps WHERE trajectory = number)), 0), ifnull(sum(length(prompt) "
            "+ (SELECT ifnull(sum(length(tokens)), 0) FROM steps WHERE trajectory = number)), 0) / 4 "
            "FROM trajectories WHERE id IN (SELECT value FROM json_each(?))",
            json.dumps(ids),
        )
        return row[0], row[1]

    # ---- verdicts

    def verdicts(self, judge_id: str, hashes: Iterable[str]) -> dict[str, Judgement]:
        """The judgements there are, UNKNOWN ones included, under the hashes (`StepView.content_hash`)."""
        rows = self._db.execute(
            "SELECT content_hash, verdict, reason, reward FROM verdicts "
            "WHERE judge_id = ? AND content_hash IN (SELECT value FROM json_each(?))",
            (judge_id, json.dumps(list(hashes))),
        )
        return {key: Judgement(Verdict(verdict), reason, reward) for key, verdict, reason, reward in rows}

    def missing(self, judge_id: str, hashes: Iterable[str]) -> list[str]:
        """The hashes, each once and in order, without a verdict or with UNKNOWN: those to ask the judge about."""
        wanted = list(dict.fromkeys(hashes))
        stored = self.verdicts(judge_id, wanted)
        return [key for key in wanted if key not in stored or stored[key].verdict is Verdict.UNKNOWN]

    def main_judge(self) -> str:
        """The id of the judge with most verdicts here, empty where there is none."""
        row = self._row("SELECT judge_id FROM verdicts GROUP BY judge_id ORDER BY count(*) DESC, judge_id LIMIT 1")
        return row[0] if row else ""

    def add_verdicts(self, judge_id: str, judgements: Mapping[str, Judgement]) -> None:
        """Keeps judgements under their content hashes. UNKNOWN gives way to a later verdict; GOOD and BAD stay, so that
        what was filtered by them can be filtered again with the same result."""
        with self._transaction():
            self._db.executemany(
                "INSERT INTO verdicts VALUES (?, ?, ?, CAST(? AS TEXT), ?) ON CONFLICT DO UPDATE "
                "SET verdict = excluded.verdict, reason = excluded.reason, reward = excluded.reward "
                f"WHERE verdicts.verdict = '{Verdict.UNKNOWN.value}'",
                [
                    (judge_id, key, judgement.verdict.value, _utf8(judgement.reason), judgement.reward)
                    for key, judgement in judgements.items()
                ],
            )

    # ---- SQL

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        if not self.writable:
            raise ValueError(f"{self.path} is open for reading only")
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            self._db.execute("ROLLBACK")
            raise
        self._db.execute("COMMIT")

    def _row(self, sql: str, *values: Any) -> Any:
        return self._db.execute(sql, values).fetchone()

    def _value(self, sql: str) -> Any:
        return self._row(sql)[0]


def _natural(id_: str) -> tuple[list[str | int], str]:
    parts: list[str | int] = list(re.split(r"([0-9]+)", id_))
    parts[1::2] = [int(digits) for digits in parts[1::2]]
    return parts, id_


def _to_bytes(tokens: NDArray[np.int32]) -> bytes:
    return tokens.astype("<i4", copy=False).tobytes()


def _utf8(text: str) -> bytes:
    """For CAST(? AS TEXT): SQLite's own binding of a str refuses the lone surrogates that JSON answers may contain."""
    return text.encode("utf-8", "surrogatepass")
