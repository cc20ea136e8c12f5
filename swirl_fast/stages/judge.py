"""Verdicts on the collected steps, into runs/NAME/trajectories.db; and how far a judge agrees with labels."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from swirl_fast.config import Config, ConfigError
from swirl_fast.config.rubric import read_rubric, rubric_hash
from swirl_fast.data.store import Store
from swirl_fast.files import read_json, write_json
from swirl_fast.judges.agreement import agreement, describe
from swirl_fast.judges.cached import judge_missing, judge_steps, judged_trajectories, lacks_verdict
from swirl_fast.judges.judge import Judge
from swirl_fast.judges.labels import LabelledStep, read_labels, steps_to_label, write_labels
from swirl_fast.judges.outcome import judge_outcomes, lacks_outcome, outcome_judge_id
from swirl_fast.judges.self_consistency import check_tools, stored_id
from swirl_fast.ranks import Ranks, joined
from swirl_fast.stages.build import build_task, labels_judge, questions_by_id, task_judge
from swirl_fast.stages.collect import collected_ids
from swirl_fast.stages.parts import Parts, agree, main_store
from swirl_fast.tasks import offered_tools
from swirl_fast.tasks.task import Task
from swirl_fast.tools import describe_tools
from swirl_fast.tools.tool import BUILT_IN
from swirl_fast.trajectory import Trajectory
from swirl_fast.verdict import JudgeStats, Verdict


def judge(config: Config) -> None:
    """Under torchrun, one call a rank: the trajectories are dealt over the ranks, by their questions."""
    with joined() as ranks:
        task = build_task(config)
        check_tasks(config, task)
        if ranks.main:
            Store(config.store, writable=False).close()  # says so when nothing was collected yet
        with task_judge(config, task) as process_judge, main_store(ranks, config.store) as store:
            agree(ranks, {**asdict(config), "judge id": process_judge.id})
            ids = collected_ids(config, task, store, "judge") if store is not None else []
            _judge(config, task, process_judge, ranks, store, ids)
            stats = ranks.gather(process_judge.stats())
            if store is not None:
                _say(config, process_judge, store, ids, stats)
            ranks.meet()


def check_tasks(config: Config, task: Task) -> None:
    """Raises ConfigError for a coverage of a task that is not there, and for a task that a vote says nothing of. Evaluations may be of
    other tasks than those it is meant for."""
    known = offered_tools(task)
    if config.judge.self_consistency:
        check_tools(known)
    if config.judge.kind == "rules" and (unknown := sorted(set(config.judge.rules.coverage_by_task) - set(known))):
        raise ConfigError(
            f"judge.rules.coverage_by_task: no task here is called {', '.join(unknown)}; there is {', '.join(sorted(known))}"
        )


def _judge(
    config: Config, task: Task, process_judge: Judge, ranks: Ranks, store: Store | None, ids: Sequence[str]
) -> None:
    """What has no verdict yet. ids: of all trajectories, on rank 0."""
    questions = questions_by_id(task.questions("train"))
    asks_outcome = config.filter.outcome == "judge" and "outcome" in config.filter.kind
    outcome_id = outcome_judge_id(config.judge.model) if asks_outcome else ""

    def lacks(one: Trajectory) -> bool:
        assert store is not None
        return one.finish is not None and (
            lacks_verdict(store, process_judge.id, one)
            or (asks_outcome and lacks_outcome(outcome_id, store, one, questions))
        )

    def work(into: Store, *_: object) -> None:
        own = ids if into is store else into.ids(finished=True)
        judge_steps(process_judge, into, own, "judge", recorded=True, shown=ranks.main)
        if asks_outcome:
            judge_outcomes(config.judge.model, into, into.trajectories(own), questions)

    parts = Parts(ranks, config.store, "verdicts", [stored_id(process_judge.id), outcome_id])
    parts.gather(store, ())
    count = config.collect.trajectories_per_question
    parts.fill(store, list(questions.values()), count, lacks, work, absent=False)


def _say(config: Config, process_judge: Judge, store: Store, ids: Sequence[str], stats: Sequence[JudgeStats]) -> None:
    """stats: of every rank's judge."""
    counts: Counter[Verdict] = Counter()
    total, graded = 0.0, False
    for _, judgements in judged_trajectories(store, process_judge.id, ids):
        counts.update(judgement.verdict for judgement in judgements)
        rewards = [judgement.reward for judgement in judgements if judgement.reward is not None]
        total += sum(rewards)
        graded |= not {0.0, 1.0}.issuperset(rewards)
    shares = ", ".join(f"{counts[kind]} {kind.value}" for kind in Verdict)
    known = counts.total() - counts[Verdict.UNKNOWN]
    mean = f"; mean reward {total / known:.3f}" if graded else ""
    print(f"judge: {counts.total()} steps by {process_judge.id}: {shares}{mean}")
    by_text = config.judge.kind == "model" and config.judge.model.read == "text"
    if by_text and 2 * counts[Verdict.UNKNOWN] > counts.total():
        print(
            "judge: most steps got no verdict; `swirl-fast show` says why. A reply that is cut off needs more judge.model.max_tokens; a "
            "model that does not keep to the form can be read by the probability of its verdict word: judge.model.read=logprobs, and "
            "judge.model.explain=false for that word alone"
        )
    if prompt_tokens := sum(one.prompt_tokens for one in stats):
        share = sum(one.cached_tokens for one in stats) / prompt_tokens
        print(f"judge: {share:.0%} of {prompt_tokens} prompt tokens came from a prefix cache")


def judge_against(config: Config, labels: str, out: str | None = None) -> dict[str, Any]:
    """How far the judge of the config agrees with labelled steps (judges/labels.py): printed, and written to `out`, by default
    runs/NAME/agreement.json, or agreement-rubric.HASH.json with criteria of a user's own, so that two rubrics can be compared. Needs no
    run; verdicts are kept in runs/NAME/agreement.db. Returns the report.

    The judge is asked about every step, also about malformed ones, which the stages call BAD without asking.
    """
    steps, labelled = labelled_steps(config, labels)
    rubric = _rubric_hash(config)
    criteria = {"file": config.judge.model.rubric, "hash": rubric} if rubric else None
    path = report_file(config, out)
    tools_by_task = {step.view.task: step.tools for step in labelled}
    keys = [step.view.content_hash() for step in labelled]
    with labels_judge(config, tools_by_task) as process_judge, Store(config.folder / "agreement.db") as store:
        asked = ((key, step.view) for key, step in zip(keys, labelled, strict=True))
        judge_missing(store, process_judge.id, asked, process_judge.judge, "judge")
        stored = store.verdicts(process_judge.id, keys)
    not_labelled = steps - len(labelled)
    report = {
        "labels": labels,
        "judge": process_judge.id,
        "rubric": criteria,
        "not_labelled": not_labelled,
        **agreement(labelled, [stored[key] for key in keys]),
    }
    write_json(path, report)
    if not_labelled:
        print(f"judge: {not_labelled} of the {steps} steps in {labels} have no label yet and are left out")
    if criteria:
        print(f"judge: by the criteria in {criteria['file']} (rubric {criteria['hash']})")
    print(f"judge: {process_judge.id} against {labels}\n\n{describe(report)}\n\n{path}")
    return report


def labelled_steps(config: Config, labels: str) -> tuple[int, list[LabelledStep]]:
    """How many lines a file of labelled steps has, and those with a label. Raises ConfigError where none has one, and as `read_labels`."""
    known = {**BUILT_IN, **{spec.name: spec for spec in describe_tools(config.tasks.tools)}}
    steps = read_labels(labels, known)
    labelled = [step for step in steps if step.label is not None]
    if not labelled:
        raise ConfigError(
            f"--against {labels}: none of its {len(steps)} lines has a label yet; write GOOD or BAD into them"
        )
    return len(steps), labelled


def _rubric_hash(config: Config) -> str:
    """Empty for the built-in criteria."""
    rubric = read_rubric(config.judge.model.rubric) if config.judge.kind == "model" else ""
    return rubric_hash(rubric) if rubric else ""


def report_file(config: Config, out: str | None) -> Path:
    """Where the report of a comparison goes. Raises ConfigError for a file that is there and is no report of an earlier one."""
    rubric = _rubric_hash(config)
    path = Path(out) if out else config.folder / (f"agreement-rubric.{rubric}.json" if rubric else "agreement.json")
    try:
        found = read_json(path)
    except ValueError:
        found = "no JSON"
    if path.is_dir() or not (found is None or (isinstance(found, dict) and {"labels", "confusion"} <= set(found))):
        raise ConfigError(
            f"--out {path}: is there already and is no report of --against, perhaps labels; name another file"
        )
    return path


def refuse_existing(path: str) -> None:
    """Raises ConfigError for a file of labels that is there."""
    if os.path.exists(path):
        raise ConfigError(f"--export-steps {path}: the file is there already, perhaps with labels; name another one")


def export_steps(config: Config, path: str, count: int) -> None:
    """Steps of a run, drawn at random, into a file for people to label."""
    refuse_existing(path)
    task = build_task(config)
    with Store(config.store, writable=False) as store:
        ids = collected_ids(config, task, store, "judge")
        steps = steps_to_label(store, ids, offered_tools(task), count, config.run.seed)
    if not steps:
        raise ValueError(f"--export-steps {path}: none of the {len(ids)} trajectories has a step that is not malformed")
    written = write_labels(path, steps)
    print(f'judge: {written} steps in {path}; write GOOD or BAD into "label", then: swirl-fast judge --against {path}')
