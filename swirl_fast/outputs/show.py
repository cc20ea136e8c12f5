"""`swirl-fast show`: trajectories and sampled actions as text for a terminal, whatever a model has written into them."""

from __future__ import annotations

import difflib
import textwrap
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

from swirl_fast.data.samples import read_samples
from swirl_fast.outputs.readings import FINISHES, Reading, sample
from swirl_fast.outputs.run import COLLECTED, OpenRun
from swirl_fast.outputs.text import is_number, one_line, visible
from swirl_fast.trajectory import Step
from swirl_fast.verdict import Judgement

LIMIT = 10  # of what is shown without --limit
LINE = 78  # characters of a question in the overview


def overview(run: OpenRun, of: str = COLLECTED, limit: int = LIMIT) -> Iterator[str]:
    """A few trajectories, a line each, chosen so that every kind of verdict, answer and ending is seen; and how to see more."""
    readings = run.readings(of)
    kinds = readings.kinds()
    if not kinds:
        yield f"{of}: no trajectory is recorded yet"
        return
    chosen = sample(kinds, limit)
    shown = [id_ for id_ in kinds if id_ in chosen]
    which = "all" if len(shown) == len(kinds) else f"{len(shown)} of {len(kinds):,}, of every kind some"
    yield f"{of}: {which} (answer, share of GOOD steps, question)"
    width = max(len(visible(id_)) for id_ in shown)
    for reading in readings.of(shown):
        question = visible(one_line(reading.trajectory.question, LINE))
        yield f"  {visible(reading.trajectory.id):{width}}  {reading.match:9}  {reading.good:13}  {question}"
    yield ""
    for line in _more(run, of, shown[0]):
        yield f"  {line}"


def _more(run: OpenRun, of: str, id_: str) -> Iterator[str]:
    yield f"--trajectory {visible(id_)}   every step of it; --question ID: all trajectories of a question"
    others = [name for name in [COLLECTED, *run.evaluation_names()] if name != of]
    if others:
        yield f"--of {'|'.join(others)}   those of an evaluation"
    if steps := run.sample_steps():
        yield f"--step {steps[-1]}   the actions that training step {steps[-1]} sampled; kept are those of {_number(len(steps), 'step')}"
    yield "--limit N   so many of them"


def trajectory(run: OpenRun, id_: str, of: str = COLLECTED) -> Iterator[str]:
    """A trajectory, step by step. Raises ValueError for an id that is not there, with those that look alike."""
    ids = run.store(of).ids()
    if id_ not in ids:
        if any(known.startswith(f"{id_}/") for known in ids):
            raise ValueError(f"--trajectory {id_}: is the id of a question; use --question {id_}")
        raise ValueError(f"--trajectory {id_}: {of} has no such trajectory{_alike(id_, ids)}")
    for reading in run.trajectories(of, [id_]):
        yield from full(reading)


def question(run: OpenRun, id_: str, of: str = COLLECTED, limit: int = LIMIT) -> Iterator[str]:
    """The first `limit` trajectories of a question, step by step. Raises ValueError for a question that is not there."""
    store = run.store(of)
    known = [one.id for one in store.questions()]
    if id_ not in known:
        raise ValueError(f"--question {id_}: {of} has no such question{_alike(id_, known)}")
    ids = store.ids_of(id_)
    if not ids:
        yield f"question {visible(id_)} has no trajectory yet"
    for i, reading in enumerate(run.trajectories(of, ids[:limit])):
        yield from full(reading, with_question=i == 0)
    if len(ids) > limit:
        yield f"{len(ids) - limit} more trajectories of this question: --limit {len(ids)}"


def _alike(id_: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(id_, known[:10_000], n=3, cutoff=0.5) or list(known[:3])
    return (
        f"; there are {', '.join(near)}{', …' if len(known) > len(near) else ''}" if near else "; none is recorded yet"
    )


def full(reading: Reading, with_question: bool = True) -> Iterator[str]:
    """Question, gold answers, and every step with action, verdict, reward, reason and observation."""
    one = reading.trajectory
    if with_question:
        yield from _field("question", f"{one.question_id}\n{one.question}")
        yield from _field("gold", " | ".join(reading.gold))
        yield ""
    answer = "" if one.answer is None else f": {one_line(one.answer, LINE)}"
    yield visible(f"trajectory {one.id}   {reading.match}{answer}   {reading.good}   {FINISHES[one.finish]}")
    for i, (step, judgement) in enumerate(zip(one.steps, reading.judgements, strict=True)):
        yield from _step(i, step, judgement)
    yield ""


def _step(i: int, step: Step, judgement: Judgement | None) -> Iterator[str]:
    does = _does(step.action.kind, step.action.tool)
    verdict = "not judged" if judgement is None else f"{judgement.verdict.value}{_reward(judgement.reward)}"
    yield visible(f"  step {i}   {does}   {verdict}   {_tokens(step.end - step.start)}")
    yield from _field("action", step.text, 4)
    if judgement is not None:
        yield from _field("reason", judgement.reason, 4)
    if step.observation is not None:
        yield from _field("result", step.observation, 4)


def samples(run: OpenRun, step: int, limit: int = LIMIT, **only: str | None) -> Iterator[str]:
    """The first `limit` actions that a training step sampled, the states one after the other. only: trajectory or question, by id."""
    rows = (
        row
        for row in map(vars, read_samples(run.folder, step))
        if all(row.get(key) == value for key, value in only.items() if value)
    )
    before: tuple[Any, ...] | None = None
    count = 0
    for row in islice(rows, limit):
        count += 1
        state = (row.get("trajectory"), row.get("state"))
        if state != before:
            yield visible(f"training step {step}, trajectory {state[0]}, state {state[1]}")
            yield from _field("question", str(row.get("question")), 2)
            before = state
        yield from _sample(row)
    rest = sum(1 for _ in rows)
    if not count:
        named = " and ".join(f"{key} {value}" for key, value in only.items() if value)
        yield f"training step {step} sampled no action" + (f" of {visible(named)}" if named else "")
    if rest:
        yield f"{rest:,} more actions of step {step}: --limit {count + rest}"


def _sample(row: dict[str, Any]) -> Iterator[str]:
    does = _does(str(row.get("kind")), row.get("tool"))
    numbers = [f"{name} {row[name]:+.3f}" for name in ("advantage",) if is_number(row.get(name))]
    tokens = row.get("tokens")
    size = len(tokens) if isinstance(tokens, list) else tokens
    parts = [does, f"{row.get('verdict')}{_reward(row.get('reward'))}", *numbers, _tokens(size)]
    yield visible("  " + "   ".join(parts))
    yield from _field("action", str(row.get("text")), 4)
    if row.get("reason"):
        yield from _field("reason", str(row["reason"]), 4)


def _does(kind: str, tool: str | None) -> str:
    return {"tool": f"calls {tool}", "answer": "answers"}.get(kind, kind)


def _tokens(number: object) -> str:
    return _number(number, "token")


def _number(number: object, of: str) -> str:
    return f"{number} {of}" if number == 1 else f"{number} {of}s"


def _reward(reward: object) -> str:
    return f", reward {reward:g}" if is_number(reward) else ""


def _field(name: str, text: str, indent: int = 0) -> Iterator[str]:
    """`name  text`, its further lines below its beginning."""
    head = f"{' ' * indent}{name:9} "
    body = textwrap.indent(visible(text), " " * len(head), lambda line: True)
    yield head + body[len(head) :]
