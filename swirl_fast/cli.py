"""`swirl-fast STAGE --config FILE key=value …`

Exit codes: 0 done; 1 the stage failed, the message says why; 2 the command line or the config cannot work, nothing was started;
75 train wrote a checkpoint and stopped, because of SIGTERM, SIGUSR1 or training.time_limit: start it again; 130 interrupted. An
interrupted stage goes on when it is started again.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from swirl_fast import __version__
from swirl_fast.config import ConfigError, load
from swirl_fast.exits import EXIT_RESUMABLE, Resumable

_STAGES = {
    "collect": "questions -> trajectories, with the real tools",
    "judge": "a process verdict on every step",
    "filter": "keep trajectories, write MosaicML shards",
    "train": "step-wise RL on the shards; may be started by torchrun",
    "export": "the weights of a checkpoint, such as the best one, as a Hugging Face folder",
    "evaluate": "held-out questions, by the base or the trained model",
    "report": "one HTML file about the run",
    "run": "all of it, base -> trained",
}


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="swirl-fast", description="Step-Wise Reinforcement Learning of language models that use tools."
    )
    top.add_argument("--version", action="version", version=f"swirl-fast {__version__}")
    stages = top.add_subparsers(dest="stage", required=True, metavar="STAGE")
    for name, text in _STAGES.items():
        stage = stages.add_parser(name, help=text, description=text)
        stage.add_argument("--config", metavar="FILE", help="a YAML file; ready ones lie in configs/")
        stage.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. training.steps=20")
        if name == "judge":
            other = stage.add_mutually_exclusive_group()
            other.add_argument(
                "--against", metavar="FILE", help="how far the judge agrees with labelled steps; needs no run"
            )
            other.add_argument(
                "--export-steps", metavar="FILE", help="steps of the run, drawn at random, to be labelled"
            )
            stage.add_argument(
                "--out", metavar="FILE", help="of --against (default: agreement.json in the run's folder)"
            )
            stage.add_argument("--count", type=int, default=200, metavar="N", help="of --export-steps (default: 200)")
        if name == "export":
            stage.add_argument("--checkpoint", default="best", metavar="best|step_N", help="which (default: best)")
            stage.add_argument("--out", metavar="FOLDER", help="default: model-CHECKPOINT in the run's folder")
        if name == "evaluate":
            stage.add_argument(
                "--of", default="trained", metavar="base|trained|FOLDER", help="whose weights (default: trained)"
            )
            stage.add_argument("--name", help="name of the evaluation (default: base, trained or the folder's name)")
    text = (
        "a grid of runs with several seeds, compared in one table and one HTML file; started twice it shares the work"
    )
    grid = stages.add_parser("experiment", help=text, description=text)
    grid.add_argument("file", metavar="FILE", help="a YAML file; ready ones lie in configs/experiments/")
    grid.add_argument("overrides", nargs="*", metavar="key=value", help="for all runs, e.g. training.steps=2")
    grid.add_argument("--report", action="store_true", help="only table and report, from the cells that are done")
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    options, rest = parser().parse_known_args(arguments)
    if wrong := [one for one in rest if one.startswith("-") or "=" not in one]:
        parser().error(f"unknown arguments: {' '.join(wrong)}")
    if options.stage == "judge" and options.out and not options.against:
        parser().error("--out names the report of --against; give that as well")
    if options.stage == "judge" and options.count < 1:
        parser().error(f"--count {options.count}: must be at least 1")
    options.overrides += rest  # those behind an option: argparse takes positional arguments in one run only
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        if options.stage == "experiment":
            return _experiment(options)
        config = load(options.config, options.overrides)
        from swirl_fast import stages  # torch and transformers load here, after the config has been checked

        _quiet_transformers()
        if options.stage == "export":
            stages.export(config, options.checkpoint, options.out)
        elif options.stage == "evaluate":
            if options.of == "base":
                stages.evaluate(config, options.name or "base")
            elif options.of == "trained":
                stages.evaluate_trained(config, options.name or "trained")
            else:
                stages.evaluate(config, options.name or os.path.basename(os.path.normpath(options.of)), options.of)
        elif options.stage == "judge" and options.against:
            stages.judge_against(config, options.against, options.out)
        elif options.stage == "judge" and options.export_steps:
            stages.export_steps(config, options.export_steps, options.count)
        else:
            getattr(stages, options.stage)(config)
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
    return 0


def _experiment(options: argparse.Namespace) -> int:
    from swirl_fast.experiments.run import read_experiment, run_experiment, write_outputs

    experiment = read_experiment(options.file, options.overrides)
    if options.report:
        write_outputs(experiment)
        return 0
    _quiet_transformers()
    missing = run_experiment(experiment)
    for cell in missing:
        print(f"swirl-fast experiment: not done: {cell}", file=sys.stderr)
    return 1 if missing else 0


def _quiet_transformers() -> None:
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
