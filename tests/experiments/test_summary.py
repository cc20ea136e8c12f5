"""The statistics of an experiment against numbers known beforehand, and the studies of docs/ against their cells and settings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from support.paths import ROOT
from support.task_files import write_lines

from swirl_fast import intervals
from swirl_fast.experiments.grid import read_experiment
from swirl_fast.experiments.summary import results_table, summarise
from swirl_fast.report.experiment import write_experiment_report


def cell(arm: str, seed: int, right: list[int], tasks: tuple[str, ...] = ("in_domain", "far")) -> dict[str, Any]:
    """Every seed has questions of its own."""
    rows = {f"{seed}-q{i}": {"accuracy": float(r), "f1": float(r), "process_label": 0.5} for i, r in enumerate(right)}
    evaluation = {"accuracy": sum(right) / len(right), "questions": len(right), "by_question": rows}
    evaluation |= {"malformed": 0.0, "repeated": 0.0, "answered": 1.0, "steps": 2.0}
    return {
        "arm": arm,
        "seed": seed,
        "trained": arm != "base",
        "training": {
            "steps": 3,
            "seconds": 10.0,
            "generated_tokens": 5.0,
            "tokens_computed": 7.0,
            "reward": [0.1, None, 0.3],
        },
        "filter": {"kept": 4},
        "evaluations": dict.fromkeys(tasks, evaluation),
    }


def test_gains_and_their_intervals() -> None:
    """Base answers 20 of 100, the arm those and 30 more, with every seed: 50 % against 20 %."""
    base, better = [1] * 20 + [0] * 80, [1] * 50 + [0] * 50
    results = {
        (arm, seed): cell(arm, seed, right) for seed in (0, 1, 2) for arm, right in (("base", base), ("new", better))
    }
    summary = summarise(["base", "new"], ["in_domain", "far"], [0, 1, 2], ("new", "base"), results)
    assert summary["in_domain_relative_gain"] == pytest.approx(1.5)
    assert summary["cross_task_relative_gain"] == pytest.approx(1.5)
    gain = summary["comparisons"]["new"]["in_domain"]
    assert gain == summary["lead"]["base"]["in_domain"]
    # in pairs the difference is a share of 0.3 in 300 questions: 0.3 ± 1.96 sqrt(0.21 / 300); unpaired it would be wider
    low, high = gain["difference_interval"]
    assert (low, high) == (pytest.approx(0.3 - 0.052, abs=0.006), pytest.approx(0.3 + 0.052, abs=0.006))
    assert gain["relative_gain_interval"][0] < 1.5 < gain["relative_gain_interval"][1]
    low, high = summary["arms"]["base"]["in_domain"]["interval"]
    assert (low, high) == (pytest.approx(0.2 - 0.045, abs=0.006), pytest.approx(0.2 + 0.045, abs=0.006))
    assert summary["arms"]["new"]["cost"]["trajectories"] == 4 and summary["arms"]["base"]["cost"] is None
    assert "new against base, in-domain: +150.0% relative" in results_table(summary)


def plain_bootstrap(groups: Any, pairs: list[int], crossed: list[int]) -> list[float]:
    """Of the mean of the means: every draw in full, nothing kept."""
    draw, seeds = np.random.default_rng(0), len(groups[0])
    sizes = [[len(own) for own in values] for values in groups]
    once = {}
    for pair, (n, *_) in dict(zip(pairs, sizes, strict=True)).items():
        if pair in crossed:
            once[pair] = draw.multinomial(n, np.full(n, 1 / n), intervals.DRAWS) / n
    means = np.zeros((len(groups), intervals.DRAWS))
    for _ in range(seeds):
        chosen = draw.integers(0, seeds, intervals.DRAWS)
        for seed in range(seeds):
            here = np.flatnonzero(chosen == seed)
            shares: dict[Any, Any] = {(pair, len(groups[0][0])): once[pair][here] for pair in once}
            for quantity, (pair, values) in enumerate(zip(pairs, groups, strict=True)):
                n = len(values[seed])
                if (pair, n) not in shares:
                    shares[pair, n] = draw.multinomial(n, np.full(n, 1 / n), len(here)) / n
                means[quantity, here] += shares[pair, n] @ values[seed] / seeds
    return [float(end) for end in np.quantile(means.mean(0), [0.025, 0.975])]


@pytest.mark.parametrize(
    ("sizes", "pairs", "crossed"),
    [
        ([[1]], [0], []),
        ([[40, 30, 40]], [0], []),
        ([[40, 40, 40]] * 2, [0, 0], [0]),
        ([[30, 20], [25, 20]] * 2, [0, 1, 0, 1], []),
    ],
)
@pytest.mark.parametrize("kept", [0, 2**29])
def test_draws_that_are_kept_give_the_numbers_of_fresh_ones(
    sizes: list[list[int]], pairs: list[int], crossed: list[int], kept: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(intervals, "KEPT_BYTES", kept)
    values = np.random.default_rng(1)
    groups = [[values.random(n) for n in own] for own in sizes]
    wanted = plain_bootstrap(groups, pairs, crossed)
    for _ in range(2):
        assert intervals.bootstrap(groups, lambda means: means.mean(0), pairs, crossed) == wanted


def test_what_is_kept_of_draws_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """A byte for a question in a draw; the draws of questions that all seeds share are there once."""
    monkeypatch.setattr(intervals, "_kept", kept := {})
    own, shared = [[np.ones(50)] * 3], [[np.ones(60)] * 3]
    monkeypatch.setattr(intervals, "KEPT_BYTES", intervals.DRAWS * (3 * 50 + 60))
    intervals.bootstrap(own, lambda means: means[0])
    intervals.bootstrap(shared, lambda means: means[0], crossed=[0])
    assert sum(map(intervals._bytes, kept.values())) == intervals.KEPT_BYTES and len(kept) == 2
    intervals.bootstrap([[np.ones(10)]], lambda means: means[0])
    assert [key[0] for key in kept] == [((60, 60, 60),), ((10,),)], "the one that was not used for longest is gone"
    intervals.bootstrap([[np.ones(1000)]], lambda means: means[0])
    assert not kept


def test_seeds_that_disagree_widen_the_interval() -> None:
    results = {("new", seed): cell("new", seed, [1] * n + [0] * (100 - n)) for seed, n in enumerate((20, 50, 80))}
    alike = {("new", seed): cell("new", seed, [1] * 50 + [0] * 50) for seed in range(3)}
    ends = [
        summarise(["new"], ["in_domain", "far"], [0, 1, 2], ("new", "new"), r)["arms"]["new"]["in_domain"]["interval"]
        for r in (results, alike)
    ]
    assert ends[0][1] - ends[0][0] > 3 * (ends[1][1] - ends[1][0])


def with_ids(one: dict[str, Any], ids: list[str], tasks: dict[str, str] | None = None) -> dict[str, Any]:
    """The cell with other question ids, and the task of each."""
    (rows,) = {id(e): e["by_question"] for e in one["evaluations"].values()}.values()
    rows = dict(zip(ids, rows.values(), strict=True))
    if tasks:
        rows = {name: row | {"task": tasks[name]} for name, row in rows.items()}
    for evaluation in one["evaluations"].values():
        evaluation["by_question"] = rows
    return one


def test_questions_that_all_seeds_share_are_not_asked_more_by_asking_again() -> None:
    """Three seeds that answer alike know no more of 100 shared questions than one: ± 1.96 sqrt(.21 / 100)."""
    base, better, ids = [1] * 20 + [0] * 80, [1] * 50 + [0] * 50, [f"q{i}" for i in range(100)]
    sides = (("base", base), ("new", better))
    results = {(arm, seed): with_ids(cell(arm, seed, right), ids) for seed in range(3) for arm, right in sides}
    summary = summarise(["base", "new"], ["in_domain", "far"], [0, 1, 2], ("new", "base"), results)
    for name in ("in_domain", "across_tasks"):
        low, high = summary["comparisons"]["new"][name]["difference_interval"]
        assert (low, high) == (pytest.approx(0.3 - 0.09, abs=0.01), pytest.approx(0.3 + 0.09, abs=0.01)), name
    low, high = summary["arms"]["base"]["in_domain"]["interval"]
    assert (low, high) == (pytest.approx(0.2 - 0.078, abs=0.01), pytest.approx(0.2 + 0.078, abs=0.01))
    for one in results.values():  # all right: Wilson, of 100 questions and not of 300
        for row in one["evaluations"]["in_domain"]["by_question"].values():
            row["accuracy"] = 1.0
    summary = summarise(["base"], ["in_domain", "far"], [0, 1, 2], ("base", "base"), results)
    assert summary["arms"]["base"]["in_domain"]["interval"][0] == pytest.approx(0.963, abs=1e-3)


def test_a_mixture_is_compared_as_a_whole_and_by_task_and_so_are_further_pairs() -> None:
    right = {"base": [1] * 4 + [0] * 36, "sft": [1] * 8 + [0] * 32, "both": [1] * 24 + [0] * 16}
    of_task = {f"q{i}": "easy" if i < 20 else "hard" for i in range(40)}
    results = {(arm, 0): with_ids(cell(arm, 0, own), list(of_task), of_task) for arm, own in right.items()}
    pairs = {"sft_then": ("both", "sft"), "missing": ("both", "late")}
    arms = [*right, "late"]
    assert not summarise([*right], ["in_domain", "far"], [0, 1], ("both", "base"), results)["complete"]
    fewer = dict.fromkeys(right, [0])
    assert summarise([*right], ["in_domain", "far"], [0, 1], ("both", "base"), results, fewer_seeds=fewer)["complete"]
    summary = summarise(arms, ["in_domain", "far"], [0], ("both", "base"), results, pairs)
    by_task = summary["arms"]["both"]["in_domain"]["by_task"]
    assert [by_task[task]["accuracy"] for task in ("easy", "hard")] == [1.0, pytest.approx(0.2)]
    assert by_task["hard"]["by_seed"] == [pytest.approx(0.2)] and by_task["hard"]["questions"] == 20
    gains = summary["comparisons"]["both"]
    assert [gains[f"in_domain/{task}"]["difference"] for task in ("easy", "hard")] == pytest.approx([0.8, 0.2])
    assert gains["in_domain"]["difference"] == pytest.approx(0.5) == gains["across_tasks"]["difference"]
    assert summary["pairs"].keys() == {"sft_then"} and summary["pairs"]["sft_then"]["arms"] == ["both", "sft"]
    assert summary["pairs"]["sft_then"]["in_domain"]["difference"] == pytest.approx(0.4)
    assert "sft_then: both against sft, in-domain: +40.0 points [" in results_table(summary)


def test_where_no_answer_is_right_there_is_doubt_and_no_relative_gain(tmp_path: Path) -> None:
    results = {(arm, 0): cell(arm, 0, right) for arm, right in (("base", [0] * 50), ("new", [1] * 5 + [0] * 45))}
    summary = summarise(["base", "new"], ["in_domain", "far"], [0, 1], ("new", "base"), results)
    base = summary["arms"]["base"]["in_domain"]
    assert base["accuracy"] == 0 and base["interval"] == pytest.approx([0, 0.0713], abs=1e-3)  # Wilson, 0 of 50
    assert summary["in_domain_relative_gain"] is None and not summary["complete"]
    assert summary["comparisons"]["new"]["in_domain"]["difference"] == pytest.approx(0.1)
    page = write_experiment_report(
        tmp_path,
        "a <b>",
        summary,
        results,
        {"base": ["as it is"], "new": ["trained", "x.y: <1>"]},
        "swirl-fast experiment 'a b'",
    ).read_text()
    assert "a &lt;b&gt;" in page and "x.y: &lt;1&gt;" in page and "swirl-fast experiment &#x27;a b&#x27;" in page
    assert "Some cells are not done yet" in page


def test_accuracy_is_drawn_over_trajectories_where_arms_differ_in_their_number(tmp_path: Path) -> None:
    arms = ["base", *(f"swirl,max_trajectories={n}" for n in (16, 64))]
    results = {(arm, 0): cell(arm, 0, [1] * (5 + i) + [0] * 45) for i, arm in enumerate(arms)}
    summary = summarise(arms, ["in_domain", "far"], [0], (arms[-1], "base"), results)
    page = write_experiment_report(tmp_path, "sizes", summary, results, {}, "").read_text()
    assert "Accuracy, in_domain by trajectories: swirl" in page


def test_a_judge_that_answered_nothing_gives_no_label(tmp_path: Path) -> None:
    one = cell("new", 0, [1, 0])
    for row in one["evaluations"]["in_domain"]["by_question"].values():
        row["process_label"] = None
    summary = summarise(["new"], ["in_domain", "far"], [0], ("new", "new"), {("new", 0): one})
    assert summary["arms"]["new"]["in_domain"]["process_label"] is None
    assert "label –" in results_table(summary)
    assert "<td>–</td>" in write_experiment_report(tmp_path, "silent", summary, {("new", 0): one}, {}, "").read_text()


def test_what_there_was_nothing_to_average_of_is_left_out(tmp_path: Path) -> None:
    """Of a seed whose model took no step at all."""
    results = {("base", seed): cell("base", seed, [0, 1]) for seed in (0, 1, 2)}
    results["base", 0]["evaluations"]["in_domain"] |= {"repeated": None, "steps": 0}
    results["base", 1]["evaluations"]["in_domain"] |= {"repeated": 0.5}
    results["base", 2]["evaluations"]["in_domain"] |= {"repeated": 0.25}
    summary = summarise(["base"], ["in_domain"], [0, 1, 2], ("base", "base"), results)
    found = summary["arms"]["base"]["in_domain"]
    assert found["repeated"] == 0.375 and found["steps"] == pytest.approx(4 / 3)
    none = {("base", 0): results["base", 0]}
    summary = summarise(["base"], ["in_domain"], [0], ("base", "base"), none)
    assert summary["arms"]["base"]["in_domain"]["repeated"] is None
    assert "base" in results_table(summary)
    write_experiment_report(tmp_path, "e", summary, none, {}, "")


@pytest.mark.parametrize("file", sorted((ROOT / "docs").glob("study*.json")), ids=lambda file: file.stem)
def test_the_numbers_of_a_study_are_those_of_its_cells(file: Path) -> None:
    study = json.loads(file.read_text(encoding="utf-8"))
    cells = [json.loads(path.read_text(encoding="utf-8")) for path in (file.with_suffix("") / "cells").glob("*.json")]
    results = {(cell["arm"], cell["seed"]): cell for cell in cells}
    pairs = {name: tuple(pair["arms"]) for name, pair in study.get("pairs", {}).items()}
    fewer = study.get("fewer_seeds", {})
    evaluations = list(cells[0]["evaluations"])
    arms = list(dict.fromkeys([*study["arms"], *fewer]))  # the summary leaves out an arm without any cell
    again = summarise(arms, evaluations, study["seeds"], tuple(study["compare"]), results, pairs, fewer)  # type: ignore[arg-type]
    assert len(results) == len(cells)
    assert study["complete"] == (len(cells) == sum(len(fewer.get(arm, study["seeds"])) for arm in arms))
    assert json.loads(json.dumps({"pairs": {}, **again})) == {"pairs": {}, **study}


def of_one_seed(name: str, folder: Path) -> Path:
    """A shipped experiment whose data files are there, of one seed: reading the settings of several takes long."""
    (folder / "data").mkdir()
    for file in ("hotpotqa.json", "musique.jsonl", "svamp.json", "gsm8k.jsonl"):
        write_lines(folder / "data" / file, [])
    spec = yaml.safe_load((ROOT / "configs" / "experiments" / f"{name}.yaml").read_text(encoding="utf-8"))
    for arm in spec["arms"].values():
        arm.pop("seeds", None)
    spec |= {"seeds": [1], "results": str(ROOT / "docs" / name)}
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(spec, sort_keys=False), encoding="utf-8")
    return path


def test_the_experiment_of_the_first_study_finds_its_cells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The settings of today are those that docs/study_reference_judge.md speaks of."""
    monkeypatch.chdir(tmp_path)
    file = of_one_seed("study_reference_judge", tmp_path)
    experiment = read_experiment(file)
    assert len(experiment.cells) == 7 and experiment.done().keys() == {(cell.arm, 1) for cell in experiment.cells}
    assert experiment.differs["base"] == ["the model as it is, not trained"]
    again = read_experiment(file, ["training.steps=2"]).command
    assert again == f"swirl-fast experiment {file} training.steps=2"


def test_the_main_arms_of_the_study_see_no_gold_label(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    experiment = read_experiment(of_one_seed("study", tmp_path))
    cells = {cell.arm: cell for cell in experiment.cells}
    for arm in ("process", "none", "raft", "sft", "sft_process"):
        config = cells[arm].config
        assert (config.judge.kind, config.collect.source, config.algorithm.reward) == ("rules", "policy", "process")
        assert config.filter.kind in ("none", "process")
    assert {cell.start for cell in cells.values()} == {None, *(cells[arm].name for arm in ("base", "sft"))}
    learned = [{**entry, "limit": 0} for entry in cells["base"].config.tasks.mix]
    passed = [entry["limit"] for entry in cells["base"].config.tasks.mix]
    assert [{**entry, "limit": 0} for entry in cells["process"].config.tasks.mix] == [
        {**entry, "skip": skip} for entry, skip in zip(learned, passed, strict=True)
    ], "other questions of the same data than the warm-up"
    for cell in cells.values():
        assert {one.judge.kind for one in cell.evaluations.values()} == {"rules"}
        asked = [one.tasks.mix or [{"eval_limit": one.tasks.eval_limit}] for one in cell.evaluations.values()]
        assert [sum(entry["eval_limit"] for entry in mix) for mix in asked] == [400, 200, 200, 200]
