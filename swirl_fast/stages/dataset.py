"""A run's trajectories as a data set for other trainers: a folder with KIND.jsonl and README.md, written row by row.

messages and pairs begin with the system message and the worked examples as the model read them: they are made again of the run's settings
by the code that made them (rollouts/collector.py: conversation_of), which needs the run's data file. Results of tools are turns of the
user, as the model read them. What marks turns is left to the chat template of the trainer.
"""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from swirl_fast.config import ConfigError
from swirl_fast.data.mds import Reader
from swirl_fast.data.samples import read_samples
from swirl_fast.data.shards import verify_shards
from swirl_fast.outputs import rows
from swirl_fast.outputs.run import OpenRun
from swirl_fast.outputs.text import clean
from swirl_fast.rendering import open_format
from swirl_fast.rollouts.collector import conversation_of
from swirl_fast.stages.build import build_task
from swirl_fast.tasks import offered_tools
from swirl_fast.tasks.conversations import Conversations
from swirl_fast.tasks.task import Question

README = "README.md"
MARK = "Written by `swirl-fast dataset`"  # in README.md: tells our folders from others
NOT_RECORDED = "sampled actions at states that no chosen trajectory has"

ABOUT = {
    "messages": "A conversation a row, `messages`: a list of `role` and `content`, as TRL's SFTTrainer and most others read it. "
    "Results of tools are turns of the user, as the model read them.",
    "steps": "Stepwise supervision, as TRL names it: `prompt`, `completions` (one a step), `labels` (true: the step is good). A completion "
    "is the result of the call before it, a line end, and the step's text. The step separator is a line end.",
    "prm": "Stepwise supervision with graded labels: `prompt`, `completions` (one a step), `labels`, rewards in [0, 1]. A completion is "
    "the result of the call before it, a line end, and the step's text. Trainers that take true and false need `--as steps`.",
    "pairs": "Preference pairs, as TRL's DPOTrainer reads them: `prompt`, `chosen`, `rejected`, each a list of messages; a good and a bad "
    "action of the same state, from the samples of training and from recorded trajectories that share a state (`source`).",
    "jsonl": "A trajectory a row with everything that was recorded: question, gold answers, tokens, and `steps` with text, action, "
    "observation, verdict, reward and reason.",
}


def dataset(
    run: OpenRun, kind: str, out: str | Path, kept: bool = False, whole: bool = True, replace: bool = False
) -> Path:
    """Writes the data set and returns its folder, which holds all of it or does not exist, whenever the process is killed.

    kind: messages, steps, prm, pairs or jsonl. kept: only trajectories that the filter kept; else all finished ones. whole: with system
    message and worked examples. replace: put it in the place of an earlier data set. The run may be under way.

    Raises ConfigError for a folder that is there, ValueError where there is nothing to write; then nothing is written.
    """
    folder = Path(os.path.abspath(Path(out).expanduser()))
    _check_place(folder, replace)
    ids = _kept_ids(run) if kept else run.store().ids(finished=True)
    left_out: Counter[str] = Counter()
    if not kept:
        left_out["unfinished trajectories"] = len(run.store().ids(finished=False))
    temporary = folder.with_name(f"{folder.name}.tmp-{os.getpid()}")
    temporary.mkdir(parents=True)
    try:
        count = 0
        with (temporary / f"{kind}.jsonl").open("w", encoding="utf-8") as file:
            for row in _rows(run, kind, ids, whole, left_out):
                file.write(json.dumps(clean(row), ensure_ascii=False) + "\n")
                count += 1
        if not count:
            raise ValueError(_nothing(run, kind, len(ids), kept))
        notes = [f"{number:,} {what}" for what, number in left_out.items() if number]
        (temporary / README).write_text(_readme(run, kind, count, kept, whole, notes), encoding="utf-8")
        _put(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    print(f"dataset: {count:,} rows in {folder}" + (f"; left out: {', '.join(notes)}" if notes else ""))
    return folder


def _check_place(folder: Path, replace: bool) -> None:
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    readme = folder / README
    if not (readme.is_file() and MARK in readme.read_text(encoding="utf-8", errors="replace")):
        raise ConfigError(f"--out {folder}: is there, and this command did not write it; name another folder")
    if not replace:
        raise ConfigError(f"--out {folder}: holds a data set already; add --replace, or name another folder")


def _put(temporary: Path, folder: Path) -> None:
    old = folder.with_name(f"{folder.name}.old-{os.getpid()}")
    if folder.exists():
        folder.rename(old)
    temporary.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def _kept_ids(run: OpenRun) -> list[str]:
    folder = run.folder / "shards"
    if not folder.is_dir():
        raise ValueError(f"--kept: {folder} is not there; run filter first, or leave --kept out")
    verify_shards(folder)
    reader = Reader(folder)
    return [reader[i]["meta"]["id"] for i in range(len(reader))]


def _rows(run: OpenRun, kind: str, ids: Sequence[str], whole: bool, left_out: Counter[str]) -> Iterator[dict[str, Any]]:
    readings = run.trajectories(ids=ids)
    if kind == "messages":
        opening = _opening(run, whole)
        yield from (rows.conversation_row(reading, opening) for reading in readings if reading.trajectory.num_steps)
    elif kind in ("steps", "prm"):
        for reading in readings:
            yield from rows.stepwise_rows(reading, kind == "prm", left_out)
    elif kind == "pairs":
        opening = _opening(run, whole)
        yield from _sampled_pairs(run, set(ids), opening, left_out)
        by_question = sorted(ids, key=lambda id_: id_.rsplit("/", 1)[0])  # stable: those of one question side by side
        for _, same in groupby(run.trajectories(ids=by_question), key=lambda reading: reading.trajectory.question_id):
            yield from rows.recorded_pairs(same, opening, left_out)
    elif kind == "jsonl":
        yield from map(rows.whole_row, readings)
    else:
        raise ConfigError(f"--as {kind}: must be one of {', '.join(ABOUT)}")


def _opening(run: OpenRun, whole: bool) -> rows.Opening:
    """Raises ValueError, with the way without it, where the run's settings or its data file are not there any more."""
    if not whole:
        return rows.from_question
    try:
        config = run.config
        task = build_task(config)
        if isinstance(task, Conversations):
            openings = {
                question.id: [
                    {"role": one["role"], "content": one["content"]} for one in read.messages[: read.first_action]
                ]
                for question, read in task.conversations("train")
            }
            return lambda question: openings[question.id]
        messages = conversation_of(config, task, offered_tools(task), open_format(config.actions, config.model))
    except (ValueError, OSError) as error:
        raise ValueError(
            f"the system message and the worked examples cannot be made again: {error}. --from-question leaves them out"
        ) from error
    return messages


def _question(sample: Mapping[str, Any]) -> Question:
    return Question(sample["question_id"], sample["task"], sample["question"], ())


def _sampled_pairs(
    run: OpenRun, ids: set[str], opening: rows.Opening, left_out: Counter[str]
) -> Iterator[dict[str, Any]]:
    """One training step in memory at a time. With algorithm.reward=outcome training samples whole trajectories: those of a question have
    their first state in common, and no other."""
    fresh = run.files.setting("algorithm.reward") == "outcome"
    questions = {id_.rsplit("/", 1)[0] for id_ in ids}
    for step in run.sample_steps():
        states: dict[tuple[str, int], list[dict[str, Any]]] = {}
        for row in map(vars, read_samples(run.folder, step)):
            known = row["question_id"] in questions and not row["state"] if fresh else row["trajectory"] in ids
            if known:
                states.setdefault((row["question_id" if fresh else "trajectory"], row["state"]), []).append(row)
            else:
                left_out[NOT_RECORDED] += 1
        if fresh:
            for actions in states.values():
                yield from rows.sampled_pairs(actions, opening(_question(actions[0])), left_out)
            continue
        by_trajectory: dict[str, list[int]] = {}
        for id_, state in sorted(states):
            by_trajectory.setdefault(id_, []).append(state)
        for one in run.store().trajectories(list(by_trajectory)):
            for state in by_trajectory[one.id]:
                prompt = [*opening(rows.question_of(one)), *rows.turns(one, state)]
                yield from rows.sampled_pairs(states[one.id, state], prompt, left_out)


def _nothing(run: OpenRun, kind: str, trajectories: int, kept: bool) -> str:
    if not trajectories:
        return f"{run.folder}: no trajectory is {'kept' if kept else 'finished'} yet; run {'filter' if kept else 'collect'} first"
    if kind == "pairs":
        return f"{run.folder}: no state has both a GOOD and a BAD action; judge first, or collect more trajectories a question"
    return f"{run.folder}: none of the steps of {trajectories:,} trajectories has a verdict; run judge first"


def _readme(run: OpenRun, kind: str, count: int, kept: bool, whole: bool, notes: Sequence[str]) -> str:
    """A data set card of the Hugging Face hub."""
    files = run.files
    which = "those that the filter kept" if kept else "all finished ones"
    opening = "with the system message and the worked examples" if whole else "from the question on"
    about = {
        "rows": f"{count:,}",
        "run": run.folder.resolve().name,
        "model": files.setting("model.path"),
        "task": files.setting("tasks.kind"),
        "trajectories": which,
        "judge": files.judge_id or run.store().main_judge() or None,
        "conversations": opening if kind in ("messages", "pairs") else None,
        "left out": "; ".join(notes) or None,
    }
    facts = "\n".join(f"- {name}: {value}" for name, value in about.items() if value)
    return f"""---
configs:
- config_name: default
  data_files: {kind}.jsonl
---
# {run.folder.resolve().name}: {kind}

{ABOUT[kind]}

{facts}

Steps without a verdict are never labelled. Gold answers are those of the task's data, whose licence holds for them.

```python
from datasets import load_dataset

rows = load_dataset("json", data_files="{kind}.jsonl", split="train")
```

{MARK} of [swirl-fast](https://arxiv.org/abs/2504.04736).
"""
