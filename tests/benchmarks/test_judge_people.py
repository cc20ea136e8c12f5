"""Judges against people, on rows made up in the form of the published files."""

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks.judge_people import fit, measure
from benchmarks.judge_people.trajectories import read_calculator, read_search
from swirl_fast.formats.format import results_in
from swirl_fast.verdict import Judgement, Verdict

QUESTIONS = [f"Who wrote the book about fox {number}?" for number in range(6)]


def called(*queries: str, content: str = "") -> dict:
    function = {"name": "search", "arguments": json.dumps({"query_list": list(queries)})}
    return {"role": "assistant", "content": content, "tool_calls": [{"type": "function", "function": function}]}


def tool(*contents: str) -> dict:
    return {
        "role": "tool",
        "content": json.dumps({"result": [[{"document": {"contents": text}, "score": 0.5} for text in contents]]}),
    }


def search_row(question: str, labels: dict[str, int], right: int = 1) -> dict:
    messages = [
        {"role": "system", "content": "Help."},
        {"role": "user", "content": question},
        called("fox book", "fox book author", content="I search."),
        tool('"The ""Red"" Fox"\nA book by\nAnn Lee.', '"The ""Red"" Fox"\nA book by\nAnn Lee.', "Foxes\nAnimals."),
        called("Ann Lee"),
        {"role": "tool", "content": json.dumps({"error": 500, "message": "timeout"})},
        {"role": "assistant", "content": "It was she. <answer>Ann Lee</answer>"},
    ]
    return {"question": question, "messages": messages, "step_labels": labels, "final_label": right}


def write(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture
def search_file(tmp_path: Path) -> str:
    return write(tmp_path / "search.jsonl", [search_row(question, {"2": 1, "4": -1, "6": 1}) for question in QUESTIONS])


@pytest.fixture
def calculator_file(tmp_path: Path) -> str:
    rows = []
    for n in range(4, 10):
        right = {
            "is_correct": True,
            "solution": f"That is <<{n}*3={3 * n}>>{3 * n} and <<{3 * n}+2={3 * n + 2}>>.\nA: {3 * n + 2}",
        }
        wrong = {"is_correct": False, "solution": f"So <<{n}+3={n + 3}>>{n + 3}, <<2/0=0>>.\nA: {n + 3}"}
        rows.append(
            {
                "question": f"A box holds {n} rows of 3 pens, and 2 more. How many?",
                "ground_truth": f"<<{n}*3={3 * n}>> <<{3 * n}+2={3 * n + 2}>>\nA: {3 * n + 2}",
                "6b": right,
                "175b": wrong,
            }
        )
    return write(tmp_path / "calculator.jsonl", rows)


def test_search_trajectories_become_steps_that_the_rules_can_read(search_file: str) -> None:
    trajectory = read_search(search_file)[0]
    first, second, last = trajectory.steps
    assert first.view.action_text == "I search.\n<search_query>fox book; fox book author</search_query>"
    assert [step.kind for step in trajectory.steps] == ["several queries", "one query", "answer"]
    assert [step.label for step in trajectory.steps] == [Verdict.GOOD, Verdict.BAD, Verdict.GOOD] and trajectory.right
    (_, seen), (_, failed) = last.view.history
    assert results_in(first.action.calls, seen) == ['The "Red" Fox: A book by Ann Lee.\nFoxes: Animals.']
    assert results_in(second.action.calls, failed) == ["ERROR: timeout"]
    no_search = dict(
        search_row(QUESTIONS[0], {"2": -1}),
        messages=[{"role": "user", "content": "?"}, {"role": "assistant", "content": "<answer>she</answer>"}],
    )
    assert read_search(write(Path(search_file), [no_search]))[0].steps[0].kind == "answer before any search"
    assert second.view.history == last.view.history[:1] and first.view.history == ()


def test_a_label_of_0_is_no_label_and_halves_go_by_question(tmp_path: Path) -> None:
    rows = [search_row(question, {"2": 0}, right=0) for question in QUESTIONS * 2]
    trajectories = read_search(write(tmp_path / "s.jsonl", rows))
    assert all(step.label is None for trajectory in trajectories for step in trajectory.steps)
    assert {trajectory.right for trajectory in trajectories} == {None}
    halves = [trajectory.half for trajectory in trajectories]
    assert halves[:6] == halves[6:] and set(halves) == {"tune", "check"}


def test_solutions_become_calls_with_what_our_calculator_answers(calculator_file: str) -> None:
    right, wrong = read_calculator(calculator_file)[:2]
    assert [step.view.action_text for step in right.steps] == [
        "<math_exp>4*3</math_exp>",
        "<math_exp>12+2</math_exp>",
        "<answer>14</answer>",
    ]
    assert right.steps[-1].view.history == (
        ("<math_exp>4*3</math_exp>", "4*3 -> 12.0"),
        ("<math_exp>12+2</math_exp>", "12+2 -> 14.0"),
    )
    assert [step.label for step in right.steps] == [Verdict.GOOD] * 3 and [step.label for step in wrong.steps] == [
        Verdict.BAD
    ] * 3
    assert "ERROR" in wrong.steps[-1].view.history[1][1]


def test_the_command_measures_both_halves_and_keeps_no_text(
    search_file: str, calculator_file: str, tmp_path: Path
) -> None:
    out = tmp_path / "new" / "result.json"
    measure.main(["--search", search_file, "--calculator", calculator_file, "--out", str(out)])
    text = out.read_text(encoding="utf-8")
    result = json.loads(text)
    assert result["judges"]["search"].startswith("rules-v") and "fox" not in text and "pens" not in text
    assert result["self_consistency"].keys() == {"search", "calculator"}
    for name in ("search", "calculator"):
        assert result["self_consistency"][name].keys() == result[name].keys()
        assert sum(result[name][half]["questions"] for half in measure.HALVES) == 6
        for half in measure.HALVES:
            assert (
                sum(part["steps"] for part in result[name][half]["by_kind"].values())
                == result[name][half]["steps"]["steps"]
                > 0
            )
    calculator = result["calculator"]["check"]
    assert (
        calculator["steps"]["good_kept"] == 1.0
        and calculator["trajectories"]["precision"] == calculator["trajectories"]["auc"] == 1.0
    )


def test_answers_are_also_held_against_those_of_the_other_trajectories(tmp_path: Path) -> None:
    """Of five answers to a question; of another question's there is one."""
    rows = [search_row(QUESTIONS[0], {"6": 1}) for _ in range(5)]
    for row, answer in zip(rows, ["Ann Lee", "It was Ann Lee.", "Foxes", "Bo", "Ann Lee"], strict=True):
        row["messages"][-1] = {"role": "assistant", "content": f"<answer>{answer}</answer>"}
    rows[4]["messages"] = [rows[4]["messages"][1], rows[4]["messages"][-1]]  # before any search
    rows[4]["step_labels"] = {"1": 1}
    trajectories = read_search(write(tmp_path / "s.jsonl", [*rows, search_row(QUESTIONS[1], {"6": 1})]))
    _, judged = measure.judged_by([], trajectories)
    voted = measure.with_votes(judged)
    assert [given[:-1] for _, given in voted] == [given[:-1] for _, given in judged]
    alone, both = ([given[-1].verdict.value for _, given in of] for of in (judged, voted))
    assert alone == ["GOOD", "BAD", "GOOD", "BAD", "BAD", "GOOD"]
    assert both == ["GOOD", "GOOD", "BAD", "BAD", "BAD", "GOOD"]
    assert [given[-1].reason.startswith("by vote") for _, given in voted] == [True] * 4 + [False] * 2


def test_the_numbers_are_those_of_a_slow_count(calculator_file: str) -> None:
    """Kappa by its definition, AUC over all pairs, UNKNOWN left out of both shares."""
    trajectories = read_calculator(calculator_file)
    verdicts = [Verdict.GOOD, Verdict.BAD, Verdict.GOOD, Verdict.UNKNOWN, Verdict.GOOD]
    judged = [
        (one, [Judgement(verdicts[(at * 3 + i) % 5], "") for i in range(len(one.steps))])
        for at, one in enumerate(trajectories)
    ]
    report = measure.measure(judged)
    pairs = [
        (step.label, judgement.verdict)
        for one, given in judged
        for step, judgement in zip(one.steps, given, strict=True)
    ]
    known = [pair for pair in pairs if pair[1] is not Verdict.UNKNOWN]
    observed = sum(a is b for a, b in known) / len(known)
    chance = sum(
        (sum(a is v for a, _ in known) / len(known)) * (sum(b is v for _, b in known) / len(known))
        for v in (Verdict.GOOD, Verdict.BAD)
    )
    bad = [verdict for label, verdict in known if label is Verdict.BAD]
    assert report["steps"]["kappa"] == pytest.approx((observed - chance) / (1 - chance))
    assert report["steps"]["bad_seen"] == pytest.approx(bad.count(Verdict.BAD) / len(bad))
    assert report["steps"]["unknown_share"] == pytest.approx(1 - len(known) / len(pairs))
    scores = {
        right: [
            sum(j.verdict is Verdict.GOOD for j in given) / len(given) for one, given in judged if one.right is right
        ]
        for right in (True, False)
    }
    wins = [(a > b) + (a == b) / 2 for a in scores[True] for b in scores[False]]
    assert report["trajectories"]["auc"] == pytest.approx(sum(wins) / len(wins))
    low, high = report["trajectories"]["auc_interval"]
    assert low <= report["trajectories"]["auc"] <= high


def test_the_fit_is_where_the_penalised_likelihood_has_no_slope() -> None:
    draw = np.random.default_rng(0)
    table, labels = draw.normal(size=(200, 5)), (draw.random(200) < 0.4).astype(float)
    weights = fit.fitted(table, labels, 3.0)
    slope = table.T @ (1 / (1 + np.exp(-table @ weights)) - labels) + 3.0 * weights
    assert np.abs(slope).max() < 1e-8


def test_a_fit_is_compared_where_it_lets_as_many_wrong_answers_pass() -> None:
    """Of 10 wrong answers the 4 with the highest scores pass, above 2.5; of 5 right ones 3 are below that."""
    labels = np.array([0.0] * 10 + [1.0] * 5)
    scores = np.array([*np.arange(10) - 3.5, -1, 0, 1, 3, 7.0])
    assert fit.right_called_bad(scores, labels, 0.4) == pytest.approx(0.6)
    good = np.array([True] * 4 + [False] * 6 + [True] * 4 + [False])
    report = fit.beside_rules(scores, good, labels, np.arange(15))
    assert report["right_called_bad"] == pytest.approx(0.6) and report["more_than_rules"] == pytest.approx(0.4)
    assert report["interval"][0] <= 0.4 <= report["interval"][1]


def test_the_fit_knows_one_half_and_is_measured_on_both(calculator_file: str, tmp_path: Path) -> None:
    out = tmp_path / "new" / "fit.json"
    fit.main(["--calculator", calculator_file, "--out", str(out)])
    result = json.loads(out.read_text(encoding="utf-8"))
    assert sum(result[half]["answers"] for half in measure.HALVES) == 12
    for half in measure.HALVES:
        assert result[half]["rules"] == {"right_called_bad": 0.0, "wrong_called_good": 0.0}
        assert all(one["right_called_bad"] == 0 for one in result[half]["fit"].values())  # right ones multiply


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", r"f.jsonl:1: not JSON"),
        ('{"question": "a"}', r"f.jsonl:1: has no key messages, step_labels, final_label; is it the other file\?"),
        (
            '{"question": "a", "messages": [{"content": "b"}], "step_labels": {}, "final_label": 1}',
            "f.jsonl:1: messages are not as AgentProcessBench has them",
        ),
    ],
)
def test_wrong_files_are_named(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "f.jsonl").write_text(text + "\n", encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        read_search(tmp_path / "f.jsonl")
    with pytest.raises(ValueError, match="gone.jsonl: no such file; where to get it"):
        read_calculator(tmp_path / "gone.jsonl")
    with pytest.raises(SystemExit):
        measure.main([])
