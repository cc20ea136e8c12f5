"""A grid of real runs on a small model, killed, resumed and shared."""

from __future__ import annotations

import fcntl
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file, save_file
from support.paths import ROOT
from support.task_files import write_lines

from swirl_fast import cli, stages
from swirl_fast.config import Config, ConfigError
from swirl_fast.experiments.grid import chosen, read_experiment
from swirl_fast.experiments.inputs import changed


def write(folder: Path, model: Path, **more: Any) -> Path:
    spec = {
        "name": "e",
        "folder": str(folder),
        "settings": {
            "model": {"path": str(model)},
            "tasks": {
                "options": {"min_terms": 2, "max_terms": 2, "max_digits": 1},
                "limit": 6,
                "eval_limit": 8,
                "max_steps": 3,
            },
            "tasks.examples": 1,
            "collect": {"trajectories_per_question": 3, "max_action_tokens": 24},
            "training": {"steps": 1, "trajectories_per_step": 4, "group_size": 3, "max_action_tokens": 24},
            "training.learning_rate": 1e-3,
            "training.token_budget": 1024,
            "training.tensorboard": False,
            "algorithm.kl_coef": 0,
        },
        "seeds": [0, 1],
        "arms": {
            "base": {"train": False},
            "all": {"filter.kind": "none", "algorithm.reward": "outcome"},
            "copied": {"filter.kind": "none", "algorithm": {"name": "sft"}},
            "further": {"from": "copied", "filter.kind": "none", "algorithm.reward": "outcome"},
        },
        "evaluations": {"in_domain": {}, "longer": {"tasks.options.max_terms": 3, "tasks.options.min_terms": 3}},
        "compare": ["all", "base"],
        "keep": "results",
    } | more
    path = folder / "experiment.yaml"
    path.write_text(yaml.safe_dump(spec, sort_keys=False))
    return path


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """The folder of an experiment that was run to its end."""
    folder = tmp_path_factory.mktemp("experiment")
    assert cli.main(["experiment", str(write(folder, tiny_model))]) == 0
    return folder / "e"


def test_filters_that_keep_the_same_trajectories_are_trained_once(tmp_path: Path, tiny_model: Path) -> None:
    arms = {
        "all": {"filter.kind": "none", "algorithm.name": "sft"},
        "same": {"filter": {"kind": "process", "when_empty": "none"}, "algorithm.name": "sft"},  # no step is GOOD
        "fewer": {"filter": {"kind": "none", "max_trajectories": 5}, "algorithm.name": "sft"},
        "other": {"filter.kind": "none", "algorithm.name": "sft", "training.learning_rate": 1e-4},
    }
    path = write(tmp_path, tiny_model, seeds=[0], arms=arms, evaluations={"in_domain": {}}, compare=["same", "all"])
    assert cli.main(["experiment", str(path)]) == 0
    cells = {(cell := json.loads(one.read_text()))["arm"]: cell for one in (tmp_path / "e" / "cells").glob("*.json")}
    assert [cells[arm].get("same_as") for arm in arms] == [None, "all", None, None]
    assert all(cells["same"][key] == cells["all"][key] for key in ("training", "evaluations"))
    assert not list((tmp_path / "e").glob("same-*/metrics.jsonl"))


def test_all_cells_of_a_seed_share_a_collection_and_leave_their_numbers(done: Path) -> None:
    summary = json.loads((done / "summary.json").read_text())
    assert summary["seeds"] == [0, 1] and summary["complete"]
    assert list(summary["arms"]) == ["base", "all", "copied", "further"]
    assert len(list(done.glob("collection-*/trajectories.db"))) == 4, (
        "one a seed, and one of the model that was trained further"
    )
    for arm in summary["arms"].values():
        for one in (arm["in_domain"], arm["out_of_domain"]["longer"]):
            assert one["interval"][0] <= one["accuracy"] <= one["interval"][1] and one["questions"] == 16
    assert summary["arms"]["base"]["cost"] is None
    assert summary["arms"]["all"]["cost"]["generated_tokens"] > 0
    assert summary["arms"]["copied"]["cost"]["trajectories"] == 18
    assert summary["comparisons"].keys() == {"all", "copied", "further"}
    for path in (done / "cells").glob("*.json"):
        cell = json.loads(path.read_text())
        for evaluation in cell["evaluations"].values():
            means = [one["accuracy"] for one in evaluation["by_question"].values()]
            assert len(means) == 8 and evaluation["accuracy"] == pytest.approx(sum(means) / 8)
    page = (done / "report.html").read_text()
    assert "in_domain" in page and "longer" in page and "Accuracy against base" in page
    assert not list(done.glob("*/checkpoints")), "keep: results"
    assert {path.parent.name.split("-")[0] for path in done.glob("*/model")} == {"copied"}, "others start from these"


def test_a_second_start_does_nothing_and_a_lost_cell_is_done_again_with_the_same_result(
    done: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = str(done.parent / "experiment.yaml")
    before = json.loads((done / "summary.json").read_text())
    with monkeypatch.context() as patch:
        patch.setattr(stages, "evaluate", lambda *_: pytest.fail("a finished cell was done again"))
        assert cli.main(["experiment", path]) == 0
    (cell,) = (done / "cells").glob("all-1-*.json")
    saved = json.loads(cell.read_text())
    cell.unlink()
    assert cli.main(["experiment", path]) == 0
    again = json.loads(cell.read_text())
    assert again["training"]["reward"] == saved["training"]["reward"]
    for name, one in saved["evaluations"].items():
        assert again["evaluations"][name]["by_question"] == one["by_question"]
    assert (
        json.loads((done / "summary.json").read_text())["arms"]["all"]["in_domain"]
        == before["arms"]["all"]["in_domain"]
    )


def test_the_start_of_a_cell_is_trained_again_where_only_its_numbers_are_left(done: Path) -> None:
    path = str(done.parent / "experiment.yaml")
    (cell,) = (done / "cells").glob("further-0-*.json")
    saved = json.loads(cell.read_text())
    cell.unlink()
    for folder in (*done.glob("copied-0-*"), done / cell.stem):
        shutil.rmtree(folder)
    assert cli.main(["experiment", path]) == 0
    again = json.loads(cell.read_text())
    assert again["training"]["reward"] == saved["training"]["reward"]
    assert again["evaluations"]["in_domain"]["by_question"] == saved["evaluations"]["in_domain"]["by_question"]


def test_a_cell_that_another_process_holds_is_left_to_it(
    done: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (cell,) = (done / "cells").glob("copied-0-*.json")
    text = cell.read_text()
    cell.unlink()
    monkeypatch.setattr(stages, "train", lambda *_: pytest.fail("it was taken all the same"))
    with open(done / cell.stem / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert cli.main(["experiment", str(done.parent / "experiment.yaml")]) == 1
    shown = capsys.readouterr()
    assert "copied, seed 0: is being done elsewhere" in shown.err
    summary = json.loads((done / "summary.json").read_text())
    assert not summary["complete"] and summary["arms"]["copied"]["seeds"] == [1]
    assert "Some cells are not done yet" in (done / "report.html").read_text()
    cell.write_text(text)
    assert cli.main(["experiment", "--report", str(done.parent / "experiment.yaml")]) == 0
    assert json.loads((done / "summary.json").read_text())["complete"]


def test_some_arms_and_seeds_are_done_and_the_others_left(
    tmp_path: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(write(tmp_path, tiny_model))
    assert cli.main(["experiment", path, "--arms", "base,copied", "--seeds", "1"]) == 0
    cells = sorted((tmp_path / "e" / "cells").iterdir())
    assert [one.name.split("-")[:2] for one in cells] == [["base", "1"], ["copied", "1"]]
    assert not json.loads((tmp_path / "e" / "summary.json").read_text())["complete"]
    capsys.readouterr()
    for option, value in ("--arms", "base,nothing"), ("--seeds", "2"):
        assert cli.main(["experiment", path, option, value]) == 2
        assert f"{option} {value}: {value.split(',')[-1]!r} is none of " in capsys.readouterr().err
    assert cli.main(["experiment", path, "--report", "--seeds", "1"]) == 2
    assert "--report is of all cells" in capsys.readouterr().err


def test_an_arm_is_chosen_with_all_of_its_grid_and_not_with_seeds_that_it_has_not(
    tmp_path: Path, tiny_model: Path
) -> None:
    arms = {"base": {"train": False}, "all": {"seeds": [1], "filter.kind": "none"}}
    experiment = read_experiment(write(tmp_path, tiny_model, arms=arms, compare=[], grid={"training.steps": [1, 2]}))
    assert [cell.arm for cell in chosen(experiment, "all", None)] == ["all,steps=1", "all,steps=2"]
    assert chosen(experiment, None, None) == list(experiment.cells)
    with pytest.raises(ConfigError, match="--arms all --seeds 0: these arms have other seeds"):
        chosen(experiment, "all", "0")


def test_an_arm_brings_all_that_it_starts_from(tmp_path: Path, tiny_model: Path) -> None:
    kept = {"filter.kind": "none", "algorithm.name": "sft"}
    arms = {"first": kept, "second": {"from": "first", **kept}, "third": {"from": "second", **kept}}
    path = str(write(tmp_path, tiny_model, arms=arms, compare=["third", "first"]))
    assert cli.main(["experiment", path, "--arms", "third", "--seeds", "0"]) == 0
    assert [one.name[:5] for one in (tmp_path / "e" / "cells").iterdir()] == ["third"]
    assert {one.parts[-3].split("-")[0] for one in (tmp_path / "e").glob("*/model/config.json")} >= {"first", "second"}


def test_a_cell_that_fails_does_not_stop_the_others(
    tmp_path: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The process filter keeps none of this model's trajectories when single numbers are not allowed either."""
    arms = {"strict": {"filter.kind": "process", "judge.rules.coverage": "full"}, "base": {"train": False}}
    path = write(tmp_path, tiny_model, arms=arms, seeds=[0], compare=["strict", "base"])
    arguments = ["tasks.limit=1", "collect.trajectories_per_question=1"]
    code = cli.main(["experiment", str(path), *arguments])
    shown = capsys.readouterr()
    summary = json.loads((tmp_path / "e" / "summary.json").read_text())
    assert code == 1 and list(summary["arms"]) == ["base"]
    assert "not done: strict, seed 0: " in shown.err and "filter process kept 0" in shown.err


def test_a_disk_that_fails_stops_one_cell_alone(
    tmp_path: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluate = stages.evaluate

    def full(config: Config, *more: Any) -> dict[str, Any]:
        if config.run.name.startswith("first"):
            raise OSError(28, "No space left on device")
        return evaluate(config, *more)

    monkeypatch.setattr(stages, "evaluate", full)
    arms = {"first": {"train": False}, "second": {"train": False, "tasks.max_steps": 2}}
    path = write(tmp_path, tiny_model, arms=arms, seeds=[0], evaluations={"in_domain": {}}, compare=["second", "first"])
    assert cli.main(["experiment", str(path), "tasks.eval_limit=2"]) == 1
    assert "not done: first, seed 0: [Errno 28] No space left on device" in capsys.readouterr().err
    assert list(json.loads((tmp_path / "e" / "summary.json").read_text())["arms"]) == ["second"]


def test_a_report_of_nothing_says_so(tmp_path: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path, tiny_model)
    assert cli.main(["experiment", "--report", str(path)]) == 1
    assert f"none of its 8 cells is done in {tmp_path / 'e' / 'cells'}" in capsys.readouterr().err
    assert not (tmp_path / "e" / "summary.json").exists()


def test_finished_cells_of_another_model_or_data_file_are_not_mixed_with_new_ones(
    tmp_path: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, data = tmp_path / "model", tmp_path / "d.jsonl"
    shutil.copytree(tiny_model, model)
    rows = [{"question": f"What is {n} + 1?", "answer": f"It is #### {n + 1}"} for n in range(4)]
    write_lines(data, rows)
    words = {"tasks": {"kind": "gsm8k", "path": str(data), "eval_path": str(data), "options": {}}}
    more = {"arms": {"base": {"train": False}}, "evaluations": {"in_domain": {}, "words": words}, "compare": []}
    path = write(tmp_path, model, seeds=[0], **more)
    arguments = ["experiment", str(path), "tasks.eval_limit=2"]
    assert cli.main(arguments) == 0
    (file,) = (tmp_path / "e" / "cells").glob("*.json")
    cell = json.loads(file.read_text())
    assert cell["inputs"].keys() == {str(model), str(data)}
    weights = load_file(model / "model.safetensors")
    write_lines(data, rows[::-1])
    save_file({name: tensor + 1e-3 for name, tensor in weights.items()}, model / "model.safetensors", {"format": "pt"})

    write(tmp_path, model, seeds=[0, 1], **more)
    with monkeypatch.context() as patch:
        patch.setattr(stages, "evaluate", lambda *_: pytest.fail("a cell was done all the same"))
        assert cli.main(arguments) == 2
    shown = capsys.readouterr().err
    for input_ in (model, data):
        assert f"{input_} has changed since base, seed 0" in shown
    assert "another name" in shown
    # one from before inputs were kept is taken as it is
    del cell["inputs"]
    file.write_text(json.dumps(cell))
    assert cli.main(arguments) == 0
    assert json.loads((tmp_path / "e" / "summary.json").read_text())["complete"]


def test_what_is_not_there_any_more_is_no_difference() -> None:
    assert changed({"a": "1", "b": "2", "gone": "3"}, {"a": "1", "b": "9", "new": "4"}) == ["b"]


def test_folders_in_the_home_of_the_user(tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    path = write(tmp_path, tiny_model, summary="~/e.json")
    path.write_text(path.read_text().replace(f"folder: {tmp_path}\n", "folder: ~/runs\n"))
    experiment = read_experiment(path)
    assert experiment.results == Path("/home/somebody/runs/e") and experiment.summary == Path("/home/somebody/e.json")
    assert {cell.config.folder.parent for cell in experiment.cells} == {experiment.results}
    assert all(experiment.results in cell.config.store.parents for cell in experiment.cells)


def test_a_grid_crosses_trained_arms_only(tmp_path: Path, tiny_model: Path) -> None:
    grid = {"filter.max_trajectories": [2, 4], "filter.kind": ["none", "process"]}
    arms = {"base": {"train": False}, "swirl": {}}
    path = write(tmp_path, tiny_model, arms=arms, grid=grid, compare=[], seeds=[1])
    experiment = read_experiment(path, ["training.steps=7"])
    assert experiment.arms == [
        "base",
        *(f"swirl,max_trajectories={n},kind={k}" for n in (2, 4) for k in ("none", "process")),
    ]
    assert all(cell.config.training.steps == 7 for cell in experiment.cells)
    assert len({cell.config.collect.store for cell in experiment.cells if cell.seed == 1}) == 1
    assert len({cell.digest for cell in experiment.cells}) == len(experiment.cells)
    assert experiment.compare == (experiment.arms[-1], "base")


def test_an_evaluation_with_another_seed_is_another_cell(tmp_path: Path, tiny_model: Path) -> None:
    def cells(**evaluation: Any) -> dict[tuple[str, int], str]:
        evaluations = {"in_domain": {}, "again": evaluation}
        experiment = read_experiment(write(tmp_path, tiny_model, evaluations=evaluations))
        return {(cell.arm, cell.seed): cell.digest for cell in experiment.cells}

    plain, other, third = cells(), cells(**{"run.seed": 7}), cells(run={"seed": 8})
    assert all(len({plain[one], other[one], third[one]}) == 3 for one in plain)
    same = cells(**{"run.seed": 1})
    assert {one for one in plain if same[one] == plain[one]} == {one for one in plain if one[1] == 1}


def test_arms_whose_models_are_shown_other_parts_of_a_result_share_no_collection(
    tmp_path: Path, tiny_model: Path
) -> None:
    limits = [{}, {"concurrency": 1}, {"timeout": 30}, {"timeout": 3}, {"result_chars": 50}]
    arms = {f"arm{i}": {"tools": tools} for i, tools in enumerate(limits)}
    experiment = read_experiment(write(tmp_path, tiny_model, arms=arms, compare=[], seeds=[0]))
    first, one_at_a_time, same, *others = (cell.config.collect.store for cell in experiment.cells)
    assert first == one_at_a_time == same
    assert len({first, *others}) == 3


def test_paths_and_long_values_of_a_grid_make_names_of_folders(tmp_path: Path, tiny_model: Path) -> None:
    paths = ["/a/b", "/c/b", "org/name", "./x", "x" * 300]
    grid = {"judge.model.model": [*paths, "plain", "0.5"]}
    experiment = read_experiment(write(tmp_path, tiny_model, arms={"a": {}}, compare=[], grid=grid, seeds=[0]))
    assert [cell.config.judge.model.model for cell in experiment.cells] == grid["judge.model.model"]
    assert all(cell.config.folder.parent == tmp_path / "e" for cell in experiment.cells)
    assert len(set(experiment.arms)) == 7 and experiment.arms[-2:] == ["a,model=plain", "a,model=0.5"]
    assert experiment.arms[0].startswith("a,model=a_b-") and all(len(arm) < 60 for arm in experiment.arms)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"arm": {}}, "unknown key; did you mean arms"),
        ({"training": {"steps": 1}}, "training: unknown key; write it below settings"),
        ({"arms": {}}, "arms: give at least one"),
        ({"arms": {"a": "rloo"}}, "arms={a: rloo}: must be a table of tables"),
        ({"arms": {"a": {"train": "never"}}, "compare": []}, "arms.a.train=never: must be true or false"),
        (
            {"arms": {"a": {"algorithm.nam": "rloo"}}, "compare": []},
            "arms.a): unknown key; did you mean algorithm.name",
        ),
        (
            {
                "settings": {
                    "collect": {"source": "conversations", "path": str(ROOT / "README.md")},
                    "judge.kind": "model",
                    "judge.model.url": "http://h/v1",
                }
            },
            "a log has no gold answers",
        ),
        ({"evaluations": {"other": {}}}, "evaluations: one must be called in_domain"),
        ({"evaluations": {"in_domain": {"tasks.kind": "gsm9k"}}}, "tasks.kind=gsm9k: must be one of"),
        ({"grid": {"filter.kind": "none"}}, "grid={filter.kind: none}: must be a table of lists"),
        ({"seeds": [0.5]}, "seeds=[0.5]: must be a list of whole numbers, each at least 0"),
        (
            {"compare": ["all", "nothing"]},
            "compare=[all, nothing]: must be two of the arms base, all, copied, further",
        ),
        ({"arms": {"a": {"seeds": [1, 5]}}, "compare": []}, "arms.a.seeds=[1, 5]: must be some of the seeds [0, 1]"),
        ({"arms": {"a": {"seeds": "1"}}, "compare": []}, "arms.a.seeds=1: must be some of the seeds [0, 1]"),
        (
            {"arms": {"a": {"seeds": [1]}, "b": {"from": "a"}}, "compare": []},
            "arms.b.from=a: must be a trained arm that is listed before it, with its seeds",
        ),
        ({"pairs": {"one": ["all"]}}, "pairs.one=[all]: must be two of the arms base, all, copied, further"),
        ({"pairs": ["all", "base"]}, "pairs=[all, base]: must be a table of lists"),
        (
            {"arms": {"a": {"from": "b"}, "b": {}}, "compare": []},
            "arms.a.from=b: must be a trained arm that is listed before",
        ),
        (
            {"arms": {"a": {"train": False}, "b": {"from": "a"}}, "compare": []},
            "arms.b.from=a: must be a trained arm",
        ),
        (
            {"settings": {"run.folder": "elsewhere"}},
            "run.folder (in {path}, settings): is set by the experiment's own key folder",
        ),
        (
            {"settings": {"run": {"seed": 4}}},
            "run.seed (in {path}, settings): is set by the experiment's own key seeds",
        ),
        (
            {"arms": {"a": {"run.name": "mine"}}, "compare": []},
            "run.name (in {path}, arms.a): is set by the experiment's own key name",
        ),
        ({"arms": {"a": {"run": {"seed": 4}}}, "compare": []}, "run.seed (in {path}, arms.a)"),
        ({"arms": {"a": {}}, "grid": {"run.seed": [4, 5]}, "compare": []}, "run.seed (in {path}, arms.a,seed=4)"),
        ({"evaluations": {"in_domain": {"run": {"name": "x"}}}}, "run.name (in {path}, evaluations.in_domain)"),
        ({"evaluations": {"in_domain": {"run.folder": "/x"}}}, "run.folder (in {path}, evaluations.in_domain)"),
        (
            {"arms": {"a": {}, "b": {"from": "a", "model": {"path": "x"}}}, "compare": []},
            "model.path (in {path}, arms.b): is set by the experiment's own key arms.b.from: leave it out, or change",
        ),
        ({"seeds": []}, "seeds=[]: must be a list of whole numbers"),
        ({"name": "a/b"}, "name=a/b: must be a plain folder name"),
        ({"arms": {"a/b": {}}, "compare": []}, "arms.a/b: must have a plain name: printable characters, no /"),
        ({"arms": {"a" * 250: {}}, "compare": []}, f"arms.{'a' * 250}: must have a plain name"),
        ({"arms": {"a\nb": {}}, "compare": []}, "arms.a\nb: must have a plain name"),
        ({"name": "n" * 201}, ": must be a plain folder name"),
        ({"evaluations": {"in_domain": {}, "e" * 201: {}}}, ": must have a plain name"),
        ({"evaluations": {"in_domain": {}, "collected": {}}}, "evaluations.collected: must have a plain name"),
        ({"arms": {"a" * 190: {}}, "grid": {"filter.kind": ["process"]}, "compare": []}, ",kind=process: must have"),
        ({"seeds": [0, 0]}, "seeds=[0, 0]: names a seed twice"),
        ({"seeds": [2, 1, 0, 1]}, "seeds=[2, 1, 0, 1]: names a seed twice"),
        ({"grid": {"filter.kind": []}}, "grid.filter.kind=[]: must be a list of values"),
        ({"keep": "some"}, "keep=some: must be one of results, models, all"),
        ({"config": "missing.yaml"}, "missing.yaml: no such file"),
    ],
)
def test_a_wrong_file_is_refused_before_any_work(
    tmp_path: Path, tiny_model: Path, change: dict[str, Any], message: str
) -> None:
    path = write(tmp_path, tiny_model, **change)
    with pytest.raises(ConfigError) as caught:
        read_experiment(path)
    assert message.replace("{path}", str(path)) in str(caught.value) and str(path) in str(caught.value)


@pytest.mark.parametrize("override", ["run.seed=3", "run.folder=elsewhere", "run.name=mine"])
def test_what_an_experiment_sets_itself_is_refused_on_the_command_line(
    tmp_path: Path, tiny_model: Path, override: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["experiment", str(write(tmp_path, tiny_model)), override]) == 2
    key = override.partition("=")[0]
    assert f"{key} (in command line): is set by the experiment's own key" in capsys.readouterr().err


def test_the_config_of_a_run_is_no_experiment(capsys: pytest.CaptureFixture[str]) -> None:
    path = ROOT / "configs" / "warm_up.yaml"
    assert cli.main(["experiment", str(path)]) == 2
    shown = capsys.readouterr().err
    assert f"{path}: is the config of a run, not an experiment: swirl-fast run --config {path}" in shown


def test_files_that_are_no_experiment(tmp_path: Path) -> None:
    path = tmp_path / "e.yaml"
    wrong = (
        ("", "arms: give at least one"),
        ("[1]", "must hold"),
        ("a: [", "not readable"),
        ("${x}: 1", "unknown key"),
    )
    for content, message in wrong:
        path.write_text(content)
        with pytest.raises(ConfigError, match=message):
            read_experiment(path)
    with pytest.raises(ConfigError, match="none.yaml: no such file"):
        read_experiment(tmp_path / "none.yaml")


def test_texts_of_an_experiment_are_kept_and_nothing_is_interpolated(tmp_path: Path) -> None:
    path = tmp_path / "3.10.yaml"
    path.write_text(
        """
folder: ${nope}
settings: {judge.model.model: 1.10, judge: {model: {api_key_env: "???"}}}
arms: {yes: {search.query_prefix: 'null', filter: {kind: NONE}}, 1e3: {train: no}}
grid: {training.learning_rate: [1e-5, 1e-4]}
evaluations: {in_domain: {}, on: {tasks.options: {max_terms: 5}}}
"""
    )
    experiment = read_experiment(path, ["model.path=1e3"])
    assert experiment.name == "3.10" and experiment.results == Path("${nope}/3.10")
    assert experiment.arms == ["yes,learning_rate=1e-05", "yes,learning_rate=0.0001", "1e3"]
    assert experiment.evaluations == ["in_domain", "on"] and experiment.compare == ("1e3", "yes,learning_rate=1e-05")
    config = experiment.cells[0].config
    assert (config.judge.model.model, config.judge.model.api_key_env, config.model.path) == ("1.10", "???", "1e3")
    assert (config.search.query_prefix, config.filter.kind, config.training.learning_rate) == ("null", "none", 1e-5)
    assert config.run.folder == "${nope}/3.10" and config.run.seed == 0
    assert experiment.cells[0].evaluations["on"].tasks.options == {"max_terms": 5}
    assert [cell.trained for cell in experiment.cells] == [True, True, False]


def test_a_changed_reward_of_ones_own_is_another_cell(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("def reward(step):\n    return 1.0\n", encoding="utf-8")
    (tmp_path / "rubric.txt").write_text("Be fair.", encoding="utf-8")
    experiment = tmp_path / "one.yaml"
    arms = "{own: {judge.kind: mine.py:reward}, rubric: {judge.model.rubric: rubric.txt}}"
    experiment.write_text(f"arms: {arms}\nevaluations: {{in_domain: {{}}}}\n", encoding="utf-8")

    def names() -> list[str]:
        return [cell.name for cell in read_experiment(experiment).cells]

    own, rubric = names()
    (tmp_path / "mine.py").write_text("def reward(step):\n    return 0.5\n", encoding="utf-8")
    assert names()[0] != own and names()[1] == rubric
    (tmp_path / "rubric.txt").write_text("Be strict.", encoding="utf-8")
    assert names()[1] != rubric
