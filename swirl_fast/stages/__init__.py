"""The commands: each builds its collaborators from the config, does one stage, and leaves what the next one reads.

    collect  -> trajectories.db      judge -> verdicts in it       filter -> shards/, filter.json
    train    -> checkpoints/, metrics.jsonl, tensorboard/, model/  evaluate -> evaluations/NAME.json, NAME.db, NAME.yaml
    report   -> report.html          run   -> all of it, summary.json

All lie in runs/NAME. A stage that is complete is left alone; one that was interrupted goes on.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tqdm import tqdm

from swirl_fast.config import Config, ConfigError, dump
from swirl_fast.data.filters import judged_enough, keep
from swirl_fast.data.store import Store
from swirl_fast.engines.engine import Engine, Sampling
from swirl_fast.files import read_json, write_json
from swirl_fast.judges import load_judge
from swirl_fast.judges.agreement import agreement, describe
from swirl_fast.judges.cached import NOT_JUDGED, judge_missing, judge_steps, judgements_of
from swirl_fast.judges.judge import Judge
from swirl_fast.judges.labels import read_labels, steps_to_label, write_labels
from swirl_fast.judges.outcome import judge_outcomes, outcome_judge_id, read_outcomes
from swirl_fast.rendering import Renderer
from swirl_fast.rollouts.collector import Collector, check_provenance, prompt_of, provenance, trajectory_ids
from swirl_fast.seeds import seed_of
from swirl_fast.stages import evaluation as evaluation
from swirl_fast.tasks import load_task
from swirl_fast.tasks.task import Question, Task
from swirl_fast.tools import open_tools
from swirl_fast.trajectory import Trajectory
from swirl_fast.verdict import Verdict

SAME_JUDGE = "run judge with the same judge.* settings"


def collect(config: Config) -> None:
    task = _task(config)
    questions, sampling, wanted = _collection(config, task)
    count = config.collect.trajectories_per_question
    with Store(config.store) as store:
        check_provenance(store, "collection", wanted)
        store.add_questions(questions)
        # With a checkpoint there it is train's, which may refuse these settings.
        if not any((config.folder / "checkpoints").glob("step_*")):
            _save_config(config)
        seed = seed_of(config.run.seed, "collect")
        if config.collect.source == "solutions":
            trajectories = _demonstrate(config, task, questions, store)
        else:
            trajectories = _roll_out(config, task, task.tools, questions, count, sampling, store, seed, "collect")
    steps, tokens = sum(t.num_steps for t in trajectories), sum(len(t.tokens) for t in trajectories)
    print(f"collect: {len(trajectories)} trajectories of {len(questions)} questions, {steps} steps, {tokens} tokens")


def judge(config: Config) -> None:
    task = _task(config)
    Store(config.store, writable=False).close()  # says so when nothing was collected yet
    with _judge(config, _tools_of(task), task=task) as judge, Store(config.store) as store:
        trajectories = _collected(config, task, store, "judge")
        judge_steps(judge, store, trajectories, "judge")
        judgements = judgements_of(judge, store, trajectories)
        stats = judge.stats()
        if config.filter.outcome == "judge" and "outcome" in config.filter.kind:
            judge_outcomes(config.judge.model, store, trajectories, _by_id(task.questions("train")))
    verdicts = [judgement.verdict for own in judgements.values() for judgement in own]
    shares = ", ".join(f"{sum(v is kind for v in verdicts)} {kind.value}" for kind in Verdict)
    print(f"judge: {len(verdicts)} steps by {judge.id}: {shares}")
    if stats.prompt_tokens:
        print(
            f"judge: {stats.cached_tokens / stats.prompt_tokens:.0%} of {stats.prompt_tokens} prompt tokens came from a prefix cache"
        )


def judge_against(config: Config, labels: str, out: str | None = None) -> dict[str, Any]:
    """How far the judge of the config agrees with labelled steps (judges/labels.py): printed, and written to `out`, by default
    runs/NAME/agreement.json. Needs no run; verdicts are kept in runs/NAME/agreement.db. Returns the report.

    The judge is asked about every step, also about malformed ones, which the stages call BAD without asking.
    """
    steps = read_labels(labels)
    labelled = [step for step in steps if step.label is not None]
    if not labelled:
        raise ConfigError(
            f"--against {labels}: none of its {len(steps)} lines has a label yet; write GOOD or BAD into them"
        )
    with (
        _judge(config, {step.view.task: step.tools for step in labelled}) as judge,
        Store(config.folder / "agreement.db") as store,
    ):
        keys = [step.view.content_hash() for step in labelled]
        views = {key: one.view for key, one in zip(keys, labelled, strict=True)}
        judge_missing(store, judge.id, views, judge.judge, "judge")
        stored = store.verdicts(judge.id, keys)
        judgements = [stored[key] for key in keys]
    report = {
        "labels": labels,
        "judge": judge.id,
        "not_labelled": len(steps) - len(labelled),
        **agreement(labelled, judgements),
    }
    path = Path(out) if out else config.folder / "agreement.json"
    write_json(path, report)
    if report["not_labelled"]:
        print(
            f"judge: {report['not_labelled']} of the {len(steps)} steps in {labels} have no label yet and are left out"
        )
    print(f"judge: {judge.id} against {labels}\n\n{describe(report)}\n\n{path}")
    return report


def export_steps(config: Config, path: str, count: int) -> None:
    """Steps of a run, drawn at random, into a file for people to label."""
    task = _task(config)
    with Store(config.store, writable=False) as store:
        trajectories = _collected(config, task, store, "judge")
    if Path(path).exists():
        raise ConfigError(f"--export-steps {path}: the file is there already, perhaps with labels; name another one")
    written = write_labels(path, steps_to_label(trajectories, task.tools, count, config.run.seed))
    print(f'judge: {written} steps in {path}; write GOOD or BAD into "label", then: swirl-fast judge --against {path}')


def filter(config: Config) -> None:
    from swirl_fast.data.shard_source import upload_shards
    from swirl_fast.data.shards import StepSample, write_shards

    task = _task(config)
    questions = _by_id(task.questions("train"))
    with (
        _judge(config, _tools_of(task), probe=False, task=task) as judge,
        Store(config.store, writable=False) as store,
    ):
        trajectories = _collected(config, task, store, "filter")
        judgements = judgements_of(judge, store, trajectories)
        collection = store.meta().get("collection", {})
        if config.filter.outcome == "judge":
            outcomes = read_outcomes(config.judge.model, store, trajectories, questions)
        else:
            outcomes = {
                t.id: task.score(questions[t.question_id], t.answer).exact_match == 1.0
                for t in trajectories
                if t.answer is not None
            }
    limit, seed = config.filter.max_trajectories, config.run.seed
    selection = keep(trajectories, judgements, outcomes, config.filter.kind, max_trajectories=limit, seed=seed)  # type: ignore[arg-type]
    silent = sum(one is NOT_JUDGED for own in judgements.values() for one in own)
    if silent and "process" in config.filter.kind:
        asked = sum(step.action.kind != "malformed" for t in trajectories for step in t.steps)
        lack = f"{silent} of {asked} well-formed steps have no verdict by the judge {judge.id}"
        if not selection.kept:
            raise ValueError(f"{selection.describe()}; but {lack}: {SAME_JUDGE}")
        print(f"filter: {lack}, and their trajectories are left out: {SAME_JUDGE} to have them too")
    if not selection.kept and config.filter.when_empty == "none":
        if not judged_enough(selection, trajectories, judgements):
            raise ValueError(
                f"filter.when_empty=none: {selection.describe()}; too many have no verdict to say that the judge turned all down: "
                f"{SAME_JUDGE}, which asks about them anew, or use filter.kind=none"
            )
        print(f"filter: {selection.describe()}; filter.when_empty=none, so all finished trajectories are used")
        selection = keep(trajectories, judgements, outcomes, "none", max_trajectories=limit, seed=seed)
    kept = set(selection.kept)
    samples = [StepSample(t, [j.verdict for j in judgements[t.id]]) for t in trajectories if t.id in kept]
    settings = asdict(config.filter)
    if config.filter.outcome == "judge":
        settings["outcome"] = outcome_judge_id(config.judge.model)
    upload = settings.pop("upload")  # where copies lie says nothing about the contents
    fingerprint = {"collection": collection, "judge": judge.id, "filter": settings}
    write_shards(config.folder / "shards", samples, fingerprint=fingerprint, selection=selection, replace=True)
    summary = {
        "kind": selection.kind,
        "judge": judge.id,
        "kept": len(selection.kept),
        "total": selection.total,
        "survivors": selection.survivors(),
        "describe": selection.describe(),
    }
    write_json(config.folder / "filter.json", summary)
    print(f"filter: {selection.describe()}")
    if upload:
        done = "uploaded to" if upload_shards(config.folder / "shards", upload) else "are already at"
        print(f"filter: the shards {done} {upload}")


def train(config: Config) -> None:
    """Under torchrun, one call a rank."""
    from swirl_fast.ranks import start, stop
    from swirl_fast.training.build import open_training

    ranks = start()
    try:
        with open_training(config, ranks) as training:
            # not before the settings are accepted: what lies there may have been made with others
            if ranks.main:
                _save_config(config)
            training.run()
    finally:
        stop()


def export(config: Config, checkpoint: str, out: str | None = None) -> None:
    """Writes the weights of a checkpoint (`best`, `step_000020`) to a Hugging Face folder, by default runs/NAME/model-CHECKPOINT."""
    from swirl_fast.ranks import start, stop
    from swirl_fast.training.build import export_checkpoint

    ranks = start()
    try:
        export_checkpoint(config, ranks, checkpoint, Path(out or config.folder / f"model-{checkpoint}"))
    finally:
        stop()


def evaluate(config: Config, name: str, weights: str | None = None) -> dict[str, Any]:
    """Evaluates `model.path`, or the Hugging Face folder `weights`, under a name. Returns the summary.

    The task need not be the run's: the run's config.yaml stays, that of the evaluation lies beside its results. Raises
    ConfigError for a name that an evaluation of another task has or that is none, and for a folder whose weights cannot be asked with
    model.path's tokenizer.
    """
    from swirl_fast.models.load import check_weights_folder, resolve, weights_hash

    evaluation.check_name(name)
    if weights is not None:
        check_weights_folder(config.model, weights)
    task = _task(config)
    folder = config.folder / "evaluations"
    other = (read_json(folder / f"{name}.json") or {}).get("task", task.name)
    if other != task.name:
        raise ConfigError(
            f"{folder / name}.json is an evaluation on {other}; give this one on {task.name} a name of its own, "
            f"e.g. --name {name}-{task.name}"
        )
    questions = task.questions("eval")
    settings = config.evaluate
    length = settings.max_action_tokens or config.collect.max_action_tokens
    sampling = Sampling(length, settings.temperature)
    offered = task.tools if settings.use_tools else ()
    source = Path(weights or resolve(config.model.path))
    evaluated = weights_hash(source) if source.is_dir() else None
    wanted = provenance(config, task, offered, sampling) | {
        "weights": weights and evaluated,
        "use_tools": settings.use_tools,
    }
    start = time.perf_counter()
    with contextlib.ExitStack() as stack:
        judge = stack.enter_context(_judge(config, _tools_of(task), task=task))
        evaluation.make_room(folder, name, wanted)  # not before the judge is there: it may fail
        store = stack.enter_context(Store(folder / f"{name}.db"))
        check_provenance(store, "evaluation", wanted)
        _save_config(config, folder / f"{name}.yaml")
        if not (config.folder / "config.yaml").is_file():
            _save_config(config)
        spent = store.meta().get("seconds", 0.0)
        seed = seed_of(config.run.seed, "evaluate")
        what = f"evaluate {name}"
        trajectories = _roll_out(
            config, task, offered, questions, settings.samples, sampling, store, seed, what, weights
        )
        judge_steps(judge, store, trajectories, f"judge {name}")
        judgements = judgements_of(judge, store, trajectories)
        outcomes = None
        if settings.outcome == "judge":
            judge_outcomes(config.judge.model, store, trajectories, _by_id(questions))
            outcomes = read_outcomes(config.judge.model, store, trajectories, _by_id(questions))
        seconds = spent + time.perf_counter() - start
        store.set_meta("seconds", seconds)
    summary = {
        "name": name,
        "model": weights or config.model.path,
        "weights": evaluated,
        "task": task.name,
        "judge": judge.id,
        **({"outcome_judge": outcome_judge_id(config.judge.model)} if settings.outcome == "judge" else {}),
        "temperature": settings.temperature,
        **evaluation.summarise(task, questions, trajectories, judgements, outcomes),
        "seconds": seconds,
        "by_question": evaluation.by_question(task, questions, trajectories, judgements),
    }
    write_json(folder / f"{name}.json", summary)
    print(evaluation.table({name: summary}))
    return summary


def evaluate_trained(config: Config, name: str = "trained") -> dict[str, Any]:
    folder = config.folder / "model"
    if not (folder / "config.json").is_file():
        raise ConfigError(f"run.name={config.run.name}: {folder} holds no trained model yet; run train first")
    return evaluate(config, name, str(folder))


def report(config: Config) -> None:
    from swirl_fast.report import write_report

    print(f"report: {write_report(config.folder)}")


def run(config: Config) -> None:
    """Every stage in order, then the table base -> trained and summary.json."""
    start = time.perf_counter()
    previous = read_json(config.folder / "summary.json")
    _check_collection(config)  # before the evaluation sets an earlier one aside
    base = evaluate(config, "base")
    collect(config)
    judge(config)
    filter(config)
    train(config)
    trained = evaluate_trained(config)
    shares = ("accuracy", "accuracy_interval", "process_label", "process_label_interval")
    keys = (*shares, "unknown", "malformed", "questions")
    rows = {"base": {key: base[key] for key in keys}, "trained": {key: trained[key] for key in keys}}
    seconds = time.perf_counter() - start
    if previous is not None and {name: previous.get(name) for name in rows} == rows:
        seconds = previous["seconds"]  # nothing was done anew: the time it took stands
    write_json(config.folder / "summary.json", {**rows, "seconds": seconds})
    report(config)
    print(
        f"\n{evaluation.table({'base': base, 'trained': trained})}\n\n{config.folder / 'summary.json'}  ({seconds:.0f} s)"
    )


def _roll_out(
    config: Config,
    task: Task,
    offered: Sequence[str],
    questions: Sequence[Question],
    count: int,
    sampling: Sampling,
    store: Store,
    seed: int,
    what: str,
    weights: str | None = None,
) -> list[Trajectory]:
    """Fills the store where trajectories are missing. Returns those asked for, in the order of the questions.

    offered: names of the tools; without any, the worked examples, which call tools, are left out of the prompt.
    """
    from swirl_fast.models.load import load_tokenizer

    store.add_questions(questions)
    wanted = trajectory_ids(questions, count)
    found = _finished(store, wanted)
    if len(found) == len(wanted):
        return found
    renderer = Renderer(load_tokenizer(config.model), config.model.path)
    with open_tools(offered, config.search, task.passages()) as tools, _engine(config, weights) as engine:
        prompt = prompt_of(config, task, renderer, tools)
        collector = Collector(
            engine, renderer, tools, prompt, sampling, config.tasks.max_steps, config.collect.batch, seed
        )
        with _bar(what, len(wanted), "trajectory", len(found)) as bar:
            collector.collect(store, questions, count, lambda trajectories, steps: bar.update(trajectories))
        stats = engine.stats()
    seconds = max(stats.prefill_seconds + stats.decode_seconds, 1e-9)
    print(
        f"{what}: {stats.generated_tokens} tokens generated at {stats.generated_tokens / seconds:.0f} a second, "
        f"{stats.cached_tokens / max(stats.prompt_tokens, 1):.0%} of the prompt tokens came from the prefix cache "
        f"({stats.cached_tokens / max(stats.cacheable_tokens, 1):.0%} of what an ideal cache would give)"
    )
    return _finished(store, wanted)


def _demonstrate(config: Config, task: Task, questions: Sequence[Question], store: Store) -> list[Trajectory]:
    """Fills the store from worked solutions."""
    from swirl_fast.models.load import load_tokenizer
    from swirl_fast.rollouts.demonstrations import demonstrations

    store.add_questions(questions)
    renderer = Renderer(load_tokenizer(config.model), config.model.path)
    with open_tools(task.tools, config.search, task.passages()) as tools:
        prompt = prompt_of(config, task, renderer, tools)
        written = list(demonstrations(task, questions, tools, renderer, prompt, config.tasks.max_steps))
    # Not again: a template that writes today's date gives them another prompt by now.
    there = {one.id for one in store.trajectories()}
    store.record(one for one in written if one.id not in there)
    return _finished(store, [one.id for one in written])


def _collection(config: Config, task: Task) -> tuple[Sequence[Question], Sampling, dict[str, Any]]:
    """The questions, how they are answered, and the fingerprint of the collection. Raises ConfigError without a question."""
    questions = task.questions("train")
    if not questions:
        raise ConfigError(f"tasks.path={config.tasks.path}: every row is also held out; give another tasks.eval_path")
    of = config.collect
    sampling = Sampling(of.max_action_tokens, of.temperature, of.top_p, of.top_k)
    return questions, sampling, provenance(config, task, task.tools, sampling)


def _check_collection(config: Config) -> None:
    """Raises what `collect` would raise for these settings, and writes nothing."""
    wanted = _collection(config, _task(config))[-1]
    if not config.store.is_file():
        return
    try:
        store = Store(config.store, writable=False)
    except ValueError:  # empty, after a kill, or none of ours: collect says so
        return
    with store:
        if "collection" in store.meta():
            check_provenance(store, "collection", wanted)


def _finished(store: Store, wanted: Sequence[str]) -> list[Trajectory]:
    by_id = {trajectory.id: trajectory for trajectory in store.trajectories(finished=True)}
    return [by_id[id_] for id_ in wanted if id_ in by_id]


def _collected(config: Config, task: Task, store: Store, what: str) -> list[Trajectory]:
    """The finished trajectories of the questions and the number a question that the config asks for; says so where some are missing."""
    wanted = trajectory_ids(task.questions("train"), config.collect.trajectories_per_question)
    found = _finished(store, wanted)
    missing = set(wanted) - {one.id for one in found}
    if config.collect.source == "solutions":  # questions without a solution that can be written down have no trajectory
        missing &= {one.id for one in store.trajectories(finished=False)}
    if missing:
        print(
            f"{what}: {len(missing)} of {len(missing) + len(found)} trajectories are not collected yet, and are left out: run collect with "
            "the same settings to its end"
        )
    return found


def _tools_of(task: Task) -> dict[str, Sequence[str]]:
    return {task.name: task.tools}


def _by_id(questions: Sequence[Question]) -> dict[str, Question]:
    return {question.id: question for question in questions}


def _task(config: Config) -> Task:
    return load_task(config.tasks, config.run.seed)


@contextlib.contextmanager
def _judge(
    config: Config, tools_by_task: Mapping[str, Sequence[str]], probe: bool = True, task: Task | None = None
) -> Iterator[Judge]:
    judge = load_judge(config.judge, tools_by_task, probe, [task] if task else [])
    try:
        yield judge
    finally:
        close = getattr(judge, "close", None)
        if close is not None:
            close()


@contextlib.contextmanager
def _engine(config: Config, weights: str | None) -> Iterator[Engine]:
    import torch

    from swirl_fast.engines import load_engine

    engine = load_engine(config, "cuda" if torch.cuda.is_available() else "cpu", weights)
    try:
        yield engine
    finally:
        engine.close()


def _bar(what: str, total: int, unit: str, done: int = 0) -> tqdm:
    """A progress bar on a terminal, nothing elsewhere."""
    return tqdm(desc=what, total=total, initial=done, unit=unit, disable=None, leave=False)


def _save_config(config: Config, path: Path | None = None) -> None:
    path = path or config.folder / "config.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(dump(config))
