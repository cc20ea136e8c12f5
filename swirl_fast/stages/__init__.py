"""The commands: each builds its collaborators from the config, does one stage, and leaves what the next one reads.

    collect  -> trajectories.db      judge -> verdicts in it       filter -> shards/, filter.json
    train    -> checkpoints/, metrics.jsonl, tensorboard/, model/  evaluate -> evaluations/NAME.json, NAME.db, NAME.yaml
    report   -> report.html          run   -> all of it, summary.json
    dataset  -> a folder of its own

All others lie in runs/NAME. A stage that is complete is left alone; one that was interrupted goes on. The stages read the store in
batches: the memory that they take does not grow with the tokens in it.

A command and its module have one name: `stages.filter` is the function, and `from swirl_fast.stages.filter import …` reads the module.
"""

from swirl_fast.stages.collect import collect
from swirl_fast.stages.dataset import dataset
from swirl_fast.stages.evaluate import evaluate, evaluate_trained
from swirl_fast.stages.export import export
from swirl_fast.stages.filter import filter
from swirl_fast.stages.judge import export_steps, judge, judge_against
from swirl_fast.stages.report import report
from swirl_fast.stages.run import run
from swirl_fast.stages.train import train

# In the order in which a run goes through them.
__all__ = [
    "collect",
    "judge",
    "judge_against",
    "export_steps",
    "filter",
    "train",
    "export",
    "evaluate",
    "evaluate_trained",
    "report",
    "dataset",
    "run",
]
