"""What a collection or an evaluation is made of is known by what lies there, whatever its path is called."""

from __future__ import annotations

import gzip
import os
from pathlib import Path
from typing import cast

import pytest

from swirl_fast.config import load
from swirl_fast.engines.engine import Sampling
from swirl_fast.rollouts.provenance import fingerprint

ROWS = '{"question": "1 + 1?", "answer": "#### 2"}\n{"question": "2 + 2?", "answer": "#### 4"}\n'


def made_of(*overrides: str) -> object:
    config = load(None, ["model.path=some/name", "tasks.kind=gsm8k", *overrides])
    return fingerprint(config, Sampling(max_new_tokens=5))


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gsm.jsonl").write_text(ROWS, encoding="utf-8")
    return tmp_path


@pytest.mark.parametrize("key", ["tasks.path", "tasks.eval_path"])
def test_one_data_file_by_any_path(data: Path, key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (data / "elsewhere").mkdir()
    (data / "elsewhere" / "other.jsonl").write_text(ROWS, encoding="utf-8")
    (data / "link.jsonl").symlink_to("gsm.jsonl")
    with gzip.open(data / "packed.jsonl.gz", "wt", encoding="utf-8") as file:
        file.write(ROWS)
    monkeypatch.setenv("HOME", str(data))
    names = ["gsm.jsonl", "./gsm.jsonl", str(data / "gsm.jsonl"), "elsewhere/../gsm.jsonl", "~/gsm.jsonl"]
    names += ["link.jsonl", "elsewhere/other.jsonl", "packed.jsonl.gz"]
    path = ["tasks.path=gsm.jsonl"] * (key != "tasks.path")
    first, *others = [made_of(*path, f"{key}={name}") for name in names]
    assert all(other == first for other in others)


@pytest.mark.parametrize(
    "other", [ROWS.replace("4", "5"), "".join(reversed(ROWS.splitlines(keepends=True))), ROWS.replace("1 +", "1  +")]
)
def test_other_rows_under_the_same_name_are_another_collection(data: Path, other: str) -> None:
    """Of the same size where they can be, with the times of the file before."""
    first, times = made_of("tasks.path=gsm.jsonl"), os.stat("gsm.jsonl")
    (data / "gsm.jsonl").write_text(other, encoding="utf-8")
    os.utime("gsm.jsonl", ns=(times.st_atime_ns, times.st_mtime_ns))
    assert made_of("tasks.path=gsm.jsonl") != first


def test_a_folder_that_datasets_loads(data: Path) -> None:
    for name in ("one", "two"):
        (data / name / "main").mkdir(parents=True)
        (data / name / "main" / "train.jsonl").write_text(ROWS, encoding="utf-8")
    first = made_of("tasks.path=one")
    assert first == made_of("tasks.path=two")
    assert first != made_of("tasks.path=one:socratic")
    (data / "one" / "main" / "train.jsonl").write_text(ROWS.replace("4", "5"), encoding="utf-8")
    assert first != made_of("tasks.path=one")


def test_all_that_is_searched(data: Path) -> None:
    passages = '{"title": "A", "text": "a cat"}\n{"title": "B", "text": "a dog"}\n'
    for name, text in (("p.jsonl", passages), ("q.jsonl", passages), ("r.jsonl", passages.replace("cat", "cow"))):
        (data / name).write_text(text, encoding="utf-8")
    one, same, other = (
        made_of("tasks.path=gsm.jsonl", f"search.corpus={name}") for name in ("p.jsonl", "./q.jsonl", "r.jsonl")
    )
    assert one == same != other


def test_a_part_of_a_mixture(data: Path) -> None:
    def mixed(path: str) -> object:
        return made_of(f"tasks.mix=[{{kind: gsm8k, path: {path}}}]", "tasks.path=gsm.jsonl")

    (data / "two.jsonl").write_text(ROWS, encoding="utf-8")
    assert mixed("gsm.jsonl") == mixed("./gsm.jsonl") == mixed("two.jsonl")
    (data / "two.jsonl").write_text(ROWS.replace("4", "5"), encoding="utf-8")
    assert mixed("gsm.jsonl") != mixed("two.jsonl")


@pytest.mark.parametrize("limit", ["tools.result_chars=50", "tools.timeout=2", "tools.timeout=.inf"])
def test_what_a_model_is_shown_of_a_call_is_part_of_a_collection(data: Path, limit: str) -> None:
    """The defaults are not written down, so that what was made with them is gone on with."""
    first = made_of("tasks.path=gsm.jsonl")
    assert first != made_of("tasks.path=gsm.jsonl", limit)
    assert first == made_of("tasks.path=gsm.jsonl", "tools.concurrency=3", "tools.timeout=30")
    assert not any(key.startswith("tools.") for key in cast("dict[str, object]", first))
