"""actions.format=native through every stage as a user starts them: a small model that writes the calls of its chat template."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from support.own import own_folder, teach_calls
from support.runs import start

from swirl_fast import cli
from swirl_fast.config import load
from swirl_fast.data import samples
from swirl_fast.data.store import Store
from swirl_fast.files import read_json
from swirl_fast.metrics import read_metrics
from swirl_fast.rendering import open_format, open_renderer

LONGER = ("collect.max_action_tokens=96", "training.max_action_tokens=96")
NATIVE = ("--config", "../mine/mine.yaml", "actions.format=native", *LONGER)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The working directory of a whole run."""
    base = tmp_path_factory.mktemp("native")
    own_folder(base / "mine", teach_calls(tmp_path_factory.mktemp("calling"), native=True))
    (base / "work").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(base / "work")
        start(["run", *NATIVE])
    return base / "work"


def test_calls_results_and_states_are_those_of_the_chat_template(done: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(done)
    config = load("../mine/mine.yaml", NATIVE[2:])
    renderer, form = open_renderer(config.model), open_format(config.actions, config.model)
    assert form.identity == "native-hermes-tag"
    with Store(config.store, writable=False) as store:
        trajectories = list(store.trajectories())
    turns = [step for one in trajectories for step in one.steps]
    called = [step for step in turns if step.action.kind == "tool"]
    assert len(called) > len(turns) / 3 and any(step.action.further for step in called)
    for one in trajectories:
        text = renderer.tokenizer.decode(one.tokens)
        assert "Turns feet into metres" in text and "<tools" not in text
        for i, step in enumerate(one.steps):
            if step.action.kind != "tool" or i + 1 == one.num_steps:
                continue
            results = [line.split(" -> ")[1] for line in (step.observation or "").split("\n")]
            assert len(results) == len(step.action.calls)
            between = renderer.tokenizer.decode(one.tokens[step.end : one.steps[i + 1].start])
            shown = "".join(f"\n<tool_response>\n{result}\n</tool_response>" for result in results)
            assert between == f"\n<|im_start|>user{shown}<|im_end|>\n<|im_start|>assistant\n"


def test_training_is_on_them(done: Path) -> None:
    run = done / "runs" / "r"
    metrics = read_metrics(run)
    assert len(metrics) == 2 and all(entry["engine_gap_mean"] < 1e-4 for entry in metrics)
    assert any(entry["grad_norm"] > 0 for entry in metrics)
    drawn = [one for step in (1, 2) for one in samples.read_samples(run, step)]
    assert any(one.kind == "tool" and "<tool_call>" in one.text for one in drawn)
    summary = read_json(run / "summary.json")
    assert summary and summary["base"]["questions"] == summary["trained"]["questions"] == 4


def test_another_format_is_another_collection(
    done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    shutil.copytree(done.parent, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path / "work")
    assert cli.main(["collect", "--config", "../mine/mine.yaml", *LONGER]) == 1
    assert "another collection: actions was 'native-hermes-tag', is None now" in capsys.readouterr().err


def test_a_template_without_calls_is_refused_before_any_work(
    done: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.chdir(done)
    plain = Path(__file__).parents[2] / "configs" / "chat_templates" / "chatml.jinja"
    assert cli.main(["run", *NATIVE, "run.name=other", f"model.chat_template={plain}"]) == 2
    error = capsys.readouterr().err
    assert "does not write calls" in error and "actions.format=tags" in error
    assert not (done / "runs" / "other").exists()
