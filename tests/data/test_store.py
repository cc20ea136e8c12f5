"""The store against the trajectories themselves, and against SIGKILL of a real writing process."""

import copy
import os
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.paths import ROOT
from support.stores import count_rows, make_question, make_trajectory, prefix

from swirl_fast.data import store as store_module
from swirl_fast.data.store import SCHEMA, Store
from swirl_fast.tasks.task import Question
from swirl_fast.trajectory import Finish, Trajectory
from swirl_fast.verdict import Judgement, Verdict


def test_what_is_recorded_comes_back(tmp_path: Path) -> None:
    questions = [make_question(number) for number in (10, 2, 1)]
    given_ = [
        make_trajectory(question, index, index, finish)
        for question in questions
        for index, finish in enumerate([None, Finish.STEP_LIMIT, Finish.ANSWER, Finish.CONTEXT_LIMIT, None])
    ]
    with Store(tmp_path / "run" / "trajectories.db") as store:
        store.add_questions(questions)
        store.record(given_)
    with Store(tmp_path / "run" / "trajectories.db", writable=False) as store:
        assert store.questions() == questions
        by_number = sorted(given_, key=lambda t: tuple(int(part) for part in t.id[1:].split("-")))
        assert [t.id for t in by_number][::5] == ["q1-0", "q2-0", "q10-0"]
        assert list(store.trajectories()) == by_number
        assert all(t.tokens.dtype == np.int32 for t in store.trajectories())
        assert store.ids() == [t.id for t in by_number]
        assert store.ids(finished=True) == [t.id for t in by_number if t.finish]
        assert store.ids(finished=False) == [t.id for t in by_number if not t.finish]
        assert [count_rows(store, table) for table in ("questions", "trajectories")] == [3, 15]
        backwards = by_number[::-2]
        wanted = [t.id for t in backwards]
        assert list(store.trajectories(wanted)) == backwards, "in the order asked for"
        assert store.count(wanted) == (sum(t.num_steps for t in backwards), sum(len(t.tokens) for t in backwards))
        assert store.count([]) == (0, 0)
        with pytest.raises(ValueError, match="no trajectory 'q3-0'"):
            list(store.trajectories(["q1-0", "q3-0"]))


def test_a_store_is_read_in_batches_while_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "BATCH", 4)
    question = make_question(1)
    given_ = [make_trajectory(question, index, 2, Finish.ANSWER) for index in range(10)]
    with Store(tmp_path / "t.db") as store:
        store.add_questions([question])
        store.record(given_)
        sizes = []
        for batch in store.batches(store.ids()):
            sizes.append(len(batch))
            store.record([make_trajectory(question, 10 + len(sizes), 1, None)])
        assert sizes == [4, 4, 2] and count_rows(store, "trajectories") == 13


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.lists(st.integers(0, 3), max_size=12))
def test_any_sequence_of_records_ends_in_the_same_store(tmp_path_factory, seed: int, jumps: list[int]) -> None:
    """Steps recorded one by one, several at once or again and again, with the store reopened in between."""
    question = make_question(1)
    whole = make_trajectory(question, 0, 6, Finish.ANSWER, seed)
    path = tmp_path_factory.mktemp("store") / "trajectories.db"
    at = 0
    for jump in jumps:
        at = min(at + jump, 6)
        with Store(path) as store:
            store.add_questions([question])
            store.record([prefix(whole, at)])
            assert list(store.trajectories()) == [prefix(whole, at)]
    with Store(path) as store:
        store.add_questions([question])
        store.record([whole])
        assert list(store.trajectories()) == [whole]
        assert count_rows(store, "steps") == 6


def test_a_changed_trajectory_is_refused_and_nothing_of_the_batch_is_written(tmp_path: Path) -> None:
    question = make_question(1)
    whole, other = make_trajectory(question, 0, 4, Finish.STEP_LIMIT), make_trajectory(question, 1, 2, None)
    with Store(tmp_path / "t.db") as store:
        store.add_questions([question])
        store.record([prefix(whole, 2)])

        def refused(change, match: str) -> None:
            changed = copy.deepcopy(whole)
            change(changed)
            with pytest.raises(ValueError, match=match):
                store.record([other, changed])
            assert list(store.trajectories()) == [prefix(whole, 2)]

        def longer_observation(t: Trajectory) -> None:
            t.tokens = np.insert(t.tokens, t.steps[1].end, 7)
            for step in t.steps[2:]:
                step.start, step.end = step.start + 1, step.end + 1

        def earlier_start(t: Trajectory) -> None:
            assert t.steps[1].end < t.steps[2].start
            t.steps[2].start -= 1
            t.steps[2].logprobs.insert(0, 0.0)

        def replace(**values):
            return lambda t: [setattr(t, name, value) for name, value in values.items()]

        refused(lambda t: t.tokens.__setitem__(0, -1), "another question, seed or prompt")
        refused(replace(seed=1), "another question, seed or prompt")
        refused(lambda t: setattr(t.steps[1], "text", "other"), "step 1 differs")
        refused(lambda t: t.tokens.__setitem__(t.steps[1].start, -1), "step 1 differs")
        refused(longer_observation, "step 1 differs|recorded tokens")
        refused(lambda t: t.steps[2].logprobs.pop(), "log-probs")
        refused(
            earlier_start, f"step 2 starts at {whole.steps[2].start - 1}, inside the {whole.steps[2].start} recorded"
        )
        refused(replace(steps=whole.steps[:1], finish=None), "1 steps and")
        refused(
            lambda t: replace(steps=t.steps[:2], finish=None, tokens=np.append(prefix(t, 2).tokens, np.int32(5)))(t),
            "come with a step",
        )
        refused(replace(question="another"), "add_questions comes first")
        refused(replace(question_id="q9"), "q9.* is not in the store")
        store.record([whole])
        for change in (replace(finish=Finish.ANSWER), replace(finish=None)):
            changed = copy.deepcopy(whole)
            change(changed)
            with pytest.raises(ValueError, match="is finished"):
                store.record([changed])
        assert list(store.trajectories()) == [whole]


def test_questions_are_added_once_and_cannot_change(tmp_path: Path) -> None:
    with Store(tmp_path / "t.db") as store:
        store.add_questions([make_question(2), make_question(1)])
        store.add_questions([make_question(1), make_question(3)])
        assert [question.id for question in store.questions()] == ["q2", "q1", "q3"]
        with pytest.raises(ValueError, match="'q1'.*What is 1 \\+ 1.*another text"):
            store.add_questions([make_question(4), Question("q1", "gsm8k", "another text", ("2", "2.0"))])
        assert len(store.questions()) == 3


def test_unknown_verdicts_are_asked_again_and_definite_ones_stay(tmp_path: Path) -> None:
    good, bad = Judgement(Verdict.GOOD, "fine \ud83d"), Judgement(Verdict.BAD, "no")
    unknown = Judgement(Verdict.UNKNOWN, "timeout")
    with Store(tmp_path / "t.db") as store:
        store.add_verdicts("rules-1", {"a": good, "b": unknown, "c": bad})
        assert store.missing("rules-1", ["d", "c", "b", "a", "b"]) == ["d", "b"]
        assert store.missing("rules-2", ["a"]) == ["a"]
        assert store.verdicts("rules-1", ["a", "b", "d"]) == {"a": good, "b": unknown}
        store.add_verdicts("rules-1", {"a": bad, "b": bad, "c": unknown})
        assert store.verdicts("rules-1", "abc") == {"a": good, "b": bad, "c": bad}
        assert (count_rows(store, "verdicts"), count_rows(store, "verdicts", "verdict = 'UNKNOWN'")) == (3, 0)
        graded = {"g": Judgement.graded(0.3, "a third"), "h": Judgement.graded(1 / 3, "")}
        store.add_verdicts("own", graded)
        assert store.verdicts("own", "gh") == graded, "a reward comes back to the last bit"
        many = {str(i): good for i in range(40_000)}  # more than SQLite's limit on parameters
        store.add_verdicts("rules-3", many)
        assert store.verdicts("rules-3", many) == many
        assert store.main_judge() == "rules-3"


def test_meta_names_both_values(tmp_path: Path) -> None:
    with Store(tmp_path / "t.db") as store:
        store.check_meta("model", {"path": "a", "dtype": "float32"})
        store.check_meta("tokenizer", "abc")
    with Store(tmp_path / "t.db") as store:
        store.check_meta("model", {"dtype": "float32", "path": "a"})
        with pytest.raises(ValueError, match="another model: path was 'a', is 'b' now"):
            store.check_meta("model", {"path": "b", "dtype": "float32"})
        with pytest.raises(ValueError, match="another tokenizer: it was 'abc', is 'abd' now"):
            store.check_meta("tokenizer", "abd")
        store.set_meta("tokenizer", "abd")
        store.check_meta("tokenizer", "abd")


def test_files_that_are_no_store_are_refused_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "t.db"
    with pytest.raises(ValueError, match="does not exist"):
        Store(path, writable=False)
    Store(path).close()
    with sqlite3.connect(path) as db:
        db.execute(f"PRAGMA user_version = {SCHEMA + 1}")
    db.close()
    for writable in (True, False):
        with pytest.raises(ValueError, match=f"schema {SCHEMA + 1}, this version .* schema {SCHEMA}"):
            Store(path, writable=writable)
    foreign = tmp_path / "foreign.db"
    with sqlite3.connect(foreign) as db:
        db.execute("CREATE TABLE mine (x)")
    db.close()
    text = tmp_path / "text.db"
    text.write_text("not a database, but a long enough text" * 100)
    for path, match in ((foreign, "another program"), (text, "not a readable store")):
        before = path.read_bytes()
        with pytest.raises(ValueError, match=match):
            Store(path)
        assert path.read_bytes() == before


def test_a_reader_reads_while_a_writer_writes_and_cannot_write(tmp_path: Path) -> None:
    question = make_question(1)
    whole = make_trajectory(question, 0, 3, Finish.ANSWER)
    with Store(tmp_path / "t.db") as writer, Store(tmp_path / "t.db", writable=False) as reader:
        writer.add_questions([question])
        for at in range(4):
            writer.record([prefix(whole, at)])
            assert list(reader.trajectories()) == [prefix(whole, at)]
        for write in (
            lambda: reader.add_questions([question]),
            lambda: reader.record([whole]),
            lambda: reader.add_verdicts("rules", {}),
            lambda: reader.check_meta("model", "a"),
        ):
            with pytest.raises(ValueError, match="reading only"):
                write()
        # A store may be written to while it is read.
        for trajectory in writer.trajectories():
            writer.record([trajectory, make_trajectory(question, 1, 1, None)])
        assert count_rows(reader, "trajectories") == 2


# Records rounds of 8 trajectories and says after each which it was. Run again, it takes up what it finds.
WRITER = """
import sys, time
sys.path[:0] = {paths!r}
from support.stores import make_question, make_trajectory, prefix
from swirl_fast.data.store import Store
from swirl_fast.trajectory import Finish
questions = [make_question(number) for number in range(400)]
wholes = [make_trajectory(question, 0, 5, Finish.ANSWER) for question in questions]
with Store(sys.argv[1]) as store:
    store.add_questions(questions)
    have = {{trajectory.id: trajectory.num_steps for trajectory in store.trajectories()}}
    for at in range(0, 400, 8):
        for steps in range(6):
            store.record([prefix(t, steps) for t in wholes[at : at + 8] if have.get(t.id, -1) < steps])
            print(at, steps, flush=True)
"""


def start_writer(path: Path) -> subprocess.Popen[str]:
    code = WRITER.format(paths=[str(ROOT), str(ROOT / "tests")])
    return subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, text=True)


def test_a_writer_killed_in_the_middle_loses_at_most_the_call_in_flight(tmp_path: Path) -> None:
    wholes = [make_trajectory(make_question(number), 0, 5, Finish.ANSWER) for number in range(400)]
    path = tmp_path / "t.db"
    for rounds in (1, 40, 90):
        writer = start_writer(path)
        assert writer.stdout is not None
        reported = [tuple(map(int, writer.stdout.readline().split())) for _ in range(rounds)]
        with pytest.raises(ValueError, match=f"being written by process {writer.pid} on "):
            Store(path)
        os.kill(writer.pid, signal.SIGKILL)
        reported += [tuple(map(int, line.split())) for line in writer.stdout]  # said between the last line and the end
        assert writer.wait() == -signal.SIGKILL
        writer.stdout.close()
        with Store(path) as store:
            found = list(store.trajectories())
        for whole, trajectory in zip(wholes, found, strict=False):
            assert trajectory == prefix(whole, trajectory.num_steps)
        for at in range(0, 400, 8):
            said = max((steps for begin, steps in reported if begin == at), default=-1)
            there = {trajectory.num_steps for trajectory in found[at : at + 8]} or {-1}
            assert len(there) == 1, "a round of 8 trajectories is written whole or not at all"
            assert there.pop() >= said
    writer = start_writer(path)
    writer.communicate()
    assert writer.returncode == 0
    with Store(path) as store:
        assert list(store.trajectories()) == wholes
