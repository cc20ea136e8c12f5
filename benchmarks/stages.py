"""How long do judge, filter and report take for many trajectories, and does their memory stay small however many there are?

    python -m benchmarks.stages --trajectories 2000 10000 50000 --out benchmarks/results/DATE-stages.json

For each number N a store of N trajectories is made, five a question, of 3,000 tokens and 5 steps: a prompt of 900 tokens, actions of 400 (a
thought and a call, or the answer), results of 25. The questions add five numbers; the trajectories solve them in one of six ways (WAYS), so
that verdicts, endings and answers differ. Then the stages run as a user starts them, each in a process of its own:

    judge     the rules judge on every step, into the store
    filter    filter.kind=process, and the shards of the trajectories that are kept
    report    the HTML files: 40 of the trajectories in the first, all of them on the pages beside it

Memory: the largest resident size of the process, less what it had after its imports and before the stage. The writer of shards holds one
shard of 64 MiB, and copies it to write it. cpu_seconds are those of the processor, which other work beside it changes less than the time
on the clock (seconds). Read with care: the store lies in the page cache, its tokens are
random and its texts are words without meaning.
Not measured: collecting, model judges (whose endpoint takes the time), training.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from benchmarks.environment import environment
from swirl_fast.config import Config, load
from swirl_fast.data.store import BATCH, Store
from swirl_fast.files import read_json, write_json
from swirl_fast.formats.tags import parse
from swirl_fast.stages.build import build_task
from swirl_fast.tasks.task import Question
from swirl_fast.tools.tool import CALCULATOR
from swirl_fast.trajectory import Finish, Step, Trajectory

SEED = 0
PER_QUESTION = 5
PROMPT, ACTION, RESULT, STEPS = 900, 400, 25, 5
TOKENS = PROMPT + STEPS * ACTION + (STEPS - 1) * RESULT
STAGES = ("judge", "filter", "report")
WAYS = ("right", "wrong answer", "number from nowhere", "repeated call", "malformed call", "no answer")
WORDS = ["".join(random.Random(n).choices("abcdefghijklmnopqrstuvwxyz", k=2 + n % 9)) for n in range(2000)]
MIB = 1 << 20


# ---- the data


def settings(folder: Path, trajectories: int) -> list[str]:
    """The settings of the run `r` in the folder."""
    return [
        f"run.folder={folder}",
        "run.name=r",
        "tasks.kind=gsm8k",
        f"tasks.path={folder / 'train.jsonl'}",
        f"tasks.eval_path={folder / 'eval.jsonl'}",
        f"tasks.limit={-(-trajectories // PER_QUESTION)}",
        f"collect.trajectories_per_question={PER_QUESTION}",
        "filter.kind=process",
    ]


def write_questions(folder: Path, count: int) -> None:
    draw = random.Random(SEED)
    for name, number in (("train", count), ("eval", 1)):
        with open(folder / f"{name}.jsonl", "w", encoding="utf-8") as file:
            for i in range(number):
                a, b, c, d, e = (draw.randint(2, 999) for _ in range(5))
                text = f"Shop {name}-{chr(97 + i % 26)} sells {a} apples, {b} pears, {c} plums, {d} figs and {e} nuts. How many are that?"
                row = {"question": text, "answer": f"They are added.\n#### {a + b + c + d + e}"}
                file.write(json.dumps(row) + "\n")


def calls(question: Question, way: str) -> tuple[list[str], list[str]]:
    """What stands in the tags of the four calls and the answer, and the results of the calls."""
    numbers = [int(word) for word in question.text.split() if word.isdigit()]
    total, texts, results = numbers[0], [], []
    for number in numbers[1:]:
        texts.append(f"<math_exp>{total} + {number}</math_exp>")
        total += number
        results.append(f"{total - number} + {number} -> {total}.0")
    texts.append(f"<answer>{total + (way == 'wrong answer')}</answer>")
    if way == "number from nowhere":
        texts[1], results[1] = "<math_exp>12345 + 67</math_exp>", "12345 + 67 -> 12412.0"
    elif way == "repeated call":
        texts[2], results[2] = texts[1], results[1]
    elif way == "malformed call":
        texts[1], results[1] = "I would add them.", "ERROR: no tag"
    elif way == "no answer":
        texts[-1] = texts[0]
    return texts, results


def make_trajectories(questions: Sequence[Question], count: int) -> Iterator[Trajectory]:
    """In the order of their ids; the ways take turns."""
    draw, numbers = random.Random(SEED), np.random.default_rng(SEED)
    for number in range(count):
        question, way = questions[number // PER_QUESTION], WAYS[number % len(WAYS)]
        texts, results = calls(question, way)
        steps = []
        for i, tagged in enumerate(texts):
            start = PROMPT + i * (ACTION + RESULT)
            text = f"{' '.join(draw.choices(WORDS, k=170))}.\n{tagged}"
            logprobs = np.log(numbers.uniform(0.05, 1, ACTION).astype(np.float32)).tolist()
            observation = results[i] if i < len(results) else None
            steps.append(Step(start, start + ACTION, text, parse(text, [CALCULATOR]), logprobs, 0, observation))
        tokens = numbers.integers(0, 49_152, TOKENS).astype(np.int32)
        finish = Finish.STEP_LIMIT if way == "no answer" else Finish.ANSWER
        id_ = f"{question.id}/{number % PER_QUESTION}"
        yield Trajectory(id_, question.id, question.task, question.text, number, PROMPT, tokens, steps, finish)


def write_run(folder: Path, count: int) -> Config:
    """The questions, and the store as `collect` leaves it."""
    write_questions(folder, -(-count // PER_QUESTION))
    config = load(None, settings(folder, count))
    questions = build_task(config).questions("train")
    with Store(config.store) as store, tqdm(desc="store", total=count, disable=None, leave=False) as bar:
        store.add_questions(questions)
        batch: list[Trajectory] = []
        for trajectory in make_trajectories(questions, count):
            batch.append(trajectory)
            if len(batch) == BATCH:
                store.record(batch)
                bar.update(len(batch))
                batch = []
        store.record(batch)
    return config


# ---- measuring


def measure(stage: str, folder: Path, trajectories: int) -> dict[str, float]:
    """Runs one stage in this process. seconds, mib: its peak above what the imports took."""
    from swirl_fast import stages

    config = load(None, settings(folder, trajectories))
    imported = _resident("VmRSS")
    start, worked = time.perf_counter(), time.process_time()
    command: Callable[[Config], None] = getattr(stages, stage)
    command(config)
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - worked
    return {
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "mib": (_resident("VmHWM") - imported) / MIB,
        "mib_imports": imported / MIB,
    }


def _resident(field: str) -> int:
    """VmRSS: bytes in memory now; VmHWM: at most so far. getrusage would tell that of the parent, where it is larger."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def measure_apart(stage: str, folder: Path, trajectories: int) -> dict[str, float]:
    """As `measure`, in a process of its own."""
    arguments = ["--stage", stage, "--folder", str(folder), "--trajectories", str(trajectories)]
    command = [sys.executable, "-m", "benchmarks.stages", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    if done.returncode:
        raise RuntimeError(f"{stage} of {trajectories} trajectories failed:\n{done.stdout}{done.stderr}")
    row: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return row


def measure_all(count: int) -> dict[str, Any]:
    """The stages, one after the other, on a store of `count` trajectories."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        start = time.perf_counter()
        config = write_run(folder, count)
        row: dict[str, Any] = {"seconds_store": time.perf_counter() - start, "bytes_store": _bytes(config.store)}
        for stage in STAGES:
            row[stage] = measure_apart(stage, folder, count)
            row[stage]["cpu_seconds_per_1000"] = 1000 * row[stage]["cpu_seconds"] / count
        shards = sum(_bytes(path) for path in (config.folder / "shards").glob("*.mds"))
        row |= {"bytes_shards": shards, "kept": read_json(config.folder / "filter.json")["kept"]}
    return row


def _bytes(path: Path) -> int:
    return path.stat().st_size


def options_of(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trajectories", type=int, nargs="+", metavar="N", help="default 2000 10000 50000")
    parser.add_argument("--quick", action="store_true", help="200 and 1000 trajectories, where --trajectories is unset")
    parser.add_argument("--out", type=Path, help="JSON, rewritten after every N")
    parser.add_argument(
        "--stage", choices=STAGES, help="only this stage, in this process, on --folder: used by the benchmark"
    )
    parser.add_argument("--folder", type=Path, help="of --stage")
    options = parser.parse_args(arguments)
    options.trajectories = options.trajectories or ([200, 1000] if options.quick else [2000, 10_000, 50_000])
    if (least := min(options.trajectories)) < 1:
        parser.error(f"--trajectories {least}: must be above 0")
    if options.stage is None and (options.out is None or not options.out.absolute().parent.is_dir()):
        parser.error(f"--out {options.out}: give a file in a folder that exists")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    options = options_of(arguments)
    if options.stage is not None:
        print(json.dumps(measure(options.stage, options.folder, options.trajectories[0])))
        return
    result: dict[str, Any] = {
        "environment": environment(),
        "settings": {"tokens": TOKENS, "steps": STEPS, "per_question": PER_QUESTION, "seed": SEED, "ways": WAYS},
        "results": {},
    }
    print(f"{'trajectories':>12}" + "".join(f"{stage + ' s':>12}{'MiB':>8}" for stage in STAGES) + f"{'kept':>10}")
    for count in options.trajectories:
        row = result["results"][str(count)] = measure_all(count)
        write_json(options.out, result)
        cells = "".join(f"{row[stage]['cpu_seconds']:>12.1f}{row[stage]['mib']:>8.0f}" for stage in STAGES)
        print(f"{count:>12}{cells}{row['kept']:>10}", flush=True)
    print(options.out)


if __name__ == "__main__":
    main()
