"""Files of labelled steps: read back as written, and every line that is none of ours refused by file:line and key."""

import json
from pathlib import Path

import pytest
from support.collected import collected

from swirl_fast import cli
from swirl_fast.config import load
from swirl_fast.data.store import Store
from swirl_fast.formats.tags import parse
from swirl_fast.judges.labels import LabelledStep, read_labels, steps_to_label, write_labels
from swirl_fast.tasks import load_task
from swirl_fast.tasks.task import Question
from swirl_fast.tools.tool import CALCULATOR, SEARCH
from swirl_fast.trajectory import Finish, Step, StepView, Trajectory
from swirl_fast.verdict import Verdict

ROW = {
    "task": "sums",
    "tools": ["calculator"],
    "question": "Calculate 1 + 2.",
    "history": [["<math_exp>1+2</math_exp>", "1+2 -> 3.0"]],
    "action_text": "<answer>3</answer>",
    "label": "GOOD",
    "kind": "answer is the result",
    "source": "human",
}


def write(path: Path, *rows: object) -> Path:
    path.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows))
    return path


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    view = StepView("qa", "Wer? \ud800 \u2028", (("a\nb", "a -> \x00"), ("", "")), "<answer>é</answer>")
    steps = [
        LabelledStep(view, (SEARCH,), Verdict.BAD, "copied", "rule", line=1),
        LabelledStep(StepView("sums", "?", (), ""), (CALCULATOR, SEARCH), None, "", "", line=2),
    ]
    assert write_labels(tmp_path / "new" / "l.jsonl", steps) == 2
    assert read_labels(tmp_path / "new" / "l.jsonl") == steps


def test_kind_and_source_may_be_left_out_and_blank_lines_are_none(tmp_path: Path) -> None:
    short = {key: ROW[key] for key in ("task", "tools", "question", "history", "action_text", "label")}
    (step,) = read_labels(write(tmp_path / "l.jsonl", "\n", short, "  \n"))
    assert (step.kind, step.source, step.line, step.label) == ("", "", 2, Verdict.GOOD)
    assert step.action == parse("<answer>3</answer>", [CALCULATOR])


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ("{not json}\n", r"l\.jsonl:2: not a JSON object: "),
        ("[1, 2]\n", r"l\.jsonl:2: must be a JSON object, not list"),
        (ROW | {"label": "good"}, r"l\.jsonl:2: key 'label' = 'good': must be GOOD or BAD, or empty"),
        (ROW | {"label": "UNKNOWN"}, r"key 'label' = 'UNKNOWN': must be GOOD or BAD"),
        (ROW | {"label": True}, r"key 'label' = True: must be text"),
        ({key: ROW[key] for key in ROW if key != "label"}, r"l\.jsonl:2: key 'label': is missing"),
        ({key: ROW[key] for key in ROW if key != "task"}, r"key 'task': is missing"),
        (ROW | {"question": 3}, r"key 'question' = 3: must be text"),
        (ROW | {"history": "none"}, r"key 'history' = 'none': must be a list of \[action_text, observation\]"),
        (ROW | {"history": [["only one"]]}, r"key 'history' = .*must be a list of"),
        (ROW | {"history": [["a", None]]}, r"key 'history' = .*must be a list of"),
        (ROW | {"tools": ["abacus"]}, r"key 'tools' = \['abacus'\]: must be a list of calculator, search"),
        (ROW | {"tools": [["calculator"]]}, r"key 'tools' = .*must be a list of calculator, search"),
        (ROW | {"tools": []}, r"key 'tools' = \[\]: must be a list of"),
        (ROW | {"source": "gpt"}, r"key 'source' = 'gpt': must be one of human, rule, construction"),
        (ROW | {"lable": "GOOD"}, r"key 'lable' = 'GOOD': is unknown; the keys are task, tools,"),
        (ROW | {"tools": ["search"], "action_text": "x"}, r"l\.jsonl:2: key 'tools' = \['search'\]: task 'sums' has"),
        (ROW | {"label": "BAD"}, r"l\.jsonl:2: key 'label' = 'BAD': the same step is 'GOOD' in line 1; keep one"),
    ],
)  # fmt: skip
def test_a_line_that_is_none_of_ours_is_named(bad: object, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        read_labels(write(tmp_path / "l.jsonl", ROW, bad))


def test_a_file_that_is_not_there_or_not_text_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="none.jsonl: no such file; one labelled step a line"):
        read_labels(tmp_path / "none.jsonl")
    (tmp_path / "l.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="l.jsonl: not UTF-8 at byte 0"):
        read_labels(tmp_path / "l.jsonl")
    assert cli.main(["judge", "--against", str(write(tmp_path / "l.jsonl", "{}\n")), f"run.folder={tmp_path}"]) == 1
    assert "l.jsonl:1: key 'history': must be a list" in capsys.readouterr().err


def test_steps_of_a_run_to_be_labelled(tmp_path: Path) -> None:
    """Each well-formed step at most once, evenly from all, none with a label."""
    texts = ("<math_exp>1+2</math_exp>", "no tag", "<answer>3</answer>")
    questions = [Question(f"q{q}", "sums", f"Question {q}", ("3",)) for q in range(4)]
    trajectories = []
    for t in range(8):  # four pairs of equal trajectories
        steps = [
            Step(i, i + 1, text, parse(text, [CALCULATOR]), [0.0], 0, None if i == 2 else "1+2 -> 3.0")
            for i, text in enumerate(texts)
        ]
        question = questions[t // 2]
        trajectories.append(
            Trajectory(f"t{t}", question.id, "sums", question.text, 0, 0, [1, 2, 3], steps, Finish.ANSWER)
        )
    with Store(tmp_path / "t.db") as store:
        store.add_questions(questions)
        store.record(trajectories)

        def drawn(count: int, seed: int) -> list[LabelledStep]:
            return steps_to_label(store, store.ids(), {"sums": (CALCULATOR,)}, count, seed)

        every, some = drawn(100, seed=0), drawn(5, seed=0)
        assert {step.view for step in every} == {t.view(i) for t in trajectories for i in (0, 2)} and len(every) == 8
        assert len(some) == 5 and some == drawn(5, seed=0)
        assert some != drawn(5, seed=1)
    assert all(step.label is None and step.tools == (CALCULATOR,) for step in some)


def test_malformed_steps_alone_are_nothing_to_label(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, file = collected(tmp_path), tmp_path / "l.jsonl"
    with Store(tmp_path / "r" / "trajectories.db") as store:
        made = list(store.trajectories(store.ids()))
    (tmp_path / "r" / "trajectories.db").unlink()
    for trajectory in made:
        trajectory.steps[0].text, trajectory.steps[0].action = "no tag", parse("no tag", [CALCULATOR])
    with Store(tmp_path / "r" / "trajectories.db") as store:
        store.add_questions(load_task(load(None, run).tasks, 0).questions("train"))
        store.record(made)
    assert cli.main(["judge", "--export-steps", str(file), *run]) == 1
    assert "none of the 4 trajectories has a step that is not malformed" in capsys.readouterr().err
    assert not file.exists()


def test_steps_are_exported_labelled_and_judged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, file = collected(tmp_path), tmp_path / "l.jsonl"
    assert cli.main(["judge", "--export-steps", str(file), "--count", "3", *run]) == 0
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert len(rows) == 3 and all(row["label"] == "" and row["tools"] == ["calculator"] for row in rows)
    assert "3 steps in" in capsys.readouterr().out
    write(file, *(row | {"label": "BAD"} for row in rows[:2]), rows[2])
    assert cli.main(["judge", "--against", str(file), *run]) == 0
    report = json.loads((tmp_path / "r" / "agreement.json").read_text())
    assert (report["steps"], report["not_labelled"]) == (2, 1) and report["by_source"].keys() == {"human"}
    assert cli.main(["judge", "--export-steps", str(file), *run]) == 2
    assert "the file is there already, perhaps with labels" in capsys.readouterr().err
    assert json.loads(file.read_text().splitlines()[0])["label"] == "BAD"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out", "o.json"], "--out names the report of --against"),
        (["--export-steps", "l.jsonl", "--count", "0"], "--count 0: must be at least 1"),
        (["--export-steps", "l.jsonl", "--against", "l.jsonl"], "not allowed with"),
    ],
)
def test_arguments_that_do_not_fit_are_named(arguments, message, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["judge", *arguments])
    assert stopped.value.code == 2 and message in capsys.readouterr().err
