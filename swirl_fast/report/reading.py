"""Trajectories to read, each as a block that opens to its steps, verdicts, reasons and observations: some of every kind in report.html, all
of them in the pages beside it."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path

from swirl_fast.data.store import BATCH, Store
from swirl_fast.outputs.readings import FINISHES, MATCHES, Reading, Readings, sample
from swirl_fast.report.markup import badge, block, escape, short
from swirl_fast.report.pages import Page, Pages
from swirl_fast.trajectory import Finish, Step
from swirl_fast.verdict import Judgement

SAMPLE = 40  # trajectories shown of one store

CLASSES = {True: "right", False: "wrong", None: "none"}


@dataclass(frozen=True)
class Excerpt:
    """html: `shown` blocks of `total`. pages: those of all, empty where all are shown."""

    html: str
    shown: int
    total: int
    pages: list[Page]


def collected(path: Path, judge_id: str | None, pages: Pages) -> Excerpt:
    """The collected trajectories."""
    with closing(Store(path, writable=False)) as store:
        readings = Readings(store, judge_id)
        kinds = readings.kinds()
        chosen = sample(kinds, SAMPLE)

        def blocks(ids: Sequence[str]) -> Iterator[str]:
            return (_block({"collected": reading}) for reading in readings.of(ids))

        html, total, written = "".join(blocks([id_ for id_ in kinds if id_ in chosen])), len(kinds), list[Page]()
        if len(chosen) < total:
            written = pages.write("collected", "Collected", "trajectories", total, blocks(list(kinds)), filter_form)
    return Excerpt(html, len(chosen), total, written)


def evaluated(stores: Mapping[str, tuple[Path, str | None, Mapping[str, float]]], pages: Pages) -> Excerpt:
    """The evaluations' trajectories, those of one question side by side; stores: name -> (path, judge id, question id -> accuracy).

    Sample k of a question has the same id in every evaluation, so ids pair what belongs together.
    """
    kinds: dict[str, tuple[str, ...]] = {}
    ids: dict[str, Collection[str]] = {}
    with ExitStack() as stack:
        readings = {
            name: Readings(stack.enter_context(closing(Store(path, writable=False))), judge_id, scores)
            for name, (path, judge_id, scores) in stores.items()
        }
        for name, each in readings.items():
            of_store = each.kinds()
            ids[name] = of_store.keys()
            for id_, kind in of_store.items():
                kinds[id_] = (*kinds.get(id_, ()), name, *kind)
        chosen = sample(kinds, SAMPLE)

        def blocks(wanted: Sequence[str]) -> Iterator[str]:
            for at in range(0, len(wanted), BATCH):
                rows: dict[str, dict[str, Reading]] = {id_: {} for id_ in wanted[at : at + BATCH]}
                for name, each in readings.items():
                    for reading in each.of([id_ for id_ in rows if id_ in ids[name]]):
                        rows[reading.trajectory.id][name] = reading
                yield from map(_block, rows.values())

        html, total, written = "".join(blocks([id_ for id_ in kinds if id_ in chosen])), len(kinds), list[Page]()
        if len(chosen) < total:
            written = pages.write("evaluations", "Evaluations", "questions", total, blocks(list(kinds)), filter_form)
    return Excerpt(html, len(chosen), total, written)


def _block(readings: Mapping[str, Reading]) -> str:
    """One question: a line that opens to the trajectories, by the name of where they come from."""
    first = next(iter(readings.values()))
    trajectory, gold = first.trajectory, first.gold
    chips = []
    for name, one in readings.items():
        origin = "" if name == "collected" else f"{escape(name)} "
        chips.append(f'<span class="chip {CLASSES[one.matches]}">{origin}<b>{one.match}</b> {one.good}</span>')
    articles = "".join(_article(name, one) for name, one in readings.items())
    return (
        f'<details class="block" data-change="{_change(readings)}"><summary>'
        f'<span class="q">{short(trajectory.question, 160)}</span>'
        f'<span class="chips">{"".join(chips)}</span></summary>\n<div class="body"><p class="label">Question</p>'
        f'<div class="text question">{block(trajectory.question)}</div>'
        f'<p class="label">Gold answer</p><div class="text gold">{block(" | ".join(gold))}</div>'
        f'<div class="pair">{articles}</div></div></details>\n'
    )


def _change(readings: Mapping[str, Reading]) -> str:
    """Whether training gained or lost the question; empty when neither, or when one of the two is not there."""
    if not {"base", "trained"} <= readings.keys():
        return ""
    base, trained = (readings[name].matches is True for name in ("base", "trained"))
    return "" if base == trained else "gained" if trained else "lost"


def _article(name: str, reading: Reading) -> str:
    t = reading.trajectory
    steps = "".join(
        _step(i, step, one) for i, (step, one) in enumerate(zip(t.steps, reading.judgements, strict=True), 1)
    )
    return (
        f'<article class="trajectory" data-verdicts="{" ".join(sorted(set(reading.verdicts)))}" '
        f'data-finish="{_finish(t.finish)}" data-match="{CLASSES[reading.matches]}">'
        f'<h4>{escape(name)} <span class="id">{short(t.id, 60)}</span></h4>'
        f'<p class="outcome"><b>{reading.match}</b> · {reading.good} · {FINISHES[t.finish]}</p>'
        f'<ol class="steps">{steps or "<li>no step was taken</li>"}</ol></article>'
    )


def _finish(finish: Finish | None) -> str:
    return finish.value if finish else "unfinished"


def _step(number: int, step: Step, judgement: Judgement | None) -> str:
    verdict = judgement.verdict.value if judgement else "not judged"
    look = verdict.lower().replace(" ", "-")
    kind = (
        f"calls {step.action.tool}"
        if step.action.kind == "tool"
        else {"answer": "answers", "malformed": "malformed"}[step.action.kind]
    )
    parts = [
        f'<li class="step {look}"><p class="head"><b>Step {number}</b> {escape(kind)} '
        f"{badge(verdict, judgement.reward if judgement else None)}</p>",
        f'<div class="text action">{block(step.text, mark_tags=True) or "<i>empty</i>"}</div>',
    ]
    if judgement:
        parts.append(f'<p class="reason"><span class="label">Judge</span> {block(judgement.reason)}</p>')
    if step.observation is not None:
        parts.append(f'<p class="label">Observation</p><div class="text observation">{block(step.observation)}</div>')
    return "".join([*parts, "</li>"])


def filter_form(pages: Sequence[str]) -> str:
    """How to read the blocks in `pages`, and the form that filters them, with the choices that occur; shown by the
    script."""

    def option(value: str, name: str, attribute: str) -> str:
        found = not value or any(re.search(rf'{attribute}="[^"]*\b{value}\b', page) for page in pages)
        return f'<option value="{value}">{name}</option>' if found else ""

    verdicts = {
        "": "any",
        "GOOD": "a step GOOD",
        "BAD": "a step BAD",
        "UNKNOWN": "a step UNKNOWN",
        "NONE": "a step not judged",
    }
    changes = {"gained": "gained: only trained = gold", "lost": "lost: only base = gold"}
    choices = {
        "verdict": "".join(option(value, name, "data-verdicts") for value, name in verdicts.items())
        + '<option value="ALL">every step GOOD</option>',
        "match": option("", "any", "")
        + "".join(option(CLASSES[matches], name, "data-match") for matches, name in MATCHES.items())
        + "".join(option(value, name, "data-change") for value, name in changes.items()),
        "finish": option("", "any way", "")
        + "".join(option(_finish(finish), name, "data-finish") for finish, name in FINISHES.items()),
    }
    labels = {"verdict": "Verdicts", "match": "Answer", "finish": "Ended"}
    selects = "".join(
        f'<label>{labels[key]}<select name="{key}">{html}</select></label>\n' for key, html in choices.items()
    )
    return f"""<p>A question opens to its trajectories, step by step: what the model wrote, the verdict of the process
judge and its reason, and what the environment answered. “= gold” compares the answer with the gold answer, which the
judge never sees.</p>
<form class="filter" hidden>
{selects}<label class="search">Search in questions and steps
<input type="search" name="search" autocomplete="off"></label>
<button type="button" data-open>Open or close all</button><button type="reset">Reset</button>
<p class="found" role="status"></p>
</form>
"""
