"""runs/NAME/trajectories.db: questions, trajectories, steps and verdicts, safe against being killed at any moment.

    questions ──< trajectories (prompt tokens, finish) ──< steps (action, log-probs, tokens after the step before)
    verdicts (judge id, hash of what the judge saw)        meta (fingerprints of what produced the rows)

SQLite in WAL mode, where the file system can (store_file.py). Every method writes in one transaction, so a SIGKILL loses at most the
call in flight; what is there already is recognised and not written twice, so a rerun doubles nothing. synchronous=FULL extends the
promise to a power failure: one fsync a round of a batch of trajectories is nothing beside the generation of that round.

What is read comes in batches of trajectories, so that a stage holds no more than it works on, however large the store is.

Every row carries a hash of its contents, which is compared whenever the row is read (store_tables.py); a step's covers that of the step
before, and a finished trajectory's that of its last step, so that a lost row is noticed too.

One process writes, any number read meanwhile. The writer holds a flock on trajectories.db.lock, which the kernel lets
go when the process ends, however it ends. Left out: several writers, and file systems without working locks.
"""

from __future__ import annotations

import json
import os
import sqlite3
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from swirl_fast.data.store_file import connect, set_journal
from swirl_fast.data.store_tables import (
    APPLICATION_ID,
    REMEDY,
    SCHEMA,
    TABLES,
    check_row,
    check_schema,
    check_types,
    columns,
    damaged,
    end_hash,
    further_calls,
    further_text,
    int32_bytes,
    json_of,
    natural,
    row_hash,
    text_of,
    utf8,
)
from swirl_fast.files import canonical_json, describe_changes, lock
from swirl_fast.formats.format import Action
from swirl_fast.tasks.task import Question
from swirl_fast.trajectory import Finish, Step, Trajectory
from swirl_fast.verdict import Judgement, Verdict

BATCH = 64  # trajectories read in one transaction
KINDS = ("tool", "answer", "malformed")  # of an Action


def trajectory_ids(questions: Sequence[Question], trajectories_per_question: int) -> list[str]:
    """The ids a collection is made of; a store may hold more, from a time when more were asked for."""
    return [f"{question.id}/{k}" for question in questions for k in range(trajectories_per_question)]


class Store:
    """Opens, or creates, the database at `path`.

    writable: take the one writer's place; False: read only, also while another process writes.

    Raises ValueError when another process writes, when the file is not one of our stores, has another schema or statements of its own,
    for a reader, when there is no file, for a writer, what `check` raises, and what `store_file.connect` raises; every method that reads
    raises ValueError for a row that is not as it was written. RuntimeError, with the name of the file, for what SQLite fails at later, such
    as a full disk. Use as a context manager, or call `close`. One thread.
    """

    def __init__(self, path: str | Path, *, writable: bool = True) -> None:
        self.path = Path(path)
        self.writable = writable
        self._lock: int | None = None
        self._answers: tuple[object, dict[str, list[str]]] = None, {}  # version of the database, what `answers` gave
        if writable:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._lock = lock(self.path)
        elif not self.path.is_file():
            raise ValueError(f"{self.path} does not exist: collect first, or check run.folder and run.name")
        try:
            self._db = connect(self.path, writable)  # transactions are opened by hand
        except BaseException:
            self._release()
            raise
        self._db.text_factory = text_of
        try:
            self._open()
        except sqlite3.OperationalError as error:  # no fault of the file's
            self.close()
            self._raise(error)
        except (
            sqlite3.DatabaseError,
            UnicodeDecodeError,
        ) as error:  # the latter for a message of SQLite's that is no UTF-8
            self.close()
            raise ValueError(f"{self.path} is not a readable store ({error}): {REMEDY}") from error
        except BaseException:
            self.close()
            raise

    def _open(self) -> None:
        db = self._db
        db.execute("PRAGMA trusted_schema = OFF")
        db.execute("PRAGMA cell_size_check = ON")
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
        if not empty:
            check_schema(db, self.path)
        db.execute("PRAGMA foreign_keys = ON")
        if not self.writable:
            return
        set_journal(db, self.path)
        if empty:
            with self._transaction():
                for table in TABLES:
                    db.execute(table)
                db.execute(f"PRAGMA application_id = {APPLICATION_ID}")
                db.execute(f"PRAGMA user_version = {SCHEMA}")
        else:
            self.check()

    def close(self) -> None:
        self._db.close()
        self._release()

    def _release(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def __enter__(self) -> Store:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self.close()
        unreadable = isinstance(error, sqlite3.DatabaseError) and not isinstance(error, sqlite3.OperationalError)
        if unreadable or isinstance(error, UnicodeDecodeError):
            raise ValueError(f"{self.path} is damaged ({error}): {REMEDY}") from error
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

    def check(self) -> None:
        """Reads all there is once, a batch at a time. Raises ValueError for pages or rows that are not as they were written: what was
        damaged so that it is not found any more would otherwise look as if it had never been written."""
        found = self._value("PRAGMA quick_check(1)")
        if found != "ok":
            raise ValueError(f"{self.path} is damaged ({' '.join(str(found).split())}): {REMEDY}")
        self.meta()
        self.questions()
        for _ in self.trajectories():
            pass
        for _ in self.judged():
            pass

    # ---- meta

    def meta(self) -> dict[str, Any]:
        rows = self._db.execute(f"SELECT {columns('meta')} FROM meta ORDER BY key").fetchall()
        for row in rows:
            check_row(self.path, "meta", row)
        return {row[0]: json_of(self.path, "meta", row, row[1]) for row in rows}

    def set_meta(self, key: str, value: Any) -> None:
        """Remembers a JSON value under `key`, in place of the one before."""
        self.set_all_meta({key: value})

    def set_all_meta(self, values: Mapping[str, Any]) -> None:
        """Several at once: all of them, or, where the process is killed, none."""
        with self._transaction():
            for key, value in values.items():
                self._insert("meta", key, canonical_json(value), verb="INSERT OR REPLACE")

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
                    position = self._value("SELECT ifnull(max(position), 0) + 1 FROM questions")
                    self._insert("questions", position, question.id, *row)
                elif stored != row:
                    raise ValueError(
                        f"{self.path}: question {question.id!r} was {stored} and is {row} now: "
                        "the task's data have changed, use another run.name"
                    )

    def questions(self) -> list[Question]:
        """In the order in which they were added."""
        return [
            self._question(row)
            for row in self._db.execute(f"SELECT {columns('questions')} FROM questions ORDER BY position")
        ]

    def _question(self, row: Sequence[Any]) -> Question:
        check_row(self.path, "questions", row)
        _, id_, task, text, answers, _ = row
        found = json_of(self.path, "questions", row, answers)
        if not isinstance(found, list) or not all(isinstance(answer, str) for answer in found):
            raise damaged(self.path, "questions", row, "answers is not a list of texts")
        return Question(id_, task, text, tuple(found))

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
        prompt = int32_bytes(tokens[: trajectory.prompt_length])
        finish = trajectory.finish.value if trajectory.finish else None
        head = (trajectory.question_id, str(trajectory.seed), prompt)
        question = self._row("SELECT task, text FROM questions WHERE id = ?", trajectory.question_id)
        if question != (trajectory.task, trajectory.question):
            known = "is not in the store" if question is None else f"is {question} in the store"
            raise ValueError(f"{name}: question {trajectory.question_id!r} {known}: add_questions comes first")

        select = "SELECT number, finish, question_id, seed, prompt FROM trajectories WHERE id = ?"
        row = self._row(select, trajectory.id)
        if row is None:
            number, stored_finish = self._value("SELECT ifnull(max(number), 0) + 1 FROM trajectories"), None
            self._insert("trajectories", number, trajectory.id, *head, None)
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
        before = b""
        if count:
            select = "SELECT start, stop, text, observation, tokens, hash FROM steps WHERE trajectory = ? AND i = ?"
            *stored, before = self._row(select, number, count - 1)
            last = tuple(stored)
            step, after = steps[count - 1], int32_bytes(tokens[at - len(last[-1]) // 4 : at])
            if (step.start, step.end, step.text, step.observation, after) != last:
                raise ValueError(f"{name}: step {count - 1} differs from the recorded one")
        if len(steps) > count and steps[count].start < at:
            raise ValueError(f"{name}: step {count} starts at {steps[count].start}, inside the {at} recorded tokens")

        for i in range(count, len(steps)):
            step = steps[i]
            until = steps[i + 1].start if i + 1 < len(steps) else len(tokens)
            action = step.action
            before = self._insert(
                *("steps", number, i, step.start, step.end, step.text),
                *(action.kind, action.tool, action.argument, action.error, further_text(action.further)),
                *(step.observation, step.policy_version),
                *(int32_bytes(tokens[at:until]), np.asarray(step.logprobs, "<f4").tobytes()),
                more=before,
            )
            at = until
        if finish != stored_finish:
            found = row_hash(number, trajectory.id, *head, finish, end_hash(len(steps), before))
            self._db.execute("UPDATE trajectories SET finish = ?, hash = ? WHERE number = ?", (finish, found, number))

    def ids(self, finished: bool | None = None) -> list[str]:
        """The ids of all, the finished or the unfinished trajectories, in natural order (2 before 10)."""
        where = {None: "", True: " WHERE finish IS NOT NULL", False: " WHERE finish IS NULL"}[finished]
        return self._ids("SELECT id FROM trajectories" + where)

    def ids_of(self, question_id: str) -> list[str]:
        """The ids of the trajectories of a question, in natural order."""
        return self._ids("SELECT id FROM trajectories WHERE question_id = ?", question_id)

    def _ids(self, sql: str, *values: str) -> list[str]:
        found = [row[0] for row in self._db.execute(sql, values)]
        for id_ in found:
            if not isinstance(id_, str):
                raise damaged(self.path, "trajectories", ("?", id_), "id is not a text")
        return sorted(found, key=natural)

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
                f"SELECT {columns('trajectories', 't.')}, {columns('questions', 'q.')} "
                "FROM trajectories t JOIN questions q ON q.id = t.question_id "
                "WHERE t.id IN (SELECT value FROM json_each(?))",
                (json.dumps(ids),),
            ).fetchall()
            rows = self._db.execute(
                f"SELECT {columns('steps')} FROM steps WHERE trajectory IN (SELECT value FROM json_each(?)) ORDER BY trajectory, i",
                (json.dumps([head[0] for head in heads]),),
            ).fetchall()
        finally:
            self._db.execute("COMMIT")
        steps: dict[int, list[Any]] = {head[0]: [] for head in heads}
        for row in rows:
            steps[row[0]].append(row)
        loaded = {head[1]: self._trajectory(head[:7], self._question(head[7:]), steps[head[0]]) for head in heads}
        if missing := [id_ for id_ in ids if id_ not in loaded]:
            raise ValueError(
                f"{self.path} has no trajectory {missing[0]!r}, or not its question; where both were there: {REMEDY}"
            )
        return [loaded[id_] for id_ in ids]

    def _trajectory(self, head: Sequence[Any], question: Question, rows: Sequence[Any]) -> Trajectory:
        """head, rows: of the tables trajectories and steps, all columns."""
        check_types(self.path, "trajectories", head)
        _, id_, _, seed, prompt, finish, _ = head
        before, tokens, steps = b"", [prompt], []
        for row in rows:
            check_row(self.path, "steps", row, before)
            _, _, start, stop, text, kind, tool, argument, error, further, *rest = row
            observation, version, after, logprobs, before = rest
            if kind not in KINDS or len(logprobs) % 4 or len(after) % 4:
                raise damaged(self.path, "steps", row, "kind, tokens or logprobs cannot be read")
            values = np.frombuffer(logprobs, "<f4").tolist()
            action = Action(kind, tool, argument, error, further=further_calls(self.path, row, further))
            steps.append(Step(start, stop, text, action, values, version, observation))
            tokens.append(after)
        check_row(self.path, "trajectories", head, b"" if finish is None else end_hash(len(rows), before))
        try:
            trunk = np.frombuffer(b"".join(tokens), "<i4")
            ended = None if finish is None else Finish(finish)
            trajectory = Trajectory(
                id_, question.id, question.task, question.text, int(seed), len(prompt) // 4, trunk, steps, ended
            )
            trajectory.check()
            if trunk.size and trunk.min() < 0:
                raise ValueError("a token is negative")
        except ValueError as error:
            raise damaged(self.path, "trajectories", head, error) from error
        return trajectory

    def answers(self) -> dict[str, list[str]]:
        """Question id -> the answers of all its finished trajectories. Read once, and again when the store has changed."""
        version = self._value("PRAGMA data_version"), self._db.total_changes
        if version != self._answers[0]:
            rows = self._db.execute(
                f"SELECT t.question_id, s.argument, b.hash, {columns('steps', 's.')} FROM trajectories t "
                "JOIN steps s ON s.trajectory = t.number AND s.kind = 'answer' "
                "LEFT JOIN steps b ON b.trajectory = t.number AND b.i = s.i - 1 WHERE t.finish = 'answer' ORDER BY t.number"
            )
            found: dict[str, list[str]] = {}
            for question, argument, before, *row in rows:
                check_row(self.path, "steps", row, before or b"")
                found.setdefault(question, []).append(argument)
            self._answers = version, found
        return self._answers[1]

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
            f"SELECT {columns('verdicts')} FROM verdicts "
            "WHERE judge_id = ? AND content_hash IN (SELECT value FROM json_each(?))",
            (judge_id, json.dumps(list(hashes))),
        )
        return {row[1]: self._judgement(row) for row in rows}

    def judged(self) -> Iterator[tuple[str, str, Judgement]]:
        """(judge id, content hash, judgement) of all verdicts."""
        for row in self._db.execute(f"SELECT {columns('verdicts')} FROM verdicts"):
            yield row[0], row[1], self._judgement(row)

    def _judgement(self, row: Sequence[Any]) -> Judgement:
        check_row(self.path, "verdicts", row)
        try:
            return Judgement(Verdict(row[2]), *row[3:5])
        except ValueError as error:
            raise damaged(self.path, "verdicts", row, error) from error

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
            for key, judgement in judgements.items():
                reward = None if judgement.reward is None else float(judgement.reward)
                self._insert(
                    *("verdicts", judge_id, key, judgement.verdict.value, judgement.reason, reward),
                    then="ON CONFLICT DO UPDATE SET verdict = excluded.verdict, reason = excluded.reason, reward = excluded.reward, "
                    f"hash = excluded.hash WHERE verdicts.verdict = '{Verdict.UNKNOWN.value}'",
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

    def _insert(self, table: str, *values: Any, more: bytes = b"", verb: str = "INSERT", then: str = "") -> bytes:
        """A row of all columns but the last, which is the hash of the others and of `more`. Returns the hash."""
        found = row_hash(*values, more)
        places = ", ".join("CAST(? AS TEXT)" if isinstance(value, str) else "?" for value in (*values, found))
        given = [utf8(value) if isinstance(value, str) else value for value in (*values, found)]
        self._db.execute(f"{verb} INTO {table} VALUES ({places}) {then}", given)
        return found

    def _row(self, sql: str, *values: Any) -> Any:
        return self._db.execute(sql, values).fetchone()

    def _value(self, sql: str) -> Any:
        return self._row(sql)[0]
