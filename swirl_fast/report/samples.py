"""What training sampled: a table of its steps in report.html, and pages for each step with its states and the actions drawn there."""

from __future__ import annotations

import sqlite3
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path

from swirl_fast.data.samples import FOLDER, Sample, full_from, read_samples, sample_steps, samples_file
from swirl_fast.data.store import Store
from swirl_fast.outputs.text import is_number, show
from swirl_fast.report.inputs import Run
from swirl_fast.report.markup import badge, block, escape, short
from swirl_fast.report.pages import Page, Pages
from swirl_fast.trajectory import Step, Trajectory


@dataclass
class _Summary:
    """Numbers of a step's samples."""

    trajectories: int = 0
    states: int = 0
    differing: int = 0  # states whose known rewards are not all equal
    verdicts: Counter[str] = field(default_factory=Counter)
    malformed: int = 0
    reward: float = 0.0  # sum of the known ones
    most: int = 0  # actions at one state

    @property
    def actions(self) -> int:
        return self.verdicts.total()

    @property
    def mean(self) -> float | None:
        known = self.actions - self.verdicts["UNKNOWN"]
        return self.reward / known if known else None

    def add(self, samples: Sequence[Sample]) -> None:
        """Those of one trajectory."""
        states = _states(samples)
        self.trajectories += 1
        self.states += len(states)
        self.differing += sum(_differ(state) for state in states)
        self.most = max(self.most, *map(len, states))
        self.verdicts.update(one.verdict for one in samples)
        self.malformed += sum(one.kind == "malformed" for one in samples)
        self.reward += sum(one.reward for one in samples if one.reward is not None)


def samples_section(run: Run, pages: Pages) -> str:
    """The table of steps, with a form that leads to the pages of one. A file that cannot be read is named in `run.problems`."""
    rows, options, count = [], [], 0
    for step in sample_steps(run.folder):
        try:
            summary = _Summary()
            for _, samples in _trajectories(run.folder, step):
                summary.add(samples)
            written = _write(run, step, summary, pages)
        except ValueError as error:
            run.problems.append(f"samples of training step {step} cannot be read: {error}")
            continue
        if written:
            rows.append(_row(step, summary, written[0]))
            options.append(f'<option value="{written[0].file}">{step}</option>')
            count += summary.actions
    if not rows:
        return f"<p>{_why_none(run)}</p>\n"
    head = (
        "step",
        "reward",
        "trajectories",
        "states",
        "rewards differ at",
        "actions",
        "GOOD",
        "BAD",
        "no verdict",
        "malformed",
    )
    cells = "".join(f'<th scope="col">{name}</th>' for name in head)
    return (
        f"<p>Training sampled {count:,} actions in the {len(rows):,} steps that are kept in <code>{FOLDER}/</code>"
        f"{_missing(run, len(rows))}. A step opens to its states, each with the actions drawn there, their rewards and advantages. Where "
        "the rewards at a state do not differ, no action has an advantage over the others.</p>\n"
        f'<form class="chooser" hidden><label>Training step <select name="page">{"".join(options)}</select></label>\n'
        "<button>Show its samples</button></form>\n"
        '<div class="numbers steps-kept wide" tabindex="0" role="region" aria-label="Sampled steps"><table>'
        f"<caption>Steps whose samples are kept</caption><thead><tr>{cells}</tr></thead>\n<tbody>\n{''.join(rows)}</tbody></table></div>\n"
    )


def _row(step: int, summary: _Summary, first: Page) -> str:
    numbers = (
        show(summary.mean, ""),
        f"{summary.trajectories:,}",
        f"{summary.states:,}",
        f"{summary.differing:,}" if summary.most > 1 else "–",
        f"{summary.actions:,}",
        *(f"{summary.verdicts[verdict]:,}" for verdict in ("GOOD", "BAD", "UNKNOWN")),
        f"{summary.malformed:,}",
    )
    cells = "".join(f"<td>{number}</td>" for number in numbers)
    return f'<tr><td><a href="{first.file}">step {step:,}</a></td>{cells}</tr>\n'


def _why_none(run: Run) -> str:
    if run.setting("algorithm.name") == "sft":
        return "Nothing is sampled with algorithm.name=sft: it imitates recorded actions."
    if run.setting("training.samples_mb") == 0:
        return "None are kept: training.samples_mb=0."
    return "No training step was sampled yet." if not run.metrics else "No samples of this training are kept."


def _missing(run: Run, kept: int) -> str:
    """Which steps are not there."""
    done = len({row["step"] for row in run.metrics})
    if done <= kept:
        return ""
    try:
        full = full_from(run.folder)
    except ValueError as error:
        run.problems.append(str(error))
        full = None
    limit = escape(str(run.setting("training.samples_mb")))
    reached = f", which is full from step {full[0]:,} on (training.samples_mb={limit})" if full else ""
    return f"{reached}; of {done - kept:,} steps there are none"


# ---- the pages of a step


def _trajectories(folder: Path, step: int) -> Iterator[tuple[int, list[Sample]]]:
    """(place, samples) of each trajectory of a step."""
    for place, samples in groupby(read_samples(folder, step), lambda sample: sample.place):
        yield place, list(samples)


def _states(samples: Sequence[Sample]) -> list[list[Sample]]:
    """The samples of one trajectory, by state."""
    return [list(own) for _, own in groupby(samples, lambda sample: sample.state)]


def _differ(state: Sequence[Sample]) -> bool:
    return len({sample.reward for sample in state if sample.reward is not None}) > 1


def _write(run: Run, step: int, summary: _Summary, pages: Pages) -> list[Page]:
    name = samples_file(run.folder, step).relative_to(run.folder)
    note = (
        f"<p>What training step {step:,} sampled (<code>{name}</code>): {summary.actions:,} actions at {summary.states:,} states of "
        f"{summary.trajectories:,} trajectories.</p>\n"
    )
    with ExitStack() as stack:
        recorded = _Recorded(run.store, stack)
        blocks = (_block(samples, recorded) for _, samples in _trajectories(run.folder, step))
        total = summary.trajectories
        return pages.write(
            f"samples-{step:06d}", f"Training step {step:,}", "trajectories", total, blocks, lambda _: note + FORM
        )


class _Recorded:
    """The recorded steps between the states, where this run's store has them."""

    def __init__(self, path: Path, stack: ExitStack) -> None:
        self._store: Store | None = None
        try:
            self._store = stack.enter_context(closing(Store(path, writable=False)))
        except (ValueError, RuntimeError, sqlite3.DatabaseError):
            pass  # the report says elsewhere what is wrong with it

    def steps(self, sample: Sample) -> list[Step]:
        if self._store is None or sample.observation is not None:
            return []
        try:
            found: list[Trajectory] = list(self._store.trajectories([sample.trajectory]))
        except (ValueError, RuntimeError, sqlite3.DatabaseError):
            return []  # shards of another run, or a trajectory that was itself sampled
        return found[0].steps if found[0].question == sample.question else []


def _block(samples: Sequence[Sample], recorded: _Recorded) -> str:
    """A trajectory: a line that opens to its states."""
    first, states = samples[0], _states(samples)
    steps = recorded.steps(first)
    parts = []
    for state in states:
        parts.append(_state(state))
        at = state[0].state
        if at < len(steps) and state is not states[-1]:
            parts.append(_recorded(at + 1, steps[at]))
    known = [sample.reward for sample in samples if sample.reward is not None]
    mean = show(sum(known) / len(known), "") if known else "–"
    drawn = f"{_number(len(states), 'state')}, {_number(len(samples), 'action')}"
    chips = f'<span class="chip">{drawn}</span><span class="chip">reward <b>{mean}</b></span>'
    return (
        f'<details class="block"><summary><span class="q">{short(first.question, 160)}</span><span class="chips">{chips}</span></summary>\n'
        f'<div class="body"><p class="label">Question</p><div class="text question">{block(first.question)}</div>'
        f'<p class="id">trajectory {short(first.trajectory, 60)}</p>{"".join(parts)}</div></details>\n'
    )


def _number(count: int, what: str) -> str:
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def _state(samples: Sequence[Sample]) -> str:
    verdicts = " ".join(sorted({sample.verdict for sample in samples}))
    match = "differ" if _differ(samples) else "equal"
    actions = "".join(map(_action, samples))
    state = samples[0].state
    before = f"after the question and {_number(state, 'step')}" if state else "after the question"
    return (
        f'<article class="trajectory sampled" data-verdicts="{escape(verdicts)}" data-match="{match}" data-finish="">'
        f'<h4>State {state + 1} <span class="id">{before}</span></h4>'
        f'<ol class="steps">{actions}</ol></article>'
    )


def _action(sample: Sample) -> str:
    does = {"tool": f"calls {sample.tool}", "answer": "answers"}.get(sample.kind, "malformed")
    cut = ", cut off" if sample.cut_off else ""
    look = sample.verdict.lower() if sample.verdict in ("GOOD", "BAD", "UNKNOWN") else ""
    advantage = f"{sample.advantage:+.3g}" if is_number(sample.advantage) else "none: not in the loss"
    observed = ""
    if sample.observation is not None:
        observed = f'<p class="label">Observation</p><div class="text observation">{block(sample.observation)}</div>'
    return (
        f'<li class="step {look}"><p class="head"><b>Action {sample.sample + 1}</b> {escape(does)}{cut}, {_number(sample.tokens, "token")} '
        f"{badge(sample.verdict, sample.reward)}</p>"
        f'<div class="text action">{block(sample.text, mark_tags=True) or "<i>empty</i>"}</div>'
        f'<p class="outcome">reward <b class="reward">{show(sample.reward, "")}</b> · advantage <b class="advantage">{advantage}</b></p>'
        f'<details class="why"><summary>Why {escape(sample.verdict)}</summary><p class="reason">{block(sample.reason)}</p></details>'
        f"{observed}</li>"
    )


def _recorded(number: int, step: Step) -> str:
    observed = ""
    if step.observation is not None:
        observed = f'<p class="label">Observation</p><div class="text observation">{block(step.observation)}</div>'
    return (
        f'<details class="why between"><summary>Recorded step {number} leads to state {number + 1}</summary>'
        f'<div class="text action">{block(step.text, mark_tags=True)}</div>{observed}</details>'
    )


FORM = """<form class="filter" hidden>
<label>Verdicts<select name="verdict"><option value="">any</option><option value="GOOD">an action GOOD</option>
<option value="BAD">an action BAD</option><option value="UNKNOWN">an action UNKNOWN</option></select></label>
<label>Rewards at a state<select name="match"><option value="">any</option><option value="differ">differ</option>
<option value="equal">all equal</option></select></label>
<label class="search">Search in questions and actions <input type="search" name="search" autocomplete="off"></label>
<button type="button" data-open>Open or close all</button><button type="reset">Reset</button>
<p class="found" role="status"></p>
</form>
"""
