"""A run's folder as the report finds it, made by the real parts, with texts that would break a page."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

from support.scores import scored

from swirl_fast.config import Config, TasksConfig, TrainingConfig, dump
from swirl_fast.data.filters import Candidate, select
from swirl_fast.data.store import Store
from swirl_fast.formats.tags import parse
from swirl_fast.tasks.gsm8k import GSM8K
from swirl_fast.tasks.task import Question
from swirl_fast.tools.tool import CALCULATOR
from swirl_fast.training.metrics_log import MetricsLog
from swirl_fast.trajectory import Finish, Step, Trajectory
from swirl_fast.verdict import Judgement, Verdict

JUDGE = "rules-v1"
HOSTILE = (
    "<script>alert(1)</script>",
    "</script></style></div></details><img src=x onerror=alert(1)>",
    "\" onmouseover='alert(1)' & &amp; &lt; &#60;",
    "lone \ud83d surrogate, \x00 nul, \r return, \u202e reversed",
    "\n  spaces and lines  \n\n\tkept",
    "<!-- comment <![CDATA[ ]]> --> {{7*7}} ${1}",
)


def make_task(folder: Path) -> GSM8K:
    """Twelve questions in the official format: six to train on, six held out."""
    rows = [{"question": f"What is {i} + {i} & <b>more</b>?", "answer": f"{i} + {i}\n#### {2 * i}"} for i in range(12)]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:6]))
    (folder / "eval.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[6:]))
    paths = {"path": str(folder / "train.jsonl"), "eval_path": str(folder / "eval.jsonl")}
    return GSM8K(TasksConfig(kind="gsm8k", limit=0, eval_limit=0, **paths))


def make_trajectory(
    question: Question, k: int, texts: list[str], finish: Finish | None, result: str = "1 + 1 -> 2.0"
) -> Trajectory:
    trajectory = Trajectory(f"{question.id}/{k}", question.id, question.task, question.text, k, 2, [7, 8])
    for i, text in enumerate(texts):
        start = len(trajectory.tokens)
        last = i == len(texts) - 1 and finish is not None
        step = Step(start, start + 1, text, parse(text, [CALCULATOR]), [-0.5], 0, None if last else f"{result} {i}")
        trajectory.extend([9])
        trajectory.steps.append(step)
    trajectory.finish = finish
    return trajectory


def make_store(
    path: Path, questions: list[Question], trajectories: list[Trajectory]
) -> dict[str, list[Judgement | None]]:
    """Verdicts go round GOOD, BAD, UNKNOWN over the steps; every fifth well-formed step has none. Another judge calls
    some steps GOOD. Returns what a report should say of each step by trajectory id, None for not judged."""
    expected: dict[str, list[Judgement | None]] = {}
    count = 0
    with Store(path) as store:
        store.add_questions(questions)
        store.record(trajectories)
        for trajectory in trajectories:
            expected[trajectory.id] = []
            for view, step in zip(trajectory.views(), trajectory.steps, strict=True):
                count += 1
                if step.action.kind == "malformed":
                    judgement = Judgement(Verdict.BAD, f"malformed: {step.action.error}")
                elif count % 5 == 0:
                    judgement = None
                else:
                    judgement = Judgement(list(Verdict)[count % 3], f"reason {count} {HOSTILE[count % len(HOSTILE)]}")
                    store.add_verdicts(JUDGE, {view.content_hash(): judgement})
                    if count % 2:
                        store.add_verdicts(
                            "another-judge", {view.content_hash(): Judgement(Verdict.GOOD, "not this one")}
                        )
                expected[trajectory.id].append(judgement)
    return expected


def metrics_row(step: int, **changes: float) -> dict[str, float]:
    """The numbers of a step (swirl_fast/metrics.py), every value another one."""
    row = {
        **{"step": step, "policy_version": step, "reward": 0.1 + step / 50, "process_label": 0.12 + step / 60},
        **{
            "unknown": 0.0,
            "malformed": 0.5 / step,
            "loss": -0.01 * step,
            "nll": 1.0,
            "kl": 0.001 * step,
            "entropy": 2.0 / step,
        },
        **{
            "clip_fraction": 0.0,
            "ratio_max": 1.0,
            "rank_imbalance": 1.0,
            "grad_norm": 1.0 + math.sin(step),
            "learning_rate": 2e-5,
        },
        **{
            "engine_gap_mean": 1e-6 * 2.0 ** (step % 7),
            "engine_gap_max": 1e-4 * step,
            "skipped_samples": 0,
            "states": 20.0,
            "actions": 160.0,
        },
        **{"action_length": 25.0, "action_length_good": 20.0 + step, "action_length_bad": 30.0 - step},
        **{"cut_off": 0.2 / step, "outside_tag": 0.3 / step, "repeated": 0.1 / step},
        **{"importance_truncated": 0.0, "skipped_samples": 0.0, "memory_gib": 2.5},
        **{"action_tokens": 4000.0, "tokens_computed": 5000.0 + step, "tokens_effective": 24000.0 + step},
        **{"tokens_computed_per_second": 200.0 + step, "tokens_effective_per_second": 1000.0 + 3 * step, "tflops": 0.3},
        **{"tokens_computed_per_second_per_rank": 100.0, "tokens_effective_per_second_per_rank": 500.0},
        **{"cache_hit_rate": 0.8, "cache_hit_rate_of_possible": 0.9, "judge_cache_hit_rate": 0.7},
        **{"seconds": 20.0 + step, "seconds_hidden": 0.0, "seconds_data": 0.01, "seconds_rollout": 10.0 + step},
        **{"seconds_judge": 0.02, "seconds_forward_backward": 7.0, "seconds_optimizer": 1.5},
    }
    return row | changes


@dataclass
class Made:
    folder: Path
    expected: dict[
        str, dict[str, tuple[Trajectory, list[Judgement | None]]]
    ]  # where from -> trajectory id -> what it holds
    evaluations: dict[str, dict]
    metrics: list[dict[str, float]]
    selection: list[tuple[str, int]]


def make_run(base: Path) -> Made:
    folder = base / "run <one> & 'two'"
    (folder / "evaluations").mkdir(parents=True)
    task = make_task(base)
    train, held_out = list(task.questions("train")), list(task.questions("eval"))
    collected = [
        make_trajectory(
            q, k, [f"{text}\n<math_exp>1 + {k}</math_exp>", "no tag", f"<answer>{q.answers[0]}</answer>"], Finish.ANSWER
        )
        for (q, text), k in zip(zip(train, HOSTILE, strict=True), range(6), strict=True)
    ]
    collected.append(make_trajectory(train[0], 9, ["<math_exp>2 * 2</math_exp>"], None, HOSTILE[1]))
    collected.append(
        make_trajectory(train[1], 9, ["<math_exp>3</math_exp>", "<math_exp>4</math_exp>"], Finish.STEP_LIMIT)
    )
    collected.append(make_trajectory(train[2], 9, [], Finish.CONTEXT_LIMIT))
    made = Made(folder, {}, {}, [], [])

    def add(
        name: str, path: Path, questions: list[Question], trajectories: list[Trajectory]
    ) -> dict[str, list[Judgement]]:
        expected = make_store(path, questions, trajectories)
        made.expected[name] = {t.id: (t, expected[t.id]) for t in trajectories}
        unasked = Judgement(Verdict.UNKNOWN, "")
        return {id_: [one or unasked for one in own] for id_, own in expected.items()}

    judged = add("collected", folder / "trajectories.db", train, collected)
    for name, right in (("base", 2), ("trained", 5)):
        # of the first questions base answers 0 and 1 rightly, trained 1 to 5: one is lost, four are gained
        wanted = range(right) if name == "base" else range(1, right + 1)
        answers = [q.answers[0] if i in wanted else "-1" for i, q in enumerate(held_out)]
        own = [
            make_trajectory(q, 0, [f"{name}\n<math_exp>1 + 1</math_exp>", f"<answer>{answer}</answer>"], Finish.ANSWER)
            for q, answer in zip(held_out, answers, strict=True)
        ]
        judgements = add(name, folder / "evaluations" / f"{name}.db", held_out, own)
        summary = {"name": name, "model": f"models/{name}", "judge": JUDGE, "temperature": 0.0}
        summary |= scored(task, held_out, own, judgements).summary() | {"seconds": 100.5}
        (folder / "evaluations" / f"{name}.json").write_text(json.dumps(summary))
        made.evaluations[name] = summary
    selection = select([Candidate.of(t, judged[t.id], True) for t in collected], "process")
    made.selection = selection.survivors()
    described = {"kind": "process", "kept": len(selection.kept), "total": selection.total}
    (folder / "filter.json").write_text(
        json.dumps(described | {"survivors": made.selection, "describe": selection.describe()})
    )
    config = Config()
    config.training.steps = 12
    (folder / "config.yaml").write_text(dump(config))
    (folder / "summary.json").write_text(json.dumps({"seconds": 1234.5, "note": HOSTILE[0]}))
    with MetricsLog(folder, 0, True, TrainingConfig(steps=12, tensorboard=False)) as log:
        for step in range(1, 13):
            made.metrics.append(metrics_row(step))
            log.write(made.metrics[-1])
    return made
