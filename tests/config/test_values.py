"""A value is read by the type of its setting: a text is the text that was written, from the command line and from YAML."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from swirl_fast.config import Config, ConfigError, TrainingConfig, check, dump, load
from swirl_fast.config.load import load_layers
from swirl_fast.config.read import Layer
from swirl_fast.config.yaml_text import parse

# What some YAML, OmegaConf or Python reads as something else.
ODD = [
    *(
        "1e3",
        "yes",
        "no",
        "on",
        "off",
        "y",
        "3.10",
        "1.10",
        "12:30",
        "010",
        "0x10",
        "0o17",
        "1_000",
        "2001-01-01",
        "true",
        "~",
        "NULL",
    ),
    *(
        "Null",
        ".inf",
        ".nan",
        "-",
        "--flag",
        "???",
        "${nope}",
        "${oc.env:HOME}",
        "a ${b} c",
        "=",
        "<<",
        "a: b",
        "a #b",
        "@x",
        "*x",
        "&x",
    ),
    *(
        "!x",
        "!!str x",
        "|",
        ">",
        "%x",
        "`x`",
        "[x",
        "{x",
        "]",
        "it's",
        '"',
        "'",
        "'x",
        'say "hi"',
        "ä𝔘\u2028",
        "tab\tx",
        "-1",
        "+1",
        "1.",
    ),
    *("null", "none", "None", "=x=y", "\\", "\\n", "a\\", "- a", "? a", "a:", ":a", "#a"),
]


@pytest.mark.parametrize("text", ODD)
def test_a_text_of_the_command_line_is_kept(text: str) -> None:
    config = load(None, [f"run.folder={text}", f"judge.model.model={text}", f"search.query_prefix={text} "])
    assert config.run.folder == config.judge.model.model == text and config.search.query_prefix == f"{text} "


@pytest.mark.parametrize(
    "text", ["1e3", "yes", "3.10", "12:30", "010", "2001-01-01", "~", "???", "${nope}", "1_000", "=", "null"]
)
def test_a_text_of_a_file_is_kept(tmp_path: Path, text: str) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(f"run:\n  name: {text}\njudge:\n  model:\n    model: {text} # why\n")
    config = load(file)
    assert config.run.name == config.judge.model.model == text


def test_quotes_around_all_of_a_text_are_yaml() -> None:
    for written, text in (("'a b'", "a b"), ('"a\\tb"', "a\tb"), ("''", ""), ("'it''s'", "it's"), (" 'null' ", "null")):
        assert load(None, [f"judge.model.model={written}"]).judge.model.model == text


@pytest.mark.parametrize("written", ["", "null"])
def test_null_and_nothing_mean_none_where_there_can_be_none(written: str, tmp_path: Path) -> None:
    config = load(None, ["tasks.path=x", "training.wandb=x", "training.keep_best=reward", f"tasks.path={written}"])
    assert config.tasks.path is None
    config = load(None, ["training.wandb=x", f"training.wandb={written}", f"training.keep_best={written}"])
    assert config.training.wandb == config.training.keep_best == ""
    file = tmp_path / "c.yaml"
    file.write_text(f"tasks:\n  path: {written}\ntraining:\n  wandb: {written}\n")
    config = load(file)
    assert config.tasks.path is None and config.training.wandb == ""
    assert load(None, ["tasks.path='null'"], files=False).tasks.path == "null"


@pytest.mark.parametrize(
    "section", ["training:", "training: null", "training: {}", "training: ~", "", "# nothing", "---"]
)
def test_an_empty_section_sets_nothing(tmp_path: Path, section: str) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(f"{section}\n")
    assert load(file) == Config() == load(None, ["training=", "judge={model: }", "tasks.options="])


@pytest.mark.parametrize(
    ("key", "written", "value"),
    [
        ("run.seed", "010", 10),
        ("run.seed", "0x10", 16),
        ("run.seed", "0o10", 8),
        ("run.seed", "1_000", 1000),
        ("run.seed", " 7 ", 7),
        ("run.seed", "'7'", 7),
        ("training.learning_rate", "1e-5", 1e-5),
        ("training.learning_rate", "1", 1.0),
        ("training.learning_rate", "1.", 1.0),
        ("training.learning_rate", ".5", 0.5),
        ("engine.timeout", ".inf", float("inf")),
        ("engine.timeout", "inf", float("inf")),
        ("training.compile", "on", True),
        ("training.compile", "True", True),
        ("training.tensorboard", "no", False),
        ("training.tensorboard", "OFF", False),
        ("training.lag", "0", 0),
        ("algorithm.name", "GRPO", "grpo"),
        ("tasks.kind", "Reasoning_Gym", "reasoning_gym"),
        ("filter.kind", "None", "none"),
        ("engine.launch.gpus", "[0, 0x1]", [0, 1]),
        ("engine.launch.flags", "[1.10, yes, 'a b', null]", ["1.10", "yes", "a b", "null"]),
        ("engine.launch.environment", "{A: 1.10, B: no, 3: ${C}x}", None),
        ("judge.rules.constants", "[1, 2.5, 1e3]", [1.0, 2.5, 1000.0]),
    ],
)
def test_a_value_is_read_by_the_type_of_its_setting(tmp_path: Path, key: str, written: str, value: Any) -> None:
    if value is None:
        written, value = "{A: 1.10, B: no, 3: x}", {"A": "1.10", "B": "no", "3": "x"}

    def of(config: Config) -> Any:
        found: Any = config
        for part in key.split("."):
            found = getattr(found, part)
        return found

    file = tmp_path / "c.yaml"
    file.write_text(f"{key}: {written}\n")
    for found in (of(load(None, [f"{key}={written}"])), of(load(file))):
        assert found == value and type(found) is type(value)


def test_free_tables_are_read_as_yaml_1_2() -> None:
    written = "{a: 1, b: 012, c: 1e3, d: 0x1F, e: no, f: True, g: 12:30, h: '1', i: ~, j: , k: null, l: [1, x], m: {n: .5}, o: 2001-01-01}"
    wanted = {
        "a": 1,
        "b": 12,
        "c": 1000.0,
        "d": 31,
        "e": "no",
        "f": True,
        "g": "12:30",
        "h": "1",
        "i": None,
        "j": None,
        "k": None,
    }
    wanted |= {"l": [1, "x"], "m": {"n": 0.5}, "o": "2001-01-01"}
    assert load(None, [f"tasks.options={written}"]).tasks.options == wanted
    config = load(None, ["tasks.options.a=${x}", "tasks.options.b.c=1e-5", "engine.launch.environment.A=1.10"])
    assert config.tasks.options == {"a": "${x}", "b": {"c": 1e-5}} and config.engine.launch.environment == {"A": "1.10"}


def test_keys_may_be_dotted_and_merged(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("base: &base {steps: 3, lag: 0}\n")
    with pytest.raises(ConfigError, match="base .*: unknown key"):
        load(file)
    file.write_text("training.steps: 3\njudge: {model.timeout: 5}\ntraining: {<<: {prefetch: 1, lag: 1}, lag: 0}\n")
    config = load(file)
    assert (config.training.steps, config.judge.model.timeout, config.training.prefetch) == (3, 5.0, 1)
    assert config.training.lag == 0


def test_a_hundred_thousand_values_of_aliases_are_refused() -> None:
    bomb = "{a: &a [1,1,1,1,1,1,1,1,1,1]"
    for one, before in zip("bcdefgh", "abcdefg", strict=True):
        bomb += f", {one}: &{one} [{', '.join([f'*{before}'] * 10)}]"
    with pytest.raises(ConfigError, match="more than 100000 values"):
        load(None, [f"tasks.options={bomb}}}"])


def test_files_that_are_no_config(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    for content, message in (
        (b"\xff\xfe\x00", "not readable as YAML"),
        (b"run: {name: \x00}", "not readable as YAML"),
        (b"[" * 1100, "not readable as YAML: is nested too deeply"),
        (b"just words", "must hold sections"),
        (b"3", "must hold sections"),
        (b"a: 1\n---\nb: 2\n", "expected a single document"),
        (b'{"train": [{"question": "a"}]}', "train .*c.yaml.*: unknown key; did you mean training?"),
        (b"training: [1]", r"training=\[1\]: must be a table.*in .*c.yaml"),
        (b"run: {seed: x}", "run.seed=x: must be a whole number, at least 0 .in .*c.yaml"),
        (b"arms: {a: {}}\nevaluations: {in_domain: {}}", "swirl-fast experiment .*c.yaml"),
    ):
        file.write_bytes(content)
        with pytest.raises(ConfigError, match=message):
            load(file)
    with pytest.raises(ConfigError, match="no such file"):
        load(tmp_path)


def test_what_a_program_builds_is_checked_too() -> None:
    with pytest.raises(ConfigError, match="training.schedule=linear: must be one of constant, cosine"):
        check(Config(training=TrainingConfig(schedule="linear")))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="training.steps=-1: must be at least 0"):
        check(Config(training=TrainingConfig(steps=-1)))


plain_text = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"))
text = (
    plain_text
    | st.sampled_from(ODD)
    | st.lists(st.sampled_from([*"'\"\\:#-?!&*{}[]|>%@`,~=\n\t ", "null", "1e3", "x"])).map("".join)
)
numbers = st.integers() | st.floats(allow_nan=False) | st.booleans() | st.none()
values = st.recursive(
    numbers | text, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3), max_leaves=8
)


@settings(max_examples=60, deadline=None)
@given(
    text,
    text,
    text,
    st.lists(text, max_size=3),
    st.dictionaries(text, text, max_size=3),
    st.dictionaries(text, values, max_size=3),
)
def test_what_is_dumped_is_loaded_as_it_was(
    tmp_path_factory: pytest.TempPathFactory,
    one: str,
    other: str,
    path: str,
    flags: list[str],
    environment: dict[str, str],
    options: dict[str, Any],
) -> None:
    config = load(None, ["training.learning_rate=1e-5", "engine.timeout=.inf"])
    config.run.folder, config.judge.model.model, config.search.passage_prefix = one, other, path
    config.engine.launch.flags, config.engine.launch.environment, config.tasks.options = flags, environment, options
    written = dump(config)
    assert load_layers([Layer(parse(written), "x")]) == config
    # readers of YAML 1.1, such as the report, see the same
    shown = yaml.safe_load(written)
    assert (shown["run"]["folder"], shown["judge"]["model"]["model"], shown["search"]["passage_prefix"]) == (
        one,
        other,
        path,
    )
    assert shown["engine"]["launch"]["environment"] == environment and shown["tasks"]["options"] == options


@settings(deadline=None)
@given(plain_text.filter(lambda text: text not in ("", "null")))
def test_any_text_goes_through_the_command_line(text: str) -> None:
    if text.strip()[:1] not in ("'", '"'):
        assert load(None, [f"search.query_prefix={text}"]).search.query_prefix == text
    if text.isprintable():
        assert load(None, [f"search.query_prefix={json.dumps(text, ensure_ascii=False)}"]).search.query_prefix == text
