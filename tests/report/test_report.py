"""The report against the files it is about: the page is parsed, and what it shows is compared with what lies in the
run's folder."""

import base64
import hashlib
import json
import math
import re
import shlex
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.html_page import Node, page
from support.reported_run import JUDGE, Made, make_store, make_trajectory, metrics_row

from swirl_fast import __version__, report
from swirl_fast.config import Config, dump
from swirl_fast.data.store import Store
from swirl_fast.intervals import wilson
from swirl_fast.metrics import BY_NAME
from swirl_fast.models.load import weights_hash
from swirl_fast.report import charts, markup, reading, write_report
from swirl_fast.report.charts import Series, lines, stacked
from swirl_fast.report.curves import MAX_POINTS, curves
from swirl_fast.report.headline import headline
from swirl_fast.report.inputs import Run
from swirl_fast.tasks.task import Question
from swirl_fast.trajectory import Finish
from swirl_fast.verdict import Verdict

# ---- a parsed page


def written(folder: Path) -> Node:
    path = write_report(folder)
    assert path == folder / "report.html"
    return page(path.read_text(encoding="utf-8"))


def visible(text: str) -> str:
    """What a reader sees of a text: what HTML cannot hold, and what turns the direction, as Python escapes."""
    hidden = [*range(0x00, 0x09), *range(0x0B, 0x20), *range(0x7F, 0xA0), *range(0xD800, 0xE000), 0xFFFE, 0xFFFF]
    hidden += [0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A), *range(0xFDD0, 0xFDF0)]
    return "".join(char.encode("unicode_escape").decode() if ord(char) in set(hidden) else char for char in text)


# ---- the whole page


def test_page_is_whole_and_asks_for_nothing(run: Made) -> None:
    root = written(run.folder)
    nodes = root.all()
    for node in nodes:
        for name, value in node.attributes.items():
            assert not name.startswith("on"), f"<{node.tag} {name}>"
            if name in ("src", "href", "action", "srcset", "poster", "data", "formaction"):
                assert value.startswith("#") or value == "data:,", f"<{node.tag} {name}={value!r}>"
    ids = [node.attributes["id"] for node in nodes if "id" in node.attributes]
    assert len(ids) == len(set(ids))
    assert {node.attributes["href"][1:] for node in root.all("a")} <= set(ids)
    style = root.one("style").text
    assert "url(" not in style and "@import" not in style
    assert not {node.tag for node in nodes} & {"iframe", "object", "embed", "img", "base"}
    # the one script is the one the policy allows: whatever a text contains, nothing else can run or load
    digest = base64.b64encode(hashlib.sha256(root.one("script").text.encode()).digest()).decode()
    policy = next(n.attributes["content"] for n in root.all("meta") if n.attributes.get("http-equiv"))
    assert policy.startswith("default-src 'none';") and f"script-src 'sha256-{digest}';" in policy
    assert not re.search(r"\bhttps?:", root.one("script").text)
    assert root.one("title").text.startswith("run <one> & 'two'") and root.one("h1").text == "run <one> & 'two'"
    assert f"swirl-fast {__version__}" in root.one("footer").text
    assert not root.all(kind="missing")


def test_headings_and_tables_can_be_navigated(run: Made) -> None:
    root = written(run.folder)
    levels = [int(node.tag[1]) for node in root.all() if re.fullmatch("h[1-6]", node.tag)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(level <= before + 1 for before, level in zip(levels, levels[1:], strict=False))
    for table in root.all("table"):
        assert table.one("caption").text
        assert all(cell.attributes.get("scope") for cell in table.all("th"))
    for control in [*root.all("select"), *root.all("input")]:
        assert any(control in label.all(control.tag) for label in root.all("label"))
    assert all(svg.attributes.get("aria-label") or svg.attributes.get("aria-hidden") for svg in root.all("svg"))


def test_only_the_report_is_written_and_twice_the_same(run: Made) -> None:
    def files() -> dict[str, bytes]:
        return {str(path): path.read_bytes() for path in run.folder.rglob("*") if path.is_file()}

    (run.folder / "report.html").unlink(missing_ok=True)
    before = files()
    first = write_report(run.folder).read_text()
    after = files()
    assert after.pop(str(run.folder / "report.html")) and after == before
    second = write_report(run.folder).read_text()
    assert re.sub("<time.*</time>", "", first) == re.sub("<time.*</time>", "", second)


def test_settings_are_shown_to_the_letter(run: Made) -> None:
    config, summary = (node.text for node in written(run.folder).all(kind="config"))
    assert config == (run.folder / "config.yaml").read_text()
    assert json.loads(summary) == json.loads((run.folder / "summary.json").read_text())


# ---- the result


def test_headline_shows_the_numbers_of_the_evaluations(run: Made) -> None:
    root = written(run.folder)
    table = root.one(kind="headline").one("table")
    assert [th.text for th in table.one("thead").all("th")] == ["base", "trained", "change"]
    rows = {row.one("th").children[0]: row.all("td") for row in table.one("tbody").all("tr")}
    keys = {
        "Accuracy": "accuracy",
        "Mean process label": "process_label",
        "Malformed": "malformed",
        "Answered": "answered",
    }
    keys |= {
        "Repeated calls": "repeated",
        "Steps": "steps",
        "Steps without a verdict": "unknown",
        "Questions": "questions",
    }
    keys |= {"Temperature": "temperature", "Time": "seconds", "Cut off": "cut_off", "Action length": "action_length"}
    keys |= {"Length of GOOD steps": "action_length_good", "Length of BAD steps": "action_length_bad"}
    keys |= {"Text outside the tag": "outside_tag"}
    assert rows.keys() == keys.keys()  # F1 and trajectories would repeat accuracy and questions
    for name, key in keys.items():
        for cell, evaluation in zip(rows[name][:2], run.evaluations.values(), strict=True):
            data = cell.one("data")
            assert float(data.attributes["value"]) == evaluation[key]
            if name in ("Accuracy", "Mean process label", "Malformed", "Repeated calls", "Answered"):
                assert data.text == f"{evaluation[key]:.1%}"
            if f"{key}_interval" in evaluation:
                low, high = evaluation[f"{key}_interval"]
                assert cell.one("small").text == f"{low:.1%} – {high:.1%}"
                # the bar: 0 at x = 4, 1 at x = 76
                start, end = map(
                    float, re.findall(r"[\d.]+", cell.one("path", "range").attributes["d"].replace("6H", ""))
                )
                assert start == pytest.approx(4 + 72 * low, abs=0.06) and end == pytest.approx(4 + 72 * high, abs=0.06)
                assert float(cell.one("circle").attributes["cx"]) == pytest.approx(4 + 72 * evaluation[key], abs=0.06)
    base, trained = run.evaluations["base"], run.evaluations["trained"]
    assert base["accuracy"] == pytest.approx(2 / 6) and trained["accuracy"] == pytest.approx(5 / 6)
    assert rows["Accuracy"][2].text.startswith("+50.0 points")
    lede = root.one(kind="lede").text
    assert lede.startswith("On 6 held-out questions accuracy went from 33.3% to 83.3%")


def test_interval_of_a_change_is_newcombes() -> None:
    """56 of 70 against 48 of 80: 0.0524 to 0.3339 (Newcombe 1998, Statistics in Medicine 17, table II, method 10)."""
    evaluations = {
        name: {"accuracy": right / n, "accuracy_interval": list(wilson(right, n))}
        for name, right, n in (("base", 48, 80), ("trained", 56, 70))
    }
    change = page(headline(Run(Path("."), evaluations=evaluations))).one("tr", "first").all("td")[2]
    assert change.text == "+20.0 points95%: +5.2 to +33.4"
    worse = page(headline(Run(Path("."), evaluations={"base": evaluations["trained"], "trained": evaluations["base"]})))
    assert worse.one("tr", "first").all("td")[2].text == "-20.0 points95%: -33.4 to -5.2"
    assert worse.one("span", "worse")
    same = page(headline(Run(Path("."), evaluations={"base": evaluations["base"], "trained": evaluations["base"]})))
    assert same.one("tr", "first").all("td")[2].text.endswith("may be chance")


def test_an_evaluation_without_a_verdict_has_no_label_and_no_change() -> None:
    some = {"accuracy": 0.5, "accuracy_interval": [0.2, 0.8], "questions": 8}
    some |= {"process_label": 0.5, "process_label_interval": [0.2, 0.8], "unknown": 0, "unknown_answers": 3}
    silent = some | {"process_label": None, "process_label_interval": None, "unknown": 16}
    run = Run(Path("."), evaluations={"base": some, "trained": silent})
    rows = {row.one("th").children[0]: row.all("td") for row in page(headline(run)).one("tbody").all("tr")}
    assert [cell.text for cell in rows["Mean process label"][1:]] == ["–", ""]
    assert [cell.text for cell in rows["Steps without a verdict"]] == ["0", "16", "+16"]
    assert [cell.text for cell in rows["Answers without a verdict"]] == ["3", "3", "+0"]
    assert "process label" not in report._lede(run)


def test_evaluations_on_different_tasks_are_told_apart_and_not_subtracted() -> None:
    evaluations = {name: {"accuracy": 0.5, "task": task} for name, task in (("base", "gsm8k"), ("trained", "gsm8k"))}
    heads = [cell.text for cell in page(headline(Run(Path("."), evaluations=evaluations))).one("thead").all("th")]
    assert heads == ["base", "trained", "change"]
    evaluations["trained"]["task"] = "musique"
    heads = [cell.text for cell in page(headline(Run(Path("."), evaluations=evaluations))).one("thead").all("th")]
    assert heads == ["basegsm8k", "trainedmusique"]


PAIR = {
    name: {"accuracy": 0.5, "accuracy_interval": [0.3, 0.7], "task": "gsm8k", "questions": 2, "temperature": 0.0}
    | {"process_label": 0.5, "process_label_interval": [0.3, 0.7], "judge": "rules-v1", "judge_accuracy": 0.4}
    | {"by_question": {"q1": {"accuracy": 1.0}, "q2": {"accuracy": 0.0}}}
    for name in ("base", "trained")
}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, ""),
        ({"temperature": 0.7}, "their temperatures are 0.0 and 0.7"),
        ({"questions": 3}, "they were asked different questions (2 and 3 of them)"),
        (
            {"by_question": {"q1": {"accuracy": 1.0}, "<q3>": {"accuracy": 0.0}}},
            "they were asked different questions (2 and 2 of them)",
        ),
        ({"by_question": None}, ""),  # of an earlier version
        ({"task": "<musique>"}, "they are on different tasks, gsm8k and <musique>"),
    ],
)
def test_only_what_can_be_compared_is_subtracted(changes: dict, reason: str) -> None:
    run = Run(Path("."), evaluations={"base": PAIR["base"], "trained": PAIR["trained"] | changes})
    root = page(headline(run))
    assert [cell.text.startswith("change") for cell in root.one("thead").all("th")] == [False, False] + [True] * (
        not reason
    )
    told = [note.text for note in root.all("p", "note") if "not compared" in note.text]
    assert told == ([f"base and trained are not compared: {reason}."] if reason else [])
    assert bool(report._lede(run)) == (not reason)


def test_labels_of_two_judges_are_not_subtracted() -> None:
    trained = PAIR["trained"] | {"judge": "rules-v2", "accuracy": 0.7, "process_label": 0.9}
    run = Run(Path("."), evaluations={"base": PAIR["base"], "trained": trained})
    root = page(headline(run))
    change = {row.one("th").children[0]: row.all("td")[2].text for row in root.one("tbody").all("tr")}
    assert change["Accuracy"].startswith("+20.0 points") and change["Mean process label"] == ""
    assert change["Accuracy by the judge"].startswith("+0.0 points"), "its judge is another one, and not told"
    assert "had not the same process judge: what depends on it" in root.text and "outcome judge:" not in root.text
    assert "accuracy went from" in report._lede(run) and "label" not in report._lede(run)
    outcome = {name: PAIR[name] | {"outcome_judge": name} for name in PAIR}
    root = page(headline(Run(Path("."), evaluations=outcome)))
    change = {row.one("th").children[0]: row.all("td")[2].text for row in root.one("tbody").all("tr")}
    assert change["Accuracy by the judge"] == "" and change["Mean process label"].startswith("+0.0 points")
    assert "had not the same outcome judge" in root.text


def test_an_evaluation_that_training_has_left_behind_is_named(copy: Path) -> None:
    (copy / "model").mkdir()
    (copy / "model" / "config.json").write_text("{}")
    weights = copy / "model" / "model.safetensors"
    weights.write_bytes(b"one")
    path = copy / "evaluations" / "trained.json"
    one = json.loads(path.read_text()) | {"model": f"moved/{copy.name}/model", "weights": weights_hash(copy / "model")}
    path.write_text(json.dumps(one))
    assert not written(copy).all(kind="missing")
    weights.write_bytes(b"two")
    (item,) = written(copy).one(kind="missing").all("li")
    assert "other weights by now than the evaluation trained" in item.text
    path.write_text(json.dumps(one | {"model": "models/other"}))
    assert not written(copy).all(kind="missing")
    path.write_text(json.dumps(one | {"weights": None}))
    path.with_name("trained-1.json").write_text(
        json.dumps(one)
    )  # set aside: it is of the weights from before by design
    assert not written(copy).all(kind="missing")


def test_survivors_are_those_of_the_filter(run: Made) -> None:
    table = written(run.folder).one("table", "survivors")
    rows = [(row.one("th").text, int(row.one("data").attributes["value"])) for row in table.one("tbody").all("tr")]
    assert rows == run.selection and len(rows) > 1
    widths = [float(re.search(r"width:([\d.]+)%", node.attributes["style"])[1]) for node in table.all(kind="share")]
    assert widths == pytest.approx([100 * count / run.selection[0][1] for _, count in run.selection], abs=0.05)


# ---- the curves


def axis(figure: Node) -> tuple[dict[float, float], dict[float, float]]:
    """Positions of the ticks -> what is written at them, of the horizontal and the vertical axis."""

    def value(text: str) -> float:
        factor = {"%": 0.01, "k": 1e3, "M": 1e6}.get(text[-1], 1.0)
        return float(text.rstrip("%kM").replace(",", "")) * factor

    across, up = {}, {}
    for tick in figure.one("svg", "plot").all("text"):
        if tick.attributes["text-anchor"] == "middle":
            across[float(tick.attributes["x"])] = value(tick.text)
        else:
            up[float(tick.attributes["y"])] = value(tick.text)
    return across, up


def invert(ticks: dict[float, float], position: float, log: bool = False) -> float:
    """The value at a position, from the first and the last tick."""
    (p, a), *_, (q, b) = sorted(ticks.items())
    if log:
        return math.exp(math.log(a) + (math.log(b) - math.log(a)) * (position - p) / (q - p))
    return a + (b - a) * (position - p) / (q - p)


def points(path: Node) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in re.findall(r"[ML]([\d.-]+) ([\d.-]+)", path.attributes["d"])]


@pytest.mark.parametrize(
    ("values", "unit", "log", "top"),
    [
        ([0.1, 0.25, 0.9, 0.7], "%", False, 1.0),
        ([0.001, 0.0031, 0.0022, 0.009], "nats", False, None),
        ([120_000.0, 250_000.0, 90_000.0, 410_000.0], "", False, None),
        ([-3.0, 2.0, 7.5, -1.0], "", False, None),
        ([3e-6, 2e-4, 9e-5, 4e-3], "nats", True, None),
        ([12.0, 12.0, 12.0, 12.0], "", False, None),
    ],
)
def test_a_line_read_off_its_axes_gives_the_data(values: list[float], unit: str, log: bool, top: float | None) -> None:
    steps = [5, 10, 12, 30]
    figure = page(lines("Title", steps, [Series("one", values)], unit, log=log, top=top)).one("figure")
    across, up = axis(figure)
    drawn = points(next(path for path in figure.one("svg", "plot").all("path", "line")))
    span = max(up.values()) - min(up.values())
    for (x, y), step, value in zip(drawn, steps, values, strict=True):
        assert invert(across, x) == pytest.approx(step, abs=0.1)
        tolerance = {"rel": 0.02} if log else {"abs": span / 1000}
        assert invert(up, y, log) == pytest.approx(value, **tolerance)
        assert charts.TOP <= y <= charts.HEIGHT - charts.BOTTOM and charts.LEFT <= x <= charts.WIDTH - charts.RIGHT


def test_bars_are_stacked_in_order_and_to_scale() -> None:
    seconds = {"rollout": [10.0, 12.0, 8.0], "backward": [5.0, 4.0, 6.5], "other": [1.0, 0.0, 2.5]}
    figure = page(stacked("Time", [1, 2, 3], [Series(name, own) for name, own in seconds.items()], "seconds")).one(
        "figure"
    )
    _, up = axis(figure)
    tops = [0.0, 0.0, 0.0]
    for bar, own in zip(figure.all("path", "bar"), seconds.values(), strict=True):
        boxes = re.findall(r"M[\d.]+ ([\d.]+)h[\d.]+V([\d.]+)h-[\d.]+z", bar.attributes["d"])
        assert len(boxes) == sum(value > 0 for value in own)
        for (bottom, top), i in zip(boxes, [i for i, value in enumerate(own) if value > 0], strict=True):
            assert invert(up, float(bottom)) == pytest.approx(tops[i], abs=0.03)
            tops[i] += own[i]
            assert invert(up, float(top)) == pytest.approx(tops[i], abs=0.03)
    assert tops == [16.0, 16.0, 17.0]


def test_curves_and_table_hold_the_metrics(run: Made) -> None:
    root = written(run.folder)
    figures = {figure.one("h3").children[0].strip(): figure for figure in root.all("figure")}
    shown = {
        "Reward and process label": ["reward", "process_label"],
        "Malformed, cut off and repeated actions": ["malformed", "cut_off", "repeated"],
        "Action length by verdict": ["action_length_good", "action_length_bad"],
        "Text outside the tag": ["outside_tag"],
        "KL to the reference model": ["kl"],
        "Entropy": ["entropy"],
        "Gradient norm": ["grad_norm"],
        "Engine–trainer log-prob gap": ["engine_gap_mean", "engine_gap_max"],
        "Throughput": ["tokens_computed_per_second", "tokens_effective_per_second"],
        "Rollout cache hit rate": ["cache_hit_rate"],
        "Time by phase": ["seconds_rollout", "seconds_forward_backward", "seconds_optimizer"],
    }
    assert figures.keys() == shown.keys()
    for title, keys in shown.items():
        data = json.loads(figures[title].attributes["data-chart"])
        assert data["at"] == [f"step {step}" for step in range(1, 13)]
        percent = title in (
            "Reward and process label",
            "Malformed, cut off and repeated actions",
            "Text outside the tag",
            "Rollout cache hit rate",
        )
        for key, texts in zip(keys, data["values"], strict=False):
            for row, text in zip(run.metrics, texts, strict=True):
                number = float(text.rstrip("%").replace(",", "")) / (100 if percent else 1)
                assert number == pytest.approx(row[key], rel=6e-3, abs=5.1e-4 if percent else 0)
        legend = [node.text for node in figures[title].one(kind="legend").all("b")]
        assert legend == [texts[-1] for texts in data["values"]]
    phases = json.loads(figures["Time by phase"].attributes["data-chart"])["values"]
    assert len(phases) == 4  # data and judge are below 1 % of the time and stand in `other`
    assert [float(text) for text in phases[3]] == pytest.approx([20 + 0 - 10 - 7 - 1.5] * 12)

    table = root.one("details", "numbers").one("table")
    keys = [th.text.replace(" ", "_") for th in table.one("thead").all("th")]
    assert set(keys) == set(run.metrics[0]) - {"policy_version"}
    for row, metrics in zip(table.one("tbody").all("tr"), run.metrics, strict=True):
        for key, cell in zip(keys, row.all("td"), strict=True):
            assert float(cell.text) == pytest.approx(metrics[key], rel=1e-4)


def test_the_rows_of_these_tests_have_declared_metrics() -> None:
    assert metrics_row(1).keys() <= BY_NAME.keys()


def test_a_column_of_numbers_says_what_it_means() -> None:
    heads = {th.text: th.attributes.get("title") for th in page(curves([metrics_row(1) | {"new": 1.0}])).all("th")}
    assert heads["kl"] == "KL divergence from the reference model (estimator k3); 0 without one [nats a token]"
    assert heads["learning rate"] == "the optimizer's, in this step" and heads["new"] is None


def test_a_long_training_is_averaged_and_gaps_stay_gaps() -> None:
    rows = [
        metrics_row(step, reward=step / 1003, entropy=math.nan if 400 < step <= 600 else 1.0) for step in range(1, 1004)
    ]
    del rows[7]["cache_hit_rate"]
    root = page(curves(rows))
    assert "Each point is the mean of 3 steps" in root.all("p")[0].text
    figures = {figure.one("h3").children[0].strip(): figure for figure in root.all("figure")}
    data = json.loads(figures["Reward and process label"].attributes["data-chart"])
    assert len(data["at"]) == len(data["values"][0]) == 335 <= MAX_POINTS
    assert data["at"][0] == "step 3" and data["at"][-1] == "step 1,003"
    assert data["values"][0][99] == f"{299 / 1003:.1%}"  # steps 298, 299, 300
    raw = figures["Entropy"].one("svg", "plot").one("path", "raw").attributes["d"]
    assert raw.count("M") == 2  # the line is broken where there is no value
    assert "nan" not in str([figure.attributes for figure in root.all("figure")])
    assert len(root.one("tbody").all("tr")) <= 200
    assert root.one("tbody").all("tr")[-1].all("td")[0].text == "1003"


def test_one_step_and_nothing_recorded() -> None:
    root = page(curves([{"step": 1, "reward": 0.5, "engine_gap_mean": 0.0}]))
    figures = {figure.one("h3").children[0].strip(): figure for figure in root.all("figure")}
    assert figures["Reward and process label"].one("circle", "s0")
    assert figures["Engine–trainer log-prob gap"].one("circle", "s0")  # all 0: no decades, a plain axis
    assert figures.keys() == {"Reward and process label", "Engine–trainer log-prob gap"}  # no empty ones
    absent = root.all("p")[0].text.partition("Not recorded in this run: ")[2]
    assert "Entropy" in absent and "Time by phase" in absent and "Reward" not in absent
    unmeasured = page(curves([metrics_row(1, kl=0.0)], kl_measured=False))
    assert not any(figure.text.startswith("KL") for figure in unmeasured.all("figure"))


def test_a_legend_shows_the_last_step_that_has_a_number() -> None:
    rows = [{"step": 1, "reward": 0.25}, {"step": 2, "reward": 0.5}, {"step": 3, "reward": None}]
    figure = page(curves(rows)).one("figure")
    assert figure.one(kind="legend").text.startswith("step 2") and figure.one(kind="legend").all("b")[0].text == "50.0%"
    assert json.loads(figure.attributes["data-chart"])["last"] == 1


def test_the_header_says_with_what_it_was_trained_and_the_settings_how_to_do_it_again(tmp_path: Path) -> None:
    folder = tmp_path / "it's"
    folder.mkdir()
    config = Config()
    config.run.seed = 7
    (folder / "config.yaml").write_text(dump(config))

    def shown(found: dict[str, object]) -> tuple[dict[str, str], str]:
        (folder / "hardware.json").write_text(json.dumps(found))
        root = written(folder)
        facts = {div.one("dt").text: div.one("dd").text for div in root.one("dl", "facts").all("div")}
        return facts, next(node.text for node in root.all(kind="action"))

    facts, command = shown({"processor": "Ryzen", "cores": 2, "ranks": 1, "nodes": 1})
    assert facts["Seed"] == "7" and facts["Trained on"] == "Ryzen, 2 cores"
    assert shlex.split(command) == ["swirl-fast", "run", "--config", str(folder / "config.yaml"), "run.name=it's-again"]
    facts, command = shown({"processor": "H200", "ranks": 16, "nodes": 2})
    assert facts["Trained on"] == "16 × H200"
    assert command.startswith(
        "torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:PORT -m swirl_fast run"
    )
    (folder / "hardware.json").write_text("{")
    assert "hardware.json is not readable as JSON" in written(folder).one(kind="missing").text
    for damaged in (
        {"processor": "x"},
        {"processor": "x", "ranks": "two", "nodes": 1},
        {"processor": "x", "ranks": 5, "nodes": 0},
    ):
        (folder / "hardware.json").write_text(json.dumps(damaged))
        assert "which no training writes" in written(folder).one(kind="missing").text


# ---- trajectories


def test_every_trajectory_is_shown_step_by_step(run: Made) -> None:
    root = written(run.folder)
    seen: dict[str, set[str]] = {"collected": set(), "base": set(), "trained": set()}
    for block in root.all("details", "block"):
        for article in block.all("article"):
            name, id_ = article.one("h4").text.split(" ", 1)
            seen[name].add(id_)
            trajectory, judgements = run.expected[name][id_]
            assert block.one(kind="question").text == visible(trajectory.question)
            assert article.attributes["data-finish"] == (trajectory.finish.value if trajectory.finish else "unfinished")
            steps = article.all("li", "step")
            assert len(steps) == trajectory.num_steps
            verdicts = set()
            for node, step, judgement in zip(steps, trajectory.steps, judgements, strict=True):
                assert node.one(kind="action").text == visible(step.text)
                verdicts.add(judgement.verdict.value if judgement else "NONE")
                assert node.one(kind="badge").text == (judgement.verdict.value if judgement else "not judged")
                reasons = [reason.text for reason in node.all(kind="reason")]
                assert reasons == ([f"Judge {visible(judgement.reason)}"] if judgement else [])
                observations = [one.text for one in node.all(kind="observation")]
                assert observations == ([] if step.observation is None else [visible(step.observation)])
            assert article.attributes["data-verdicts"].split() == sorted(verdicts)
            good, bad = (
                sum(one is not None and one.verdict is kind for one in judgements) for kind in list(Verdict)[:2]
            )
            assert (f"{good} of {good + bad} GOOD" if good + bad else "no verdict") in article.one(kind="outcome").text
    assert seen == {name: set(own) for name, own in run.expected.items()}


def test_pairs_stand_side_by_side_with_what_training_changed(run: Made) -> None:
    root = written(run.folder)
    pairs = [block for block in root.all("details", "block") if len(block.all("article")) == 2]
    assert len(pairs) == 6
    pairs.sort(key=lambda block: int(block.one(kind="gold").text))  # in the order of the data, as the answers were made
    assert [block.one(kind="gold").text for block in pairs] == [str(2 * i) for i in range(6, 12)]
    assert [[article.one("h4").text.split()[0] for article in block.all("article")] for block in pairs] == [
        ["base", "trained"]
    ] * 6
    assert [block.attributes["data-change"] for block in pairs] == ["lost", "", "gained", "gained", "gained", "gained"]
    matches = [[article.attributes["data-match"] for article in block.all("article")] for block in pairs]
    assert matches == [["right", "wrong"], ["right", "right"], *[["wrong", "right"]] * 4]
    shares = [sum(match[i] == "right" for match in matches) / len(matches) for i in range(2)]
    assert shares == pytest.approx([run.evaluations["base"]["accuracy"], run.evaluations["trained"]["accuracy"]])
    collected = [block for block in root.all("details", "block") if len(block.all("article")) == 1]
    assert {block.one("article").attributes["data-match"] for block in collected} == {"right", "none"}


def test_the_filter_offers_what_occurs(run: Made) -> None:
    form = written(run.folder).one("form", "filter")
    assert "hidden" in form.attributes  # shown by the script; without it there would be a form that does nothing
    options = {s.attributes["name"]: [o.attributes["value"] for o in s.all("option")] for s in form.all("select")}
    assert options == {
        "verdict": ["", "GOOD", "BAD", "UNKNOWN", "NONE", "ALL"],
        "match": ["", "right", "wrong", "none", "gained", "lost"],
        "finish": ["", "answer", "step_limit", "context_limit", "unfinished"],
    }


def test_answers_are_compared_as_the_task_does() -> None:
    def matches(task: str, answer: str, gold: str) -> bool | None:
        question = Question("q", task, "?", (gold,))
        trajectory = make_trajectory(question, 0, [f"<answer>{answer}</answer>"], Finish.ANSWER)
        return reading.Reading(trajectory, question.answers, (None,)).matches

    assert matches("gsm8k", "$1,200.00", "1200") and not matches("gsm8k", "The Beatles", "Beatles")
    assert (
        matches("hotpotqa", "The Beatles!", "beatles")
        and matches("beerqa", "The Beatles!", "beatles")
        and not matches("hotpotqa", "in 1969", "1969")
    )


def test_an_answer_that_the_task_counted_as_right_is_called_so(tmp_path: Path) -> None:
    """power_function accepts three digits, which no comparison of numbers does."""
    answers = {"rounded": "0.00321", "wrong": "0.00421", "unscored": "0.0032098", "sampled": "7"}
    questions = [Question(id_, "power_function", f"{id_}?", ("0.0032098",)) for id_ in answers]
    trajectories = [
        make_trajectory(question, 0, [f"<answer>{answers[question.id]}</answer>"], Finish.ANSWER)
        for question in questions
    ]
    (tmp_path / "evaluations").mkdir()
    make_store(tmp_path / "evaluations" / "base.db", questions, trajectories)
    scores = {"rounded": 1.0, "wrong": 0.0, "sampled": 0.5}
    rows = {id_: {"accuracy": accuracy} for id_, accuracy in scores.items()}
    (tmp_path / "evaluations" / "base.json").write_text(json.dumps({"judge": JUDGE, "by_question": rows}))
    matches = {a.one("h4").text.split()[1]: a.attributes["data-match"] for a in written(tmp_path).all("article")}
    assert matches == {"rounded/0": "right", "wrong/0": "wrong", "unscored/0": "right", "sampled/0": "wrong"}


def test_long_texts_are_cut_in_the_middle_with_a_note(tmp_path: Path) -> None:
    question = Question("q", "gsm8k", "Why? " * 5000, ("1",))
    text = "".join(f"{i:05d} " for i in range(10_000)) + "<answer>1</answer>"
    with Store(tmp_path / "trajectories.db") as store:
        store.add_questions([question])
        store.record([make_trajectory(question, 0, [text], Finish.ANSWER)])
    root = written(tmp_path)
    shown = root.one(kind="action")
    note = shown.one(kind="cut").text
    head, tail = shown.text.split(f" {note} ")
    assert text.startswith(head) and text.endswith(tail) and tail.endswith("<answer>1</answer>")
    left_out = int(re.search(r"\[([\d,]+) characters", note)[1].replace(",", ""))
    assert len(head) + left_out + len(tail) == len(text) == 10_000 * 6 + 18
    assert shown.one("mark").text == "<answer>1</answer>"
    assert root.one(kind="question").one(kind="cut") and len(root.one(kind="q").text) <= 160


@settings(max_examples=200, deadline=None)
@given(st.text(st.characters(codec=None) | st.sampled_from("<>&\"'/!-\ud83d\x00\r\n\t") | st.sampled_from("<answer>/")))
def test_escaped_text_reads_as_it_was_written(text: str) -> None:
    for mark in (False, True):
        html = markup.block(text, mark_tags=mark)
        html.encode("utf-8")
        assert page(f"<p>{html}</p>").one("p").text == visible(text)
    assert page(f'<p title="{markup.escape(text)}"></p>').one("p").attributes["title"] == visible(text)


@given(
    st.dictionaries(st.text(max_size=4), st.sampled_from(["good", "bad", "unknown"]).map(lambda kind: (kind,))),
    st.integers(0, 12),
)
def test_a_sample_has_some_of_every_kind(kinds: dict[str, tuple[str, ...]], limit: int) -> None:
    chosen = reading.sample(kinds, limit)
    assert len(chosen) == min(limit, len(kinds)) and chosen <= kinds.keys()
    assert chosen == reading.sample(dict(reversed(kinds.items())), limit)
    count = {kind: sum(kinds[id_] == kind for id_ in chosen) for kind in set(kinds.values())}
    total = {kind: sum(own == kind for own in kinds.values()) for kind in count}
    for kind, one in count.items():  # no kind stands back behind another before it is used up
        assert one == total[kind] or one >= max(count.values()) - 1


def test_of_many_trajectories_a_mixed_sample_is_shown(tmp_path: Path) -> None:
    questions = [Question(f"q{i}", "gsm8k", f"Question {i}?", ("1",)) for i in range(120)]
    trajectories = [
        make_trajectory(q, 0, ["<answer>1</answer>" if i != 77 else "<answer>2</answer>"], Finish.ANSWER)
        for i, q in enumerate(questions)
    ]
    make_store(tmp_path / "trajectories.db", questions, trajectories)
    root = written(tmp_path)
    articles = root.all("article")
    assert len(articles) == reading.SAMPLE and "40 of 120 trajectories" in root.text
    assert [a.attributes["data-match"] for a in articles].count("wrong") == 1  # the one of its kind is there
    assert {a.attributes["data-verdicts"] for a in articles} == {"GOOD", "BAD", "UNKNOWN", "NONE"}


# ---- runs that are not complete


def test_an_empty_folder_gives_a_report_that_says_what_to_do(tmp_path: Path) -> None:
    missing = written(tmp_path).one(kind="missing")
    named = [item.all("code")[0].text for item in missing.all("li")]
    assert named == [
        *("config.yaml", "evaluations/base.json", "trajectories.db", "filter.json", "metrics.jsonl"),
        "evaluations/trained.json",
    ]
    assert [item.all("code")[1].text for item in missing.all("li")][2] == "swirl-fast collect"


def test_no_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nowhere is not a folder: check run\.folder and run\.name"):
        write_report(tmp_path / "nowhere")
    assert not list(tmp_path.iterdir())


@pytest.fixture
def copy(run: Made, tmp_path: Path) -> Path:
    for path in run.folder.rglob("*"):
        target = tmp_path / path.relative_to(run.folder)
        if path.is_file():
            target.parent.mkdir(exist_ok=True)
            target.write_bytes(path.read_bytes())
    return tmp_path


FILES = (
    "config.yaml",
    "metrics.jsonl",
    "filter.json",
    "trajectories.db",
    "evaluations/base.json",
    "evaluations/trained.json",
)


@pytest.mark.parametrize("name", FILES)
def test_any_file_may_be_missing(copy: Path, name: str) -> None:
    (copy / name).unlink()
    root = written(copy)
    assert [item.all("code")[0].text for item in root.one(kind="missing").all("li")] == [name]
    assert bool(root.all("article")) and bool(root.all("figure")) == (name != "metrics.jsonl")


@pytest.mark.parametrize("name", ["summary.json", "evaluations/base.db", "evaluations/trained.db"])
def test_parts_of_a_stage_may_be_missing(copy: Path, name: str) -> None:
    (copy / name).unlink()
    assert written(copy).all("article")


@pytest.mark.parametrize("name", ["config.yaml", "filter.json", "summary.json", "evaluations/base.json"])
@pytest.mark.parametrize("content", ['{"kept": <script>', "[1, 2"])
def test_a_damaged_file_is_named(copy: Path, name: str, content: str) -> None:
    (copy / name).write_text(content)
    root = written(copy)
    assert any(name in item.text and "not readable" in item.text for item in root.one(kind="missing").all("li"))
    assert len(root.all("script")) == 1 and root.all("article")


@pytest.mark.parametrize("name", ["trajectories.db", "evaluations/trained.db"])
def test_a_file_that_is_no_store_is_named(copy: Path, name: str) -> None:
    (copy / name).write_bytes(b"not a database" * 100)
    root = written(copy)
    assert any(Path(name).name in item.text for item in root.one(kind="missing").all("li"))
    assert root.all("article")  # those of the other store


def test_a_training_under_way_is_called_so(copy: Path) -> None:
    rows = (copy / "metrics.jsonl").read_text().splitlines()
    (copy / "metrics.jsonl").write_text("\n".join(rows[:5]) + "\n" + rows[5][:40])  # the writer died in line 6
    root = written(copy)
    assert "training is at step 5 of 12" in root.one(kind="missing").text
    assert len(root.one("details", "numbers").one("tbody").all("tr")) == 5


def test_without_evaluations_the_verdicts_of_the_busiest_judge_are_shown(run: Made, copy: Path) -> None:
    for path in (copy / "evaluations").iterdir():
        path.unlink()
    id_, (_, judgements) = next(iter(run.expected["collected"].items()))
    article = next(a for a in written(copy).all("article") if a.one("h4").text == f"collected {id_}")
    expected = [one.verdict.value if one else "not judged" for one in judgements]
    assert [badge.text for badge in article.all(kind="badge")] == expected


def test_collected_verdicts_are_those_of_the_judge_that_the_filter_asked(run: Made, copy: Path) -> None:
    described = json.loads((copy / "filter.json").read_text())
    (copy / "filter.json").write_text(json.dumps(described | {"judge": "another-judge"}))
    reasons: dict[str, set[str]] = {}
    for article in written(copy).all("article"):
        own = {reason.text for reason in article.all(kind="reason") if "malformed" not in reason.text}
        reasons.setdefault(article.one("h4").text.split()[0], set()).update(own)
    assert reasons["collected"] == {"Judge not this one"}
    assert reasons["base"] and "Judge not this one" not in reasons["base"] | reasons["trained"]
