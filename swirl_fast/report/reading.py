"""Trajectories to read, each as a block that opens to its steps, verdicts, reasons and observations: some of every kind in report.html, all
of them in the pages beside it."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path

from swirl_fast.data.store import BATCH, Store
from swirl_fast.judges.cached import NOT_JUDGED, judged_trajectories
from swirl_fast.report.markup import badge, block, escape, short
from swirl_fast.report.pages import Page, Pages
from swirl_fast.tasks import TEXT_ANSWERS
from swirl_fast.tasks.scoring import score_number, score_text
from swirl_fast.trajectory import Finish, Step, Trajectory
from swirl_fast.verdict import Judgement, Verdict

SAMPLE = 40  # trajectories shown of one store

FINISHES = {
    Finish.ANSWER: "answered",
    Finish.STEP_LIMIT: "step limit reached",
    Finish.CONTEXT_LIMIT: "context full",
    None: "not finished",
}
CLASSES = {True: "right", False: "wrong", None: "none"}
MATCHES = {True: "= gold", False: "≠ gold", None: "no answer"}


@dataclass(frozen=True)
class Reading:
    """judgements: one a step, None for a step the judge was not asked about. right: as the task scored the answer, None where no
    evaluation has written that down."""

    trajectory: Trajectory
    gold: tuple[str, ...]
    judgements: tuple[Judgement | None, ...]
    right: bool | None = None

    @property
    def matches(self) -> bool | None:
        """Whether the answer equals a gold answer; None without an answer. Some tasks accept a rounded number, which only they can tell:
        the score of an evaluation goes before the comparison here."""
        answer = self.trajectory.answer
        if answer is None:
            return None
        if self.right is not None:
            return self.right
        score = score_text if self.trajectory.task in TEXT_ANSWERS else score_number
        return score(answer, self.gold).exact_match == 1.0

    @property
    def verdicts(self) -> list[str]:
        """The names of the steps' verdicts; `NONE` for a step that was not judged."""
        return [each.verdict.value if each else "NONE" for each in self.judgements]

    @property
    def good(self) -> str:
        """`2 of 3 GOOD`, as a share of the steps with a verdict."""
        known = [one for one in self.judgements if one is not None and one.verdict is not Verdict.UNKNOWN]
        if not known:
            return "no verdict"
        return f"{sum(one.verdict is Verdict.GOOD for one in known)} of {len(known)} GOOD"

    @property
    def kind(self) -> tuple[str, ...]:
        """What a sample should have some of each: the verdicts that occur, the match with gold, the finish."""
        return (*sorted(set(self.verdicts)), MATCHES[self.matches], FINISHES[self.trajectory.finish])


class Readings:
    """The trajectories of a store with their verdicts by `judge_id`, a batch of them at a time.

    judge_id: None for the judge with most verdicts there. scores: question id -> mean accuracy of its trajectories; 1 and 0 tell each of
    them.
    """

    def __init__(self, store: Store, judge_id: str | None, scores: Mapping[str, float] | None = None) -> None:
        self._store, self._judge_id = store, judge_id or store.main_judge()
        self._gold = {question.id: question.answers for question in store.questions()}
        self._scores = scores or {}

    def kinds(self) -> dict[str, tuple[str, ...]]:
        """Trajectory id -> `Reading.kind`, of all, in natural order."""
        shared: dict[tuple[str, ...], tuple[str, ...]] = {}  # few kinds, many trajectories
        return {
            reading.trajectory.id: shared.setdefault(reading.kind, reading.kind)
            for reading in self.of(self._store.ids())
        }

    def of(self, ids: Sequence[str]) -> Iterator[Reading]:
        """The trajectories with these ids, in this order."""
        for trajectory, judgements in judged_trajectories(self._store, self._judge_id, ids):
            shown = tuple(None if judgement is NOT_JUDGED else judgement for judgement in judgements)
            right = {1.0: True, 0.0: False}.get(self._scores.get(trajectory.question_id, 0.5))
            yield Reading(trajectory, self._gold[trajectory.question_id], shown, right)


def sample(kinds: Mapping[str, tuple[str, ...]], limit: int) -> set[str]:
    """At most `limit` of the ids: one of every kind in turn, so that rare kinds are seen; within a kind in the order
    of a hash, so that no question is preferred."""
    order: dict[tuple[str, ...], list[str]] = {}
    for id_ in sorted(kinds, key=lambda id_: hashlib.sha256(id_.encode("utf-8", "surrogatepass")).digest()):
        order.setdefault(kinds[id_], []).append(id_)
    turns = sorted((turn, kind, id_) for kind, ids in order.items() for turn, id_ in enumerate(ids))
    return {id_ for _, _, id_ in turns[:limit]}


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
        chips.append(
            f'<span class="chip {CLASSES[one.matches]}">{origin}<b>{MATCHES[one.matches]}</b> {one.good}</span>'
        )
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
        f'<p class="outcome"><b>{MATCHES[reading.matches]}</b> · {reading.good} · {FINISHES[t.finish]}</p>'
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
