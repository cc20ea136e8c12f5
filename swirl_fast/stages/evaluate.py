"""Stage 4: held-out questions, step by step with tools, scored and judged, or fresh actions at held-out states, judged;
runs/NAME/evaluations/NAME.json."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from swirl_fast.config import Config, ConfigError
from swirl_fast.data.store import Store, trajectory_ids
from swirl_fast.data.store_tables import REMEDY
from swirl_fast.engines.engine import Sampling
from swirl_fast.files import is_folder, read_json, write_json
from swirl_fast.judges.cached import judge_steps, judged_trajectories, lacks_verdict
from swirl_fast.judges.judge import Judge
from swirl_fast.judges.outcome import judge_outcomes, lacks_outcome, outcome_judge_id, read_outcomes
from swirl_fast.ranks import Ranks, joined
from swirl_fast.rendering import open_format
from swirl_fast.rollouts.provenance import provenance
from swirl_fast.seeds import seed_of
from swirl_fast.stages.build import build_task, questions_by_id, save_config, task_judge
from swirl_fast.stages.evaluation_files import check_evaluation_name, make_room
from swirl_fast.stages.held_out import score_states
from swirl_fast.stages.parts import Parts, agree, main_store
from swirl_fast.stages.roll_out import finished_ids, roll_out
from swirl_fast.stages.scores import EvaluationScores, accuracy_table
from swirl_fast.tasks import ToolsByTask, offered_tools
from swirl_fast.tasks.conversations import Conversations
from swirl_fast.tasks.task import Question, Task
from swirl_fast.trajectory import Trajectory


@dataclass(frozen=True)
class _Plan:
    """weights: a Hugging Face folder, None for model.path. weights_hash: of what is evaluated, None where it is no folder here. offered:
    the tools, by the name of a question's task. fingerprint: what an evaluation that is gone on with must have been made with."""

    name: str
    folder: Path
    task: Task
    questions: Sequence[Question]
    sampling: Sampling
    offered: ToolsByTask
    weights: str | None
    weights_hash: str | None
    fingerprint: dict[str, Any]


def evaluate(config: Config, name: str, weights: str | None = None) -> dict[str, Any]:
    """Evaluates `model.path`, or the Hugging Face folder `weights`, under a name. Returns the summary.

    The task need not be the run's: the run's config.yaml stays, that of the evaluation lies beside its results. Raises
    ConfigError for a name that an evaluation of another task has or that is none, and for a folder whose weights cannot be asked with
    model.path's tokenizer. Under torchrun, one call a rank: the questions are dealt over the ranks, and all of them get the summary;
    fresh actions at held-out states are rank 0's work.
    """
    with joined() as ranks:
        plan = _plan(config, name, weights)
        agree(ranks, {**asdict(config), "--name": name, "evaluation": plan.fingerprint})
        start, summary = time.perf_counter(), None
        with task_judge(config, plan.task, votes=False) as judge:
            if ranks.main:
                make_room(plan.folder, name, plan.fingerprint)  # not before the judge is there: it may fail
            with main_store(ranks, plan.folder / f"{name}.db") as store:
                spent = _begin(config, plan, store) if store is not None else 0.0
                _answer(config, plan, judge, ranks, store)
                if store is not None:
                    scores = _score(config, plan, judge, store)
                    seconds = spent + time.perf_counter() - start
                    store.set_meta("seconds", seconds)
                    summary = _summary(config, plan, judge.id, scores, seconds)
        if summary is not None:
            write_json(plan.folder / f"{name}.json", summary)
            print(accuracy_table({name: summary}))
        ranks.meet()
        return ranks.gather(summary)[0] or {}


def _begin(config: Config, plan: _Plan, store: Store) -> float:
    """Notes down what is evaluated, and how. Returns the seconds that it took before it was interrupted."""
    store.check_meta("evaluation", plan.fingerprint)
    save_config(config, plan.folder / f"{plan.name}.yaml")
    if not (config.folder / "config.yaml").is_file():
        save_config(config)
    spent = store.meta().get("seconds", 0.0)
    if type(spent) not in (int, float):
        raise ValueError(f"{store.path}, table meta, key 'seconds': is not a number: {REMEDY}")
    return spent


def evaluate_trained(config: Config, name: str = "trained") -> dict[str, Any]:
    return evaluate(config, *named_weights(config, "trained", name))


def named_weights(config: Config, of: str, name: str | None = None) -> tuple[str, str | None]:
    """The name of an evaluation, and the folder of its weights, None for those of model.path. of: base, trained, or a folder, which name an
    evaluation that is given no name. Raises ConfigError where there is no trained model yet."""
    if of == "base":
        return name or of, None
    if of != "trained":
        return name or os.path.basename(os.path.normpath(of)), of
    folder = config.folder / "model"
    if not (folder / "config.json").is_file():
        raise ConfigError(
            f"run.name={config.run.name}: {folder} holds no trained model yet; run train first, or copy the folder here where "
            "it was trained on another machine"
        )
    return name or of, str(folder)


def check_evaluation(config: Config, name: str, weights: str | None) -> None:
    """Raises what `evaluate` would raise for these, and writes nothing."""
    _plan(config, name, weights)


def _plan(config: Config, name: str, weights: str | None) -> _Plan:
    """What to do, checked; nothing is written."""
    from swirl_fast.models.load import check_weights_folder, resolve, weights_hash

    check_evaluation_name(name)
    if weights is not None:
        check_weights_folder(config.model, weights)
    task, folder, settings = build_task(config), config.folder / "evaluations", config.evaluate
    other = (read_json(folder / f"{name}.json") or {}).get("task", task.name)
    if other != task.name:
        raise ConfigError(
            f"{folder / name}.json is an evaluation on {other}; give this one on {task.name} a name of its own, "
            f"e.g. --name {name}-{task.name}"
        )
    sampling = Sampling(settings.max_action_tokens or config.collect.max_action_tokens, settings.temperature)
    offered = {name: specs if settings.use_tools else () for name, specs in offered_tools(task).items()}
    source = Path(weights or resolve(config.model.path))
    hashed = weights_hash(source) if is_folder(source) else None
    fingerprint = provenance(config, task, offered, sampling) | {
        "weights": weights and hashed,
        "use_tools": settings.use_tools,
        "sampling": asdict(sampling),
        "seed": config.run.seed,
        "engine_dtype": config.engine.dtype,
    }
    return _Plan(name, folder, task, task.questions("eval"), sampling, offered, weights, hashed, fingerprint)


def _answer(config: Config, plan: _Plan, judge: Judge, ranks: Ranks, store: Store | None) -> None:
    """Answers the questions and judges the answers; what is in the store already is not done again."""
    if isinstance(plan.task, Conversations):
        return
    settings, questions = config.evaluate, questions_by_id(plan.questions)
    outcome_id = outcome_judge_id(config.judge.model) if settings.outcome == "judge" else None

    def lacks(one: Trajectory) -> bool:
        assert store is not None
        return (
            one.finish is None
            or lacks_verdict(store, judge.id, one)
            or (outcome_id is not None and lacks_outcome(outcome_id, store, one, questions))
        )

    def work(into: Store, mine: Sequence[Question], elsewhere: AbstractSet[str]) -> None:
        ids = roll_out(
            config,
            plan.task,
            plan.offered,
            mine,
            settings.samples,
            plan.sampling,
            into,
            seed_of(config.run.seed, "evaluate"),
            f"evaluate {plan.name}",
            plan.weights,
            ranks,
            elsewhere,
        )
        judge_steps(judge, into, ids, f"judge {plan.name}", shown=ranks.main)
        if outcome_id is not None:
            judge_outcomes(config.judge.model, into, into.trajectories(ids), questions)

    parts = Parts(ranks, plan.folder / f"{plan.name}.db", "evaluation", plan.fingerprint)
    parts.gather(store, trajectory_ids(plan.questions, settings.samples))
    parts.fill(store, plan.questions, settings.samples, lacks, work)


def _score(config: Config, plan: _Plan, judge: Judge, store: Store) -> EvaluationScores:
    """Of the answers, or of fresh actions at held-out states, which are drawn here."""
    if isinstance(plan.task, Conversations):
        what = f"evaluate {plan.name}"
        return score_states(config, plan.task, plan.sampling, judge, store, what, plan.weights)
    questions = questions_by_id(plan.questions)
    ids = finished_ids(store, trajectory_ids(plan.questions, config.evaluate.samples))
    outcome_id = outcome_judge_id(config.judge.model) if config.evaluate.outcome == "judge" else None
    scores = EvaluationScores(plan.task, plan.questions, open_format(config.actions, config.model))
    for trajectory, judgements in judged_trajectories(store, judge.id, ids):
        outcomes = {} if outcome_id is None else read_outcomes(outcome_id, store, [trajectory], questions)
        scores.add(trajectory, judgements, outcomes.get(trajectory.id, False))
    return scores


def _summary(config: Config, plan: _Plan, judge_id: str, scores: EvaluationScores, seconds: float) -> dict[str, Any]:
    """What is written, and shown by the report."""
    by_model = config.evaluate.outcome == "judge"
    return {
        "name": plan.name,
        "model": plan.weights or config.model.path,
        "weights": plan.weights_hash,
        "task": plan.task.name,
        "judge": judge_id,
        **({"outcome_judge": outcome_judge_id(config.judge.model)} if by_model else {}),
        "temperature": config.evaluate.temperature,
        **scores.summary(outcome_judge=by_model),
        "seconds": seconds,
        "by_question": scores.by_question(),
    }
