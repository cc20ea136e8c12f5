"""What training sampled, and all trajectories, in report.html and the pages that it leads to."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.html_page import Node, page

from swirl_fast.config import Config, dump
from swirl_fast.data.samples import Sample, mark_full, samples_file, write_samples
from swirl_fast.data.store import Store
from swirl_fast.formats.tags import parse
from swirl_fast.report import pages, reading, write_report
from swirl_fast.tasks.task import Question
from swirl_fast.tools.tool import CALCULATOR
from swirl_fast.trajectory import Finish, Step, Trajectory
from swirl_fast.verdict import Judgement

HOSTILE = "</script></details><img src=x onerror=alert(1)> & \" ' \ud83d"
SHOWN = HOSTILE.replace("\ud83d", "\\ud83d")
GRADES = (0.0, 0.25, 1.0, None)


def sampled(step: int, place: int, state: int, number: int, **changes: Any) -> Sample:
    reward = GRADES[(step + place + state + number) % 4]
    verdict = "UNKNOWN" if reward is None else "GOOD" if reward >= 0.5 else "BAD"
    text = f"{HOSTILE} {step} {place} {state} {number} <math_exp>1 + 1</math_exp>"
    row: dict[str, Any] = {
        **{"step": step, "place": place, "trajectory": f"q{place}/0", "question_id": f"q{place}", "task": "gsm8k"},
        **{"question": f"Why {place}? {HOSTILE}", "state": state, "sample": number, "text": text, "kind": "tool"},
        **{"tool": f"calculator{HOSTILE}", "argument": "1 + 1", "error": "", "tokens": 1000 + number, "cut_off": False},
        **{"policy_version": step - 1, "observation": None, "verdict": verdict, "reward": reward},
        **{"reason": f"because {HOSTILE}", "advantage": None if reward is None else reward - 0.5},
    }
    return Sample(**row | changes)


def step_of(step: int, places: int = 3, states: int = 2, group: int = 4) -> list[Sample]:
    numbers = ((place, state, number) for place in range(places) for state in range(states) for number in range(group))
    return [sampled(step, *one) for one in numbers]


def keep(folder: Path, step: int, samples: Sequence[Sample]) -> None:
    write_samples(folder, step, [sample.line for sample in samples])


def read(path: Path) -> Node:
    """A page, with every link of it followed."""
    root = page(path.read_text(encoding="utf-8"))
    ids = {node.attributes.get("id") for node in root.all()}
    for link in root.all("a"):
        href = link.attributes["href"]
        assert href[1:] in ids if href.startswith("#") else (path.parent / href).is_file(), href
    assert not {node.tag for node in root.all()} & {"img", "iframe", "object", "base"} and len(root.all("script")) == 1
    assert not [name for node in root.all() for name in node.attributes if name.startswith("on")]
    levels = [int(node.tag[1]) for node in root.all() if re.fullmatch("h[1-6]", node.tag)]
    assert levels[0] == 1 and all(level <= before + 1 for before, level in zip(levels, levels[1:], strict=False))
    policy = next(n.attributes["content"] for n in root.all("meta") if n.attributes.get("http-equiv"))
    assert policy.startswith("default-src 'none';")
    return root


def test_the_steps_can_be_chosen_and_each_shows_its_states_with_their_actions(tmp_path: Path) -> None:
    steps = {step: step_of(step) for step in (1, 2, 12)}
    for step, samples in steps.items():
        keep(tmp_path, step, samples)
    root = read(write_report(tmp_path))
    chooser = root.one("form", "chooser")
    assert "hidden" in chooser.attributes, "shown by the script; without it there is the table of links"
    options = {int(option.text): option.attributes["value"] for option in chooser.one("select").all("option")}
    table = root.one(kind="steps-kept").one("tbody")
    assert {int(link.text.split()[1]): link.attributes["href"] for link in table.all("a")} == options
    assert options.keys() == steps.keys() and all("report/samples-" in file for file in options.values())
    heads = [cell.text for cell in root.one(kind="steps-kept").one("thead").all("th")]
    for step, row in zip(steps, table.all("tr"), strict=True):
        numbers = dict(zip(heads, [cell.text for cell in row.all("td")], strict=True))
        known = [sample.reward for sample in steps[step] if sample.reward is not None]
        assert float(numbers["reward"]) == pytest.approx(sum(known) / len(known), abs=5e-4)
        assert (numbers["trajectories"], numbers["states"], numbers["actions"]) == ("3", "6", "24")
        assert (numbers["GOOD"], numbers["BAD"], numbers["no verdict"], numbers["malformed"]) == ("6", "12", "6", "0")
        assert numbers["rewards differ at"] == "6"
    for step, samples in steps.items():
        shown = read(tmp_path / options[step])
        articles = shown.all("article")
        assert [len(article.all("li", "step")) for article in articles] == [4] * 6
        assert [block.one(kind="question").text for block in shown.all("details", "block")] == [
            f"Why {place}? {SHOWN}" for place in range(3)
        ]
        for item, sample in zip(shown.all("li", "step"), samples, strict=True):
            assert item.one(kind="action").text == sample.text.replace("\ud83d", "\\ud83d")
            assert f"calls calculator{SHOWN}, {sample.tokens:,} tokens" in item.one(kind="head").text
            assert item.one(kind="reason").text == f"because {SHOWN}" and item.one("details", "why")
            graded = " 0.25" if sample.reward == 0.25 else ""
            assert item.one(kind="badge").text == f"{sample.verdict}{graded}"
            if sample.reward is None:
                assert item.one(kind="reward").text == "–" and "not in the loss" in item.one(kind="advantage").text
            else:
                assert float(item.one(kind="reward").text) == sample.reward
                assert float(item.one(kind="advantage").text) == sample.reward - 0.5


def test_malformed_and_cut_off_actions_are_called_so(tmp_path: Path) -> None:
    one = sampled(1, 0, 0, 0, kind="malformed", tool=None, error="no tag", cut_off=True)
    keep(tmp_path, 1, [one, sampled(1, 0, 0, 1, kind="answer", tool=None)])
    write_report(tmp_path)
    cut, answer = read(tmp_path / "report" / "samples-000001-0001.html").all(kind="head")
    assert "malformed, cut off, 1,000 tokens" in cut.text and "answers, 1,001 tokens" in answer.text


def test_whole_trajectories_show_what_their_tools_answered(tmp_path: Path) -> None:
    keep(tmp_path, 1, [sampled(1, 0, 0, 0, observation=f"2 {HOSTILE}"), sampled(1, 0, 1, 0)])
    root = read(write_report(tmp_path))
    shown = read(tmp_path / "report" / "samples-000001-0001.html")
    assert [one.text for one in shown.all(kind="observation")] == [f"2 {SHOWN}"]
    assert root.one(kind="steps-kept").one("tbody").all("td")[4].text == "–", (
        "one action a state has nothing to differ from"
    )


def store_of(folder: Path, count: int) -> list[Trajectory]:
    questions = [Question(f"q{i}", "gsm8k", f"Why {i}? {HOSTILE}", ("1",)) for i in range(count)]
    trajectories = []
    for question in questions:
        texts = ["<math_exp>1</math_exp>", "<answer>1</answer>"]
        steps = [
            Step(1 + 2 * i, 2 + 2 * i, text, parse(text, [CALCULATOR]), [-1.0], 0, None if i else f"1 -> 1 {HOSTILE}")
            for i, text in enumerate(texts)
        ]
        tokens = np.arange(5, dtype=np.int32)[: steps[-1].end]
        trajectories.append(
            Trajectory(f"{question.id}/0", question.id, "gsm8k", question.text, 0, 1, tokens, steps, Finish.ANSWER)
        )
    with Store(folder / "trajectories.db") as store:
        store.add_questions(questions)
        store.record(trajectories)
        hashes = [key for trajectory in trajectories for key in trajectory.content_hashes()]
        store.add_verdicts("a", {key: Judgement.graded(1.0, "good") for key in hashes})
    return trajectories


def test_between_the_states_is_the_recorded_step(tmp_path: Path) -> None:
    store_of(tmp_path, 2)
    keep(tmp_path, 1, step_of(1))
    write_report(tmp_path)
    first, second, third = read(tmp_path / "report" / "samples-000001-0001.html").all("details", "block")
    for known in (first, second):
        between = known.one("details", "between")
        assert between.one(kind="action").text == "<math_exp>1</math_exp>"
        assert between.one(kind="observation").text == f"1 -> 1 {SHOWN}"
    assert not third.all("details", "between"), "its trajectory is not in this store"


def test_a_large_step_is_cut_into_pages_and_nothing_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pages, "PAGE_CHARS", 20_000)
    keep(tmp_path, 1, step_of(1, places=12))
    write_report(tmp_path)
    files = sorted((tmp_path / "report").iterdir())
    assert [file.name for file in files] == [f"samples-000001-{n:04d}.html" for n in range(1, len(files) + 1)]
    assert len(files) > 2
    roots = [read(file) for file in files]
    ids = [one.text for root in roots for one in root.all("p", "id")]
    assert ids == [f"trajectory q{place}/0" for place in range(12)]
    for number, root in enumerate(roots):
        rels = [link.attributes.get("rel", "") for link in root.one("nav", "pages").all("a")]
        assert rels == ["", *["prev"] * (number > 0), *["next"] * (number < len(roots) - 1)]
        assert "of 12." in root.one(kind="lede").text


def test_pages_of_earlier_reports_are_removed_and_other_files_stay(tmp_path: Path) -> None:
    keep(tmp_path, 1, step_of(1))
    keep(tmp_path, 2, step_of(2))
    write_report(tmp_path)
    first = (tmp_path / "report" / "samples-000001-0001.html").read_text(encoding="utf-8")
    samples_file(tmp_path, 2).unlink()
    for name in ("collected-0001.html", "evaluations-0007.html", "samples-000001-0002.html.0af1.tmp", "mine.html"):
        (tmp_path / "report" / name).write_text("", encoding="utf-8")
    write_report(tmp_path)
    assert {path.name for path in (tmp_path / "report").iterdir()} == {"samples-000001-0001.html", "mine.html"}
    again = (tmp_path / "report" / "samples-000001-0001.html").read_text(encoding="utf-8")
    assert re.sub("<time.*</time>", "", again) == re.sub("<time.*</time>", "", first)
    (tmp_path / "report" / "mine.html").unlink()
    samples_file(tmp_path, 1).unlink()
    write_report(tmp_path)
    assert not (tmp_path / "report").exists()


def test_what_is_not_kept_is_said(tmp_path: Path) -> None:
    def text(**settings: Any) -> str:
        config = Config()
        for key, value in settings.items():
            section, name = key.split("__")
            setattr(getattr(config, section), name, value)
        (tmp_path / "config.yaml").write_text(dump(config), encoding="utf-8")
        root = read(write_report(tmp_path))
        section = next(s for s in root.all("section") if s.attributes["aria-labelledby"] == "samples")
        return section.all("p")[0].text

    assert "No training step was sampled yet" in text()
    assert "algorithm.name=sft" in text(algorithm__name="sft")
    assert "training.samples_mb=0" in text(training__samples_mb=0.0)
    rows = "".join(json.dumps({"step": step, "reward": 0.5}) + "\n" for step in range(1, 6))
    (tmp_path / "metrics.jsonl").write_text(rows, encoding="utf-8")
    assert "No samples of this training are kept" in text()
    for step in (1, 2):
        keep(tmp_path, step, step_of(step))
    assert "48 actions in the 2 steps" in text() and "of 3 steps there are none" in text()
    mark_full(tmp_path, 3, 10**9)
    assert "full from step 3 on (training.samples_mb=64.0); of 3 steps there are none" in text()
    (tmp_path / "samples" / "full.json").write_text("[", encoding="utf-8")
    assert "of 3 steps there are none" in text()
    assert "full.json is damaged" in read(tmp_path / "report.html").one(kind="missing").text


def test_a_damaged_file_is_named_and_the_other_steps_are_shown(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        keep(tmp_path, step, step_of(step))
    path = samples_file(tmp_path, 2)
    path.write_bytes(path.read_bytes()[:-400])
    root = read(write_report(tmp_path))
    problem = next(item.text for item in root.one(kind="missing").all("li") if "samples" in item.text)
    assert "training step 2" in problem and "step_000002.jsonl, line 24" in problem
    assert [option.text for option in root.one("form", "chooser").all("option")] == ["1", "3"]


# ---- trajectories


def test_every_trajectory_is_in_reach(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the collected ones and of two evaluations, on pages in their order; the report has some of every kind."""
    monkeypatch.setattr(pages, "PAGE_CHARS", 40_000)
    collected = store_of(tmp_path, 90)
    (tmp_path / "evaluations").mkdir()
    for name, count in (("base", 60), ("trained", 70)):
        folder = tmp_path / "evaluations" / name
        folder.mkdir()
        store_of(folder, count)
        for path in folder.iterdir():
            path.rename(tmp_path / "evaluations" / path.name.replace("trajectories", name))
        folder.rmdir()
        (tmp_path / "evaluations" / f"{name}.json").write_text(json.dumps({"judge": "a"}), encoding="utf-8")
    root = read(write_report(tmp_path))
    assert len(root.all("details", "block")) == 2 * reading.SAMPLE
    linked = [link.attributes["href"] for nav in root.all("nav", "pages") for link in nav.all("a")]
    assert sorted(linked) == sorted(f"report/{path.name}" for path in (tmp_path / "report").iterdir())
    found: dict[str, list[str]] = {"collected": [], "base": [], "trained": []}
    for file in linked:
        for article in read(tmp_path / file).all("article"):
            name, id_ = article.one("h4").text.split()
            found[name].append(id_)
            assert len(article.all("li", "step")) == 2
    assert found["collected"] == [trajectory.id for trajectory in collected]
    assert found["base"] == [f"q{i}/0" for i in range(60)] and found["trained"] == [f"q{i}/0" for i in range(70)]
    assert sum("collected" in file for file in linked) > 2 and sum("evaluations" in file for file in linked) > 2
    assert "40 of 90 trajectories" in root.text and "40 of 70 questions" in root.text


def test_few_trajectories_need_no_pages(tmp_path: Path) -> None:
    store_of(tmp_path, reading.SAMPLE)
    root = read(write_report(tmp_path))
    assert "All 40 trajectories." in root.text and not (tmp_path / "report").exists()


def test_a_graded_reward_is_shown_with_its_verdict() -> None:
    question = Question("q", "gsm8k", "?", ("1",))
    step = Step(1, 2, "<answer>1</answer>", parse("<answer>1</answer>", ()), [-1.0], 0)
    badges = []
    for reward in (0.0, 0.25, 1.0):
        trajectory = Trajectory("q/0", "q", "gsm8k", "?", 0, 1, [1, 2], [step], Finish.ANSWER)
        one = reading.Reading(trajectory, question.answers, (Judgement.graded(reward, ""),))
        badges.append(page(reading._article("base", one)).one(kind="badge").text)
    assert badges == ["BAD", "BAD 0.25", "GOOD"]
