"""Stage 2: the trajectories that training learns from, as runs/NAME/shards/, and what was left out why, in filter.json.

First everything is decided on what is known of each trajectory, with filter.states=variance also at which of its states (states.py), then
those that are kept are read again and written.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from swirl_fast.config import Config
from swirl_fast.data.filters import Candidate, Selection, StateSelection, judged_enough, select
from swirl_fast.data.shard_source import check_clients, upload_shards
from swirl_fast.data.shards import StepSample, write_shards
from swirl_fast.data.store import Store
from swirl_fast.files import write_json
from swirl_fast.judges import judge_id as id_of_judge
from swirl_fast.judges.cached import NOT_JUDGED, judged_trajectories
from swirl_fast.judges.outcome import outcome_judge_id, read_outcomes
from swirl_fast.judges.self_consistency import with_other_answers
from swirl_fast.ranks import by_rank_0
from swirl_fast.rendering import open_format
from swirl_fast.stages.build import build_task, questions_by_id
from swirl_fast.stages.collect import COLLECTION, collected_ids
from swirl_fast.stages.states import sampling_fingerprint, select_states
from swirl_fast.tasks import offered_tools
from swirl_fast.tasks.task import SHOWN_TASKS, Task

SAME_JUDGE = "run judge with the same judge.* settings"


@by_rank_0
def filter(config: Config) -> None:
    check_clients(config.filter.upload)
    task = build_task(config)
    judge_id = id_of_judge(config.judge, offered_tools(task), open_format(config.actions, config.model))
    with Store(config.store, writable=False) as store:
        store.check()  # a damaged row that is not found would be left out of the shards
        candidates, silent, asked = _candidates(config, task, store, judge_id)
        selection = _select(config, candidates, silent, asked, judge_id)
        states = None
        if config.filter.states == "variance":
            states = select_states(config, task, store, selection.kept)
            selection = states.applied(selection)
            if not selection.kept:
                raise ValueError(_nothing_left(f"{selection.describe()}; {states.describe()}", selection))
        verdicts = {candidate.id: candidate.verdicts for candidate in candidates}
        answers = store.answers() if config.judge.self_consistency else {}
        samples = (
            StepSample(one, list(verdicts[one.id]), [] if states is None else states.kept[one.id])
            for one in with_other_answers(store.trajectories(selection.kept), answers)
        )
        fingerprint = _fingerprint(config, task, store, judge_id)
        write_shards(config.folder / "shards", samples, fingerprint=fingerprint, replace=True)
    _write_summary(config, selection, states, candidates, judge_id)
    if target := config.filter.upload:
        done = "uploaded to" if upload_shards(config.folder / "shards", target) else "are already at"
        print(f"filter: the shards {done} {target}")


def _candidates(config: Config, task: Task, store: Store, judge_id: str) -> tuple[list[Candidate], int, int]:
    """What is known of the collected trajectories; how many of their steps have no verdict; how many are well-formed."""
    questions = questions_by_id(task.questions("train"))
    outcome_id = outcome_judge_id(config.judge.model) if config.filter.outcome == "judge" else None
    least = config.filter.min_reward
    candidates, silent, asked = [], 0, 0
    for trajectory, judgements in judged_trajectories(store, judge_id, collected_ids(config, task, store, "filter")):
        right: bool | None = None
        if trajectory.answer is not None:
            if outcome_id is not None:
                right = read_outcomes(outcome_id, store, [trajectory], questions, least)[trajectory.id]
            else:
                question = questions[trajectory.question_id]
                right = task.score(question, trajectory.answer).reward >= least
        candidates.append(Candidate.of(trajectory, judgements, right, least))
        silent += sum(judgement is NOT_JUDGED for judgement in judgements)
        asked += sum(step.action.kind != "malformed" for step in trajectory.steps)
    return candidates, silent, asked


def _select(config: Config, candidates: Sequence[Candidate], silent: int, asked: int, judge_id: str) -> Selection:
    """Raises ValueError, with the remedy, where nothing is left to train on and filter.when_empty does not help."""
    settings, seed = config.filter, config.run.seed
    selection = select(candidates, settings.kind, max_trajectories=settings.max_trajectories, seed=seed)  # type: ignore[arg-type]
    if silent and "process" in settings.kind:
        lack = f"{silent} of {asked} well-formed steps have no verdict by the judge {judge_id}"
        if not selection.kept:
            raise ValueError(f"{selection.describe()}; but {lack}: {SAME_JUDGE}")
        print(f"filter: {lack}, and their trajectories are left out: {SAME_JUDGE} to have them too")
    if not selection.kept and settings.when_empty == "none":
        if not judged_enough(selection, candidates):
            raise ValueError(
                f"filter.when_empty=none: {selection.describe()}; too many have no verdict to say that the judge turned all down: "
                f"{SAME_JUDGE}, which asks about them again, or use filter.kind=none"
            )
        print(f"filter: {selection.describe()}; filter.when_empty=none, so all finished trajectories are used")
        selection = select(candidates, "none", max_trajectories=settings.max_trajectories, seed=seed)
    if not selection.kept:
        raise ValueError(_nothing_left(selection.describe(), selection))
    return selection


def _nothing_left(described: str, selection: Selection) -> str:
    remedy = selection.remedy()
    return f"nothing is left to train on: {described}. {remedy[0].upper()}{remedy[1:]}"


def _fingerprint(config: Config, task: Task, store: Store, judge_id: str) -> dict[str, Any]:
    """What the shards depend on."""
    settings = asdict(config.filter)
    if config.filter.states == "all":
        settings = {name: value for name, value in settings.items() if not name.startswith("states_")}
    else:
        settings["states_sampling"] = sampling_fingerprint(config, task)
    if config.filter.outcome == "judge":
        settings["outcome"] = outcome_judge_id(config.judge.model)
    del settings["upload"]  # where copies lie says nothing about the contents
    return {"collection": store.meta().get(COLLECTION, {}), "judge": judge_id, "filter": settings}


def _by_task(selection: Selection, candidates: Sequence[Candidate]) -> dict[str, dict[str, int]]:
    """How many trajectories of each task were kept, where there are several tasks, and not too many to be shown."""
    kept = set(selection.kept)
    tasks = sorted({candidate.task for candidate in candidates})
    counts = {task: {"kept": 0, "total": 0} for task in tasks}
    for candidate in candidates:
        counts[candidate.task]["total"] += 1
        counts[candidate.task]["kept"] += candidate.id in kept
    return counts if 1 < len(counts) <= SHOWN_TASKS else {}


def _write_summary(
    config: Config,
    selection: Selection,
    states: StateSelection | None,
    candidates: Sequence[Candidate],
    judge_id: str,
) -> None:
    by_task = _by_task(selection, candidates)
    summary = {
        "kind": selection.kind,
        "judge": judge_id,
        "kept": len(selection.kept),
        "total": selection.total,
        "survivors": selection.survivors(),
        "describe": selection.describe(),
        **({"by_task": by_task} if by_task else {}),
    }
    if states is not None:
        kept = sum(map(sum, states.kept.values()))
        summary["states"] = {
            "kept": kept,
            "total": states.total,
            "survivors": states.survivors(),
            "describe": states.describe(),
        }
    write_json(config.folder / "filter.json", summary)
    print(f"filter: {selection.describe()}")
    if states is not None:
        print(f"filter: {states.describe()}")
    for task, counts in by_task.items():
        print(f"filter: of {task} {counts['kept']} of {counts['total']}")
