"""README and the pages of docs/: their commands are ones that work, what they name is there, and the generated ones are current."""

from __future__ import annotations

import importlib.util
import re
import shlex
import sys
from pathlib import Path

import pytest
import yaml
from support.paths import ROOT
from support.runs import attempt, overrides, start

from swirl_fast import cli
from swirl_fast.config import Config, load
from swirl_fast.config.fields import settings
from swirl_fast.config.shipped import shipped
from swirl_fast.stages.build import build_task, opened_tools, task_judge
from swirl_fast.tasks import offered_tools
from swirl_fast.tools.toolbox import ToolCall
from swirl_fast.trajectory import StepView

DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.glob("*.md"))]
MKDOCS = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
# Programs of others, whose lines are taken as they are.
OTHERS = {"pip", "uv", "git", "cd"}
# Those whose blocks are no commands for a reader, or of studies that were made once.
TASK_PAGES = [page for page in PAGES if page.stem not in ("architecture", "study", "study_reference_judge")]


def commands(page: Path) -> list[str]:
    """The lines of its blocks of shell, without comments, continued ones as one."""
    text = page.read_text(encoding="utf-8")
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    shell = [body for language, body in blocks if language in ("", "bash", "sh")]
    lines = [line for block in shell for line in re.sub(r"\s*\\\n\s*", " ", block).splitlines()]
    return [line for line in (re.sub(r"(^|\s)#.*", "", line).strip() for line in lines) if line]


def test_commands_are_found() -> None:
    assert sum(len(commands(page)) for page in TASK_PAGES) > 25


@pytest.mark.parametrize("page", TASK_PAGES, ids=lambda page: page.name)
def test_commands_are_ones_that_work(page: Path) -> None:
    """Their words are parsed and their settings read, as the command does before any work; files that they name need not be there."""
    for line in commands(page):
        for part in line.removeprefix("source <(").removesuffix(")").split(" && "):
            words = shlex.split(part)
            while re.fullmatch(r"[A-Z_]+=\S*", words[0]):
                words.pop(0)
            program = words.pop(0).removeprefix(".venv/bin/")
            if program in ("torchrun", "python") and "-m" in words:
                check_module(words[words.index("-m") + 1], words[words.index("-m") + 2 :])
            elif program == "swirl-fast":
                check_stage(words)
            elif program == "make":
                makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
                assert all(re.search(rf"^{word}:", makefile, re.MULTILINE) for word in words if "=" not in word), part
            else:
                assert program in OTHERS, f"{part}: nothing checks this"


def check_module(name: str, words: list[str]) -> None:
    if name == "swirl_fast":
        check_stage(words)
    elif name not in ("venv", "sglang.launch_server", "pytest"):
        assert importlib.util.find_spec(name) is not None, name


def check_stage(words: list[str]) -> None:
    """A|B for each of its alternatives; settings on top of the quickstart's where the config is a FILE of the reader's."""
    stages, *rest = words
    for stage in stages.split("|"):
        needed = ["--as", "jsonl", "--out", "x"] if stage == "dataset" and "--as" not in rest else []
        given = [re.sub(r"^([a-z]+)\|.*", r"\1", word) for word in [*rest, *needed] if word not in ("key=value", "…")]
        options = cli._parsed([stage, *given])
        config = getattr(options, "config", None)
        if stage not in ("configs", "completion", "experiment"):
            load(
                config if config in shipped("config") else "quickstart",
                [word for word in options.overrides if "=" in word],
                files=False,
            )


# ---- README


def test_readme_is_one_screen() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.split()) <= 900
    assert [line for line in text.splitlines() if len(line) > 120 and not line.startswith("![")] == []


def test_the_task_of_the_readme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_model: Path) -> None:
    """Its two files as they are; the command as it is, on a tiny model."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for name, body in re.findall(r"^`(\w+\.\w+)`[^\n]*:\n\n```\w+\n(.*?)```", text, re.MULTILINE | re.DOTALL):
        (tmp_path / name).write_text(body, encoding="utf-8")
    rows = [f'{{"question": "Are {n} apples left?", "answer": "yes"}}\n' for n in range(20)]
    (tmp_path / "questions.jsonl").write_text("".join(rows), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    assert attempt(["run", "--config", "shop.yaml", "--dry-run", f"model.path={tiny_model}"]).returncode == 0
    config = load("shop.yaml")
    task = build_task(config)
    offered = offered_tools(task)
    with opened_tools(config, task, offered) as boxes, task_judge(config, task) as judge:
        box = boxes[task.name]
        assert box.call([ToolCall("t", "stock", {"item": name}) for name in ("pear", "fig")]) == ["7", "0"]
        steps = [
            StepView(task.name, "Are 3 left?", (), text) for text in ("<answer>yes</answer>", "<stock>pear</stock>")
        ]
        assert [judgement.reward for judgement in judge.judge(steps)] == [1.0, 1.0]


def test_the_quickstart_page_looks_at_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_model: Path) -> None:
    """Its commands that read a run, on one of a tiny model."""
    monkeypatch.chdir(tmp_path)
    small = [word for word in overrides(tmp_path / "runs", tiny_model) if not word.startswith("run.name=")]
    start(["collect", *small, "run.name=quickstart"])
    text = (DOCS / "quickstart.md").read_text(encoding="utf-8").partition("## What to look at")[2]
    (block,) = re.findall(r"```\n(.*?)```", text.partition("\n## ")[0], re.DOTALL)
    for line in block.splitlines():
        done = attempt(line.split()[1:])
        assert done.returncode == 0 and done.stdout, done.stderr
    assert (tmp_path / "rows" / "messages.jsonl").is_file()


# ---- what the pages name


def test_every_page_is_in_the_site() -> None:
    named = set(re.findall(r": (\w+\.md)$", MKDOCS, re.MULTILINE))
    spec = importlib.util.spec_from_file_location("hooks", DOCS / "hooks.py")
    assert spec is not None and spec.loader is not None
    hooks = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hooks)
    assert named == {page.name for page in DOCS.glob("*.md")} | set(hooks.PAGES.values())
    assert [source for source in hooks.PAGES if not (ROOT / source).is_file()] == []


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_named_headings_are_there(page: Path) -> None:
    for link, anchor in re.findall(r"\]\(([^)#:\s]*)#([^)\s]+)\)", page.read_text(encoding="utf-8")):
        target = page.parent / link if link else page
        assert anchor in anchors(target), f"{page.name}: {link}#{anchor}"


def test_the_errors_are_those_of_the_source() -> None:
    source = "".join(path.read_text(encoding="utf-8") for path in sorted((ROOT / "swirl_fast").rglob("*.py")))
    rows = re.findall(r"^\| `(.*?)` \|", (DOCS / "errors.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert len(rows) > 15 and [row for row in rows if row not in source] == []


def test_settings_that_pages_name_are_there() -> None:
    keys = set(settings(Config))
    for name in (
        "algorithms",
        "engines",
        "training",
        "judges",
        "errors",
        "coming_from",
        "data_sets",
        "running",
        "experiments",
    ):
        text = (DOCS / f"{name}.md").read_text(encoding="utf-8")
        named = re.findall(
            r"`((?:run|model|tasks|tools|search|engine|collect|judge|filter|algorithm|training|evaluate)\.[a-z_.]+)(?=[=`])",
            text,
        )
        others = {"filter.json", "training.num_generations", "algorithm.adv_estimator"} | {
            word for word in named if "rollout_correction" in word
        }
        assert {word for word in named if word not in keys and word.count(".") < 4} - others == set(), name


def test_the_names_of_trl_are_trls() -> None:
    trl = pytest.importorskip("trl")
    import dataclasses
    import inspect

    known = {field.name for field in dataclasses.fields(trl.GRPOConfig)}
    known |= set(inspect.signature(trl.GRPOTrainer).parameters)
    rows = re.findall(r"^\| `[^|]*\| ([^|]*) \|", (DOCS / "coming_from.md").read_text(encoding="utf-8"), re.MULTILINE)
    named = {word for cell in rows for word in re.findall(r"`(\w+)`", cell)}
    assert len(named) > 15 and named - known == set()


def test_the_python_reference_is_current(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(DOCS))
    import reference

    assert (DOCS / "python_reference.md").read_text(encoding="utf-8") == reference.document(), "make generated"
    sys.modules.pop("reference")


def test_the_site_needs_one_pinned_package() -> None:
    lines = (DOCS / "requirements.txt").read_text(encoding="utf-8").splitlines()
    assert [line.split("==")[0] for line in lines if not line.startswith("#")] == ["mkdocs-material"]
    assert yaml.safe_load(MKDOCS.replace("!!python/object/apply:pymdownx.slugs.slugify", ""))["strict"] is True
