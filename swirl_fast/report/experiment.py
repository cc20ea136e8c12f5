"""One HTML file about an experiment: its arms side by side on every task, accuracy against the number of trajectories, process labels
before and after, learning curves and what each arm cost.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from swirl_fast.files import write_parts
from swirl_fast.outputs.text import is_number, show
from swirl_fast.report.charts import Series, interval_bar, lines
from swirl_fast.report.markup import escape
from swirl_fast.report.page import page

NOTE = (
    "Means over seeds. Bars run from 0 to 100%: the dot is the mean, the line its 95% interval (bootstrap over seeds and questions). "
    "Differences are drawn in pairs, by the same seeds and questions."
)


def write_experiment_report(
    folder: Path,
    name: str,
    summary: Mapping[str, Any],
    results: Mapping[tuple[str, int], Mapping[str, Any]],
    arms: Mapping[str, Sequence[str]],
    command: str,
) -> Path:
    """Writes folder/report.html. summary: of experiments.summary.summarise. results: (arm, seed) -> a finished cell. arms: what each is,
    a line a setting. command: starts the experiment."""
    sections = {
        "Results": _results(summary),
        "Arms": _arms(arms, summary, command),
        "Gains": _gains(summary),
        "Curves": _data_curves(summary) + _reward_curves(results),
        "Cost": _costs(summary),
        "Numbers": f'<details class="file"><summary><code>summary.json</code></summary><div class="config">'
        f"{escape(json.dumps(summary, indent=2))}</div></details>\n",
    }
    path = folder / "report.html"
    write_parts(path, page(name, _lede(summary), {title: [html] for title, html in sections.items()}))
    return path


def _arms(arms: Mapping[str, Sequence[str]], summary: Mapping[str, Any], command: str) -> str:
    rows = "".join(
        f'<tr><th scope="row">{_name(arm)}<small>{len(summary["arms"].get(arm, {}).get("seeds", []))} seeds</small></th>'
        f"<td>{escape(said[0])}{''.join(f'<br><code>{escape(line)}</code>' for line in said[1:])}</td></tr>\n"
        for arm, said in arms.items()
    )
    treated, control = (escape(arm) for arm in summary["compare"])
    return (
        f"{_table('What is compared, as the file says it', ['arm', 'what it is'], rows)}"
        f"<p>The figures at the top set {treated} against {control}. This does the cells that are missing, in a new folder all:</p>\n"
        f'<div class="text action">{escape(command)}</div>\n'
    )


def _lede(summary: Mapping[str, Any]) -> str:
    treated, control = (escape(arm) for arm in summary["compare"])
    parts = [
        f"{100 * summary[f'{key}_relative_gain']:+.1f}% {what}"
        for key, what in (("in_domain", "in-domain"), ("cross_task", "across tasks"))
        if is_number(summary[f"{key}_relative_gain"])
    ]
    text = f'<p class="lede">{treated} against {control}, relative: {", ".join(parts)}.</p>\n' if parts else ""
    if not summary["complete"]:
        text += '<div class="missing"><b>Some cells are not done yet.</b> Start the experiment again to go on.</div>\n'
    return text


def _name(of: str) -> str:
    """As HTML: a line may end after an underscore or a comma."""
    return escape(of).replace("_", "_<wbr>").replace(",", ",<wbr>")


def _evaluations(summary: Mapping[str, Any]) -> list[str]:
    first = next(iter(summary["arms"].values()))
    return ["in_domain", *first["out_of_domain"]]


def _of(row: Mapping[str, Any], evaluation: str) -> Mapping[str, Any]:
    found: Mapping[str, Any] = row["in_domain"] if evaluation == "in_domain" else row["out_of_domain"][evaluation]
    return found


def _results(summary: Mapping[str, Any]) -> str:
    """A table for accuracy and one for process labels: arms by evaluations."""
    names = _evaluations(summary)
    tables = []
    for key, interval, title in (
        ("accuracy", "interval", "Accuracy"),
        ("process_label", "process_label_interval", "Mean process label"),
        ("f1", "f1_interval", "Token F1"),
    ):
        if key == "f1" and all(
            abs(_of(row, name)["f1"] - _of(row, name)["accuracy"]) < 1e-9
            for row in summary["arms"].values()
            for name in names
        ):
            continue  # numbers
        rows = "".join(
            f'<tr><th scope="row">{_name(arm)}<small>{len(row["seeds"])} seeds</small></th>'
            + "".join(_share(_of(row, name), key, interval) for name in names)
            + "</tr>\n"
            for arm, row in summary["arms"].items()
        )
        tables.append(_table(title, ["", *names], rows))
    return "".join(tables) + f'<p class="note">{NOTE}</p>\n'


def _share(one: Mapping[str, Any], key: str, interval: str) -> str:
    if one[key] is None:
        return "<td>–</td>"
    low, high = one[interval]
    return (
        f'<td><data value="{one[key]!r}">{show(one[key], "%")}</data>{interval_bar(one[key], low, high)}'
        f"<small>{show(low, '%')} – {show(high, '%')}</small></td>"
    )


def _gains(summary: Mapping[str, Any]) -> str:
    control = summary["compare"][1]
    if not summary["comparisons"]:
        return "<p>There is nothing to compare yet.</p>\n"
    names = list(next(iter(summary["comparisons"].values())))
    rows = []
    for arm, gains in summary["comparisons"].items():
        cells = ""
        for name in names:
            gain = gains.get(name)
            if not gain:
                cells += "<td>–</td>"
                continue
            low, high = (100 * end for end in gain["difference_interval"])
            kind = "better" if low > 0 else "worse" if high < 0 else ""
            relative = gain["relative_gain"]
            more = "" if relative is None else f"<small>{100 * relative:+.0f}% relative</small>"
            points = f'{100 * gain["difference"]:+.1f} <small class="unit">points</small>'
            cells += (
                f'<td><span class="{kind}">{points}</span>{more}<small>95%: {low:+.1f} to {high:+.1f}'
                f"{'' if kind else ', may be chance'}</small></td>"
            )
        rows.append(f'<tr><th scope="row">{_name(arm)}</th>{cells}</tr>\n')
    return _table(f"Accuracy against {control}", ["", *names], "".join(rows))


def _data_curves(summary: Mapping[str, Any]) -> str:
    """Accuracy over trajectories trained on, a line an arm: where arms differ in nothing but `max_trajectories`."""
    points: dict[str, dict[int, Mapping[str, Any]]] = {}
    for arm, row in summary["arms"].items():
        base, _, size = arm.partition(",max_trajectories=")
        if size.isdigit():
            points.setdefault(base, {})[int(size)] = row
    sizes = sorted({size for own in points.values() for size in own})
    if len(sizes) < 2:
        return ""
    charts = []
    for name in _evaluations(summary):
        series = [
            Series(base, [_of(own[size], name)["accuracy"] if size in own else None for size in sizes])
            for base, own in points.items()
        ]
        charts.append(lines(f"Accuracy, {name}", sizes, series, "%", over="trajectories"))
    return f'<div class="charts">{"".join(charts)}</div>\n'


def _reward_curves(results: Mapping[tuple[str, int], Mapping[str, Any]]) -> str:
    """Mean over seeds of the reward of each training step."""
    rewards: dict[str, list[list[float | None]]] = {}
    for (arm, _), cell in results.items():
        if cell["trained"] and any(is_number(value) for value in cell["training"]["reward"]):
            rewards.setdefault(arm, []).append(cell["training"]["reward"])
    if not rewards:
        return "<p>No arm was trained with rewards yet.</p>\n"
    steps = max(len(one) for own in rewards.values() for one in own)
    series = []
    for arm, own in rewards.items():
        means: list[float | None] = []
        for step in range(steps):
            values = [one[step] for one in own if step < len(one) and is_number(one[step])]
            means.append(sum(values) / len(values) if values else None)  # type: ignore[arg-type]
        series.append(Series(arm, means))
    figure = lines("Reward", list(range(1, steps + 1)), series, "%", top=1.0)
    return f'<div class="charts">{figure}</div>\n'


def _costs(summary: Mapping[str, Any]) -> str:
    names = {
        "trajectories": "kept",
        "steps": "steps",
        "generated_tokens": "tokens trained on",
        "tokens_computed": "tokens computed",
        "seconds": "time",
    }
    rows = "".join(
        f'<tr><th scope="row">{_name(arm)}</th>'
        + "".join(f"<td>{show(row['cost'][key], 's' if key == 'seconds' else '')}</td>" for key in names)
        + "</tr>\n"
        for arm, row in summary["arms"].items()
        if row["cost"]
    )
    return _table(
        "What a training took, means over seeds: trajectories kept, steps, tokens, time", ["", *names.values()], rows
    )


def _table(caption: str, head: Sequence[str], rows: str) -> str:
    columns = "".join(f'<th scope="col">{_name(one)}</th>' if one else "<td></td>" for one in head)
    return (
        f'<div class="headline wide" tabindex="0" role="region" aria-label="{escape(caption)}"><table>\n'
        f"<caption>{escape(caption)}</caption>\n<thead><tr>{columns}</tr></thead>\n<tbody>\n{rows}</tbody></table></div>\n"
    )
