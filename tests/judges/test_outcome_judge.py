"""Answers judged against the key by a model: kept in the store, UNKNOWN left out under its own name, also in the stages."""

import json
import re
import sqlite3
from pathlib import Path

import pytest
from support.collected import ANSWERS, collected, trajectory
from support.endpoints import completion, prompt_of, serving
from support.scores import scored
from support.stores import count_rows

from swirl_fast import cli
from swirl_fast.config import ConfigError, EndpointConfig, load
from swirl_fast.data.filters import Candidate, select
from swirl_fast.data.store import Store
from swirl_fast.formats.tags import parse
from swirl_fast.judges import cached as kept
from swirl_fast.judges.model import GivenAnswer
from swirl_fast.judges.outcome import judge_outcomes, outcome_judge_id, read_outcomes
from swirl_fast.stages.scores import accuracy_table
from swirl_fast.tasks import load_task
from swirl_fast.tasks.task import Question
from swirl_fast.tools.tool import CALCULATOR
from swirl_fast.trajectory import Finish
from swirl_fast.verdict import Judgement, Verdict


def respond(request, _):
    """YES for $10, NO for 12, no verdict otherwise."""
    given = re.search(r"BEGIN GIVEN ANSWER \w+ ===\n(.*?)\n=== END", prompt_of(request), re.S)
    verdict = {"$10": "VERDICT: YES", "12": "VERDICT: NO"}.get(given[1] if given else "", "That is hard to say.")
    return completion(f"So.\n{verdict}")


def test_verdicts_are_kept_by_content_and_unknown_ones_asked_anew(tmp_path: Path) -> None:
    question = Question("q", "sums", "How much are 5 and 5?", ("10", "ten"))
    trajectories = [trajectory(name, question, answer) for name, answer in ANSWERS.items()]
    with serving(respond) as (endpoint, _), Store(tmp_path / "t.db") as store:
        config = EndpointConfig(url=endpoint.url, model="judge-1", retries=0)
        before = read_outcomes(outcome_judge_id(config), store, trajectories, {"q": question})
        assert before == dict.fromkeys(("right", "wrong", "silent", "again")), (
            "not asked yet: no outcome, and none is wrong"
        )
        judge_outcomes(config, store, trajectories, {"q": question})
        outcomes = read_outcomes(outcome_judge_id(config), store, trajectories, {"q": question})
        assert outcomes == {"right": True, "wrong": False, "silent": None, "again": True}
        assert len(endpoint.requests) == 1 + 3, "the check, and each different answer once"
        judge_outcomes(config, store, trajectories, {"q": question})
        assert len(endpoint.requests) == 4 + 2, "the check, and the one without a verdict"
        judge_outcomes(config, store, [trajectories[0]], {"q": question})
        assert len(endpoint.requests) == 6, "nothing to ask: not even the check"
        other_key = Question("q", "sums", question.text, ("11",))
        assert read_outcomes(outcome_judge_id(config), store, trajectories[:1], {"q": other_key}) == {"right": None}
    candidates = [Candidate.of(one, [Judgement(Verdict.UNKNOWN, "")], outcomes.get(one.id)) for one in trajectories]
    selection = select(candidates, "outcome")
    assert selection.kept == ("right", "again")
    assert {reason: n for reason, n in selection.dropped.items() if n} == {
        "no_answer": 1,
        "wrong_answer": 1,
        "unknown_outcome": 1,
    }
    assert "1 with an answer that the outcome judge gave no verdict on" in selection.describe()
    assert "run judge again" in select(candidates[2:3], "outcome").remedy()


def test_where_probabilities_are_read_an_answer_is_right_from_the_least_one_on(tmp_path: Path) -> None:
    question = Question("q", "sums", "How much are 5 and 5?", ("10", "ten"))
    trajectories = [trajectory(name, question, name) for name in ("0.4", "0.5", "0.8")]
    keys = {one.id: GivenAnswer(question.text, question.answers, one.answer).content_hash() for one in trajectories}
    with Store(tmp_path / "t.db") as store:
        store.add_verdicts("o", {key: Judgement.graded(float(name), "") for name, key in keys.items()})
        for least, right in ((0.5, [False, True, True]), (0.7, [False, False, True])):
            assert list(read_outcomes("o", store, trajectories, {"q": question}, least).values()) == right


def test_what_was_answered_before_the_key_was_refused_is_kept(tmp_path: Path) -> None:
    question = Question("q", "sums", "How much are 5 and 5?", ("10", "ten"))
    trajectories = [trajectory(str(number), question, f"${number}") for number in range(6)]
    refusing = True

    def withdrawn(request, number):
        """The check and two answers, then no more."""
        return (401, b"no more credit") if refusing and number > 2 else completion("VERDICT: NO")

    with serving(withdrawn) as (endpoint, _), Store(tmp_path / "t.db") as store:
        config = EndpointConfig(url=endpoint.url, model="judge-1", retries=0, concurrency=1)
        with pytest.raises(ConfigError, match="no more credit"):
            judge_outcomes(config, store, trajectories, {"q": question})
        assert count_rows(store, "verdicts") == 2
        refusing, asked = False, len(endpoint.requests)
        judge_outcomes(config, store, trajectories, {"q": question})
        assert len(endpoint.requests) == asked + 1 + 4, "the check, and the answers that are left"
        assert set(read_outcomes(outcome_judge_id(config), store, trajectories, {"q": question}).values()) == {False}


def test_what_a_verdict_depends_on_is_in_its_key() -> None:
    one = GivenAnswer("How much?", ("10",), "$10")
    others = [GivenAnswer("How many?", ("10",), "$10"), GivenAnswer("How much?", ("10", "x"), "$10")]
    others += [GivenAnswer("How much?", ("10",), "10"), GivenAnswer("How much?", ("10",), None)]
    assert len({given.content_hash() for given in (one, *others)}) == 5
    assert GivenAnswer("How much?", ("10",), "$10").content_hash() == one.content_hash()
    ids = [
        outcome_judge_id(EndpointConfig(url="http://127.0.0.1:9/v1", model=m, temperature=t))
        for m, t in (("a", 0), ("b", 0), ("a", 1))
    ]
    assert len(set(ids)) == 3 and all(id_.startswith("outcome-") for id_ in ids)


def test_judge_and_filter_use_the_outcome_judge(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Process by the rules, outcomes by the model."""
    run = collected(tmp_path, "filter.kind=outcome")
    with serving(respond) as (endpoint, _):
        run += ["filter.outcome=judge", f"judge.model.url={endpoint.url}", "judge.model.model=judge-1"]
        assert cli.main(["filter", *run]) == 1
        assert "3 with an answer that the outcome judge gave no verdict on" in capsys.readouterr().err
        assert cli.main(["judge", *run]) == 0 and len(endpoint.requests) == 1 + 3
        assert cli.main(["filter", *run]) == 0 and len(endpoint.requests) == 4
    written = json.loads((tmp_path / "r" / "filter.json").read_text())
    assert (written["kept"], written["total"]) == (1, 4)
    assert "1 with an answer that the outcome judge gave no verdict on" in written["describe"]


def test_evaluation_tells_the_judged_accuracy_beside_the_exact_one() -> None:
    config = load(None, ["tasks.limit=1", "tasks.eval_limit=5"])
    task = load_task(config.tasks, 0)
    questions = task.questions("eval")
    made = [
        trajectory(str(i), question, answer)
        for i, (question, answer) in enumerate(zip(questions, ANSWERS.values(), strict=True))
    ]
    judgements = {t.id: [Judgement(Verdict.GOOD, "")] for t in made}
    plain = scored(task, questions, made, judgements).summary()
    assert "judge_accuracy" not in plain
    judged = scored(task, questions, made, judgements, {"0": True, "1": False, "2": None, "4": True}).summary(True)
    assert judged["judge_accuracy"] == 2 / 4, "no answer is wrong, one without a verdict is left out"
    assert judged["unknown_answers"] == 1 and judged["accuracy"] == plain["accuracy"]
    low, high = judged["judge_accuracy_interval"]
    assert low < 0.5 < high
    silent = scored(task, questions, made[:3], judgements, dict.fromkeys("012")).summary(True)
    assert silent["judge_accuracy"] is silent["judge_accuracy_interval"] is None and silent["unknown_answers"] == 3
    head, line, other = accuracy_table({"judged": judged, "silent": silent}).splitlines()
    assert head.split() == (
        "accuracy by the judge unknown mean process label unknown malformed repeated steps questions".split()
    )
    assert " 50.0% [" in line and re.search(r"–  +3 +100.0% \[", other) and len(line) == len(other) == len(head)
    assert "by the judge" not in accuracy_table({"plain": plain})


def test_a_judge_without_a_verdict_gives_no_label_rather_than_none_good() -> None:
    config = load(None, ["tasks.limit=1", "tasks.eval_limit=2"])
    task = load_task(config.tasks, 0)
    questions = task.questions("eval")
    made = [trajectory(str(i), question, "1") for i, question in enumerate(questions)]
    unknown = {t.id: [Judgement(Verdict.UNKNOWN, "")] for t in made}
    scores = scored(task, questions, made, unknown)
    summary = scores.summary()
    assert summary["process_label"] is summary["process_label_interval"] is None and summary["unknown"] == 2
    assert [one["process_label"] for one in scores.by_question().values()] == [None, None]
    head, line = accuracy_table({"base": summary}).splitlines()
    assert re.search(r"\] +– +2 +0\.0%", line) and len(line) == len(head)
    bad = scored(task, questions, made, {t.id: [Judgement(Verdict.BAD, "")] for t in made}).summary()
    assert bad["process_label"] == 0.0 and bad["unknown"] == 0


@pytest.mark.parametrize("key", ["filter.outcome", "evaluate.outcome"])
def test_the_settings_are_checked(key: str) -> None:
    with pytest.raises(ConfigError, match=f"{key}=judge: needs judge.model.url"):
        load(None, [f"{key}=judge"])
    with pytest.raises(ConfigError, match=f"{key}=model: must be one of exact, judge"):
        load(None, [f"{key}=model"])
    load(None, [f"{key}=judge", "judge.model.url=http://127.0.0.1:1/v1"])


def test_filter_does_not_take_missing_verdicts_for_bad_ones(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """filter.when_empty=none, after no judge, after another one, after one that is silent, and after one that turns all down."""
    run = collected(tmp_path, "filter.kind=process", "filter.when_empty=none")
    reply = "That is hard to say."
    with serving(lambda request, _: completion(reply)) as (endpoint, _):
        model = [f"judge={{kind: model, model: {{url: '{endpoint.url}', model: judge-1}}}}"]
        for more, judge in (([], "rules-"), (model, "model-judge-1-")):
            assert cli.main(["filter", *run, *more]) == 1
            shown = capsys.readouterr().err
            assert re.search(f"4 of 4 well-formed steps have no verdict by the judge {judge}", shown)
            assert "run judge with the same judge.* settings" in shown
            assert cli.main(["judge", *run, *more]) == 0
        assert cli.main(["filter", *run, *model]) == 1
        assert (
            "filter.when_empty=none: filter process kept 0 of 4 trajectories: 4 with an UNKNOWN"
            in capsys.readouterr().err
        )
        assert not (tmp_path / "r" / "shards").exists()
        reply = "VERDICT: BAD"
        assert cli.main(["judge", *run, *model]) == 0 and cli.main(["filter", *run, *model]) == 0
        assert "filter.when_empty=none, so all finished trajectories are used" in capsys.readouterr().out
        assert json.loads((tmp_path / "r" / "filter.json").read_text())["kept"] == 4


def test_what_is_not_judged_or_not_collected_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = collected(tmp_path, "filter.kind=process")
    store = tmp_path / "r" / "trajectories.db"
    with serving(lambda *_: completion("VERDICT: GOOD")) as (endpoint, _):
        run.append(f"judge={{kind: model, model: {{url: '{endpoint.url}', model: judge-1}}}}")
        assert cli.main(["judge", *run]) == 0
        assert "not collected" not in capsys.readouterr().out
        with sqlite3.connect(store) as db:
            db.execute("DELETE FROM verdicts WHERE content_hash = (SELECT min(content_hash) FROM verdicts)")
        assert cli.main(["filter", *run]) == 0
        shown = capsys.readouterr().out
        assert "filter: 1 of 4 well-formed steps have no verdict by the judge model-judge-1-" in shown
        assert "not collected" not in shown and "kept 3 of 4" in shown
        more = [*run, "collect.trajectories_per_question=2", "collect.temperature=0.5"]
        for stage in ("judge", "filter"):
            assert cli.main([stage, *more]) == 0
            told = f"{stage}: 4 of 8 trajectories are not collected yet, and are left out: run collect"
            assert told in capsys.readouterr().out
            assert cli.main([stage, *more, "collect.source=solutions"]) == 0
            assert "not collected" not in capsys.readouterr().out, "no trajectory of these was ever begun"


def test_an_endpoint_that_dies_stops_the_stage_and_earlier_verdicts_are_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chunks of 8 steps: the first is answered, the second is not, the third is never asked."""
    monkeypatch.setattr(kept, "CHUNK", 8)
    run = [f"run.folder={tmp_path}", "run.name=r", "tasks.limit=30", "tasks.eval_limit=1"]
    run.append("collect.trajectories_per_question=1")
    config = load(None, run)
    questions = load_task(config.tasks, config.run.seed).questions("train")
    made = [trajectory(f"{question.id}/0", question, f"{i}") for i, question in enumerate(questions)]
    for one in made[24:]:  # these are BAD without the judge
        one.steps[0].action = parse("no tag", [CALCULATOR])
        one.finish = Finish.STEP_LIMIT
    with Store(tmp_path / "r" / "trajectories.db") as store:
        store.add_questions(questions)
        store.record(made)

    def dying(request, number):
        return completion("VERDICT: GOOD") if number <= 8 else (503, b"out of memory")

    with serving(dying) as (endpoint, _):
        run.append(f"judge={{kind: model, model: {{url: '{endpoint.url}', model: judge-1, retries: 0}}}}")
        assert cli.main(["judge", *run]) == 1
        assert 13 <= len(endpoint.requests) <= 17, (
            "the check and two chunks, of which the second is given up after 4 failures"
        )
    shown = capsys.readouterr().err
    assert re.search("replied to none of 8 prompts: no reply.* in 1 tries, the last: HTTP 503: out of memory", shown)
    assert "judge.model.url" in shown
    with Store(tmp_path / "r" / "trajectories.db", writable=False) as store:
        asked = count_rows(store, "verdicts", "verdict = 'UNKNOWN'")
        assert count_rows(store, "verdicts") == 8 + asked and 4 <= asked <= 8, (
            "what was given up was not asked, and is no verdict"
        )

    def choosy(request, number):
        """Alive, but the steps that got no reply get none again: they must not end every later run as well."""
        silent = any(question.text in prompt_of(request) for question in questions[8:16])
        return (503, b"too long") if silent else completion("VERDICT: GOOD")

    with serving(choosy) as (endpoint, _):
        run[-1] = f"judge={{kind: model, model: {{url: '{endpoint.url}', model: judge-1, retries: 0}}}}"
        assert cli.main(["judge", *run]) == 0
    assert "judge: 30 steps by model-judge-1-" in (shown := capsys.readouterr().out)
    assert "16 GOOD, 6 BAD, 8 UNKNOWN" in shown


def test_a_dead_endpoint_stops_every_start(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The check is answered and nothing else: prompts that were given up unasked do not count as asked in vain the next time."""
    run = [f"run.folder={tmp_path}", "run.name=r", "tasks.limit=40", "tasks.eval_limit=1"]
    run.append("collect.trajectories_per_question=1")
    config = load(None, run)
    questions = load_task(config.tasks, config.run.seed).questions("train")
    with Store(tmp_path / "r" / "trajectories.db") as store:
        store.add_questions(questions)
        store.record(trajectory(f"{question.id}/0", question, f"{i}") for i, question in enumerate(questions))
    ready = "Reply with the one word: ready"

    def dead(request, number):
        return completion("ready") if prompt_of(request) == ready else (503, b"gone")

    with serving(dead) as (endpoint, _):
        run.append(
            f"judge={{kind: model, model: {{url: '{endpoint.url}', model: judge-1, retries: 0, concurrency: 4}}}}"
        )
        for _ in range(3):
            assert cli.main(["judge", *run]) == 1
            assert "replied to none of 40 prompts" in capsys.readouterr().err


def test_replies_without_a_verdict_stop_no_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept, "SILENT_CHUNK", 4)
    run = collected(tmp_path)
    with serving(lambda *_: completion("I cannot say.")) as (endpoint, _):
        run.append(f"judge={{kind: model, model: {{url: '{endpoint.url}', model: judge-1}}}}")
        assert cli.main(["judge", *run]) == 0
