"""The agreement report by hand, and the command that prints and writes it."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.endpoints import completion, prompt_of, serving
from support.labels import SUM, labels
from support.stores import count_rows

from swirl_fast import cli
from swirl_fast.data.store import Store
from swirl_fast.judges.agreement import agreement, describe
from swirl_fast.judges.labels import LabelledStep, write_labels
from swirl_fast.tools.tool import CALCULATOR, SEARCH
from swirl_fast.trajectory import StepView
from swirl_fast.verdict import Judgement, Verdict

VERDICTS = {"G": Verdict.GOOD, "B": Verdict.BAD, "U": Verdict.UNKNOWN}


def report_of(pairs: str, kinds: str = "") -> dict[str, Any]:
    """pairs: label and verdict of each step, e.g. `GG GB`. kinds: one letter a step."""
    steps, judgements = [], []
    for i, (label, verdict) in enumerate(pairs.split()):
        view = StepView("sums" if i % 2 else "qa", f"Question {i}", (), "<answer>3</answer>")
        tools = (CALCULATOR,) if i % 2 else (SEARCH,)
        steps.append(LabelledStep(view, tools, VERDICTS[label], kinds[i : i + 1], "human", line=i + 1))
        judgements.append(Judgement(VERDICTS[verdict], f"reason {i}"))
    return agreement(steps, judgements)


def test_the_numbers_by_hand() -> None:
    # labels GOOD: 4 GOOD, 1 BAD, 1 UNKNOWN; labels BAD: 2 GOOD, 3 BAD, 1 UNKNOWN
    report = report_of("GG GG GG GG GB GU BG BG BB BB BB BU", "aaaabbccdddd")
    assert report["confusion"] == {
        "GOOD": {"GOOD": 4, "BAD": 1, "UNKNOWN": 1},
        "BAD": {"GOOD": 2, "BAD": 3, "UNKNOWN": 1},
    }
    assert (report["steps"], report["labelled_good"], report["unknown"]) == (12, 6, 2)
    assert report["accuracy"] == 7 / 10 and report["accuracy_unknown_wrong"] == 7 / 12
    low, high = report["accuracy_interval"]
    assert 0.39 < low < 0.7 < high < 0.9
    assert (report["precision"], report["recall"]) == (4 / 6, 4 / 5)
    assert (report["false_positives"], report["false_negatives"]) == (2, 1)
    assert report["unknown_share"] == 2 / 12
    # chance: GOOD by both 5/10 * 6/10, BAD by both 5/10 * 4/10
    assert report["kappa"] == pytest.approx((0.7 - 0.5) / (1 - 0.5))
    assert {kind: part["steps"] for kind, part in report["by_kind"].items()} == {"a": 4, "b": 2, "c": 2, "d": 4}
    assert report["by_kind"]["c"]["accuracy"] == 0.0 and report["by_kind"]["a"]["accuracy"] == 1.0
    assert {tool: part["steps"] for tool, part in report["by_tool"].items()} == {"search": 6, "calculator": 6}
    assert report["by_task"].keys() == {"qa", "sums"} and report["by_source"].keys() == {"human"}
    assert [one["line"] for one in report["disagreements"]] == [5, 6, 7, 8, 12]
    assert report["disagreements"][0] | {"history": []} == report["disagreements"][0]
    assert report["disagreements"][0]["reason"] == "reason 4" and report["disagreements"][0]["verdict"] == "BAD"


def test_numbers_without_a_denominator_are_none() -> None:
    nothing_known = report_of("GU BU")
    assert nothing_known["unknown_share"] == 1.0 and nothing_known["accuracy_unknown_wrong"] == 0.0
    assert [nothing_known[key] for key in ("accuracy", "precision", "recall", "kappa")] == [None] * 4
    assert report_of("GG GG")["kappa"] is None, "both raters always say GOOD: chance alone agrees"
    assert report_of("GB BG")["kappa"] == -1.0
    json.dumps([nothing_known, report_of("GG GG")], allow_nan=False)
    assert "accuracy –" in describe(nothing_known)


def test_a_step_without_a_label_is_refused() -> None:
    step = LabelledStep(StepView("qa", "?", (), ""), (SEARCH,), None)
    with pytest.raises(ValueError, match="without a label"):
        agreement([step], [Judgement(Verdict.GOOD, "")])


@given(st.lists(st.tuples(st.sampled_from("GB"), st.sampled_from("GBU")), min_size=1, max_size=30))
def test_parts_add_up_and_kappa_is_that_of_the_definition(pairs) -> None:
    report = report_of(" ".join(a + b for a, b in pairs), "abc" * 10)
    for key in ("steps", "labelled_good", "false_positives", "false_negatives", "unknown"):
        assert sum(part[key] for part in report["by_kind"].values()) == report[key]
    known = [pair for pair in pairs if pair[1] != "U"]
    if known:
        observed = sum(a == b for a, b in known) / len(known)
        chance = sum(sum(a == v for a, _ in known) * sum(b == v for _, b in known) for v in "GB") / len(known) ** 2
        assert report["accuracy"] == pytest.approx(observed)
        assert report["kappa"] == (pytest.approx((observed - chance) / (1 - chance)) if chance < 1 else None)


def test_the_command_prints_and_writes_the_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = [f"run.folder={tmp_path}", "run.name=r"]
    assert cli.main(["judge", "--against", str(labels(tmp_path)), *run]) == 0
    report = json.loads((tmp_path / "r" / "agreement.json").read_text())
    assert (report["steps"], report["not_labelled"], report["accuracy"]) == (4, 1, 0.75)
    assert report["judge"].startswith("rules-v") and report["labels"].endswith("labels.jsonl")
    shown = capsys.readouterr().out
    assert (
        "1 of the 5 steps" in shown and "accuracy 75.0% [" in shown and "1 false positives, 0 false negatives" in shown
    )
    assert re.search(r"line 3, a strict reader: label BAD, judged GOOD\n +question +Calculate 12", shown)
    assert re.search(r"a strict reader +1 +0 +0\.0% +1 +0 +0\n", shown)
    assert (
        cli.main(["judge", *run, "--against", str(tmp_path / "labels.jsonl"), "--out", str(tmp_path / "x" / "o.json")])
        == 0
    )
    assert json.loads((tmp_path / "x" / "o.json").read_text()) == report


@pytest.mark.parametrize("many", [True, False])
def test_a_report_is_not_written_over_labels(many: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Not over those that are compared with, by whatever path, nor over others; a single line is a JSON object as well."""
    file = labels(tmp_path)
    if not many:
        file.write_text(file.read_text().splitlines(keepends=True)[0])
    (tmp_path / "link.jsonl").symlink_to(file)
    (tmp_path / "other.json").write_text('["mine"]')
    before = file.read_text()
    for out in (file, tmp_path / "link.jsonl", tmp_path / "other.json", tmp_path):
        arguments = ["judge", f"run.folder={tmp_path}", "--against", str(file), "--out", str(out)]
        assert cli.main(arguments) == 2
        assert f"--out {out}: is there already and is no report of --against" in capsys.readouterr().err
    assert file.read_text() == before and (tmp_path / "other.json").read_text() == '["mine"]'
    assert not (tmp_path / "run").exists(), "nothing was judged"


def test_the_verdicts_of_a_model_are_kept_and_unknown_ones_asked_anew(tmp_path: Path) -> None:
    asked: list[str] = []

    def respond(request, _):
        """The first time no verdict on a first step."""
        prompt = prompt_of(request)
        asked.append(prompt)
        if "BEGIN TURN 2" in prompt:
            return completion("So.\nVERDICT: GOOD")
        return completion("VERDICT: BAD" if asked.count(prompt) > 1 else "I cannot say")

    with serving(respond) as (endpoint, _):
        arguments = [
            "judge",
            "--against",
            str(labels(tmp_path)),
            f"run.folder={tmp_path}",
            "run.name=r",
            "judge.kind=model",
        ]
        arguments += [f"judge.model.url={endpoint.url}", "judge.model.model=judge-1", "judge.model.concurrency=1"]
        assert cli.main(arguments) == 0
        report = json.loads((tmp_path / "r" / "agreement.json").read_text())
        assert (report["unknown"], report["false_positives"]) == (2, 1)
        assert report["accuracy"] == 1 / 2 and report["accuracy_unknown_wrong"] == 1 / 4
        assert len(endpoint.requests) == 1 + 4, "the check, and every step with a label"
        assert cli.main(arguments) == 0
        assert len(endpoint.requests) == 5 + 3, "the check, and those that were UNKNOWN"
    report = json.loads((tmp_path / "r" / "agreement.json").read_text())
    assert (report["unknown"], report["accuracy"]) == (0, 0.75)
    with Store(tmp_path / "r" / "agreement.db", writable=False) as store:
        assert count_rows(store, "verdicts") == 4


def test_a_file_without_any_label_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    step = LabelledStep(StepView("sums", SUM, (), "<answer>41</answer>"), (CALCULATOR,), None)
    write_labels(tmp_path / "l.jsonl", [step])
    assert cli.main(["judge", "--against", str(tmp_path / "l.jsonl"), f"run.folder={tmp_path}"]) == 2
    assert "none of its 1 lines has a label yet" in capsys.readouterr().err


def test_a_judge_that_needs_solutions_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Labelled steps bring none, of whatever task they are."""
    arguments = ["judge", "--against", str(labels(tmp_path)), f"run.folder={tmp_path}", "judge.kind=reference"]
    assert cli.main(arguments) == 2
    told = capsys.readouterr().err
    assert "labelled steps (judge --against) come without any; use judge.kind=rules or model" in told
    assert "gsm8k" not in told
