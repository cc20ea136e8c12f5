"""`swirl-fast STAGE --config FILE key=value …`

Exit codes: 0 done; 1 the stage failed, the message says why; 2 the command line or the config cannot work, nothing was started;
75 train wrote a checkpoint and stopped, because of SIGTERM, SIGUSR1 or training.time_limit: start it again; 130 interrupted. An
interrupted stage goes on when it is started again.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import sys
import textwrap
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from swirl_fast import __version__
from swirl_fast.config import Config, ConfigError, load
from swirl_fast.config.fields import sections
from swirl_fast.exits import EXIT_RESUMABLE, Resumable

# What a stage does with the config: `stages` is handed in because it imports torch and transformers, which only a checked config is worth.
_Call = Callable[[Any, Config, argparse.Namespace], object]

# The sections that each stage reads; a subsection such as judge.model goes with its section.
READS = {
    "collect": ("run", "model", "actions", "tasks", "tools", "search", "engine", "collect", "training"),
    "judge": ("run", "model", "actions", "tasks", "collect", "judge", "filter"),
    "filter": ("run", "model", "actions", "tasks", "engine", "collect", "judge", "filter", "training"),
    "train": (
        "run",
        "model",
        "actions",
        "tasks",
        "tools",
        "search",
        "engine",
        "collect",
        "judge",
        "algorithm",
        "training",
    ),
    "export": ("run", "model", "training"),
    "evaluate": (
        *("run", "model", "actions", "tasks", "tools", "search", "engine", "collect", "judge", "training", "evaluate"),
    ),
    "report": ("run",),
    "run": tuple(name for name in sections(Config) if "." not in name),
}


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="swirl-fast", description="Step-Wise Reinforcement Learning of language models that use tools."
    )
    top.add_argument("--version", action="version", version=f"swirl-fast {__version__}")
    commands = top.add_subparsers(dest="stage", required=True, metavar="STAGE")

    def add(name: str, text: str, call: _Call) -> argparse.ArgumentParser:
        stage = _command(commands, name, text, _epilog(name))
        stage.add_argument("--config", metavar="FILE", help="a YAML file, or a name that `swirl-fast configs` lists")
        stage.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. training.steps=20")
        stage.add_argument(
            "--dry-run", action="store_true", help="check everything and say what would be done; loads no weights"
        )
        stage.set_defaults(run=lambda options: _run_stage(call, options))
        return stage

    add(
        "collect",
        "questions -> trajectories, with the real tools; may be started by torchrun",
        lambda stages, config, options: stages.collect(config),
    )
    _add_judge_options(add("judge", "a process verdict on every step; may be started by torchrun", _judge))
    add(
        "filter",
        "keep trajectories, write MosaicML shards",
        lambda stages, config, options: stages.filter(config),
    )
    add(
        "train",
        "step-wise RL on the shards; may be started by torchrun",
        lambda stages, config, options: stages.train(config),
    )
    export = add(
        "export",
        "the weights of a checkpoint, such as the best one, as a Hugging Face folder",
        lambda stages, config, options: stages.export(
            config, options.checkpoint, options.out, options.dtype, options.adapter
        ),
    )
    export.add_argument("--checkpoint", default="best", metavar="best|step_N", help="which (default: best)")
    export.add_argument("--out", metavar="FOLDER", help="default: model-CHECKPOINT (adapter-…) in the run's folder")
    form = export.add_mutually_exclusive_group()
    form.add_argument("--adapter", action="store_true", help="with model.lora: the adapters alone, as peft loads them")
    form.add_argument(
        "--merged", action="store_true", help="with model.lora: the model with its adapters in it (default)"
    )
    types = ("source", "float32", "bfloat16", "float16")
    export.add_argument("--dtype", choices=types, help="of the weights (default: training.export_dtype)")
    evaluate = add(
        "evaluate", "held-out questions, by the base or the trained model; may be started by torchrun", _evaluate
    )
    evaluate.add_argument(
        "--of", default="trained", metavar="base|trained|FOLDER", help="whose weights (default: trained)"
    )
    evaluate.add_argument("--name", help="name of the evaluation (default: base, trained or the folder's name)")
    add("report", "one HTML file about the run", lambda stages, config, options: stages.report(config))
    add("run", "all of it, base -> trained", lambda stages, config, options: stages.run(config))
    _add_reading(commands)
    _add_dataset(commands)
    _add_experiment(commands)
    _add_config(commands)
    _add_configs(commands)
    _add_doctor(commands)
    _add_completion(commands)
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    """arguments: None for those of the command line."""
    if arguments is None and sys.getfilesystemencoding() != "utf-8":
        _restart_in_utf8()
    options = _parsed(arguments)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        code: int = options.run(options)
        return code
    except ConfigError as error:
        print(f"swirl-fast {options.stage}: {error}", file=sys.stderr)
        return 2
    except (ValueError, ImportError, OSError, RuntimeError, FloatingPointError) as error:
        if os.environ.get("SWIRL_FAST_TRACEBACK"):
            raise
        print(f"swirl-fast {options.stage}: {error}\n(SWIRL_FAST_TRACEBACK=1 shows where)", file=sys.stderr)
        return 1
    except Resumable as stop:
        print(f"swirl-fast {options.stage}: {stop}", file=sys.stderr)
        return EXIT_RESUMABLE
    except KeyboardInterrupt:
        print(f"swirl-fast {options.stage}: interrupted; start it again to go on", file=sys.stderr)
        return 130


def _restart_in_utf8() -> None:
    """Does not return. In the C locale without Python's UTF-8 mode, names of files that are not ASCII could be neither read nor written."""
    os.environ["PYTHONUTF8"] = "1"
    os.execv(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]])


def _parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Leaves with exit code 2 for a command line that cannot work."""
    top = parser()
    options, rest = top.parse_known_args(arguments)
    # argparse takes positional arguments in one run only: those after an option come as the rest
    options.overrides += rest
    for word in options.overrides:
        if word.startswith("--") and "=" in word:
            top.error(f"unknown argument {word}; a setting is written without dashes: {word.lstrip('-')}")
        if word.startswith("-"):
            top.error(f"unknown argument {word}")
    if options.stage == "judge" and options.out and not options.against:
        top.error("--out names the report of --against; give that as well")
    if options.stage == "judge" and options.count < 1:
        top.error(f"--count {options.count}: must be at least 1")
    if options.stage == "evaluate" and not options.of:
        top.error("--of '': must be base, trained, or a Hugging Face folder with weights")
    for name, value in vars(options).items():
        if value == "":
            top.error(f"--{name.replace('_', '-')} '': is empty; leave it out, or give a value")
    if "" in options.overrides:
        top.error("an argument '' is empty; leave it out")
    if options.stage == "show" and options.limit < 1:
        top.error(f"--limit {options.limit}: must be at least 1")
    if options.stage == "show" and options.trajectory is not None and options.question is not None:
        top.error("--trajectory and --question: give one of them")
    return options


def _command(commands: Any, name: str, text: str, epilog: str) -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = commands.add_parser(
        name, help=text, description=text, epilog=epilog, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    return command


def _epilog(name: str) -> str:
    return textwrap.fill(
        f"settings: {name} reads the sections {', '.join(READS[name])}. `swirl-fast config` lists all keys with their meaning, "
        "`swirl-fast config SECTION` or `swirl-fast config KEY` a part; --config and key=value show the values that they give.",
        width=100,
    )


def _run_stage(call: _Call, options: argparse.Namespace) -> int:
    config = load(options.config, options.overrides)
    if options.stage == "train":
        from swirl_fast.outputs.ready import check_shards

        check_shards(config)
    # torch and transformers load here, after the config has been checked
    from swirl_fast import stages

    _quiet_transformers()
    if options.dry_run:
        from swirl_fast.stages.dry_run import dry_run

        if found := dry_run(config, options.stage, vars(options)):
            print(found)
        return 0
    call(stages, config, options)
    return 0


def _add_judge_options(stage: argparse.ArgumentParser) -> None:
    other = stage.add_mutually_exclusive_group()
    other.add_argument("--against", metavar="FILE", help="how far the judge agrees with labelled steps; needs no run")
    other.add_argument("--export-steps", metavar="FILE", help="steps of the run, drawn at random, to be labelled")
    stage.add_argument("--out", metavar="FILE", help="of --against (default: agreement.json in the run's folder)")
    stage.add_argument("--count", type=int, default=200, metavar="N", help="of --export-steps (default: 200)")


def _judge(stages: Any, config: Config, options: argparse.Namespace) -> None:
    if options.against:
        stages.judge_against(config, options.against, options.out)
    elif options.export_steps:
        stages.export_steps(config, options.export_steps, options.count)
    else:
        stages.judge(config)


def _evaluate(stages: Any, config: Config, options: argparse.Namespace) -> None:
    from swirl_fast.stages.evaluate import named_weights

    stages.evaluate(config, *named_weights(config, options.of, options.name))


def _about_a_run(commands: Any, name: str, text: str) -> argparse.ArgumentParser:
    """A command that reads a run's folder."""
    command = _command(commands, name, text, "RUN may be under way; nothing in its folder is changed.")
    command.add_argument("--config", metavar="FILE", help="a YAML file whose run is meant where no RUN is named")
    command.add_argument(
        "overrides", nargs="*", metavar="RUN", help="a run's folder or its name under run.folder; or key=value settings"
    )
    return command


def _add_reading(commands: Any) -> None:
    status = _about_a_run(commands, "status", "which stages of a run are done, what comes next, and the numbers so far")
    status.add_argument("--json", action="store_true", help="for programs: as one JSON object")
    status.set_defaults(run=_status)
    show = _about_a_run(commands, "show", "trajectories of a run, or the actions that a training step sampled, as text")
    show.add_argument("--trajectory", metavar="ID", help="one trajectory, step by step")
    show.add_argument("--question", metavar="ID", help="the trajectories of one question, step by step")
    show.add_argument("--step", type=int, metavar="N", help="the actions that training step N sampled")
    show.add_argument(
        "--of", default="collected", metavar="collected|NAME", help="of the evaluation NAME (default: collected)"
    )
    show.add_argument("--limit", type=int, default=10, metavar="N", help="how many are shown (default: 10)")
    show.set_defaults(run=_show)


def _status(options: argparse.Namespace) -> int:
    from swirl_fast.api import open_run
    from swirl_fast.outputs.text import clean

    with open_run(_run_folder(options)) as run:
        found = run.status()
        _write([json.dumps(clean(found.to_json())) if options.json else str(found)])
    return 0


def _show(options: argparse.Namespace) -> int:
    from swirl_fast.api import open_run
    from swirl_fast.outputs import show

    with open_run(_run_folder(options)) as run:
        if options.step is not None:
            _write(
                show.samples(
                    run, options.step, options.limit, trajectory=options.trajectory, question_id=options.question
                )
            )
        elif options.trajectory is not None:
            _write(show.trajectory(run, options.trajectory, options.of))
        elif options.question is not None:
            _write(show.question(run, options.question, options.of, options.limit))
        else:
            _write(show.overview(run, options.of, options.limit))
    return 0


def _run_folder(options: argparse.Namespace) -> Path:
    from swirl_fast.outputs.run import find_run

    names = [word for word in options.overrides if "=" not in word or os.path.isdir(word)]
    if len(names) > 1:
        raise ConfigError(f"{' '.join(names)}: give one run; a setting is written as section.key=value")
    config = load(options.config, [word for word in options.overrides if word not in names], files=False)
    return find_run(names[0] if names else None, config)


def _write(lines: Iterable[str]) -> None:
    """Lines to the screen. A reader that has seen enough, such as head, ends the command without a word."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # for a terminal that does not know all characters
    try:
        for line in lines:
            print(line)
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is still buffered goes nowhere


def _add_dataset(commands: Any) -> None:
    data = _about_a_run(commands, "dataset", "a run's trajectories as JSON Lines for other trainers")
    data.add_argument(
        "--as",
        dest="kind",
        required=True,
        choices=("messages", "steps", "prm", "pairs", "jsonl"),
        help="messages: conversations. steps: stepwise supervision with true and false. prm: the same with rewards. pairs: a GOOD and a "
        "BAD action of one state. jsonl: all that is recorded, a trajectory a row",
    )
    data.add_argument("--out", required=True, metavar="FOLDER", help="a new folder: the rows and a README.md")
    which = data.add_mutually_exclusive_group()
    which.add_argument("--kept", action="store_true", help="only trajectories that the filter kept")
    which.add_argument("--all", action="store_true", help="all finished trajectories (the default)")
    data.add_argument(
        "--from-question",
        action="store_true",
        help="messages, pairs: without the system message and the worked examples, which are read off the run's settings",
    )
    data.add_argument("--replace", action="store_true", help="put the new folder in the place of one that is there")
    data.set_defaults(run=_dataset)


def _dataset(options: argparse.Namespace) -> int:
    from swirl_fast.api import open_run

    with open_run(_run_folder(options)) as run:
        from swirl_fast import stages  # loads torch and transformers

        stages.dataset(
            run, options.kind, options.out, kept=options.kept, whole=not options.from_question, replace=options.replace
        )
    return 0


def _add_experiment(commands: Any) -> None:
    text = (
        "a grid of runs with several seeds, compared in one table and one HTML file; started twice it shares the work"
    )
    grid = _command(
        commands, "experiment", text, "settings: those of a run; `swirl-fast config` lists all keys with their meaning."
    )
    grid.add_argument("file", metavar="FILE", help="a YAML file, or a name that `swirl-fast configs` lists")
    grid.add_argument("overrides", nargs="*", metavar="key=value", help="for all runs, e.g. training.steps=2")
    grid.add_argument("--arms", metavar="A,B,…", help="do the cells of these arms only; the others are left for later")
    grid.add_argument("--seeds", metavar="0,1,…", help="do the cells of these seeds only")
    grid.add_argument("--report", action="store_true", help="only table and report, from the cells that are done")
    grid.set_defaults(run=_experiment)


def _experiment(options: argparse.Namespace) -> int:
    from swirl_fast.experiments.grid import chosen, read_experiment

    experiment = read_experiment(options.file, options.overrides)
    from swirl_fast.experiments.run import run_experiment, write_outputs

    cells = chosen(experiment, options.arms, options.seeds)
    if options.report:
        if len(cells) < len(experiment.cells):
            raise ConfigError("--report is of all cells that are done; leave --arms and --seeds out")
        write_outputs(experiment)
        return 0
    _quiet_transformers()
    missing = run_experiment(experiment, cells)
    for cell in missing:
        print(f"swirl-fast experiment: not done: {cell}", file=sys.stderr)
    return 1 if missing else 0


def _add_config(commands: Any) -> None:
    text = "what the settings mean, which values they accept, and what they are here"
    command = _command(commands, "config", text, "sections: " + ", ".join(sections(Config)))
    command.add_argument("--config", metavar="FILE", help="a YAML file whose values are shown")
    command.add_argument("--changed", action="store_true", help="only what differs from the defaults, a line a setting")
    command.add_argument(
        "overrides",
        nargs="*",
        metavar="SECTION|KEY|key=value",
        help="what to show (default: everything); key=value goes on top of the file",
    )
    command.set_defaults(run=_config)


def _config(options: argparse.Namespace) -> int:
    from swirl_fast.config.describe import describe

    names = [word for word in options.overrides if "=" not in word]
    config = load(options.config, [word for word in options.overrides if "=" in word], files=False)
    if text := describe(names, config, changed=options.changed):
        _write([text])
    else:
        print("swirl-fast config: nothing differs from the defaults", file=sys.stderr)
    return 0


def _add_configs(commands: Any) -> None:
    command = _command(commands, "configs", "the configs, experiments and chat templates that are shipped", "")
    command.set_defaults(run=_configs, overrides=[])


def _configs(options: argparse.Namespace) -> int:
    from swirl_fast.config.shipped import listing

    if options.overrides:
        raise ConfigError(f"{' '.join(options.overrides)}: this command takes no arguments; it lists what is there")
    _write([listing()])
    return 0


def _add_doctor(commands: Any) -> None:
    text = "what this machine has and lacks for a run, with what to do about it"
    command = _command(commands, "doctor", text, "marks: ok; -- only some runs need it; NO to be mended (exit code 1)")
    command.add_argument("--config", metavar="FILE", help="also what this run needs: endpoints, ports, SGLang")
    command.add_argument("overrides", nargs="*", metavar="key=value", help="settings on top of it")
    command.set_defaults(run=_doctor)


def _doctor(options: argparse.Namespace) -> int:
    from swirl_fast.doctor import examine

    given = options.config or options.overrides
    worst = 0
    for finding in examine(load(options.config, options.overrides, files=False) if given else None):
        print(finding, flush=True)
        worst |= finding.mark == "NO"
    return int(worst)


def _add_completion(commands: Any) -> None:
    from swirl_fast.config.completion import SHELLS

    text = "a script that completes commands, settings and names: source <(swirl-fast completion bash)"
    command = _command(commands, "completion", text, "")
    command.add_argument("shell", choices=SHELLS)
    command.set_defaults(run=_completion, overrides=[])


def _completion(options: argparse.Namespace) -> int:
    from swirl_fast.config.completion import SHELLS, keys, script

    (commands,) = (action for action in parser()._actions if isinstance(action, argparse._SubParsersAction))
    words: dict[str, list[str]] = {}
    for name, command in commands.choices.items():
        flags = [flag for action in command._actions for flag in action.option_strings if flag.startswith("--")]
        takes = any(action.dest == "overrides" for action in command._actions)
        words[name] = [*flags, *(keys() if takes else []), *(SHELLS if name == "completion" else [])]
    _write([script(options.shell, words)])
    return 0


def _quiet_transformers() -> None:
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
