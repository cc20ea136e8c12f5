"""What the tests of tasks share: small data files, and a check of worked examples."""

import json
from pathlib import Path
from typing import Any

from swirl_fast.formats.tags import parse
from swirl_fast.tasks.task import Example, Score
from swirl_fast.tools.tool import ToolSpec, observation

RIGHT = Score(1.0, 1.0, 1.0, 1.0)


def texts(task, split) -> list[str]:
    return [question.text for question in task.questions(split)]


def check_examples(examples: tuple[Example, ...], spec: ToolSpec, tool: Any) -> None:
    """Each is a conversation that could have happened: every call is well-formed and its observation is the tool's."""
    assert len(examples) >= 2
    assert len({example.question for example in examples}) == len(examples)
    for example in examples:
        actions = [parse(text, [spec]) for text in example.actions]
        assert [action.kind for action in actions] == ["tool"] * (len(actions) - 1) + ["answer"]
        assert len(example.observations) == len(actions) - 1
        for action, seen in zip(actions, example.observations, strict=False):
            assert seen == observation(action.argument, tool.call(action.argument))


def write_lines(path: Path, rows: list) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def write_list(path: Path, rows: list) -> Path:
    path.write_text(json.dumps(rows, indent=1))
    return path


def write_hub_folder(folder: Path, configuration: str, **splits: list[dict]) -> None:
    folder.mkdir(parents=True)
    files = ""
    for split, rows in splits.items():
        write_lines(folder / f"{split}.jsonl", rows)
        files += f"  - split: {split}\n    path: {split}.jsonl\n"
    (folder / "README.md").write_text(f"---\nconfigs:\n- config_name: {configuration}\n  data_files:\n{files}---\n")
