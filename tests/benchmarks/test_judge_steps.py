"""The set that judges are measured on: its labels are certain, its composition is what it says, and the rules judge meets its target."""

import json
import random
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from support.paths import ROOT

from benchmarks.judges import agreement as judge_agreement
from benchmarks.judges.problems import draw_problem, swapped
from benchmarks.judges.steps import constructed
from benchmarks.judges.world import draw_hops, draw_pair, world
from swirl_fast.config import load
from swirl_fast.judges.labels import LabelledStep, read_labels
from swirl_fast.tools.arithmetic import evaluate
from swirl_fast.tools.numerals import numbers
from swirl_fast.verdict import Verdict

# What rules cannot see; every other kind must be judged without a mistake.
BLIND = {
    "wrong operation in a word problem",
    "answer that the results contradict",
    "fact of the world",
    "leaves out a number that does not matter",
    "number word or share",
    "query about something else, with a word of the question",
}
STORIES = {  # a word of each word problem -> what its story comes to
    "pencils": lambda a, b, c: a * b + c,
    "loaves": lambda a, b, c: a * b - c,
    "crates": lambda a, b, c: a * c + b * c,
    "tours": lambda a, b, c: c * (a + b),
    "evening": lambda a, b, c: b * a + c,
    "saves": lambda a, b, c: a + b - c,
    "seats": lambda a, b, c: a * b - c,
    "adults": lambda a, b, c: (a + b) * c,
}


@pytest.fixture(scope="module")
def steps() -> list[LabelledStep]:
    return constructed(0)


def test_the_composition_is_fair(steps: list[LabelledStep]) -> None:
    labels = Counter(step.label for step in steps)
    assert len(steps) >= 200 and labels[Verdict.GOOD] == labels[Verdict.BAD] == len(steps) / 2
    kinds = Counter((step.label, step.tools[0].name, step.kind) for step in steps)
    assert {n for (label, *_), n in kinds.items() if label is Verdict.GOOD} == {9}
    assert {n for (label, *_), n in kinds.items() if label is Verdict.BAD} == {6}
    assert {step.source for step in steps} == {"construction"}
    assert len({step.view for step in steps}) == len(steps)


def test_the_set_depends_on_the_seed_alone(steps: list[LabelledStep]) -> None:
    assert constructed(0) == steps
    other = constructed(1)
    assert Counter(step.kind for step in other) == Counter(step.kind for step in steps)
    assert len({step.view for step in other} & {step.view for step in steps}) < len(steps) / 2


def test_observations_are_those_of_the_tools(steps: list[LabelledStep]) -> None:
    seen = 0
    for step in steps:
        for text, observed in step.view.history:
            if (query := re.search(r"<search_query>(.*)</search_query>", text)) is not None:
                assert observed == f"{query[1]} -> {world().search.call(query[1])}"
            elif (call := re.search(r"<math_exp>(.*)</math_exp>", text)) and "ERROR" not in observed:
                value = numbers(observed.rpartition(" -> ")[2])
                assert observed.startswith(f"{call[1]} -> ") and value == [evaluate(call[1])]
            seen += 1
    assert seen > 200


def test_good_calculations_give_the_right_number(steps: list[LabelledStep]) -> None:
    """By a way of its own: the answers of reasoning-gym's sums, and word problems by the story instead of the template."""
    checked = 0
    for step in steps:
        if step.view.task == "chain_sum" and step.label is Verdict.GOOD and step.action.kind == "answer":
            wanted = eval(step.view.question.rpartition(": ")[2].strip(" ="))  # noqa: S307
            assert numbers(step.action.argument) == [wanted]
            checked += 1
    assert checked >= 9
    for seed in range(200):
        problem = draw_problem(random.Random(seed))
        a, b, c = problem.numbers
        (story,) = (number(a, b, c) for cue, number in STORIES.items() if cue in problem.question)
        assert evaluate(problem.whole) == story, problem.question
        assert evaluate(swapped(problem.first)) != evaluate(problem.first)


def test_answers_of_the_search_questions_are_facts_of_the_world() -> None:
    w = world()
    for seed in range(100):
        hops = draw_hops(random.Random(seed))
        shown = [w.search.call(query) for query in hops.queries]
        assert hops.answer in shown[1] and hops.answer not in hops.wrong
        assert all(wrong in " ".join(shown) for wrong in hops.wrong)
        pair = draw_pair(random.Random(seed), choice=False)
        named = [company for company in w.companies if company.name in pair.question]
        named.sort(key=lambda company: pair.question.index(company.name))
        before, after = named
        truth = before.year < after.year if "before" in pair.question else before.trade == after.trade
        assert pair.answer == ("yes" if truth else "no")


def test_the_rules_judge_meets_its_target() -> None:
    """95 % on the first set (measured: 95.4 %; 94.9 to 95.4 % on others), and no mistake in the kinds it can see."""
    config = load()
    for seed in range(3):
        report = judge_agreement.measure(config, constructed(seed))
        assert report["accuracy"] >= (0.95 if seed == 0 else 0.94) and report["unknown"] == 0
        wrong = {kind: part["accuracy"] for kind, part in report["by_kind"].items() if part["accuracy"] < 1}
        assert wrong.keys() <= BLIND, wrong
    assert report["by_kind"]["wrong operation in a word problem"]["accuracy"] == 0, (
        "seen now? then say so in judges/rules"
    )


def test_the_command_writes_the_set_and_the_result(tmp_path: Path, steps: list[LabelledStep]) -> None:
    command = [sys.executable, "-m", "benchmarks.judges", "--labels", str(tmp_path / "l.jsonl")]
    subprocess.run(command, cwd=ROOT, check=True)
    assert read_labels(tmp_path / "l.jsonl") == steps
    small = ["--good", "1", "--bad", "1", "--seeds", "2", "judge.rules.coverage=full"]
    judge_agreement.main(["--out", str(tmp_path / "r.json"), *small])
    result = json.loads((tmp_path / "r.json").read_text(encoding="utf-8"))
    assert result["steps"] == 60 and result["judge"].startswith("rules-v7-full")
    assert result["settings"]["each_good_kind"] == 1 and result["environment"]["cores"] >= 1
    assert result["accuracy_of_other_seeds"].keys() == {"1"}
