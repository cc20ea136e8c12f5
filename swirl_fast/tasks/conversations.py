"""collect.source=conversations: the conversations of an agent's log in the place of a task's questions.

A conversation is a question: its id, and its first message of the user, for judges and for people. Conversations that name the same tools
are one part, as the tasks of a mixture are: `logs`, `logs-2`, … in the order in which they first occur, so that a fresh action is read
with the tools of its own conversation.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from swirl_fast.config import Config, ConfigError
from swirl_fast.tasks.logs import read_log
from swirl_fast.tasks.messages import BrokenRow, Conversation, open_tool
from swirl_fast.tasks.rows import HELD_OUT, held_out_groups, plain_name
from swirl_fast.tasks.scoring import ZERO
from swirl_fast.tasks.task import Question, Score, Split, TaskDefaults
from swirl_fast.tools import describe_tools
from swirl_fast.tools.tool import ToolSpec

SHOWN = 3  # broken lines that are named where they are skipped


class LogPart(TaskDefaults):
    """Conversations with the same tools. specs: those; they are never called."""

    def __init__(self, name: str, specs: Sequence[ToolSpec]) -> None:
        self.name, self.specs = name, tuple(specs)

    def questions(self, split: Split) -> Sequence[Question]:
        raise NotImplementedError("the whole log has them")

    def score(self, question: Question, answer: str | None) -> Score:
        return ZERO


@dataclass(frozen=True, slots=True)
class _Entry:
    """number: of the row in its file, from 0. opening, content: keys, see Conversation."""

    number: int
    opening: bytes
    content: bytes
    question: Question


class Conversations(LogPart):
    """Reads the log once, and keeps of each conversation no more than its question and its keys.

    Held out are those of collect.eval_path, or else about a tenth, by a hash of the messages before the first action: so conversations with
    the same opening, as several attempts at one question are, all lie on the same side, in whatever order the log has them. An opening of
    more than half of them, such as a greeting, says little: there a hash of the whole conversation decides. A conversation that comes again
    is left out.

    notes: what was left out, in sentences. Raises ValueError for a row that cannot be read, with file, line, field and remedy, unless
    collect.broken_lines=skip; ConfigError where nothing is left.
    """

    def __init__(self, config: Config) -> None:
        self._skip = config.collect.broken_lines == "skip"
        self._own = describe_tools(config.tasks.tools) if config.actions.format == "tags" else None
        assert config.collect.path, "refused by the check of the config"
        self._files = {"train": Path(config.collect.path).expanduser()}
        if config.collect.eval_path:
            self._files["eval"] = Path(config.collect.eval_path).expanduser()
        self.notes: list[str] = []
        self._names: dict[tuple[str, ...], str] = {}  # identities of tools -> name of the part
        self._specs: dict[str, tuple[ToolSpec, ...]] = {}
        self._open: set[str] = set()  # names of the tools that conversations without schemas call
        self._seen: dict[str, bytes] = {}  # id -> content
        super().__init__(config.tasks.name or plain_name(config.collect.path, "logs"), ())
        splits = self._split({split: self._index(file) for split, file in self._files.items()}, config)
        limits = {"train": config.tasks.limit, "eval": config.tasks.eval_limit}
        self._chosen = {split: self._limited(split, entries, limits[split]) for split, entries in splits.items()}
        self.parts: Mapping[str, LogPart] = self._make_parts()

    # ---- reading

    def _index(self, file: Path) -> list[_Entry]:
        found: list[_Entry] = []
        broken: list[BrokenRow] = []
        contents: set[bytes] = set()
        again = 0
        for number, read in enumerate(read_log(file)):
            try:
                if isinstance(read, BrokenRow):
                    raise read
                entry = self._entry(number, read)
            except BrokenRow as error:
                if not self._skip:
                    raise ValueError(
                        f"{error}. To leave out what cannot be read, set collect.broken_lines=skip"
                    ) from None
                broken.append(error)
                continue
            if entry.content in contents:
                again += 1
                continue
            contents.add(entry.content)
            found.append(entry)
        if broken:
            more = f" and {len(broken) - SHOWN} more" if len(broken) > SHOWN else ""
            first = "; ".join(map(str, broken[:SHOWN]))
            self.notes.append(f"{len(broken)} lines cannot be read and are skipped: {first}{more}")
        if again:
            self.notes.append(f"{again} conversations of {file} come a second time and are left out")
        if not found:
            raise ConfigError(
                f"collect.path={file}: holds no conversation that can be read" + (f"; {broken[0]}" if broken else "")
            )
        return found

    def _entry(self, number: int, read: Conversation) -> _Entry:
        content = read.content_key()
        id_ = _plain_id(read.id) if read.id else f"{self.name}-{content.hex()[:16]}"
        if self._seen.setdefault(id_, content) != content:
            raise BrokenRow(
                f"{read.where}: id = {id_!r}: an earlier conversation has the same id; give each its own, or leave ids out"
            )
        return _Entry(number, read.opening_key(), content, Question(id_, self._part(read), read.question, ()))

    def _part(self, read: Conversation) -> str:
        """The name of the conversation's part."""
        calls = [call["function"]["name"] for message in read.messages for call in message.get("tool_calls", ())]
        specs = read.tools
        if self._own is not None:
            if calls or specs:
                raise BrokenRow(
                    f"{read.where}: has {'tool_calls' if calls else 'tools'}, and actions.format=tags reads calls in the text; set "
                    "actions.format=native"
                )
            specs = self._own
        elif not specs:
            self._open.update(calls)
        key = tuple(spec.identity for spec in specs)
        if key not in self._names:
            self._names[key] = self.name if not self._names else f"{self.name}-{len(self._names) + 1}"
            self._specs[self._names[key]] = specs
        return self._names[key]

    def _make_parts(self) -> dict[str, LogPart]:
        if () in self._names and self._own is None:
            self._specs[self._names[()]] = tuple(map(open_tool, sorted(self._open)))
        return {name: LogPart(name, specs) for name, specs in self._specs.items()}

    # ---- what is held out

    def _split(self, indexed: dict[str, list[_Entry]], config: Config) -> dict[Split, list[_Entry]]:
        train = indexed["train"]
        entries = [*train, *indexed.get("eval", ())]
        shared = Counter(entry.opening for entry in entries)

        def key(entry: _Entry) -> bytes:
            return entry.content[:8] if 2 * shared[entry.opening] > len(entries) else entry.opening

        if "eval" in indexed:
            held_out = {key(entry) for entry in indexed["eval"]}
            kept = [entry for entry in train if key(entry) not in held_out]
            if len(kept) < len(train):
                self.notes.append(
                    f"{len(train) - len(kept)} conversations have the opening of a held-out one and are left out"
                )
            if not kept:
                raise ConfigError(
                    f"collect.path={config.collect.path}: every conversation is also held out; give another collect.eval_path"
                )
            return {"train": kept, "eval": indexed["eval"]}
        sizes = Counter(map(key, train))
        if len(sizes) < 2:
            raise ConfigError(
                f"collect.path={config.collect.path}: {len(train)} conversation(s) cannot be split into those to train on and those to "
                "evaluate on; give more, or collect.eval_path"
            )
        held_out = held_out_groups(sizes, HELD_OUT)
        kept_out = [entry for entry in train if key(entry) in held_out]
        self.notes.append(
            f"{len(kept_out)} of {len(train)} conversations are held out; collect.eval_path gives them a file of their own"
        )
        return {"train": [entry for entry in train if key(entry) not in held_out], "eval": kept_out}

    def _limited(self, split: Split, entries: list[_Entry], limit: int) -> dict[int, Question]:
        """Number of the row -> its question, in order."""
        if limit and len(entries) > limit:
            name = "tasks.limit" if split == "train" else "tasks.eval_limit"
            whose = "" if split == "train" else " held-out"
            self.notes.append(f"{limit} of {len(entries)}{whose} conversations are used ({name}={limit}; 0: all)")
        return {entry.number: entry.question for entry in entries[: limit or None]}

    # ---- the task

    def questions(self, split: Split) -> Sequence[Question]:
        return list(self._chosen[split].values())

    def conversations(self, split: Split) -> Iterator[tuple[Question, Conversation]]:
        """In the order of the questions, read again from the file, one at a time."""
        chosen = self._chosen[split]
        for number, read in enumerate(read_log(self._files.get(split, self._files["train"]))):
            if number in chosen:
                if isinstance(read, BrokenRow):
                    raise ValueError(f"{read}; the file has changed since this command began")
                yield chosen[number], read

    def count_parts(self) -> Counter[str]:
        """Name of a part -> its conversations of both splits."""
        return Counter(question.task for chosen in self._chosen.values() for question in chosen.values())


def _plain_id(id_: str) -> str:
    """Without what ids of trajectories and lines of a screen cannot have."""
    return re.sub(r"[/\x00-\x1f\x7f]", "_", id_)[:200]
