"""HTML files about a run: what training changed, its curves, the actions that it sampled, and trajectories to read step by step with
their verdicts.

    config.yaml  metrics.jsonl  samples/  filter.json  summary.json  hardware.json  trajectories.db
    evaluations/NAME.json, NAME.db
        ->  report.html      numbers, curves, and 40 trajectories of every kind
            report/*.html    what is too long for it, a megabyte a page: the samples of every training step, and all trajectories

Every one of them may be missing: the report shows what there is and says what is not there yet. It opens by a double click and needs no
network: style sheet, script and charts are inside each file, and its Content-Security-Policy forbids everything else, so no text of a
model can load or run anything. To pass a report on, take report.html and the folder report/ with it.
"""

from __future__ import annotations

import json
import re
import shlex
import sqlite3
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from swirl_fast.files import write_parts
from swirl_fast.outputs.folder import by_question
from swirl_fast.outputs.text import is_number, show
from swirl_fast.report import reading
from swirl_fast.report.curves import curves
from swirl_fast.report.headline import headline
from swirl_fast.report.inputs import Run, load_run
from swirl_fast.report.markup import escape
from swirl_fast.report.page import page
from swirl_fast.report.pages import Pages, links
from swirl_fast.report.samples import samples_section

REPORT_FILE = "report.html"


def write_report(run_folder: Path) -> Path:
    """Writes run_folder/report.html and the pages in run_folder/report, in place of those before, and returns the path of the first.

    Changes nothing else, and may be called while a stage is running. Raises ValueError when there is no such folder;
    a file in it that cannot be read is named in the report.
    """
    folder = Path(run_folder)
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder: check run.folder and run.name, or start a run first")
    path, pages = folder / REPORT_FILE, Pages(folder)
    write_parts(path, _page(load_run(folder), pages))
    pages.remove_others()
    return path


def _page(run: Run, pages: Pages) -> Iterator[str]:
    sections = {
        "Result": headline(run),
        "Training": curves(run.metrics, kl_measured=run.setting("algorithm.kl_coef") != 0),
        "Samples": samples_section(run, pages),
        "Filter": _survivors(run),
        "Trajectories": _trajectories(run, pages),
        "Settings": _settings(run),
    }
    # Last: the sections add what they could not read.
    problems = "".join(f"<li>{_with_code(problem)}</li>" for problem in run.problems)
    if problems:
        problems = f'<div class="missing"><b>This run is not complete.</b><ul>{problems}</ul></div>\n'
    head = f"{_lede(run)}{_facts(run)}{problems}"
    return page(run.folder.resolve().name, head, {title: [html] for title, html in sections.items()})


def _with_code(text: str) -> str:
    """As HTML, what is in backticks as code."""
    return re.sub("`([^`]*)`", r"<code>\1</code>", escape(text))


def _lede(run: Run) -> str:
    """The result in one sentence; nothing before there is one."""
    if run.compared is None:
        return ""
    base, trained = run.compared
    labels = [] if run.judges_differ("judge") else [("process_label", "the mean process label")]
    parts = [
        f"{name} went from {show(base[key], '%')} to {show(trained[key], '%')}"
        for key, name in [("accuracy", "accuracy"), *labels]
        if is_number(base.get(key)) and is_number(trained.get(key))
    ]
    if not parts:
        return ""
    return f'<p class="lede">On {show(trained.get("questions"), "")} held-out questions {", ".join(parts)}.</p>\n'


def _facts(run: Run) -> str:
    facts: dict[str, str] = {}
    kind = run.setting("tasks.kind")
    for name, value in {
        "Model": Path(str(run.setting("model.path") or "")).name,
        "Task": run.setting("tasks.dataset") if kind == "reasoning_gym" else kind,
        "Algorithm": run.setting("algorithm.name"),
        "Seed": run.setting("run.seed"),
        "Trained on": _hardware(run),
    }.items():
        if value not in (None, ""):
            facts[name] = str(value)
    if run.filter and is_number(run.filter.get("kept")):
        facts["Trajectories kept"] = f"{show(run.filter['kept'], '')} of {show(run.filter.get('total'), '')}"
    if run.metrics:
        steps, wanted = show(run.metrics[-1]["step"], ""), run.setting("training.steps")
        facts["Training steps"] = f"{steps} of {wanted:,}" if isinstance(wanted, int) else steps

        def total(key: str) -> float:
            return sum(row[key] for row in run.metrics if is_number(row.get(key)))

        facts["Training time"] = show(total("seconds"), "s")
        if total("tokens_effective") > total("tokens_computed") > 0:  # not of rows, which share nothing
            facts["Shared prefixes"] = f"{total('tokens_effective') / total('tokens_computed'):.1f} times fewer tokens"
    items = "".join(f"<div><dt>{name}</dt><dd>{escape(value)}</dd></div>" for name, value in facts.items())
    return f'<dl class="facts">{items}</dl>\n' if items else ""


def _hardware(run: Run) -> str:
    """A GPU a rank, or the CPU that all ranks share; empty before a training."""
    if run.hardware is None:
        return ""
    processor, cores, ranks = (run.hardware[key] for key in ("processor", "cores", "ranks"))
    if cores is None:
        return f"{ranks} × {processor}"
    return f"{processor}, {cores} cores" + (f", {ranks} ranks" if ranks != 1 else "")


def _survivors(run: Run) -> str:
    if run.filter is None:
        return "<p>No filter has been applied yet.</p>\n"
    states = run.filter.get("states")
    html = _survivor_table(run.filter, "trajectories", "Trajectories left after each condition")
    if isinstance(states, dict):
        html += _survivor_table(states, "states", "States at which training draws actions")
    return html


def _survivor_table(found: Mapping[str, Any], what: str, caption: str) -> str:
    total, survivors = found.get("total"), found.get("survivors")
    rows = []
    for text, count in survivors if isinstance(survivors, list) else []:
        share = count / total if total else 0.0
        rows.append(
            f'<tr><th scope="row">{escape(str(text))}</th>'
            f'<td class="number"><data value="{count}">{count:,}</data></td><td class="number">{show(share, "%")}</td>'
            f'<td><span class="share" style="width:{100 * share:.1f}%"></span></td></tr>\n'
        )
    describe = str(found.get("describe", ""))
    return (
        f"<p>{escape(describe[:1].upper() + describe[1:])}.</p>\n"
        f'<div class="wide" tabindex="0" role="region" aria-label="Survivors of the filter: {what}"><table class="survivors">'
        f"<caption>{caption}</caption><thead><tr>"
        f'<th scope="col">{what}</th><th scope="col" class="number">left</th>'
        '<th scope="col" class="number">share</th><td></td></tr>'
        f"</thead><tbody>\n{''.join(rows)}</tbody></table></div>\n"
    )


def _trajectories(run: Run, pages: Pages) -> str:
    folder, collected = run.folder / "evaluations", run.store
    stores = {
        name: (folder / f"{name}.db", one.get("judge"), by_question(one, "accuracy"))
        for name, one in run.evaluations.items()
        if (folder / f"{name}.db").is_file()
    }
    parts = []
    if stores:
        parts.append(_excerpt(run, "Evaluations", lambda: reading.evaluated(stores, pages)))
    if collected.is_file():
        parts.append(_excerpt(run, "Collected", lambda: reading.collected(collected, run.judge_id, pages)))
    if not any(parts):
        return "<p>There are no trajectories to read yet.</p>\n"
    return reading.filter_form(parts) + "".join(parts)


def _excerpt(run: Run, title: str, load: Callable[[], reading.Excerpt]) -> str:
    try:
        excerpt = load()
    except (ValueError, sqlite3.DatabaseError) as error:
        run.problems.append(f"{title.lower()} trajectories cannot be read: {error}")
        return ""
    what = "questions, the evaluations' trajectories side by side" if title == "Evaluations" else "trajectories"
    if excerpt.shown == excerpt.total:
        return f"<h3>{title}</h3>\n<p>All {excerpt.total:,} {what}.</p>\n{excerpt.html}"
    return (
        f"<h3>{title}</h3>\n<p>{excerpt.shown:,} of {excerpt.total:,} {what}, chosen so that every kind of verdict, answer and ending is "
        f"seen: their shares are not those of the run. All of them, page by page:</p>\n"
        f"{links(excerpt.pages, f'All of {title}')}{excerpt.html}"
    )


def _settings(run: Run) -> str:
    files = {"config.yaml": run.config_text, "summary.json": json.dumps(run.summary, indent=2) if run.summary else ""}
    parts = [
        f'<details class="file"><summary><code>{name}</code></summary>'
        f'<div class="config">{escape(text)}</div></details>\n'
        for name, text in files.items()
        if text
    ]
    if not parts:
        return "<p>There is no <code>config.yaml</code> yet.</p>\n"
    return _again(run) + "".join(parts)


def _again(run: Run) -> str:
    """The command that repeats the run beside it."""
    config = shlex.quote(str(run.folder / "config.yaml"))
    name = shlex.quote(f"run.name={run.folder.resolve().name}-again")
    ranks, nodes = (run.hardware["ranks"], run.hardware["nodes"]) if run.hardware else (1, 1)
    several = f"--nnodes {nodes} " if nodes > 1 else ""
    meet = " --rdzv-backend c10d --rdzv-endpoint HOST:PORT" if nodes > 1 else ""
    start = (
        "swirl-fast" if ranks == 1 else f"torchrun {several}--nproc-per-node {-(-ranks // nodes)}{meet} -m swirl_fast"
    )
    return (
        "<p>The same run once more, under another name, from the folder in which this one was started:</p>\n"
        f'<div class="text action">{escape(f"{start} run --config {config} {name}")}</div>\n'
    )
