"""Stores that were filled side by side become one."""

from __future__ import annotations

from pathlib import Path

from support.stores import make_question, make_trajectory, prefix, rows

from swirl_fast.data.merge import merge
from swirl_fast.data.store import Store
from swirl_fast.trajectory import Finish
from swirl_fast.verdict import Judgement, Verdict

GOOD, BAD, UNKNOWN = (Judgement(verdict, verdict.value) for verdict in Verdict)
TABLES = ("questions", "trajectories", "steps", "verdicts")


def test_the_furthest_copy_is_taken_and_another_beginning_left_out(tmp_path: Path) -> None:
    """Begun in the target and further in two parts; begun otherwise in the target; only in a part. Twice gives the same as once."""
    questions = [make_question(i) for i in range(4)]
    whole = [make_trajectory(question, 0, 4, Finish.ANSWER) for question in questions]
    other = make_trajectory(questions[1], 0, 4, Finish.ANSWER, seed=1)
    with Store(tmp_path / "target.db") as target, Store(tmp_path / "a.db") as a, Store(tmp_path / "b.db") as b:
        for store in (target, a, b):
            store.add_questions(questions if store is target else questions[::-1])
        target.record([prefix(whole[0], 1), prefix(whole[1], 2)])
        a.record([prefix(whole[0], 3), prefix(whole[2], 2), whole[3]])
        b.record([whole[0], other, prefix(whole[2], 1)])
        target.add_verdicts("judge", {"x": GOOD, "y": UNKNOWN})
        a.add_verdicts("judge", {"x": BAD, "y": BAD})
        b.add_verdicts("another", {"x": BAD})

        assert merge(target, [a, b], [one.id for one in whole]) == 1
        wanted = [whole[0], prefix(whole[1], 2), prefix(whole[2], 2), whole[3]]
        assert list(target.trajectories()) == wanted
        assert target.questions() == questions
        assert target.verdicts("judge", "xy") == {"x": GOOD, "y": BAD} and target.verdicts("another", "x") == {"x": BAD}
        once = [rows(target.path, table) for table in TABLES]
        assert [row[1] for row in once[1]] == [whole[i].id for i in range(4)]
        assert merge(target, [a, b], []) == 1
        assert [rows(target.path, table) for table in TABLES] == once


def test_new_trajectories_stand_in_the_order_that_was_asked_for(tmp_path: Path) -> None:
    questions = [make_question(i) for i in range(70)]
    whole = [make_trajectory(question, 0, 1 + i % 3, Finish.STEP_LIMIT) for i, question in enumerate(questions)]
    with Store(tmp_path / "target.db") as target, Store(tmp_path / "a.db") as a, Store(tmp_path / "b.db") as b:
        for store, first in ((a, 0), (b, 1)):
            store.add_questions(questions)
            store.record(whole[first::2])
        assert merge(target, [a, b], [one.id for one in whole[:65]]) == 0
        found = [row[1] for row in rows(target.path, "trajectories")]
        assert found[:65] == [one.id for one in whole[:65]] and set(found[65:]) == {one.id for one in whole[65:]}
