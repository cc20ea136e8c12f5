"""A run's folder as its stages would leave it, with judged trajectories, metrics and samples, without a model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from swirl_fast.config import dump, load
from swirl_fast.data.store import Store
from swirl_fast.formats.tags import parse
from swirl_fast.tasks import load_task
from swirl_fast.tasks.task import Question
from swirl_fast.tools.tool import CALCULATOR
from swirl_fast.trajectory import Finish, Step, Trajectory
from swirl_fast.verdict import Judgement, Verdict

JUDGE = "a-judge"
HOSTILE = "\x1b[2J\x1b]0;owned\x07 \u202e reversed, \r return, lone \ud83d, \x9b31m"
GOOD, BAD, UNKNOWN = (Judgement(verdict, f"{verdict.value}, for a reason") for verdict in Verdict)
CALL, OTHER = "<math_exp>1 + 1</math_exp>", "<math_exp>2 + 2</math_exp>"


def made(question: Question, k: int, texts: Sequence[str], finished: bool = True) -> Trajectory:
    """Each action one token, each observation one."""
    one = Trajectory(f"{question.id}/{k}", question.id, question.task, question.text, k, 2, [7, 8])
    for i, text in enumerate(texts):
        last = finished and i == len(texts) - 1
        start = len(one.tokens)
        observation = None if last else f"call {i} -> {i}.0"
        one.steps.append(Step(start, start + 1, text, parse(text, [CALCULATOR]), [-0.5], 0, observation))
        one.extend([9] if last else [9, 10])
    if finished:
        one.finish = Finish.ANSWER if one.answer is not None else Finish.STEP_LIMIT
    return one


def run_folder(base: Path, *more: str) -> Path:
    """base/r, of three questions with two trajectories each and another that is not finished.

    Trajectory 0 of a question is right, and all its steps are GOOD. Trajectory 1 is wrong: a BAD call, a malformed step that holds
    HOSTILE, an UNKNOWN call, and an answer with the reward 0.25. Training has done 2 of 4 steps; the samples of step 2 are four actions at
    state 1 of the first trajectory: two GOOD, one BAD, one UNKNOWN.
    """
    config = load(
        None,
        [f"run.folder={base}", "run.name=r", "tasks.limit=3", "tasks.eval_limit=1", "tasks.max_steps=4"]
        + ["collect.trajectories_per_question=2", "training.steps=4", "filter.kind=none", *more],
    )
    folder = base / "r"
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(dump(config), encoding="utf-8")
    questions = load_task(config.tasks, config.run.seed).questions("train")
    with Store(folder / "trajectories.db") as store:
        store.add_questions(questions)
        for question in questions:
            right = made(question, 0, [CALL, f"<answer>{question.answers[0]}</answer>"])
            wrong = made(question, 1, [OTHER, f"no tag {HOSTILE}", CALL, "<answer>-1</answer>"])
            store.record([right, wrong])
            keys = [*right.content_hashes(), *wrong.content_hashes()]
            graded = Judgement.graded(0.25, "hardly")
            judgements = dict(zip(keys, [GOOD, GOOD, BAD, None, UNKNOWN, graded], strict=True))
            store.add_verdicts(JUDGE, {key: judgement for key, judgement in judgements.items() if judgement})
        store.record([made(questions[0], 7, [CALL], finished=False)])
    (folder / "filter.json").write_text(
        json.dumps({"kind": "none", "judge": JUDGE, "kept": 6, "total": 6}), encoding="utf-8"
    )
    rows = ({"step": step, "reward": step / 8, "kl": None} for step in (1, 2))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    write_samples(folder, 2, questions[0], state=1)
    return folder


def write_samples(folder: Path, step: int, question: Question, state: int) -> None:
    texts = ["<answer>1</answer>", f"<answer>{question.answers[0]}</answer>", "<answer>3</answer>", f"no {HOSTILE}"]
    lines = []
    for i, (text, judgement) in enumerate(zip(texts, [UNKNOWN, GOOD, GOOD, BAD], strict=True)):
        action = parse(text, [CALCULATOR])
        row = {
            "step": step,
            "place": 0,
            "trajectory": f"{question.id}/0",
            "question_id": question.id,
            "task": question.task,
        }
        row |= {
            "question": question.text,
            "state": state,
            "sample": i,
            "text": text,
            "kind": action.kind,
            "tool": action.tool,
        }
        row |= {
            "argument": action.argument,
            "error": action.error,
            "tokens": 5,
            "cut_off": False,
            "policy_version": step - 1,
        }
        row |= {"observation": None, "verdict": judgement.verdict.value, "reward": judgement.reward}
        row |= {"reason": judgement.reason, "advantage": None if judgement.reward is None else judgement.reward - 0.5}
        lines.append(json.dumps(row) + "\n")
    path = folder / "samples" / f"step_{step:06d}.jsonl"
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(lines), encoding="utf-8")
