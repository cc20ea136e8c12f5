"""What the search tool searches: the paragraphs of a task, or search.corpus."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from swirl_fast.config import Config, ConfigError
from swirl_fast.files import hash_tree
from swirl_fast.tasks.rows import read_file
from swirl_fast.tasks.task import Task
from swirl_fast.tools.characters import whole_characters

TEXT_FILES = (".txt", ".md")


def passages_of(config: Config, task: Task) -> Sequence[tuple[str, str]]:
    """(title, text) of what is searched for the questions of a task."""
    return read_corpus(config.search.corpus) if config.search.corpus else task.passages()


def read_corpus(path: str) -> list[tuple[str, str]]:
    """(title, text) of every passage, in a fixed order, without duplicates.

    path: a data file with rows {title, text}, of which title may be missing; or a folder, whose .txt and .md files, in all its folders,
    are a passage a paragraph, with the name of the file as the title. Raises ConfigError where nothing is found, ValueError for a
    malformed row.
    """
    place = Path(path).expanduser()
    passages = _of_folder(place) if place.is_dir() else _of_file(place)
    if not passages:
        what = f"has no {' or '.join(TEXT_FILES)} file with text" if place.is_dir() else "has no rows"
        raise ConfigError(f"search.corpus={path}: {what}")
    return list(dict.fromkeys(passages))


def corpus_hash(path: str) -> str:
    """Hex digest of the contents, wherever they lie."""
    return hash_tree(Path(path).expanduser(), TEXT_FILES)


def _files(folder: Path) -> list[Path]:
    return sorted(file for file in folder.rglob("*") if file.suffix.lower() in TEXT_FILES and file.is_file())


def _of_folder(folder: Path) -> list[tuple[str, str]]:
    passages = []
    for file in _files(folder):
        try:
            text = file.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            raise ValueError(f"search.corpus: {file}: not UTF-8 at byte {error.start}") from None
        paragraphs = (" ".join(part.split()) for part in re.split(r"\n[ \t]*\n", text.replace("\r\n", "\n")))
        passages += [(whole_characters(file.stem), paragraph) for paragraph in paragraphs if paragraph]
    return passages


def _of_file(file: Path) -> list[tuple[str, str]]:
    if not file.is_file():
        raise ConfigError(f"search.corpus={file}: no such file or folder")
    passages = []
    for row in read_file(file):
        if "text" not in row.fields:
            raise ValueError(
                f"{row.where}: there is no column 'text', only {', '.join(map(str, row.fields))}; a corpus has rows {{title, text}}"
            )
        title = row.fields.get("title") or ""
        if not isinstance(title, str):
            raise row.error("title", "must be text")
        passages.append((title.strip(), " ".join(row.text("text").split())))
    return passages
