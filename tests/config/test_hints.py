"""Keys that do not exist: what was renamed, and which keys are meant."""

from __future__ import annotations

from pathlib import Path

import pytest

from swirl_fast import cli
from swirl_fast.config import Config, ConfigError, load
from swirl_fast.config.fields import sections, settings
from swirl_fast.config.hints import RENAMED, SYNONYMS, closest

# written -> the first key that is named
MEANT = {
    "training.lr": "training.learning_rate",
    "lr": "training.learning_rate",
    "training.batch_size": "training.trajectories_per_step",
    "training.micro_batch_size": "training.token_budget",
    "training.gradient_accumulation_steps": "training.token_budget",
    "training.num_generations": "training.group_size",
    "algorithm.group_size": "training.group_size",
    "collect.group_size": "collect.trajectories_per_question",
    "evaluate.n": "evaluate.samples",
    "training.n": "training.group_size",
    "algorithm.beta": "algorithm.kl_coef",
    "algorithm.kl_coeff": "algorithm.kl_coef",
    "training.max_new_tokens": "training.max_action_tokens",
    "collect.max_new_tokens": "collect.max_action_tokens",
    "evaluate.max_tokens": "evaluate.max_action_tokens",
    "judge.max_tokens": "judge.model.max_tokens",
    "training.epochs": "training.steps",
    "training.num_train_epochs": "training.steps",
    "training.max_grad_norm": "training.clip_grad_norm",
    "training.grad_clip": "training.clip_grad_norm",
    "model.model_name_or_path": "model.path",
    "model.name": "model.path",
    "training.reward": "algorithm.reward",
    "judge_url": "judge.model.url",
    "judge.url": "judge.model.url",
    "training.seed": "run.seed",
    "seed": "run.seed",
    "training.output_dir": "run.folder",
    "temperature": "collect.temperature",
    "engine.temperature": "collect.temperature",
    "algorithm.epsilon": "algorithm.clip_low",
    "algorithm.clip_range": "algorithm.clip_low",
    "training.betas2": "training.betas",
    "trainer.learning_rate": "training.learning_rate",
    "Training.Learning-Rate": "training.learning_rate",
    "training.step": "training.steps",
    "train": "training",
    "engine.lanch": "engine.launch",
    "engine.launch.gpu": "engine.launch.gpus",
    "tasks.options2": "tasks.options",
    "training.max_steps": "training.steps",
}


@pytest.mark.parametrize("written", MEANT)
def test_the_key_that_is_meant_is_named_first(written: str) -> None:
    assert closest(Config, written)[0] == MEANT[written]
    with pytest.raises(ConfigError) as error:
        load(None, [f"{written}=1"])
    assert f"{written} (command line): unknown key; did you mean {MEANT[written]}" in str(error.value)


def test_what_resembles_nothing_points_to_the_list() -> None:
    with pytest.raises(ConfigError, match="nonsense.key .*: unknown key; swirl-fast config lists every key"):
        load(None, ["nonsense.key=3"])


def test_every_synonym_and_every_new_name_is_a_key_that_exists() -> None:
    known = settings(Config)
    for word, keys in SYNONYMS.items():
        assert keys and set(keys) <= known.keys(), word
        assert word == word.lower()
    assert set(RENAMED.values()) <= known.keys() and not RENAMED.keys() & known.keys()


@pytest.mark.parametrize("old", RENAMED)
def test_a_renamed_key_says_so_with_the_value_to_copy(
    old: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "c.yaml"
    section, name = old.split(".")
    file.write_text(f"{section}:\n  {name}: 3\n")
    for arguments, source in (([f"{old}=3"], "command line"), (["--config", str(file)], str(file))):
        assert cli.main(["collect", *arguments]) == 2
        assert f"{old} ({source}) was renamed to {RENAMED[old]}: write {RENAMED[old]}=3\n" in capsys.readouterr().err
    load(None, [f"{RENAMED[old]}=3"])


def test_sections_are_no_settings() -> None:
    assert {"run", "engine", "engine.launch", "judge.model"} <= sections(Config).keys()
    assert not sections(Config).keys() & settings(Config).keys()
