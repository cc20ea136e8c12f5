"""training.sharing=false through every stage as a user starts them: small models with random weights whose prefixes cannot be shared."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.model_families import build_unshared
from support.own import HERMES, own_folder, rows
from support.runs import attempt, start
from support.small_models import train_tokenizer
from transformers import AutoModelForCausalLM

from swirl_fast.files import read_json
from swirl_fast.metrics import read_metrics

# every turn without a call is an answer, so that random weights act, and some are rewarded
JUDGE = """
def remainder(step):
    return sum(map(ord, step.action_text)) % 7 / 7
"""
SETTINGS = (
    "actions.format=native",
    "actions.answer=message",
    "judge.kind=judge.py:remainder",
    "tasks.limit=2",
    "tasks.eval_limit=2",
    "collect.trajectories_per_question=1",
    "collect.max_action_tokens=8",
    "training.steps=1",
    "training.trajectories_per_step=2",
    "training.group_size=3",
    "training.max_action_tokens=8",
)


@pytest.mark.parametrize(("family", "shares"), [("qwen3_5", False), ("gpt_oss", True)])
def test_a_model_with_rare_attention_runs_all_stages(
    family: str, shares: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hermes = HERMES.read_text(encoding="utf-8")
    tokenizer = train_tokenizer([hermes, *(row["q"] for row in rows(40))])
    tokenizer.chat_template = hermes
    tokenizer.save_pretrained(tmp_path / "model")
    small = {"vocab_size": len(tokenizer), "max_position_embeddings": 1024, "initializer_range": 0.1}
    build_unshared(family, **small).save_pretrained(tmp_path / "model")
    own_folder(tmp_path, tmp_path / "model")
    (tmp_path / "judge.py").write_text(JUDGE, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    command = ["run", "--config", "mine.yaml", *SETTINGS]

    if shares:
        start(command)
        (metrics,) = read_metrics(tmp_path / "runs" / "r")
        assert metrics["engine_gap_mean"] < 1e-4 and metrics["model_check_logprob"] < 1e-4 and metrics["grad_norm"] > 0
        assert metrics["tokens_computed"] < metrics["tokens_effective"]
        return
    refused = attempt(command)
    assert refused.returncode == 2 and "Set training.sharing=false" in refused.stderr, refused.stderr
    assert not (tmp_path / "runs").exists(), "before any work"

    done = start([*command, "training.sharing=false"])
    run = tmp_path / "runs" / "r"
    (metrics,) = read_metrics(run)
    assert metrics["engine_gap_mean"] < 1e-4 and metrics["model_check_logprob"] < 1e-4 and metrics["grad_norm"] > 0
    assert metrics["tokens_computed"] >= metrics["tokens_effective"] - metrics["actions"], "a row each, and padding"
    assert done.stdout.count("engine: no prefix cache for this model: it") >= 1
    summary = read_json(run / "summary.json")
    assert summary and summary["base"]["questions"] == summary["trained"]["questions"] == 2
    assert (
        AutoModelForCausalLM.from_pretrained(run / "model").config.model_type
        == build_unshared(family).config.model_type
    )

    narrow = ("training.sharing=false", "training.steps=2", "training.token_budget=40")
    refused = attempt(["train", *command[1:], *narrow])
    assert refused.returncode == 2 and "training.token_budget=40: trajectory" in refused.stderr, refused.stderr
    assert "set it to at least" in refused.stderr
