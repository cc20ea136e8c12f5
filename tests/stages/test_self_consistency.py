"""judge.self_consistency=true through the stages, on a small real model: verdicts, shards, fresh actions, what is refused."""

from __future__ import annotations

import json
from collections import defaultdict
from fractions import Fraction
from pathlib import Path

import pytest
from support.runs import attempt, copy_of, overrides, start
from support.stores import read_samples

from swirl_fast.data.samples import read_samples as read_training_samples
from swirl_fast.data.shards import read_manifest
from swirl_fast.data.store import Store
from swirl_fast.judges.cached import judged_trajectories
from swirl_fast.judges.judge import BY_VOTE
from swirl_fast.judges.self_consistency import PREFIX, has_result, stored_id
from swirl_fast.outputs.folder import RunFolder
from swirl_fast.tasks.scoring import number
from swirl_fast.verdict import Verdict

VOTES = "judge.self_consistency=true"
SETTINGS = ("collect.trajectories_per_question=5", "training.steps=2")


@pytest.fixture(scope="module")
def filtered(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    folder = tmp_path_factory.mktemp("votes")
    for stage in ("collect", "judge", "filter"):
        start([stage, *overrides(folder, tiny_model, *SETTINGS, VOTES)])
    return folder


def naive(answer: Fraction | None, others: list[Fraction | None], recorded: bool) -> Verdict | None:
    """By the numbers, which is what the answers of the task are. None where nothing is decided, or an answer is no number."""
    if answer is None or None in others:
        return None
    agree, rival = others.count(answer), max((others.count(one) for one in others if one != answer), default=0)
    own = agree + recorded
    return Verdict.GOOD if own > max(1, rival) else Verdict.BAD if rival >= 2 * (agree + 1) else None


def test_verdicts_shards_and_fresh_answers(filtered: Path, tiny_model: Path, tmp_path: Path) -> None:
    run = filtered / "r"
    judge = json.loads((run / "filter.json").read_text(encoding="utf-8"))["judge"]
    assert judge.startswith(PREFIX)
    with Store(run / "trajectories.db", writable=False) as store:
        ids = store.ids(finished=True)
        alone = {one.id: judged for one, judged in judged_trajectories(store, stored_id(judge), ids)}
        voted = dict((one.id, (one, judged)) for one, judged in judged_trajectories(store, judge, ids))
        assert {row[0] for row in store.judged()} == {stored_id(judge)}
    answers: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for id_, (one, _) in voted.items():
        if one.answer is not None:
            answers[one.question_id].append((id_, one.answer))
    decided = 0
    for id_, (one, judged) in voted.items():
        assert judged[:-1] == alone[id_][:-1]
        others = sorted(answer for other, answer in answers[one.question_id] if other != id_)
        assert list(one.other_answers) == others
        if one.answer is None:
            assert judged == alone[id_]
        elif verdict := naive(number(one.answer), [number(other) for other in others], recorded=True):
            called = any(has_result(step.action, step.observation) for step in one.steps)
            assert judged[-1].verdict is (verdict if called or verdict is Verdict.BAD else alone[id_][-1].verdict)
            decided += judged[-1] != alone[id_][-1]
    assert decided > 3, "or nothing here is tested"
    samples = {sample.trajectory.id: sample for sample in read_samples(run / "shards")}
    assert samples and all(
        sample.trajectory == voted[id_][0] and sample.verdicts == [one.verdict for one in voted[id_][1]]
        for id_, sample in samples.items()
    )
    assert read_manifest(run / "shards").fingerprint["judge"] == judge

    folder = copy_of(filtered, tmp_path)
    start(["train", *overrides(folder, tiny_model, *SETTINGS, VOTES)])
    drawn = [one for step in (1, 2) for one in read_training_samples(folder / "r", step) if one.kind == "answer"]
    by_vote = [one for one in drawn if one.reason.startswith(BY_VOTE)]
    assert len(by_vote) > 3
    for one in drawn:
        others = [number(other) for other in samples[one.trajectory].trajectory.other_answers]
        verdict = naive(number(one.argument), others, recorded=False)
        before = samples[one.trajectory].trajectory.steps[: one.state]
        called = any(has_result(step.action, step.observation) for step in before)
        if verdict and (called or verdict is Verdict.BAD):
            assert one in by_vote and one.verdict == verdict.value


def test_shards_without_the_answers_of_others_are_refused(filtered: Path, tiny_model: Path, tmp_path: Path) -> None:
    folder = copy_of(filtered, tmp_path)
    start(["filter", *overrides(folder, tiny_model, *SETTINGS)])
    assert all(sample.trajectory.other_answers == () for sample in read_samples(folder / "r" / "shards"))
    refused = attempt(["train", *overrides(folder, tiny_model, *SETTINGS, VOTES)])
    assert refused.returncode == 2 and "the shards hold no answers of other trajectories" in refused.stderr
    start(["train", *overrides(folder, tiny_model, *SETTINGS)])


def test_states_are_chosen_by_what_the_vote_says(filtered: Path, tiny_model: Path, tmp_path: Path) -> None:
    """And what was drawn for a filter without votes is not taken for one with them."""
    folder = copy_of(filtered, tmp_path)
    variance = ("filter.states=variance", "filter.states_min_mean=0", "filter.states_max_mean=1")
    rewards = {}
    for votes in ("judge.self_consistency=false", VOTES):
        start(["filter", *overrides(folder, tiny_model, *SETTINGS, *variance, votes)])
        with Store(folder / "r" / "states.db", writable=False) as store:
            rewards[votes] = {key: value for key, value in store.meta().items() if key.startswith("rewards/")}
    alone, both = rewards["judge.self_consistency=false"], rewards[VOTES]
    assert alone.items() < both.items() and len(both) == 2 * len(alone)
    assert sorted(map(str, alone.values())) != sorted(str(both[key]) for key in both.keys() - alone.keys())


def test_evaluations_do_not_vote_and_what_is_shown_does(filtered: Path, tiny_model: Path, tmp_path: Path) -> None:
    """Also before there is a filter.json, which names the judge."""
    folder = copy_of(filtered, tmp_path)
    judge = RunFolder.read(folder / "r").judge_id
    assert judge is not None and judge.startswith(PREFIX)
    (folder / "r" / "filter.json").unlink()
    assert RunFolder.read(folder / "r").judge_id == judge
    settings = overrides(folder, tiny_model, *SETTINGS, VOTES, "evaluate.samples=5", "evaluate.temperature=1")
    planned = start(["evaluate", "--of", "base", "--dry-run", *settings])
    assert f"judge: {stored_id(judge)}" in planned.stdout
    start(["evaluate", "--of", "base", *settings])
    found = json.loads((folder / "r" / "evaluations" / "base.json").read_text(encoding="utf-8"))
    assert found["judge"] == stored_id(judge)
    assert RunFolder.read(folder / "r").judge_id == judge
    (folder / "r" / "trajectories.db").unlink()
    assert RunFolder.read(folder / "r").judge_id == stored_id(judge), "nothing to count votes of"
