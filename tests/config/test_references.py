"""A user's own Python by its name: found, imported, hashed, or refused with the remedy."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from swirl_fast.config import ConfigError, load, references
from swirl_fast.config.contents import contents


def written(path: Path, text: str) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return f"{path}:thing"


def identity(reference: str) -> str:
    return references.identity("k", reference)


def test_a_name_in_a_file_or_a_module_is_loaded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reference = written(tmp_path / "mine.py", "class thing:\n    class inner:\n        pass\n")
    found = references.load("k", reference)
    assert found.__name__ == "thing" and references.load("k", reference) is found
    assert references.load("k", f"{reference}.inner") is found.inner
    written(tmp_path / "package_of_mine" / "rewards.py", "thing = 3")
    monkeypatch.chdir(tmp_path)
    assert references.load("k", "package_of_mine.rewards:thing") == 3
    assert references.load("k", "json:dumps") is __import__("json").dumps


def test_changed_source_is_loaded_again_and_has_another_identity(tmp_path: Path) -> None:
    helper = tmp_path / "helper_of_mine.py"
    written(helper, "value = 1")
    written(tmp_path / "unrelated.py", "value = 1")
    reference = written(tmp_path / "mine.py", "import helper_of_mine\ndef thing():\n    return helper_of_mine.value\n")
    first = identity(reference)
    assert references.load("k", reference)() == 1 and first.startswith("thing@")
    written(tmp_path / "unrelated.py", "value = 2")
    assert identity(reference) == first
    written(helper, "value = 2  # what it imports from its own folder counts")
    assert identity(reference) != first and references.load("k", reference)() == 2
    moved = written(tmp_path / "elsewhere" / "mine.py", (tmp_path / "mine.py").read_text(encoding="utf-8"))
    written(tmp_path / "elsewhere" / "helper_of_mine.py", helper.read_text(encoding="utf-8"))
    assert identity(moved) == identity(reference), "the place does not count"


def test_relative_imports_within_a_package_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "parts_of_mine"
    written(folder / "__init__.py", "")
    written(folder / "base.py", "value = 1")
    written(folder / "reward.py", "from . import base\nfrom .base import value\nthing = value\n")
    monkeypatch.chdir(tmp_path)
    first = identity("parts_of_mine.reward:thing")
    written(folder / "base.py", "value = 2")
    assert identity("parts_of_mine.reward:thing") != first


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("print('x')\n1 / 0\n", r"cannot be imported: ZeroDivisionError: division by zero \(mine.py, line 2\)"),
        ("def thing(:\n", r"cannot be imported: SyntaxError: .* \(mine.py, line 1\)"),
        ("import no_such_module_at_all\n", "ModuleNotFoundError: No module named 'no_such_module_at_all'"),
        ("import sys\nsys.exit(3)\n", "cannot be imported: SystemExit: 3"),
        ("other = 1\ndef another(): pass\n", "has no thing; it defines another"),
        ("", "has no thing; it defines nothing that could be meant"),
    ],
)
def test_what_cannot_be_loaded_is_an_error(tmp_path: Path, text: str, message: str) -> None:
    reference = written(tmp_path / "mine.py", text)
    with pytest.raises(ConfigError, match=f"^k={reference}: .*{message}"):
        references.load("k", reference)
    written(tmp_path / "mine.py", "thing = 1")
    assert references.load("k", reference) == 1, "mended in the same process"


def test_names_that_are_none(tmp_path: Path) -> None:
    for text, message in {
        "nothing": "must be one of a, b, or FILE.py:NAME or MODULE:NAME of your own, such as mine.py:k",
        f"{tmp_path}/none.py:thing": "there is no file",
        "no_such_module:thing": "there is no Python module no_such_module",
        "json:no such name": "must be one of a, b",
        "json:": "must be one of a, b",
        "json:nothing": "json/__init__.py has no nothing",
    }.items():
        with pytest.raises(ConfigError, match=f"^k={text}: .*{message}"):
            references.load("k", text, ("a", "b"))


def test_what_it_prints_goes_to_standard_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reference = written(tmp_path / "mine.py", "print('imported')\nthing = 1\n")
    references.load("k", reference)
    assert capsys.readouterr() == ("", "imported\n")


def test_a_file_beside_another_is_importable_when_a_function_is_called(tmp_path: Path) -> None:
    written(tmp_path / "later_of_mine.py", "value = 5")
    reference = written(
        tmp_path / "mine.py", "def thing():\n    import later_of_mine\n    return later_of_mine.value\n"
    )
    assert references.load("k", reference)() == 5
    assert sys.path[0] != str(tmp_path), "what is installed wins"


def test_the_config_finds_files_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "mine"
    written(folder / "tool.py", "thing = 1")
    written(folder / "data.jsonl", "{}")
    yaml = "tasks: {kind: QA, path: data.jsonl, tools: [tool.py:thing, Calculator]}\njudge.kind: tool.py:thing\n"
    (folder / "mine.yaml").write_text(yaml, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    config = load("mine/mine.yaml")
    assert config.tasks.kind == "qa" and config.tasks.path == str(folder / "data.jsonl")
    assert config.tasks.tools == [f"{folder}/tool.py:thing", "calculator"]
    assert config.judge.kind == f"{folder}/tool.py:thing"
    config = load("mine/mine.yaml", ["tasks.tools=mine/tool.py:thing"])
    assert config.tasks.tools == [f"{folder}/tool.py:thing"], "of the command line: in the working directory"
    monkeypatch.chdir(folder)
    assert load("mine.yaml").tasks.path == "data.jsonl", "as it is written where that is found"
    before = contents(load("mine.yaml").tasks, "tasks")
    written(folder / "data.jsonl", '{"changed": 1}')
    after = contents(load("mine.yaml").tasks, "tasks")
    assert {key for key in before if before[key] != after[key]} == {"path"}
    with pytest.raises(
        ConfigError, match="judge.kind=ruels: must be one of rules, model, reference, recorded_action, or FILE.py:NAME"
    ):
        load("mine.yaml", ["judge.kind=ruels"])


def test_settings_of_a_mixture_are_read_as_those_of_a_task(tmp_path: Path) -> None:
    written(tmp_path / "a.jsonl", "{}")
    path = tmp_path / "mix.yaml"
    path.write_text(
        "tasks.mix: [{kind: gsm8k, path: a.jsonl, limit: 3}, {options.min_terms: 2, weight: 2}]", encoding="utf-8"
    )
    config = load(path)
    assert config.tasks.mix == [
        {"kind": "gsm8k", "path": str(tmp_path / "a.jsonl"), "limit": 3},
        {"options": {"min_terms": 2}, "weight": 2.0},
    ]
    for written_mix, message in {
        "[{kind: x}]": r"tasks.mix\[0\].kind=x: must be one of",
        "[{knid: qa}]": r"tasks.mix\[0\].knid .*unknown key; did you mean kind\?",
        "[{limit: many}]": r"tasks.mix\[0\].limit=many: must be a whole number",
        "[7]": r"tasks.mix\[0\]=7: must be a table",
        "[{mix: []}]": r"tasks.mix\[0\].mix: a task of a mixture cannot be a mixture",
        "[{kind: gsm8k}]": r"tasks.mix\[0\].path=None: .* needs the path of a data file",
    }.items():
        with pytest.raises(ConfigError, match=message):
            load(None, [f"tasks.mix={written_mix}"])


@pytest.mark.parametrize(
    ("tools", "message"),
    [
        (
            "[calculater]",
            "tasks.tools=calculater: must be one of calculator, search, or FILE.py:NAME .*; did you mean calculator?",
        ),
        (
            "[calculator, mine.py]",
            "tasks.tools=mine.py: must be .*; write mine.py:NAME, with the name of what is in that file",
        ),
        ("[x]", "tasks.tools=x: must be one of calculator, search, or FILE.py:NAME or MODULE:NAME$"),
    ],
)
def test_the_entry_of_a_list_that_cannot_be_is_named(tools: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message.replace("?", r"\?")):
        load(None, [f"tasks.tools={tools}"])
