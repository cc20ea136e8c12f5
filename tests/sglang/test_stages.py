"""The stages as a user starts them, with SGLang for rollouts: everything in order, two ranks on one server, and the model judge."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from support.engine_conformance import assert_hits
from support.labels import labels
from support.real_servers import GENERATED, Log, attached, launched
from support.runs import overrides, start
from support.stores import count_rows
from transformers import AutoTokenizer

from swirl_fast import cli
from swirl_fast.config import EndpointConfig
from swirl_fast.data.store import Store
from swirl_fast.engines.sglang.engine import SGLangEngine
from swirl_fast.judges.model import ModelJudge
from swirl_fast.judges.model.prompts import step_prompt
from swirl_fast.metrics import read_metrics
from swirl_fast.prefixes import cacheable
from swirl_fast.trajectory import StepView
from swirl_fast.verdict import Verdict

SHORT = ("engine.kind=sglang", "training.steps=2", "engine.weight_sync.method=tensor")


@pytest.fixture(scope="module")
def whole_run(server: SGLangEngine, served_model: Path, judged: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole_run")
    start(["run", *overrides(folder, served_model, judged, *SHORT, *attached(*server.urls))])
    return folder / "r"


def check_training(folder: Path, most: float = 1.01) -> None:
    """most: of the cache's hits over those that are possible to a rank alone."""
    rows = read_metrics(folder)
    assert [row["policy_version"] for row in rows] == [1, 2]
    for row in rows:
        assert row["engine_gap_mean"] < 1e-4, "engine and trainer disagree on log-probs, or the weights are old"
        assert row["grad_norm"] > 0 and row["actions"] >= 16
        assert 0.95 <= row["cache_hit_rate_of_possible"] <= most
    assert (folder / "model" / "model.safetensors").is_file()


def test_every_stage_runs_on_attached_servers(whole_run: Path, server: SGLangEngine) -> None:
    check_training(whole_run)
    summary = json.loads((whole_run / "summary.json").read_text())
    assert summary["base"]["questions"] == summary["trained"]["questions"] == 6


def test_two_ranks_share_the_server_that_one_of_them_starts(
    whole_run: Path,
    served_model: Path,
    judged: str,
    tmp_path: Path,
) -> None:
    for name in ("shards", "config.yaml"):
        copy = shutil.copytree if (whole_run / name).is_dir() else shutil.copy
        (tmp_path / "r").mkdir(exist_ok=True)
        copy(whole_run / name, tmp_path / "r" / name)
    start(["train", *overrides(tmp_path, served_model, judged, *SHORT, *launched())], ranks=2)
    check_training(tmp_path / "r", most=2.0)  # each finds what the other one's states share with its own
    (path,) = (tmp_path / "r" / "engine").glob("*.log")
    log = path.read_text()
    assert len(re.findall(r"^# \d{4}-", log, re.M)) == 1 and GENERATED in log, "started once"
    assert log.count("POST /end_weight_update") == 3, "one rank sends the weights: at the start and after both steps"


def test_the_judge_asks_a_chat_endpoint_of_sglang(
    server: SGLangEngine, server_folder: Path, served_model: Path
) -> None:
    """The tiny model answers rubbish, so no step gets a verdict; but the prompts are read, and what they share only once."""
    log = Log(server_folder / "run" / "engine" / "server-0.log")
    judge = ModelJudge(EndpointConfig(url=f"{server.urls[0]}/v1", max_tokens=8, retries=0, concurrency=1))
    judge.check()
    history = (("<math_exp>1 + 2</math_exp>", "1 + 2 -> 3"), ("<math_exp>3 + 4</math_exp>", "3 + 4 -> 7"))
    steps = [StepView("chain_sum", "What is 1 + 2 + 4?", history[:i], "<answer>7</answer>") for i in range(3)]
    log = Log(log.path)
    judgements = judge.judge(steps)
    judge.close()
    for judgement in judgements:
        assert judgement.verdict is Verdict.UNKNOWN
        assert "does not end with a verdict" in judgement.reason or "cut off at 8 tokens" in judgement.reason
    assert log.count("POST /v1/chat/completions HTTP/1.1") == 3
    tokenizer = AutoTokenizer.from_pretrained(served_model)
    prompts = [
        tokenizer.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True)["input_ids"]
        for text in map(step_prompt, steps)
    ]
    assert_hits(log.prefill()[1], cacheable(prompts))


def test_a_judge_on_a_server_is_measured_against_labels(server: SGLangEngine, tmp_path: Path) -> None:
    """The tiny model gives no verdict: all UNKNOWN, which is told as such, kept in the store, and counted neither right nor wrong."""
    arguments = [
        "judge",
        "--against",
        str(labels(tmp_path)),
        f"run.folder={tmp_path}",
        "run.name=r",
        "judge.kind=model",
    ]
    arguments += [f"judge.model.url={server.urls[0]}/v1", "judge.model.max_tokens=16", "judge.model.retries=0"]
    assert cli.main(arguments) == 0
    report = json.loads((tmp_path / "r" / "agreement.json").read_text())
    assert report["steps"] == 4 and report["judge"].startswith("model-default-v")
    assert report["confusion"]["GOOD"]["UNKNOWN"] == 1 and report["confusion"]["BAD"]["UNKNOWN"] == 3
    assert report["accuracy"] is None and report["accuracy_unknown_wrong"] == 0 and report["unknown_share"] == 1
    with Store(tmp_path / "r" / "agreement.db", writable=False) as store:
        assert count_rows(store, "verdicts") == count_rows(store, "verdicts", "verdict = 'UNKNOWN'") == 4
