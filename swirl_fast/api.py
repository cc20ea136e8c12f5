"""swirl-fast from Python: settings, a run, and what a run left.

    from swirl_fast import load_config, open_run, run

    config = load_config("quickstart", ["training.steps=2"])
    run(config)
    with open_run(config) as made:
        print(made.status())

`import swirl_fast` and `open_run` load neither torch nor transformers; `run` does.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from swirl_fast.config import Config, load
from swirl_fast.outputs.run import OpenRun

__all__ = ["Config", "OpenRun", "load_config", "open_run", "run"]


def load_config(source: str | Path | Mapping[str, Any] | None = None, overrides: Sequence[str] = ()) -> Config:
    """The settings of a run, checked: defaults, then a YAML file or a table, then `section.key=value` overrides.

    Raises ConfigError, a ValueError, for a missing file, an unknown key, a wrong type or an impossible value.

        load_config("gsm8k", ["tasks.path=train.jsonl"])
        load_config({"run": {"name": "short"}, "training": {"steps": 2}})
    """
    return load(source, overrides)


def run(config: Config) -> OpenRun:
    """Every stage in order, as `swirl-fast run` does, and the run opened for reading. What is done already is not done again.

    Raises ValueError, RuntimeError or OSError, with the remedy, for what a stage fails at; called again it goes on from there.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from swirl_fast import stages  # loads torch and transformers

    stages.run(config)
    return OpenRun(config.folder)


def open_run(run: str | Path | Config) -> OpenRun:
    """The run in a folder, or the one that a config names, for reading; it may be under way. Close it, or use `with`.

    Raises ValueError where there is no such folder.

        with open_run("runs/quickstart") as run:
            frame = pandas.DataFrame(run.steps())
    """
    return OpenRun(run.folder if isinstance(run, Config) else run)
