"""Verdicts on the collected steps, into runs/NAME/trajectories.db; and how far a judge agrees with labels."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from swirl_fast.config import Config, ConfigError
from swirl_fast.config.rubric import read_rubric, rubric_hash
from swirl_fast.data.store import Store
from swirl_fast.files import write_json
from swirl_fast.judges.agreement import agreement, describe
from swirl_fast.judges.cached import judge_missing, judge_steps, judged_trajectories
from swirl_fast.judges.labels import read_labels, steps_to_label, write_labels
from swirl_fast.judges.outcome import judge_outcomes
from swirl_fast.stages.build import build_task, labels_judge, questions_by_id, task_judge
from swirl_fast.stages.collect import collected_ids
from swirl_fast.tasks import offered_tools
from swirl_fast.tools import describe_tools
from swirl_fast.tools.tool import BUILT_IN
from swirl_fast.verdict import Verdict


def judge(config: Config) -> None:
    task = build_task(config)
    Store(config.store, writable=False).close()  # says so when nothing was collected yet
    with task_judge(config, task) as process_judge, Store(config.store) as store:
        ids = collected_ids(config, task, store, "judge")
        judge_steps(process_judge, store, ids, "judge", recorded=True)
        stats = process_judge.stats()
        counts: Counter[Verdict] = Counter()
        total, graded = 0.0, False
        for _, judgements in judged_trajectories(store, process_judge.id, ids):
            counts.update(judgement.verdict for judgement in judgements)
            rewards = [judgement.reward for judgement in judgements if judgement.reward is not None]
            total += sum(rewards)
            graded |= not {0.0, 1.0}.issuperset(rewards)
        if config.filter.outcome == "judge" and "outcome" in config.filter.kind:
            questions = questions_by_id(task.questions("train"))
            judge_outcomes(config.judge.model, store, store.trajectories(ids), questions)
    shares = ", ".join(f"{counts[kind]} {kind.value}" for kind in Verdict)
    known = counts.total() - counts[Verdict.UNKNOWN]
    mean = f"; mean reward {total / known:.3f}" if graded else ""
    print(f"judge: {counts.total()} steps by {process_judge.id}: {shares}{mean}")
    if stats.prompt_tokens:
        share = stats.cached_tokens / stats.prompt_tokens
        print(f"judge: {share:.0%} of {stats.prompt_tokens} prompt tokens came from a prefix cache")


def judge_against(config: Config, labels: str, out: str | None = None) -> dict[str, Any]:
    """How far the judge of the config agrees with labelled steps (judges/labels.py): printed, and written to `out`, by default
    runs/NAME/agreement.json, or agreement-rubric.HASH.json with criteria of a user's own, so that two rubrics can be compared. Needs no
    run; verdicts are kept in runs/NAME/agreement.db. Returns the report.

    The judge is asked about every step, also about malformed ones, which the stages call BAD without asking.
    """
    known = {**BUILT_IN, **{spec.name: spec for spec in describe_tools(config.tasks.tools)}}
    steps = read_labels(labels, known)
    labelled = [step for step in steps if step.label is not None]
    if not labelled:
        raise ConfigError(
            f"--against {labels}: none of its {len(steps)} lines has a label yet; write GOOD or BAD into them"
        )
    rubric = read_rubric(config.judge.model.rubric) if config.judge.kind == "model" else ""
    criteria = {"file": config.judge.model.rubric, "hash": rubric_hash(rubric)} if rubric else None
    tools_by_task = {step.view.task: step.tools for step in labelled}
    keys = [step.view.content_hash() for step in labelled]
    with labels_judge(config, tools_by_task) as process_judge, Store(config.folder / "agreement.db") as store:
        asked = ((key, step.view) for key, step in zip(keys, labelled, strict=True))
        judge_missing(store, process_judge.id, asked, process_judge.judge, "judge")
        stored = store.verdicts(process_judge.id, keys)
    not_labelled = len(steps) - len(labelled)
    report = {
        "labels": labels,
        "judge": process_judge.id,
        "rubric": criteria,
        "not_labelled": not_labelled,
        **agreement(labelled, [stored[key] for key in keys]),
    }
    name = f"agreement-rubric.{criteria['hash']}.json" if criteria else "agreement.json"
    path = Path(out) if out else config.folder / name
    write_json(path, report)
    if not_labelled:
        print(f"judge: {not_labelled} of the {len(steps)} steps in {labels} have no label yet and are left out")
    if criteria:
        print(f"judge: by the criteria in {criteria['file']} (rubric {criteria['hash']})")
    print(f"judge: {process_judge.id} against {labels}\n\n{describe(report)}\n\n{path}")
    return report


def export_steps(config: Config, path: str, count: int) -> None:
    """Steps of a run, drawn at random, into a file for people to label."""
    task = build_task(config)
    with Store(config.store, writable=False) as store:
        ids = collected_ids(config, task, store, "judge")
        if Path(path).exists():
            raise ConfigError(
                f"--export-steps {path}: the file is there already, perhaps with labels; name another one"
            )
        written = write_labels(path, steps_to_label(store, ids, offered_tools(task), count, config.run.seed))
    print(f'judge: {written} steps in {path}; write GOOD or BAD into "label", then: swirl-fast judge --against {path}')
